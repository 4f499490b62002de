"""A run in memory, as ``build`` makes it, and moved step by step.

Step k, in rows and names, is the one after which k optimizer steps are done. Every function here is called by all ranks
of a run, which agree in what they return; what belongs to one rank alone is named so.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dashattn.stats import AttentionStats
from data import Batch, BatchStream, Prefetched
from experiments.config import TrainConfig
from experiments.errors import Stopped
from experiments.files import METRICS, read_rows
from experiments.sparsity import HOLD_EVERY, Hold, count_keys
from experiments.training.anomalies import LossWatch
from experiments.training.checkpoint import save_checkpoint, step_name, write_checkpoint
from experiments.training.display import next_command
from experiments.training.engine import (
    DataError,
    backend_metrics,
    forward,
    gradient_norms,
    optimizer_step,
    set_learning_rate,
    to_host,
    validation_loss,
)
from experiments.training.metrics import Clock, MetricsWriter, attention_metrics, peak_memory_mib
from experiments.training.optim import learning_rate
from experiments.training.ranks import Ranks
from experiments.training.run_dir import RunDir
from experiments.training.tracing import Tracer
from experiments.training.utilisation import Utilisation


@dataclass(kw_only=True)
class Run:
    """What a step works with, as it changes; ``build`` makes it."""

    config: TrainConfig  # resolved, with the data's vocabulary
    run_dir: RunDir  # as it was when the run was built
    config_hash: str  # that it began with
    ranks: Ranks
    engine: object  # DeepSpeed's
    train_data: Prefetched
    validation_data: BatchStream
    micro_batches: int  # a step and rank
    parameter_order: str  # in the optimizer
    tokens: int  # read so far, over all ranks
    saved: int  # step of the newest checkpoint
    hold: Hold | None  # of the attention's target sparsity, if training heeds one
    watch: LossWatch
    metrics: MetricsWriter
    clock: Clock
    utilisation: Utilisation
    tracer: Tracer


class Read(NamedTuple):
    """The batches of a step."""

    batches: list[Batch]  # this rank's, one a micro-batch
    position: dict  # of this rank's data before them
    targets: float  # over all ranks
    tokens: float  # over all ranks
    error: Exception | None  # that ended this rank's source, which then has fewer batches
    failures: int  # ranks whose source ended so
    stops: int  # ranks that were asked to stop


def read_step(run: Run, *, is_to_stop: bool = False) -> Read:
    """Read a step's batches, and agree on what befell one of the ranks, as when this one ``is_to_stop``."""
    position = run.train_data.state_dict()  # before: if the source fails, the steps up to here are saved with it
    with run.clock.waiting():
        batches, error = read_batches(run)
    counts = (sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches))
    # One exchange of the hosts for all that ranks must agree on. A signal reaches ranks at different steps: only what
    # is summed here may decide a branch.
    targets, tokens, failures, stops = run.ranks.sum(*counts, error is not None, is_to_stop)
    shared = run.ranks.sequence_parallel  # ranks that have read the same rows, and counted them
    return Read(batches, position, targets / shared, tokens / shared, error, int(failures), int(stops))


def read_batches(run: Run) -> tuple[list[Batch], Exception | None]:
    """A step's micro-batches; with an error, whatever its kind, if the source fails: what was learned must be saved."""
    batches = []
    try:
        for _ in range(run.micro_batches):
            batches.append(next(run.train_data))
    except Exception as error:
        return batches, error
    return batches, None


class Update(NamedTuple):
    """What an optimizer step tells."""

    loss: float  # in nats, on average over the targets of all ranks
    auxiliary_loss: float | None  # on average over the tokens; what was minimised beside ``loss``, if there is any
    rate: float  # learning rate
    grad_norm: Tensor | None  # L2, before clipping; None = not finite, and the weights are as they were
    norms: dict[str, float]  # of parts of the gradient, if asked for
    stats: list[AttentionStats] | None  # of the first micro-batch, if asked for


def take_step(run: Run, step: int, read: Read, *, with_norms: bool = False, with_stats: bool = False) -> Update:
    """Optimizer step ``step``, on what was read for it.

    The host waits for the device at one place, where it must know that the gradient is finite; while the weights are
    updated it is ahead, with the next step's data.
    """
    engine, device = run.engine, run.ranks.device
    # Rate and schedules are functions of the steps done before, and of nothing else: a resumed run has the same ones.
    rate = learning_rate(run.config.optim, step - 1, run.config.steps)
    engine.module.set_step(step - 1)
    set_learning_rate(engine, rate)
    losses, norms, stats = torch.zeros(2, device=device), {}, None  # the model's, and the auxiliary one
    for index, batch in enumerate(read.batches):
        output = forward(engine, batch, device, return_stats=with_stats and index == 0)
        # Every target of the step counts the same, whichever micro-batch and rank it is in. DeepSpeed averages over
        # both, hence the factor. Of ranks that share rows each has its share of their loss: it is no different there.
        share, averaged = batch.num_targets / read.targets, run.micro_batches * run.ranks.world_size
        objective = output.loss * (share * averaged)
        losses[0] += output.loss.detach() * share
        auxiliary = output.auxiliary_loss
        if auxiliary is not None:  # a mean over tokens
            share = batch.num_tokens / read.tokens
            objective = objective + auxiliary * (share * averaged)
            losses[1] += auxiliary.detach() * share
        engine.backward(objective)
        stats = stats or output.stats
        if index == len(read.batches) - 1:
            # Between the last backward pass and the update: the copy of the loss must not wait for the update, and the
            # update clears the gradients that the norms are of.
            read_losses = to_host(losses)
            norms = gradient_norms(engine) if with_norms else {}
        grad_norm = optimizer_step(engine, run.config.optim.grad_clip)
    mean_loss, auxiliary_loss = run.ranks.sum(*read_losses())
    run.tokens += int(read.tokens)
    run.clock.count(read.tokens)
    return Update(mean_loss, None if auxiliary is None else auxiliary_loss, rate, grad_norm, norms, stats)


def is_measured(run: Run, step: int, read: Read) -> bool:
    """Whether ``hold_sparsity`` needs the step's statistics. Rows that a curriculum makes shorter are left out: they
    have a sparsity of their own. So are steps in which a layer attends to everything."""
    if not run.config.attention.holds_sparsity or step % HOLD_EVERY:
        return False
    is_whole = read.batches[0].input_ids.shape[1] >= run.config.data.seq_len
    return is_whole and not any(backend.config.is_dense_at(step - 1) for backend in run.engine.module.turned)


def hold_sparsity(run: Run, done: Update) -> None:
    """Turn the knob, for the steps to come, by what this one measured. The host waits for the step to end."""
    keys = count_keys(run.engine.module, done.stats, run.config.attention.sparsity_count)
    active, counted = run.ranks.sum(*keys.tolist())
    run.engine.module.set_knob(run.hold.update(1 - active / counted))


def judge(run: Run, step: int, read: Read, done: Update) -> str | None:
    """``skipped``, ``spike`` or None; what went wrong is recorded with the place in the data that it happened at.

    Raises:
        Stopped: too many steps in a row were skipped, or all there were, or the last one, and validation fails, too.
    """
    # With fp16 an infinite gradient is a step that loss scaling skips.
    is_finite = done.grad_norm is not None or run.config.deepspeed.precision == "fp16"
    anomaly = run.watch.judge(done.loss, is_finite=is_finite)
    if anomaly is not None:
        norm, positions = _host_norm(done), run.ranks.gather_readers(read.position)  # all ranks must gather
        if run.ranks.is_main:
            run.watch.record(anomaly, step, done.loss, norm, positions)
        run.metrics.print(f"WARNING: step {step} {anomaly}: loss {done.loss:.4g}, grad_norm {norm:.4g}")
    # A run may be shorter than the limit: for weights that it ends at with a step skipped only the validation speaks.
    ends_skipped = anomaly == "skipped" and step == run.config.steps
    has_failed = ends_skipped and (run.watch.skipped == step or not math.isfinite(_validation_loss(run)))
    if run.watch.is_hopeless() or has_failed:
        # To be looked at, under a name that no resume takes: from this state no step has been finite.
        kept = run.run_dir.checkpoints / f"stopped-{step_name(step)}"
        write_checkpoint(kept, _state(run, step, run.train_data.state_dict()), run.engine, run.ranks)
        raise run.watch.stop(step, kept)
    return anomaly


def log(run: Run, step: int, read: Read, done: Update) -> None:
    """Write a step's row to metrics.jsonl. The host waits for the step to end."""
    row = {"step": step, "split": "train", "tokens": run.tokens, "loss": done.loss, "lr": done.rate}
    row |= {} if done.auxiliary_loss is None else {"auxiliary_loss": done.auxiliary_loss}
    row |= {"grad_norm": _host_norm(done), "skipped_steps": run.watch.skipped, **done.norms, **run.clock.read()}
    row |= {**backend_metrics(run.engine), "peak_memory_mib": peak_memory_mib(run.ranks.device)}
    row |= {} if run.hold is None else {"knob": run.hold.knob}
    if done.stats:
        run.utilisation.measure(done.stats)
    row |= run.utilisation.read(read.batches, row["tokens_per_s"])
    run.metrics.write(row | (attention_metrics(done.stats) if done.stats else {}))


def _host_norm(done: Update) -> float:
    return math.inf if done.grad_norm is None else float(done.grad_norm)


def is_validated(config: TrainConfig, step: int) -> bool:
    return config.eval_every > 0 and (step == config.steps or step % config.eval_every == 0)


def owes_validation(config: TrainConfig, run_dir: RunDir) -> bool:
    """Whether the run ended before the validation of the step that it stands at."""
    if run_dir.step == 0 or not is_validated(config, run_dir.step):
        return False
    rows = read_rows(run_dir.path / METRICS)
    return not any(row["step"] == run_dir.step and row["split"] == "validation" for row in rows)


def validate(run: Run, step: int) -> None:
    """Write the validation loss after ``step`` to metrics.jsonl.

    Raises:
        Stopped: the validation data cannot be read; the step is saved.
    """
    try:
        loss = _validation_loss(run)
    except DataError as error:
        if run.saved < step:
            save(run, step)
        raise Stopped(
            f"the validation data failed at step {step} ({error}). All steps are saved: when they can be read again, "
            "the same command goes on with this validation"
        ) from error
    run.metrics.write({"step": step, "split": "validation", "tokens": run.tokens, "loss": loss})
    run.clock.restart()


def _validation_loss(run: Run) -> float:
    return validation_loss(run.engine, run.validation_data, run.ranks)


def save(run: Run, step: int, position: dict | None = None) -> None:
    """Write a checkpoint of the run after ``step``.

    Args:
        position: of this rank's data there; None = where they are now.
    """
    state = _state(run, step, run.train_data.state_dict() if position is None else position)
    keep = {"keep": run.config.keep_checkpoints, "keep_every": run.config.keep_every}
    save_checkpoint(run.run_dir.checkpoints, state, run.engine, run.ranks, **keep)
    run.saved = step
    run.clock.restart()


def tell_end(run: Run) -> None:
    """Where the run's last checkpoint is, and what to type next."""
    run.metrics.print(f"complete: {run.run_dir.checkpoints / step_name(run.config.steps)}")
    run.metrics.print(f"next: {next_command(run.config)}")


def stop_without_data(run: Run, step: int, read: Read) -> Stopped:
    """Save the steps before ``step``, whose data did not come. Returns what to raise."""
    if run.saved < step - 1:
        save(run, step - 1, read.position)
    return Stopped(
        f"the data source failed at step {step} ({read.error or 'on another rank'}). All steps before it are "
        "saved: when the source answers again, the same command goes on"
    )


def _state(run: Run, step: int, position: dict) -> dict:
    """state.json of a checkpoint after ``step``, with the data of this rank at ``position``."""
    return {
        "step": step,
        "tokens": run.tokens,
        "skipped_steps": run.watch.skipped,
        "data": run.ranks.gather_readers(position),
        "world_size": run.ranks.world_size,
        "stage": run.config.deepspeed.stage,
        "config_hash": run.config_hash,
        "parameter_order": run.parameter_order,
        **({} if run.hold is None else {"sparsity": run.hold.state_dict()}),
    }
