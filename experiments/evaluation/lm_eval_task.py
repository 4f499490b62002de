"""Tasks of lm-evaluation-harness, as rows like those of any other task: ``tasks=[lm_eval/hellaswag]``."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence

from data import TextTokenizer
from data.prompts import OWN_TEMPLATE, chat_tokenizer
from experiments.evaluation.config import PREFIX
from experiments.evaluation.tasks.base import Setting, Task, row

_BOOTSTRAP = 1000  # resamplings, for the standard error of what is no mean


@functools.cache
def task_manager(include_path: str | None):
    """lm_eval's index of tasks; reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def manager_that_knows(name: str, include_path: str | None):
    """``task_manager``, which has the task that is called ``lm_eval/NAME`` here. Raises ValueError if it has not."""
    manager, task = task_manager(include_path), name.removeprefix(PREFIX)
    if task not in manager.all_tasks:
        raise ValueError(f"lm_eval has no task {task}: `lm_eval ls tasks` lists them; harness_path adds yours")
    return manager


class HarnessTask(Task):
    """One of lm_eval's tasks; a row for each of its metrics."""

    def __init__(
        self,
        name: str,
        tokenizer: TextTokenizer,
        *,
        length: int,
        rows: int | None,
        rows_per_batch: int,
        fewshot: int | None,
        include_path: str | None,
        chat: bool = False,
    ) -> None:
        """``chat``: as the user's turn, by the tokenizer's template. Raises ValueError if lm_eval knows no such task,
        or there is no template."""
        if chat:
            chat_tokenizer(tokenizer)
        self.chat = chat
        self.tokenizer, self.rows_per_batch, self.fewshot = tokenizer, rows_per_batch, fewshot
        self.manager, self.task = manager_that_knows(name, include_path), name.removeprefix(PREFIX)
        self.names = (name,)
        said = [None if fewshot is None else f"{fewshot}-shot", f"template={OWN_TEMPLATE}" if chat else None]
        self.columns = {"length": length, "rows": rows, "variant": ", ".join(filter(None, said)) or None}

    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        import lm_eval

        from experiments.evaluation.harness import HarnessModel

        model = HarnessModel.of(setting.model, self.tokenizer, self.rows_per_batch, self.columns["length"])
        with contextlib.redirect_stdout(sys.stderr), _in_this_process():  # stdout is for rows
            results = lm_eval.simple_evaluate(
                model,
                tasks=[self.task],
                num_fewshot=self.fewshot,
                limit=self.columns["rows"],
                task_manager=self.manager,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
                apply_chat_template=self.chat,
            )["results"]
        sparsity = model.sparsity.columns()
        for task, scores in results.items():
            for name, score in scores.items():
                metric, _, filtered = name.partition(",")
                if isinstance(score, float) and not metric.endswith("_stderr"):
                    stderr = scores.get(f"{metric}_stderr,{filtered}")  # "N/A" of what lm_eval knows none for
                    known = {"stderr": stderr if isinstance(stderr, float) else None, "samples": scores["sample_len"]}
                    metric = metric if filtered in ("", "none") else f"{metric} ({filtered})"
                    part = task if task != self.task else None
                    yield sparsity | row(self.names[0], metric, score, part=part, **known)


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """lm_eval resamples here, and not by a process for each core, which takes longer to start."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
