"""What the speed benchmark can be told."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from experiments.speed.inputs import PATTERNS
from experiments.speed.methods import BACKENDS, OPERATIONS
from experiments.speed.peers import BASELINES
from models.config import ModelConfig

KERNEL_DTYPES = ("bf16", "fp16")


@dataclass
class SpeedConfig:
    """One benchmark; causal, batch 1 except where sequences are decoded."""

    output_dir: str = "outputs/speed"
    lengths: list[int] = field(default_factory=lambda: [2**i for i in range(10, 18)])
    sparsities: list[float] = field(default_factory=lambda: [0.75, 0.9])  # causal
    patterns: list[str] = field(default_factory=lambda: list(PATTERNS))  # shared | clustered | iid
    backends: list[str] = field(default_factory=lambda: list(OPERATIONS))
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    # [query heads, KV heads, head size] of layers to measure one after the other, in place of the three above
    shapes: list[list[int]] = field(default_factory=list)
    chunk_size: int = 64
    dtype: str = "bf16"  # bf16 | fp16
    seed: int = 0
    check_length: int = 2500  # of the comparison with the reference, whose memory grows with its square
    tolerance: float = 0.005  # relative RMS error of output and gradients
    baseline_tolerance: float = 0.02  # of others' kernels: some sum a group's gradients in 16 bits
    warmup: int = 3  # calls before the timed ones
    repetitions: int = 12  # timed calls; their median counts
    # [tokens, sequences] of one token's step in a layer, and in a whole model with random weights; [] leaves it out
    decode: list[list[int]] = field(default_factory=lambda: [[2**15, 1], [2**17, 1], [2**19, 1], [2**15, 16]])
    decode_model: list[list[int]] = field(default_factory=lambda: [[2**15, 1], [2**17, 1]])
    model: ModelConfig | None = None  # of decode_model
    time_budget: float = 1500.0  # seconds; what is left then gets a row that says so


def register_speed_config() -> None:
    store = ConfigStore.instance()
    store.store(name="speed_schema", node=SpeedConfig)
    store.store(group="model", name="model_schema", node=ModelConfig)


def check(config: SpeedConfig) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
        ValueError: with the mend.
    """
    for name, known in (("patterns", PATTERNS), ("backends", BACKENDS), ("baselines", BASELINES)):
        wrong = [value for value in getattr(config, name) if value not in known]
        if wrong:
            raise ValueError(f"{name} has {', '.join(wrong)}: choose from {', '.join(known)}")
    if config.dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype={config.dtype}: choose one of {', '.join(KERNEL_DTYPES)}")
    sizes = ("heads", "kv_heads", "head_dim", "chunk_size", "check_length", "warmup", "repetitions")
    for name, value in [*((n, getattr(config, n)) for n in sizes), *(("lengths", n) for n in config.lengths)]:
        if value < 1:
            raise ValueError(f"{name} has {value}: at least 1 is needed")
    if not all(0 < s < 1 for s in config.sparsities):
        raise ValueError(f"sparsities lie between 0 and 1; got {config.sparsities}")
    if not (config.lengths or config.decode or config.decode_model):
        raise ValueError("nothing to measure: lengths, decode or decode_model needs an entry")
    for name in ("decode", "decode_model"):
        for case in getattr(config, name):
            if len(case) != 2 or case[0] < config.chunk_size or case[1] < 1:
                raise ValueError(f"{name} has {case}: [tokens, sequences] are needed, with at least a chunk of tokens")
    if config.decode_model and config.model is None:
        raise ValueError("decode_model needs a model: name one, as in model=1b, or set decode_model=[]")
    for shape in config.shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shapes has {shape}: [query heads, KV heads, head size] are needed")
    for heads, kv_heads in [(config.heads, config.kv_heads), *(shape[:2] for shape in config.shapes)]:
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is no multiple of kv_heads={kv_heads}")
