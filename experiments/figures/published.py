"""Table 14: what DashAttention's authors report (arXiv 2605.18753), taken from secondary sources, beside ours."""

from experiments.figures.rows import Drawn, Study
from experiments.figures.scores import MISSING, RULER_MEANS, make_ruler
from experiments.speed.report import title
from experiments.speed.rows import DECODE, FLASH_3, SETUP, batch, with_ratios

# RULER at 16k tokens, 8B models, 75 % sparse as the authors count it; the averages cannot be rebuilt from the groups.
RULER_16K = {
    "full": (99.3, 98.0, 99.8, 54.6, 65.0, 85.3),
    "nsa": (83.3, 20.7, 74.0, 36.4, 35.0, 55.0),
    "infllmv2": (100.0, 78.0, 97.0, 49.0, 62.0, 78.9),
    "dash": (100.0, 94.0, 99.5, 54.8, 63.0, 83.6),
}
# Speed-up of decoding over FlashAttention-3 at 96k tokens on an H100, by sparsity as the authors count it.
DECODE_96K = {
    "nsa": {0.75: 0.80, 0.875: 1.04, 0.9375: 1.34},
    "infllmv2": {0.75: 1.73, 0.875: 2.38, 0.9375: 3.10},
    "dash": {0.75: 1.96, 0.875: 2.72, 0.9375: 3.36},
}
COLUMNS = tuple(RULER_MEANS)


def make_published(study: Study) -> Drawn | None:
    """RULER where the study has any; speed-ups of decoding where it has measured speed."""
    ruler = make_ruler(study)
    if ruler is None and not study.speed:
        return None
    table = []
    notes = ["The paper's numbers stem from secondary sources; its PDF was not at hand."]
    if ruler is not None:
        table += [
            {"what": "RULER, %", "source": "paper, 8B, 16k tokens, 75 % sparse by its count", "model": model}
            | dict(zip(COLUMNS, scores, strict=True))
            for model, scores in RULER_16K.items()
        ]
        ours = [_our_ruler(row) for row in ruler.table if any(row[name] != MISSING for name in COLUMNS)]
        table += ours
        if left_out := len(ruler.table) - len(ours):
            notes.append(f"Left out: {left_out} of our settings, which have not all tasks of any group (figure 11).")
        sizes = sorted({row["parameters"] for row in ruler.rows if row.get("parameters")})
        tokens = sorted({row["tokens"] for row in ruler.rows if row["tokens"]})  # 0: trained elsewhere
        millions = ", ".join(f"{n / 1e6:.1f}M" for n in sizes) or "an unknown number of"
        notes.append(
            f"Scale: ours have {millions} parameters and {_span(tokens)} training tokens against 8B parameters; "
            "the two say nothing about each other's level, at most about the order of the methods."
        )
    if study.speed:
        table += [
            {"what": "decode speed-up over FlashAttention-3", "source": "paper, H100, 96k tokens", "model": model}
            | {f"{sparsity:.2%} sparse": value for sparsity, value in values.items()}
            for model, values in DECODE_96K.items()
        ]
        table += _our_decoding(study.speed)
    return Drawn(table, None, notes)


def _our_ruler(row: dict) -> dict:
    columns = [name for name in row if name.removesuffix(" low").removesuffix(" high") in COLUMNS]
    scores = {name: row[name] if row[name] == MISSING else 100 * row[name] for name in columns}
    form = f", {row['variant']}" if row["variant"] else ""
    source = f"ours, {row['length']} tokens{form}, {row['causal_sparsity']:.0%} causally sparse"
    return {"what": "RULER, %", "source": source, "model": row["model"]} | scores


def _our_decoding(rows: list[dict]) -> list[dict]:
    """A line for each device, shape, length and method, of one sequence."""
    what = "decode speed-up over FlashAttention-3"
    lines: dict[tuple, dict] = {}
    for row in with_ratios(rows):
        if row["pass"] == DECODE and row["against"] == FLASH_3 and row["ratio"] and row["sparsity"] and batch(row) == 1:
            source = f"ours, {title(tuple(row[name] for name in SETUP))}, {row['length']} tokens"
            line = lines.setdefault((source, row["method"]), {"what": what, "source": source, "model": row["method"]})
            line[f"{row['sparsity']:.2%} sparse"] = row["ratio"]
    return list(lines.values()) or [{"what": what, "source": "ours", "model": MISSING}]


def _span(values: list[int]) -> str:
    if not values:
        return "an unknown number of"
    low, high = (f"{value / 1e6:.1f}M" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"
