"""What an evaluation can be told, and the tasks it names."""

from dataclasses import dataclass, field
from typing import Annotated

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dashattn.backends import AttentionConfig
from dashattn.fields import (
    Checked,
    Line,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveInt,
    Seed,
    Sparsity,
    Threads,
    UserPath,
    user_path,
)
from dashattn.stats import SPARSITY_COUNTS
from data import DataConfig, MQARDataConfig
from data.prompts import OWN_TEMPLATE, TEMPLATES
from data.task_sets import SUITES, TEXT_TASKS
from experiments.config import Device, TrainConfig, register_configs
from experiments.evaluation.tasks.decoding import DECODE
from experiments.evaluation.tasks.streams import STREAM_TASKS, MQARForm
from experiments.help import did_you_mean

ROUTING = "routing"
PREFIX = "lm_eval/"  # of names of lm-evaluation-harness


@dataclass
class EvaluateConfig(Checked):
    """One evaluation."""

    run: UserPath = MISSING  # run directory (its latest checkpoint), one of its checkpoints, or a Hugging Face folder
    output: UserPath | None = None  # directory of the rows; null = the run's, of a folder outputs/FOLDER-ATTENTION
    # Of a folder, which is scored as it is, without any training:
    attention: AttentionConfig | None = None  # null = what it was trained with, dense if it says nothing
    any_attention: bool = False  # even where it was trained with another sparse one
    any_tokenizer: bool = False  # even text with another tokenizer than the weights', whose tokens mean something else
    # The text it is scored on, with its tokenizer unless data.tokenizer names one; not needed for generated tasks and
    # those of lm_eval. Of a run, whose text is known by its content: where the files of that lie now, if they were
    # moved; nothing else of data is heeded then.
    data: DataConfig | None = None
    # Of the data that it is scored on, as of train.py; also for a run that another user wrote, while a run of one's own
    # has its own.
    cache_dir: UserPath = "~/.cache/dashattn"
    any_data: bool = False  # read what a run that another user wrote names as its text: files, a data set on the hub
    # On the run's validation split: loss | position | recall | sparsity. Generated: ruler (its 13) | niah_single_1 ...
    # qa_2 | niah (heat map) | niah_values (1 to 16 values of a key) | json_kv. Of the router: routing. Time of a token:
    # decode. Of lm-evaluation-harness: lm_eval/NAME. And those of installed packages.
    tasks: list[Line] = field(default_factory=lambda: ["loss"])
    # Tokens of a row, or of prompt and answer; null = the run's data.seq_len, of a folder without data the model's
    # longest.
    lengths: list[PositiveInt] | None = None
    knobs: list[NonNegativeFloat] | None = None  # values of the sparsity knob; null = the one trained with
    # In place of knobs: sparsities in [0, 1), averaged over the layers, for each of which the knob is found on training
    # rows of each length; counted causal | paper.
    sparsities: list[Sparsity] | None = None
    sparsity_count: Annotated[str, OneOf(SPARSITY_COUNTS)] = "causal"  # how these count keys: causal | paper
    # Rows of the validation split, or samples of each other task; null = as many as the run validates on, 100 of
    # generated tasks, 32 for routing, all of lm_eval's.
    rows: PositiveInt | None = None
    # Rows that go through the model at once, and four times as many prompts of generated tasks; halved where memory is
    # short.
    rows_per_batch: PositiveInt = 8
    # Line in tables and figures; null = the backend's, of a folder "BACKEND, FOLDER" if its weights were trained with
    # it, else "BACKEND, untrained".
    label: Line | None = None
    device: Device = "auto"  # auto: a GPU if there is one
    threads: Threads | None = None  # of PyTorch on the CPU; null = PyTorch's choice

    mqar: MQARForm = field(default_factory=MQARForm)  # MQAR in another form than trained on
    # How a generated task is put to the model; tokenizer = by its tokenizer's own chat template, those of lm_eval, too.
    template: Annotated[str, OneOf((*TEMPLATES, OWN_TEMPLATE))] = "base"
    samples_seed: Seed = 0  # of generated tasks; with another than 0 they are a panel of their own in figures
    haystack: UserPath | None = None  # text file, or RULER's PaulGrahamEssays.json; null = the run's held-out text
    squad: UserPath | None = None  # SQuAD's dev-v2.0.json, for qa_1
    hotpotqa: UserPath | None = None  # hotpot_dev_distractor_v1.json, for qa_2
    harness_path: UserPath | None = None  # directory with task definitions for lm_eval beside its own
    harness_fewshot: NonNegativeInt | None = None  # solved examples before each question; null = as the task says
    # What routing looks at in a run trained on text; a run trained on MQAR is probed on MQAR.
    probes: list[Line] = field(default_factory=lambda: ["niah_single_2", "niah_multikey_2", "niah_values"])

    @property
    def task_folder(self) -> str | None:
        """``harness_path``, as lm_eval takes it."""
        return None if self.harness_path is None else str(user_path(self.harness_path))


def register_evaluate_config() -> None:
    register_configs()  # a folder's attention and data are choices as of a training run
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def expand(names: list[str]) -> list[str]:
    """Suites as their members, each name once."""
    return list(dict.fromkeys(member for name in names for member in SUITES.get(name, [name])))


def check_tasks(config: EvaluateConfig, train: TrainConfig) -> None:
    """Refuses what this run cannot be asked.

    Raises:
        ValueError: with the mend.
    """
    harness = [name for name in config.tasks if name.startswith(PREFIX)]
    ours = (*STREAM_TASKS, ROUTING, DECODE, *SUITES)
    unknown = sorted(name for name in set(config.tasks) - {*ours, *harness} if name not in TEXT_TASKS)
    if unknown or not config.tasks:
        known = [*ours, *TEXT_TASKS]
        meant = did_you_mean(unknown[0], known) if unknown else ""
        choose = f"choose from {', '.join(known)}, {PREFIX}NAME"
        raise ValueError(f"tasks={list(config.tasks)}{f'{meant} Or' if meant else ':'} {choose}")
    if config.lengths is not None and not config.lengths:
        raise ValueError(f"lengths={list(config.lengths)}: give at least one, in tokens, or null")
    is_mqar = isinstance(train.data, MQARDataConfig)
    if harness and config.template not in ("base", OWN_TEMPLATE):
        raise ValueError(
            f"template={config.template} is not for {harness[0]}: template={OWN_TEMPLATE} puts it by the tokenizer's "
            "chat template, template=base as it is"
        )
    generated = [name for name in config.tasks if name in TEXT_TASKS or name in SUITES] + harness
    if generated and is_mqar:
        raise ValueError(
            f"tasks {', '.join(generated)} are in text and need a run trained on text; this one was trained on "
            f"{train.data.name}: use recall, or routing"
        )
    if not is_mqar and "recall" in config.tasks:
        raise ValueError(f"task recall needs a run trained on MQAR, not {train.data.name}: leave it out, or use loss")
    if not is_mqar and config.mqar.given():
        raise ValueError(f"mqar.* needs a run trained on MQAR, not {train.data.name}: leave it out")
    if ROUTING in config.tasks and not is_mqar:
        wrong = [name for name in expand(config.probes) if name not in TEXT_TASKS or name in ("cwe", "fwe")]
        if wrong or not config.probes:
            raise ValueError(
                f"probes={list(config.probes)}: choose generated tasks whose answer stands in one place, such as "
                "niah_single_2, niah_values or vt"
            )
