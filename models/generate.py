"""Text generation with a decode cache: greedy, temperature, top-p; prompts of different length in one batch.

    python -m experiments.evaluation.generate run=outputs/NAME prompt="import os"

The command line itself is ``experiments/evaluation/generate.py``, which knows run directories; this module does not.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from models.transformer import ModelCache, Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt until a stop token or ``max_new_tokens``.

    The prompts are one batch, each at its own length: nothing is put before a prompt, so that chunks begin where
    they would if it stood alone. On a GPU the step is captured once in a CUDA graph and replayed.

    Args:
        model: its parameters decide dtype and device.
        prompts: token ids, at least one each.
        temperature: 0 takes the likeliest token.
        top_p: samples from the fewest likeliest tokens whose probability reaches it.
        seed: the same seed and the same batch give the same tokens.
        on_token: called with (index of the prompt, token) as soon as a token is there.

    Returns:
        New tokens only, one list a prompt, without the stop token.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or an impossible setting.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    if not prompts:
        return []
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    cache = model.new_cache(len(prompts), max(lengths) + max_new_tokens)

    # Padding lies behind a prompt, where causal attention does not look.
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    last = torch.tensor(lengths, device=device) - 1
    logits_BV = model.decode(torch.tensor(padded, device=device), cache, at=last)[:, -1]
    cache.advance(lengths)

    step = None
    results: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for produced in range(1, max_new_tokens + 1):
        token_B = sample(logits_BV, temperature, top_p, generator)
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
        step = step or decode_step(model, cache)
        logits_BV = step(token_B)
        cache.advance()
    return results


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row, int64 [B], without waiting for the device."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV, order_BV = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p_BV.cumsum(-1) - p_BV
    p_BV = p_BV.masked_fill(before >= top_p, 0)
    # The first of exponential clocks of rates p rings with probability p / sum p.
    clock = torch.zeros_like(p_BV).exponential_(generator=generator).clamp_min_(torch.finfo(torch.float32).tiny)
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
        cache.check_room(1)
        token_B.copy_(new_B)
        graph.replay()
        return logits_BV

    return replay


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
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
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must not be negative: 0 takes the likeliest token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]: 1 samples from all tokens")
