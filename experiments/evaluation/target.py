"""What is evaluated: a checkpoint, its model, and the data it was trained on; or a Hugging Face folder as it is."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from dashattn.fields import user_path
from dashattn.ops.full.reference import use_flash_attention_3
from data import BatchStream, DataConfig, PackedDataConfig, TextTokenizer, build_data, build_tokenizer
from data.cache import fingerprint
from data.corpora import corpus_fingerprint
from experiments.config import TrainConfig, load_config
from experiments.files import CONFIG, START, TOKENIZER, WEIGHTS, is_foreign, read_json, sha256
from experiments.origin import lying_at, run_of, with_own_tokenizer
from experiments.schema import DTYPES
from experiments.training.check import resolve
from experiments.training.checkpoint import read_manifest, read_state
from experiments.training.run_dir import config_hash
from experiments.training.weights import find_weights, load_weights
from models import Transformer
from models.hf import is_hf_folder, read_attention, read_step, weight_files


@dataclass(frozen=True)
class Target:
    """A checkpoint with the configuration it was trained with.

    Attributes:
        run_dir: of the run, a checkpoint that lies in none itself; of a folder where its rows are kept.
        checkpoint: of the run, or a Hugging Face folder.
        home: what holds its configuration, tokenizer and origin: the checkpoint itself; in older runs the run.
        train: as composed, but for the device, and the knob where training found one for its target sparsity. Of a
            folder what a training run would be configured with that started from it.
        output: where rows are kept in place of ``run_dir``.
        unread: what the configuration names to be read, of a run of another user: not to be read unasked.
    """

    run_dir: Path
    checkpoint: Path
    home: Path
    train: TrainConfig
    output: Path | None = None
    unread: tuple[str, ...] = ()

    @property
    def rows_dir(self) -> Path:
        """Where rows are kept."""
        return self.output or self.run_dir

    @property
    def identity(self) -> dict:
        """Columns that tell its rows from those of any other target in ``rows_dir``, beside the checkpoint's name."""
        if self.is_folder:
            return {"config_hash": config_hash(self.train), "weights": self._folder_weights, "text": self._text}
        if self.output is None:
            return {}
        weights = read_manifest(self.checkpoint)[WEIGHTS]["sha256"]
        return {"config_hash": read_state(self.checkpoint)["config_hash"], "weights": weights}

    @cached_property
    def _folder_weights(self) -> str:
        """Another folder may come to lie at the same place."""
        return fingerprint(*map(sha256, weight_files(self.checkpoint)))

    @cached_property
    def _text(self) -> str:
        """Of the corpora that a folder is scored on, and of its tokenizer: other text may come to lie there, too."""
        data, cache_dir = self.train.data, user_path(self.train.cache_dir)
        if not isinstance(data, PackedDataConfig):
            return fingerprint()
        corpora = [corpus_fingerprint(corpus, cache_dir) for corpus, _ in data.parts.values()]
        return fingerprint(corpora, self.tokenizer.fingerprint())

    @property
    def is_folder(self) -> bool:
        """Whether it is a Hugging Face folder's model, which is trained no further here."""
        return is_hf_folder(self.checkpoint)

    @property
    def is_untrained(self) -> bool:
        """Whether a folder's weights were not trained with this attention, as far as the folder says: an export of a
        sparse run says which."""
        return self.is_folder and read_attention(self.checkpoint) != self.train.attention

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """What its tokens were made with, which it holds: no corpus is read for it. None: they are no text's.

        Raises:
            ValueError: it is another than the weights were trained with.
        """
        data = self.train.data
        if not isinstance(data, PackedDataConfig):
            return None
        if not (self.home / TOKENIZER).is_dir():
            self.check_reads()
        # Of runs of before tokenizers were kept it is trained once more.
        tokenizer = build_tokenizer(data, user_path(self.train.cache_dir))
        if not self.is_folder:
            check_tokenizer(self, tokenizer)
        return tokenizer

    def check_reads(self) -> None:
        """Before anything is read that the configuration names. Raises ValueError if nobody here asked for that."""
        if self.unread:
            raise ValueError(
                f"{self.home / CONFIG} is another user's, and would have this process read {', '.join(self.unread)}: "
                "look whether it may; then evaluate.py takes any_data=true, and everything a copy of the run, which is "
                "yours"
            )


def locate(
    run: str,
    device: str,
    output: str | None = None,
    *,
    cache_dir: str = "~/.cache/dashattn",
    any_data: bool = False,
    data: DataConfig | None = None,
) -> Target:
    """The checkpoint that ``run`` names (a run directory's latest, or one of its checkpoints), for a device; its rows
    are kept in ``output``, None = in the run directory.

    Args:
        cache_dir: of a run that another user wrote, in place of the one that its configuration names.
        any_data: read the text that such a run names.
        data: where the files of the run's corpora lie now, if they were moved.

    Raises:
        ValueError: no such run, or no such device.
    """
    if is_hf_folder(user_path(run)):
        raise ValueError(f"{run} is a Hugging Face folder, and a run is needed here: init_from={run} begins one")
    checkpoint = find_weights(run).parent
    home = run_of(checkpoint)
    if home is None:
        raise ValueError(f"{checkpoint} has no {CONFIG}, nor does it lie in a run directory: copy it there")
    run_dir = checkpoint.parents[1] if (checkpoint.parents[1] / CONFIG).exists() else checkpoint
    check_device(device)
    train, is_others = load_config(home / CONFIG), is_foreign(home / CONFIG)
    train = replace(train, device=device, data=with_own_tokenizer(train.data, home))
    train = resolve(replace(train, cache_dir=cache_dir) if is_others else train)
    unread = _named(train.data, home, names_files=data is None) if is_others and not any_data else ()
    if data is not None:
        train = replace(train, data=lying_at(train.data, data))
    found = read_state(checkpoint).get("sparsity")
    attention = train.attention if found is None else train.attention.with_knob(found["knob"])
    kept = None if output is None else user_path(output)
    return Target(run_dir, checkpoint, home, replace(train, attention=attention), kept, unread)


def _named(data: DataConfig, home: Path, *, names_files: bool) -> tuple[str, ...]:
    """What is read of ``data`` that does not lie in ``home``: files, if it ``names_files``, and names on the hub."""
    if not isinstance(data, PackedDataConfig):
        return ()
    found = [] if data.tokenizer in (None, str(home / TOKENIZER)) else [f"data.tokenizer={data.tokenizer}"]
    for corpus, _ in data.parts.values():
        if corpus.source == "files" and names_files:
            found.append(f"data.files={list(corpus.files)}")
        elif corpus.source == "hub":
            found.append(f"data.path={corpus.path}")
    return tuple(found)


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU: use device=cpu")


def trained_knob(train: TrainConfig) -> float | None:
    return None if train.attention.knob is None else getattr(train.attention, train.attention.knob)


def build_model(target: Target) -> Transformer:
    """The checkpoint's model in evaluation mode, at the step (schedules) it was saved at."""
    train, checkpoint = target.train, target.checkpoint
    model = Transformer(train.model, train.attention)
    loaded = load_weights(model, checkpoint if target.is_folder else checkpoint / WEIGHTS)
    if loaded.differs and not target.is_folder:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of this configuration ({loaded}): restore the {CONFIG} that "
            "it was trained with"
        )
    if loaded.differs:
        print(f"weights of {checkpoint}; {loaded}")
    model.set_step(read_step(checkpoint) if target.is_folder else read_state(checkpoint)["step"])
    use_flash_attention_3(torch.device(train.device))
    return model.to(train.device, DTYPES[train.deepspeed.precision]).eval()


def build_stream(data: DataConfig, seed: int, rows_per_batch: int, cache_dir: Path) -> BatchStream:
    return build_data(data, split="validation", seed=seed, rows=rows_per_batch, cache_dir=cache_dir)


def validation_stream(target: Target) -> BatchStream:
    """The run's validation batches. Raises ValueError if the corpus or its tokenizer is another than it was trained
    on."""
    target.check_reads()
    train = target.train
    stream = build_stream(train.data, train.seed, 1, user_path(train.cache_dir))
    if target.is_folder:
        return stream
    if stream.tokenizer is not None:
        check_tokenizer(target, stream.tokenizer)
    trained = read_json(target.home / START, keys=("data",))["data"].get("tokens_fingerprint")
    if trained is not None and stream.describe()["tokens_fingerprint"] != trained:
        raise ValueError(
            f"the corpus of data.name={train.data.name} has changed since {target.run_dir} was trained (its "
            "fingerprint is another), and with it the tokens: restore it, or train again"
        )
    return stream


def check_tokenizer(target: Target, tokenizer: TextTokenizer) -> None:
    """Raises ValueError for a tokenizer that is not the one the run was trained with."""
    trained = read_json(target.home / START).get("tokenizer")
    if trained is not None and tokenizer.fingerprint() != trained:
        raise ValueError(
            f"{target.home / TOKENIZER} is another tokenizer than the run was trained with (its fingerprint is not "
            f"the one in {START}): restore it"
        )
