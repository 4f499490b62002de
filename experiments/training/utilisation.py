"""Model FLOPs utilisation (MFU): operations the model needs, per second, over what the devices could do."""

from collections.abc import Sequence

from dashattn.stats import AttentionStats
from data import Batch
from experiments.config import TrainConfig
from experiments.training.ranks import Ranks
from models import Transformer
from models.flops import flops_per_token, layer_reads
from models.meta import without_memory

# Dense 16-bit tensor-core TFLOP/s with float32 accumulation, from NVIDIA's data sheets, whose own figures are with 2:4
# sparsity and twice these from the A100 on; the first name that fits. They are multiprocessors x operations a cycle x
# boost clock: H100 SXM and H200 132 x 4096 x 1.83 GHz = 989.4, A100 108 x 2048 x 1.41 GHz = 311.9.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H200 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),  # GH200, too
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.0),
)


def peak_tflops(config: TrainConfig, device_name: str) -> float | None:
    """Of one device; None where there is none to compare with: on a CPU, in float32, on an unknown GPU."""
    if config.device == "cpu":
        return None
    if config.peak_tflops is not None or config.deepspeed.precision == "fp32":
        return config.peak_tflops
    return next((peak for name, peak in PEAK_TFLOPS if name in device_name), None)


class Utilisation:
    """MFU of a run, counted twice: ``mfu_causal`` as if attention were dense and causal, the usual figure, which makes
    backends comparable; ``mfu_sparse`` with the keys and summaries that the attention was last measured to read."""

    def __init__(self, config: TrainConfig, peak: float | None, ranks: Ranks):
        """``peak``: TFLOP/s of a rank's device; None = there is nothing to report."""
        self._peak = None if peak is None else peak * ranks.world_size
        if peak is not None:
            with without_memory():  # shapes are all it takes, and the run's own may lie in parts on many devices
                self._model = Transformer(config.model, config.attention)
        self._seq_len = config.data.seq_len
        self._reads: tuple[list[float], list[float]] | None = None

    def measure(self, stats: Sequence[AttentionStats]) -> None:
        """What a forward pass has read."""
        if self._peak is not None:
            self._reads = layer_reads(stats)

    def read(self, batches: Sequence[Batch], tokens_per_s: float) -> dict[str, float]:
        """MFU of a step on ``batches``; ``mfu_sparse`` once there was a measurement. Recomputation counts as waste."""
        if self._peak is None:
            return {}
        tokens = sum(batch.num_tokens for batch in batches)
        causal = sum(int((batch.position_ids + 1).sum()) for batch in batches) / tokens
        flops = flops_per_token(self._model, self._seq_len, active_tokens=causal)
        values = {"mfu_causal": flops.train * tokens_per_s / (self._peak * 1e12)}
        if self._reads is not None:
            active, routing = self._reads
            flops = flops_per_token(self._model, self._seq_len, active_tokens=active, routing_reads=routing)
            values["mfu_sparse"] = flops.train * tokens_per_s / (self._peak * 1e12)
        return values
