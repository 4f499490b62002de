"""The schema of a training run, and the checks that refuse an impossible one before anything is built.

The dataclasses are the schema: ``register_configs`` hands them to Hydra, so that an unknown key or a wrong type stops
at composition. The YAML groups under configs/ hold values only.
"""

import os
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dashattn.backends import BACKENDS, AttentionConfig, AttentionShape, build_backend
from data import DataConfig, MixtureDataConfig, MQARDataConfig, TextDataConfig
from models import ModelConfig

SCHEDULES = ("constant", "cosine", "wsd")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
LOGGER_MODES = ("off", "offline", "online")


@dataclass
class OptimConfig:
    """AdamW, the learning-rate schedule and gradient clipping."""

    lr: float = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    # eps of the routing vectors that attention backends hold, null = eps. DashAttention's tempered prior scales the
    # gradient of its chunk queries by 1 / sigma: far below an eps of 1e-8, where Adam hardly moves them.
    routing_eps: float | None = None
    weight_decay: float = 0.1  # of the weights of linear layers only
    grad_clip: float = 1.0  # largest global L2 norm of the gradient; 0 = no clipping
    schedule: str = "cosine"  # constant | cosine | wsd (warm-up, stable, decay), each after a linear warm-up
    warmup_steps: int = 0
    decay_fraction: float = 0.2  # wsd: share of all steps, at the end, in which the rate falls linearly
    min_lr_ratio: float = 0.1  # the rate at the end of cosine and wsd, as a share of lr


@dataclass
class DeepSpeedConfig:
    """What the generated DeepSpeed configuration depends on beside the batch size and the clipping."""

    stage: int = 1  # ZeRO stage, 0-3
    precision: str = "auto"  # auto (bf16 on a GPU, fp32 on a CPU) | fp32 | bf16 | fp16


@dataclass
class LoggerConfig:
    """Weights & Biases, beside metrics.jsonl, which is always written."""

    mode: str = "offline"  # off | offline (files under the run directory) | online
    project: str = "dashattn"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LauncherConfig:
    """What a job asks Slurm for. One rank runs on each GPU; all of a run's nodes are one job."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1  # 0 = none; then a node has one rank
    cpus_per_task: int = 8  # of a rank
    mem_gb: float | None = None  # of a node
    hours: float = 24.0
    signal_s: int = 120  # so long before the time is up, SIGUSR2 asks the run to save; then it is queued again
    jobs: int = 256  # cells of a sweep at a time
    setup: list[str] = field(default_factory=list)  # shell lines before the job: module load ..., export ...
    python: str | None = None  # what starts Python there, null = this one: apptainer exec --nv image.sif python
    srun_args: list[str] = field(default_factory=list)  # such as --container-image=...
    sbatch_args: dict[str, str] = field(default_factory=dict)  # such as constraint: h100
    evaluate: list[str] | None = None  # of a single run: overrides of the evaluate.py that follows it; null = none

    @property
    def ranks(self) -> int:
        return self.nodes * max(self.gpus_per_node, 1)


@dataclass
class TrainConfig:
    """One training run. A row is one sequence of data.seq_len tokens; a step is one optimizer step."""

    name: str = MISSING
    run_dir: str = "outputs/${name}"
    cache_dir: str = MISSING  # tokenizers and tokenized text, shared by runs

    model: ModelConfig = MISSING  # vocab_size null = the data's
    attention: AttentionConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    deepspeed: DeepSpeedConfig = MISSING
    logger: LoggerConfig = MISSING
    launcher: LauncherConfig | None = None  # null = this process, slurm = a job

    seed: int = 0
    steps: int = MISSING
    rows_per_batch: int = MISSING  # rows a step learns from, over all ranks and micro-batches
    rows_per_micro_batch: int | None = None  # rows of one forward pass on one rank; null = no accumulation
    # Ranks that share each row they read: its tokens, and in attention its heads (DeepSpeed-Ulysses). Where it does not
    # divide model.num_kv_heads, some heads are computed more than once. For training; an evaluation does without.
    sequence_parallel: int = 1
    init_from: str | None = None  # run directory, checkpoint or Hugging Face folder whose weights are loaded at step 0

    log_every: int = 10
    stats_every: int = 50  # attention statistics (sparsity) of a logged step that is a multiple of this; 0 = never
    eval_every: int = 200  # validation loss, also at the end; 0 = never
    save_every: int = 1000  # a checkpoint is written at the end in any case; 0 = only there
    keep_checkpoints: int = 2  # the newest ones; 0 = all
    keep_every: int = 0  # those of a multiple of this many steps are kept for good; 0 = none
    max_skipped_steps: int = 10  # in a row, because loss or gradient is not finite, before the run stops

    activation_checkpointing: bool = False  # keep each layer's input only; a third more work, a fraction of the memory
    compile: bool = False  # torch.compile the layers and the loss; ZeRO stages 0-2
    peak_tflops: float | None = None  # of one device, for MFU; null = from a table by its name, none in fp32
    profile_steps: int = 0  # steps of this launch to trace with PyTorch's profiler into traces/, after the first 4

    device: str = "auto"
    threads: int | None = None  # of PyTorch on the CPU; null = PyTorch's choice


def register_configs() -> None:
    """Put the schemas into Hydra's store, where the ``defaults`` lists of configs/ name them."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="model", name="model_schema", node=ModelConfig)
    for name, (config, _) in BACKENDS.items():
        store.store(group="attention", name=f"{name}_schema", node=config)
    store.store(group="data", name="text_schema", node=TextDataConfig)
    store.store(group="data", name="mixture_schema", node=MixtureDataConfig)
    store.store(group="data", name="mqar_schema", node=MQARDataConfig)
    store.store(group="optim", name="optim_schema", node=OptimConfig)
    store.store(group="deepspeed", name="deepspeed_schema", node=DeepSpeedConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)
    store.store(group="launcher", name="launcher_schema", node=LauncherConfig)


def to_config(cfg: DictConfig) -> Any:
    """The dataclasses of a composed configuration, of whichever schema it has.

    Raises:
        ValueError: that names values left open, or keys that a ``+key=value`` forced in.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}: give one, as in {missing[0]}=...")
    config = OmegaConf.to_object(cfg)
    assert is_dataclass(config)
    unknown = _unknown_keys(config)
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}: `--cfg job` shows the known ones")
    return config


def _unknown_keys(node: object, prefix: str = "") -> list[str]:
    """Dotted names of attributes that are no fields of their dataclass, in ``node`` and below it."""
    if isinstance(node, dict):
        children, unknown = node, []
    elif is_dataclass(node):
        children = {f.name: getattr(node, f.name) for f in fields(node)}
        unknown = [prefix + key for key in vars(node) if key not in children]
    else:
        return []
    for key, child in children.items():
        unknown += _unknown_keys(child, f"{prefix}{key}.")
    return unknown


def load_config(path: Path) -> TrainConfig:
    """The TrainConfig that a run directory's config.yaml holds.

    Raises:
        ValueError: the file names an attention backend that does not exist here.
    """
    saved = OmegaConf.load(path)
    if saved.attention.name not in BACKENDS:
        raise ValueError(f"{path}: no attention backend is called {saved.attention.name!r}")
    # The file holds values only; which classes they belong to, they say themselves.
    typed = OmegaConf.structured(TrainConfig)
    typed.attention = OmegaConf.structured(BACKENDS[saved.attention.name][0])
    telling = {"source": TextDataConfig, "corpora": MixtureDataConfig, "pairs_min": MQARDataConfig}
    typed.data = OmegaConf.structured(next(schema for key, schema in telling.items() if key in saved.data))
    return to_config(OmegaConf.merge(typed, saved))


def plain(config: TrainConfig) -> dict:
    """``config`` as nested dictionaries of plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)


def world_size() -> int:
    """Number of ranks of this launch, as torchrun says it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    if rows < 1 or config.rows_per_batch % (rows * groups):
        raise ValueError(
            f"rows_per_batch={config.rows_per_batch} is no multiple of rows_per_micro_batch={rows} x {among}: "
            f"change one, for instance rows_per_batch={max(rows, 1) * groups}"
        )
    return rows, config.rows_per_batch // (rows * groups)


def check(config: TrainConfig, ranks: int | None = None) -> TrainConfig:
    """Refuse what cannot work, before anything is built; return the resolved configuration.

    Args:
        ranks: how many the run will have; None = as this launch.

    Raises:
        ValueError: with what to change.
    """
    for key, value, choices in (
        ("device", config.device, DEVICES),
        ("deepspeed.precision", config.deepspeed.precision, PRECISIONS),
        ("deepspeed.stage", config.deepspeed.stage, (0, 1, 2, 3)),
        ("optim.schedule", config.optim.schedule, SCHEDULES),
        ("logger.mode", config.logger.mode, LOGGER_MODES),
    ):
        if value not in choices:
            raise ValueError(f"{key}={value}: choose one of {', '.join(map(str, choices))}")
    config = resolve(config)
    _check_counts(config)
    _check_optim(config)
    _check_precision(config)
    accumulation(config, world_size() if ranks is None else ranks)
    _check_model(config)
    _check_sequences(config)
    return config


def _check_counts(config: TrainConfig) -> None:
    for key, least in (
        ("steps", 1),
        ("rows_per_batch", 1),
        ("sequence_parallel", 1),
        ("log_every", 1),
        ("stats_every", 0),
        ("eval_every", 0),
        ("save_every", 0),
        ("keep_checkpoints", 0),
        ("keep_every", 0),
        ("max_skipped_steps", 1),
        ("profile_steps", 0),
    ):
        if getattr(config, key) < least:
            raise ValueError(f"{key}={getattr(config, key)}: at least {least} is needed")
    if config.keep_every and (config.save_every == 0 or config.keep_every % config.save_every):
        raise ValueError(
            f"keep_every={config.keep_every} is no multiple of save_every={config.save_every}: nothing is saved there"
        )
    if config.peak_tflops is not None and config.peak_tflops <= 0:
        raise ValueError(f"peak_tflops={config.peak_tflops}: a positive rate is needed, or null")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads={config.threads}: at least 1 is needed, or null")


def _check_optim(config: TrainConfig) -> None:
    optim = config.optim
    if optim.lr <= 0:
        raise ValueError(f"optim.lr={optim.lr}: a positive learning rate is needed")
    if not 0 <= optim.warmup_steps < config.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} leaves no step of steps={config.steps} after the warm-up: "
            f"raise steps or lower optim.warmup_steps"
        )
    if not 0 <= optim.min_lr_ratio <= 1:
        raise ValueError(f"optim.min_lr_ratio={optim.min_lr_ratio}: a share of lr between 0 and 1 is needed")
    if optim.schedule == "wsd":
        if not 0 <= optim.decay_fraction <= 1:
            raise ValueError(f"optim.decay_fraction={optim.decay_fraction}: a share between 0 and 1 is needed")
        if optim.warmup_steps + round(optim.decay_fraction * config.steps) > config.steps:
            raise ValueError(
                f"optim.warmup_steps={optim.warmup_steps} and optim.decay_fraction={optim.decay_fraction} overlap "
                f"within steps={config.steps}: lower one of them"
            )
    if optim.grad_clip < 0:
        raise ValueError(f"optim.grad_clip={optim.grad_clip}: a positive norm is needed, or 0 for no clipping")


def _check_precision(config: TrainConfig) -> None:
    stage, precision = config.deepspeed.stage, config.deepspeed.precision
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU: use device=cpu, or install a CUDA build of PyTorch")
    if precision == "fp16" and config.device == "cpu":
        raise ValueError("deepspeed.precision=fp16 does not run on a CPU: use fp32 or bf16 there")
    if config.compile and stage == 3:
        raise ValueError(
            "compile=true does not go with deepspeed.stage=3, which fetches weights inside the layers: use 2"
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
    for key in ("chunk_size", "block_size"):
        size = getattr(config.attention, key, None)
        if size is not None and size >= seq_len:
            raise ValueError(
                f"attention.{key}={size} leaves nothing to select in rows of data.seq_len={seq_len}: "
                f"lower attention.{key} or raise data.seq_len"
            )
    # The backend itself says what it cannot do; on the meta device asking costs no memory.
    with torch.device("meta"):
        backend = build_backend(
            config.attention,
            AttentionShape(model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim),
        )
    if getattr(config.data, "pack", None) == "documents" and not backend.capabilities.packed:
        raise ValueError(
            f"attention={config.attention.name} takes no packed documents: use data.pack=plain, or another attention"
        )


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
