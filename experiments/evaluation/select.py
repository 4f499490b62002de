"""From names on the command line to tasks that are ready to run."""

import sys

from dashattn.fields import user_path
from data import MQARDataConfig
from data.prompts import OWN_TEMPLATE, PromptEncoder
from data.task_sets import SUITES, TEXT_TASKS, TaskSet, build_set, held_out_text
from data.tasks.material import Material, read_haystack
from experiments.config import TrainConfig
from experiments.evaluation.config import PREFIX, ROUTING, EvaluateConfig, expand
from experiments.evaluation.lm_eval_task import HarnessTask
from experiments.evaluation.target import Target, build_stream, validation_stream
from experiments.evaluation.tasks.base import Task
from experiments.evaluation.tasks.decoding import DECODE, DecodingTask
from experiments.evaluation.tasks.generated import GeneratedTask
from experiments.evaluation.tasks.routing import RoutingTask, mqar_probes, text_probes
from experiments.evaluation.tasks.streams import STREAM_TASKS, StreamTask, data_at
from experiments.provenance import device_name

SAMPLES, PROBES = 100, 32  # where ``rows`` is null
# Of a prompt the last token alone has logits, and a step of decoding takes as long for many prompts as for few.
PROMPTS_PER_ROW = 4


def build_tasks(config: EvaluateConfig, target: Target) -> list[Task]:
    """All passes that the evaluation needs, with their data: what cannot be made fails here, before a model is built.

    A member of a suite that does not fit into a length, or lacks its file, is left out with a line on stderr. The
    training corpus is read for what is measured on it alone.

    Raises:
        ValueError: a task that was asked for by its name cannot be had, or it needs a corpus that has changed.
    """
    train = target.train
    if config.sparsities is not None or {*STREAM_TASKS, DECODE} & set(config.tasks):
        validation_stream(target)
    lengths = list(dict.fromkeys(config.lengths or [train.data.seq_len]))
    if isinstance(train.data, MQARDataConfig):
        return [task for length in lengths for task in _mqar_tasks(config, train, length)]
    tasks: list[Task] = []
    sets = _Sets(config, target)
    for length in lengths:
        tasks += _stream_tasks(config, train, length) + _decoding_tasks(config, train, length)
        for name in expand([name for name in config.tasks if name in TEXT_TASKS or name in SUITES]):
            task_set = sets.build(name, length, config.rows or SAMPLES, is_named=name in config.tasks)
            if task_set is not None:
                tasks.append(GeneratedTask(task_set, sets.encoder, PROMPTS_PER_ROW * config.rows_per_batch))
        for name in [name for name in dict.fromkeys(config.tasks) if name.startswith(PREFIX)]:
            tasks.append(
                HarnessTask(
                    name,
                    target.tokenizer,
                    length=length,
                    rows=config.rows,
                    rows_per_batch=config.rows_per_batch,
                    fewshot=config.harness_fewshot,
                    include_path=config.task_folder,
                    chat=config.template == OWN_TEMPLATE,
                )
            )
        for name in expand(config.probes) if ROUTING in config.tasks else ():
            task_set = sets.build(name, length, config.rows or PROBES, is_named=name in config.probes)
            if task_set is not None:
                probes = list(text_probes(task_set, sets.encoder))
                described = GeneratedTask(task_set, sets.encoder, 1).columns
                tasks.append(RoutingTask(name, probes, described))
    return tasks


def _stream_tasks(config: EvaluateConfig, train: TrainConfig, length: int) -> list[Task]:
    names = [name for name in dict.fromkeys(config.tasks) if name in STREAM_TASKS]
    if not names:
        return []
    rows = config.rows or train.data.validation_rows  # None: the whole split
    data = data_at(train.data, length, rows, config.mqar)
    cache_dir = user_path(train.cache_dir)
    return [StreamTask(names, data, build_stream(data, train.seed, config.rows_per_batch, cache_dir), config.mqar)]


def _decoding_tasks(config: EvaluateConfig, train: TrainConfig, length: int) -> list[Task]:
    if DECODE not in config.tasks:
        return []
    data = data_at(train.data, length, 1, config.mqar)
    stream = build_stream(data, train.seed, 1, user_path(train.cache_dir))
    return [DecodingTask(next(iter(stream)).input_ids.flatten().tolist(), device_name(train.device))]


def _mqar_tasks(config: EvaluateConfig, train: TrainConfig, length: int) -> list[Task]:
    tasks = _stream_tasks(config, train, length) + _decoding_tasks(config, train, length)
    if ROUTING in config.tasks:
        data = data_at(train.data, length, config.rows or PROBES, config.mqar)
        stream = build_stream(data, train.seed, config.rows_per_batch, user_path(train.cache_dir))
        columns = StreamTask(("recall",), data, stream, config.mqar).columns
        tasks.append(RoutingTask("mqar", list(mqar_probes(stream, data)), columns))
    return tasks


class _Sets:
    """Task sets for one run's tokenizer; the material is read when the first set needs it."""

    def __init__(self, config: EvaluateConfig, target: Target) -> None:
        self.config, self.target, self.train = config, target, target.train
        self.encoder = PromptEncoder(target.tokenizer, config.template)
        self.haystack: Material | None = None

    def material(self, needs: str | None) -> Material:
        if needs in ("squad", "hotpotqa"):
            path = getattr(self.config, needs)
            return Material(**{needs: user_path(path)}) if path else Material()
        if needs is None:
            return Material()
        if self.haystack is None:
            if self.config.haystack is not None:
                self.haystack = read_haystack(user_path(self.config.haystack))
            else:
                self.target.check_reads()
                # Enough for samples of the longest length to begin at different places.
                words = 4 * max(self.config.lengths or [self.train.data.seq_len])
                self.haystack = held_out_text(self.train.data, words)
        return self.haystack

    def build(self, name: str, length: int, count: int, *, is_named: bool) -> TaskSet | None:
        try:
            return build_set(
                name,
                self.encoder,
                length=length,
                count=count,
                seed=self.config.samples_seed,
                material=self.material(TEXT_TASKS[name].needs),
                cache_dir=user_path(self.train.cache_dir),
            )
        except ValueError as error:
            if is_named:
                raise
            print(f"left out: {error}", file=sys.stderr)
            return None
