"""One HTML file that holds all figures and tables, pictures included: it needs nothing beside it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from experiments.figures.rows import Drawn, Figure

ROWS_SHOWN = 25  # of a figure's table; its CSV has all
_SHADES = 12  # steps of red, of green and of blue: what is grey stays so
WIDEST = 1190  # pixels of a picture, as wide as a page on a laptop shows it

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
h3 { font-size: 1rem; } img { max-width: 100%; height: auto; background: white; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.missing { color: light-dark(#a33, #f88); } .note { color: light-dark(#555, #bbb); margin: .2rem 0; }
nav a { margin-right: .8rem; }
"""


@dataclass(frozen=True)
class Section:
    """A figure of one study, as it was written."""

    study: str
    drawn: Drawn
    picture: Path | None


def to_html(figures: Sequence[Figure], sections: dict[int, list[Section]]) -> str:
    """The page; ``sections`` by the figure's number."""
    links = " ".join(
        f'<a href="#f{f.number}"{"" if sections.get(f.number) else " class=missing"}>{f.number}</a>' for f in figures
    )
    body = [f"<h1>Figures and tables</h1><nav>{links}</nav>"]
    for figure in figures:
        body.append(f'<h2 id="f{figure.number}">{figure.number}. {escape(figure.title)}</h2>')
        if not sections.get(figure.number):
            body.append(f'<p class="missing">Missing: no rows. They come from {escape(figure.needs)}.</p>')
        for section in sections.get(figure.number, ()):
            body.append(f"<h3>{escape(section.study)}</h3>")
            notes = [*section.drawn.notes, *([f"Rows: {section.drawn.origin}."] if section.drawn.origin else [])]
            body += [f'<p class="note">{escape(note)}</p>' for note in notes]
            if section.picture is not None:
                body.append(_picture(section.picture, figure))
            body.append(_table(section.drawn.table, is_open=section.picture is None))
    head = f"<meta charset=utf-8><title>Figures and tables</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _picture(path: Path, figure: Figure) -> str:
    data, (width, height) = _small(path)
    size = f'width="{width}" height="{height}" loading="lazy"'
    return f'<img alt="{escape(figure.title)}" {size} src="data:image/webp;base64,{base64.b64encode(data).decode()}">'


def _small(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A picture as wide as the page shows it, in few colours: none is off by more than 11 of 255."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as whole:
        picture = whole.convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    few = np.rint(np.rint(np.asarray(picture) / 255 * _SHADES) * (255 / _SHADES)).astype(np.uint8)
    Image.fromarray(few).save(encoded, "WEBP", lossless=True, quality=100)
    return encoded.getvalue(), picture.size


def _table(rows: list[dict], is_open: bool) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    bounds = {f"{column} {bound}" for column in columns for bound in ("low", "high")}
    columns = [column for column in columns if column not in bounds]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join("<tr>" + "".join(_cell(row, column) for column in columns) + "</tr>" for row in rows[:ROWS_SHOWN])
    more = f" (the first {ROWS_SHOWN}; the CSV has all)" if len(rows) > ROWS_SHOWN else ""
    return (
        f"<details{' open' if is_open else ''}><summary>{len(rows)} rows{more}</summary>"
        f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div></details>'
    )


def _cell(row: dict, column: str) -> str:
    """A value, with its bounds where the row has a lower and an upper one for it."""
    value, low, high = row.get(column, ""), row.get(f"{column} low"), row.get(f"{column} high")
    if value == "missing":
        return '<td class="missing">missing</td>'
    if isinstance(value, float):
        around = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
        return f"<td>{value:.4g}{around}</td>"
    return f"<td>{'' if value is None else escape(str(value))}</td>"
