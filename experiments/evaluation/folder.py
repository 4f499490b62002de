"""A Hugging Face folder as what is evaluated: nothing was trained here, and text to score it on is named if need be."""

from dataclasses import replace

from dashattn.backends import AttentionConfig, FullConfig
from dashattn.fields import user_path
from data import NO_TOKEN, DataConfig, PackedDataConfig, TextDataConfig, TextTokenizer
from data.hub import pinned
from experiments.config import DeepSpeedConfig, TrainConfig
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.target import Target, check_device, locate
from experiments.evaluation.tasks.decoding import DECODE
from experiments.evaluation.tasks.streams import STREAM_TASKS
from experiments.origin import check_origin_tokenizer, tokenizer_of
from experiments.training.check import check_vocabulary, meta_backends, resolve
from models import ModelConfig
from models.hf import (
    check_files,
    check_same_attention,
    check_same_model,
    is_hf_folder,
    read_attention,
    read_config,
)

_NO_TEXT = "no text"  # as data.name of what is scored on none


def locate_model(run: str, device: str, length: int | None = None) -> Target:
    """A run, one of its checkpoints or a Hugging Face folder, of which only model and tokenizer are wanted.

    Args:
        length: the longest row in tokens; None: the model's.

    Raises:
        ValueError: as ``locate`` and ``locate_folder``.
    """
    if not is_hf_folder(user_path(run)):
        return locate(run, device)
    return locate_folder(EvaluateConfig(run=run, device=device, tasks=[], lengths=length and [length]))


def locate_folder(config: EvaluateConfig) -> Target:
    """The Hugging Face folder that ``config.run`` names, to be scored without any training.

    Raises:
        ValueError: no text to score it on where there has to be one, or its model, files or attention cannot be had.
    """
    folder, data = user_path(config.run), config.data
    if data is None and (config.sparsities is not None or {*STREAM_TASKS, DECODE} & set(config.tasks)):
        raise ValueError(f"{folder} was trained elsewhere: name the text to score it on, as in data=python_stdlib")
    check_device(config.device)
    model, own, attention = read_config(folder), read_attention(folder), config.attention
    data = data or _no_text(config, model)
    if attention is not None:
        _check_untrained(attention)
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
    return Target(user_path(train.run_dir), folder, folder, train)


def _check_untrained(attention: AttentionConfig) -> None:
    """Refuses options that only training heeds."""
    for name in ("target_sparsity", "sparsity_count", "sparsity_control"):
        value, default = getattr(attention, name), getattr(AttentionConfig, name)
        if value != default:
            instead = "sparsity_count" if name == "sparsity_count" else "sparsities=[0.75]"
            raise ValueError(f"attention.{name}={value} is for training: leave it out, here {instead} says so")


def _no_text(config: EvaluateConfig, model: ModelConfig) -> DataConfig:
    """Data with the folder's tokenizer and no text, for generated tasks and lm_eval's."""
    longest = max(config.lengths or [model.max_seq_len])
    return TextDataConfig(name=_NO_TEXT, seq_len=longest, source="recall", max_documents=2)
