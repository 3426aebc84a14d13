"""What the backward pass finds of a block's forward pass: kept on the device, kept by the host, or computed again. No JAX here."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from trainer.config.base import Node

BlockTensor = Literal["block_input", "query", "key", "value", "attention", "attention_out", "mlp_gate", "mlp_up", "mlp_down"]
RematPolicy = Literal[
    "none", "full", "minimal", "dots", "minimal_with_attention", "save_all_but_mlp", "save_all_but_mlp_hidden", "save_query_key_value",
    "save_attention_out", "query_key_value_offloaded", "minimal_offloaded",
]  # fmt: skip


class RematTensors(Node):
    """Tensors of a block by name; those in neither list are computed again.

    `block_input`; `query`, `key`, `value` as attention takes them; `attention`, its result before the output projection;
    `attention_out`, after it; `mlp_gate`, `mlp_up`, `mlp_down`, results of the MLP's products. A mixture of experts has
    `mlp_down`, its result, alone.
    """

    keep: tuple[BlockTensor, ...] = ()
    """On the device. The block's input is always kept, unless it is offloaded."""
    offload: tuple[BlockTensor, ...] = ()
    """In the host's memory: copied there in the forward pass and back in the backward pass."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        named = [*self.keep, *self.offload]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"named more than once: {', '.join(twice)}")
        if not named:
            raise ValueError("names no tensor: that is the policy `full`")
        return self


def _form(value: Any) -> str:
    return "policy" if isinstance(value, str) else "tensors"


Remat = Annotated[Annotated[RematPolicy, Tag("policy")] | Annotated[RematTensors, Tag("tensors")], Discriminator(_form)]

QKV: Final[tuple[BlockTensor, ...]] = ("query", "key", "value")
PRODUCTS: Final[tuple[BlockTensor, ...]] = (*QKV, "attention_out", "mlp_gate", "mlp_up", "mlp_down")

NAMED: Final[dict[RematPolicy, RematTensors]] = {
    "minimal_with_attention": RematTensors(keep=(*PRODUCTS, "attention")),
    "save_all_but_mlp": RematTensors(keep=(*QKV, "attention", "attention_out")),
    "save_all_but_mlp_hidden": RematTensors(keep=(*QKV, "attention_out", "mlp_down")),
    "save_query_key_value": RematTensors(keep=QKV),
    "save_attention_out": RematTensors(keep=("attention_out",)),
    "query_key_value_offloaded": RematTensors(offload=QKV),
    "minimal_offloaded": RematTensors(offload=PRODUCTS),
}
"""The policies that are lists of tensors."""


def tensors_of(remat: RematPolicy | RematTensors) -> RematTensors | None:
    """The tensors of a policy that is a list of them; None for the others."""
    return remat if isinstance(remat, RematTensors) else NAMED.get(remat)
