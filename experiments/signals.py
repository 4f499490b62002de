"""Signals that ask to stop: SIGTERM (an operator, a preemption), SIGUSR1 and SIGUSR2 (the end of a time limit), SIGINT
(Ctrl-C)."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# Slurm and terminals signal all processes of a job, and parents pass on what they get: what arrives within this time
# is one request.
_ONE_REQUEST_S = 1.0


class _Handlers:
    """Context in which STOP_SIGNALS go to ``_hear``; for the main thread."""

    received: signal.Signals | None = None  # the first one that arrived

    def __enter__(self):
        # What is ignored stays so: SIGINT of a script's background job, to which the terminal's Ctrl-C comes, too.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(_Handlers):
    """Notes the first signal, for the loop to act on; another one, a second later or more, ends the process at once.

    Attributes:
        saves: from when on there is a loop that does: what to call when a signal is noted. Ctrl-C before it has nothing
            to wait for, and is a KeyboardInterrupt.
    """

    saves: Callable[[], None] | None = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.saves is None:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            if self.saves is not None:
                self.saves()
        elif now - self._since > _ONE_REQUEST_S:
            os._exit(128 + number)


def end_silently() -> None:
    """From here on Ctrl-C ends the process without a word, as while it imports: a traceback would be of no use."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which Ctrl-C is a KeyboardInterrupt, after ``end_silently``, too; for the main thread."""
    if silent := signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if silent:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class Children(_Handlers):
    """Runs child processes, which get the signals that this process gets; no new one starts after the first signal."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()

    def run(self, command: list[str], **options) -> int | None:
        """Exit code of ``command``, None if it was not started. Options as of ``Popen``. Any thread may call it."""
        with self._lock:
            if self.received is not None:
                return None
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        if self.received is not None:  # it came while the process was being started, and may not have been passed on
            process.send_signal(self.received)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        for process in list(self._running):
            process.send_signal(number)
