"""Attention as data: rotary embedding, norms, grouped-query and latent attention."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from trainer.config.base import Fraction, Node, NonNegativeFloat, PositiveFloat, PositiveInt, tag_or

KERNEL_BLOCK: Final = 128
"""Tokens of the smallest block of the splash attention kernel: lanes of a TPU."""


class Norm(Node):
    """RMSNorm (Zhang and Sennrich 2019), computed in float32."""

    epsilon: PositiveFloat = 1e-5
    offset: NonNegativeFloat = 0.0
    """Added to the stored scale: 1 in Gemma, whose scales are stored around 0."""


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


class LinearScaling(Node):
    """Every frequency divided by `factor` (Chen et al. 2023; Hugging Face `rope_type: linear`)."""

    type: Literal["linear"] = "linear"
    factor: PositiveFloat


class YarnScaling(Node):
    """YaRN (Peng et al. 2023): low frequencies divided by `factor`, high ones kept, a linear ramp between; rotated vectors scaled."""

    type: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_length: PositiveInt
    """Positions the unscaled model was trained on."""
    beta_fast: PositiveFloat = 32.0
    """Pairs that turn more often than this over the original length keep their frequency."""
    beta_slow: PositiveFloat = 1.0
    """Pairs that turn less often than this are divided by the whole factor."""
    truncate: bool = True
    """Round the ends of the ramp outwards to whole pairs."""
    attention_factor: PositiveFloat | None = None
    """What rotated queries and keys are multiplied by; by default it follows from `factor` and the two `mscale`."""
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    """DeepSeek's two gains g(m) = 0.1 m ln(factor) + 1: rotated vectors get g(mscale) / g(mscale_all_dim), and scores of
    latent attention g(mscale_all_dim)^2."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow ({self.beta_slow}) must be below beta_fast ({self.beta_fast})")
        return self

    def gain(self, mscale: float = 1.0) -> float:
        """g(mscale): 1 where the context is not stretched."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def rotated_gain(self) -> float:
        """The factor on cosine and sine (Peng et al. 2023, section 3.4; DeepSeek-V3's model code for the two `mscale`)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.gain(self.mscale) / self.gain(self.mscale_all_dim)
        return self.gain()


RopeScaling = Annotated[
    Annotated[Llama3Scaling, Tag("llama3")] | Annotated[LinearScaling, Tag("linear")] | Annotated[YarnScaling, Tag("yarn")],
    Discriminator(tag_or("llama3")),
]


class Rope(Node):
    """Rotary position embedding (Su et al. 2021)."""

    theta: PositiveFloat = 10_000.0
    scaling: RopeScaling | None = None
    pairs: Literal["halves", "interleaved"] = "halves"
    """What is rotated together: a dim and the one half a head further (Llama), or neighbours (DeepSeek)."""
    fraction: Annotated[Fraction, Field(gt=0)] = 1.0
    """Leading part of a head that is rotated; the rest passes as it is."""

    def rotated(self, head_dim: int) -> int:
        """Dims of a head that are rotated."""
        return int(head_dim * self.fraction)


class Attention(Node):
    """Grouped-query causal attention (Ainslie et al. 2023)."""

    type: Literal["grouped"] = "grouped"
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: Rope = Rope()
    qk_norm: Norm | None = None
    """RMSNorm of queries and keys before RoPE (Qwen 3, OLMo 2)."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """Dims the query and key norms average over: one head (Qwen 3, Gemma 3) or all heads together (OLMo 2)."""
    window: PositiveInt | None = None
    """Sliding window: a query sees itself and the `window - 1` positions before it."""
    soft_cap: PositiveFloat | None = None
    """Logits become `cap * tanh(logits / cap)` (Gemma 2)."""
    scale_dim: PositiveFloat | None = None
    """Scores are divided by its square root; by default `head_dim` (Gemma's `query_pre_attn_scalar`)."""
    sinks: bool = False
    """A learned logit of each head that takes part in the softmax and has no value (GPT-OSS)."""
    qkv_bias: bool = False
    output_bias: bool = False

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for RoPE")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"rope.fraction ({self.rope.fraction}) of head_dim ({self.head_dim}) must be an even number of dims")
        return self

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that RoPE rotates."""
        return self.rope.rotated(self.head_dim)

    @property
    def score_divisor(self) -> float:
        """What products of queries and keys are divided by."""
        return math.sqrt(self.scale_dim or self.head_dim)

    @property
    def value_dim(self) -> int:
        """Dims of a head's value."""
        return self.head_dim


class LatentAttention(Node):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are projected from a narrow latent, positions go beside it."""

    type: Literal["latent"] = "latent"
    heads: PositiveInt
    query_rank: PositiveInt | None = None
    """Width of the latent that queries are projected from; null: straight from the model width."""
    key_value_rank: PositiveInt
    """Width of the latent that keys and values are projected from."""
    plain_dim: PositiveInt
    """Dims of a query's and key's head without positions (`qk_nope_head_dim`)."""
    rope_dim: PositiveInt
    """Dims with rotary positions; their key is one for all heads (`qk_rope_head_dim`)."""
    value_dim: PositiveInt
    """Dims of a head's value."""
    rope: Rope = Rope(pairs="interleaved")
    latent_norm: Norm = Norm(epsilon=1e-6)
    """RMSNorm of both latents."""
    bias: bool = False
    """Biases on the projections to the latents and on the output."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim ({self.rope_dim}) must be even for RoPE")
        if self.rope.fraction != 1:
            raise ValueError("rope.fraction must be 1: rope_dim says what is rotated")
        return self

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        """Dims of a query's head."""
        return self.plain_dim + self.rope_dim

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim

    @property
    def window(self) -> None:
        """Every earlier position is seen."""

    @property
    def soft_cap(self) -> None:
        """Scores are not capped."""

    @property
    def score_divisor(self) -> float:
        """sqrt(query dims), less YaRN's squared gain where `mscale_all_dim` asks for it (DeepSeek-V3's model code)."""
        scaling = self.rope.scaling
        gain = scaling.gain(scaling.mscale_all_dim) if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim else 1.0
        return math.sqrt(self.head_dim) / gain**2
