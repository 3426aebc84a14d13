"""The tensors of a forward pass whose layout the model asks for: names, shapes, logical axes. No JAX here.

B sequences of a microbatch, T tokens, D model width, N query heads, K key/value heads, H head dim, F MLP hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config.model import Attention, Block, GatedMlp
from trainer.config.train import TrainConfig


@dataclass(frozen=True)
class Activation:
    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dim; None is never split."""
    dtype: str


def batch_tensors(config: TrainConfig) -> Iterator[Activation]:
    """The global batch as it is fed."""
    shape = config.batch.global_batch, config.batch.sequence_length
    for name in ("inputs", "targets", "positions", "segments"):
        yield Activation(name, shape, ("batch", "length"), "int32")
    yield Activation("weights", shape, ("batch", "length"), "float32")


def activations(config: TrainConfig) -> Iterator[Activation]:
    """Of one microbatch, each once: the hidden state between blocks, what each block of a pattern asks for, the logits."""
    model, dtype = config.model, config.model.compute_dtype
    rows = config.batch.global_batch // config.batch.accumulation, config.batch.sequence_length
    yield Activation("hidden", (*rows, model.width), ("batch", "act_length", "act_embed"), dtype)
    seen: set[Block] = set()
    for s, segment in enumerate(model.segments):
        for p, block in enumerate(segment.pattern):
            if block not in seen:
                seen.add(block)
                yield from _block(f"segments/{s}/{p}", block, rows, dtype)
    yield Activation("logits", (*rows, model.vocab_size), ("batch", "length", "act_vocab"), "float32")


def _block(path: str, block: Block, rows: tuple[int, int], dtype: str) -> Iterator[Activation]:
    attention = block.attention
    if isinstance(attention, Attention):
        for name, heads, axis in (("query", attention.heads, "act_heads"), ("key", attention.kv_heads, "act_kv_heads")):
            yield Activation(f"{path}/attention/{name}", (*rows, heads, attention.head_dim), ("batch", "length", axis, None), dtype)
    if isinstance(block.mlp, GatedMlp):
        yield Activation(f"{path}/mlp/hidden", (*rows, block.mlp.hidden), ("batch", "length", "act_mlp"), dtype)
