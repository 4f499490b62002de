"""What refuses an impossible training run, before anything is built."""

from dataclasses import replace

import torch

from dashattn.backends import AttentionBackend, AttentionShape, build_backends
from dashattn.fields import user_path
from data import PackedDataConfig, TextTokenizer
from experiments.config import TrainConfig
from experiments.origin import check_origin_tokenizer, is_own, model_of
from experiments.sparsity import check_reachable, turned_layers
from experiments.training.ranks import world_size
from models.hf import check_continues, check_files, check_same_attention, check_same_model, is_hf_folder
from models.meta import without_memory


def resolve(config: TrainConfig) -> TrainConfig:
    """``config`` with every ``auto`` replaced by what it means on this machine, so that a resume elsewhere notices."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = config.deepspeed.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return replace(config, device=device, deepspeed=replace(config.deepspeed, precision=precision))


def accumulation(config: TrainConfig, ranks: int) -> tuple[int, int]:
    """(rows of a micro-batch of one rank, micro-batches a step). Raises ValueError if the batch does not divide."""
    shared = config.sequence_parallel
    if ranks % shared:
        raise ValueError(
            f"sequence_parallel={shared} does not divide the number of ranks, {ranks}: start a multiple of {shared} "
            "ranks (torchrun --nproc-per-node), or lower sequence_parallel"
        )
    groups = ranks // shared
    among = f"{ranks} ranks" if shared == 1 else f"{groups} groups of {shared} ranks"
    rows = config.rows_per_micro_batch
    if rows is None:
        if config.rows_per_batch % groups:
            raise ValueError(
                f"rows_per_batch={config.rows_per_batch} does not divide among {among}: take a multiple of {groups}"
            )
        return config.rows_per_batch // groups, 1
    if config.rows_per_batch % (rows * groups):
        raise ValueError(
            f"rows_per_batch={config.rows_per_batch} is no multiple of rows_per_micro_batch={rows} x {among}: "
            f"change one, for instance rows_per_batch={rows * groups}"
        )
    return rows, config.rows_per_batch // (rows * groups)


def check(config: TrainConfig, ranks: int | None = None) -> TrainConfig:
    """Refuse what cannot work, before anything is built; return the resolved configuration.

    Args:
        ranks: how many the run will have; None = as this launch.

    Raises:
        ValueError: with what to change.
    """
    config = resolve(config)
    _check_saves(config)
    _check_optim(config)
    _check_precision(config)
    accumulation(config, world_size() if ranks is None else ranks)
    _check_model(config)
    check_vocabulary(config)
    _check_sequences(config)
    _check_origin(config)
    return config


def _check_saves(config: TrainConfig) -> None:
    if config.keep_every and (config.save_every == 0 or config.keep_every % config.save_every):
        raise ValueError(
            f"keep_every={config.keep_every} is no multiple of save_every={config.save_every}, and nothing is saved "
            "there: take a multiple, or keep_every=0"
        )


def _check_optim(config: TrainConfig) -> None:
    optim = config.optim
    if optim.warmup_steps >= config.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} leaves no step of steps={config.steps} after the warm-up: "
            f"raise steps or lower optim.warmup_steps"
        )
    decay_steps = round(optim.decay_fraction * config.steps) if optim.schedule == "wsd" else 0
    if optim.warmup_steps + decay_steps > config.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} and optim.decay_fraction={optim.decay_fraction} overlap "
            f"within steps={config.steps}: lower one of them"
        )


def _check_precision(config: TrainConfig) -> None:
    stage, precision = config.deepspeed.stage, config.deepspeed.precision
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU: use device=cpu, or install a CUDA build of PyTorch")
    if precision == "fp16" and config.device == "cpu":
        raise ValueError("deepspeed.precision=fp16 does not run on a CPU: use fp32 or bf16 there")
    if config.compile and stage == 3:
        raise ValueError(
            "compile=true does not go with deepspeed.stage=3, which fetches weights inside the layers: use stage 2"
        )
    if precision != "fp32" and stage == 0:
        # DeepSpeed's stage 0 keeps no fp32 master weights in bf16 the way stages 1-3 do, and trains differently.
        raise ValueError(
            f"deepspeed.stage=0 trains in fp32 only, not {precision}: use deepspeed.stage=1 "
            "(the same memory on one device) or deepspeed.precision=fp32"
        )


def _check_model(config: TrainConfig) -> None:
    model, seq_len = config.model, config.data.seq_len
    if seq_len > model.max_seq_len:
        raise ValueError(
            f"data.seq_len={seq_len} exceeds model.max_seq_len={model.max_seq_len}: "
            f"lower data.seq_len or set model.max_seq_len={seq_len}"
        )
    backends = meta_backends(config)
    for backend in backends:
        _check_backend(backend, config)
    attention = config.attention
    if config.optim.train_only and not any(p.requires_grad for backend in backends for p in backend.parameters()):
        raise ValueError(
            f"optim.train_only={config.optim.train_only}: attention={attention.name} has nothing of its own to train. "
            "Take attention=indexer, or dash with a prior and learn_summary=true, or optim.train_only=null"
        )
    if attention.controls_sparsity:
        turned = turned_layers(attention, model.num_layers)
        target = attention.target_sparsity, attention.sparsity_count
        check_reachable(turned, *target, seq_len, packed=config.data.is_packed)


def meta_backends(config: TrainConfig) -> list[AttentionBackend]:
    """The backend of each layer, on the meta device, where that costs no memory.

    Raises:
        ValueError: the backend cannot serve the model, or ``attention.layers`` cannot be read.
    """
    model = config.model
    shape = AttentionShape(model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim)
    with without_memory():
        return build_backends(config.attention, shape, model.num_layers)


def _check_backend(backend: AttentionBackend, config: TrainConfig) -> None:
    attention, seq_len = backend.config, config.data.seq_len
    attention.check_rows(seq_len)
    if not backend.capabilities.train:
        raise ValueError(
            f"attention={attention.name} is for evaluation only: train another one, or evaluate a checkpoint of "
            f"attention=full with it"
        )
    if config.data.is_packed and not backend.capabilities.packed:
        raise ValueError(
            f"attention={attention.name} takes no packed documents: use data.pack=plain, or another attention"
        )


def check_vocabulary(config: TrainConfig) -> None:
    """Refuse a vocabulary below that of a tokenizer that is at hand; another's is compared when it has been trained.

    Raises:
        ValueError: with what to set.
    """
    model, data = config.model, config.data
    if not isinstance(data, PackedDataConfig) or data.tokenizer is None or model.vocab_size is None:
        return
    if user_path(data.tokenizer).exists():
        vocab_size = TextTokenizer.load(data.tokenizer, data.eos_token).vocab_size
        if vocab_size > model.vocab_size:
            raise ValueError(
                f"model.vocab_size={model.vocab_size} is below the {vocab_size} of data.tokenizer={data.tokenizer}: "
                "name the tokenizer that the weights were trained with, or take model.vocab_size=null for new weights"
            )


def _check_origin(config: TrainConfig) -> None:
    """A run that resumes, or branches off, needs its origin no more: what is not there is looked for when the run is
    built."""
    if config.init_from is None:
        return
    folder = user_path(config.init_from)
    is_begun = config.branch_from is not None or is_own(user_path(config.run_dir), overwrite=config.overwrite)
    if not (config.any_tokenizer or is_begun):
        check_origin_tokenizer(config.data, folder)
    theirs = None if is_begun and not is_hf_folder(folder) else model_of(folder)
    if theirs is None:
        return
    model = replace(config.model, vocab_size=config.model.vocab_size or theirs.vocab_size)
    if not is_hf_folder(folder):
        check_continues(model, theirs, folder)
        return
    check_same_model(model, folder)
    if not config.any_attention:
        check_same_attention(config.attention, folder, [config.data.seq_len])
    check_files(folder)


def _check_sequences(config: TrainConfig) -> None:
    """Ranks share a row by its tokens, and in attention by its query heads."""
    shared = config.sequence_parallel
    if config.model.num_heads % shared:
        raise ValueError(
            f"sequence_parallel={shared} ranks cannot share model.num_heads={config.model.num_heads} query heads "
            "equally: take a divisor of it"
        )
    for length in (config.data.seq_len, *getattr(config.data, "curriculum_lengths", ())):
        if length % shared:
            raise ValueError(
                f"sequence_parallel={shared} ranks cannot share rows of {length} tokens equally: change data.seq_len "
                "(and data.curriculum_lengths, if there are any) to multiples of it"
            )
