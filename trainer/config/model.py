"""The model as data: a decoder-only transformer made of segments.

A segment is a pattern of blocks and how often it repeats; a scan runs over the repeats with the pattern
unrolled. Parameters are addressed by (segment, position in the pattern, repeat).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Node, PositiveFloat, PositiveInt
from trainer.config.presets import expand_preset

Dtype = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "full", "minimal", "dots"]


class Llama3Scaling(Node):
    """Llama 3.1's frequency-dependent RoPE scaling (Hugging Face `rope_type: llama3`)."""

    type: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_length: PositiveInt
    """Positions the unscaled model was trained on."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})")
        return self


class Rope(Node):
    """Rotary position embedding (Su et al. 2021), halves rotated as in Llama."""

    theta: PositiveFloat = 10_000.0
    scaling: Llama3Scaling | None = None


class Norm(Node):
    """RMSNorm (Zhang and Sennrich 2019), computed in float32."""

    epsilon: PositiveFloat = 1e-5


class Attention(Node):
    """Grouped-query causal attention (Ainslie et al. 2023)."""

    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: Rope = Rope()
    qk_norm: Norm | None = None
    """RMSNorm over the head dim of queries and keys, before RoPE (Qwen 3)."""
    window: PositiveInt | None = None
    """Sliding window: a query sees itself and the `window - 1` positions before it."""
    soft_cap: PositiveFloat | None = None
    """Logits become `cap * tanh(logits / cap)` (Gemma 2)."""
    qkv_bias: bool = False
    output_bias: bool = False

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for RoPE")
        return self


class GatedMlp(Node):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020)."""

    type: Literal["gated"] = "gated"
    hidden: PositiveInt
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    bias: bool = False


class Block(Node):
    """One layer: pre-norm attention and pre-norm MLP, each with a residual connection."""

    attention: Attention
    mlp: GatedMlp
    norm: Norm = Norm()


class Segment(Node):
    pattern: Annotated[tuple[Block, ...], Field(min_length=1)]
    """Blocks of one repeat, in order."""
    repeats: PositiveInt


class Model(Node):
    """A decoder-only transformer. `preset: NAME` fills everything; other keys override it."""

    accepted_keys: ClassVar = ("preset",)

    vocab_size: PositiveInt
    width: PositiveInt
    """Model width (`embed`)."""
    segments: Annotated[tuple[Segment, ...], Field(min_length=1)]
    final_norm: Norm = Norm()
    tie_embeddings: bool = False
    head_soft_cap: PositiveFloat | None = None
    compute_dtype: Dtype = "bfloat16"
    """Dtype of matmul inputs; weights, softmax, norms and the loss stay float32."""
    matmul_precision: Literal["default", "highest"] = "default"
    layers: Literal["scan", "unroll"] = "scan"
    remat: RematPolicy = "full"
    """What the backward pass keeps of a block: nothing (`full`), matmul results without batch dims
    (`minimal`), all matmul results (`dots`), everything (`none`)."""
    initializer_stddev: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return expand_preset(data)

    @property
    def layer_count(self) -> int:
        return sum(len(segment.pattern) * segment.repeats for segment in self.segments)
