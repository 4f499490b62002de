import pytest
import torch
from safetensors.torch import save_file

from dashattn.backends import DashConfig, FullConfig
from experiments.checkpoint import (
    _remove_old,
    find_weights,
    latest_checkpoint,
    load_weights,
    read_state,
)
from experiments.files import write_atomically
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
    assert load_weights(other, dense) == []


def test_a_backends_own_parameters_may_be_new(dense):
    other = model(DashConfig())
    assert load_weights(other, dense) == ["layers.0.attention.backend.chunk_query"]
    torch.manual_seed(0)
    assert torch.equal(other.layers[0].mlp.up_proj.weight, model().layers[0].mlp.up_proj.weight)


def test_every_other_difference_is_an_error(dense, tmp_path):
    with pytest.raises(ValueError, match=r"embedding.weight is \[20, 16\], the model's is \[20, 24\]"):
        load_weights(model(hidden_size=24), dense)
    with pytest.raises(ValueError, match=r"the model's layers.1.* is not in the file"):
        load_weights(model(num_layers=2), dense)
    with pytest.raises(ValueError, match=r"lm_head.weight is not in the model"):
        load_weights(model(tie_embeddings=True), dense)
    sparse = tmp_path / "sparse.safetensors"
    save_file(model(DashConfig()).state_dict(), sparse)
    with pytest.raises(ValueError, match=r"chunk_query is not in the model"):
        load_weights(model(), sparse)


def test_weights_are_found_from_a_run_a_checkpoint_or_a_file(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    weights = checkpoint / "model.safetensors"
    weights.touch()
    (checkpoint / "state.json").touch()
    assert find_weights(tmp_path) == find_weights(checkpoint) == find_weights(weights) == weights
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights in"):
        find_weights(tmp_path / "empty")


def test_latest_decides_and_without_it_the_newest_is_taken(tmp_path):
    for step in (4, 12):
        checkpoint = tmp_path / f"step-{step:08d}"
        checkpoint.mkdir()
        (checkpoint / "state.json").touch()
    (tmp_path / ".step-00000016.tmp").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000012"
    write_atomically(tmp_path / "latest", "step-00000004\n")
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_a_run_set_back_keeps_what_it_writes(tmp_path):
    for step in (1, 2, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    _remove_old(tmp_path, "step-00000002", keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000009"]


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "state.json").write_text('{"step": ')
    with pytest.raises(ValueError, match=r"state.json is damaged .* another checkpoint into"):
        read_state(tmp_path)


def test_a_pointer_to_nothing_is_refused(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    write_atomically(tmp_path / "latest", "step-00000009\n")
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        latest_checkpoint(tmp_path)
