"""Shared by all tests."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

# A shell's background jobs ignore Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DASHATTN_AUTOTUNE", "0")  # a test times no kernels and writes to no user's cache
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter, which has to be chosen before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
# torch lists the functions that ``torch.device`` redirects on its first use. That must precede the replacement of
# torch.empty below, or models on "meta" get real memory: 32 GB for the largest.
with torch.device("meta"):
    torch.empty(0)

# The collector went through all that large libraries are made of again and again: in a tenth of the suite's time.
gc.set_threshold(20_000, 10, 10)
_frozen = 0  # modules


def pytest_runtest_logstart():
    """Take what they are made of out of its sight."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


def pytest_configure(config):
    """After a clone all files are as young as git's index, and each run's ``git diff`` reads them: until a status."""
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(OSError):
            subprocess.run(["git", "status"], cwd=Path(__file__).parent, capture_output=True, check=False)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """Fills ``torch.empty`` and its kin with NaN, so that an element nobody wrote shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point() and not x.is_meta:
                x.detach().fill_(float("nan"))  # detached: it may ask for a gradient
            return x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
