"""Tiny Hugging Face checkpoints."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data.tokenizer import train_bpe


def make_folder(
    path: Path, classes=(LlamaConfig, LlamaForCausalLM), vocab_size=310, shard_size="1GB", **values
) -> Path:
    """Random weights, and a tokenizer of their own."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=None)
    config = classes[0](**shape, **ids, num_key_value_heads=2, vocab_size=vocab_size, **values)
    classes[1](config).save_pretrained(path, max_shard_size=shard_size)
    backend = train_bpe(iter(["def f(x):\n    return x\n" * 20]), 280, "</s>")
    backend.add_special_tokens(["<s>"])
    backend.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
