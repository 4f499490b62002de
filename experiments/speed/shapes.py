"""Head shapes of several models beside each other: every whole operation against dense attention of its run."""

from collections.abc import Sequence

from experiments.speed.rows import DENSE, PASSES, WHOLE

# What a speed-up divides: the host's clock around one call, and a replay as a CUDA graph. FlashAttention-3 through JAX
# has neither and stands with what a call costs in a row of them.
CLOCKS = ("call_ms", "graph_ms")


def shapes_table(rows: Sequence[dict]) -> list[str]:
    """Markdown lines, nothing for rows of a single shape. ``rows``: the newest of each kind."""
    measured = [row for row in rows if row["pass"] in PASSES and row["status"] == "ok"]
    out = []
    for device, length, pattern, sparsity in sorted({_case(row) for row in measured if row["stage"] == WHOLE}):
        inside = [row for row in measured if _case(row) == (device, length, pattern, sparsity)]
        methods = sorted({row["method"] for row in inside if row["stage"] == WHOLE})
        shapes = sorted({_shape(row) for row in inside if row["stage"] == WHOLE}, reverse=True)
        if len(shapes) < 2:
            continue
        dense = [row for row in measured if row["stage"] == DENSE and _case(row)[:2] == (device, length)]
        names = sorted({row["method"] for row in dense})
        out += [
            f"## {device}: heads of several models, {length} tokens, {pattern} {sparsity:.0%}\n",
            "Forward / forward + backward. Dense attention in milliseconds by the host's clock around one call; "
            "speed-ups over the fastest of them by that clock, and after the semicolon by replays as CUDA graphs.\n",
            f"| heads / KV heads of size | {' | '.join([*names, *methods])} |",
            "|---" * (1 + len(names) + len(methods)) + "|",
        ]
        for shape in shapes:
            of_shape = [row for row in inside if _shape(row) == shape and row["stage"] == WHOLE]
            runs = {row["run"] for row in of_shape}
            beside = [row for row in dense if _shape(row) == shape and row["run"] in runs]
            cells = [" / ".join(_milliseconds(beside, name, pass_) for pass_ in PASSES) for name in names]
            for method in methods:
                ours = [row for row in of_shape if row["method"] == method]
                by_clock = (" / ".join(_ratio(beside, ours, pass_, clock) for pass_ in PASSES) for clock in CLOCKS)
                cells.append("; ".join(by_clock))
            out.append(f"| {shape[0]} / {shape[1]} of {shape[2]} | {' | '.join(cells)} |")
        out.append("")
    return out


def _case(row: dict) -> tuple:
    return row["device"], row["length"], row["pattern"], row["sparsity"]


def _shape(row: dict) -> tuple[int, int, int]:
    return row["heads"], row["kv_heads"], row["head_dim"]


def _time(row: dict, clock: str) -> float:
    return row.get(clock) or row["ms"]


def _milliseconds(rows: Sequence[dict], method: str, pass_: str) -> str:
    return next((f"{_time(r, 'call_ms'):.3g}" for r in rows if (r["method"], r["pass"]) == (method, pass_)), "")


def _ratio(dense: Sequence[dict], ours: Sequence[dict], pass_: str, clock: str) -> str:
    """The fastest dense attention's time over a method's; empty where one of them was not measured."""
    row = next((row for row in ours if row["pass"] == pass_ and row.get(clock)), None)
    beside = [_time(other, clock) for other in dense if row and other["run"] == row["run"] and other["pass"] == pass_]
    return f"{min(beside) / row[clock]:.2f}x" if beside else ""
