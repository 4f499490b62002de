"""Tiny checkpoints of transformers' architectures, and what is asked of them with the attentions of this library."""

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_folder

CHUNKS = {"chunk_size": 4, "router_scale": 30.0}
WINDOWS = {"block_size": 4, "kernel_size": 4, "kernel_stride": 2, "topk": 3, "window_size": 4}
OPTIONS = {
    "dash": CHUNKS,
    "dash_sink": CHUNKS,
    "dash_topk": {"chunk_size": 4, "topk": 3},
    "dash_topp": {"chunk_size": 4, "top_p": 0.3},
    "hils": {"chunk_size": 8, "topk": 4},
    "moba": {"chunk_size": 4, "topk": 3},
    "infllmv2": WINDOWS,
    "sink_window": {"block_size": 4, "local_blocks": 1},
    "oracle": {"block_size": 4, "topk": 3, "local_blocks": 0},
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
}
LENGTH = 50
IDS = torch.randint(2, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
LENGTHS = [30, 7, 19]


def folders_in(tmp_path_factory):
    """Folder of a model type, made once; weights large enough for attention that is far from uniform."""
    made = {}

    def folder(kind="llama"):
        if kind not in made:
            classes = tuple(getattr(transformers, f"{CLASSES[kind]}{end}") for end in ("Config", "ForCausalLM"))
            made[kind] = make_folder(tmp_path_factory.mktemp(kind), classes, initializer_range=0.4)
        return made[kind]

    return folder


def theirs(folder, name, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name).eval()
    model.config.dashattn = OPTIONS.get(name, {}) | options
    return model


def assert_close(x, y):
    torch.testing.assert_close(x, y, atol=2e-4, rtol=2e-4)


def unpadded():
    return [IDS[0, :length].tolist() for length in LENGTHS]


def padded(side, lengths):
    """Rows of the first tokens of ``IDS[0]``, and their mask."""
    column, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    mask = column >= max(lengths) - length if side == "left" else column < length
    ids = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, torch.cat([IDS[0, :n] for n in lengths]))
    return ids, mask.long()


def new_tokens(model, ids, count, **options):
    length = ids.shape[1]
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": 309} | options
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)[:, length:]
