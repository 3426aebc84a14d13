"""Context parallelism: how attention works on a sequence that is split over devices, and which of them has which tokens. No JAX here.

A sequence of T tokens over n shards. Balanced, it is cut into 2n chunks and shard i has chunks i and 2n - 1 - i, in this
order: of the pairs of a causal mask every shard then has as many as the others, where shards of neighbouring tokens have
from 1 / n^2 of them to (2n - 1) / n^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Discriminator, Tag

from trainer.config.attention import KERNEL_BLOCK
from trainer.config.base import Node, tag_or
from trainer.config.problem import Problem
from trainer.config.rules import Rule, resolve

if TYPE_CHECKING:
    from trainer.config.model import Block, Dtype
    from trainer.config.sharding import Sharding
    from trainer.config.train import TrainConfig

RING_BLOCK: Final = 512
"""Largest block of keys, and of queries, that a ring without the kernel takes at once."""

QUERY_AXES: Final = ("batch", "length", "act_heads", None)
KEY_AXES: Final = ("batch", "length", "act_kv_heads", None)


class Gather(Node):
    """Each device gathers the keys and values of the whole sequence for a layer; their gradients are reduced and scattered."""

    type: Literal["gather"] = "gather"
    balanced: bool = True
    """Shard i of n has chunks i and 2n - 1 - i of 2n, so that all have the same share of a causal mask. The loss is the same."""


class Ring(Node):
    """Keys and values go from device to device round the axis while each computes with those it has (Liu et al. 2023): no device
    ever holds more of them than two shards."""

    type: Literal["ring"] = "ring"
    balanced: bool = True
    """As of `gather`."""


class Ulysses(Node):
    """An all-to-all gives each device some heads of the whole sequence, and another one brings their results back to the tokens
    (Jacobs et al. 2023). The degree divides the query heads of a device; key heads that it does not divide are repeated."""

    type: Literal["ulysses"] = "ulysses"


Context = Annotated[
    Annotated[Gather, Tag("gather")] | Annotated[Ring, Tag("ring")] | Annotated[Ulysses, Tag("ulysses")],
    Discriminator(tag_or("gather")),
]


def is_balanced(context: Gather | Ring | Ulysses) -> bool:
    return not isinstance(context, Ulysses) and context.balanced


def balanced_order(ways: int) -> tuple[int, ...]:
    """The chunks of a sequence in the order in which `ways` shards hold them, two each."""
    return tuple(chunk for shard in range(ways) for chunk in (shard, 2 * ways - 1 - shard))


def causal_shares(context: Gather | Ring | Ulysses, ways: int) -> tuple[float, float]:
    """The smallest and the largest share of a causal mask's pairs that one shard computes, in units of the mean; T large."""
    if isinstance(context, Ulysses) or context.balanced:
        return 1.0, 1.0
    return 1 / ways, (2 * ways - 1) / ways


@dataclass(frozen=True)
class Split:
    """How the attention of one block is split."""

    axes: tuple[str, ...]  # mesh axes of the sequence
    ways: int
    sequences: int  # of a device
    tokens: int  # of a sequence, of a device
    heads: int  # of a device
    kv_heads: int  # of a device: as many as heads where it does not divide them


def split_of(block: Block, sharding: Sharding, mesh: Mapping[str, int], *, sequences: int, length: int) -> Split | None:
    """Of `sequences` of a batch; None where sequences are not split."""
    attention, rules = block.attention, sharding.table()
    rows, parts, heads, axes = _ways(QUERY_AXES, (sequences, length, attention.heads, 1), mesh, rules)
    if parts == 1:
        return None
    key_heads = attention.kv_heads if _ways(KEY_AXES, (sequences, length, attention.kv_heads, 1), mesh, rules)[2] == heads else None
    whole = attention.heads if key_heads is None else key_heads
    return Split(axes, parts, sequences // rows, length // parts, attention.heads // heads, whole // heads)


def _ways(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mapping[str, int], rules: tuple[Rule, ...]
) -> tuple[int, int, int, tuple[str, ...]]:
    """Ways the first three dims are split, and the mesh axes of the second."""
    spec = resolve(axes, shape, mesh, rules).spec
    ways = [1, 1, 1]
    for dim, names in enumerate(spec[:3]):
        for name in names:
            ways[dim] *= mesh[name]
    return ways[0], ways[1], ways[2], spec[1]


def repeated_key_heads(ways: int, kv_heads: int) -> int:
    """How often Ulysses repeats each key head, so that every device has one of its own."""
    repeat = 1
    while kv_heads * repeat % ways:
        repeat += 1
    return repeat


def layer_bytes(block: Block, context: Gather | Ring | Ulysses, split: Split, dtype: Dtype) -> dict[str, int]:
    """Bytes a device receives for one layer's attention of a microbatch: `forward`, and `backward` without what is recomputed."""
    attention, width = block.attention, 2 if dtype == "bfloat16" else 4
    tokens, n = split.sequences * split.tokens, split.ways
    both = attention.head_dim + attention.value_dim
    keys = tokens * split.kv_heads * both
    match context:
        case Gather():
            return {"forward": (n - 1) * keys * width, "backward": (n - 1) * keys * width}
        case Ring():
            return {"forward": n * keys * width, "backward": n * keys * width + n * keys * 4}
        case Ulysses():
            repeated = keys * repeated_key_heads(n, split.kv_heads)
            moved = (tokens * split.heads * both + repeated) * (n - 1) // n * width
            return {"forward": moved, "backward": moved}


def brought_bytes(block: Block, config: TrainConfig, mesh: Mapping[str, int], *, sequences: int) -> int:
    """Bytes of what attention holds of other devices' tokens at once: keys and values, or heads. 0 where sequences are whole."""
    split = split_of(block, config.sharding, mesh, sequences=sequences, length=config.batch.sequence_length)
    if split is None:
        return 0
    if isinstance(config.sharding.context, Gather):
        return layer_bytes(block, config.sharding.context, split, config.model.compute_dtype)["forward"]
    # The part that has come and the one that is coming; what arrives of an all-to-all is as much as has left.
    kept = split.kv_heads if isinstance(config.sharding.context, Ring) else split.heads + 2 * split.kv_heads
    width = 2 if config.model.compute_dtype == "bfloat16" else 4
    return 2 * split.sequences * split.tokens * kept * block.attention.head_dim * width


def keys_at_once(config: TrainConfig, mesh: Mapping[str, int], *, tpu: bool) -> int:
    """Keys whose scores attention holds in memory for a query at once: none in the splash kernel, one block in a ring without it."""
    context, length, kernel = config.sharding.context, config.batch.sequence_length, config.model.attention_kernel
    split = split_of(config.model.blocks[0], config.sharding, mesh, sequences=config.batch.global_batch, length=length)
    ways = 1 if split is None or isinstance(context, Ulysses) else split.ways
    chunk = length // (2 * ways if ways > 1 and is_balanced(context) else ways)
    in_ring = ways > 1 and isinstance(context, Ring)
    windows = any(block.attention.window is not None for block in config.model.patterns)
    if (kernel == "splash" or (kernel == "auto" and tpu and chunk % KERNEL_BLOCK == 0)) and not (in_ring and windows):
        return 0
    return min(chunk, RING_BLOCK) if in_ring else length


def context_fits(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """A sequence is cut into equal parts, and Ulysses' heads are divided evenly."""
    context, length = config.sharding.context, config.batch.sequence_length
    reported: set[tuple[int, int]] = set()
    for s, segment in enumerate(config.model.segments):
        for p, block in enumerate(segment.pattern):
            split = split_of(block, config.sharding, mesh, sequences=config.batch.global_batch, length=length)
            if split is None:
                continue
            unit = 2 * split.ways
            if is_balanced(context) and length % unit and (length, unit) not in reported:
                reported.add((length, unit))
                message = f"{length} tokens cannot be cut into {unit} chunks, two for each of the {split.ways} ways a sequence is split"
                near = f"{unit}" if length < unit else f"{length - length % unit} or {length - length % unit + unit}"
                hint = f"{near}; or sharding.context.balanced: false"
                yield Problem(path="batch.sequence_length", message=message, hint=hint, code="context", value=length, limit=unit)
            if isinstance(context, Ulysses) and split.heads % split.ways:
                message = f"ulysses divides the {split.heads} heads of a device over {split.ways} ways a sequence is split"
                path = f"model.segments.{s}.pattern.{p}.attention.heads"
                hint = f"a degree that divides {split.heads}, less tensor, or sharding.context: {{type: ring}}"
                yield Problem(path=path, message=message, hint=hint, code="context", value=block.attention.heads, limit=split.ways)


def heads_leave_the_rows(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """A rule for heads takes no mesh axis that splits the batch or the length: queries and keys lie beside their positions."""
    rules, own = config.sharding.table(), config.sharding.rules
    rows = config.batch.global_batch // config.batch.accumulation, config.batch.sequence_length
    reported: set[int] = set()
    for block in config.model.blocks:
        attention = block.attention
        for axes, heads in ((QUERY_AXES, attention.heads), (KEY_AXES, attention.kv_heads)):
            found = resolve(axes, (*rows, heads, 1), mesh, rules)
            number = next((n for n, rule in enumerate(own) if rule.weight is None and rule.rule == found.winners[2]), None)
            if number is None or number in reported or found.spec[:2] == resolve(axes[:2], rows, mesh, rules).spec:
                continue
            reported.add(number)
            taken = "+".join(own[number].mesh)
            message = f"{axes[2]} over {taken} takes what the rules for batch and length split the rows of attention over"
            hint = "mesh axes that split neither, such as tensor; or leave the rule out"
            yield Problem(path=f"sharding.rules.{number}.mesh", message=message, hint=hint, code="heads-rule", value=taken)
