"""Train one model: compose -> check -> build -> loop.

    python train.py                                        # a debug model on Python's standard library, on a CPU
    python train.py attention=dash model=60m steps=2000
    torchrun --standalone --nproc-per-node 8 train.py ...  # ranks share rows_per_batch
    deepspeed --no_local_rank --num_gpus 8 train.py ...    # the same by DeepSpeed's launcher
    python train.py launcher=slurm launcher.nodes=2 ...    # submit it as a job
    python train.py --cfg job                              # show everything that can be set

Starting a run in its own directory again resumes it from the latest checkpoint. SIGTERM, SIGUSR1 and SIGUSR2 save at
the next step and exit with code 75, which asks to be started again; a second signal exits at once.
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import hydra
import torch
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from dashattn.stats import AttentionStats
from data import Batch, BatchStream, Prefetched, build_data
from experiments.config import TrainConfig, accumulation, check, register_configs, to_config
from experiments.errors import Preempted, Stopped, run_faults, user_errors
from experiments.signals import StopRequest
from experiments.training.anomalies import ANOMALIES, LossWatch
from experiments.training.checkpoint import (
    find_weights,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    step_name,
    write_checkpoint,
)
from experiments.training.engine import (
    Ranks,
    backend_metrics,
    build_engine,
    deepspeed_json,
    forward,
    gradient_norms,
    init_ranks,
    optimizer_step,
    set_learning_rate,
    to_host,
    validation_loss,
)
from experiments.training.metrics import Clock, MetricsWriter, attention_metrics, peak_memory_mib
from experiments.training.optim import build_optimizer, learning_rate
from experiments.training.run_dir import RunDir, config_hash, find_run_dir, open_run_dir, verify_checkpoint
from experiments.training.tracing import Tracer
from experiments.training.utilisation import Utilisation, peak_tflops
from models import Transformer
from slurm.submit import submit_run

register_configs()


@dataclass
class Run:
    """What the loop works with."""

    config: TrainConfig
    run_dir: RunDir
    ranks: Ranks
    engine: object  # DeepSpeed's
    train_data: Prefetched
    validation_data: BatchStream
    micro_batches: int  # a step and rank
    tokens: int  # read so far, over all ranks
    watch: LossWatch
    metrics: MetricsWriter
    utilisation: Utilisation
    tracer: Tracer


def train(config: TrainConfig, overrides: Sequence[str] = ()) -> Path:
    """Do a run, or what is left of it. Returns the run directory.

    Raises:
        ValueError: if the configuration cannot work or the run directory holds another run; nothing is changed then.
        Stopped: the run ended before its last step.
    """
    with StopRequest() as request, ExitStack() as resources:
        run = build(check(config), overrides, resources)
        if run is not None:
            loop(run, request)
    return Path(config.run_dir).expanduser()


def build(config: TrainConfig, overrides: Sequence[str], resources: ExitStack) -> Run | None:
    """Everything the loop needs, restored to where the run stands; None if the run is complete. What has to be closed
    is left to ``resources``."""
    run_dir = find_run_dir(config)
    if run_dir.step >= config.steps:
        if os.environ.get("RANK", "0") == "0":
            print(f"{run_dir.path} is complete: {run_dir.step} steps")
        return None
    weights = None
    if config.init_from is not None and run_dir.checkpoint is None:
        weights = find_weights(config.init_from)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = init_ranks(config.device, config.sequence_parallel)
    run_dir = verify_checkpoint(run_dir, config, ranks)
    rows, micro_batches = accumulation(config, ranks.world_size)

    placement = dict(seed=config.seed, rows=rows, rank=ranks.reader, world_size=ranks.readers)
    train_data, validation_data = (
        build_data(config.data, split=split, cache_dir=Path(config.cache_dir).expanduser(), **placement)
        for split in ("train", "validation")
    )
    vocab_size = config.model.vocab_size or train_data.vocab_size
    if vocab_size < train_data.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is below the data's {train_data.vocab_size}: "
            "set model.vocab_size=null to take the data's"
        )
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))

    torch.manual_seed(config.seed)  # the weights; nothing after this draws from PyTorch's global generators
    model = Transformer(config.model, config.attention)
    parameters = sum(p.numel() for p in model.parameters())
    start = {
        "parameters": parameters,
        "data": train_data.describe(),
        "unigram_entropy": validation_data.unigram_entropy(),  # a loss must be well below; null = not known
    }
    if weights is not None:
        start["init_from"] = {"weights": str(weights.resolve()), "new_parameters": load_weights(model, weights)}
    if run_dir.checkpoint is not None:
        positions = run_dir.state["data"]
        # Of another number of readers: the state of a stream that counts over all of them is the same for each.
        train_data.load_state_dict(positions[ranks.reader if len(positions) == ranks.readers else 0])
    if run_dir.damaged:
        start["damaged_checkpoints"] = dict(run_dir.damaged)
    train_data = resources.enter_context(
        closing(Prefetched(train_data, depth=micro_batches, pin_memory=config.device == "cuda"))
    )
    ranks.barrier()  # every rank has looked at the run directory before one changes it
    if ranks.is_main:
        resources.callback(open_run_dir(run_dir, config, overrides, start).release)

    model.to(ranks.device)
    model.checkpoint_activations = config.activation_checkpointing
    if ranks.sequence is not None:
        model.share_sequences(ranks.sequence)
    if config.compile:
        model.compile_layers()
    optimizer = build_optimizer(model, config.optim, ranks.device)
    json = deepspeed_json(
        config, parameters=parameters, rows=rows, micro_batches=micro_batches, universal=run_dir.is_resharded
    )
    engine = build_engine(model, optimizer, json)
    if run_dir.checkpoint is not None:
        load_checkpoint(run_dir.checkpoint, engine, ranks, reshard=run_dir.is_resharded)
    tokens = run_dir.state.get("tokens", 0)
    skipped = run_dir.state.get("skipped_steps", 0)
    watch = LossWatch(run_dir.path / ANOMALIES, skipped=skipped, limit=config.max_skipped_steps)
    metrics = resources.enter_context(closing(MetricsWriter(run_dir.path, config, main=ranks.is_main)))
    metrics.print(f"{run_dir.path}: {parameters:,} parameters, {ranks.world_size} x {ranks.device.type}")
    if "init_from" in start:
        metrics.print("weights of {weights}; new: {new_parameters}".format(**start["init_from"]))
    for name, problem in run_dir.damaged.items():
        metrics.print(f"WARNING: {name} is damaged ({problem}) and was set aside")
    if run_dir.checkpoint is not None:
        metrics.print(f"resumed from {run_dir.checkpoint} at step {run_dir.step}")
    peak = peak_tflops(config, torch.cuda.get_device_name() if config.device == "cuda" else "")
    utilisation = Utilisation(config, peak and peak * ranks.world_size)
    if peak is None and config.device == "cuda":
        metrics.print("no MFU: the peak of this device and precision is not known, set peak_tflops=...")
    traced = config.profile_steps if ranks.is_main else 0
    tracer = resources.enter_context(closing(Tracer(run_dir.path, traced, run_dir.step + 1, ranks.device)))
    return Run(
        *(config, run_dir, ranks, engine, train_data, validation_data, micro_batches, tokens, watch, metrics),
        *(utilisation, tracer),
    )


def loop(run: Run, request: StopRequest) -> None:
    """Train from the step the run stands at to its last one. Step k in rows and names: k optimizer steps are done.

    The host waits for the device at one place of a step, where it must know that the gradient is finite; while the
    weights are updated it is ahead, with the next step's data. Only a step that is logged is waited for to its end.

    Raises:
        Stopped: the run ended earlier, with all on disk that is needed to go on.
    """
    config, engine, ranks, metrics, watch = run.config, run.engine, run.ranks, run.metrics, run.watch
    keep = {"keep": config.keep_checkpoints, "keep_every": config.keep_every}
    saved = run.run_dir.step
    clock = Clock()
    for step in range(run.run_dir.step + 1, config.steps + 1):
        is_last = step == config.steps
        position = run.train_data.state_dict()
        with clock.waiting():
            batches, error = read_batches(run)
        counts = (sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches))
        # The ranks agree here on what befell one of them.
        targets, read, failures, requests = ranks.sum(*counts, error is not None, request.received is not None)
        targets, read = targets / config.sequence_parallel, read / config.sequence_parallel  # read by as many ranks
        if failures:
            if saved < step - 1:
                save_checkpoint(run.run_dir.checkpoints, state_of(run, step - 1, position), engine, ranks, **keep)
            raise Stopped(
                f"the data source failed at step {step} ({error or 'on another rank'}). All steps before it are "
                "saved: when the source answers again, the same command goes on"
            ) from error

        is_saved = is_last or requests > 0 or (config.save_every > 0 and step % config.save_every == 0)
        is_logged = is_saved or step == 1 or step % config.log_every == 0
        with_stats = is_logged and config.stats_every > 0 and (is_last or step % config.stats_every == 0)
        rate = learning_rate(config.optim, step - 1, config.steps)
        engine.module.set_step(step - 1)
        set_learning_rate(engine, rate)
        done = update(run, batches, targets, with_norms=is_logged, with_stats=with_stats)
        run.tokens += int(read)
        clock.count(read)

        # With fp16 an infinite gradient is a step that loss scaling skips.
        is_finite = done.grad_norm is not None or config.deepspeed.precision == "fp16"
        anomaly = watch.judge(done.loss, is_finite=is_finite)
        if is_logged or anomaly is not None:
            grad_norm = math.inf if done.grad_norm is None else float(done.grad_norm)
        if anomaly is not None:
            positions = ranks.gather_readers(position)
            if ranks.is_main:
                watch.record(anomaly, step, done.loss, grad_norm, positions)
            metrics.print(f"WARNING: step {step} {anomaly}: loss {done.loss:.4g}, grad_norm {grad_norm:.4g}")
        if watch.is_hopeless():
            kept = run.run_dir.checkpoints / f"stopped-{step_name(step)}"
            write_checkpoint(kept, state_of(run, step, run.train_data.state_dict()), engine, ranks)
            raise watch.stop(step, kept)

        if is_logged and anomaly != "skipped":
            row = {"step": step, "split": "train", "tokens": run.tokens, "loss": done.loss, "lr": rate}
            row |= {"grad_norm": grad_norm, "skipped_steps": watch.skipped, **done.norms, **clock.read()}
            row |= {**backend_metrics(engine), "peak_memory_mib": peak_memory_mib(ranks.device)}
            if done.stats:
                run.utilisation.measure(done.stats)
            row |= run.utilisation.read(batches, row["tokens_per_s"])
            metrics.write(row | (attention_metrics(done.stats) if done.stats else {}))
        if config.eval_every and (is_last or step % config.eval_every == 0):
            loss = validation_loss(engine, run.validation_data, ranks)
            metrics.write({"step": step, "split": "validation", "tokens": run.tokens, "loss": loss})
            clock.restart()
        if is_saved:
            state = state_of(run, step, run.train_data.state_dict())
            save_checkpoint(run.run_dir.checkpoints, state, engine, ranks, **keep)
            saved = step
            clock.restart()
        run.tracer.step()
        if requests and not is_last:
            by = request.received.name if request.received else "a signal to another rank"
            raise Preempted(f"stopped by {by} and saved at step {step}: the same command goes on from there")


class Update(NamedTuple):
    """What an optimizer step tells."""

    loss: float  # in nats, on average over the targets of all ranks
    grad_norm: Tensor | None  # L2, before clipping; None = not finite, and the weights are as they were
    norms: dict[str, float]  # of parts of the gradient, if asked for
    stats: list[AttentionStats] | None  # of the first micro-batch, if asked for


def update(run: Run, batches: list[Batch], targets: float, *, with_norms: bool, with_stats: bool) -> Update:
    """One optimizer step on ``batches``, which on all ranks together have ``targets`` targets."""
    engine, device = run.engine, run.ranks.device
    loss, norms, stats = torch.zeros((), device=device), {}, None
    for index, batch in enumerate(batches):
        output = forward(engine, batch, device, return_stats=with_stats and index == 0)
        # Every target of the step counts the same, whichever micro-batch and rank it is in. DeepSpeed averages over
        # both, hence the factor. Of ranks that share rows each has its share of their loss: it is no different there.
        share = batch.num_targets / targets
        engine.backward(output.loss * (share * run.micro_batches * run.ranks.world_size))
        loss += output.loss.detach() * share
        stats = stats or output.stats
        if index == len(batches) - 1:
            read_loss = to_host(loss)
            norms = gradient_norms(engine) if with_norms else {}
        grad_norm = optimizer_step(engine, run.config.optim.grad_clip)
    return Update(*run.ranks.sum(read_loss()), grad_norm, norms, stats)


def read_batches(run: Run) -> tuple[list[Batch], Exception | None]:
    """A step's micro-batches; with an error, whatever its kind, if the source fails: what was learned must be saved."""
    batches = []
    try:
        for _ in range(run.micro_batches):
            batches.append(next(run.train_data))
    except Exception as error:
        return batches, error
    return batches, None


def state_of(run: Run, step: int, position: dict) -> dict:
    """state.json of a checkpoint after ``step``, with the data of this rank at ``position``; all ranks must call it."""
    return {
        "step": step,
        "tokens": run.tokens,
        "skipped_steps": run.watch.skipped,
        "data": run.ranks.gather_readers(position),
        "world_size": run.ranks.world_size,
        "stage": run.config.deepspeed.stage,
        "config_hash": config_hash(run.config),
    }


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "configs"), config_name="train")
def main(cfg: DictConfig) -> None:
    overrides = HydraConfig.get().overrides.task
    with run_faults(), StopRequest() as request, ExitStack() as resources:
        with user_errors():
            config = to_config(cfg)
            if config.launcher is not None:
                print(f"submitted job {submit_run(config, overrides)}")
                return
            run = build(check(config), overrides, resources)
        if run is not None:
            loop(run, request)


if __name__ == "__main__":
    main()
    # After the last of several jobs (``-m``): DeepSpeed keeps the process group for the next one.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
