"""A run in memory: built from its configuration, restored to where its directory stands, and moved step by step.

Step k, in rows and names, is the one after which k optimizer steps are done. Every function here is called by all ranks
of a run, which agree in what they return; what belongs to one rank alone is named so.
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dashattn.stats import AttentionStats
from data import NO_TOKEN, Batch, BatchStream, Prefetched, TextTokenizer, build_data
from experiments.config import TrainConfig
from experiments.errors import Stopped
from experiments.files import ANOMALIES, METRICS, read_rows
from experiments.origin import with_commits, with_own_tokenizer
from experiments.provenance import device_name
from experiments.sparsity import HOLD_EVERY, Hold, count_keys, knob_span
from experiments.training.anomalies import LossWatch
from experiments.training.check import accumulation
from experiments.training.checkpoint import load_checkpoint, save_checkpoint, step_name, write_checkpoint
from experiments.training.display import next_command
from experiments.training.engine import (
    DataError,
    backend_metrics,
    build_engine,
    deepspeed_json,
    forward,
    gradient_norms,
    optimizer_step,
    set_learning_rate,
    to_host,
    validation_loss,
)
from experiments.training.memory import check_room
from experiments.training.metrics import Clock, MetricsWriter, attention_metrics, peak_memory_mib
from experiments.training.optim import build_optimizer, check_order, freeze, learning_rate, parameter_order
from experiments.training.ranks import Ranks, init_ranks
from experiments.training.replacing import make_way
from experiments.training.run_dir import (
    RunDir,
    check_start,
    config_hash,
    find_run_dir,
    open_run_dir,
    verify_checkpoint,
)
from experiments.training.start_knob import find_start_knob
from experiments.training.tracing import Tracer
from experiments.training.utilisation import Utilisation, peak_tflops
from experiments.training.weights import Loaded, find_weights, load_weights
from models import Transformer


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


def build(config: TrainConfig, overrides: Sequence[str], resources: ExitStack) -> Run | None:
    """Everything a step needs, restored to where the run stands; None if the run is complete.

    Nothing is written before every rank has looked at the run directory and everything that can be refused was.

    Args:
        config: as ``training.check.check`` returns it.
        overrides: of the command line, for the record.
        resources: takes what has to be closed when the run ends.

    Raises:
        ValueError: the run directory, the data or the weights do not fit the configuration.
    """
    if config.overwrite:
        make_way(config, init_ranks(config.device, config.sequence_parallel), resources)
    config = replace(config, data=with_commits(config.data, config.run_dir, config.branch_from))
    run_dir = find_run_dir(config)
    # What needs no other rank, device or data comes first: a complete run, a cell of a sweep say, ends here at once,
    # and wrong weights are refused before the data are prepared.
    if run_dir.step >= config.steps and not owes_validation(config, run_dir):
        if os.environ.get("RANK", "0") == "0":
            print(f"{run_dir.path} is complete: {run_dir.step} steps\nnext: {next_command(config)}")
        return None
    weights = None  # a run that resumes has its own, and the folder it began with may be gone
    if config.init_from is not None and run_dir.checkpoint is None:
        weights = find_weights(config.init_from)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = init_ranks(config.device, config.sequence_parallel)
    run_dir = verify_checkpoint(run_dir, config, ranks)
    rows, micro_batches = accumulation(config, ranks.world_size)
    check_room(config, ranks)

    train_data, validation_data = _open_data(config, run_dir, ranks, rows)
    check_start(run_dir, train_data.describe())
    config = _with_tokens(config, train_data)
    torch.manual_seed(config.seed)  # the weights; nothing after this draws from PyTorch's global generators
    model = Transformer(config.model, config.attention)
    freeze(model, config.optim)
    order = parameter_order(model, config.optim)
    start = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": train_data.describe(),
        "tokenizer": train_data.tokenizer and train_data.tokenizer.fingerprint(),
        "unigram_entropy": validation_data.unigram_entropy(),  # a loss must be well below; null = not known
    }
    if weights is not None:
        loaded = load_weights(model, weights)
        start["init_from"] = {"weights": str(weights.resolve()), **asdict(loaded)}
    if run_dir.is_branch:
        start["branch_from"] = {"checkpoint": str(run_dir.checkpoint.resolve()), "step": run_dir.step}
    if run_dir.damaged:
        start["damaged_checkpoints"] = dict(run_dir.damaged)
    if run_dir.checkpoint is not None:
        positions = run_dir.state["data"]
        # Of another number of readers: the state of a stream that counts over all of them is the same for each.
        train_data.load_state_dict(positions[ranks.reader if len(positions) == ranks.readers else 0])
        check_order(model, order, run_dir.state.get("parameter_order"))
    hold = _find_hold(model, config, run_dir, ranks, rows, start)
    # From here on the stream is read ahead, so that it must stand where the run does.
    train_data = resources.enter_context(
        closing(Prefetched(train_data, depth=micro_batches, pin_memory=config.device == "cuda"))
    )
    ranks.barrier()  # every rank has looked at the run directory before one changes it
    _open(run_dir, config, overrides, start, train_data.tokenizer, ranks, resources)

    # The checkpoint is loaded into the engine, not into the model: it holds the optimizer's state, too, and DeepSpeed's
    # master weights, which the model's rounded ones would not give back.
    json = deepspeed_json(
        config,
        parameters=start["parameters"],
        rows=rows,
        micro_batches=micro_batches,
        universal=run_dir.is_resharded,
    )
    engine = _build_engine(model, config, ranks, json)
    if run_dir.checkpoint is not None:
        scratch = run_dir.checkpoints if run_dir.is_resharded else None
        load_checkpoint(run_dir.checkpoint, engine, ranks, reshard_in=scratch)
    metrics = resources.enter_context(
        closing(MetricsWriter(run_dir.path, config, main=ranks.is_main, step=run_dir.step))
    )
    peak = peak_tflops(config, device_name(config.device))
    in_pytorch = sorted({backend.capabilities.in_pytorch for backend in model.backends} - {None})
    knows_peak = peak is not None or config.device == "cpu"
    _print_start(metrics, run_dir, ranks, start, knows_peak=knows_peak, in_pytorch=in_pytorch)
    traced = config.profile_steps if ranks.is_main else 0
    return Run(
        config=config,
        run_dir=run_dir,
        config_hash=config_hash(config) if run_dir.is_new else run_dir.state["config_hash"],
        ranks=ranks,
        engine=engine,
        train_data=train_data,
        validation_data=validation_data,
        micro_batches=micro_batches,
        parameter_order=order,
        tokens=run_dir.state.get("tokens", 0),
        saved=run_dir.step,
        hold=hold,
        watch=LossWatch(
            run_dir.path / ANOMALIES, skipped=run_dir.state.get("skipped_steps", 0), limit=config.max_skipped_steps
        ),
        metrics=metrics,
        clock=Clock(),
        utilisation=Utilisation(config, peak and peak * ranks.world_size),
        tracer=resources.enter_context(closing(Tracer(run_dir.path, traced, run_dir.step + 1, ranks.device))),
    )


def _open(
    run_dir: RunDir,
    config: TrainConfig,
    overrides: Sequence[str],
    start: dict,
    tokenizer: TextTokenizer | None,
    ranks: Ranks,
    resources: ExitStack,
) -> None:
    """``open_run_dir`` by the first rank; where that fails all ranks end alike, and none waits for another."""
    error = None
    if ranks.is_main:
        try:
            resources.callback(open_run_dir(run_dir, config, overrides, start, tokenizer).release)
        except (ValueError, OSError, Stopped) as caught:
            error = caught
    told = ranks.gather(None if error is None else (str(error), getattr(error, "exit_code", 1)))[0]
    if error is not None:
        raise error
    if told is not None:
        stopped = Stopped(told[0])
        stopped.exit_code = told[1]
        raise stopped


def _open_data(config: TrainConfig, run_dir: RunDir, ranks: Ranks, rows: int) -> tuple[BatchStream, BatchStream]:
    """This rank's training and validation streams, in batches of ``rows`` rows."""
    data = with_own_tokenizer(config.data, run_dir.tokenizer_home)
    train, validation = (
        build_data(
            data,
            split=split,
            cache_dir=Path(config.cache_dir).expanduser(),
            seed=config.seed,
            rows=rows,
            rank=ranks.reader,
            world_size=ranks.readers,
        )
        for split in ("train", "validation")
    )
    return train, validation


def _with_tokens(config: TrainConfig, data: BatchStream) -> TrainConfig:
    """``config`` with a vocabulary that holds the data's tokens, and the one of them that begins documents."""
    own = config.model.vocab_size or data.vocab_size
    if own < data.vocab_size:
        raise ValueError(
            f"model.vocab_size={own} is below the data's {data.vocab_size}: set model.vocab_size=null to take the "
            "data's"
        )
    config = replace(config, model=replace(config.model, vocab_size=own))
    if data.tokenizer is None:
        return config
    return replace(config, data=replace(config.data, bos_token=data.tokenizer.bos_token or NO_TOKEN))


def _find_hold(
    model: Transformer, config: TrainConfig, run_dir: RunDir, ranks: Ranks, rows: int, start: dict
) -> Hold | None:
    """What holds the target sparsity, if there is one, with its knob set in ``model``: found if the run is at its
    beginning, which is noted in ``start``."""
    attention = config.attention
    if not attention.controls_sparsity:
        return None
    if run_dir.checkpoint is None:
        found = find_start_knob(config, model, ranks, rows)
        start["sparsity"] = {"knob_name": attention.knob, **found.record()}
        state = {"knob": found.knob}
    else:
        state = run_dir.state["sparsity"]
        model.set_knob(state["knob"])
    span = knob_span([backend.config for backend in model.turned], config.data.seq_len)
    return Hold(attention.target_sparsity, span, **state)


def _build_engine(model: Transformer, config: TrainConfig, ranks: Ranks, json: dict):
    """``model`` on its device, as DeepSpeed trains it."""
    model.to(ranks.device)
    model.checkpoint_activations = config.activation_checkpointing
    if ranks.sequence is not None:
        model.share_sequences(ranks.sequence)
    if config.compile:
        model.compile_layers()
    return build_engine(model, build_optimizer(model, config.optim, ranks.device), json)


def _print_start(
    metrics: MetricsWriter,
    run_dir: RunDir,
    ranks: Ranks,
    start: dict,
    *,
    knows_peak: bool,
    in_pytorch: Sequence[str],
) -> None:
    """What a reader of the terminal should know before the first step."""
    metrics.print(f"{run_dir.path}: {start['parameters']:,} parameters, {ranks.world_size} x {ranks.device.type}")
    if "init_from" in start:
        differences = dict(start["init_from"])
        metrics.print(f"weights of {differences.pop('weights')}; {Loaded(**differences)}")
    if "sparsity" in start:
        found = "{knob_name}={knob:.4g} has a sparsity of {sparsity:.1%} on training rows"
        metrics.print(found.format(**start["sparsity"]))
    for name, problem in run_dir.damaged.items():
        metrics.print(f"WARNING: {name} is damaged ({problem}) and was set aside")
    if run_dir.checkpoint is not None:
        verb = "branched" if run_dir.is_branch else "resumed"
        metrics.print(f"{verb} from {run_dir.checkpoint} at step {run_dir.step}")
    for what in in_pytorch if ranks.device.type == "cuda" else ():
        metrics.print(f"in PyTorch, for want of kernels: {what}")
    if not knows_peak:
        metrics.print("no MFU: the peak of this device and precision is not known, set peak_tflops=...")


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
