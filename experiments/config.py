"""The schema of a training run. What cannot work is refused by ``training.check``.

The dataclasses are the schema: ``register_configs`` hands them to Hydra, so that an unknown key or a wrong type stops
at composition. The YAML groups under configs/ hold values only.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from dashattn.backends import BACKENDS, AttentionConfig
from dashattn.fields import (
    Checked,
    Line,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    Pattern,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Share,
    Threads,
    UserPath,
    user_path,
)
from data import NO_TOKEN, DataConfig, MixtureDataConfig, MQARDataConfig, TextDataConfig
from experiments.backend_source import register_plugins
from experiments.origin import CHECKPOINT, take_from_origin
from experiments.schema import DTYPES, fitting, read_values, to_config
from models import ModelConfig
from slurm.launcher import LauncherConfig

Device = Annotated[str, OneOf(("auto", "cpu", "cuda"))]
Momentum = Annotated[float, Range(float, 0, 1, "in [0, 1)", but=(1,))]
# As Weights & Biases names them.
Project = Annotated[
    str, Pattern(r"(?=.*\S)[^\0-\x1f/\\#?%:]{1,128}", "a name of up to 128 characters, without /\\#?%:")
]
Tag = Annotated[str, Pattern(r"(?=.*\S)[^\0-\x1f]{1,64}", "a tag of 1 to 64 characters")]


@dataclass
class OptimConfig(Checked, at="optim"):
    """AdamW, the learning-rate schedule and gradient clipping."""

    lr: PositiveFloat = MISSING  # peak learning rate
    beta1: Momentum = 0.9  # decay of Adam's mean of gradients
    beta2: Momentum = 0.95  # decay of Adam's mean of their squares
    eps: PositiveFloat = 1e-8  # added to Adam's denominator
    # eps of the routing vectors that attention backends hold, null = eps. DashAttention's tempered prior scales the
    # gradient of its chunk queries by 1 / sigma: far below an eps of 1e-8, where Adam hardly moves them.
    routing_eps: PositiveFloat | None = None
    # Peak rate of all parameters that attention backends own, which a dense checkpoint does not bring; null = lr.
    backend_lr: PositiveFloat | None = None
    # null = all parameters; router = those that attention backends own, the model around them stays as it is, in the
    # precision of training: to fit a router to a dense checkpoint.
    train_only: Annotated[str, OneOf(("router",))] | None = None
    weight_decay: NonNegativeFloat = 0.1  # of the weights of linear layers only
    grad_clip: NonNegativeFloat = 1.0  # largest global L2 norm of the gradient; 0 = no clipping
    # wsd is warm-up, stable, decay; each comes after a linear warm-up.
    schedule: Annotated[str, OneOf(("constant", "cosine", "wsd"))] = "cosine"
    warmup_steps: NonNegativeInt = 0  # in which the rate rises linearly from 0
    decay_fraction: Share = 0.2  # wsd: share of all steps, at the end, in which the rate falls linearly
    min_lr_ratio: Share = 0.1  # the rate at the end of cosine and wsd, as a share of lr


@dataclass
class DeepSpeedConfig(Checked, at="deepspeed"):
    """What the generated DeepSpeed configuration depends on beside the batch size and the clipping."""

    stage: Annotated[int, OneOf((0, 1, 2, 3))] = 1  # ZeRO stage
    precision: Annotated[str, OneOf(("auto", *DTYPES))] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU


@dataclass
class LoggerConfig(Checked, at="logger"):
    """Weights & Biases or TensorBoard, beside metrics.jsonl, which is always written. Only the former has a project,
    an entity, a group and tags."""

    # offline: files under the run directory, as of tensorboard
    mode: Annotated[str, OneOf(("off", "offline", "online", "tensorboard"))] = "offline"
    project: Project = "dashattn"  # that the run is filed under
    entity: Line | None = None  # user or team; null = the account's default
    group: Project | None = None  # runs that are shown together; null = none
    tags: list[Tag] = field(default_factory=list)  # to find runs by


@dataclass
class TrainConfig(Checked):
    """One training run. A row is one sequence of data.seq_len tokens; a step is one optimizer step."""

    name: Line = MISSING  # of the run; made of what it trains unless given
    run_dir: UserPath = "outputs/${name}"  # all that the run writes; a run that is there is resumed
    # Begin anew where run_dir holds a run, which is moved to a directory beside it; one that was begun so, and is not
    # complete, goes on.
    overwrite: bool = False
    cache_dir: UserPath = MISSING  # tokenizers and tokenized text, shared by runs

    model: ModelConfig = MISSING  # vocab_size null = the data's
    attention: AttentionConfig = MISSING  # the backend and its options
    data: DataConfig = MISSING  # what the rows are made of
    optim: OptimConfig = MISSING  # optimizer and learning rate
    deepspeed: DeepSpeedConfig = MISSING  # how memory is divided among GPUs, and the precision
    logger: LoggerConfig = MISSING  # where metrics go beside metrics.jsonl
    launcher: LauncherConfig | None = None  # null = this process, slurm = a job

    seed: Seed = 0  # of weights and of the order of the data
    steps: PositiveInt = MISSING  # optimizer steps in all
    rows_per_batch: PositiveInt = MISSING  # rows a step learns from, over all ranks and micro-batches
    rows_per_micro_batch: PositiveInt | None = None  # rows of one forward pass on one rank; null = no accumulation
    # Ranks that share each row they read: its tokens, and in attention its heads (DeepSpeed-Ulysses). Where it does not
    # divide model.num_kv_heads, some heads are computed more than once. For training; an evaluation does without.
    sequence_parallel: PositiveInt = 1
    # Run directory, checkpoint or Hugging Face folder whose weights are loaded at step 0; its shape with
    # model=checkpoint, and its tokenizer where data.tokenizer is null.
    init_from: UserPath | None = None
    any_tokenizer: bool = False  # start from weights that were trained on other tokens than the data's
    # RUN@STEP: begin with that checkpoint as if it were this run's own, with its optimizer and its place in the data.
    # All values are given as for RUN, but for what may change on a resume, and for steps and the schedule, where they
    # leave the learning rates of the steps before STEP as they were.
    branch_from: UserPath | None = None
    any_attention: bool = False  # start from a folder whose weights were trained with another sparse attention

    log_every: PositiveInt = 10  # steps from one row of metrics to the next
    # Attention statistics (sparsity) of a logged step that is a multiple of this; 0 = never.
    stats_every: NonNegativeInt = 50
    eval_every: NonNegativeInt = 200  # validation loss, also at the end; 0 = never
    save_every: NonNegativeInt = 1000  # a checkpoint is written at the end in any case; 0 = only there
    keep_checkpoints: NonNegativeInt = 2  # the newest ones; 0 = all
    keep_every: NonNegativeInt = 0  # those of a multiple of this many steps are kept for good; 0 = none
    max_skipped_steps: PositiveInt = 10  # in a row, because loss or gradient is not finite, before the run stops

    activation_checkpointing: bool = False  # keep each layer's input only; a third more work, a fraction of the memory
    # Refuse before the start what, counted as dashattn plan does, takes more memory than a GPU has, or on a CPU than is
    # free.
    check_memory: bool = True
    compile: bool = False  # torch.compile the layers and the loss; ZeRO stages 0-2
    peak_tflops: PositiveFloat | None = None  # of one device, for MFU; null = from a table by its name, none in fp32
    # Steps of this launch to trace with PyTorch's profiler into traces/, after the first 4.
    profile_steps: NonNegativeInt = 0

    device: Device = "auto"  # auto: a GPU if there is one
    threads: Threads | None = None  # of PyTorch on the CPU; null = PyTorch's choice


def _model_name(init_from: str | None) -> str:
    """Of the model that the command line chooses, for names of runs; of model=checkpoint the weights' name."""
    if not HydraConfig.initialized():  # composed by a program
        return "model"
    choice = HydraConfig.get().runtime.choices.get("model", "model")
    return user_path(init_from).name if choice == CHECKPOINT and init_from else choice


def register_configs() -> None:
    """Put the schemas into Hydra's store, where the ``defaults`` lists of configs/ name them, and what default names
    are made of where OmegaConf looks for it."""
    OmegaConf.register_new_resolver("model_name", _model_name, replace=True)
    register_plugins()
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="attention", name="attention_schema", node=AttentionConfig)
    for name, (config, _) in BACKENDS.own.items():
        store.store(group="attention", name=f"{name}_schema", node=config)
    store.store(group="data", name="text_schema", node=TextDataConfig)
    store.store(group="data", name="mixture_schema", node=MixtureDataConfig)
    store.store(group="data", name="mqar_schema", node=MQARDataConfig)
    store.store(group="optim", name="optim_schema", node=OptimConfig)
    store.store(group="deepspeed", name="deepspeed_schema", node=DeepSpeedConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)
    store.store(group="launcher", name="launcher_schema", node=LauncherConfig)


def to_train_config(cfg: DictConfig) -> TrainConfig:
    """As ``to_config``, with what a composed configuration leaves to the weights it starts from.

    Raises:
        ValueError: as ``to_config``, or these weights cannot be had, or config.yaml could not keep a value.
    """
    config = to_config(take_from_origin(cfg))
    refers = [f"{key}={value}" for key, value in _texts(asdict(config)) if "${" in value]
    if refers:
        raise ValueError(f"{refers[0]}: with ${{ a configuration refers to another value; take another name")
    return config


def _texts(values: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and text, of all that are among values."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, dict | list | tuple):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _texts(value, f"{name}.{key}" if name else str(key))


def load_config(path: Path) -> TrainConfig:
    """The TrainConfig that a run directory's config.yaml holds.

    Raises:
        ValueError: the file is damaged, or names an attention backend that does not exist here.
    """
    with fitting(path):
        return to_config(read_config(path))


def read_config(path: Path) -> DictConfig:
    """As ``load_config``, as Hydra has it."""
    saved = read_values(path)
    name = saved.attention.get("name")
    if name not in BACKENDS:
        raise ValueError(f"{path}: no attention backend is called {name!r}: install the package that brings it")
    # The file holds values only; which classes they belong to, they say themselves.
    typed = OmegaConf.structured(TrainConfig)
    typed.attention = OmegaConf.structured(BACKENDS[saved.attention.name][0])
    telling = {"source": TextDataConfig, "corpora": MixtureDataConfig, "pairs_min": MQARDataConfig}
    schemas = [schema for key, schema in telling.items() if key in saved.data]
    if not schemas:
        raise ValueError(f"{path} is damaged (its data are of no kind known here): restore it from a copy")
    typed.data = OmegaConf.structured(schemas[0])
    if "pairs_min" not in saved.data and "bos_token" not in saved.data:
        saved.data.bos_token = NO_TOKEN  # of before there was one
    return OmegaConf.merge(typed, saved)


def plain(config: TrainConfig) -> dict:
    """``config`` as nested dictionaries of plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
