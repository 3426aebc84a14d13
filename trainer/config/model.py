"""The model as data: a decoder-only transformer made of segments.

A segment is a pattern of blocks and how often it repeats; a scan runs over the repeats with the pattern
unrolled. Parameters are addressed by (segment, position in the pattern, repeat).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from trainer.config.attention import Attention, LatentAttention, LinearScaling, Llama3Scaling, Norm, Rope, YarnScaling
from trainer.config.base import Node, PositiveFloat, PositiveInt, tag_or
from trainer.config.mlp import BiasBalancing, Capacity, Clamp, DenseDispatch, Dropless, ExpertKernel, GatedMlp, Groups, Moe, Router
from trainer.config.presets import expand_preset
from trainer.config.remat import Remat, RematPolicy, RematTensors

Dtype = Literal["float32", "bfloat16"]
AttentionKernel = Literal["auto", "plain", "splash"]


class Block(Node):
    """One layer: attention and MLP, each with norms and a residual connection."""

    attention: Annotated[
        Annotated[Attention, Tag("grouped")] | Annotated[LatentAttention, Tag("latent")],
        Discriminator(tag_or("grouped")),
    ]
    mlp: Annotated[Annotated[GatedMlp, Tag("gated")] | Annotated[Moe, Tag("moe")], Discriminator(tag_or("gated"))]
    norm: Norm = Norm()
    norms: Literal["pre", "post", "both"] = "pre"
    """Where norms stand: before attention and MLP (Llama), after them and before the residual sum (OLMo 2), or both (Gemma 2)."""


class Segment(Node):
    pattern: Annotated[tuple[Block, ...], Field(min_length=1)]
    """Blocks of one repeat, in order."""
    repeats: PositiveInt


class MultiToken(Node):
    """Multi-token prediction (DeepSeek-V3, 2024, section 2.2): module k predicts one token further than module k - 1.

    A module joins what the one before (the model itself, before the first) says of a token with the embedding of the token
    k places on, and runs one more block, built as the model's last; embedding and head are the model's. `loss.multi_token_weight`.
    """

    depth: Annotated[int, Field(ge=1, le=4, strict=True)] = 1
    """Modules: tokens predicted beyond the next one."""


class Model(Node):
    """A decoder-only transformer. `preset: NAME` fills everything; other keys override it."""

    accepted_keys: ClassVar = ("preset",)

    vocab_size: PositiveInt
    width: PositiveInt
    """Model width (`embed`)."""
    embedding_scale: PositiveFloat | None = None
    """Embedded tokens are multiplied by it (Gemma: the square root of the width)."""
    segments: Annotated[tuple[Segment, ...], Field(min_length=1)]
    final_norm: Norm = Norm()
    multi_token: MultiToken | None = None
    tie_embeddings: bool = False
    head_soft_cap: PositiveFloat | None = None
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Share of the elements of embedded tokens, and of what each attention and each MLP adds, that a training step leaves
    out. Which ones depends on seed, step, layer and place in the global batch alone."""
    compute_dtype: Dtype = "bfloat16"
    """Dtype of matmul inputs; weights, softmax, norms and the loss stay float32."""
    matmul_precision: Literal["default", "highest"] = "default"
    attention_kernel: AttentionKernel = "auto"
    """`splash`: the Pallas kernel for TPUs, which keeps scores on the chip; on other devices it is interpreted, slowly.
    `plain`: matrix products and a softmax. `auto`: splash on TPUs where the sequence length is a multiple of 128."""
    expert_kernel: ExpertKernel = "auto"
    """The products of dropless experts. `megablox`: Pallas kernels for TPUs; on other devices they are interpreted, slowly.
    `ragged_dot`: XLA's own. `auto`: megablox on TPUs where the dims of an expert's matrices on a device are multiples of 128."""
    layers: Literal["scan", "unroll"] = "scan"
    remat: Remat = "full"
    """What the backward pass keeps of a block: nothing (`full`), results of products with weights (`minimal`), all matmul
    results (`dots`), everything (`none`); `minimal_with_attention` also attention's own result; the `save_` policies only some
    of them; those that end in `offloaded` keep them in the host's memory; or tensors by name. docs/compile.md compares them."""
    initializer_stddev: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return expand_preset(data)

    @property
    def layer_count(self) -> int:
        return sum(len(segment.pattern) * segment.repeats for segment in self.segments)

    @property
    def depth(self) -> int:
        """Modules of multi-token prediction."""
        return self.multi_token.depth if self.multi_token else 0

    @property
    def patterns(self) -> list[Block]:
        """The blocks of every segment's pattern, once each."""
        return [block for segment in self.segments for block in segment.pattern]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block of every layer, in forward order."""
        return tuple(block for segment in self.segments for _ in range(segment.repeats) for block in segment.pattern)


__all__ = [
    "Attention", "AttentionKernel", "BiasBalancing", "Block", "Capacity", "Clamp", "DenseDispatch", "Dropless", "Dtype", "ExpertKernel",
    "GatedMlp", "Groups", "LatentAttention", "LinearScaling", "Llama3Scaling", "Model", "Moe", "MultiToken", "Norm", "Remat",
    "RematPolicy", "RematTensors", "Rope", "Router", "Segment", "YarnScaling",
]  # fmt: skip
