"""Floating-point operations of the model, counted exactly. No JAX here.

Convention, as in PaLM (Chowdhery et al. 2022, appendix B) with attention counted as it is masked:
- a multiply-add is two operations; only matrix products count (norms, activations, softmax and the embedding
  lookup are below 1 % at any useful size);
- the backward pass costs twice the forward pass; recomputation by remat does not count (this is MFU, not HFU);
- query t of a causal layer sees min(t + 1, window) keys, so a full layer costs T (T + 1) / 2 pairs, not T^2;
- a row counts as one document: borders of packed documents and padding are not subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.model import Attention, GatedMlp, LatentAttention, Model, Moe


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of one forward pass over one sequence."""

    projections: int  # attention's query, key, value and output products
    attention: int  # scores and weighted sums
    mlp: int  # of a mixture: the router, and the experts a token passes
    head: int
    multi_token: int = 0  # modules of multi-token prediction, each with the head

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.mlp + self.head + self.multi_token


def forward_flops(model: Model, sequence_length: int) -> ForwardFlops:
    """Operations of one sequence of `sequence_length` tokens."""
    T, D = sequence_length, model.width
    layers = [(block, segment.repeats) for segment in model.segments for block in segment.pattern]
    return ForwardFlops(
        projections=sum(repeats * 2 * T * _projection_weights(block.attention, D) for block, repeats in layers),
        attention=sum(repeats * _attention_flops(block.attention, T) for block, repeats in layers),
        mlp=sum(repeats * 2 * T * _mlp_weights(block.mlp, D) for block, repeats in layers),
        head=2 * T * D * model.vocab_size,
        multi_token=model.depth * _module_flops(model, T),
    )


def train_flops(model: Model, sequences: int, sequence_length: int) -> int:
    """Operations of forward and backward pass over `sequences` sequences: one step, where that is the global batch."""
    return 3 * sequences * forward_flops(model, sequence_length).total


def mfu(*, flops_per_step: float, step_seconds: float, devices: int, peak_tflops_per_device: float) -> float:
    """Model FLOPs utilisation: the share of the devices' peak that went into the operations counted here."""
    return flops_per_step / (step_seconds * devices * peak_tflops_per_device * 1e12)


def visible_pairs(sequence_length: int, window: int | None) -> int:
    """Query-key pairs of a causal layer over one sequence: the sum over t of min(t + 1, window)."""
    T = sequence_length
    full = min(T, window) if window is not None else T
    return full * (full + 1) // 2 + (T - full) * full


def _module_flops(model: Model, sequence_length: int) -> int:
    block, D = model.blocks[-1], model.width
    weights = 2 * D * D + _projection_weights(block.attention, D) + _mlp_weights(block.mlp, D) + D * model.vocab_size
    return 2 * sequence_length * weights + _attention_flops(block.attention, sequence_length)


def _projection_weights(attention: Attention | LatentAttention, width: int) -> int:
    if isinstance(attention, Attention):
        return width * attention.head_dim * 2 * (attention.heads + attention.kv_heads)
    heads, rank = attention.heads, attention.query_rank
    query = width * heads * attention.head_dim if rank is None else rank * (width + heads * attention.head_dim)
    latent = width * (attention.key_value_rank + attention.rope_dim)
    key_and_value = attention.key_value_rank * heads * (attention.plain_dim + attention.value_dim)
    return query + latent + key_and_value + heads * attention.value_dim * width


def _attention_flops(attention: Attention | LatentAttention, sequence_length: int) -> int:
    dims = attention.head_dim + attention.value_dim
    return 2 * attention.heads * dims * visible_pairs(sequence_length, attention.window)


def _mlp_weights(mlp: GatedMlp | Moe, width: int) -> int:
    return 3 * width * mlp.active_hidden + (width * mlp.experts if isinstance(mlp, Moe) else 0)
