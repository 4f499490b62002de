"""The command line ``python -m experiments.evaluation.generate``, on a run of a few steps."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from data.cache import fingerprint
from experiments.evaluation import generate
from experiments.evaluation.generate import GenerateConfig, Printer, run_generation
from experiments.evaluation.target import locate
from models import Transformer
from models.generate import Sampling
from tests import forked
from train import train


@pytest.fixture
def run(make_config):
    return str(train(make_config("generating", "attention=dash", "attention.chunk_size=16", "steps=2")))


def test_a_run_continues_a_prompt_and_says_how_fast(run, capsys, monkeypatch):
    run_generation(GenerateConfig(run, "import os", max_new_tokens=8, threads=1))
    printed = capsys.readouterr()
    assert printed.out.startswith("import os")
    assert len(printed.out) > len("import os\n")
    assert "8 in all" in printed.err
    assert "tokens/s" in printed.err

    # The first step's tokens, one of each prompt that goes on, came with the first; the others in the time from it.
    seconds = iter((10.0, 11.5, 11.5, 12.5, 13.5))

    asked = {}

    def continued(model, prompts, *, on_token, **options):
        asked.update(
            options, prompts=list(map(len, prompts)), knobs={backend.config.router_scale for backend in model.backends}
        )
        for row, token in ((0, 65), (1, 66), (0, 67), (0, 68)):
            on_token(row, token)
        return [[65, 67, 68], [66], []]

    monkeypatch.setattr(generate, "generate", continued)
    monkeypatch.setattr(generate, "limit_memory", lambda device: asked.update(device=device))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: asked.update(threads=threads))
    monkeypatch.setattr(Transformer, "compile_layers", lambda model, options: asked.update(compiled=options))
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "repetition_penalty": 1.5, "knob": 7.0, "seed": 5}
    options |= {"compile": True, "device": "cpu"}
    run_generation(
        GenerateConfig(run, prompts=["a", "b", "c"], threads=2, stop_tokens=["x"], max_new_tokens=3, **options)
    )
    tokenizer = locate(run, "cpu").tokenizer
    assert asked.pop("stop_tokens") == {tokenizer.eos_id, *tokenizer.encode("x")}
    assert asked == {
        "max_new_tokens": 3,
        "sampling": Sampling(0.5, 0.9, 3, 1.5),
        "seeds": [int(fingerprint(5, index), 16) for index in range(3)],
        "prompts": [1, 1, 1],
        "knobs": {7.0},
        **{"threads": 2, "device": "cpu", "compiled": {"coordinate_descent_tuning": True}},
    }
    said = "3 tokens read, the first new one after 1.50 s, then 1.0 tokens/s; 4 in all\n"
    assert capsys.readouterr().err.endswith(said)


def test_the_command_line(run):
    command = ["-m", "experiments.evaluation.generate", f"run={run}", "prompt=x = [1, {", "max_new_tokens=4"]
    assert forked.run(*command).stdout.startswith("x = [1, {")
    failed = forked.run(*command, "top_p=2")
    assert failed.returncode == 1
    assert "error: top_p must be a share in (0, 1]; got 2.0" in failed.stderr


def test_prompts_of_any_length_go_on_at_once(run, capsys):
    texts = ["import os\nimport sys\n", "x"]
    options = dict(max_new_tokens=8, threads=1)
    alone = []
    for text in texts:
        run_generation(GenerateConfig(run, text, **options))
        alone.append(capsys.readouterr().out)
    run_generation(GenerateConfig(run, prompts=texts, **options))
    printed = capsys.readouterr()
    assert printed.out == f"{alone[0]}\n[2] {alone[1]}"
    assert "16 in all" in printed.err


@pytest.mark.parametrize("last_step", [0, 2])
def test_half_the_prompts_go_on_where_memory_ends(run, capsys, monkeypatch, last_step):
    """Before the first token or behind the second one: the same text, each token once."""
    options = dict(prompts=["import os\n", "x", "def f("], max_new_tokens=6, temperature=1.5, threads=1)
    run_generation(GenerateConfig(run, **options))
    expected = capsys.readouterr()
    decode, steps = Transformer.decode, []

    def failing(self, input_ids, *args, **kwargs):
        steps.append(len(input_ids))
        if steps.count(3) > last_step:
            steps[:] = []
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "decode", failing)
    run_generation(GenerateConfig(run, **options))
    printed = capsys.readouterr()
    assert printed.out == expected.out
    assert printed.err.startswith("out of memory: going on with 1 rows at once\n")
    assert printed.err.endswith(expected.err.split(";")[-1])  # how many in all
    monkeypatch.setattr(Transformer, "decode", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(ValueError, match=r"One row at once is too much: take shorter ones .*max_new_tokens"):
        run_generation(GenerateConfig(run, "x"))


def test_a_stop_token_ends_a_continuation(run, capsys):
    def continuation(**options):
        run_generation(GenerateConfig(run, "x", temperature=1.0, threads=1, **options))
        return capsys.readouterr().out[1:-1]

    firsts = ((seed, continuation(max_new_tokens=1, seed=seed)) for seed in range(50))
    seed, first = next((seed, text) for seed, text in firsts if len(text) == 1 and text.isascii())
    assert continuation(max_new_tokens=3, seed=seed).startswith(first)
    assert continuation(max_new_tokens=3, seed=seed, stop_tokens=[first]) == ""


def test_refusals(run, tmp_path, make_config):
    for prompts in ({}, {"prompt": "a", "prompts": ["b"]}):
        with pytest.raises(ValueError, match=r"give prompt=.* or, for several, prompts="):
            run_generation(GenerateConfig(run, **prompts))
    with pytest.raises(ValueError, match="which is 2 tokens: give texts of one token each"):
        run_generation(GenerateConfig(run, "a", stop_tokens=["\x00\x01"]))
    with pytest.raises(ValueError, match="no intact weights in"):
        run_generation(GenerateConfig(str(tmp_path), "a"))
    with pytest.raises(ValueError, match="knob must be a finite number of at least 0"):
        run_generation(GenerateConfig(run, "a", knob=-1.0))


def test_half_a_character_waits_for_its_other_half(capsys):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    printer = Printer(Bytes(), list(b"a"))
    for byte in "é!".encode():
        printer(0, byte)
    printer(0, "é".encode()[0])
    assert capsys.readouterr().out == "aé!"
    printer.end()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"
