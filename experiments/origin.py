"""What a configuration takes from where its weights come from: the model's shape, and the tokenizer of its data.

``init_from`` names a Hugging Face folder, a run or one of a run's checkpoints. Model values that the composed
configuration gives as ``${init_from}`` (configs/model/checkpoint.yaml, all of them) are the origin's; what was given
otherwise stays. A run that is started again takes them from its own config.yaml, whether or not the origin is still
there.
"""

import copy
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dashattn.backends import BACKENDS, AttentionConfig, FullConfig
from dashattn.fields import user_path
from data import NO_TOKEN, DataConfig, PackedDataConfig, TextTokenizer
from data.config import CorpusConfig
from data.hub import pinned
from data.tokenizer import TOKENIZER as TOKENIZER_FILE
from experiments.files import CONFIG, TOKENIZER, check_exists, is_foreign
from experiments.schema import fitting, flat, read_values
from models import ModelConfig
from models.hf import is_hf_folder, read_attention, read_config

LEFT_OPEN = "${init_from}"
CHECKPOINT = "checkpoint"


def take_from_origin(cfg: DictConfig, base: DictConfig | None = None) -> DictConfig:
    """A composed training configuration with what it leaves to its origin.

    Args:
        base: of the run that ``init_from`` names, where that is still to be trained.

    Raises:
        ValueError: the origin cannot be read, or has no tokenizer for data that need one.
    """
    if "init_from" not in cfg or OmegaConf.is_missing(cfg, "model"):
        return cfg
    given = flat(OmegaConf.to_container(cfg.model, resolve=False))
    left_open = [key for key, value in given.items() if value == LEFT_OPEN]
    if "rope.scaling" in left_open:  # its parameters go with it
        left_open += [key for key, value in given.items() if key.startswith("rope.") and value is None]
    if cfg.init_from is None:
        for group, is_open in (("model", left_open), ("attention", cfg.attention.get("name") == CHECKPOINT)):
            if is_open:
                raise ValueError(f"{group}={CHECKPOINT} is that of init_from: name a folder or a run, init_from=FOLDER")
        return cfg
    cfg, origin = copy.deepcopy(cfg), user_path(cfg.init_from)
    own = _own_config(cfg)
    own = base if own is None else own
    if cfg.attention.name == CHECKPOINT:
        _replace_attention(cfg, _attention_of(origin) if own is None else own.attention)
        own = own or _own_config(cfg)  # the attention's name may be part of the directory's
    if left_open:
        values = flat(_known_model(origin) if own is None else OmegaConf.to_container(own.model))
        for key in left_open:
            OmegaConf.update(cfg, f"model.{key}", values.get(key))
    if "tokenizer" in cfg.data and cfg.data.tokenizer is None:
        if own is not None:
            cfg.data.tokenizer = own.data.get("tokenizer")
        else:
            _take_tokenizer(cfg.data, origin)
    return cfg


def is_own(run_dir: Path, *, overwrite: bool) -> bool:
    """Whether a directory holds a run that a launch may go on with: with ``overwrite`` one that was begun with it.

    Raises:
        ValueError: its config.yaml is damaged.
    """
    if not (run_dir / CONFIG).is_file():
        return False
    return not overwrite or read_values(run_dir / CONFIG).get("overwrite", False) is True


def with_own_tokenizer(data: DataConfig, home: Path) -> DataConfig:
    """``data`` read with the tokenizer that a run or a checkpoint keeps, whatever became of the place it was taken
    from, and with the token that begins its documents."""
    if not isinstance(data, PackedDataConfig) or not (home / TOKENIZER).is_dir():
        return data
    bos_token = _begins(read_values(home / CONFIG).data) if data.bos_token is None else data.bos_token
    return replace(data, tokenizer=str(home / TOKENIZER), bos_token=bos_token)


def lying_at(data: DataConfig, given: DataConfig) -> DataConfig:
    """``data`` of a run, whose corpora lie where ``given`` has its files now. They are known by their content.

    Raises:
        ValueError: ``given`` has other corpora, or none of files.
    """
    ours, theirs = getattr(data, "parts", {}), getattr(given, "parts", {})
    if len(ours) == len(theirs) == 1:
        theirs = dict(zip(ours, theirs.values(), strict=True))  # called otherwise, as data=local is
    files = {name: corpus.files for name, (corpus, _) in theirs.items() if corpus.source == "files"}
    if not files or files.keys() != {name for name, (corpus, _) in ours.items() if corpus.source == "files"}:
        raise ValueError(
            f"data={given.name} says of a run where the files of its corpora lie now, if they were moved, and that of "
            f"all of them: those of data.name={data.name}, as the run was configured"
        )
    if isinstance(data, CorpusConfig):
        return replace(data, files=next(iter(files.values())))
    return replace(data, corpora={n: replace(c, files=files[n]) if n in files else c for n, c in data.corpora.items()})


def _begins(data: DictConfig) -> str | None:
    """A run of before there was such a token began its documents with none."""
    return data.get("bos_token", NO_TOKEN)


def check_origin_tokenizer(data: DataConfig, origin: Path) -> None:
    """Refuses data whose tokens are not those that the weights were trained on, as far as these are known.

    Args:
        data: as composed; ``tokenizer`` is the weights' own where none was named.
        origin: as ``init_from``.

    Raises:
        ValueError: naming the option that takes other tokens all the same.
    """
    is_text, named = isinstance(data, PackedDataConfig), getattr(data, "tokenizer", None)
    weights = _tokens_of(origin)
    if weights is None:
        if is_text and named is None and origin.is_file():
            raise ValueError(
                f"nothing beside {origin} says what its tokens are, and a tokenizer would be trained that gives them "
                "another meaning: name that of the weights in data.tokenizer, or set any_tokenizer=true"
            )
        return
    if not (is_text and weights.are_text):
        is_same = is_text == weights.are_text
    elif weights.kept is None or named in (None, weights.kept):
        is_same = named is not None
    else:
        own = TextTokenizer.load(named, data.eos_token, data.bos_token)
        is_same = own.has_tokens_of(TextTokenizer.load(weights.kept))
    if not is_same:
        raise ValueError(
            f"data.name={data.name}" + (f" with data.tokenizer={named}" if named else "") + " has other tokens than "
            f"{origin} was trained on: take its tokenizer and data of its kind, or set any_tokenizer=true to begin "
            "with weights for which every token meant something else"
        )


class _Tokens(NamedTuple):
    """What weights were trained on."""

    are_text: bool  # else generated
    kept: str | None  # where the tokenizer is


def _tokens_of(origin: Path) -> _Tokens | None:
    """None: not known."""
    if is_hf_folder(origin):
        return _Tokens(True, str(origin)) if (origin / TOKENIZER_FILE).is_file() else None
    run = run_of(origin)
    if run is None:
        return None
    kept = run / TOKENIZER
    return _Tokens("pairs_min" not in read_values(run / CONFIG).data, str(kept) if kept.is_dir() else None)


def run_of(path: Path) -> Path | None:
    """What holds the configuration of a run, one of its checkpoints or a checkpoint's weights: the run, the checkpoint
    itself, or, where that has none of its own, the run it lies in; None: nothing does."""
    return next((folder for folder in (path, *path.parents[:3]) if (folder / CONFIG).is_file()), None)


def model_of(origin: Path) -> ModelConfig | None:
    """The model of a Hugging Face folder, a run, one of its checkpoints or a checkpoint's weights; None: there is no
    configuration.

    Raises:
        ValueError: it cannot be read, or describes no model.
    """
    if is_hf_folder(origin):
        return read_config(origin)
    run = run_of(origin)
    if run is None:
        return None
    with fitting(run / CONFIG):
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), read_values(run / CONFIG).model))


def tokenizer_of(origin: Path) -> str | None:
    """Where the tokenizer of the weights is; None: of a run that kept none.

    Raises:
        ValueError: a Hugging Face folder has none.
    """
    if is_hf_folder(origin):
        if not (origin / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"{origin} has no {TOKENIZER_FILE}: let transformers make it, AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...), or name another tokenizer in data.tokenizer"
            )
        return str(origin)
    run = run_of(origin)
    return str(run / TOKENIZER) if run is not None and (run / TOKENIZER).is_dir() else None


def _own_config(cfg: DictConfig) -> DictConfig | None:
    """The configuration of a run that was started before, or of the one that it branches off.

    Raises:
        ValueError: it is damaged, or another user's and names a tokenizer for this process to read.
    """
    run_dir = None
    with suppress(OmegaConfBaseException):  # a name made of values that are missing
        if is_own(user_path(cfg.run_dir), overwrite=cfg.get("overwrite", False)):
            run_dir = cfg.run_dir
    path = _began_with(run_dir, cfg.get("branch_from"))
    if path is None:
        return None
    own = read_values(path)
    if own.data.get("tokenizer") is not None and cfg.data.get("tokenizer") is None and is_foreign(path):
        raise ValueError(
            f"{path} is another user's, and would have this process read data.tokenizer={own.data.tokenizer}: name the "
            f"tokenizer yourself, data.tokenizer={path.parent / TOKENIZER} if that is it"
        )
    return own


def _began_with(run_dir: str | None, branch_from: str | None) -> Path | None:
    """The config.yaml of a run that was started before, or of the one that it branches off."""
    places = [] if run_dir is None else [user_path(run_dir)]
    places += [] if branch_from is None else [parse_branch(branch_from)[0]]
    return next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)


def with_commits(data: DataConfig, run_dir: str, branch_from: str | None) -> DataConfig:
    """``data`` with the commits of what they read from the hub: those that a run began with, or the one that it
    branches off, where no revision is named.

    Raises:
        ValueError: a commit cannot be had.
    """
    path, began = _began_with(run_dir, branch_from), {}
    if path is not None:
        own = read_values(path).data
        began = {name: corpus.get("revision") for name, corpus in own.get("corpora", {data.name: own}).items()}
    return pinned(data, began)


def parse_branch(branch_from: str) -> tuple[Path, int]:
    """The run and the step that ``branch_from`` names. Raises ValueError if it names none."""
    run, _, step = branch_from.rpartition("@")
    if not run or not step.isdecimal():
        raise ValueError(f"branch_from={branch_from}: give RUN@STEP, a run directory and the step of a checkpoint")
    return user_path(run), int(step)


def _check_known(origin: Path) -> None:
    """Refuses what says of no model. Raises ValueError."""
    check_exists(origin, "init_from takes a run directory, a checkpoint or a Hugging Face folder")
    if not is_hf_folder(origin) and run_of(origin) is None:
        raise ValueError(
            f"init_from={origin} is neither a run nor a Hugging Face folder, since it has no config: name the folder "
            f"that its {CONFIG} or config.json is in"
        )


def _known_model(origin: Path) -> dict:
    _check_known(origin)
    return asdict(model_of(origin))


def _attention_of(origin: Path) -> DictConfig:
    _check_known(origin)
    if is_hf_folder(origin):
        return OmegaConf.structured(read_attention(origin) or FullConfig())
    return read_values(run_of(origin) / CONFIG).attention


def _replace_attention(cfg: DictConfig, attention: DictConfig) -> None:
    """Put ``attention`` in the place of ``checkpoint``; what was given besides, of the fields all backends share,
    stays."""
    name = attention.get("name")
    if name not in BACKENDS:
        raise ValueError(f"no attention backend is called {name!r}: install the package that brings it")
    given, defaults = cfg.attention, AttentionConfig()
    changed = {key: given[key] for key in given if key != "name" and given[key] != getattr(defaults, key)}
    cfg.attention = OmegaConf.merge(OmegaConf.structured(BACKENDS[attention.name][0]), attention, changed)


def _take_tokenizer(data: DictConfig, origin: Path) -> None:
    """Let ``data`` have the tokenizer of the weights, with what begins and ends their documents; nothing is changed
    where the weights have none."""
    data.tokenizer = tokenizer_of(origin)
    if data.tokenizer is not None and not is_hf_folder(origin):
        theirs = read_values(run_of(origin) / CONFIG).data
        for key, value in (("bos_token", _begins(theirs)), ("eos_token", theirs.get("eos_token"))):
            if data[key] is None:
                data[key] = value
