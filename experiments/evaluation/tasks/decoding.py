"""What decoding costs: milliseconds from one token of a sequence to the next, at the model's knob."""

import time
from collections.abc import Iterator, Sequence
from statistics import median

import torch
from torch import Tensor

from experiments.evaluation.tasks.base import Setting, SparsityTally, Task, row
from models import Transformer
from models.generate import decode_step

DECODE = "decode"
WARM_UP, REPETITIONS = 3, 20


class DecodingTask(Task):
    """Time of a token with ``prompt`` behind it, alone on the device; the sparsity in its row is the prompt's."""

    names = (DECODE,)

    def __init__(self, prompt: list[int], device: str) -> None:
        """``device``: its name, of which the time is."""
        self.prompt = prompt
        self.columns = {"length": len(prompt), "rows": 1, "variant": None, "device": device}

    @torch.inference_mode()
    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        ids_BT = torch.tensor([self.prompt], device=setting.device)
        sparsity = SparsityTally()
        sparsity.add(setting.model.hidden_states(ids_BT, return_stats=True)[1], packed=False)
        yield sparsity.columns() | row(DECODE, "ms", token_ms(setting.model, ids_BT))


def token_ms(model: Transformer, ids_BT: Tensor) -> float:
    """Median over repetitions of one step, from a token on the device to the next one on the host, as ``generate``
    takes it. ``ids_BT``: one sequence, which is in the cache by then."""
    length = ids_BT.shape[1]
    cache = model.new_cache(1, length + 1)
    model.decode(ids_BT, cache, new_tokens=[length])
    cache.advance([length])
    step, token_B = decode_step(model, cache), ids_BT[:, -1]
    times = []
    for _ in range(WARM_UP + REPETITIONS):  # always the same token: the cache does not advance
        start = time.perf_counter()
        step(token_B).argmax(-1).item()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[WARM_UP:])
