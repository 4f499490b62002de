"""What the speed benchmark can be told."""

from dataclasses import dataclass, field
from typing import Annotated

from hydra.core.config_store import ConfigStore

from dashattn.fields import Checked, Line, OneOf, PositiveFloat, PositiveInt, Seed, Sparsity, UserPath
from experiments.speed.inputs import PATTERNS
from experiments.speed.methods import BACKENDS, OPERATIONS
from experiments.speed.peers import BASELINES, READY
from models.config import ModelConfig

KERNEL_DTYPES = ("bf16", "fp16")


@dataclass
class SpeedConfig(Checked):
    """One benchmark; causal, batch 1 except where sequences are decoded."""

    output_dir: UserPath = "outputs/speed"  # of rows, table and figure
    lengths: list[PositiveInt] = field(default_factory=lambda: [2**i for i in range(10, 18)])  # in tokens
    sparsities: list[Sparsity] = field(default_factory=lambda: [0.75, 0.9])  # causal
    patterns: list[Line] = field(default_factory=lambda: list(PATTERNS))  # shared | clustered | iid
    backends: list[Line] = field(default_factory=lambda: list(OPERATIONS))  # names of operations
    # Kernels of others; by default all but flex_attention and flash_attention_4, which compile for each problem.
    baselines: list[Line] = field(default_factory=lambda: list(READY))
    heads: PositiveInt = 32  # query heads
    kv_heads: PositiveInt = 2  # heads of keys and values
    head_dim: PositiveInt = 128  # channels of a head
    # [query heads, KV heads, head size] of layers to measure one after the other, in place of the three above
    shapes: list[list[PositiveInt]] = field(default_factory=list)
    chunk_size: PositiveInt = 64  # keys per block
    dtype: Annotated[str, OneOf(KERNEL_DTYPES)] = "bf16"  # of all inputs
    seed: Seed = 0  # of the inputs
    check_length: PositiveInt = 2500  # of the comparison with the reference, whose memory grows with its square
    tolerance: PositiveFloat = 0.005  # relative RMS error of output and gradients
    baseline_tolerance: PositiveFloat = 0.02  # of others' kernels: some sum a group's gradients in 16 bits
    warmup: PositiveInt = 3  # calls before the timed ones
    repetitions: PositiveInt = 12  # timed calls; their median counts
    # [tokens, sequences] of one token's step in a layer, and in a whole model with random weights; [] leaves it out
    decode: list[list[PositiveInt]] = field(default_factory=lambda: [[2**15, 1], [2**17, 1], [2**19, 1], [2**15, 16]])
    # A whole model's step, as decode.
    decode_model: list[list[PositiveInt]] = field(default_factory=lambda: [[2**15, 1], [2**17, 1]])
    model: ModelConfig | None = None  # of decode_model
    time_budget: PositiveFloat = 1500.0  # seconds; what is left then gets a row that says so


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
    if 0 in config.sparsities:
        raise ValueError(f"sparsities lie between 0 and 1; got {config.sparsities}")
    if not (config.lengths or config.decode or config.decode_model):
        raise ValueError("nothing to measure: lengths, decode or decode_model needs an entry")
    for name in ("decode", "decode_model"):
        for case in getattr(config, name):
            if len(case) != 2 or case[0] < config.chunk_size:
                raise ValueError(f"{name} has {case}: [tokens, sequences] are needed, with at least a chunk of tokens")
    if config.decode_model and config.model is None:
        raise ValueError("decode_model needs a model: name one, as in model=1b, or set decode_model=[]")
    for shape in config.shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shapes has {shape}: [query heads, KV heads, head size] are needed")
    for heads, kv_heads in [(config.heads, config.kv_heads), *(shape[:2] for shape in config.shapes)]:
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is no multiple of kv_heads={kv_heads}")
