"""Sequences that are split over devices: who has which tokens, who computes how much, what is sent for a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trainer.config import TrainConfig
from trainer.config.context import causal_shares, is_balanced, layer_bytes, split_of
from trainer.config.layouts import length_shards

METHODS: Final = {
    "gather": "gather: each device gathers the keys and values of its whole sequences",
    "ring": "ring: keys and values go round, a shard of them at a time",
    "ulysses": "ulysses: each device computes some heads of all tokens of its sequences",
}


def context_section(config: TrainConfig, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Empty where sequences are whole. Bytes are those that a device receives for one layer and microbatch."""
    context, length = config.sharding.context, config.batch.sequence_length
    replicas = 1 if config.diloco is None else mesh.get("diloco", 1)
    sequences = config.batch.global_batch // (config.batch.accumulation * replicas)
    ways = length_shards(mesh, config.sharding)
    received: dict[str, int] = {}
    axes: tuple[str, ...] = ()
    for s, segment in enumerate(config.model.segments):
        for p, block in enumerate(segment.pattern):
            split = split_of(block, config.sharding, mesh, sequences=sequences, length=length)
            if split is not None:
                axes = split.axes
                bytes_of = layer_bytes(block, context, split, config.model.compute_dtype)
                received |= {f"segments/{s}/{p} {way}": count for way, count in bytes_of.items()}
    if not received:
        return {}
    least, most = causal_shares(context, ways)
    return {
        "ways": f"{ways} over {'+'.join(axes)}",
        "method": METHODS[context.type],
        "tokens_of_a_sequence_on_a_device": length // ways,
        "layout": _layout(length, ways, balanced=is_balanced(context)),
        "causal_work_of_a_device": "the mean" if least == most else f"{least:.2f} to {most:.2f} of the mean",
        "bytes_received_for_a_layer": received,
    }


def _layout(length: int, ways: int, *, balanced: bool) -> str:
    if balanced:
        return f"shard i has chunks i and {2 * ways - 1} - i of {2 * ways}, {length // (2 * ways):,} tokens each"
    return f"shard i has the tokens from i x {length // ways:,} on"
