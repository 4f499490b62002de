"""Tasks whose answers are generated: RULER, the needle heat map, recall from JSON (``data/tasks``).

Answers are greedy. Every one is on disk as soon as its batch is done, in predictions/ of the run directory, with its
score and the sparsity of its prompt; an evaluation that was interrupted goes on from there.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import mean

from data.cache import fingerprint
from data.prompts import PromptEncoder
from data.task_sets import TaskSet
from experiments.evaluation.tasks.base import (
    Setting,
    SparsityTally,
    Task,
    generate_measured,
    in_parts,
    row,
    scatter,
)
from experiments.files import append_rows, read_rows

PREDICTIONS = "predictions"


class GeneratedTask(Task):
    """One task set at one length. Rows of the heat map have a ``depth``, 0 to 1."""

    def __init__(self, task_set: TaskSet, encoder: PromptEncoder, prompts_per_batch: int) -> None:
        self.set, self.encoder, self.prompts_per_batch = task_set, encoder, prompts_per_batch
        self.names = (task_set.task.name,)
        said = [f"template={encoder.name}"] if encoder.name != "base" else []
        said += [f"samples_seed={task_set.seed}"] if task_set.seed != 0 else []
        self.columns = {
            "length": task_set.length,
            "rows": len(task_set.samples),
            "variant": ", ".join(said) or None,
            "set": task_set.key,
            "differs": task_set.differs,
        }

    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        answers = self.answer(setting)
        columns = SparsityTally.of(answer["sparsity"] for answer in answers).columns()
        columns["seconds"] = sum(answer["seconds"] for answer in answers)
        (name,) = self.names
        if name != "niah":
            scores = [answer["score"] for answer in answers]
            yield columns | row(name, "match", mean(scores), by_sample=scores, **scatter(scores, [1] * len(scores)))
            return
        by_depth = defaultdict(list)
        for sample, answer in zip(self.set.samples, answers, strict=True):
            by_depth[sample.depth].append(answer["score"])
        for depth, scores in sorted(by_depth.items()):
            yield columns | row(name, "match", mean(scores), depth=depth, **scatter(scores, [1] * len(scores)))

    def answer(self, setting: Setting) -> list[dict]:
        """Every sample's prediction, score, seconds and sparsity, in order; generates those that are missing."""
        path = self.predictions_path(setting)
        path.parent.mkdir(exist_ok=True)
        done = {answer["index"] for answer in read_rows(path)}
        missing = [i for i in range(len(self.set.samples)) if i not in done]
        for indices, answers in in_parts(missing, self.prompts_per_batch, partial(self._answer_batch, setting)):
            append_rows(path, answers, itemgetter("index"))
            setting.advance((indices[-1] + 1) / len(self.set.samples))
        kept = {answer["index"]: answer for answer in read_rows(path)}
        return [kept[i] for i in range(len(self.set.samples))]

    def predictions_path(self, setting: Setting) -> Path:
        key = fingerprint(setting.checkpoint, setting.knob, self.set.key)
        return setting.run_dir / PREDICTIONS / f"{self.set.task.name}-{self.set.length}-{key}.jsonl"

    def _answer_batch(self, setting: Setting, indices: Sequence[int]) -> list[dict]:
        begin = time.perf_counter()
        prompts = [self.encoder.encode(self.set.samples[i]) for i in indices]
        continuations, sparsity = generate_measured(
            setting.model,
            prompts,
            max_new_tokens=self.set.task.max_new_tokens,
            stop_tokens=self.encoder.stop_tokens,
        )
        seconds = (time.perf_counter() - begin) / len(indices)
        answers = []
        for i, tokens, tally in zip(indices, continuations, sparsity, strict=True):
            sample = self.set.samples[i]
            prediction = self.encoder.tokenizer.decode(tokens)
            answers.append(
                {
                    "index": i,
                    "prediction": prediction,
                    "references": sample.references,
                    "score": sample.score(prediction, self.set.task.match),
                    "seconds": seconds,
                    "sparsity": tally.record(),
                }
            )
        return answers
