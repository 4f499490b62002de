import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dashattn.backends import DashConfig, FullConfig, IndexerConfig, InfLLMv2Config, NSAConfig
from experiments.errors import Stopped
from experiments.files import write_atomically
from experiments.training.checkpoint import (
    _remove_old,
    damage,
    latest_checkpoint,
    read_manifest,
    read_state,
    save_checkpoint,
    seal,
    write_checkpoint,
)
from experiments.training.ranks import Ranks
from experiments.training.weights import Loaded, find_weights, load_weights
from models import ModelConfig, Transformer


def model(attention=None, **shape):
    sizes = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    return Transformer(ModelConfig(**sizes | shape, max_seq_len=32, vocab_size=20), attention or FullConfig())


@pytest.fixture
def dense(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(model().state_dict(), path)
    return path


def test_weights_fit_the_same_model(dense):
    other = model()
    assert not load_weights(other, dense).differs


def test_a_backends_own_parameters_may_be_new(dense):
    other = model(DashConfig())
    loaded = load_weights(other, dense)
    assert loaded == Loaded(["layers.0.attention.backend.chunk_query"], [])
    assert str(loaded) == "new: attention.backend.chunk_query of layers 0; dropped: none"
    torch.manual_seed(0)
    assert torch.equal(other.layers[0].mlp.up_proj.weight, model().layers[0].mlp.up_proj.weight)


def test_every_other_difference_is_an_error(dense, tmp_path):
    with pytest.raises(ValueError, match=r"embedding.weight is \[20, 16\], the model's is \[20, 24\]"):
        load_weights(model(hidden_size=24), dense)
    lacking = sum(name.startswith("layers.1.") for name in model(num_layers=2).state_dict()) - 4
    with pytest.raises(
        ValueError, match=rf"the model's layers.1.* is not in the file; and {lacking} more. Take"
    ) as told:
        load_weights(model(num_layers=2), dense)
    assert str(told.value).count("is not in the file") == 4
    with pytest.raises(ValueError, match=r"lm_head.weight is not in the model"):
        load_weights(model(tie_embeddings=True), dense)
    surplus = tmp_path / "surplus.safetensors"
    save_file(model(num_layers=2).state_dict(), surplus)
    with pytest.raises(ValueError, match=r"layers.1.attention.k_proj.weight is not in the model"):
        load_weights(model(), surplus)
    deeper = model(DashConfig(), num_layers=2).state_dict()
    save_file(model().state_dict() | {name: x for name, x in deeper.items() if "backend" in name}, surplus)
    with pytest.raises(ValueError, match=r"layers.1.attention.backend.chunk_query is not in the model"):
        load_weights(model(), surplus)


SMALL = {"block_size": 8, "kernel_size": 4, "kernel_stride": 2, "topk": 4}
KINDS = {
    "full": FullConfig(),
    "dash": DashConfig(chunk_size=8, alpha_mode="learnable"),
    "dash but the first": DashConfig(chunk_size=8, layers={"0": "full"}),
    "dash, one router": DashConfig(chunk_size=8, layers={"1": {"share_selection_from": 0}}),
    "infllmv2": InfLLMv2Config(window_size=8, **SMALL),
    "indexer": IndexerConfig(block_size=8, index_size=4, topk=4),
    "nsa": NSAConfig(window_size=8, **SMALL),
    "nsa, own kv": NSAConfig(window_size=8, shared_kv=False, **SMALL),
    "nsa, longer windows": NSAConfig(window_size=8, **SMALL | {"kernel_size": 8}),
    "nsa, minicpm": NSAConfig(variant="minicpm", window_size=0, **SMALL),
}


def trained(attention):
    """Every number another than a model begins with."""
    made = model(attention, num_layers=2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(2, 3)
    return made


@pytest.mark.parametrize("before", KINDS)
def test_any_attention_goes_on_as_any_other(tmp_path, before):
    """The model's weights are taken, and of a layer's backend what it has in common with the one before."""
    source, path = trained(KINDS[before]).state_dict(), tmp_path / "model.safetensors"
    save_file(source, path)
    for after, attention in KINDS.items():
        built = model(attention, num_layers=2)
        fresh = {name: tensor.clone() for name, tensor in built.state_dict().items()}
        loaded = load_weights(built, path)
        own = built.state_dict()
        assert set(loaded.new_parameters) | (source.keys() - set(loaded.dropped_parameters)) == own.keys()
        assert all("attention.backend" in name for name in loaded.new_parameters + loaded.dropped_parameters)
        assert loaded == Loaded(sorted(loaded.new_parameters), sorted(loaded.dropped_parameters))
        for name, tensor in own.items():
            assert torch.equal(tensor, (fresh if name in loaded.new_parameters else source)[name]), (after, name)
        assert loaded.differs == (before != after and {before, after} != {"full", "infllmv2"}), (after, loaded)


def test_what_is_taken_over_is_told_by_layer(tmp_path):
    names = [f"layers.{layer}.attention.backend.a" for layer in (0, 1, 10, 2, 4, 12, 11)]
    assert str(Loaded(names, [])) == "new: attention.backend.a of layers 0-2 4 10-12; dropped: none"
    path = tmp_path / "model.safetensors"

    def load(before, after):
        save_file(trained(KINDS[before]).state_dict(), path)
        return str(load_weights(model(KINDS[after], num_layers=2), path))

    query, alpha = "attention.backend.chunk_query", "attention.backend.alpha_logit"
    assert load("dash", "dash but the first") == f"new: none; dropped: {alpha} of layers 0-1, {query} of layers 0"
    assert load("dash but the first", "dash") == f"new: {alpha} of layers 0-1, {query} of layers 0; dropped: none"
    # Windows of another length are compressed by other networks, of which no part is left among the new ones.
    assert load("nsa", "nsa, longer windows").count("compress_k.down.bias of layers 0-1") == 2


@pytest.fixture
def checkpoint(tmp_path):
    """A complete checkpoint as far as its files go."""
    path = tmp_path / "checkpoints" / "step-00000004"
    (path / "deepspeed").mkdir(parents=True)
    (path / "deepspeed" / "optimizer.pt").write_bytes(b"0123")
    (path / "model.safetensors").write_bytes(b"4567")
    (path / "state.json").write_text(json.dumps({"step": 4}))
    seal(path, Ranks(0, 1, torch.device("cpu")))
    return path


def test_weights_are_found_from_a_run_a_checkpoint_or_a_file(tmp_path, checkpoint):
    weights = checkpoint / "model.safetensors"
    assert find_weights(tmp_path) == find_weights(checkpoint) == find_weights(weights) == weights
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no intact weights in"):
        find_weights(tmp_path / "empty")
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        find_weights(tmp_path / "new")


def test_damaged_weights_are_not_read_nor_older_ones_instead(tmp_path, checkpoint):
    write_atomically(checkpoint.parent / "latest", "step-00000008\n")
    with pytest.raises(ValueError, match=r"no intact weights in .*step-00000008 \(manifest.json cannot be read"):
        find_weights(tmp_path)
    write_atomically(checkpoint.parent / "latest", "step-00000004\n")
    (checkpoint / "model.safetensors").write_bytes(b"4566")
    with pytest.raises(ValueError, match=r"no intact weights .*model.safetensors has another checksum"):
        find_weights(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"no intact weights .*model.safetensors has another checksum"):
        find_weights(tmp_path)


def test_of_a_checkpoint_all_is_intact_that_says_what_its_weights_are(tmp_path, checkpoint):
    """A digit of its configuration changes every score."""
    (checkpoint / "config.yaml").write_text("rope: {theta: 10000}\n")
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, Ranks(0, 1, torch.device("cpu")))
    flip_a_bit(checkpoint / "deepspeed" / "optimizer.pt")  # which only a resumption reads
    assert find_weights(tmp_path) == checkpoint / "model.safetensors"
    (checkpoint / "config.yaml").write_text("rope: {theta: 10001}\n")
    with pytest.raises(ValueError, match=r"no intact weights .*config\.yaml has another checksum"):
        find_weights(tmp_path)
    weights = checkpoint / "model.safetensors"
    assert find_weights(weights) == weights, "who names the weights alone reads nothing else"


def test_latest_decides_and_without_it_the_newest_is_taken(tmp_path):
    for step in (4, 12):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / ".step-00000016.tmp").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000012"
    write_atomically(tmp_path / "latest", "step-00000004\n")
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_a_damaged_one_makes_way_to_the_one_before(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (4, 8, 12):
        (tmp_path / f"step-{step:08d}").mkdir()
    write_atomically(tmp_path / "latest", "step-00000012\n")
    assert latest_checkpoint(tmp_path, {"step-00000012": "why"}).name == "step-00000008"
    write_atomically(tmp_path / "latest", "step-00000009\n")
    with pytest.raises(ValueError, match=r"is intact .*step-00000009: why"):
        latest_checkpoint(tmp_path, {f"step-{step:08d}": "why" for step in (4, 8, 9)})


GARBLED = [
    b"",
    b"\n",
    b"step-\n",
    b"step-0000\xff",
    b"../..",
    b"zzz\n",
    b"step-00000012.tmp",
    b"damaged-step-00000012-1",
]


@pytest.mark.parametrize("content", GARBLED)
def test_a_garbled_pointer_hides_no_checkpoint(tmp_path, content):
    for step in (4, 12):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "latest").write_bytes(content)
    assert latest_checkpoint(tmp_path).name == "step-00000012"
    assert latest_checkpoint(tmp_path, {"step-00000012": "why"}).name == "step-00000004"
    with pytest.raises(ValueError, match="is intact"):
        latest_checkpoint(tmp_path, {f"step-{step:08d}": "why" for step in (4, 12)})


def test_a_pointer_to_a_step_that_was_never_there_hides_no_later_one(tmp_path):
    write_atomically(tmp_path / "latest", "step-00000000\n")
    (tmp_path / "step-00000004").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: (path / "deepspeed/optimizer.pt").unlink(), "deepspeed/optimizer.pt is missing"),
        (lambda path: (path / "deepspeed/optimizer.pt").write_bytes(b"01"), "has 2 bytes instead of 4"),
        (lambda path: flip_a_bit(path / "deepspeed/optimizer.pt"), "deepspeed/optimizer.pt has another checksum"),
        (lambda path: flip_a_bit(path / "state.json"), "state.json has another checksum"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("{}"), "state.json is not in manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"state.json": 1}'), "it holds no checksums"),
    ],
)
def test_every_damage_is_seen(checkpoint, harm, message):
    assert damage(checkpoint) == []
    harm(checkpoint)
    problem = damage(checkpoint)[0]
    assert message in problem
    assert str(checkpoint) not in problem
    assert "take another" not in problem, "the mend is for who asked for this checkpoint"


def test_ranks_share_the_checksums_and_together_see_all(checkpoint):
    for name in ("deepspeed/optimizer.pt", "model.safetensors", "state.json"):
        flip_a_bit(checkpoint / name)
    shares = [damage(checkpoint, rank=rank, world_size=2) for rank in range(2)]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == damage(checkpoint)


def test_ranks_share_the_sealing_and_together_seal_all(tmp_path):
    for name in "abcde":
        (tmp_path / name).write_text(name)
    shares = []

    def ranks(rank):
        gather = lambda own: shares.append(own) or shares  # noqa: E731
        return SimpleNamespace(rank=rank, world_size=2, is_main=rank == 0, gather=gather, barrier=lambda: None)

    seal(tmp_path, ranks(1))
    assert not (tmp_path / "manifest.json").exists()
    seal(tmp_path, ranks(0))
    assert [sorted(share) for share in shares] == [["b", "d"], ["a", "c", "e"]]
    assert sorted(read_manifest(tmp_path)) == list("abcde")


def test_a_state_says_its_step(tmp_path):
    (tmp_path / "state.json").write_text('{"tokens": 7}')
    with pytest.raises(ValueError, match=r"state\.json is damaged \(it does not say step\): take another checkpoint$"):
        read_state(tmp_path)


def kept(path):
    return sorted(int(p.name.removeprefix("step-")) for p in path.iterdir())


def test_a_run_set_back_keeps_what_it_writes(tmp_path):
    for step in (1, 2, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    _remove_old(tmp_path, "step-00000002", keep=1, keep_every=0)
    assert kept(tmp_path) == [2, 9]


def test_permanent_checkpoints_stay_beside_the_newest(tmp_path):
    for step in range(1, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    _remove_old(tmp_path, "step-00000009", keep=2, keep_every=3)
    assert kept(tmp_path) == [3, 6, 8, 9]
    _remove_old(tmp_path, "step-00000009", keep=0, keep_every=3)
    assert kept(tmp_path) == [3, 6, 8, 9]


class Engine:
    """As much of DeepSpeed's as saving takes."""

    def __init__(self, module, fails=False):
        self.module, self.fails = module, fails

    def save_checkpoint(self, folder, *, tag, save_latest):
        assert not save_latest
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "states.pt").write_bytes(b"states")
        if self.fails:
            raise OSError(28, "No space left on device")


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And with all that it needs, in the place of one of a run that was set back."""
    run, events, fsync, replace = tmp_path / "run", [], os.fsync, os.replace
    (run / "tokenizer").mkdir(parents=True)
    for name in ("config.yaml", "start.json", "git.json", "tokenizer/tokenizer.json", "metrics.jsonl"):
        (run / name).write_text(name)
    target = run / "checkpoints" / "step-00000004"
    (target / "of_before").mkdir(parents=True)
    (target.parent / ".step-00000008.tmp").mkdir()  # of a process that was killed
    (target.parent / ".latest.1.tmp").touch()

    def sync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append((old, new)), replace(old, new)))
    module, ranks = model(), Ranks(0, 1, torch.device("cpu"))
    write_checkpoint(target, {"step": 4}, Engine(module), ranks)
    temporary = target.with_name(".step-00000004.tmp")
    named = events.index((temporary, target))
    own = {"config.yaml", "start.json", "git.json", "tokenizer/tokenizer.json"}
    own |= {"deepspeed/states.pt", "model.safetensors", "state.json"}
    assert set(read_manifest(target)) == own
    assert damage(target) == []
    before = set(events[:named])
    assert {str(temporary / name) for name in (*own, "deepspeed", "tokenizer")} | {str(temporary)} <= before
    assert events[named + 1 :] == [str(target.parent)]
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert all((target / name).read_text() == name for name in own if (run / name).exists())
    assert not (target / "of_before").exists()
    assert (target / "model.safetensors").stat().st_mode == (target / "state.json").stat().st_mode
    weights, read = module.state_dict(), load_file(target / "model.safetensors")
    assert weights.keys() == read.keys()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    with pytest.raises(Stopped, match=r"step-00000005 could not be written .*No space left.*see that .*checkpoints is"):
        write_checkpoint(target.with_name("step-00000005"), {"step": 5}, Engine(module, fails=True), ranks)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("experiments.training.checkpoint.save_file", Mock(side_effect=error))
    with pytest.raises(Stopped, match=r"step-00000005 could not be written .*No space left"):
        write_checkpoint(target.with_name("step-00000005"), {"step": 5}, Engine(module), ranks)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_latest_names_what_was_saved_and_the_oldest_make_way(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "start.json", "git.json"):
        (run / name).write_text(name)
    for step in (2, 4, 6):
        saved = save_checkpoint(
            run / "checkpoints", {"step": step}, Engine(model()), Ranks(0, 1, torch.device("cpu")), keep=1, keep_every=4
        )
        assert saved == run / "checkpoints" / f"step-{step:08d}"
        assert (run / "checkpoints" / "latest").read_text() == saved.name + "\n"
        assert read_state(saved) == {"step": step}
    (run / "checkpoints" / "latest").unlink()
    assert kept(run / "checkpoints") == [4, 6]
