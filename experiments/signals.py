"""Signals that ask to stop: SIGTERM (an operator, a preemption), SIGUSR1 and SIGUSR2 (the end of a time limit)."""

import os
import signal
import subprocess
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Slurm and terminals signal all processes of a job, and parents pass on what they get: what arrives within this time
# is one request.
_ONE_REQUEST_S = 1.0


class _Handlers:
    """Context in which STOP_SIGNALS go to ``_hear``; for the main thread."""

    received: signal.Signals | None = None  # the first one that arrived

    def __enter__(self):
        self._before = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(_Handlers):
    """Notes the first signal, for the loop to act on; another one, a second later or more, ends the process at once."""

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
        elif now - self._since > _ONE_REQUEST_S:
            os._exit(128 + number)


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
