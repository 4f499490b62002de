import itertools
import json
from collections import Counter

import numpy as np
import pytest

from data import MixtureDataConfig, build_data
from data.cache import fingerprint
from data.config import MixedCorpusConfig
from data.mixing import Schedule


@pytest.mark.parametrize("most", [0, 1, 30, 999, 100_000])
@pytest.mark.parametrize("available", [[3, 50], [50, 3], [10**6, 10**6], [0, 9]])
def test_rows_are_served_until_one_component_has_no_more(available, most):
    schedule = Schedule([1, 2], seed=0)
    served = schedule.rows_served(available, min(most, 2000))
    used = Counter(schedule.place(number)[0] for number in range(served))
    assert all(used[component] <= available[component] for component in range(2))
    component, index = schedule.place(served)
    assert served == min(most, 2000) or index == available[component] == used[component]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1, 1], [0.7, 0.2999, 0.0001], [1e-5, 1]])
def test_shares_are_exact_and_every_component_is_read_in_order(weights):
    schedule = Schedule(weights, seed=3)
    total = max(5 * schedule.block // 2, 3000)
    seen = Counter()
    for number in range(total):
        component, index = schedule.place(number)
        assert index == seen[component]
        seen[component] += 1
        if (number + 1) % schedule.block == 0:
            for component, share in enumerate(schedule.shares):
                assert abs(seen[component] - share * (number + 1)) < 2


def test_shares_that_would_take_all_memory_are_refused():
    assert Schedule([1, 2**-22], seed=0).block == 2**23 + 2
    with pytest.raises(ValueError, match=r"has 1e-09 of the rows, too few to be dealt out: raise its weight"):
        Schedule([1, 1e-9], seed=0)


def test_a_place_depends_on_seed_and_number_alone():
    numbers = [5, 4000, 0, 1023, 1024, 7]
    whole, other, another_seed = (Schedule([2, 1], seed=seed) for seed in (1, 1, 2))
    places = [whole.place(number) for number in range(5000)]
    assert [other.place(number) for number in numbers] == [places[number] for number in numbers]
    assert places != [another_seed.place(number) for number in range(5000)]
    # A checkpoint holds the number of rows alone: these have to stay what they were.
    assert [places[number] for number in (0, 1, 1023, 1024, 4999)] == [(1, 0), (1, 1), (0, 681), (1, 342), (0, 3325)]
    rare = Schedule([0.7, 0.2999, 0.0001], seed=3)
    assert [rare.place(number) for number in (2, 5000, 40_000)] == [(1, 0), (0, 3481), (0, 28_000)]
    assert [Schedule([5], seed=3).place(n) for n in (0, 5000)] == [(0, 0), (0, 5000)]
    first = [component for component, _ in places[:1024]]
    assert max(len(list(run)) for _, run in itertools.groupby(first)) > 3, "random, not in turn"
    second = [component for component, _ in places[1024:2048]]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 700, "each block has an order of its own"


@pytest.fixture
def mixture(tmp_path):
    """Makes streams over two corpora of unlike size whose tokens tell which one they come from."""
    for name, count in (("small", 20), ("large", 200)):
        lines = [json.dumps({"text": f"{name} {index} " + f"{name} " * (index % 40)}) for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def make(split="train", *, seed=0, rows=4, rank=0, world_size=1, small=1.0, large=1.0, **config):
        corpora = {
            name: MixedCorpusConfig(source="files", files=[str(tmp_path / f"{name}.jsonl")], weight=weight)
            for name, weight in (("small", small), ("large", large))
        }
        fields = {"name": "mixed", "seq_len": 32, "vocab_size": 300, "validation_fraction": 0.3, "corpora": corpora}
        placement = {"seed": seed, "rows": rows, "rank": rank, "world_size": world_size}
        return build_data(MixtureDataConfig(**fields | config), split=split, cache_dir=tmp_path / "cache", **placement)

    return make


def corpus_of(stream, row):
    text = stream.tokenizer.decode(row.tolist())
    return max(("small", "large"), key=text.count)


def rows(stream, batches):
    return [row for batch in itertools.islice(stream, batches) for row in batch.input_ids.view(-1, 32)]


@pytest.mark.parametrize("streaming", [False, True])
def test_corpora_come_in_proportion_to_their_weights_not_their_size(mixture, streaming):
    stream = mixture(small=3.0, large=1.0, rows=32, streaming=streaming)
    found = Counter(corpus_of(stream, row) for row in rows(stream, 32))
    assert found == {"small": 768, "large": 256}
    described = stream.describe()
    assert (described["source"], described["shares"]) == ({"small": "files", "large": "files"}, [0.75, 0.25])
    if not streaming:
        parts = [corpus.training[0] for corpus in stream.corpora.values()]
        sums = [sum(getattr(part, name) for part in parts) for name in ("num_documents", "num_bytes")]
        assert [described[name] for name in ("documents", "bytes", "tokens")] == [*sums, sum(map(len, parts))]


@pytest.mark.parametrize(("split", "streaming"), [("train", False), ("train", True), ("validation", False)])
@pytest.mark.parametrize("pack", ["plain", "documents"])
def test_a_batch_names_the_corpus_of_each_row(mixture, split, streaming, pack):
    lengths = {} if streaming else {"length_buckets": [20], "length_weights": [1.0, 2.0]}
    stream = mixture(split, rows=4, rank=1, world_size=2, streaming=streaming, pack=pack, **lengths)
    batches = list(itertools.islice(stream, 3))
    assert len({name for batch in batches for name in batch.sources}) == 2
    for batch in batches:
        assert list(batch.sources) == [corpus_of(stream, row) for row in batch.input_ids.view(-1, 32)]
        assert batch.to("cpu").sources == batch.sources


def test_each_corpus_has_epochs_of_its_own(mixture):
    stream = mixture(small=3.0, large=1.0, rows=1)
    of_small = [tuple(row.tolist()) for row in rows(stream, 300) if corpus_of(stream, row) == "small"]
    epoch = stream.num_rows[0]
    assert 2 * epoch < len(of_small)
    first, second = Counter(of_small[:epoch]), Counter(of_small[epoch : 2 * epoch])
    assert first == second
    assert of_small[:epoch] != of_small[epoch : 2 * epoch]


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_at_another_world_size_is_exact(mixture, streaming):
    expected = [rows(stream := mixture(rows=4, streaming=streaming), 10), rows(stream, 5)][1]
    ranks = [mixture(rows=2, rank=rank, world_size=2, streaming=streaming) for rank in range(2)]
    for stream in ranks:
        rows(stream, 10)
    state = json.loads(json.dumps(ranks[1].state_dict()))
    resumed = mixture(rows=1, streaming=streaming)
    resumed.load_state_dict(state)
    assert all((a == b).all() for a, b in zip(rows(resumed, 20), expected, strict=True))


def test_validation_has_both_corpora_and_ends_before_a_row_repeats(mixture):
    stream = mixture("validation", rows=1, validation_rows=None, small=1.0, large=1.0)
    found = rows(stream, 10_000)
    assert len({tuple(row.tolist()) for row in found}) == len(found) == stream.validation_rows
    counts = Counter(corpus_of(stream, row) for row in found)
    assert counts["small"] == stream.num_rows[0], "the corpus with fewer rows is used up"
    assert 0 < stream.unigram_entropy() < np.log(300)


def test_the_unigram_entropy_weighs_corpora_as_they_are_mixed(mixture):
    """Counted by hand, over corpora of unlike sizes and weights."""
    stream = mixture("validation", small=3.0, large=1.0)
    size = stream.vocab_size

    def mixed(part_of):
        counts = []
        for name in ("small", "large"):
            tokens, ends = part_of(stream.corpora[name]).window(0, len(part_of(stream.corpora[name])))
            targets = [token for document in np.split(tokens, ends[:-1]) for token in document[1:].tolist()]
            counts.append(np.array([targets.count(token) for token in range(size)]))
        assert counts[0].sum() < counts[1].sum() / 3
        return 0.75 * counts[0] / counts[0].sum() + 0.25 * counts[1] / counts[1].sum(), sum(counts).sum()

    (training, total), (validation, _) = mixed(lambda c: c.training[0]), mixed(lambda c: c.validation)
    smoothed = (total * training + 1) / (total + size)
    assert stream.unigram_entropy() == pytest.approx(-(validation * np.log(smoothed)).sum(), rel=1e-9)


def test_long_documents_are_read_oftener(mixture):
    """Weight 3 of the long bucket: its share of the rows is three times its share of the tokens, before scaling."""
    plain = mixture(length_buckets=[12])
    upsampled = mixture(length_buckets=[12], length_weights=[1.0, 3.0])
    sizes = [len(part) for _, part, _ in plain.components]
    shares, long = upsampled.schedule.shares, sizes[3] / (sizes[2] + sizes[3])
    assert len(sizes) == 4, "two buckets of two corpora"
    assert plain.schedule.shares[3] == pytest.approx(long / 2)
    assert shares[3] == pytest.approx(3 * long / (1 + 2 * long) / 2)
    assert shares[2] + shares[3] == pytest.approx(0.5), "the corpora keep their shares"
    assert plain.describe()["tokens_fingerprint"] != upsampled.describe()["tokens_fingerprint"]
    without = mixture(length_buckets=[12], length_weights=[0.0, 1.0])
    assert len(without.components) == 2
    with pytest.raises(ValueError, match=r"length_weights=\[1.0, 0.0, 1.0\] leave nothing of corpus small to read"):
        mixture(length_buckets=[3, 10**4], length_weights=[1.0, 0.0, 1.0])


def test_a_checkpoint_of_another_mixture_is_refused(mixture):
    stream = mixture(small=3.0)
    parts = [stream.corpora[name].fingerprint for name in ("small", "large")]
    assert stream.fingerprint == fingerprint(parts, [3.0, 1.0], []), "checkpoints hold it"
    state = mixture().state_dict()
    for change in ({"small": 2.0}, {"length_buckets": [12]}, {"seed": 1}):
        with pytest.raises(ValueError, match="the data differ"):
            mixture(**change).load_state_dict(state)
