"""The numbers of a row by hand, and what loggers are given of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
import wandb

from dashattn.stats import AttentionStats
from experiments.files import METRICS
from experiments.training import metrics
from experiments.training.metrics import Clock, MetricsWriter, attention_metrics, peak_memory_mib


def test_a_clock_counts_per_step_and_begins_anew_at_every_reading(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock()
    for start in (100.0, 200.0):
        now = start + 50
        clock.restart()  # after a validation, say
        for waited in (1.0, 2.0):
            with clock.waiting():
                now += waited
            now += 4.0
            clock.count(33.0)
        now += 0.5
        assert clock.read() == {"step_time": 11.5 / 2, "data_wait": 3.0 / 2, "tokens_per_s": 66 / 11.5}
    now += 2.0
    clock.count(10.0)
    assert clock.read() == {"step_time": 2.0, "data_wait": 0.0, "tokens_per_s": 5.0}


def test_sparsity_and_reads_are_means_over_layers():
    positions = torch.tensor([[0, 1, 2, 3]])  # of 10 causal keys
    layers = [
        AttentionStats(torch.tensor(active)[None, :, None], positions, torch.tensor([reads]))
        for active, reads in (([1, 2, 3, 4], [0, 0, 0, 0]), ([1, 1, 1, 1], [0, 1, 1, 2]))
    ]
    assert attention_metrics(layers) == {
        "causal_sparsity": pytest.approx(0.3),
        "causal_sparsity_per_layer": pytest.approx([0.0, 0.6]),
        "routing_reads": 0.5,
        "routing_reads_per_layer": [0.0, 1.0],
    }


def test_memory_of_a_cpu_is_the_most_that_this_process_held():
    held = psutil.Process().memory_info().rss / 2**20
    assert 0.9 * held < peak_memory_mib(torch.device("cpu")) < 20 * held


ROW = {"step": 3, "split": "train", "loss": 2.5, "tokens": 7, "causal_sparsity_per_layer": [0.5], "why": "text"}


@pytest.mark.parametrize("mode", ["offline", "online", "tensorboard", "off"])
def test_a_logger_gets_the_numbers_of_a_row_and_the_run_they_are_of(make_config, tmp_path, monkeypatch, capsys, mode):
    told, asked = [], {}

    class Logger:
        def __init__(self, *_, **options):
            asked.update(options)

        def __getattr__(self, name):
            return lambda *what, **_: told.append((name, *what))

    monkeypatch.setattr(wandb, "init", Logger)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Logger)
    config = make_config("run")
    logger = replace(config.logger, mode=mode, project="p", entity="e", group="g", tags=["a", "b"])
    config = replace(config, logger=logger)
    for main in (False, True):
        writer = MetricsWriter(tmp_path, config, main=main, step=2)
        writer.print("hello")
        writer.stopping()
        writer.advance(3)
        writer.write(ROW)
        writer.close()
        assert (tmp_path / METRICS).exists() == main
    assert json.loads((tmp_path / METRICS).read_text()) == ROW
    assert capsys.readouterr().out.splitlines()[0] == "hello"
    numbers = {"train/loss": 2.5, "train/tokens": 7}
    if mode == "off":
        assert (told, asked) == ([], {})
    elif mode == "tensorboard":
        assert told == [*(("add_scalar", *number, 3) for number in numbers.items()), ("close",)]
        assert asked == {"purge_step": 3}
    else:
        assert told == [("define_metric", "step"), ("define_metric", "*"), ("log", numbers | {"step": 3}), ("finish",)]
        own = {"project": "p", "entity": "e", "group": "g", "tags": ["a", "b"], "name": "run", "mode": mode}
        own |= {"resume": "allow" if mode == "online" else None, "id": (tmp_path / "wandb_id").read_text()}
        assert {key: asked[key] for key in own} == own
        assert (asked["dir"], asked["config"]["steps"], asked["settings"].silent) == (str(tmp_path), 4, True)
        assert len(own["id"]) == 8
