"""A Hugging Face folder as what is evaluated: nothing was trained here, and the text to score it on is named."""

from dataclasses import replace
from pathlib import Path

from dashattn.backends import FullConfig
from data import NO_TOKEN, PackedDataConfig, TextTokenizer
from data.hub import pinned
from experiments.config import DeepSpeedConfig, TrainConfig
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.target import Target, check_device
from experiments.origin import check_origin_tokenizer, tokenizer_of
from experiments.training.check import check_vocabulary, meta_backends, resolve
from models.hf import check_files, check_same_attention, check_same_model, read_attention, read_config


def locate_folder(config: EvaluateConfig) -> Target:
    """The Hugging Face folder that ``config.run`` names, to be scored without any training.

    Raises:
        ValueError: no text to score it on, or its model, files or attention cannot be had.
    """
    folder, data = Path(config.run).expanduser(), config.data
    if data is None:
        raise ValueError(f"{folder} was trained elsewhere: name the text to score it on, as in data=python_stdlib")
    check_device(config.device)
    model, own, attention = read_config(folder), read_attention(folder), config.attention
    if attention is None or attention.name == "checkpoint":
        attention = own or FullConfig()
    lengths = config.lengths or [data.seq_len]
    if not config.any_attention:
        check_same_attention(attention, folder, lengths)
    check_files(folder)
    if isinstance(data, PackedDataConfig) and data.tokenizer is None:
        data = replace(data, tokenizer=tokenizer_of(folder))
    if not config.any_tokenizer:
        check_origin_tokenizer(data, folder)
    if isinstance(data, PackedDataConfig):  # said in full: rows are known by it
        tokenizer = TextTokenizer.load(data.tokenizer, data.eos_token, data.bos_token)
        data = replace(data, bos_token=tokenizer.bos_token or NO_TOKEN)
    data = pinned(data, {})
    longest = max([data.seq_len, *lengths])
    check_same_model(replace(model, max_seq_len=max(longest, model.max_seq_len)), folder)
    name = f"{folder.resolve().name}-{attention.name}"
    train = TrainConfig(
        name=name,
        run_dir=config.output or f"outputs/{name}",
        cache_dir=config.cache_dir,
        model=model,
        attention=attention,
        data=data,
        deepspeed=DeepSpeedConfig(),
        init_from=str(folder),
        device=config.device,
    )
    train = resolve(train)
    check_vocabulary(train)
    meta_backends(train)
    return Target(Path(train.run_dir).expanduser(), folder, folder, train)
