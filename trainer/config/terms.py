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

Count = Literal["tokens", "positions", "depth_1", "depth_2", "depth_3", "depth_4"]
"""`tokens`: positions whose weight is not 0 (valid tokens). `positions`: positions that are not padding. `depth_K`: positions
whose document goes on for K tokens more, the last of them with a target that counts."""
DEPTHS: tuple[Count, ...] = ("depth_1", "depth_2", "depth_3", "depth_4")


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
    loss, blocks = config.loss, config.model.blocks
    weights = {"load_balance": loss.load_balance_weight, "router_z_loss": loss.router_z_loss_weight}
    mixtures = any(isinstance(block.mlp, Moe) for block in blocks)
    balance = [Term(name=name, weight=weight, counts="positions") for name, weight in weights.items() if weight and mixtures]
    depths = DEPTHS[: config.model.depth]
    share = loss.multi_token_weight / max(len(depths), 1)
    ahead = [Term(name=f"multi_token_{k}", weight=share, counts=counts) for k, counts in enumerate(depths, 1)]
    return (*balance, *ahead)


def eval_terms(config: TrainConfig) -> tuple[Term, ...]:
    """What an evaluation sums beside the cross-entropy: the model's terms, and of each module of multi-token prediction how
    often the model itself, once it is there, predicts the same token: the acceptance rate of a draft."""
    depths = DEPTHS[: config.model.depth]
    accepted = [Term(name=f"accepted_{k}", weight=0.0, counts=counts) for k, counts in enumerate(depths, 1)]
    return (*model_terms(config), *accepted)
