"""The choice of launch options, with a kernel and times that are made up."""

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from dashattn.ops import tuning

OPTIONS = tuning.around(4, 3)
FAST = dict(num_warps=8, num_stages=3)
CALL = dict(tokens=10_000, KV_HEADS=2, GROUP=3, GROUP_P=4, BLOCK=64, BIAS_HEADS=0)


class Kernel:
    """Adds 1 to its argument, and records its launches; options with more stages than ``fits`` do not fit."""

    __name__ = "made_up_kernel"

    def __init__(self, fits=3):
        self.fits = fits
        self.launches = []

    def fn(self):
        pass

    def __getitem__(self, grid):
        return self.run

    def run(self, q, *, num_warps, num_stages, **constants):
        if num_stages > self.fits:
            raise OutOfResources(200, 100, "shared memory")
        q += 1
        self.launches.append(dict(num_warps=num_warps, num_stages=num_stages))


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The timings that take place, as (option, milliseconds); FAST is the fastest."""
    timings = []

    def milliseconds(run, option, flush):
        run(option)
        timings.append((option, 1.0 if option == FAST else 2.0))
        return timings[-1][1]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_may_time", lambda q: True)
    monkeypatch.setattr(tuning, "L2_BYTES", 1)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "package" / "tuning.jsonl")
    monkeypatch.setenv("DASHATTN_CACHE", str(tmp_path / "cache"))
    new_process(monkeypatch)
    yield timings
    tuning._kept.cache_clear()


def new_process(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_untimed", {})
    tuning._kept.cache_clear()


def launch(kernel=None, **changes):
    """The kernel with its launches, and what it added to an argument that is put back after timings."""
    kernel = kernel or Kernel()
    q = torch.zeros(3)
    tuning.launch(kernel, (1,), q, **(dict(options=OPTIONS, restore=[q]) | CALL | changes))
    return kernel, q[0].item()


def test_the_fastest_is_found_once_and_kept(timed, monkeypatch, tmp_path):
    kernel, added = launch()
    assert kernel.launches[-1] == FAST
    assert added == 1
    assert {tuple(option.items()) for option, _ in timed} == {tuple(option.items()) for option in OPTIONS}
    count = len(timed)
    kernel.launches.clear()
    launch(kernel)
    launch(kernel, tokens=20_000)
    launch(kernel, tokens=10)
    launch(kernel, KV_HEADS=8)  # makes no difference to what is fast
    assert kernel.launches == [FAST] * 4
    assert len(timed) == count

    new_process(monkeypatch)
    assert launch()[0].launches == [FAST]
    assert len(timed) == count
    # As the package's file it serves users with none of their own.
    (tmp_path / "package").mkdir()
    (tmp_path / "cache" / "tuning.jsonl").rename(tmp_path / "package" / "tuning.jsonl")
    new_process(monkeypatch)
    assert launch()[0].launches == [FAST]
    assert len(timed) == count
    launch(BLOCK=128)
    assert len(timed) == 2 * count
    # What the user's says of the same call holds before it.
    entry = json.loads((tmp_path / "package" / "tuning.jsonl").read_text())
    (tmp_path / "cache" / "tuning.jsonl").write_text(json.dumps(entry | {"choice": OPTIONS[2]}) + "\n")
    new_process(monkeypatch)
    assert launch()[0].launches == [OPTIONS[2]]


def test_an_only_option_is_not_timed(timed):
    kernel, added = launch(options=[FAST])
    assert (kernel.launches, added, timed) == ([FAST], 1, [])


def test_a_difference_within_the_noise_keeps_the_first_option(timed, monkeypatch):
    monkeypatch.setattr(tuning, "CLEARLY_FASTER", 0.4)
    assert launch()[0].launches[-1] == OPTIONS[0]


def test_what_another_process_wrote_meanwhile_holds(timed, tmp_path):
    launch(BLOCK=16)  # has read the files
    entry = json.loads((tmp_path / "cache" / "tuning.jsonl").read_text())
    entry["constants"]["BLOCK"] = 64
    (tmp_path / "cache" / "tuning.jsonl").write_text(json.dumps(entry | {"choice": OPTIONS[2]}) + "\n")
    assert launch()[0].launches[-1] == OPTIONS[2]
    assert len((tmp_path / "cache" / "tuning.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("damage", ["{", "[1]", '{"num_warps": 4}', "\x00\xff"])
def test_a_damaged_file_is_told_and_does_no_harm(timed, monkeypatch, tmp_path, damage):
    launch()
    path = tmp_path / "cache" / "tuning.jsonl"
    path.write_bytes(damage.encode("latin-1") + b"\n" + path.read_bytes())
    new_process(monkeypatch)
    timed.clear()
    with pytest.warns(UserWarning, match="damaged"):
        assert launch()[0].launches == [FAST]
    assert not timed


def test_a_choice_that_is_no_option_is_replaced(timed, monkeypatch, tmp_path):
    launch()
    path = tmp_path / "cache" / "tuning.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"choice": dict(num_warps=64, num_stages=9)}) + "\n")
    new_process(monkeypatch)
    assert launch()[0].launches[-1] == FAST
    new_process(monkeypatch)
    assert launch()[0].launches == [FAST]


def test_a_file_that_cannot_be_written_is_told(timed, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kernel, _ = launch()
        launch(kernel)
    said = {str(warning.message).split(":")[0] for warning in told}
    assert said == {"kernels are tuned anew", "the choice of kernel options is not kept"}
    assert kernel.launches[-2:] == [FAST, FAST]


def test_short_calls_and_those_that_must_not_wait_take_the_first_option(timed, monkeypatch, tmp_path):
    assert launch(tokens=100)[0].launches == [OPTIONS[0]]
    monkeypatch.setattr(tuning, "_may_time", lambda q: False)
    kernel, _ = launch()
    launch(kernel)
    assert kernel.launches == [OPTIONS[0]] * 2
    assert not timed
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(tuning, "_may_time", lambda q: True)
    assert launch()[0].launches[-1] == FAST
    monkeypatch.setattr(tuning, "_may_time", lambda q: False)
    assert launch()[0].launches == [FAST]


@pytest.mark.parametrize("obstacle", [None, "variable", "device", "deterministic", "capture"])
def test_when_a_call_may_be_timed(monkeypatch, obstacle):
    class Argument:
        is_cuda = obstacle != "device"

    monkeypatch.setattr(tuning, "ENABLED", obstacle != "variable")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: obstacle == "deterministic")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: obstacle == "capture")
    assert tuning._may_time(Argument()) == (obstacle is None)


@pytest.mark.parametrize("tokens", [100, 10_000])
def test_options_that_do_not_fit_are_left_out(timed, monkeypatch, tokens):
    kernel, added = launch(Kernel(fits=2), tokens=tokens)
    assert kernel.launches[-1] == dict(num_warps=4, num_stages=2)
    assert added == 1
    with pytest.raises(RuntimeError, match=r"made_up_kernel does not fit cpu .* smaller blocks"):
        launch(Kernel(fits=0), tokens=tokens, BLOCK=128)


def test_no_memory_for_timing_is_no_error(timed, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", refuse)
    kernel, _ = launch()
    launch(kernel)
    assert kernel.launches == [OPTIONS[0]] * 2
    assert not timed


def test_the_packages_own_choices_are_read_without_a_complaint(monkeypatch, tmp_path):
    monkeypatch.setenv("DASHATTN_CACHE", str(tmp_path))
    tuning._kept.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = tuning._kept()
    tuning._kept.cache_clear()
    assert len(kept) == len(tuning.SHIPPED.read_text().splitlines()) > 0
    assert all(choice["num_warps"] in (4, 8) and choice["num_stages"] >= 1 for choice in kept.values())
