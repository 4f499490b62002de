"""What a run says on a terminal and in a pipe, and what Ctrl-C leaves there."""

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_module
from experiments import signals
from experiments.errors import Preempted, run_faults
from experiments.files import read_rows
from experiments.signals import Children, StopRequest, end_silently, interruptible
from experiments.training import build as build_module
from experiments.training.display import Display, next_command
from experiments.training.run_dir import RunDir
from tests import forked

ROOT = Path(__file__).parents[3]
DASH = ("attention=dash", "attention.chunk_size=8", "attention.router_scale=20", "stats_every=1")


def at_terminal(command, interrupt_at):
    """Run a command at a terminal, with Ctrl-C once it has said ``interrupt_at``.

    Returns its exit code and its lines, without colours; each as it was at last and all that it was before.
    """
    main, own = pty.openpty()
    screen = SimpleNamespace(name=os.ttyname(own))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
    process = forked.Process(command, env=environment, stdout=screen, stderr=subprocess.STDOUT)
    said, is_sent = b"", False

    def read(seconds):
        return os.read(main, 1 << 16) if select.select([main], [], [], seconds)[0] else b""

    while process.poll() is None:
        said += read(0.05)
        if not is_sent and interrupt_at in said:
            is_sent = True
            process.send_signal(signal.SIGINT)
    os.close(own)
    with suppress(OSError):  # the end of a terminal
        while part := read(1):
            said += part
    os.close(main)
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", said).decode()
    return process.returncode, [re.sub(" +", " ", line).split("\r") for line in plain.split("\r\n")]


def test_a_terminal_shows_what_a_pipe_shows_and_ctrl_c_saves(tiny_overrides):
    overrides, run_dir = tiny_overrides("run", *DASH, "steps=400")
    command = [sys.executable, "train.py", *overrides]
    code, lines = at_terminal(command, b"step 5/400")
    assert code == 75
    last = read_rows(run_dir / "metrics.jsonl")[-1]["step"]
    assert 5 <= last < 400
    said = [line[-1] for line in lines if line[-1].strip()]
    assert said[-1] == f"stopped by SIGINT and saved at step {last}: the same command goes on from there"
    assert not any("Traceback" in part or "error" in part for line in lines for part in line)
    bar = [part for line in lines for part in line if part.startswith("run ")][-1]
    assert re.search(rf"{last}/400 ETA \d:\d\d:\d\d", bar)

    overrides, run_dir = tiny_overrides("piped", *DASH, "steps=4")
    piped = forked.run("train.py", *overrides, env={"FORCE_COLOR": "1"})  # as in a notebook
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout
    assert not piped.stderr
    *rows, complete, following = piped.stdout.splitlines()[1:]
    fields = r"step \d+/\d+ loss [\d.]+ lr [\d.e-]+ gradient [\d.e-]+ [\d,]+ tokens/s sparsity [\d.]+% alpha [\d.]+"
    fields += r"( waits for data \d+%)? memory [\d.]+ GiB( ETA (-|\d:\d\d:\d\d))?"
    at_last = [line for line in said if line.startswith("step")]
    assert len(at_last) == last
    assert len(rows) == 4
    for line in [*at_last, *rows]:
        assert re.fullmatch(fields, re.sub(" +", " ", line)), line
    assert complete == f"complete: {run_dir}/checkpoints/step-00000004"
    assert following == f"next: python evaluate.py run={run_dir} 'sparsities=[0.5]'"


def test_the_time_left_moves_with_every_step(make_config, monkeypatch):
    now = 0.0
    monkeypatch.setattr("rich.console.monotonic", lambda: now)
    display = Display(make_config("run", "steps=100"), step=40)
    shown = []
    for step in range(41, 46):
        now += 90.0  # of a large model: longer than rich looks back by itself
        display.advance(step)
        shown.append(display.eta)
    assert shown == ["-", "1:27:00", "1:25:30", "1:24:00", "1:22:30"]
    display.close()


@pytest.mark.parametrize("is_branch", [False, True])
def test_what_a_run_says_before_its_first_step(tmp_path, is_branch):
    checkpoint, said = tmp_path / "checkpoints" / "step-00000007", []
    run_dir = RunDir(tmp_path, checkpoint, {"step": 7}, is_branch, damaged={"step-00000008": "cut short"})
    ranks = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    start = {"parameters": 1234567, "sparsity": {"knob_name": "topk", "knob": 12.3456, "sparsity": 0.7512}}
    metrics = SimpleNamespace(print=said.append)
    build_module._print_start(metrics, run_dir, ranks, start, knows_peak=False, in_pytorch=["hils"])
    assert said == [
        f"{tmp_path}: 1,234,567 parameters, 2 x cpu",
        "topk=12.35 has a sparsity of 75.1% on training rows",
        "WARNING: step-00000008 is damaged (cut short) and was set aside",
        f"{'branched' if is_branch else 'resumed'} from {checkpoint} at step 7",
        "no MFU: the peak of this device and precision is not known, set peak_tflops=...",
    ]


def test_every_number_of_a_row_in_its_unit(make_config, capsys):
    display = Display(make_config("run", "steps=100"), step=3)
    row = {"step": 4, "split": "train", "tokens": 9, "loss": 2.34567, "auxiliary_loss": 0.0123456, "lr": 3e-4}
    row |= {"grad_norm": 1.2345, "tokens_per_s": 12345.6, "mfu_causal": 0.4567, "mfu_sparse": 0.3456}
    row |= {"causal_sparsity": 0.7544, "knob": 2.34567, "alpha": 1.23456, "data_wait": 0.25, "step_time": 2.0}
    display.show(row | {"skipped_steps": 2, "peak_memory_mib": 1536.0})
    shown = "step 4/100  loss 2.3457  auxiliary loss 0.01235  lr 0.0003  gradient 1.23  12,346 tokens/s  MFU 45.7%  "
    shown += "of what is read 34.6%  sparsity 75.4%  knob 2.346  alpha 1.235  waits for data 12%  skipped 2  "
    assert capsys.readouterr().out == shown + "memory 1.50 GiB  ETA -\n"
    display.show({"step": 4, "split": "validation", "tokens": 9, "loss": 2.0, "data_wait": 0.2, "step_time": 2.0})
    assert capsys.readouterr().out == "step 4/100  validation  loss 2.0000\n"


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end, run_faults(), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted: what is complete stays, and the same command goes on\n"
    monkeypatch.setenv("RANK", "1")  # one of many says it
    with pytest.raises(SystemExit), run_faults(), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit, match="75"), run_faults():
        raise Preempted("stopped by SIGINT")
    assert not capsys.readouterr().err


def test_a_request_to_stop_is_told_once_as_soon_as_it_comes(make_config):
    display = Display(make_config("run"), step=0)
    (task,), told = display._progress.tasks, []
    assert (task.description, task.completed, task.total) == ("run", 0, 4)
    with StopRequest() as request:
        request.saves = lambda: told.append(display.stopping())
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):  # at once, as one request
            os.kill(os.getpid(), number)
    assert (request.received, len(told)) == (signal.SIGUSR2, 1)
    assert task.description == "saving after this step; again: ends at once"
    display.close()


def test_what_asked_first_to_stop_is_what_children_were_asked_by():
    with Children() as children:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert children.received is signal.SIGUSR1


def test_a_child_that_was_being_started_is_asked_to_stop_too(monkeypatch):
    children, asked = Children(), []

    class Started:
        def __init__(self, command):
            children._hear(signal.SIGTERM, None)

        def send_signal(self, number):
            asked.append(number)

        def wait(self):
            return 3

    monkeypatch.setattr(subprocess, "Popen", Started)
    assert (children.run(["x"]), asked) == (3, [signal.SIGTERM])
    assert children.run(["x"]) is None  # none is started after it


def test_who_asks_again_a_second_later_wants_it_at_once(monkeypatch):
    seconds, ended = iter((10.0, 11.0, 11.01)), []
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    request = StopRequest()
    request.saves = lambda: None
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        request._hear(number, None)
    assert ended == [128 + signal.SIGUSR2]


def test_ctrl_c_of_another_job_is_not_heard():
    """A script's background jobs ignore SIGINT, which comes to all that the terminal has."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end_silently()
        with interruptible(), StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
        assert request.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_importing_says_nothing():
    code = "import os, signal, sys; from experiments.help import answer_help; answer_help('train'); "
    done = subprocess.run(
        [sys.executable, "-c", code + "os.kill(os.getpid(), signal.SIGINT)"], cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("options", "sparsities"),
    [
        (["attention=full"], []),
        (["attention=dash", "attention.chunk_size=8"], ["sparsities=[0.5]"]),  # 75 % of 64 tokens cannot be had
        (["attention=dash", "attention.chunk_size=8", "data.seq_len=256"], ["sparsities=[0.5,0.75,0.9]"]),
    ],
)
def test_the_next_command_is_one_that_can_be_typed(make_config, options, sparsities):
    config = replace(make_config("run", *options), run_dir="my runs/a=1, b")
    python, script, run, *rest = shlex.split(next_command(config))
    assert (python, script, rest) == ("python", "evaluate.py", sparsities)
    assert OverridesParser.create().parse_override(run).value() == "my runs/a=1, b"


def test_tensorboard_shows_a_resumed_run_as_one(make_config):
    config = make_config("run", "logger=tensorboard", "steps=4", "save_every=2", "keep_checkpoints=0", "eval_every=4")
    run_dir = train_module.train(config)
    (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
    train_module.train(config)
    shown = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4]
    losses = {(row["split"], row["step"]): row["loss"] for row in read_rows(run_dir / "metrics.jsonl")}
    for split in ("train", "validation"):
        for event in shown.Scalars(f"{split}/loss"):
            assert event.value == pytest.approx(losses[split, event.step])
