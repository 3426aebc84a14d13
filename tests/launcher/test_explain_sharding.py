"""`explain --sharding`: where every tensor lies and why, against layouts and bytes worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.cli import main
from launcher.explain.sharding import sharding_report
from tests.launcher.regenerate import EXAMPLES
from tests.launcher.test_goldens import example

SPOT = str(EXAMPLES / "v5p-128-spot.job.yaml")  # four slices of 64 devices, llama3-8b
LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD = 32, 4096, 14336, 32, 8, 128
TENSOR_16 = ("train.mesh.ici={fsdp: 4, tensor: 16}", "train.sharding.unsharded_limit=0.04")


def tensors(*overrides: str, kind: str = "weights") -> dict[str, dict[str, Any]]:
    return {entry["tensor"]: entry for entry in sharding_report(example("v5p-128-spot", *overrides))["tensors"][kind]}


def mesh_axes(entry: dict[str, Any]) -> list[list[str]]:
    return [dim["mesh"] for dim in entry["dims"]]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["explain", SPOT, "--sharding", *words])
    assert not ended.value.code
    return capsys.readouterr().out


def test_bytes_of_a_device_and_bytes_held_more_than_once_are_those_worked_out_by_hand() -> None:
    found = tensors()
    query, norm = found["segments/0/0/attention/query"], found["segments/0/0/mlp_norm/scale"]
    whole = 4 * LAYERS * WIDTH * HEADS * HEAD
    assert mesh_axes(query) == [[], ["fsdp"], [], []]
    assert (query["copies"], query["bytes_per_device"], query["replicated_bytes"]) == (4, whole // 64, 3 * whole)
    assert (norm["copies"], norm["bytes_per_device"]) == (256, 4 * LAYERS * WIDTH)


def test_state_split_over_data_has_no_second_copy_and_the_axis_stands_apart_from_the_rules() -> None:
    for kind, gate in (("weights", "segments/0/0/mlp/gate"), ("optimizer", "nu/segments/0/0/mlp/gate")):
        entry = tensors("train.sharding.optimizer=over_data", kind=kind)[gate]
        assert (entry["copies"], entry["bytes_per_device"]) == (1, 4 * LAYERS * WIDTH * HIDDEN // 256)
        assert [dim["further"] for dim in entry["dims"]] == [[], ["data"], []]


def test_a_rule_of_the_spec_wins_by_its_number_and_the_tables_rule_is_listed_as_skipped() -> None:
    rule = "train.sharding.rules=[{axis: embed, mesh: [], weight: embed/table}, {axis: vocab, mesh: [fsdp], weight: embed/table}]"
    table = tensors(rule)["embed/table"]
    assert mesh_axes(table) == [["fsdp"], []] and [dim["rule"] for dim in table["dims"]] == [2, 1]
    assert any("embed already has no axis" in skip["reason"] for skip in table["skipped"])


def test_activations_and_the_batch_follow_the_same_table() -> None:
    hidden = tensors(*TENSOR_16, kind="activations")["segments/0/0/mlp/hidden"]
    assert mesh_axes(hidden) == [["data", "fsdp"], [], ["tensor"]]
    inputs = tensors(*TENSOR_16, kind="batch")["inputs"]
    assert mesh_axes(inputs) == [["data", "fsdp"], []] and inputs["bytes_per_device"] == 4 * 512 * 4096 // 16


def test_the_text_names_rules_drops_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *(word for override in TENSOR_16 for word in ("--set", override)))
    assert "256 devices, mesh data=4 x fsdp=4 x tensor=16" in out
    query = next(line for line in out.splitlines() if line.startswith("  segments/0/0/attention/query"))
    assert "layer 32, embed 4096 / fsdp [20], heads 32 / tensor [18], head_dim 128" in query
    assert f"dropped: tensor=16 does not divide kv_heads={KV_HEADS}" in out
    assert "8,030,261,248 parameters" in out and "segments/0/0/attention/key, not over tensor" in out


def test_layers_in_a_loop_of_their_own_are_one_line_and_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    scanned, unrolled = (
        json.loads(printed(capsys, "--set", f"train.model.layers={form}", "--output", "json")) for form in ("scan", "unroll")
    )
    assert scanned["totals"] == unrolled["totals"] | {"largest_unsharded": scanned["totals"]["largest_unsharded"]}
    assert "segments/0/0/*/mlp/gate x 32" in printed(capsys, "--set", "train.model.layers=unroll")
