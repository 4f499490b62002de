"""What an evaluation says: a line a row as it comes, and at the end all rows that were asked for in one table."""

import sys
from collections.abc import Iterable, Mapping, Sequence

from experiments.intervals import LEVEL, interval

_SINGLE = ("loss", "position", "recall")  # tasks with one metric, which their names say
_DETAILS = ("probe", "relevant", "depth", "part", "variant")


def describe(row: Mapping) -> str:
    """What a row is a score of."""
    words = [row["task"]] if row["task"] in _SINGLE else [row["task"], row["metric"]]
    if row["position"] is not None:
        words.append("-".join(map(str, dict.fromkeys(row["position"]))))
    return " ".join(words + [f"{key} {row[key]}" for key in _DETAILS if row.get(key) is not None])


def line(row: Mapping) -> str:
    """A result for the reader of the terminal."""
    parts = [f"{describe(row)} {with_interval(row)}", f"{row['length']} tokens"]
    if row["knob"] is not None:
        parts.append(f"{row['knob_name']} {row['knob']:.4g}")
    if row.get("target_sparsity") is not None:
        parts.append(f"for {row['target_sparsity']:.1%} ({row['sparsity_count']})")
    return "  ".join([*parts, f"causal sparsity {row['causal_sparsity']:.1%}"])


def with_interval(row: Mapping) -> str:
    """Its score, and where it is known the confidence interval."""
    digits = 4 if row["metric"] == "nats" else 3
    bounds = interval(row)
    known = "" if bounds is None else f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
    return f"{row['score']:.{digits}f}{known}"


def place_of(row: Mapping) -> str:
    """Where its knob stood."""
    if row.get("target_sparsity") is not None:
        return f"for {row['target_sparsity']:.4g} ({row['sparsity_count']})"
    return "no knob" if row["knob"] is None else f"{row['knob_name']} {row['knob']:.4g}"


def notes(rows: Sequence[Mapping]) -> list[str]:
    """What a reader of the table must know."""
    bounds = [interval(row) for row in rows]
    said = []
    if any(bounds):
        named = [describe(row).split(" ") for row in rows]
        known = {words[0] for words, found in zip(named, bounds, strict=True) if found}
        # Of a task with several scores, some of which have an interval, those that have none.
        without = {
            " ".join(words[: 1 + (words[0] in known)]) for words, found in zip(named, bounds, strict=True) if not found
        }
        told = f"; of {', '.join(sorted(without))} it is not known how samples scatter" if without else ""
        said.append(f"[low, high]: {LEVEL:.0%} confidence interval over rows, prompts or questions{told}")
    differs = {(row["task"], row["differs"]) for row in rows if row.get("differs")}
    said += [f"{task} differs from the original task: {how}" for task, how in sorted(differs)]
    said += sorted(
        {f"nothing was trained: the weights are those of {row['untrained']}" for row in rows if row.get("untrained")}
    )
    return said


class Display:
    """Lines and, where the output is a terminal, a bar with the time left; a context."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

        # FORCE_COLOR, which Jupyter sets for what it starts, makes no terminal of a pipe.
        self._console = Console(highlight=False, force_terminal=sys.stdout.isatty())
        if not self._console.is_terminal:
            self._console = Console(force_terminal=False, width=1000)  # nobody's window to fit into
        columns = ("evaluating", BarColumn(), TaskProgressColumn(), "ETA", TimeRemainingColumn())
        self._progress = Progress(
            *columns, console=self._console, transient=True, refresh_per_second=4, speed_estimate_period=1e5
        )
        self._task = self._progress.add_task("evaluating", total=1.0)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def advance(self, share: float) -> None:
        """``share`` of the work is done, 0 to 1."""
        self._progress.update(self._task, completed=share)

    def show(self, row: Mapping) -> None:
        """A new row."""
        from rich.progress import TimeRemainingColumn

        (task,) = self._progress.tasks
        left = "" if task.finished else f", ETA {TimeRemainingColumn().render(task)}"
        self._print(f"{line(row)}  ({task.completed:.0%} done{left})")

    def show_table(self, rows: Iterable[Mapping]) -> None:
        """All rows: what was scored, by where the knob stood; and what is to be known about it."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        rows = list(rows)
        cells = {(describe(row), row["length"], place_of(row)): row for row in rows}
        setpoints = list(dict.fromkeys(setpoint for _, _, setpoint in cells))
        table = Table("task", "length", box=SIMPLE_HEAD)
        for setpoint in setpoints:
            sparsities = [row["causal_sparsity"] for (_, _, own), row in cells.items() if own == setpoint]
            low, high = (f"{value:.1%}" for value in (min(sparsities), max(sparsities)))
            table.add_column(f"{setpoint}\n{low if low == high else f'{low} to {high}'} left out")
        for what, length in dict.fromkeys((what, length) for what, length, _ in cells):
            found = (cells.get((what, length, setpoint)) for setpoint in setpoints)
            texts = [what, str(length), *("-" if row is None else with_interval(row) for row in found)]
            table.add_row(*map(Text, texts))
        self._console.print(table)
        for note in notes(rows):
            self._print(note)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
