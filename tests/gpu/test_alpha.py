"""An alpha outside its range stops a process on a GPU: eagerly, compiled, and when a CUDA graph is replayed.

Each in a process of its own, which the assertion ends.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from dashattn import dash_attention

q, k, v = (torch.randn(1, 300, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
chunk_query = torch.zeros(2, 64, device="cuda")
alpha = torch.full((4,), 1.3, device="cuda")


def attend():
    return dash_attention(q, k, v, chunk_query, alpha=alpha, prior="raw")


if {way!r} == "compiled":
    attend = torch.compile(attend, fullgraph=True)
expected = attend()
if {way!r} == "graph":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dash_attention(q, k, v, chunk_query, alpha=alpha, prior="raw")
    attend = lambda: (graph.replay(), out)[1]
assert torch.equal(attend(), expected)
torch.cuda.synchronize()
print("within")
alpha[2] = {alpha}
attend()
torch.cuda.synchronize()
print("unnoticed")
"""


@pytest.mark.parametrize("way", ["eager", "compiled", "graph"])
@pytest.mark.parametrize("alpha", ["0.9", "torch.nan"])
def test_an_alpha_outside_its_range_stops_the_process(way, alpha):
    command = [sys.executable, "-c", CODE.format(way=way, alpha=alpha)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout.split() == ["within"], done.stderr
    assert "alpha must lie in [1.01, 2.0]" in done.stderr
