"""Where results come from: the code and its git state, the environment, the device; and copies of the code for jobs."""

import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from experiments.files import ROOT
from slurm.code import digest

# What a job runs; all else, corpora and runs among it, stays where it is.
_CODE = ("dashattn", "data", "models", "experiments", "slurm", "configs", "train.py", "evaluate.py")
_SNAPSHOT = "snapshot.json"  # in a copy of the code: the state of the checkout it was made from
# What a run's numbers may depend on, and what a kernel's time may.
_OF_RUNS = (
    *("torch", "triton", "deepspeed", "hydra-core", "omegaconf", "numpy"),
    *("datasets", "tokenizers", "safetensors", "wandb", "transformers", "dashattn"),
)
_OF_KERNELS = (
    *("torch", "triton", "jax", "flash-attn3-jax", "flash-attn-3", "flash-linear-attention"),
    *("dew-flash-attn-cu12", "dew-flash-attn-cu13", "flash-attn-4", "nvidia-cutlass-dsl"),
)
# Of the environment only what shapes a run, by name: the rest may hold secrets.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "SLURM_JOB_ID", "TRITON_INTERPRET")


def git_state() -> tuple[dict, str]:
    """(commit, branch and untracked files of the checkout this file lies in, difference from the commit)."""
    if (ROOT / _SNAPSHOT).exists():
        copied = json.loads((ROOT / _SNAPSHOT).read_text())
        return copied["git"], copied["diff"]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    if git("rev-parse", "--is-inside-work-tree") is None:
        return {"sha": None}, ""
    sha, branch = git("rev-parse", "--verify", "HEAD"), git("symbolic-ref", "--short", "HEAD")
    untracked = (git("ls-files", "--others", "--exclude-standard") or "").splitlines()
    diff = (git("diff", "HEAD") if sha else None) or ""
    state = {
        "sha": sha and sha.strip(),
        "branch": branch and branch.strip(),
        "dirty": bool(diff or untracked),
        "untracked": untracked,
    }
    return state, diff


def device_name(device: str) -> str:
    """The GPU's, or ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    """None = not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _plugin_packages() -> list[str]:
    """Those that bring backends or tasks."""
    points = (point for group in ("dashattn.backends", "dashattn.tasks") for point in entry_points(group=group))
    return sorted({point.dist.name for point in points if point.dist is not None})


def now() -> str:
    """The date of a row, with the time and its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment(device: str) -> dict:
    """What a run directory says about the process that works in it."""
    return {
        "time": now(),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions((*_OF_RUNS, *_plugin_packages())),
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def provenance(device: str) -> dict:
    """What every row of a benchmark says about where it comes from."""
    git, _ = git_state()
    return {
        "run": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{os.getpid()}",
        "device": device_name(device),
        "versions": _versions(_OF_KERNELS) | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "git_sha": git["sha"],
        "dirty": git.get("dirty", False),
    }


def snapshot(folder: Path) -> Path:
    """Copy the code into ``folder``, once for all jobs with the same one, with its git state; returns the copy. For one
    process at a time.

    Raises:
        ValueError: it cannot be copied, or a copy that is there already was changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".code-*"):  # by a process that was killed
        shutil.rmtree(left)
    # Not mkdtemp's, which would shut colleagues out.
    copy = folder / f".code-{secrets.token_hex(4)}"
    try:
        copy.mkdir()
        for name in _CODE:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(ROOT / name, copy)
        git, diff = git_state()
        (copy / _SNAPSHOT).write_text(json.dumps({"git": git, "diff": diff}, indent=1) + "\n")
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        said = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the first of a list
        raise ValueError(
            f"the code cannot be copied to {folder} ({said}): make room there, or name another directory"
        ) from error
    target = folder / f"code-{digest(copy)}"
    if not target.exists():
        os.replace(copy, target)
        return target
    shutil.rmtree(copy)
    for compiled in list(target.rglob("__pycache__")):  # Python would run it in place of the source
        shutil.rmtree(compiled, ignore_errors=True)
    if target.name != f"code-{digest(target)}":
        raise ValueError(f"{target} holds other code than its name says: move it away, and it is copied anew")
    return target


def is_changed() -> bool:
    """Whether this code is a copy for jobs, and other than its name says."""
    return (ROOT / _SNAPSHOT).exists() and ROOT.name != f"code-{digest(ROOT)}"
