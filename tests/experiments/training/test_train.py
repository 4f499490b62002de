"""The loop, in this process."""

import gzip
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train as train_module
from data import TextTokenizer, build_data
from experiments.config import load_config
from experiments.errors import Stopped
from experiments.evaluation import export
from experiments.files import read_rows
from experiments.training import build as build_module
from experiments.training import metrics
from experiments.training import run as run_module
from experiments.training.checkpoint import read_state
from experiments.training.optim import learning_rate
from experiments.training.run_dir import config_hash
from experiments.training.weights import find_weights
from models import Transformer
from train import train

ATTENTION = {
    "full": ["attention=full"],
    "dash": ["attention=dash", "attention.chunk_size=16"],
    "indexer": ["attention=indexer", "attention.block_size=8", "attention.topk=5", "attention.warmup_steps=20"],
    "infllmv2": [
        *("attention=infllmv2", "attention.block_size=16", "attention.kernel_size=8", "attention.kernel_stride=4"),
        *("attention.window_size=16", "attention.topk=3"),
    ],
    "nsa": [
        *("attention=nsa", "attention.block_size=16", "attention.kernel_size=8", "attention.kernel_stride=4"),
        *("attention.window_size=16", "attention.topk=3"),
    ],
}


def rows(run_dir: Path, split="train"):
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["split"] == split]


def losses(run_dir: Path):
    return [row["loss"] for row in rows(run_dir)]


def interrupt_after(run_dir: Path, step: int, target: Path) -> None:
    """A copy of a run directory as it was when the run had just saved at ``step``."""
    shutil.copytree(run_dir, target)
    name = f"step-{step:08d}"
    assert (target / "checkpoints" / name).is_dir()  # else an older one would do
    (target / "checkpoints" / "latest").write_text(name + "\n")


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_backend_learns(make_config, attention):
    config = make_config("run", *ATTENTION[attention], "steps=40", "optim.lr=1e-2", "log_every=20", "stats_every=20")
    first, *_, last = rows(train(config))
    assert last["loss"] < first["loss"] - 1
    assert last["tokens"] == 40 * 4 * 64
    assert len(last["causal_sparsity_per_layer"]) == 2
    assert ("alpha" in last) == (attention == "dash")


@pytest.fixture(scope="module")
def reference_losses():
    """Losses and norms of the tiny run at stage 0, filled by the first test that needs them."""
    return {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_changes_nothing_and_resume_is_exact(make_config, tmp_path, reference_losses, stage):
    options = [f"deepspeed=zero{stage}", *ATTENTION["dash"], "steps=6", "save_every=2", "keep_checkpoints=0"]
    whole = train(make_config("whole", *options))
    if not reference_losses:
        reference = whole if stage == 0 else train(make_config("reference", *options, "deepspeed=zero0"))
        for key in ("loss", "grad_norm", "grad_norm_router"):
            reference_losses[key] = [row[key] for row in rows(reference)]
    assert losses(whole) == reference_losses["loss"]
    for key in ("grad_norm", "grad_norm_router"):
        assert [row[key] for row in rows(whole)] == pytest.approx(reference_losses[key], rel=1e-5, abs=0)

    interrupt_after(whole, 2, tmp_path / "resumed")
    resumed = train(make_config("resumed", *options))
    assert losses(resumed) == losses(whole)
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5, 6]
    states = [json.loads((path / "checkpoints/step-00000006/state.json").read_text()) for path in (whole, resumed)]
    assert states[0] == states[1]
    assert (resumed / "resumed/step-00000002/environment.json").exists()
    weights = [load_file(path / "checkpoints/step-00000006/model.safetensors") for path in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("stage", [1, 2])
def test_an_odd_number_of_parameters_trains(make_config, stage):
    odd = ["model.num_layers=1", "model.num_heads=3", "model.num_kv_heads=3", "model.hidden_size=48", "steps=2"]
    odd += [*ATTENTION["dash"], "attention.alpha_mode=learnable"]
    run_dir = train(make_config("odd", *odd, f"deepspeed.stage={stage}"))
    assert json.loads((run_dir / "start.json").read_text())["parameters"] % 2 == 1
    assert losses(run_dir) == losses(train(make_config("plain", *odd, "deepspeed.stage=0")))


def test_stage_3_gathers_a_layer_at_once(make_config, monkeypatch):
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetched, fetch = [], PartitionedParameterCoordinator.fetch_sub_module

    def observed(self, module, forward):
        fetched.append(type(module).__name__)
        return fetch(self, module, forward)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", observed)
    train(make_config("run", "deepspeed=zero3", *ATTENTION["nsa"], "steps=1", "optim.warmup_steps=0"))
    layers, others = 2, ("Transformer", "Embedding", "RMSNorm")
    assert sorted(fetched) == sorted(2 * [*others, *layers * ["TransformerBlock"]])  # forward and backward


@pytest.mark.long
@pytest.mark.parametrize("options", [["deepspeed=zero1"], ["deepspeed=zero3", "rows_per_micro_batch=2"]])
def test_bf16_trains_and_resumes_exactly(make_config, tmp_path, options):
    options = [*options, "deepspeed.precision=bf16", *ATTENTION["dash"], "save_every=2", "keep_checkpoints=0"]
    whole = train(make_config("whole", *options))
    fp32 = train(make_config("fp32", *ATTENTION["dash"]))
    assert losses(whole) == pytest.approx(losses(fp32), abs=0.01)
    interrupt_after(whole, 2, tmp_path / "resumed")
    assert losses(train(make_config("resumed", *options))) == losses(whole)


def test_one_rank_sums_gradients_in_float32_and_keeps_no_other(make_config, monkeypatch):
    from deepspeed.utils import safe_get_full_grad

    sums, optimizer_step = [], run_module.optimizer_step

    def observed(engine, grad_clip):
        weight = engine.module.embedding.weight
        assert weight.grad is None
        sums.append(safe_get_full_grad(weight).clone())
        return optimizer_step(engine, grad_clip)

    monkeypatch.setattr(run_module, "optimizer_step", observed)
    train(make_config("run", "deepspeed.precision=bf16", "rows_per_micro_batch=2", "steps=1", "optim.warmup_steps=0"))
    first, both = sums
    assert torch.equal(first, first.bfloat16())
    assert not torch.equal(both, both.bfloat16())


@pytest.mark.parametrize("stage", [0, 1])
def test_accumulation_weighs_every_target_the_same(make_config, tmp_path, stage):
    # The first token of a document is no target: of documents of two tokens, every other token.
    texts = [f"{index} words that a document goes on with" * 9 for index in range(50)] + ["x", "y"] * 2000
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = [f"deepspeed=zero{stage}", "data=local", f"data.files=[{corpus}]", "data.seq_len=64"]
    options += ["data.vocab_size=300", "data.validation_rows=4"]

    def run(name, *overrides):
        return rows(train(make_config(name, *options, *overrides)))

    at_once, in_parts = run("at_once"), run("in_parts", "rows_per_micro_batch=1")
    assert len(at_once) == 4
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in in_parts] == pytest.approx([row[key] for row in at_once], rel=1e-4)


def test_clipping_bounds_the_update_at_every_stage(make_config):
    options = ["optim.grad_clip=1e-3", "optim.eps=1", "optim.weight_decay=0"]  # eps=1: updates follow the gradient
    runs = [losses(train(make_config(f"zero{s}", f"deepspeed=zero{s}", *options))) for s in (0, 1)]
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    free = losses(train(make_config("free", "deepspeed=zero0", *options, "optim.grad_clip=0")))
    assert free[-1] < runs[0][-1]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_clipped_update_is_as_long_as_the_bound_times_the_rate(make_config, stage):
    """AdamW's first update is lr g / (|g| + eps): with eps = 1 and a small gradient, lr g."""
    options = ["optim.grad_clip=1e-3", "optim.eps=1", "optim.weight_decay=0", "optim.warmup_steps=0", "optim.lr=0.5"]
    config = make_config("run", f"deepspeed=zero{stage}", *options, "steps=1", "seed=3", "data.pack=documents")
    weights = load_file(find_weights(train(config)))
    torch.manual_seed(3)
    model = Transformer(replace(config.model, vocab_size=300), config.attention)
    initial = model.state_dict()
    moved = torch.cat([(weights[name] - initial[name]).flatten() for name in initial]).norm()
    assert moved.item() == pytest.approx(0.5 * 1e-3, rel=0.01)
    (row,) = rows(Path(config.run_dir))
    assert row["grad_norm"] > 0.1
    # On the first rows of the seed, whose documents know nothing of each other.
    batch = next(build_data(config.data, split="train", seed=3, rows=4, cache_dir=config.cache_dir))
    assert len(batch.cu_seqlens) > 2
    documents = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    expected = model(batch.input_ids, labels=batch.labels, **documents).loss.item()
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_run_can_begin_with_other_weights(make_config, tmp_path, capsys):
    dense = train(make_config("dense"))
    sparse = train(make_config("sparse", *ATTENTION["dash"], f"init_from={dense}"))
    start = json.loads((sparse / "start.json").read_text())["init_from"]
    assert start["new_parameters"] == [f"layers.{i}.attention.backend.chunk_query" for i in range(2)]
    assert [row["step"] for row in rows(sparse)] == [1, 2, 3, 4]
    assert losses(sparse)[0] < losses(dense)[0] - 0.05
    options = (*ATTENTION["dash"], "attention.layers={0:full}", "model.rope.max_period=${data.seq_len}")
    mixed = train(make_config("mixed", *options, f"init_from={sparse}"))
    start = json.loads((mixed / "start.json").read_text())["init_from"]
    assert start["new_parameters"] == []
    assert start["dropped_parameters"] == ["layers.0.attention.backend.chunk_query"]
    with pytest.raises(SystemExit):
        export.main([str(mixed), str(tmp_path / "folder")])
    said = capsys.readouterr()
    assert "dropped: attention.backend.chunk_query of layers 0" in said.out
    assert "has model.rope.max_period=" in said.err
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match="nowhere does not exist: give a run directory"):
        train(make_config("lost", f"init_from={tmp_path / 'nowhere'}"))
    assert not (tmp_path / "lost").exists()


def test_a_run_can_begin_with_a_hugging_face_folder_and_become_one(make_config, tmp_path, capsys):
    dense = train(make_config("dense"))
    export.main([str(dense), str(tmp_path / "folder")])
    from_run, from_folder = (
        train(make_config(name, *ATTENTION["dash"], f"init_from={source}"))
        for name, source in (("from_run", dense), ("from_folder", tmp_path / "folder"))
    )
    assert losses(from_folder) == losses(from_run)
    start = json.loads((from_folder / "start.json").read_text())["init_from"]
    assert start["new_parameters"] == [f"layers.{i}.attention.backend.chunk_query" for i in range(2)]
    export.main(["--dense", str(from_folder), str(tmp_path / "back")])
    assert "left out: attention.backend.chunk_query of layers 0-1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export.main([str(from_folder), str(tmp_path / "back")])
    assert "back exists: give a new folder" in capsys.readouterr().err


def test_a_complete_run_is_left_alone(make_config, capsys, monkeypatch):
    config = make_config("run", "eval_every=2")
    run_dir = train(config)
    assert [row["step"] for row in rows(run_dir, "validation")] == [2, 4]
    assert not any("causal_sparsity" in row for row in rows(run_dir))  # stats_every=0
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    capsys.readouterr()
    train(make_config("run", "eval_every=2"))
    next_ = f"next: python evaluate.py run={run_dir}"
    assert capsys.readouterr().out.splitlines() == [f"{run_dir} is complete: 4 steps", next_]
    monkeypatch.setenv("RANK", "1")  # one of many says it
    train(make_config("run", "eval_every=2"))
    assert not capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    with pytest.raises(ValueError, match="steps: 4 there, 6 now"):
        train(make_config("run", "eval_every=2", "steps=6"))


def test_validation_and_saving_do_not_change_the_training(make_config, monkeypatch):
    """Nor the time of its steps: each takes 1000 seconds of this clock."""
    clock, others = time.perf_counter, 0.0

    def slowed(function):
        def call(*arguments, **options):
            nonlocal others
            others += 1000
            return function(*arguments, **options)

        return call

    plain = train(make_config("plain"))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock() + others))
    for name in ("save_checkpoint", "validation_loss"):
        monkeypatch.setattr(run_module, name, slowed(getattr(run_module, name)))
    options = ("eval_every=3", "save_every=2", "log_every=1", "stats_every=1")  # only saved, only validated, and both
    watched = train(make_config("watched", *options, *ATTENTION["full"]))
    assert losses(watched) == losses(plain)
    assert others == 4000
    assert max(row["step_time"] for row in rows(watched)) < 1000
    assert sorted(p.name for p in (watched / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000004"]


def test_a_crash_while_saving_leaves_the_checkpoint_before(make_config, monkeypatch):
    config = make_config("run", "save_every=2")

    def crash(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.training.checkpoint.save_file", crash)
        with pytest.raises(Stopped, match=r"could not be written .disk full.*has space"):
            train(config)
    assert not list((Path(config.run_dir) / "checkpoints").iterdir())
    whole = train(make_config("whole", "save_every=2"))
    assert losses(train(config)) == losses(whole)


def test_alpha_follows_its_schedule_across_a_resume(make_config, tmp_path):
    options = [*ATTENTION["dash"], "attention.alpha_mode=scheduled", "attention.alpha_steps=4", "save_every=2"]
    options += ["keep_checkpoints=0"]
    whole = train(make_config("whole", *options))
    assert [row["alpha"] for row in rows(whole)] == [1.25, 1.3125, 1.375, 1.4375]
    interrupt_after(whole, 2, tmp_path / "resumed")
    assert [row["alpha"] for row in rows(train(make_config("resumed", *options)))] == [1.25, 1.3125, 1.375, 1.4375]


@pytest.mark.parametrize("learned", [True, False])
def test_summaries_are_learned_if_asked_for(make_config, learned):
    config = make_config("run", *ATTENTION["dash"], "attention.prior=raw", f"attention.learn_summary={learned}")
    weights = load_file(train(config) / "checkpoints" / "step-00000004" / "model.safetensors")
    queries = [weight for name, weight in weights.items() if "chunk_query" in name]
    assert queries
    assert all(query.any() == learned for query in queries)
    assert all(("grad_norm_router" in row) == learned for row in rows(Path(config.run_dir)))


def test_kernels_without_a_gpu_are_refused_before_anything_is_made(make_config, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = make_config("run", "attention=dash", "attention.chunk_size=16", "attention.impl=triton")
    with pytest.raises(ValueError, match=r"attention\.impl=triton needs a GPU.*use attention\.impl=auto"):
        train(config)
    assert not Path(config.run_dir).exists()


def test_a_vocabulary_smaller_than_the_datas_is_refused(make_config, tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size=null"):
        train(make_config("run", "model.vocab_size=100"))
    assert not (tmp_path / "run").exists()


def test_wandb_shows_a_resumed_run_as_one(make_config, tmp_path, monkeypatch):
    import wandb

    logged, log, axes = [], wandb.Run.log, []
    monkeypatch.setattr(wandb.Run, "define_metric", lambda run, *names, **options: axes.append((*names, options)))
    monkeypatch.setattr(wandb.Run, "log", lambda run, row, **options: (logged.append(row), log(run, row, **options))[1])
    options = ["logger=offline", "save_every=2", "keep_checkpoints=0"]
    whole = train(make_config("whole", *options))
    interrupt_after(whole, 2, tmp_path / "resumed")
    resumed = train(make_config("resumed", *options))
    identity = (whole / "wandb_id").read_text()
    files = list(resumed.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * len(files)
    assert len(files) in (1, 2)  # one directory when both launches began in the same second
    # The steps that were done again stand on an axis of their own, which may go back.
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 3, 4]
    assert [row["train/loss"] for row in logged] == [*losses(whole), *losses(whole)[2:]]
    assert axes == 2 * [("step", {"hidden": True}), ("*", {"step_metric": "step"})]


def test_what_is_due_at_a_step_is_done_there_and_nowhere_else(make_config):
    options = ["steps=10", "log_every=3", "stats_every=4", "eval_every=7", "save_every=4", "keep_every=8"]
    config = make_config("run", *options, "keep_checkpoints=1", "optim.warmup_steps=3")
    run_dir = train(config)
    assert [row["step"] for row in rows(run_dir)] == [1, 3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in rows(run_dir) if "causal_sparsity" in row] == [4, 8, 10]
    assert [(row["step"], row["tokens"]) for row in rows(run_dir, "validation")] == [(7, 7 * 256), (10, 2560)]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step-00000008", "step-00000010"]
    for row in rows(run_dir):
        assert row["lr"] == learning_rate(config.optim, row["step"] - 1, 10)
        assert (row["tokens"], row["skipped_steps"]) == (row["step"] * 4 * 64, 0)
    state = read_state(run_dir / "checkpoints/step-00000010")
    known = {"step": 10, "tokens": 2560, "skipped_steps": 0, "world_size": 1, "stage": 1}
    known |= {"config_hash": config_hash(load_config(run_dir / "config.yaml"))}
    assert state == known | {"data": state["data"], "parameter_order": state["parameter_order"]}
    assert len(state["data"]) == 1
    start = json.loads((run_dir / "start.json").read_text())
    weights = load_file(find_weights(run_dir))
    assert start["parameters"] == sum(weight.numel() for weight in weights.values())
    assert start["tokenizer"] == TextTokenizer.load(str(run_dir / "tokenizer")).fingerprint()
    assert start.keys() == {"parameters", "data", "tokenizer", "unigram_entropy"}
    read = build_data(config.data, split="train", seed=config.seed, rows=4, cache_dir=config.cache_dir)
    assert (start["data"], start["unigram_entropy"]) == (read.describe(), read.unigram_entropy())


def test_a_row_says_what_the_step_cost(make_config):
    row = rows(train(make_config("run", *ATTENTION["dash"], "attention.prior=raw", "stats_every=1")))[-1]
    assert 0 <= row["data_wait"] < row["step_time"]
    assert 0 < row["grad_norm_router"] == row["grad_norm_chunk_query"] < row["grad_norm"]
    assert not {"mfu_causal", "mfu_sparse"} & row.keys()  # on a CPU there is nothing to compare with


def test_the_norms_of_the_routers_gradient_are_autograds(make_config, monkeypatch):
    seen, measure = [], run_module.gradient_norms

    def spy(engine):
        grads = [p.grad.flatten() for backend in engine.module.backends for p in backend.parameters()]
        seen.append((measure(engine), torch.cat(grads).norm().item()))
        return seen[-1][0]

    monkeypatch.setattr(run_module, "gradient_norms", spy)
    train(make_config("run", *ATTENTION["nsa"], "deepspeed=zero0", "steps=2"))
    assert len(seen) == 2
    for norms, expected in seen:
        assert norms["grad_norm_router"] == pytest.approx(expected, rel=1e-5)


def test_profiling_writes_one_trace_of_the_main_rank(make_config):
    run_dir = train(make_config("run", "steps=12", "profile_steps=2"))  # of two cycles of 4 and 2
    (trace,) = (run_dir / "traces").iterdir()
    assert trace.name == "step-00000005.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {name for name in names if "ProfilerStep" in str(name)} == {"ProfilerStep#4", "ProfilerStep#5"}


def test_activation_checkpointing_changes_no_loss(make_config, monkeypatch):
    asked, build_engine = [], build_module.build_engine
    monkeypatch.setattr(
        build_module,
        "build_engine",
        lambda model, *others: asked.append(model.checkpoint_activations) or build_engine(model, *others),
    )
    plain = losses(train(make_config("plain", *ATTENTION["dash"])))
    for stage in (1, 3):
        options = [*ATTENTION["dash"], "activation_checkpointing=true", f"deepspeed=zero{stage}", "stats_every=2"]
        run_dir = train(make_config(f"zero{stage}", *options))
        assert losses(run_dir) == pytest.approx(plain, rel=1e-6)
    assert asked == [False, True, True]


@pytest.mark.long
def test_compiled_layers_train_alike(make_config, monkeypatch):
    monkeypatch.undo()  # the poisoning of conftest.py, which would be traced
    # Without Inductor, which needs a compiler.
    compile_layers, asked = Transformer.compile_layers, []
    monkeypatch.setattr(
        Transformer, "compile_layers", lambda model: asked.append(compile_layers(model, backend="aot_eager"))
    )
    small = ("model.num_layers=1", "steps=3")
    compiled = train(make_config("compiled", "compile=true", *small))
    assert len(asked) == 1
    monkeypatch.undo()
    assert losses(compiled) == pytest.approx(losses(train(make_config("plain", *small))), rel=1e-4)


def test_the_entry_point_prints_one_message(make_config, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "steps=3", "optim.warmup_steps=5"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        train_module.main()
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: optim.warmup_steps=5")
    assert "Traceback" not in message
    given = []
    monkeypatch.setattr(train_module, "submit_run", lambda *asked: given.append(asked) or "7")
    monkeypatch.setattr("sys.argv", ["train.py", "steps=3", "launcher=slurm"])
    train_module.main()
    assert capsys.readouterr().out == "submitted job 7\n"
    assert [(config.steps, config.launcher.nodes, overrides) for config, overrides in given] == [
        (3, 1, ["steps=3", "launcher=slurm"])
    ]
