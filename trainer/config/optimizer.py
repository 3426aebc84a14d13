"""Optimizer and loss."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from trainer.config.base import Fraction, Node, NonNegativeFloat, PositiveFloat, PositiveInt, tag_or
from trainer.config.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay

Dtype = Literal["float32", "bfloat16"]
Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Selector = Annotated[str, Field(min_length=1, max_length=200)]


class Group(Node):
    """Tensors with a treatment of their own; of the groups that select a tensor the first one counts."""

    tensors: Annotated[tuple[Selector, ...], Field(min_length=1)]
    """Each selects tensors: `axis:NAME` those with that logical axis (`axis:vocab`: embedding and head), anything else
    is a pattern for the path, `*` standing for any text: `segments/0/*`, `*/mlp/down`. A path is that of stacked
    layers, whatever `model.layers` says, so all repeats of a block are in the same group."""
    frozen: bool = False
    """Never updated; has neither gradient nor optimizer state."""
    learning_rate_factor: PositiveFloat = 1.0
    """Multiplies the schedule's learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Default: what the optimizer's `weight_decay` and `decay` say."""

    @model_validator(mode="after")
    def _frozen_alone(self) -> Self:
        if self.frozen and self.model_fields_set & {"learning_rate_factor", "weight_decay"}:
            raise ValueError("frozen tensors have neither a learning rate nor weight decay: leave those out")
        return self


class SkipSpikes(Node):
    """Leave out the update of a step whose gradient norm, before clipping, is far above those of the steps before."""

    window_steps: Annotated[int, Field(ge=4, le=100_000, strict=True)] = 128
    """Norms the mean and the standard deviation are taken of; nothing is skipped before half of them are there."""
    deviations: PositiveFloat = 6.0
    """Standard deviations above the mean that make a spike; one is taken to be at least 1 % of the mean."""


class Shared(Node):
    """What every optimizer has."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled: multiplied by the learning rate, not by the gradient's scale."""
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices`: tensors that a matmul contracts; norms and biases do not decay."""
    clip_norm: PositiveFloat | None = 1.0
    """Clip gradients to this global norm, after accumulation and normalisation."""
    groups: tuple[Group, ...] = ()
    gradient_dtype: Dtype = "float32"
    """Dtype a backward pass hands its gradients over in; sums over microbatches and updates are float32. The gradient of a weight that
    layers compute with in bfloat16 is rounded to that before, and between the sums over two mesh axes."""
    skip_spikes: SkipSpikes | None = None
    state_memory: Literal["device", "host"] = "device"
    """Where the state lies between updates. `host`: in the host's memory, from where it is copied for each update and back; the
    step waits for as much of these copies as computation does not hide. Numbers do not depend on it."""


class AdamW(Shared):
    """AdamW (Loshchilov and Hutter 2019), decoupled weight decay."""

    type: Literal["adamw"] = "adamw"
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    moment_dtype: Dtype = "float32"
    """Of the first moment; the second stays float32: in bfloat16 its small increments would be lost."""


class Muon(Shared):
    """Muon (Jordan et al. 2024): momentum, orthogonalised by Newton-Schulz iterations.

    For the matrices inside of blocks, each with the dims a matmul contracts against the others; stacked layers and
    experts are matrices of their own. Embedding, head, norms and biases are AdamW's, with `b1`, `b2`, `epsilon`.
    """

    type: Literal["muon"] = "muon"
    momentum: Momentum = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1, le=20, strict=True)] = 5
    update_rms: PositiveFloat | None = 0.2
    """Scales updates by this times sqrt(max(inputs, outputs)), so that learning rate and decay of AdamW fit
    (Liu et al. 2025); null: by sqrt(max(1, outputs / inputs)) (Jordan et al.)."""
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    moment_dtype: Dtype = "float32"
    """Of momentum and AdamW's first moment."""


class Sgd(Shared):
    """Stochastic gradient descent with momentum: m = momentum * m + g."""

    type: Literal["sgd"] = "sgd"
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled: multiplied by the learning rate, not by the gradient's scale."""
    momentum: Momentum = 0.9
    """0: no state at all."""
    nesterov: bool = False
    moment_dtype: Dtype = "float32"


class Adafactor(Shared):
    """Adafactor (Shazeer and Stern 2018) without momentum: the second moment as a row and a column."""

    type: Literal["adafactor"] = "adafactor"
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled: multiplied by the learning rate, not by the gradient's scale."""
    decay_exponent: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Step t keeps the share 1 - t ^ -decay_exponent of the second moment."""
    factored_from: PositiveInt = 128
    """A tensor is factored over its two largest dims when both have at least this size; else its whole second moment is kept."""
    clip_update_rms: PositiveFloat | None = 1.0
    """Clip each tensor's update to this root mean square."""
    scale_by_parameter: bool = True
    """Multiply each tensor's update by the root mean square of the tensor, at least 0.001."""
    epsilon: PositiveFloat = 1e-30


class Lion(Shared):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum. Wants a learning rate 3 to 10 times below AdamW's."""

    type: Literal["lion"] = "lion"
    b1: Fraction = 0.9
    b2: Fraction = 0.99
    moment_dtype: Dtype = "float32"


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Muon, Tag("muon")]
    | Annotated[Sgd, Tag("sgd")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Lion, Tag("lion")],
    Discriminator(tag_or("adamw")),
]


class Loss(Node):
    z_loss_weight: NonNegativeFloat = 0.0
    """Weight of the squared log-partition term (Chowdhery et al. 2022, section 5)."""
    load_balance_weight: NonNegativeFloat = 0.0
    """Of a mixture of experts: weight of `experts * sum_e f_e P_e`, f_e the share of a sequence's choices that fall on expert e and
    P_e its mean probability in that sequence (Fedus et al. 2021; by sequence as in DeepSeek-V3), mean over the mixture layers."""
    router_z_loss_weight: NonNegativeFloat = 0.0
    """Of a mixture of experts: weight of log(sum_e exp(logit_e))^2 (Zoph et al. 2022), mean over the mixture layers."""
    tiles: PositiveInt = 1
    """Tiles of a sequence whose logits are computed one after another, and again in the backward pass: with a large
    vocabulary the logits are the largest arrays of a step. 1: all at once."""
    multi_token_weight: PositiveFloat = 0.1
    """Of multi-token prediction: weight of the modules' cross-entropies, mean over the modules (DeepSeek-V3 began with 0.3)."""
    silent_term_steps: PositiveInt = 100
    """An enabled term that is exactly zero for so many steps is an error event. Every so many steps each term's gradient
    norm is measured on one microbatch and logged; a norm of zero is an error event too."""


__all__ = [
    "Adafactor", "AdamW", "Constant", "Cosine", "Group", "Linear", "Lion", "Loss", "Muon", "Optimizer", "Schedule", "Sgd",
    "SkipSpikes", "WarmupStableDecay",
]  # fmt: skip
