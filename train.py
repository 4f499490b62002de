"""Train one model: compose -> check -> build -> loop.

    python train.py                                        # a debug model on Python's standard library, on a CPU
    python train.py attention=dash model=60m steps=2000
    torchrun --standalone --nproc-per-node 8 train.py ...  # ranks share rows_per_batch
    python train.py --cfg job                              # show everything that can be set

Starting a run in its own directory again resumes it from the latest checkpoint.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
import torch
import torch.distributed
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from data import BatchStream, Prefetched, build_data
from experiments.checkpoint import find_weights, load_checkpoint, load_weights, save_checkpoint
from experiments.config import TrainConfig, accumulation, check, register_configs, to_config
from experiments.engine import (
    Ranks,
    backend_metrics,
    build_engine,
    deepspeed_json,
    forward,
    gradient_norms,
    init_ranks,
    optimizer_step,
    set_learning_rate,
    validation_loss,
)
from experiments.errors import user_errors
from experiments.metrics import Clock, MetricsWriter, attention_metrics, peak_memory_mib
from experiments.optim import build_optimizer, learning_rate
from experiments.run_dir import RunDir, config_hash, find_run_dir, open_run_dir
from experiments.tracing import Tracer
from experiments.utilisation import Utilisation, peak_tflops
from models import Transformer

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
    metrics: MetricsWriter
    utilisation: Utilisation
    tracer: Tracer
    lock: FileLock | None  # of the run directory, on the main rank


def train(config: TrainConfig, overrides: Sequence[str] = ()) -> Path:
    """Do a run, or what is left of it. Returns the run directory.

    Raises:
        ValueError: if the configuration cannot work or the run directory holds another run; nothing is changed then.
    """
    run = build(check(config), overrides)
    if run is not None:
        loop(run)
    return Path(config.run_dir).expanduser()


def build(config: TrainConfig, overrides: Sequence[str] = ()) -> Run | None:
    """Everything the loop needs, restored to where the run stands; None if the run is complete."""
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
    ranks = init_ranks(config.device)
    rows, micro_batches = accumulation(config, ranks.world_size)

    placement = dict(seed=config.seed, rows=rows, rank=ranks.rank, world_size=ranks.world_size)
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
        train_data.load_state_dict(run_dir.state["data"][ranks.rank])
    train_data = Prefetched(train_data, depth=micro_batches, pin_memory=config.device == "cuda")
    ranks.barrier()  # every rank has looked at the run directory before one changes it
    lock = open_run_dir(run_dir, config, overrides, start) if ranks.is_main else None

    model.to(ranks.device)
    model.checkpoint_activations = config.activation_checkpointing
    if config.compile:
        model.compile_layers()
    optimizer = build_optimizer(model, config.optim, ranks.device)
    json = deepspeed_json(config, parameters=parameters, rows=rows, micro_batches=micro_batches)
    engine = build_engine(model, optimizer, json)
    if run_dir.checkpoint is not None:
        load_checkpoint(run_dir.checkpoint, engine)
    tokens = run_dir.state.get("tokens", 0)
    metrics = MetricsWriter(run_dir.path, config, main=ranks.is_main)
    metrics.print(f"{run_dir.path}: {parameters:,} parameters, {ranks.world_size} x {ranks.device.type}")
    if "init_from" in start:
        metrics.print("weights of {weights}; new: {new_parameters}".format(**start["init_from"]))
    if run_dir.checkpoint is not None:
        metrics.print(f"resumed from {run_dir.checkpoint} at step {run_dir.step}")
    peak = peak_tflops(config, torch.cuda.get_device_name() if config.device == "cuda" else "")
    utilisation = Utilisation(config, peak and peak * ranks.world_size)
    if peak is None and config.device == "cuda":
        metrics.print("no MFU: the peak of this device and precision is not known, set peak_tflops=...")
    tracer = Tracer(run_dir.path, config.profile_steps if ranks.is_main else 0, run_dir.step + 1, ranks.device)
    return Run(
        *(config, run_dir, ranks, engine, train_data, validation_data, micro_batches, tokens, metrics),
        *(utilisation, tracer, lock),
    )


def loop(run: Run) -> None:
    """Train from the step the run stands at to its last one. Step k in rows and names: k optimizer steps are done."""
    config, engine, ranks, metrics = run.config, run.engine, run.ranks, run.metrics
    clock = Clock()
    try:
        for step in range(run.run_dir.step + 1, config.steps + 1):
            is_last = step == config.steps
            is_saved = is_last or (config.save_every > 0 and step % config.save_every == 0)
            is_logged = is_saved or step == 1 or step % config.log_every == 0
            with_stats = is_logged and config.stats_every > 0 and (is_last or step % config.stats_every == 0)
            rate = learning_rate(config.optim, step - 1, config.steps)
            engine.module.set_step(step - 1)
            set_learning_rate(engine, rate)

            with clock.waiting():
                batches = [next(run.train_data) for _ in range(run.micro_batches)]
            targets, read = ranks.sum(sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches))
            loss = torch.zeros((), device=ranks.device)
            stats = None
            for index, batch in enumerate(batches):
                output = forward(engine, batch, ranks.device, return_stats=with_stats and index == 0)
                # Every target of the step counts the same, whichever micro-batch and rank it is in. DeepSpeed
                # averages over both, hence the factor.
                share = batch.num_targets / targets
                engine.backward(output.loss * (share * run.micro_batches * ranks.world_size))
                norms = gradient_norms(engine) if is_logged and index == len(batches) - 1 else {}
                grad_norm = optimizer_step(engine, config.optim.grad_clip)
                loss += output.loss.detach() * share
                stats = stats or output.stats
            run.tokens += int(read)
            clock.count(read)

            if is_logged:
                (total_loss,) = ranks.sum(loss.item())
                row = {"step": step, "split": "train", "tokens": run.tokens, "loss": total_loss, "lr": rate}
                row |= {"grad_norm": float(grad_norm), **norms, **clock.read(), **backend_metrics(engine)}
                row["peak_memory_mib"] = peak_memory_mib(ranks.device)
                if stats:
                    run.utilisation.measure(stats)
                row |= run.utilisation.read(batches, row["tokens_per_s"])
                metrics.write(row | (attention_metrics(stats) if stats else {}))
                check_finite(row, config)  # before a checkpoint could be overwritten with it
            if config.eval_every and (is_last or step % config.eval_every == 0):
                loss = validation_loss(engine, run.validation_data, ranks)
                metrics.write({"step": step, "split": "validation", "tokens": run.tokens, "loss": loss})
                clock.restart()
            if is_saved:
                state = {
                    "step": step,
                    "tokens": run.tokens,
                    "data": ranks.gather(run.train_data.state_dict()),
                    "world_size": ranks.world_size,
                    "config_hash": config_hash(config),
                }
                save_checkpoint(run.run_dir.checkpoints, state, engine, ranks, keep=config.keep_checkpoints)
                clock.restart()
            run.tracer.step()
    finally:
        run.tracer.close()
        run.train_data.close()
        metrics.close()
        if run.lock is not None:
            run.lock.release()


def check_finite(row: dict, config: TrainConfig) -> None:
    """Stop a diverged run: FloatingPointError. With fp16 an infinite gradient is a step that loss scaling skips."""
    watched = ("loss",) if config.deepspeed.precision == "fp16" else ("loss", "grad_norm")
    for key in watched:
        if not math.isfinite(row[key]):
            raise FloatingPointError(
                f"{key} is {row[key]} at step {row['step']}: lower optim.lr or optim.grad_clip, or raise "
                f"optim.warmup_steps, in a new run"
            )


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "configs"), config_name="train")
def main(cfg: DictConfig) -> None:
    with user_errors():
        run = build(check(to_config(cfg)), HydraConfig.get().overrides.task)
    if run is not None:
        loop(run)


if __name__ == "__main__":
    main()
    # After the last of several jobs (`-m`): DeepSpeed keeps the process group for the next one.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
