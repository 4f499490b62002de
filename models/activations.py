"""What training keeps and takes on a GPU beside weights and optimizer, counted in bytes from shapes alone.

Kept: what autograd saves of a layer for its backward pass. In 16 bits the sums are those of the tensors that
``models.transformer`` makes, each once; the allocator's rounding and libraries' workspaces are left out.
"""

from dataclasses import dataclass

from dashattn.backends import AttentionBackend
from models.config import ModelConfig
from models.loss import CHUNK_LOGITS


@dataclass(frozen=True)
class LayerBytes:
    """Of a token in one layer.

    Attributes:
        input: of the residual stream, which activation checkpointing keeps.
        kept: all that is saved between the forward and the backward pass, ``input`` included.
        mlp: of ``kept``, what the backward of the MLP is done with when it ends.
        mlp_scratch: what that backward takes besides.
        attention_scratch: what the backward of attention takes: gradients, lists of the sparse kernels, priors.
        lists: of ``attention_scratch``, the lists, sums and priors.
    """

    input: float
    kept: float
    mlp: float
    mlp_scratch: float
    attention_scratch: float
    lists: float

    @property
    def scratch(self) -> float:
        """The most that a layer's backward takes besides what is kept of it."""
        return max(self.mlp_scratch, self.attention_scratch - self.mlp)


def layer_bytes(
    config: ModelConfig, backend: AttentionBackend, length: int, itemsize: int, *, compiled: bool
) -> LayerBytes:
    """Of rows of ``length`` tokens, in a type of ``itemsize`` bytes; ``compiled``: as torch.compile saves it."""
    hidden, inner = itemsize * config.hidden_size, itemsize * config.intermediate_size
    queries, keys = (itemsize * heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    # Inputs of both norms and what they make of them; a float32 factor each.
    norms = 4 * hidden + 8
    if config.qk_norm != "none":
        norms += queries + keys + 4 * (2 if config.qk_norm == "width" else config.num_heads + config.num_kv_heads)
    attention = 2 * queries + 2 * keys + backend.kept_bytes(length, itemsize)
    if backend.config.knob is None and not compiled:
        attention += queries  # dense: cuDNN's output lies heads first, and is copied for the projection
    # gate, up and their product; eager also silu(gate), which a compiled backward makes again.
    mlp = (3 if compiled else 4) * inner
    lists = backend.scratch_bytes(length, itemsize)
    return LayerBytes(
        input=hidden,
        kept=norms + attention + mlp,
        mlp=2 * hidden + mlp,
        # Gradients of gate, up and what they come from, and of the stream; the product makes way for them.
        mlp_scratch=2 * inner + hidden,
        attention_scratch=2 * queries + 2 * keys + 2 * hidden + lists,
        lists=lists,
    )


def loss_bytes(config: ModelConfig, tokens: int, itemsize: int, *, compiled: bool) -> float:
    """What the output head takes at most for the loss of ``tokens`` tokens: a chunk of the logits and its gradient,
    the gradient of the table in float32 and once more in the weights' type, and that of the hidden states."""
    chunk = min(tokens, max(1, CHUNK_LOGITS // config.vocab_size)) * config.vocab_size
    # Compiled: logits and gradient. Eager: logits, and in float32 themselves and their log-softmax.
    logits = chunk * (2 * itemsize if compiled else itemsize + 8)
    table = config.vocab_size * config.hidden_size * (4 + itemsize)
    return logits + table + 3 * itemsize * config.hidden_size * tokens
