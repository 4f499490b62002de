"""What a user can say about the data. Fields without a default are mandatory (``???`` in a composed config).

Validation happens in __post_init__, so a bad value fails when the config is built, before any work starts.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import Annotated

from dashattn.fields import (
    MOST_LONG,
    AnyText,
    Checked,
    Line,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    PositiveLong,
    PositiveShare,
    Range,
    Seed,
    UserPath,
)

SOURCES = ("hub", "files", "python_stdlib", "recall")
PACKINGS = ("documents", "plain")
PLACEMENTS = ("clustered", "spread")
NO_TOKEN = "none"  # as data.bos_token: nothing begins a document
MOST_FACTS = 10_000  # there are not enough different names for many more
LEAST_VOCABULARY = 257  # 256 bytes, and what ends a document
SeqLen = Annotated[int, Range(int, 2, 2**31 - 1, "at least 2 tokens")]
Facts = Annotated[int, Range(int, 1, MOST_FACTS, f"from 1 to {MOST_FACTS}")]


@dataclass(kw_only=True)
class DataConfig(Checked, at="data"):
    """Base of all data configs. ``name`` labels result rows; ``seq_len`` is the tokens per row."""

    name: Line  # labels result rows
    seq_len: SeqLen  # tokens per row

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents, none of which attends to another."""
        return False

    def at_length(self, length: int, **changes) -> "DataConfig":
        """These data in rows of ``length`` tokens, all of them, with other fields changed too."""
        return replace(self, seq_len=length, **changes)


@dataclass(kw_only=True)
class CorpusConfig(Checked, at="data"):
    """Where documents come from."""

    source: Annotated[str, OneOf(SOURCES)]  # where the documents are

    # hub: a data set on the Hugging Face hub
    path: Line | None = None  # its name, e.g. HuggingFaceFW/fineweb-edu
    config_name: Line | None = None  # of a data set that has several
    hub_split: Line = "train"  # split of the data set
    # Commit, branch or tag; null = the newest, or what the run began with. A run keeps the commit.
    revision: Line | None = None
    # files: paths or globs of .txt, .json, .jsonl / .ndjson and .parquet, also packed (.gz, .zst, .xz, .bz2)
    files: list[UserPath] = field(default_factory=list)
    text_column: Line = "text"  # field of a row that holds the text
    # Of a .txt: what stands between its documents; \n in it, as a shell hands that over, is the end of a line. Null =
    # the whole file is one, unless it has more characters than document_bytes: then it is cut at ends of paragraphs;
    # null there = never.
    document_separator: AnyText | None = None
    document_bytes: PositiveInt | None = 1_000_000  # characters of a file without separator from which on it is cut
    # Rows and files that cannot be read and are left out, by name, before the corpus is refused; while streaming, of
    # each file.
    bad_rows: NonNegativeInt = 100
    # recall: max_documents generated documents that state facts and ask for them; see data/recall.py
    facts_min: Facts = 1  # asked for in a document
    facts_max: Facts = 8  # at most, in a document
    hay_max: NonNegativeInt = 64  # sentences around them, some 20 tokens each
    recall_seed: Seed = 0  # of the generated documents

    # Read no more than this of the corpus (both splits together).
    max_documents: Annotated[int, Range(int, 2, MOST_LONG, "at least 2")] | None = None
    max_bytes: PositiveLong | None = None  # as max_documents, in bytes of text

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "hub" and not self.path:
            raise ValueError("data.source=hub needs data.path, the data set's name on the hub")
        if self.document_separator is not None:  # files are read with "\n" at the ends of lines, whatever they have
            separator = self.document_separator.replace("\\r", "\r").replace("\\n", "\n")
            self.document_separator = separator.replace("\r\n", "\n").replace("\r", "\n")
        if self.document_separator == "":
            raise ValueError("data.document_separator='' separates nothing; give a text, or null")
        if self.source == "files" and not self.files:
            raise ValueError("data.source=files needs data.files, a list of paths or globs")
        if self.source == "recall" and self.max_documents is None:
            raise ValueError("data.source=recall needs data.max_documents, the number of documents to generate")
        if self.facts_max < self.facts_min:
            raise ValueError(f"data.facts_max={self.facts_max} is too small; give at least {self.facts_min}")

    @property
    def capped(self) -> bool:
        """Whether only the head of the corpus is read."""
        return self.source != "recall" and (self.max_documents is not None or self.max_bytes is not None)


@dataclass(kw_only=True)
class MixedCorpusConfig(CorpusConfig, at="data.corpora"):
    """One corpus of a mixture."""

    weight: PositiveFloat = 1.0  # its share of the rows, relative to the others' weights


@dataclass(kw_only=True)
class PackedDataConfig(DataConfig):
    """Documents, tokenised and packed into rows of seq_len tokens, from one corpus or several."""

    # True: tokenise while training, in stored order, keeping nothing on disk. False: tokenise once into the
    # cache.
    streaming: bool = False

    # Share of the documents, chosen by a hash of their content.
    validation_fraction: Annotated[float, Range(float, 0, 1, "between 0 and 1", but=(0, 1))] = 0.02
    validation_rows: PositiveInt | None = 64  # rows of one evaluation, the same for every seed; null = all

    # A tokenizer.json, a folder that holds one, or a hub name; null = the one of init_from, or without it a byte-level
    # BPE that is trained on the corpora.
    tokenizer: UserPath | None = None
    vocab_size: PositiveInt = 2048  # of a trained tokenizer
    tokenizer_bytes: PositiveLong = 4_000_000  # it is trained on at most this much of the training split
    # Begins a document, a prompt and what the harness asks; null = what the tokenizer itself puts before a text, none =
    # nothing. Llama's and Mistral's put one there, SmolLM2's and one that is trained here do not.
    bos_token: Line | None = None
    eos_token: Line | None = None  # ends a document; null = what the tokenizer names, <|endoftext|> where it names none

    # documents: attention stays inside a document; plain: it runs across the whole row.
    pack: Annotated[str, OneOf(PACKINGS)] = "documents"
    # Training documents packed with others of like length: [1024, 8192] are three buckets, of up to 1023 tokens, of
    # 1024 to 8191, and of more. A bucket's weight is how much oftener than once an epoch it is read: [1, 1, 3] reads
    # long documents three times as often, relative to the others of the corpus. No weights = all alike.
    length_buckets: list[PositiveInt] = field(default_factory=list)
    # Of length_buckets, one more than there are bounds.
    length_weights: list[NonNegativeFloat] = field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        return self.pack == "documents"

    @property
    def parts(self) -> dict[str, tuple[CorpusConfig, float]]:
        """The corpora by name, each with its weight among the rows."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        least = LEAST_VOCABULARY + (self.bos_token not in (None, NO_TOKEN))
        if self.tokenizer is None and self.vocab_size < least:
            raise ValueError(f"data.vocab_size={self.vocab_size} is too small; give at least {least}")
        self._check_buckets()
        if self.streaming:
            self._check_streaming()

    def _check_buckets(self) -> None:
        bounds, weights = list(self.length_buckets), list(self.length_weights)
        if any(a >= b for a, b in itertools.pairwise([1, *bounds])):
            raise ValueError(f"data.length_buckets={bounds} must increase, from 2 tokens on")
        if weights and len(weights) != len(bounds) + 1:
            raise ValueError(
                f"data.length_weights={weights} needs one weight more than data.length_buckets={bounds} has bounds"
            )
        if weights and not any(weights):
            raise ValueError(f"data.length_weights={weights} must not be all 0")

    def _check_streaming(self) -> None:
        for corpus, _ in self.parts.values():
            if corpus.source == "python_stdlib":
                raise ValueError("data.source=python_stdlib cannot stream; set data.streaming=false")
            if corpus.capped:
                raise ValueError("a capped corpus is prepared, not streamed; set data.streaming=false or drop the cap")
        if self.length_buckets:
            raise ValueError("data.length_buckets need a prepared corpus; set data.streaming=false or drop them")
        if self.validation_rows is None:
            raise ValueError("a streamed corpus needs a bound on its validation split; set data.validation_rows")


@dataclass(kw_only=True)
class TextDataConfig(PackedDataConfig, CorpusConfig):
    """One corpus."""

    @property
    def parts(self) -> dict[str, tuple[CorpusConfig, float]]:
        return {self.name: (self, 1.0)}


@dataclass(kw_only=True)
class MixtureDataConfig(PackedDataConfig):
    """Several corpora, whose rows are mixed in proportion to their weights."""

    corpora: dict[Line, MixedCorpusConfig]  # by name

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("data.corpora is empty; name at least one corpus")
        super().__post_init__()

    @property
    def parts(self) -> dict[str, tuple[CorpusConfig, float]]:
        return {name: (corpus, corpus.weight) for name, corpus in self.corpora.items()}


@dataclass(kw_only=True)
class MQARDataConfig(DataConfig):
    """Multi-query associative recall (Zoology, arXiv 2312.04927), generated on the fly; see data/mqar.py."""

    # Key-value pairs of a sample, uniform between the two at seq_len; in proportion at the curriculum's lengths.
    pairs_min: PositiveInt
    pairs_max: PositiveInt  # most pairs of a sample
    # Of the pairs in the first half: spread | clustered (contiguous at the beginning).
    placement: Annotated[str, OneOf(PLACEMENTS)] = "spread"

    num_fillers: PositiveInt = 16  # tokens that mean nothing
    num_keys: PositiveInt = 64  # different keys
    num_values: PositiveInt = 64  # different values

    query_density: PositiveShare = 1.0  # share of the second half's two-token slots that hold a query
    # The answer follows its query in the input, as in language. False puts filler there: then a key that is
    # asked for twice can be answered only from its pair, never from the earlier answer near by.
    show_answers: bool = True

    # Micro-batches spent at each shorter length before seq_len, e.g. lengths [64, 128, 256], batches [200, 200, 200].
    curriculum_lengths: list[PositiveInt] = field(default_factory=list)
    curriculum_batches: list[PositiveInt] = field(default_factory=list)  # at each of curriculum_lengths

    validation_rows: PositiveInt = 256  # rows of one evaluation
    validation_seed: Seed = 0  # validation samples depend on this, not on the run's seed: all seeds share them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs_max < self.pairs_min:
            raise ValueError(f"data.pairs_max={self.pairs_max} is below data.pairs_min={self.pairs_min}")
        if self.pairs_max > self.num_keys:
            raise ValueError(
                f"data.pairs_max={self.pairs_max} needs as many different keys; raise data.num_keys={self.num_keys}"
            )
        if self.seq_len % 4:
            raise ValueError(f"data.seq_len={self.seq_len} must be a multiple of 4: two halves of two-token slots")
        if self.pairs_max > self.seq_len // 4:
            raise ValueError(
                f"data.pairs_max={self.pairs_max} does not fit into the first half of a row; "
                f"at data.seq_len={self.seq_len} give at most {self.seq_len // 4}"
            )
        self._check_curriculum()

    def at_length(self, length: int, **changes) -> "MQARDataConfig":
        return super().at_length(length, curriculum_lengths=[], curriculum_batches=[], **changes)

    def _check_curriculum(self) -> None:
        if len(self.curriculum_lengths) != len(self.curriculum_batches):
            raise ValueError(
                "data.curriculum_batches needs one number for each of data.curriculum_lengths="
                f"{list(self.curriculum_lengths)}, got {list(self.curriculum_batches)}"
            )
        lengths = [*self.curriculum_lengths, self.seq_len]
        if any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(f"data.curriculum_lengths must increase and stay below data.seq_len, got {lengths}")
        for length in lengths:
            if length % 4 or self.seq_len % length:
                raise ValueError(
                    f"data.curriculum_lengths has {length}, which must be a multiple of 4 that divides "
                    f"data.seq_len={self.seq_len}, so that the tokens per batch stay constant"
                )
