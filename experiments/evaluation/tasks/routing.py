"""What the router finds: at the tokens that answer a question, against the blocks that hold the answer and against
dense attention. Backends without a router give no rows; in a layer that takes over the selection of another, that one's
router is held against the layer's own attention. All blocks counted here lie before the token's own. The router answers
for its candidates: a block that is forced is selected, but no mass of the router can lie on it.

Metrics, means over questions; ``per_head`` holds them by layer and KV head:

    recall, precision            of the selection, against the blocks with the evidence
    mass_recall                  share of dense attention's mass on the blocks that are read, the own one included
    mass_precision               share of the k selected blocks that are among the k heaviest under dense attention
    relevant_mass, entropy,      of the router's probabilities: on the evidence's blocks (where one is a candidate), in
    support                      nats, and the number of blocks above 0
    softmax_relevant_mass,       the same for a softmax over the same scores, where the backend has them
    softmax_entropy
    topk_recall                  of as many blocks: the forced ones, and the highest of that softmax
    dense_relevant_mass          of dense attention itself
    active_blocks                by ``relevant``, the number of blocks that the whole answer needs (MQAR: that hold
                                 pairs), with p10 and p90, of as many as are ``counted``
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dashattn.ops.dtypes import upcast
from dashattn.routing import Routing, past_blocks
from data import IGNORE, BatchStream, MQARDataConfig
from data.prompts import PromptEncoder
from data.task_sets import TaskSet
from experiments.evaluation.tasks.base import Setting, SparsityTally, Task, count, halving, quantiles, row, scatter
from experiments.evaluation.tasks.streams import first_queries

CHUNK_LOGITS = 2**27  # of attention or a router, held at once

Span = tuple[int, int]  # positions [first, last)


@dataclass(frozen=True)
class Probe:
    """A row of tokens, the positions at which answers are predicted, the evidence of each, and all that is needed."""

    input_ids: list[int]
    queries: list[int]
    evidence: list[list[Span]]  # one list a query
    needed: list[Span]

    def parts(self, most: int) -> Iterator["Probe"]:
        """The same row with up to ``most`` of the queries, and then with the others."""
        for i in range(0, len(self.queries), most):
            yield replace(self, queries=self.queries[i : i + most], evidence=self.evidence[i : i + most])


@dataclass(frozen=True)
class Marks:
    """What a probe's queries are about, in blocks of one size.

    Attributes:
        queries_P: the positions.
        past_PN, relevant_PN: bool, the blocks before a query's own, and which of them hold its evidence.
        needed: how many blocks hold what the whole answer needs.
    """

    queries_P: Tensor
    past_PN: Tensor
    relevant_PN: Tensor
    needed: int

    @classmethod
    def of(cls, probe: Probe, queries_P: Tensor, block_size: int) -> "Marks":
        """``queries_P``: the probe's, on the device that the masks are to be on."""
        num_blocks = -(-len(probe.input_ids) // block_size)
        past_PN = past_blocks(queries_P, num_blocks, block_size)
        relevant_PN = block_masks(probe.evidence, num_blocks, block_size).to(past_PN.device) & past_PN
        return cls(queries_P, past_PN, relevant_PN, int(block_masks([probe.needed], num_blocks, block_size).sum()))


def text_probes(task_set: TaskSet, encoder: PromptEncoder) -> Iterator[Probe]:
    """The samples of a task with its references as the answer; where they pair up with the pieces of evidence, each
    reference is looked for in its own."""
    for sample in task_set.samples:
        ids = encoder.encode(sample)
        spans = encoder.evidence(sample)
        references = sample.references if task_set.task.match == "all" else sample.references[:1]
        paired = len(references) == len(spans)
        queries, evidence = [], []
        for i, reference in enumerate(references):
            answer = encoder.tokenizer.encode((" " if i == 0 else ", ") + reference)
            queries += range(len(ids) - 1, len(ids) + len(answer) - 1)
            evidence += [[spans[i]] if paired else spans] * len(answer)
            ids = [*ids, *answer]
        yield Probe(ids, queries, evidence, spans)


def mqar_probes(stream: BatchStream, data: MQARDataConfig) -> Iterator[Probe]:
    """Rows of MQAR: the first query of every key, whose evidence is the key's pair."""
    for batch in stream:
        first_BT = first_queries(batch.input_ids, batch.labels != IGNORE)
        for ids, first in zip(batch.input_ids, first_BT, strict=True):
            queries = first.nonzero().flatten().tolist()
            pairs = [(ids == ids[t]).nonzero()[0].item() for t in queries]
            is_key = (ids >= data.num_fillers) & (ids < data.num_fillers + data.num_keys)
            held = is_key[: len(ids) // 2].nonzero().flatten().tolist()
            yield Probe(ids.tolist(), queries, [[(s, s + 2)] for s in pairs], [(s, s + 2) for s in held])


class RoutingTask(Task):
    """Diagnostics on probes of one kind and length."""

    names = ("routing",)

    def __init__(self, name: str, probes: Sequence[Probe], columns: dict) -> None:
        """``name`` and ``columns``: of the task that the probes stem from."""
        self.probes = probes
        self.columns = columns | {"rows": len(probes), "probe": name}

    def run(self, setting: Setting, names: Sequence[str]) -> Iterator[dict]:
        measured = Measured()
        for done, probe in enumerate(self.probes, start=1):
            halving(lambda _: observe(setting, probe, measured), 1)  # noqa: B023
            setting.advance(done / len(self.probes))
        if not measured.sums:
            return
        sparsity = measured.sparsity.columns()
        for metric, total_LH in measured.sums.items():
            count_LH = measured.counts[metric]
            if count_LH.sum() == 0:  # no query for which it is defined
                continue
            score = (total_LH.sum() / count_LH.sum()).item()
            per_head = [
                [t / n if n else None for t, n in zip(totals, counts, strict=True)]
                for totals, counts in zip(total_LH.tolist(), count_LH.tolist(), strict=True)
            ]
            yield sparsity | row("routing", metric, score, per_head=per_head, **scatter(*measured.probes[metric]))
        for relevant, counts in sorted(measured.active.items()):
            low, _, high = quantiles(counts)
            score = (counts * torch.arange(len(counts))).sum().item() / counts.sum().item()
            found = {"relevant": relevant, "p10": low, "p90": high, "counted": int(counts.sum())}
            yield sparsity | row("routing", "active_blocks", score, **found)


class Measured:
    """Sums over queries, float64 [L, H] on the CPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.probes: dict[str, tuple[list[float], list[float]]] = {}  # over layers and heads, of each probe
        self.active: dict[int, Tensor] = {}  # by the number of blocks needed, counts of selected ones
        self.sparsity = SparsityTally()

    def add(self, layers: list[dict[str, Tensor]]) -> None:
        """One probe: for every layer and metric, sum and count over its queries, float64 [2, H]."""
        totals = torch.stack([layer[metric] for metric in layers[0] for layer in layers]).cpu()  # waits for the device
        for metric, totals_L2H in zip(layers[0], totals.split(len(layers)), strict=True):
            sums, counts = totals_L2H.unbind(1)
            self.sums[metric] = self.sums.get(metric, 0) + sums
            self.counts[metric] = self.counts.get(metric, 0) + counts
            of_probes = self.probes.setdefault(metric, ([], []))
            of_probes[0].append(sums.sum().item())
            of_probes[1].append(counts.sum().item())


@torch.inference_mode()
def observe(setting: Setting, probe: Probe, measured: Measured) -> None:
    """One forward pass; every layer's router is asked on its inputs as they come by."""
    layers: list[dict[str, Tensor]] = []
    active: defaultdict[int, list[Tensor]] = defaultdict(list)  # by the number of blocks needed
    sources = {backend.source for backend in setting.model.backends}
    routings: dict[int, list[Routing | None]] = {}  # of layers that others take over from, in parts
    # As many queries at once as scores of all tokens, which are more than those of blocks, may be held of.
    most = max(1, CHUNK_LOGITS // (len(probe.input_ids) * setting.model.config.num_heads))
    parts = [(part, torch.tensor(part.queries, device=setting.device)) for part in probe.parts(most)]

    @cache  # for all layers, which seldom differ in the size
    def marks_of_parts(block_size: int) -> list[Marks]:
        return [Marks.of(*part, block_size) for part in parts]

    def look(index, backend, args, kwargs):
        # On a GPU the number of operations is what costs, and whatever waits for it: results stay there until the end.
        q, k, v = args
        scores: dict[str, Tensor] = {}
        for number, (_, positions) in enumerate(parts):
            if backend.source is None:
                routing = backend.route(q, k, v, hidden=kwargs["hidden"], rope=kwargs["rope"], positions=positions)
                if index in sources:
                    routings.setdefault(index, []).append(routing)
            else:  # what was chosen there, against what is attended to here
                routing = routings[backend.source][number]
            if routing is None:
                return
            marks = marks_of_parts(routing.selection.block_size)[number]
            of_part, selected_PH = score_routing(routing, q, k, marks)
            scores = {metric: scores[metric] + found if scores else found for metric, found in of_part.items()}
            active[marks.needed].append(selected_PH.flatten())
        layers.append(scores)

    hooks = [
        backend.register_forward_pre_hook(partial(look, index), with_kwargs=True)
        for index, backend in enumerate(setting.model.backends)
    ]
    try:
        ids = torch.tensor([probe.input_ids], device=setting.device)
        measured.sparsity.add(setting.model.hidden_states(ids, return_stats=True)[1], packed=False)
    finally:
        for hook in hooks:
            hook.remove()
    if layers:
        measured.add(layers)
    for needed, selected in active.items():
        measured.active[needed] = count(torch.cat(selected).cpu(), measured.active.get(needed))


def block_masks(spans: list[list[Span]], num_blocks: int, size: int) -> Tensor:
    """Bool [P, N] on the CPU: blocks that hold a token of any of each query's spans, which may overlap."""
    ends = [(p, first // size, (last - 1) // size + 1) for p, own in enumerate(spans) for first, last in own]
    query, first, after = torch.tensor(ends, dtype=torch.long).view(-1, 3).unbind(1)
    # One more span from its first block on, one less behind its last.
    change_PN = torch.zeros(len(spans), num_blocks + 1, dtype=torch.long)
    for block, by in ((first, 1), (after, -1)):
        change_PN.index_put_((query, block), torch.tensor(by), accumulate=True)
    return change_PN.cumsum(1)[:, :-1] > 0


def dense_block_mass(q_BTHD: Tensor, k_BTHD: Tensor, queries_P: Tensor, block_size: int) -> Tensor:
    """Dense attention's mass on every block, mean over the group: [P, Hkv, N] at the positions ``queries_P``."""
    length, num_kv_heads = k_BTHD.shape[1:3]
    q_PHGD = upcast(q_BTHD[0, queries_P]).unflatten(1, (num_kv_heads, -1)) * q_BTHD.shape[-1] ** -0.5
    logits = torch.einsum("phgd,shd->phgs", q_PHGD, upcast(k_BTHD[0]))
    future = torch.arange(length, device=queries_P.device) > queries_P[:, None]
    p_PHS = logits.masked_fill(future[:, None, None], -torch.inf).softmax(-1).mean(2)
    return F.pad(p_PHS, (0, -length % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def score_routing(routing: Routing, q: Tensor, k: Tensor, marks: Marks) -> tuple[dict[str, Tensor], Tensor]:
    """(metric -> sum and count over the queries, float64 [2, Hkv]; selected blocks [P, Hkv]). ``routing``: of the
    queries."""
    (p_PHN,) = routing.probabilities
    num_blocks, size = p_PHN.shape[-1], routing.selection.block_size
    past_PHN, relevant_PHN = (x_PN[:, None].expand_as(p_PHN) for x_PN in (marks.past_PN, marks.relevant_PN))
    selected_PHN = routing.selection.mask()[0, ..., :num_blocks] & past_PHN
    candidates_PHN = past_PHN
    if routing.logits is not None:
        logits_PHGN = routing.logits[0].unflatten(1, (p_PHN.shape[1], -1))
        candidates_PHN = (logits_PHGN > -torch.inf).any(2)
    mass_PHN = dense_block_mass(q, k, marks.queries_P, size)

    k_PH = selected_PHN.sum(-1)
    found_PH, relevant_PH = (selected_PHN & relevant_PHN).sum(-1), relevant_PHN.sum(-1)
    is_asked, any_past = relevant_PH > 0, past_PHN.any(-1)
    has_choice, can_find = candidates_PHN.any(-1), (relevant_PHN & candidates_PHN).any(-1)
    entropy_PH = torch.special.entr(p_PHN).sum(-1)
    heavy_PHN = highest(mass_PHN.masked_fill(~past_PHN, -1), k_PH)
    read_mass_PH = 1 - mass_PHN.masked_fill(selected_PHN | ~past_PHN, 0).sum(-1)
    values = {
        "recall": (found_PH / relevant_PH, is_asked),
        "precision": (found_PH / k_PH, is_asked & (k_PH > 0)),
        "mass_recall": (read_mass_PH, any_past),
        "mass_precision": ((selected_PHN & heavy_PHN).sum(-1) / k_PH, k_PH > 0),
        "relevant_mass": (p_PHN.masked_fill(~relevant_PHN, 0).sum(-1), can_find),
        "entropy": (entropy_PH, has_choice),
        "support": ((p_PHN > 0).sum(-1, dtype=p_PHN.dtype), has_choice),
        "dense_relevant_mass": (mass_PHN.masked_fill(~relevant_PHN, 0).sum(-1), is_asked),
    }
    if routing.logits is not None:
        # Where nothing is a candidate, softmax gives NaN.
        softmax_PHN = logits_PHGN.softmax(-1).mean(2).masked_fill(~candidates_PHN, 0)
        forced_PHN = past_PHN & ~candidates_PHN
        top_PHN = highest(softmax_PHN.masked_fill(~candidates_PHN, -1), k_PH - forced_PHN.sum(-1)) | forced_PHN
        values |= {
            "softmax_relevant_mass": (softmax_PHN.masked_fill(~relevant_PHN, 0).sum(-1), can_find),
            "softmax_entropy": (torch.special.entr(softmax_PHN).sum(-1), has_choice),
            "topk_recall": ((top_PHN & relevant_PHN).sum(-1) / relevant_PH, is_asked),
        }
    value_MPH, counts_MPH = map(torch.stack, zip(*values.values(), strict=True))
    sum_MH = value_MPH.double().masked_fill(~counts_MPH, 0).sum(1)
    totals_M2H = torch.stack([sum_MH, counts_MPH.sum(1, dtype=sum_MH.dtype)], 1)
    return dict(zip(values, totals_M2H, strict=True)), k_PH


def highest(values_PHN: Tensor, k_PH: Tensor) -> Tensor:
    """Bool [P, H, N]: the ``k_PH`` highest of each row."""
    rank = values_PHN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < k_PH[..., None]
