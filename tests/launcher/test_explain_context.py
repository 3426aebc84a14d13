"""What `explain` says of split sequences, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.explain import explain
from tests.launcher.test_goldens import example

WAYS, TOKENS = 8, 131_072 // 8  # of a device
KEYS = TOKENS * 8 * 128 * 2 * 2  # 8 heads of 128 dims, keys and values, bfloat16
QUERIES = TOKENS * 32 * 128 * 2


def explained(*overrides: str) -> dict[str, Any]:
    return explain(example("v5p-128-long-context", *overrides))


@pytest.mark.parametrize(
    ("context", "forward", "backward"),
    [
        ("{type: gather}", 7 * KEYS, 7 * KEYS),
        ("{type: ring}", 8 * KEYS, 8 * KEYS + 8 * 2 * KEYS),  # gradients in float32
        ("{type: ulysses}", 7 * (2 * QUERIES + KEYS) // 8, 7 * (2 * QUERIES + KEYS) // 8),
    ],
)
def test_bytes_of_a_layer_are_those_worked_out_by_hand(context: str, forward: int, backward: int) -> None:
    found = explained(f"train.sharding.context={context}")["context"]
    assert found["bytes_received_for_a_layer"] == {"segments/0/0 forward": forward, "segments/0/0 backward": backward}
    assert found["ways"] == "8 over context" and found["tokens_of_a_sequence_on_a_device"] == TOKENS


def test_key_heads_that_ulysses_does_not_divide_are_sent_repeated() -> None:
    heads = "train.model.segments.0.pattern.0.attention.kv_heads=2"
    found = explained("train.sharding.context={type: ulysses}", heads)["context"]["bytes_received_for_a_layer"]
    assert found["segments/0/0 forward"] == 7 * (2 * QUERIES + KEYS) // 8  # 2 heads 4 times are 8


def test_the_layout_and_the_work_of_a_device_are_named() -> None:
    balanced, plain = (explained(f"train.sharding.context.balanced={b}")["context"] for b in ("true", "false"))
    assert balanced["layout"] == "shard i has chunks i and 15 - i of 16, 8,192 tokens each"
    assert balanced["causal_work_of_a_device"] == "the mean"
    assert plain["causal_work_of_a_device"] == "0.12 to 1.88 of the mean"  # 1/8 and 15/8
    assert "context" not in explain(example("v5p-128-spot"))


def test_the_estimate_of_memory_counts_scores_only_where_they_are_held() -> None:
    kernel, blocks, plain = (
        explained(*overrides)["memory_per_device"]["layer_at_work_estimate"]
        for overrides in (
            (),
            ("train.sharding.context={type: ring}", "train.model.attention_kernel=plain"),
            ("train.model.attention_kernel=plain",),
        )
    )
    scores = 2 * 2 * TOKENS * 32 * 131_072 * 2  # scores and probabilities, of the layer and of its gradient
    assert plain - kernel == scores and kernel < blocks < plain
    assert "fits" in explained()["memory_per_device"]["verdict"]
