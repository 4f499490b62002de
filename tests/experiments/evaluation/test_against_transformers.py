"""A checkpoint of transformers under our evaluation, harness and generation, with transformers as the other side."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from data import build_tokenizer
from experiments.evaluation.config import EvaluateConfig
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.evaluation.target import build_model, validation_stream
from models.generate import Sampling, generate
from train import train

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from experiments.evaluation.harness import HarnessModel

SHORT_LENGTH = 32
LONGROPE = {
    **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": SHORT_LENGTH, "rope_theta": 1e4},
    **{"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]},
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "longrope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LONGROPE}),
    "qwen3, tied": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
}


@pytest.fixture(params=KINDS)
def pair(request, make_config, tmp_path):
    """(a random model of transformers, the directory of a run that starts from it and changes nothing)."""
    torch.manual_seed(0)
    config_class, model_class, changes = KINDS[request.param]
    shape = make_config("shape").model
    options = dict(
        vocab_size=300,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_seq_len,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    theirs = model_class(config_class(**options | changes)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    data = make_config("shape").data
    build_tokenizer(data, make_config("shape").cache_dir).save(folder / "tokenizer.json")
    overrides = ["model=checkpoint", f"init_from={folder}", "optim.lr=1e-30", "optim.warmup_steps=0", "steps=1"]
    run_dir = train(make_config("run", *overrides))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), run_dir


def their_loss(model, ids, labels=None):
    """Nats per target, by transformers' own loss."""
    ids_BT = torch.tensor([ids])
    labels_BT = ids_BT if labels is None else torch.tensor([labels])
    with torch.no_grad():
        given = {"labels": labels_BT} if labels is None else {"labels": labels_BT, "shift_labels": labels_BT}
        return model(ids_BT, **given).loss.item()


def test_three_losses_of_one_text_agree(pair):
    theirs, run_dir = pair
    config = EvaluateConfig(run=str(run_dir), tasks=["loss"], rows=3, device="cpu")
    (row,) = evaluate(config, find_target(config))
    lm = HarnessModel(str(run_dir), device="cpu", batch_size=3)
    stream = validation_stream(find_target(config))
    expected, scored, targets = 0.0, [], 0
    for _, batch in zip(range(3), stream, strict=False):  # of one row each
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        for first, last in batch.cu_seqlens.unfold(0, 2, 1).tolist():
            asked = [label for label in labels[first:last] if label >= 0]
            if not asked:
                continue
            expected += len(asked) * their_loss(theirs, ids[first:last], labels[first:last])
            scored.append((None, ids[first : first + 1], asked))
            targets += len(asked)
    assert targets > 150
    assert row["score"] == pytest.approx(expected / targets, abs=1e-5)
    log_p = sum(score for score, _ in lm._loglikelihood_tokens(scored, disable_tqdm=True))
    assert row["score"] == pytest.approx(-log_p / targets, abs=1e-5)


def test_rolling_log_likelihoods_are_transformers_loss(pair):
    theirs, run_dir = pair
    lm = HarnessModel(str(run_dir), device="cpu", batch_size=3)
    texts = ["import os\n\n\ndef main():\n    print(os.getcwd())\n" * 3, "x = 1\n", "class A:\n    pass\n"]
    totals = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), 0) for t in texts], True)
    for text, total in zip(texts, totals, strict=True):
        ids = lm.tok_encode(text)
        assert total == pytest.approx(-len(ids) * their_loss(theirs, [lm.prefix_token_id, *ids]), abs=1e-5 * len(ids))
    assert len(lm.tok_encode(texts[0])) > SHORT_LENGTH > len(lm.tok_encode(texts[1]))  # beside each other in a batch


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_tokens_are_those_of_transformers(pair, penalty):
    """Of prompts of different length at once against one by one; without a cache, since transformers keeps keys that
    longrope has turned by other factors."""
    theirs, run_dir = pair
    model = build_model(find_target(EvaluateConfig(run=str(run_dir), device="cpu")))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(300, (length,), generator=generator).tolist() for length in (1, 23, 50, 31)]
    ours = generate(model, prompts, max_new_tokens=24, sampling=Sampling(repetition_penalty=penalty))
    for prompt, new in zip(prompts, ours, strict=True):
        options = dict(max_new_tokens=24, do_sample=False, use_cache=False, repetition_penalty=penalty)
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        assert new == expected[0, len(prompt) :].tolist()
