"""What a configuration takes from where its weights come from: the model's shape, and the tokenizer of its data.

``init_from`` names a Hugging Face folder, a run or one of a run's checkpoints. Model values that the composed
configuration gives as ``${init_from}`` (configs/model/checkpoint.yaml, all of them) are the origin's; what was given
otherwise stays. A run that is started again takes them from its own config.yaml, whether or not the origin is still
there.
"""

import copy
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dashattn.backends import BACKENDS, AttentionConfig, FullConfig
from data import DataConfig, PackedDataConfig
from experiments.files import CONFIG, TOKENIZER
from models.hf import is_hf_folder, read_attention, read_config

LEFT_OPEN = "${init_from}"
CHECKPOINT = "checkpoint"


def take_from_origin(cfg: DictConfig) -> DictConfig:
    """A composed training configuration with what it leaves to its origin.

    Raises:
        ValueError: the origin cannot be read, or has no tokenizer for data that need one.
    """
    if "init_from" not in cfg or OmegaConf.is_missing(cfg, "model"):
        return cfg
    given = _flat(OmegaConf.to_container(cfg.model, resolve=False))
    left_open = [key for key, value in given.items() if value == LEFT_OPEN]
    if "rope.scaling" in left_open:  # its parameters go with it
        left_open += [key for key, value in given.items() if key.startswith("rope.") and value is None]
    if cfg.init_from is None:
        for group, is_open in (("model", left_open), ("attention", cfg.attention.get("name") == CHECKPOINT)):
            if is_open:
                raise ValueError(f"{group}={CHECKPOINT} is that of init_from: name a folder or a run, init_from=FOLDER")
        return cfg
    cfg, origin = copy.deepcopy(cfg), Path(cfg.init_from).expanduser()
    own = _own_config(cfg)
    if cfg.attention.name == CHECKPOINT:
        _replace_attention(cfg, _attention_of(origin) if own is None else own.attention)
        own = own or _own_config(cfg)  # the attention's name may be part of the directory's
    if left_open:
        values = _flat(_model_of(origin) if own is None else OmegaConf.to_container(own.model))
        for key in left_open:
            OmegaConf.update(cfg, f"model.{key}", values.get(key))
    if "tokenizer" in cfg.data and cfg.data.tokenizer is None:
        cfg.data.tokenizer = tokenizer_of(origin) if own is None else own.data.tokenizer
    return cfg


def with_own_tokenizer(data: DataConfig, run_dir: Path) -> DataConfig:
    """``data`` read with the tokenizer that a run keeps, whatever became of the place it was taken from."""
    if not isinstance(data, PackedDataConfig) or not (run_dir / TOKENIZER).is_dir():
        return data
    return replace(data, tokenizer=str(run_dir / TOKENIZER))


def run_of(path: Path) -> Path | None:
    """The run directory that a run, a checkpoint of one or a checkpoint's weights lie in; None: in none."""
    return next((folder for folder in (path, *path.parents[1:3]) if (folder / CONFIG).is_file()), None)


def tokenizer_of(origin: Path) -> str | None:
    """Where the tokenizer of the weights is; None: of a run that kept none.

    Raises:
        ValueError: a Hugging Face folder has none.
    """
    if is_hf_folder(origin):
        if not (origin / "tokenizer.json").is_file():
            raise ValueError(
                f"{origin} has no tokenizer.json: let transformers make it, AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...), or name another tokenizer in data.tokenizer"
            )
        return str(origin)
    run = run_of(origin)
    return str(run / TOKENIZER) if run is not None and (run / TOKENIZER).is_dir() else None


def _own_config(cfg: DictConfig) -> DictConfig | None:
    """The configuration of a run that was started before."""
    try:
        path = Path(cfg.run_dir).expanduser() / CONFIG
    except OmegaConfBaseException:  # a name made of values that are missing
        return None
    return OmegaConf.load(path) if path.is_file() else None


def _model_of(origin: Path) -> dict:
    if is_hf_folder(origin):
        return asdict(read_config(origin))
    run = run_of(origin)
    if run is None:
        raise ValueError(f"init_from={origin} is neither a run nor a Hugging Face folder: it has no config")
    return OmegaConf.to_container(OmegaConf.load(run / CONFIG).model)


def _attention_of(origin: Path) -> DictConfig:
    if is_hf_folder(origin):
        return OmegaConf.structured(read_attention(origin) or FullConfig())
    run = run_of(origin)
    if run is None:
        raise ValueError(f"init_from={origin} is neither a run nor a Hugging Face folder: it has no config")
    return OmegaConf.load(run / CONFIG).attention


def _replace_attention(cfg: DictConfig, attention: DictConfig) -> None:
    """Put ``attention`` in the place of ``checkpoint``; what was given besides, of the fields all backends share,
    stays."""
    if attention.name not in BACKENDS:
        raise ValueError(f"no attention backend is called {attention.name!r}")
    given, defaults = cfg.attention, AttentionConfig()
    changed = {key: given[key] for key in given if key != "name" and given[key] != getattr(defaults, key)}
    cfg.attention = OmegaConf.merge(OmegaConf.structured(BACKENDS[attention.name][0]), attention, changed)


def _flat(values: dict, prefix: str = "") -> dict:
    result = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
