"""Reading ahead changes neither the batches nor what a checkpoint says of them."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from data import MQARDataConfig, Prefetched, build_data
from data.batch import Batch

CONFIG = MQARDataConfig(name="mqar", seq_len=64, pairs_min=1, pairs_max=8, validation_rows=4)


def stream():
    return build_data(CONFIG, split="train", seed=0, rows=2)


@pytest.fixture
def prefetched():
    made = []

    def make(source=None, depth=3):
        made.append(Prefetched(source or stream(), depth))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ids(batches, count=3):
    return [next(batches).input_ids for _ in range(count)]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_batches_and_the_states_are_the_streams(prefetched):
    ours, plain = prefetched(), stream()
    assert ours.state_dict() == plain.state_dict()
    for name in ("split", "vocab_size", "tokenizer"):
        assert getattr(ours, name) is getattr(ours.stream, name)
    assert (ours.describe(), ours.unigram_entropy()) == (plain.describe(), None)
    ours.stream.unigram_entropy = lambda: 1.5
    assert ours.unigram_entropy() == 1.5
    for _ in range(5):
        assert torch.equal(next(ours).labels, next(plain).labels)
        assert ours.state_dict() == plain.state_dict()


def test_a_resume_continues_with_the_batches_that_were_waiting(prefetched):
    ours, source = prefetched(), stream()
    whole = ids(source, 6)
    assert_same(ids(ours), whole[:3])
    wait_until(lambda: len(ours._ready) == 3)
    state = ours.state_dict()
    resumed = prefetched()
    resumed.load_state_dict(state)
    assert_same(ids(resumed), whole[3:])
    ours.close()  # what was read ahead is not lost either
    assert_same(ids(ours), whole[3:])
    ours.load_state_dict(state)
    assert_same(ids(ours), whole[3:])
    ours.rewind()
    assert_same(ids(ours), whole[:3])


def test_it_reads_ahead_as_far_as_it_is_told(prefetched):
    source = stream()
    reads, read = [], type(source).__next__
    ours = prefetched(source, depth=2)
    source.__class__ = type("Counting", (type(source),), {"__next__": lambda self: (reads.append(1), read(self))[1]})
    next(ours)
    wait_until(lambda: len(reads) == 4)  # handed out 1, ready 2, and one that waits for its place
    time.sleep(0.05)
    assert len(reads) == 4


def test_an_error_comes_in_its_place_and_asking_again_asks_the_source_again(prefetched):
    source = stream()
    whole = ids(stream(), 4)
    fails, read = [2], type(source).__next__

    def failing(self):
        fails[0] -= 1
        if fails[0] == -1:
            raise OSError("the disk is gone")
        return read(self)

    source.__class__ = type("Failing", (type(source),), {"__next__": failing})
    ours = prefetched(source)
    assert_same(ids(ours, 2), whole[:2])
    state = ours.state_dict()
    with pytest.raises(OSError, match="the disk is gone"):
        next(ours)
    assert ours.state_dict() == state
    assert_same(ids(ours, 2), whole[2:])


def test_before_it_is_put_back_a_source_has_ended_what_it_did(prefetched):
    """Closing waits for it 5 seconds at most."""
    ours, waited = prefetched(), []
    next(ours)
    join = ours._thread.join
    ours._thread.join = lambda timeout=None: waited.append(timeout) or join(timeout)
    ours.rewind()
    assert waited == [5, None]


def test_batches_are_pinned_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: replace(batch, sources=("pinned",)))
    for pin_memory in (False, True):
        ours = Prefetched(stream(), 1, pin_memory=pin_memory)
        assert next(ours).sources == (("pinned",) if pin_memory else ())
        ours.close()


def test_closing_leaves_no_thread(prefetched):
    before = threading.active_count()
    ours = prefetched()
    next(ours)
    assert threading.active_count() == before + 1
    assert ours._thread.daemon, "a source that hangs keeps no run from ending"
    ours.close()
    ours.close()
    assert threading.active_count() == before
