"""The MLP of a block as data: gated, or a mixture of gated experts."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from trainer.config.base import Node, NonNegativeFloat, PositiveFloat, PositiveInt, tag_or

Activation = Literal["silu", "gelu", "gelu_tanh"]
ExpertKernel = Literal["auto", "ragged_dot", "megablox"]

KERNEL_LANES: Final = 128
"""What the megablox kernels take dims of an expert's matrices in multiples of: lanes of a TPU."""


class Clamp(Node):
    """GPT-OSS's clamped SwiGLU: `(up + 1) * gate * sigmoid(slope * gate)` with gate at most `limit` and |up| at most `limit`."""

    limit: PositiveFloat = 7.0
    slope: PositiveFloat = 1.702


class GatedMlp(Node):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020)."""

    type: Literal["gated"] = "gated"
    hidden: PositiveInt
    activation: Activation = "silu"
    clamp: Clamp | None = None
    """Clamped SwiGLU instead of `activation`."""
    bias: bool = False

    @model_validator(mode="after")
    def _clamped(self) -> Self:
        return _check_clamp(self)

    @property
    def active_hidden(self) -> int:
        """Hidden dims a token passes through."""
        return self.hidden


class Groups(Node):
    """Group-limited routing (DeepSeek-V3): experts come from the best groups only, by the sum of each group's two best scores."""

    count: PositiveInt
    """Groups the experts are divided into, neighbours together."""
    chosen: PositiveInt
    """Groups a token may use."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.chosen > self.count:
            raise ValueError(f"chosen ({self.chosen}) must not exceed count ({self.count})")
        return self


class BiasBalancing(Node):
    """A bias of each expert that takes part in the choice but not in the weight (Wang et al. 2024, auxiliary-loss-free balancing)."""

    update_rate: NonNegativeFloat = 0.001
    """After each step the bias of an expert with less than the mean load rises by this, of one with more it falls; 0 keeps it."""


class Router(Node):
    """Which experts a token goes to and with what weights, computed in float32."""

    scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
    """Scores of experts: a softmax over all (Mixtral, Qwen), over the chosen ones only (GPT-OSS), or each by itself (DeepSeek-V3)."""
    normalize: bool = True
    """Divide the chosen experts' weights by their sum."""
    scale: PositiveFloat = 1.0
    """Multiplies the weights."""
    bias: bool = False
    """A learned bias on the logits."""
    groups: Groups | None = None
    bias_balancing: BiasBalancing | None = None


class Dropless(Node):
    """Every choice is computed: tokens sorted by expert, one grouped matmul."""

    type: Literal["dropless"] = "dropless"


class DenseDispatch(Node):
    """Every expert computes every token; for checks and tiny models."""

    type: Literal["dense"] = "dense"


class Capacity(Node):
    """Each expert takes so many choices of a sequence, the earliest first; the rest are dropped (Lepikhin et al. 2020)."""

    type: Literal["capacity"] = "capacity"
    factor: PositiveFloat = 1.25
    """Room of an expert in a sequence: factor * choices / experts, rounded up."""


Dispatch = Annotated[
    Annotated[Dropless, Tag("dropless")] | Annotated[DenseDispatch, Tag("dense")] | Annotated[Capacity, Tag("capacity")],
    Discriminator(tag_or("dropless")),
]


class Moe(Node):
    """A mixture of gated experts: each token passes `experts_per_token` of `experts`, and the shared one where there is one."""

    type: Literal["moe"] = "moe"
    experts: PositiveInt
    experts_per_token: PositiveInt
    hidden: PositiveInt
    """Of one expert."""
    shared_hidden: PositiveInt | None = None
    """Hidden dims of an MLP that every token passes beside its experts (DeepSeek)."""
    activation: Activation = "silu"
    clamp: Clamp | None = None
    """Clamped SwiGLU instead of `activation`."""
    bias: bool = False
    """Biases in the experts."""
    router: Router = Router()
    dispatch: Dispatch = Dropless()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) must not exceed experts ({self.experts})")
        if (groups := self.router.groups) is not None:
            if self.experts % groups.count:
                raise ValueError(f"experts ({self.experts}) must be a multiple of router.groups.count ({groups.count})")
            reachable = self.experts // groups.count * groups.chosen
            if self.experts_per_token > reachable:
                raise ValueError(f"experts_per_token ({self.experts_per_token}) exceeds the {reachable} experts of the chosen groups")
            if groups.count > 1 and self.experts // groups.count < 2:
                raise ValueError(f"router.groups.count ({groups.count}) leaves fewer than two experts to a group")
        return _check_clamp(self)

    @property
    def active_hidden(self) -> int:
        """Hidden dims a token passes through."""
        return self.experts_per_token * self.hidden + (self.shared_hidden or 0)


def _check_clamp[M: (GatedMlp, Moe)](mlp: M) -> M:
    if mlp.clamp is not None and mlp.activation != "silu":
        raise ValueError(f"clamp is SwiGLU's: activation must be silu, not {mlp.activation}")
    return mlp
