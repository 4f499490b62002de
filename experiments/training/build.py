"""A run built from its configuration, and restored to where its directory stands.

Every function here is called by all ranks of a run, which agree in what they return; what belongs to one rank alone is
named so.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dashattn.fields import user_path
from dashattn.implementation import kernels_can_run
from data import NO_TOKEN, BatchStream, Prefetched, build_data
from experiments.config import TrainConfig
from experiments.files import ANOMALIES
from experiments.origin import with_commits, with_own_tokenizer
from experiments.provenance import device_name
from experiments.sparsity import Hold, knob_span
from experiments.training.anomalies import LossWatch
from experiments.training.check import accumulation
from experiments.training.checkpoint import load_checkpoint
from experiments.training.display import next_command
from experiments.training.engine import build_engine, deepspeed_json
from experiments.training.intact import verify_checkpoint
from experiments.training.memory import check_room
from experiments.training.metrics import Clock, MetricsWriter
from experiments.training.optim import build_optimizer, check_order, freeze, parameter_order
from experiments.training.ranks import Ranks, init_ranks
from experiments.training.replacing import make_way
from experiments.training.run import Run, owes_validation
from experiments.training.run_dir import (
    RunDir,
    check_start,
    config_hash,
    find_run_dir,
    open_run_dir,
)
from experiments.training.start_knob import find_start_knob
from experiments.training.tracing import Tracer
from experiments.training.utilisation import Utilisation, peak_tflops
from experiments.training.weights import Loaded, find_weights, load_weights
from models import Transformer
from models.flops import count_parameters


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
    # Not refused before a job is submitted, which runs elsewhere.
    if config.attention.impl == "triton" and not kernels_can_run(on_cuda=config.device == "cuda"):
        raise ValueError("attention.impl=triton needs a GPU, and this is device=cpu: use attention.impl=auto")
    weights = None  # a run that resumes has its own, and the folder it began with may be gone
    if config.init_from is not None and run_dir.checkpoint is None:
        weights = find_weights(config.init_from)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = init_ranks(config.device, config.sequence_parallel)
    config = replace(config, data=ranks.gather(config.data)[0])  # a branch on the hub may move between two looks
    run_dir = verify_checkpoint(run_dir, config, ranks)
    rows, micro_batches = accumulation(config, ranks.world_size)
    check_room(config, ranks)

    train_data, validation_data = _open_data(config, run_dir, ranks, rows)
    check_start(run_dir, train_data.describe())
    config = _with_tokens(config, train_data)
    model, start = _begin(config, run_dir, weights, train_data, validation_data)
    order = parameter_order(model, config.optim)
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
    lock = ranks.first(lambda: open_run_dir(run_dir, config, overrides, start, train_data.tokenizer))
    if lock is not None:
        resources.callback(lock.release)

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
        utilisation=Utilisation(config, peak, ranks),
        tracer=resources.enter_context(closing(Tracer(run_dir.path, traced, run_dir.step + 1, ranks.device))),
    )


def _open_data(config: TrainConfig, run_dir: RunDir, ranks: Ranks, rows: int) -> tuple[BatchStream, BatchStream]:
    """This rank's training and validation streams, in batches of ``rows`` rows."""
    data = with_own_tokenizer(config.data, run_dir.tokenizer_home)
    train, validation = (
        build_data(
            data,
            split=split,
            cache_dir=user_path(config.cache_dir),
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


def _begin(
    config: TrainConfig,
    run_dir: RunDir,
    weights: Path | None,
    train_data: BatchStream,
    validation_data: BatchStream,
) -> tuple[Transformer, dict]:
    """The model as its run begins, with ``weights`` if there are any, and what start.json says of that."""
    torch.manual_seed(config.seed)  # the weights; nothing after this draws from PyTorch's global generators
    model = Transformer(config.model, config.attention)
    freeze(model, config.optim)
    start = {
        "parameters": count_parameters(model),
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
    return model, start


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
