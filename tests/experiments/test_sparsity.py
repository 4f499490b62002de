"""The search for a knob and the holding of a sparsity, without a model."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from dashattn.backends import DashConfig, FullConfig, InfLLMv2Config, NSAConfig
from data import Batch
from experiments.sparsity import TOLERANCE, Hold, calibrate, check_found, check_reachable, find_knob, knob_span
from experiments.training.run import is_measured
from models import ModelConfig, Transformer

SCALES = DashConfig().knob_span(1)


def smooth(centre, most=0.97):
    """Sparsity that rises with the knob's logarithm and ends in plateaus."""
    return lambda knob: min(most, max(0.0, 1 / (1 + (centre / knob) ** 1.2) - 0.02))


def of_blocks(blocks):
    """Causal sparsity of top-k over rows of so many blocks of 64."""
    own = 64 * 65 // 2  # keys of a block's own tokens, up to each of them
    dense = sum(64 * 64 * block + own for block in range(blocks))
    return lambda topk: 1 - sum(64 * 64 * (min(topk, block + 1) - 1) + own for block in range(blocks)) / dense


def observed(measure):
    calls = []
    return calls, lambda knob: calls.append(knob) or measure(knob)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("centre", [1e-3, 0.2, 1.0, 300.0, 2e4])
def test_a_continuous_knob_is_found_wherever_it_lies(centre, target):
    calls, measure = observed(smooth(centre))
    found = find_knob(measure, target, SCALES, 1.0)
    assert abs(smooth(centre)(found.knob) - target) <= 0.001
    assert found.sparsity == smooth(centre)(found.knob)
    assert len(calls) == len(set(calls)) == len(found.tried) <= 12


def of_share(concentration, blocks=128):
    """Causal sparsity of top-p where a row's probabilities fall geometrically, from flat to peaked."""

    def measure(top_p):
        whole = 1 - math.exp(-concentration)
        reached = -math.log1p(-top_p * whole) / concentration if top_p < 1 else 1.0
        return 1 - max(reached, 1 / blocks)

    return measure


@pytest.mark.parametrize("target", [0.1, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("concentration", [1e-3, 3.0, 8.0])
def test_a_share_is_found_and_held(concentration, target):
    span = DashConfig(selector="topp").knob_span(8192)
    found = find_knob(of_share(concentration), target, span, 0.9)
    assert abs(found.sparsity - target) <= 0.001
    hold, sparsities = Hold(target, span, 0.9), []
    for step in range(120):
        sparsities.append(of_share(concentration * 1.005**step)(hold.knob))
        hold.update(sparsities[-1])
        assert 0 < hold.knob <= 1
    assert all(abs(sparsity - target) < 0.02 for sparsity in sparsities[-30:])


@pytest.mark.parametrize(
    ("measure", "target", "span", "start", "tried"),
    [
        # By 4, 16 and 256 until the target is between two; then along their log-odds, halving after two on one side.
        (smooth(30.0), 0.75, SCALES, 1.0, [1.0, 4.0, 64.0, 16384.0, 115.906, 86.1279, 74.2441, 82.131]),
        (smooth(0.01), 0.2, SCALES, 1.0, [1.0, 0.25, 0.015625, 6.10352e-05, 0.00391351, 0.00317847, 0.00348474]),
        (of_blocks(128), 0.75, (128, 2), 64, [64, 16, 17, 33, 18]),
        (of_blocks(128), 0.1, (128, 2), 4, [4, 16, 128, 38, 56, 85, 104, 87, 88]),
        (of_share(3.0), 0.75, (1.0, 1e-5), 0.9, [0.9, 0.692308, 0.123288, 0.563265, 0.535843, 0.555297]),
        (of_share(8.0), 0.001, (1.0, 1e-5), 0.9, [0.9, 0.972973, 0.998267, 0.999993, 1.0]),
        (
            lambda knob: 0.2 if knob < 3 else 0.8,
            0.5,
            (1.0, 64.0),
            1.0,
            [1.0, 4.0, 2.0, 2.828427, 3.363586],
        ),  # of 5 passes
    ],
)
def test_where_the_search_looks(measure, target, span, start, tried):
    found = find_knob(measure, target, span, start, **({"passes": 5} if span == (1.0, 64.0) else {}))
    assert list(found.tried) == pytest.approx(tried, rel=1e-5)
    measured = [[knob, measure(knob)] for knob in found.tried]
    assert found.record() == {"knob": found.knob, "sparsity": measure(found.knob), "tried": measured}


def test_a_hold_moves_by_four_fifths_of_the_log_odds_and_no_further_than_a_fifth():
    miss = 0.8 * (math.log(0.75 / 0.25) - math.log(0.76 / 0.24))
    steps = (0.2, miss, 0.2, -0.2, 0.0)
    for span, knob, coordinate, sign in (
        (SCALES, 1.0, math.log, 1),
        ((1.0, 1e-5), 0.9, lambda knob: math.log(knob / (1 - knob)), -1),
    ):
        hold, place = Hold(0.75, span, knob), coordinate(knob)
        for sparsity, step in zip((0.7, 0.76, 0.0, 1.0, 0.75), steps, strict=True):
            place += sign * step
            assert coordinate(hold.update(sparsity)) == pytest.approx(place)


@pytest.mark.parametrize("blocks", [8, 128, 256])
@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 0.75, 0.9, 0.97])
def test_an_integer_knob_is_the_nearest(blocks, target):
    calls, measure = observed(of_blocks(blocks))
    found = find_knob(measure, target, (blocks, 2), min(64, blocks))
    misses = {topk: abs(of_blocks(blocks)(topk) - target) for topk in range(2, blocks + 1)}
    assert misses[found.knob] <= min(misses.values()) + 0.001
    assert isinstance(found.knob, int)
    assert len(calls) <= 12


@pytest.mark.parametrize("start", [1, 64, 5000])
def test_a_start_beyond_the_span_is_its_end(start):
    found = find_knob(of_blocks(16), 0.6, (16, 3), start)
    assert found.knob == 4
    assert set(found.tried) <= set(range(3, 17))


def test_plateaus_cost_no_more_passes():
    def steps(knob):
        return math.floor(20 * smooth(50.0)(knob)) / 20

    found = find_knob(steps, 0.75, SCALES, 1.0)
    assert found.sparsity == 0.75
    assert len(found.tried) <= 12


def test_a_jump_over_the_target_is_refused_with_both_sides():
    found = find_knob(lambda knob: 0.2 if knob < 3 else 0.8, 0.5, SCALES, 1.0)
    with pytest.raises(ValueError, match=r"goes from 0\.200 to 0\.800 at router_scale="):
        check_found(found, DashConfig(), 0.5, 256)


@pytest.mark.parametrize(
    ("measure", "target", "message"),
    [
        (smooth(1.0, most=0.8), 0.9, r"at most 0\.800, at router_scale="),
        (lambda knob: 0.3 + smooth(1.0)(knob) / 2, 0.1, r"no less than 0\.300, at router_scale="),
    ],
)
def test_what_cannot_be_reached_says_what_can(measure, target, message):
    found = find_knob(measure, target, SCALES, 1.0)
    with pytest.raises(ValueError, match=message):
        check_found(found, DashConfig(), target, 256)
    assert len(found.tried) <= 12


def test_a_coarse_integer_knob_may_miss_between_its_neighbours():
    found = find_knob(of_blocks(8), 0.6, (8, 2), 4)
    assert abs(found.sparsity - 0.6) > TOLERANCE
    check_found(found, InfLLMv2Config(), 0.6, 512)
    with pytest.raises(ValueError, match="at most"):
        check_found(find_knob(of_blocks(8), 0.9, (8, 2), 4), InfLLMv2Config(), 0.9, 512)


def test_what_rows_cannot_have_is_refused_by_their_length():
    """16 blocks of 64, of which the first, a token's own and the one before it are always there."""
    forced, most = InfLLMv2Config(window_size=64, topk=4), of_blocks(16)(3)
    check_reachable([forced], most, "causal", 1024, packed=False)
    with pytest.raises(ValueError, match=rf"1024 tokens attention=infllmv2 reaches {math.floor(1000 * most) / 1000}"):
        check_reachable([forced], most + 0.01, "causal", 1024, packed=False)
    for attention in (NSAConfig(), DashConfig()):
        check_reachable([attention], 0.75, "causal", 16384, packed=True)
        with pytest.raises(ValueError, match="cannot be had"):
            check_reachable([attention], 0.999, "causal", 16384, packed=True)


@pytest.mark.parametrize(("length", "packed"), [(4096, False), (8192, True)])
def test_the_papers_count_is_of_long_rows_of_one_document(length, packed):
    check_reachable([DashConfig()], 0.75, "paper", 8192, packed=False)
    with pytest.raises(ValueError, match="use sparsity_count=causal"):
        check_reachable([DashConfig()], 0.75, "paper", length, packed=packed)


def test_a_held_sparsity_follows_moving_weights():
    """Scores that grow by 4 % a measurement, from a start that is far off."""
    hold, centre = Hold(0.75, SCALES, 1.0), 100.0
    sparsities = []
    for _ in range(80):
        sparsities.append(smooth(centre)(hold.knob))
        before = hold.knob
        assert abs(math.log(hold.update(sparsities[-1]) / before)) <= 0.2 + 1e-9
        centre *= 0.96
    assert all(abs(sparsity - 0.75) < 0.02 for sparsity in sparsities[-30:])


def test_which_steps_a_hold_measures():
    """Every fourth, of whole rows, in which no layer attends to everything: the first seven do, counted from 0."""

    def is_measured_at(step, length=8, holds=True):
        attention = SimpleNamespace(holds_sparsity=holds)
        layers = [SimpleNamespace(config=SimpleNamespace(is_dense_at=lambda step, n=n: step < n)) for n in (0, 7)]
        engine = SimpleNamespace(module=SimpleNamespace(turned=layers))
        config = SimpleNamespace(attention=attention, data=SimpleNamespace(seq_len=8))
        read = SimpleNamespace(batches=[SimpleNamespace(input_ids=torch.zeros(2, length))])
        return is_measured(SimpleNamespace(config=config, engine=engine), step, read)

    assert [step for step in range(1, 21) if is_measured_at(step)] == [8, 12, 16, 20]
    assert not is_measured_at(8, length=7)
    assert not is_measured_at(8, holds=False)


@pytest.mark.parametrize("measured", [0.0, 1.0])
def test_a_held_knob_stays_in_its_span(measured):
    hold = Hold(0.75, SCALES, 1.0)
    for _ in range(200):
        hold.update(measured)
    assert hold.knob == pytest.approx(SCALES[measured == 0.0])
    assert SCALES[0] <= hold.knob <= SCALES[1]


def test_a_held_integer_moves_to_the_nearest_and_stays():
    blocks = of_blocks(128)
    hold, visited = Hold(0.75, (128, 2), 30), []
    for step in range(200):
        noise = 0.004 * math.sin(1.7 * step)
        visited.append(hold.update(blocks(hold.knob) + noise))
    assert all(abs(a - b) <= 1 for a, b in pairwise(visited))
    assert set(visited[100:]) == {hold.knob}
    assert abs(blocks(hold.knob) - 0.75) <= min(abs(blocks(k) - 0.75) for k in range(2, 129)) + 0.003


def test_a_held_integer_waits_for_three_measurements():
    hold = Hold(0.5, (128, 2), 64)
    assert [hold.update(0.3) for _ in range(6)] == [64, 64, 63, 63, 63, 62]


def test_a_held_integer_forgets_what_was_long_ago():
    """Its mean goes back eight measurements: of a ninth other one it has an eighth."""
    hold = Hold(0.5, (128, 2), 64)
    for sparsity in [0.5] * 30 + [0.508]:
        assert hold.update(sparsity) == 64
    assert hold.mean == pytest.approx(0.501)
    first = Hold(0.5, (128, 2), 64)
    for sparsity in (0.5, 0.503):
        first.update(sparsity)
    assert first.mean == pytest.approx(0.5015)  # until then it is of all


@pytest.mark.parametrize(("span", "knob"), [(SCALES, 3.0), ((128, 2), 30), ((1.0, 1e-5), 0.9)])
def test_a_hold_goes_on_exactly_from_its_state(span, knob):
    measured = [0.5 + 0.4 * math.sin(step) for step in range(40)]
    whole = Hold(0.75, span, knob)
    knobs = [whole.update(sparsity) for sparsity in measured]
    first = Hold(0.75, span, knob)
    for sparsity in measured[:17]:
        first.update(sparsity)
    resumed = Hold(0.75, span, **json.loads(json.dumps(first.state_dict())))
    assert [resumed.update(sparsity) for sparsity in measured[17:]] == knobs[17:]


def test_layers_of_several_sizes_share_a_knob():
    """The mean of what they can have; no topk below what one of them forces, and as many blocks as the finest has."""
    layers = [InfLLMv2Config(window_size=64, topk=9), InfLLMv2Config(block_size=32, window_size=128, topk=9)]
    assert knob_span(layers, 1024) == (32, 6)
    most = sum(layer.most_sparsity(1024, "causal") for layer in layers) / 2
    check_reachable(layers, most, "causal", 1024, packed=False)
    with pytest.raises(ValueError, match="cannot be had"):
        check_reachable(layers, most + 0.006, "causal", 1024, packed=False)
    with pytest.raises(ValueError, match="leaves none"):
        check_reachable([], 0.5, "causal", 1024, packed=False)


def test_a_knob_is_searched_on_packed_rows_by_the_layers_that_it_turns_over_all_ranks():
    """The turned layer leaves out a sixteenth of its keys times the knob, another one none; of all ranks together half
    as many are read as of this one."""
    asked, sums = [], []

    class Backend:
        config = SimpleNamespace(knob_span=lambda length: (1.0, 16.0))

    other, turned = Backend(), Backend()

    def model(input_ids, **options):
        asked.append((input_ids, options))
        read = torch.tensor([[16.0, 16.0], [16.0 - knobs[-1], 16.0]], dtype=torch.float64)
        return SimpleNamespace(stats=[SimpleNamespace(counts=lambda count, own=own: own) for own in read])

    def total(active, counted):
        sums.append((active, counted))
        return [active / 2, counted]

    knobs = []
    model.set_knob, model.turned, model.backends = knobs.append, [turned], (other, turned)
    model.attention = SimpleNamespace(name="dash", knob="router_scale", router_scale=1.0)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    batches = [Batch(ids + n, ids + n, ids, torch.tensor([0, 3, 8]), 5) for n in range(2)]
    found = calibrate(model, batches, 0.75, "causal", 8, device=torch.device("cpu"), total=total)
    assert found.knob == knobs[-1] == pytest.approx(8.0, abs=0.05)
    assert sums[0] == (30.0, 32.0)  # of two rows, where the search begins
    for (given, options), batch in zip(asked, batches, strict=False):
        assert given.equal(batch.input_ids)
        assert options["labels"].equal(batch.labels)
        assert options["position_ids"].equal(batch.position_ids)
        assert options["cu_seqlens"].equal(batch.cu_seqlens)
        assert (options["max_seqlen"], options["return_stats"]) == (5, True)


def test_no_knob_no_target():
    with pytest.raises(ValueError, match="no sparsity knob"):
        FullConfig(target_sparsity=0.5)
    with pytest.raises(ValueError, match="no sparsity knob"):
        FullConfig().knob_span(1024)


def test_the_papers_count_is_calibrated_too():
    """On tokens from 4096 on, against the whole length: topk blocks of 256 keys, of which a token's own is cut."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    blocks = {"block_size": 256, "kernel_size": 256, "kernel_stride": 128, "window_size": 0}
    attention = InfLLMv2Config(**blocks, topk=3)
    model = Transformer(ModelConfig(**shape, head_dim=16, vocab_size=8, max_seq_len=4352), attention)
    ids = torch.zeros(1, 4352, dtype=torch.int64)
    batch = Batch(ids, ids, torch.arange(4352)[None])
    found = calibrate(model, [batch], 0.5, "paper", 4352, device=torch.device("cpu"))
    active = 256 * (found.knob - 1) + 257 / 2
    assert found.sparsity == pytest.approx(1 - active / 4352)
    assert model.turned[0].config.topk == found.knob == 9
