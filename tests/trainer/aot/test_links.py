"""The link model against arithmetic by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from trainer.aot.hlo import Collective
from trainer.aot.links import HOP_SECONDS, cost
from trainer.config.target import Target

RATE = 10e9
TARGET = Target(
    platform="tpu", name="test", topology="v5p:4x4x4", torus=(4, 4, 4), wraps=(True, True, False), slices=2, devices_per_slice=64,
    ici_link_bytes_per_second=RATE, dcn_bytes_per_second=1e9,
)  # fmt: skip
PLACES = [(slice_index, place) for slice_index in (0, 1) for place in itertools.product(range(4), repeat=3)]


def collective(kind: str, group: tuple[int, ...] = (), **changes: Any) -> Collective:
    values: dict[str, Any] = {
        "kind": kind, "bytes": 64_000_000, "turns": 1, "asynchronous": False, "overlapped": False, "group": group, "pairs": (),
        "algorithm": "", "op_name": "",
    }  # fmt: skip
    return Collective(**{**values, **changes})


ROW = tuple(range(0, 64, 16))  # along the first dim
SLICE = tuple(range(64))


@pytest.mark.parametrize(
    ("kind", "group", "links", "passes", "hops"),
    [
        ("all-gather", ROW, 2, 1, 2),  # a ring of 4: both ways
        ("reduce-scatter", ROW, 2, 1, 2),
        ("all-reduce", ROW, 2, 2, 4),
        ("all-gather", (0, 1, 2, 3), 1, 1, 3),  # along the last dim, which does not wrap
        ("all-gather", SLICE, 5, 1, 2 + 2 + 3),
        ("all-reduce", SLICE, 5, 2, 14),
    ],
)
def test_a_collective_takes_the_links_of_the_dims_it_spans(kind: str, group: tuple[int, ...], links: int, passes: int, hops: int) -> None:
    found = cost(collective(kind, group), PLACES, TARGET)
    n = len(group)
    expected = passes * (n - 1) / n * 64e6 / (links * RATE) + hops * HOP_SECONDS
    assert (found.link, found.links, found.hops) == ("ici", links, hops)
    assert found.seconds is not None and math.isclose(found.seconds, expected)


def test_a_ring_that_turns_one_way_has_half_the_links() -> None:
    both, one = (cost(collective("all-reduce", ROW, algorithm=name), PLACES, TARGET) for name in ("", "UniDirectionNDRingStrategy"))
    assert (both.links, one.links) == (2, 1)


def test_what_crosses_slices_is_charged_to_the_network_between_them() -> None:
    found = cost(collective("all-reduce", (0, 64)), PLACES, TARGET)
    assert found.link == "dcn" and found.seconds is not None and math.isclose(found.seconds, 2 * 1 / 2 * 64e6 / 1e9)
    sent = cost(collective("send"), PLACES, TARGET)
    assert sent.link == "dcn" and sent.seconds is not None and math.isclose(sent.seconds, 64e6 / 1e9)


def test_a_permute_takes_as_many_hops_as_its_farthest_pair() -> None:
    near = cost(collective("collective-permute", pairs=((0, 16), (48, 0))), PLACES, TARGET)  # 48 wraps round to 0
    far = cost(collective("collective-permute", pairs=((0, 3),)), PLACES, TARGET)  # the last dim does not wrap
    assert (near.hops, far.hops) == (1, 3)


def test_a_group_of_one_costs_nothing_and_without_bandwidths_no_seconds_are_said() -> None:
    assert cost(collective("all-gather", (5,)), PLACES, TARGET).seconds == 0
    cpu = Target(platform="cpu", name="cpu", devices_per_slice=8)
    assert cost(collective("all-gather", tuple(range(8))), [], cpu).seconds is None
