"""Models whose ranks share rows, and what one rank computes: sequence_cases.py FOLDER CASE..., as torchrun starts it"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from dashattn.backends import AttentionConfig, DashConfig, FullConfig, IndexerConfig, InfLLMv2Config, NSAConfig
from models import ModelConfig, Transformer

LENGTH = 48
SHAPE = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=128,
    init_std=0.1,
    qk_norm="head",
)
SIZES = dict(block_size=8, kernel_size=4, kernel_stride=2)
BACKENDS = {
    "full": FullConfig(),
    "dash": DashConfig(chunk_size=8, prior="raw", alpha_mode="learnable"),
    "dash-unrotated": DashConfig(chunk_size=4, prior="raw", init_chunks=1, summary_keys="unrotated"),
    "dash-rotated": DashConfig(chunk_size=8, sigma=1.0, prior_heads="head", summary_rope="mean"),
    "dash-topp": DashConfig(chunk_size=8, selector="topp", top_p=0.6, sigma=1.0, local_chunks=1),
    "hils": DashConfig(chunk_size=8, selector="topk", topk=3, prior="mass"),
    "indexer": IndexerConfig(block_size=8, index_size=12, topk=3, init_blocks=0, local_blocks=0),
    "indexer-prior": IndexerConfig(
        block_size=8, index_size=12, selector="topp", top_p=0.6, init_blocks=0, local_blocks=0, gradient="prior"
    ),
    "infllmv2": InfLLMv2Config(**SIZES, topk=3, window_size=8),
    "nsa": NSAConfig(**SIZES, topk=3, window_size=8),
    "nsa-own-kv": NSAConfig(**SIZES, topk=3, window_size=8, shared_kv=False),
    "nsa-minicpm": NSAConfig(**SIZES, variant="minicpm", topk=3, window_size=0),
}
ONE_ROUTER = {"1": {"share_selection_from": 0}}


@dataclass(frozen=True)
class Case:
    attention: AttentionConfig
    size: int  # ranks that share a row
    shape: dict = field(default_factory=dict)
    packed: bool = False
    checkpointed: bool = False
    compiled: bool = False


CASES = {
    **{f"{name}-packed": Case(attention, 2, packed=True) for name, attention in BACKENDS.items()},
    **{f"{name}-one-kv-head": Case(attention, 2, {"num_kv_heads": 1}) for name, attention in BACKENDS.items()},
    # Rank 0 attends for heads 0-1 and so for the first group of three, rank 1 for heads 2-3 and for both groups.
    **{
        f"{name}-groups-cut": Case(BACKENDS[name], 3, {"num_heads": 6}, packed=True)
        for name in ("full", "dash", "hils", "indexer", "indexer-prior", "nsa-own-kv")
    },
    "full-no-groups": Case(FullConfig(), 2, {"num_kv_heads": 4}),
    "full-wide-norm": Case(FullConfig(), 2, {"qk_norm": "width", "norm_position": "post", "no_rope_layers": [1]}),
    "dash-checkpointed": Case(BACKENDS["dash"], 2, checkpointed=True),
    **{
        f"{name}-shared": Case(replace(BACKENDS[name], layers=ONE_ROUTER), 3, {"num_heads": 6}, packed=True)
        for name in ("dash", "indexer", "indexer-prior", "infllmv2")
    },
    "full-compiled": Case(FullConfig(), 2, compiled=True),
}


def compute(case: Case, group: torch.distributed.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Loss, token losses, gradients and active tokens of a model on two rows, or on one of packed documents; without a
    group on one rank alone, with one what this rank has of them."""
    torch.manual_seed(0)
    model = Transformer(replace(SHAPE, **case.shape), case.attention)
    with torch.no_grad():
        for backend in model.backends:
            for parameter in backend.parameters():  # some begin with zeros, and would stay unseen
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if group is not None:
        model.share_sequences(group)
    model.checkpoint_activations = case.checkpointed
    if case.compiled:
        model.compile_layers(backend="aot_eager")
    rows = 1 if case.packed else 2
    input_ids, labels = torch.randint(SHAPE.vocab_size, (2, rows, LENGTH))
    labels[:, 5:30] = -100  # the ranks have different numbers of targets
    cu_seqlens = torch.tensor([0, 1, 31, LENGTH], dtype=torch.int32) if case.packed else None
    output = model(input_ids, labels=labels, cu_seqlens=cu_seqlens, return_stats=True)
    auxiliary_loss = torch.zeros(()) if output.auxiliary_loss is None else output.auxiliary_loss
    (output.loss + auxiliary_loss).backward()
    return {
        "loss": output.loss.detach(),
        **({} if output.auxiliary_loss is None else {"auxiliary_loss": auxiliary_loss.detach()}),
        "token_losses": output.token_losses,
        "active": torch.stack([stats.active_tokens for stats in output.stats]),
        **{name: parameter.grad for name, parameter in model.named_parameters()},
    }


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = {size: torch.distributed.new_group(range(size)) for size in range(2, world_size + 1)}
    results = {name: compute(CASES[name], groups[CASES[name].size]) for name in names if rank < CASES[name].size}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
