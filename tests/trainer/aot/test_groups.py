"""Replica groups in the three ways HLO writes them, against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.aot.groups import first_group, permute_pairs


def test_listed_groups_are_read_as_they_stand() -> None:
    assert first_group("replica_groups={{0,2,4},{1,3,5}}, channel_id=1", 6) == (0, 2, 4)


def test_no_groups_are_all_partitions_and_a_program_that_does_not_say_gives_none() -> None:
    assert first_group("replica_groups={}, channel_id=1", 4) == (0, 1, 2, 3)
    assert first_group("channel_id=1", 4) == ()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("groups", [1, 4, 6])
def test_an_iota_is_reshaped_and_transposed_as_numpy_does(order: tuple[int, ...], groups: int) -> None:
    dims = (2, 3, 4)
    text = f"replica_groups=[{groups},{24 // groups}]<=[2,3,4]T({','.join(map(str, order))}), dimensions={{0}}"
    expected = np.arange(24).reshape(dims).transpose(order).reshape(groups, -1)[0]
    assert first_group(text, 24) == tuple(expected)


def test_axes_of_a_mesh_and_parts_of_them_give_the_partitions_that_differ_in_them_alone() -> None:
    mesh = np.arange(16).reshape(2, 8)
    assert first_group("replica_groups=mesh['data'=2, 'fsdp'=8] {'fsdp'}", 16) == tuple(mesh[0])
    assert first_group("replica_groups=mesh['data'=2, 'fsdp'=8] {'data'}", 16) == tuple(mesh[:, 0])
    halves = mesh.reshape(2, 2, 4)  # 'fsdp' as 2 ways outside, 4 inside
    assert first_group("replica_groups=mesh['data'=2, 'fsdp'=8] {'fsdp':(2)4}", 16) == tuple(halves[0, 0])


def test_a_permute_says_who_sends_to_whom() -> None:
    assert permute_pairs("source_target_pairs={{0,1},{1,2},{2,0}}, channel_id=3") == ((0, 1), (1, 2), (2, 0))
    assert permute_pairs("channel_id=3") == ()
