"""Python commands as processes of their own, without the seconds that imports take: each is a fork of one process that
has imported the large libraries, and nothing of this project.

Not for what a test wants to know of imports, of start-up or of launchers; on a machine with a GPU it is hidden.
"""

import functools
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path
from tempfile import NamedTemporaryFile
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = [
    *("torch._dynamo", "deepspeed", "datasets", "transformers", "hydra", "rich.progress", "scipy.special", "submitit"),
    "deepspeed.runtime.zero.muon.original_muon",  # which every engine imports, and with it torch's compiler: a second
]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu"):  # a fork cannot use a GPU opened before
        forkserver.ensure_running()
    return context


class Process:
    """A command that runs, with as much of ``subprocess.Popen``'s interface as tests and sweeps use.

    Args:
        command: ``sys.executable``, then a script, ``-m`` and a module or ``-c`` and code, then arguments.
        stdout, stderr: open files that have names; stderr may be ``subprocess.STDOUT``.
    """

    def __init__(self, command, *, cwd=ROOT, env=None, stdout=None, stderr=None, stdin=None):
        executable, *arguments = map(str, command)
        assert executable == sys.executable
        files = {1: stdout, 2: stdout if stderr is subprocess.STDOUT else stderr}
        paths = {descriptor: file.name for descriptor, file in files.items() if file is not None}
        self.args = command
        environment = dict(os.environ if env is None else env)
        self._process = _context().Process(target=_become, args=(arguments, str(cwd), environment, paths))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(*arguments, processes: int = 1, cwd=ROOT, env=None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` to its end; several processes are ranks to each other, as those of torchrun.

    Returns:
        The first exit code that is not 0, and what all processes said, one after the other.
    """
    command = [sys.executable, *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | (env or {})
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    with ExitStack() as stack:
        outs, errs = ([stack.enter_context(NamedTemporaryFile("r")) for _ in range(processes)] for _ in range(2))
        running, deadline = [], time.monotonic() + timeout
        for rank, (out, err) in enumerate(zip(outs, errs, strict=True)):
            ranked = environment | (dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) if processes > 1 else {})
            running.append(Process(command, cwd=cwd, env=ranked, stdout=out, stderr=err))
            stack.callback(running[-1].kill)
        codes = [process.wait(max(0, deadline - time.monotonic())) for process in running]
        said = ["".join(file.read() for file in files) for files in (outs, errs)]
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), *said)


def _become(arguments: list[str], cwd: str, environment: dict[str, str], paths: dict[int, str]) -> None:
    """In the fork: be that command."""
    gc.freeze()  # what a collection looks at is copied
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))  # which only a start looks at
    for descriptor, path in paths.items():
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    first, *rest = arguments
    packages = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first not in ("-m", "-c"):
        sys.argv, sys.path[:0] = arguments, [str(Path(first).resolve().parent), *packages]
        runpy.run_path(first, run_name="__main__")
        return
    sys.argv, sys.path[:0] = [first, *rest[1:]], [cwd, *packages]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
