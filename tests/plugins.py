"""Packages with entry points, as pip would leave them, without pip's seconds."""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (ROOT / "examples/streaming_backend", ROOT / "examples/latest_value_task")


def install(source: Path, site: Path) -> None:
    """A package of modules alone, from its pyproject.toml."""
    file = tomllib.loads((source / "pyproject.toml").read_text())
    for module in file["tool"]["setuptools"]["py-modules"]:
        shutil.copy(source / f"{module}.py", site)
    write_metadata(site, file["project"]["name"], file["project"]["entry-points"], file["project"]["version"])


def write_metadata(site: Path, name: str, groups: dict[str, dict[str, str]], version: str = "1") -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{point} = {value}" for point, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
