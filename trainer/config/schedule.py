"""Learning-rate schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Fraction, Node, NonNegativeFloat, NonNegativeInt, PositiveInt


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


class Linear(Node):
    """Linear warm-up, then a straight line to `final_fraction` of the peak, then constant."""

    type: Literal["linear"] = "linear"
    learning_rate: NonNegativeFloat
    """The peak."""
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = 0.0
    decay_until_step: PositiveInt | None = None
    """Default: the last step of the run."""


class WarmupStableDecay(Node):
    """Linear warm-up, constant, then linear decay to `final_fraction` over the last `decay_steps`."""

    type: Literal["wsd"] = "wsd"
    learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt
    final_fraction: Fraction = 0.0


Schedule = Annotated[Constant | Cosine | Linear | WarmupStableDecay, Field(discriminator="type")]
