"""Every backend's error against float64, into DIRECTORY/numerics.jsonl.

    python -m experiments.speed.numerics DIRECTORY [LENGTH]

The whole operation, forward and backward, on inputs that the dtype represents exactly; a selection that came out
another way is part of the error, and ``rows_selected_differently`` says how much of it there is. On a GPU with the
kernels, elsewhere the reference in lower precision.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dashattn.backends import BACKENDS, AttentionBackend, AttentionConfig, AttentionShape, build_backend
from experiments.arguments import parse
from experiments.errors import user_errors
from experiments.files import NUMERICS, append_rows, columns_of, read_rows
from experiments.provenance import now, provenance
from experiments.schema import DTYPES

SHAPE = AttentionShape(hidden_size=512, num_heads=8, num_kv_heads=2, head_dim=64)
CONFIGS: dict[str, AttentionConfig] = {
    name: sample for config, _ in BACKENDS.own.values() for name, sample in config.samples().items()
}


def measure(name: str, dtype: str, length: int, device: str) -> Iterator[dict]:
    """A row for the output and for each gradient of one backend."""
    torch.manual_seed(0)
    backend = build_backend(CONFIGS[name], SHAPE)
    for parameter in backend.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    q, k, v = (torch.randn(1, length, h, SHAPE.head_dim) for h in heads)
    inputs = {"q": q, "k": k, "v": v, "hidden": torch.randn(1, length, SHAPE.hidden_size), "out": torch.randn_like(q)}
    inputs = {key: x.to(DTYPES[dtype]).double() for key, x in inputs.items()}
    backend = backend.to(DTYPES[dtype]).double()
    exact, exact_selection = _run(backend, inputs)
    backend = backend.to(device, DTYPES[dtype])
    found, selection = _run(backend, {key: x.to(device, DTYPES[dtype]) for key, x in inputs.items()})
    differing = None
    if selection is not None:
        differing = (selection.cpu() != exact_selection).any(-1).double().mean().item()
    for tensor, value in exact.items():
        error = (found[tensor].cpu().double() - value).norm() / value.norm()
        yield {"tensor": tensor, "error": error.item(), "rows_selected_differently": differing}


def _run(backend: AttentionBackend, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Output and gradients, and the selected blocks as words."""
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out = backend(q, k, v, hidden=inputs["hidden"])
    gradients = torch.autograd.grad(out, (q, k, v), inputs["out"])
    with torch.no_grad():
        routing = backend.route(q, k, v, hidden=inputs["hidden"])
    tensors = {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return tensors, None if routing is None else routing.selection.words


def write_numerics(root: Path, length: int) -> int:
    """Measures what is missing in ``root``; returns how many rows were added."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = DTYPES if device == "cuda" else ("fp32", "bf16")
    root.mkdir(parents=True, exist_ok=True)
    where = provenance(device)
    common = {
        "device": where["device"],
        "impl": "auto" if device == "cuda" else "reference",
        "length": length,
        "torch": torch.__version__,
    }
    keys = (*common, "backend", "dtype")
    common |= {"date": now(), "git_sha": where["git_sha"], "dirty": where["dirty"]}
    done = {tuple(row[key] for key in keys) for row in read_rows(root / NUMERICS)}
    count = 0
    for name in CONFIGS:
        for dtype in dtypes:
            columns = common | {"backend": name, "dtype": dtype}
            if tuple(columns[key] for key in keys) not in done:
                rows = [columns | row for row in measure(name, dtype, length, device)]
                count += len(append_rows(root / NUMERICS, rows, partial(columns_of, names=keys)))
    return count


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        given = parse("experiments.speed.numerics", arguments)
        if given.length < 1:
            raise ValueError(f"LENGTH is {given.length}: at least 1 is needed")
        count = write_numerics(given.directory, given.length)
    print(f"{count} new rows in {given.directory / NUMERICS}")


if __name__ == "__main__":
    main(sys.argv[1:])
