"""Text generation with a decode cache: greedy or sampled; prompts of different length in one batch.

    python -m experiments.evaluation.generate run=outputs/NAME prompt="import os"

The command line itself is ``experiments/evaluation/generate.py``, which knows run directories; this module does not.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dashattn.ops.dtypes import upcast
from dashattn.stats import AttentionStats
from models.cache import ModelCache
from models.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Meanings and order are transformers': penalty, temperature, top-k, top-p.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: samples from the fewest likeliest tokens whose probability reaches it.
        top_k: samples from that many likeliest tokens; 0 = from all.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the prompt or
            the continuation holds already (arXiv 1909.05858, section 4.1); 1 = none.

    Raises ValueError for impossible values.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must not be negative: 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]: 1 samples from all tokens")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a number of tokens: 0 samples from all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive: 1 is none")


GREEDY = Sampling()


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_stats: Callable[[list[AttentionStats]], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt until a stop token or ``max_new_tokens``.

    The prompts are one batch, each at its own length: nothing is put before a prompt, so that chunks begin where
    they would if it stood alone. What continues a prompt is the same in any batch, up to rounding, and the same as
    without a cache: where longrope changes its factors, the sequences are read again. On a GPU the step is captured
    once in a CUDA graph and replayed.

    Args:
        model: its parameters decide dtype and device.
        prompts: token ids, at least one each.
        seeds: one a prompt, of what is drawn for it alone; None = 0, 1, 2, ...
        on_token: called with (index of the prompt, token) as soon as a token is there.
        on_stats: called with what each layer's attention read in the prompts, before the first token is there; of
            each as many tokens as of the longest, the others' last ones padding.

    Returns:
        New tokens only, one list a prompt, without the stop token.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or an impossible setting.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    _check(model, prompts, max_new_tokens, seeds)
    if not prompts:
        return []
    device = model.embedding.weight.device
    sampler = Sampler(sampling, prompts, seeds, model.config.vocab_size, device)
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    logits_BV = _read(model, cache, prompts, on_stats)
    step = None
    results: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for produced in range(1, max_new_tokens + 1):
        token_B = sampler(logits_BV)
        for row, token in enumerate(token_B.tolist()):
            if row not in going:
                continue
            if token in stop_tokens:
                going.remove(row)
                continue
            results[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if not going or produced == max_new_tokens:
            break
        if cache.outgrows_rotation(1):
            cache.reset()  # rows that have ended stay as short as can be
            pairs = enumerate(zip(prompts, results, strict=True))
            sequences = [prompt + new if row in going else prompt[:1] for row, (prompt, new) in pairs]
            logits_BV = _read(model, cache, sequences)
            continue
        step = step or decode_step(model, cache)
        logits_BV = step(token_B)
        cache.advance()
    return results


def padded(sequences: Sequence[list[int]], filler: int, device: torch.device) -> Tensor:
    """int64 [B, T], each sequence filled up behind its end, where causal attention does not look from within it."""
    longest = max(map(len, sequences))
    return torch.tensor([ids + [filler] * (longest - len(ids)) for ids in sequences], device=device)


def _read(
    model: Transformer,
    cache: ModelCache,
    sequences: list[list[int]],
    on_stats: Callable[[list[AttentionStats]], None] | None = None,
) -> Tensor:
    """Puts sequences into an empty cache; the logits behind each, [B, V]."""
    lengths = [len(sequence) for sequence in sequences]
    ids_BT = padded(sequences, 0, model.embedding.weight.device)
    if on_stats is None:
        logits_BTV = model.decode(ids_BT, cache, new_tokens=lengths)
    else:
        logits_BTV, stats = model.decode(ids_BT, cache, new_tokens=lengths, return_stats=True)
        on_stats(stats)
    cache.advance(lengths)
    return logits_BTV[:, -1]


class Sampler:
    """Chooses a token for each row, without waiting for the device; no row's draws depend on the others."""

    def __init__(
        self, sampling: Sampling, prompts: list[list[int]], seeds: Sequence[int], vocab_size: int, device
    ) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.seen_BV = None
        if sampling.repetition_penalty != 1:
            self.seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen_BV[row, prompt] = True

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """int64 [B]."""
        if self.seen_BV is not None:
            penalty, logits_BV = self.sampling.repetition_penalty, upcast(logits_BV)
            penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
            logits_BV = penalised_BV.where(self.seen_BV, logits_BV)
        token_B = self._choose(logits_BV)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)
        return token_B

    def _choose(self, logits_BV: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.temperature == 0:
            return logits_BV.argmax(-1)
        logits_BV, order_BV = (logits_BV.float() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            logits_BV[:, sampling.top_k :] = -torch.inf
        p_BV = logits_BV.softmax(-1)
        if sampling.top_p < 1:  # a sum of all may round to more than 1 long before the last token
            before = p_BV.cumsum(-1) - p_BV
            p_BV = p_BV.masked_fill(before >= sampling.top_p, 0)
        # The first of exponential clocks of rates p rings with probability p / sum p.
        clock = torch.empty_like(p_BV)
        for row, generator in zip(clock, self.generators, strict=True):
            row.exponential_(generator=generator)
        clock.clamp_min_(torch.finfo(torch.float32).tiny)
        return order_BV.gather(-1, (p_BV / clock).argmax(-1, keepdim=True))[:, 0]


def decode_step(model: Transformer, cache: ModelCache) -> Callable[[Tensor], Tensor]:
    """From one token of every sequence, int64 [B], to the logits [B, V] of the next."""

    def step(token_B: Tensor) -> Tensor:
        return model.decode(token_B[:, None], cache)[:, -1]

    static = all(backend.decodes_statically(layer) for backend, layer in zip(model.backends, cache.layers, strict=True))
    if cache.lengths.device.type != "cuda" or not static:
        return step
    token_B = torch.zeros(cache.lengths.shape, dtype=torch.int64, device=cache.lengths.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels; what it writes lies past the lengths
        step(token_B)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_BV = step(token_B)

    def replay(new_B: Tensor) -> Tensor:
        # A replayed step runs no line of Python: what its checks would refuse is refused here.
        cache.check_room(1)
        cache.check_rotation(1)
        token_B.copy_(new_B)
        graph.replay()
        return logits_BV

    return replay


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int, seeds: Sequence[int]) -> None:
    vocab_size = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {index} is empty: begin it with at least one token, such as the end-of-text token"
            )
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(
                f"prompt {index} has tokens outside 0 .. {vocab_size - 1}: encode it with the model's tokenizer"
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1 is needed")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each")
