"""Continuing prompts token by token."""

from collections.abc import Callable, Collection

import torch

from models.transformer import Transformer


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
    """Greedy continuations, each ending before the first of ``stop_tokens``; a full forward pass for each token."""
    if (temperature, top_p, seed) != (0.0, 1.0, 0):
        raise ValueError("only greedy decoding: leave temperature, top_p and seed at their defaults")
    device = next(model.parameters()).device
    continuations = []
    for index, prompt in enumerate(prompts):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_new_tokens:
            logits_BTV = model(torch.tensor([tokens], device=device)).logits
            token = int(logits_BTV[0, -1].argmax())
            if token in stop_tokens:
                break
            tokens.append(token)
            if on_token is not None:
                on_token(index, token)
        continuations.append(tokens[len(prompt) :])
    return continuations
