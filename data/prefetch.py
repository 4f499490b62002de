"""Batches made while the model computes."""

import threading
from collections import deque

from data.batch import Batch, BatchStream


class Prefetched(BatchStream):
    """``stream`` read ahead by a thread of its own, in the same order.

    ``state_dict()`` describes what has been handed out, not what has been read ahead: a run resumed from it continues
    with the batches that wait here. An error of the stream is raised where its batch would have come. ``close()`` ends
    the thread.
    """

    def __init__(self, stream: BatchStream, depth: int, *, pin_memory: bool = False) -> None:
        """``depth``: batches kept ready. ``pin_memory``: in pages that a GPU copies from while it computes."""
        self.stream, self.depth, self.pin_memory = stream, depth, pin_memory
        self.split, self.vocab_size, self.tokenizer = stream.split, stream.vocab_size, stream.tokenizer
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._ready: deque[tuple[Batch | Exception, dict | None]] = deque()
        self._closed = False
        self._state = stream.state_dict()

    def __next__(self) -> Batch:
        if self._closed:
            self._settle()
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            batch, state = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(batch, Exception):  # the thread has ended with it; asking again asks the stream again
            self.close()
            raise batch
        self._state = state
        return batch

    def _read(self) -> None:
        while True:
            try:
                batch = next(self.stream)
                # The state goes along with its batch: when that is handed out the stream has gone on.
                item = (batch.pin_memory() if self.pin_memory else batch, self.stream.state_dict())
            except Exception as error:
                item = (error, None)
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self.depth)
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item[0], Exception):
                return

    def close(self) -> None:
        """End the thread; the next batch will be the one after the last that was handed out."""
        if self._thread is not None:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._thread.join(timeout=5)  # a source that hangs must not keep the run from ending

    def _settle(self) -> None:
        """Put the stream back to where the last batch left it: what was read ahead is read again."""
        self.close()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._closed = None, False
        self._ready.clear()
        self.stream.load_state_dict(self._state)

    def rewind(self) -> None:
        self._settle()
        self.stream.rewind()
        self._state = self.stream.state_dict()

    def state_dict(self) -> dict:
        return self._state

    def load_state_dict(self, state: dict) -> None:
        self._settle()
        self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()

    def describe(self) -> dict:
        return self.stream.describe()

    def unigram_entropy(self) -> float | None:
        return self.stream.unigram_entropy()
