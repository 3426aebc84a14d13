"""Which row comes when: exact, reproducible, the same for every number of hosts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.conftest import Configure
from trainer.config import ConfigError
from trainer.data import BatchLoader, Data, open_data
from trainer.data.order import Mixture, permute


@given(st.integers(1, 3000), st.text(max_size=5))
def test_a_shuffle_visits_every_index_exactly_once(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_shuffle_of_a_very_large_range_stays_inside_it_and_repeats_nothing() -> None:
    size = 10**12 + 39
    found = permute(np.arange(10_000), size, "key")
    assert len(set(found.tolist())) == 10_000 and found.min() >= 0 and found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.02


def test_shuffles_of_two_epochs_have_no_more_in_common_than_chance() -> None:
    first, second = (permute(np.arange(1000), 1000, f"0/0/{epoch}") for epoch in (0, 1))
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 10**9))
def test_after_every_sample_the_mixture_is_within_one_row_per_source_of_its_weights(weights: list[int], start: int) -> None:
    samples = np.arange(start, start + 300)
    owner, index = Mixture([float(weight) for weight in weights]).locate(samples)
    for source, weight in enumerate(weights):
        mine = index[owner == source]
        assert mine.tolist() == list(range(mine[0], mine[0] + len(mine))) if len(mine) else True
        drawn = mine + 1
        expected = (samples[owner == source] + 1) * weight / sum(weights)
        assert (abs(drawn - expected) <= len(weights)).all()


def test_the_mixture_is_exact_over_a_whole_turn_of_its_weights() -> None:
    owner, _ = Mixture([0.5, 0.3, 0.2]).locate(np.arange(1000))
    assert Counter(owner.tolist()) == {0: 500, 1: 300, 2: 200}


def test_weights_too_far_apart_are_refused(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="differ by more than a factor"):
        open_data(configure({"type": "synthetic", "weight": 1e-9}, {"type": "synthetic"}))


@pytest.fixture
def two_sources(configure: Configure, corpus: object) -> Data:
    return open_data(
        configure(
            {"type": "text", "paths": [f"{corpus}/part0/*.txt", f"{corpus}/part1/*.txt"], "weight": 0.7},
            {"type": "text", "paths": [f"{corpus}/part2/*.txt"], "weight": 0.3},
            global_batch=8,
            seed=3,
        )
    )


def test_every_row_is_drawn_exactly_once_in_every_epoch_of_its_source(two_sources: Data) -> None:
    split = two_sources.train
    drawn = np.concatenate([split.batch_rows(n) for n in range(1500)])
    for first, last in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        mine = drawn[(drawn >= first) & (drawn < last)]
        count = int(last - first)
        epochs = [mine[start : start + count] for start in range(0, len(mine) - count + 1, count)]
        assert len(epochs) > 1
        for epoch in epochs:
            assert sorted(epoch.tolist()) == list(range(first, last))
        assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 37])
def test_hosts_read_the_same_rows_whatever_their_number_and_wherever_they_resume(two_sources: Data, hosts: int, start: int) -> None:
    split = two_sources.train
    shares = [np.arange(8).reshape(hosts, -1)[host] for host in range(hosts)]
    loaders = [iter(BatchLoader(split, start_step=start, local_rows=share)) for share in shares]
    for n in range(start, start + 3):
        expected = split.rows(split.batch_rows(n))
        for share, loader in zip(shares, loaders, strict=True):
            number, batch = next(loader)
            assert number == n
            for name, array in batch.items():
                np.testing.assert_array_equal(array, expected[name][share])


def test_a_batch_depends_on_nothing_but_seed_and_number(two_sources: Data, configure: Configure, corpus: object) -> None:
    split = two_sources.train
    forward = [split.batch_rows(n).tolist() for n in range(100)]
    assert [split.batch_rows(n).tolist() for n in reversed(range(100))] == forward[::-1]


def test_another_seed_gives_another_order_and_without_shuffling_there_is_none(configure: Configure, corpus: object) -> None:
    source = {"type": "text", "paths": [f"{corpus}/**/*.txt"]}
    orders = [open_data(configure(source, seed=seed)).train.batch_rows(0).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert open_data(configure(source, shuffle=False)).train.batch_rows(2).tolist() == [8, 9, 10, 11]
