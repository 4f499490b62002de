"""What figures show, as text: tests compare it with files under ``expected``, whole, so that no number, name or style
of a page changes unseen.

Values have four digits, positions are of panels in their grid; what a renderer may do otherwise (pixels, fonts) is left
out.
"""

from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex


def assert_as_expected(text: str, expected: Path, tmp_path: Path) -> None:
    """``text`` is the file's; a failure says how to renew it."""
    found, text = tmp_path / expected.name, text.rstrip("\n") + "\n"
    found.write_text(text)
    wanted = expected.read_text() if expected.exists() else ""
    assert text.splitlines() == wanted.splitlines(), f"if the change is meant, and right: cp {found} {expected}"


def shown(figure) -> list[str]:
    """Lines of a figure that was drawn."""
    width, height = figure.get_size_inches()
    lines = [f"figure of {width:.4g} x {height:.4g} inches"]
    lines += [f"title {figure.get_suptitle()!r}"] if figure.get_suptitle() else []
    for ax in figure.axes:
        lines += _panel(ax)
    for legend in figure.legends:
        lines += _legend(legend)
    return lines


def _panel(ax) -> list[str]:
    spec = ax.get_subplotspec()
    place = "" if spec is None else f" {spec.num1 + 1} of {spec.get_gridspec().nrows} x {spec.get_gridspec().ncols}"
    if ax.get_label() == "<colorbar>":
        shades = [tick.label1.get_text() for tick in ax.yaxis.get_major_ticks()]
        return [f"colorbar {ax.get_ylabel()!r} {' '.join(shades)}"]
    title = ax.title if ax.get_title() else ax._left_title
    out = [f"panel{place} {title.get_text()!r} of size {title.get_fontsize():g}"]
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        inside = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        minor = "".join(t.get_text() for t in axis.get_ticklabels(minor=True))
        grid = [line.get_alpha() for line in axis.get_gridlines()[:1] if line.get_visible()]
        ends = " to ".join(f"{end:.4g}" for end in axis.get_view_interval())
        label = axis.get_label()
        said = f"  {name} {label.get_text()!r} of {label.get_fontsize():g} {axis.get_scale()} {ends}: "
        said += " ".join(" ".join(text.get_text().split()) for text in inside if text.get_visible())
        out.append(said + (f" minor {minor}" if minor else "") + (f", grid {grid[0]}" if grid else ""))
    for line in ax.lines:
        every = line.get_markevery()
        points = " ".join(f"({x:.4g}, {y:.4g})" for x, y in line.get_xydata())
        named = "" if line.get_label().startswith("_") else f" {line.get_label()!r}"
        out.append(f"  line{named} {_look(line)}{'' if every is None else f' every {every}'}: {points}")
    for collection in ax.collections:
        colours = "".join(dict.fromkeys(map(to_hex, [*collection.get_edgecolor(), *collection.get_facecolor()])))
        alpha = "" if collection.get_alpha() is None else f" alpha {collection.get_alpha():g}"
        if isinstance(collection, QuadMesh):
            corners = collection.get_coordinates()
            xs, ys = corners[0, :, 0], corners[:, 0, 1]
            out.append(f"  cells {_colours(collection)} x {_numbers(xs)} y {_numbers(ys)}: ")
            out[-1] += _numbers(collection.get_array())
        else:
            kind = "bars" if isinstance(collection, LineCollection) else "area"
            paths = [path.vertices for path in collection.get_paths()]
            wide = _numbers(collection.get_linewidth())
            out.append(f"  {kind} {colours}{alpha} w{wide}: {' | '.join(_numbers(path) for path in paths)}")
    for image in ax.images:
        extent = _numbers(image.get_extent())
        out.append(f"  image {_colours(image)} {image.origin} {extent}: {_numbers(image.get_array())}")
    for patch in ax.patches:
        box = patch.get_extents().transformed(ax.transData.inverted())
        alpha = patch.get_alpha()
        out.append(f"  patch {to_hex(patch.get_facecolor())} {alpha} {box.y0:.4g} to {box.y1:.4g}")
    out += [f"  text {text.get_text()!r}" for text in ax.texts]
    return out + (_legend(ax.get_legend()) if ax.get_legend() else [])


def _look(line) -> str:
    colour, face = to_hex(line.get_color()), line.get_markerfacecolor()
    marked = line.get_marker() not in ("None", "", None)
    mark = f" {line.get_marker()}{line.get_markersize():g}" if marked else ""
    mark += f" of {to_hex(face)}" if marked and to_hex(face) != colour else ""
    style = line.get_linestyle()
    return f"{colour}{'' if style == 'None' else f' {style}{line.get_linewidth():g}'}{mark}"


def _colours(mappable) -> str:
    low, high = mappable.get_clim()
    return f"{mappable.get_cmap().name} {low:g} to {high:g}"


def _numbers(values) -> str:
    return "[" + " ".join(f"{value:.4g}" for value in np.ma.filled(values, np.nan).ravel()) + "]"


def _legend(legend) -> list[str]:
    out = [f"legend {legend._outside_loc or ''} in {legend._ncols}"]
    for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
        look = _look(handle) if hasattr(handle, "get_marker") else to_hex(handle.get_color()[0])
        out.append(f"  {text.get_text()!r} {look} of size {text.get_fontsize():g}")
    return out
