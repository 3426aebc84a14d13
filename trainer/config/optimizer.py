"""Optimizer, learning-rate schedule and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Fraction, Node, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class AdamW(Node):
    """AdamW (Loshchilov and Hutter 2019), decoupled weight decay."""

    type: Literal["adamw"] = "adamw"
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices`: tensors of two or more dims in one layer; norms and biases do not decay."""
    clip_norm: PositiveFloat | None = 1.0
    """Clip gradients to this global norm, after accumulation and normalisation."""


class Constant(Node):
    type: Literal["constant"] = "constant"
    learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt = 0
    """Step n of the warm-up uses the fraction (n + 1) / warmup_steps."""


class Cosine(Node):
    """Linear warm-up, then half a cosine to `final_fraction` of the peak, then constant."""

    type: Literal["cosine"] = "cosine"
    learning_rate: NonNegativeFloat
    """The peak."""
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = 0.1
    decay_until_step: PositiveInt | None = None
    """Default: the last step of the run."""


class WarmupStableDecay(Node):
    """Linear warm-up, constant, then linear decay to `final_fraction` over the last `decay_steps`."""

    type: Literal["wsd"] = "wsd"
    learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt
    final_fraction: Fraction = 0.0


Optimizer = AdamW
Schedule = Annotated[Constant | Cosine | WarmupStableDecay, Field(discriminator="type")]


class Loss(Node):
    z_loss_weight: NonNegativeFloat = 0.0
    """Weight of the squared log-partition term (Chowdhery et al. 2022, section 5)."""
