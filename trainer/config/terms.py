"""What a run minimises beside the cross-entropy: the enabled terms, declared once. No JAX here.

    loss = cross_entropy + sum over terms of weight * value,    value = sum over what counts / number of what counts

Every term is a sum over positions divided once by a count of the *whole* global batch, so microbatches,
data-parallel degree and stages cannot change it or its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.model import Moe
from trainer.config.train import TrainConfig

Count = Literal["tokens", "positions"]
"""`tokens`: positions whose weight is not 0 (valid tokens). `positions`: positions that are not padding."""


@dataclass(frozen=True, kw_only=True)
class Term:
    name: str
    """Name in the metrics; a term of the model: also its key in `Forward.terms`."""
    weight: float
    counts: Count
    """What its sum is divided by."""


def loss_terms(config: TrainConfig) -> tuple[Term, ...]:
    """Every enabled term: the head's, then the model's."""
    z_weight = config.loss.z_loss_weight
    head = (Term(name="z_loss", weight=z_weight, counts="tokens"),) if z_weight else ()
    return (*head, *model_terms(config))


def model_terms(config: TrainConfig) -> tuple[Term, ...]:
    """Terms whose sums the model's forward pass returns; a forward pass that returns others is refused."""
    loss = config.loss
    if not any(isinstance(block.mlp, Moe) for block in config.model.blocks):
        return ()
    weights = {"load_balance": loss.load_balance_weight, "router_z_loss": loss.router_z_loss_weight}
    return tuple(Term(name=name, weight=weight, counts="positions") for name, weight in weights.items() if weight)
