"""How the run lays its tensors over the mesh: rules of its own before the table's, and what is done with the optimizer state."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, Node
from trainer.config.context import Context, Gather
from trainer.config.rules import RULES, Rule
from trainer.config.weights import stacked_path

MeshAxis = Literal["diloco", "data", "stage", "fsdp", "fsdp_transpose", "context", "tensor", "tensor_sequence", "expert"]


class AxisRule(Node):
    """Lays the dims of one logical axis over mesh axes. As every rule it applies whole or not at all."""

    axis: Annotated[str, Field(min_length=1)]
    """Logical axis, such as `mlp`; `nnxlaunch explain --sharding` shows those of every tensor."""
    mesh: tuple[MeshAxis, ...]
    """Mesh axes, outermost first. Empty: the dim is not split."""
    weight: Annotated[str, Field(min_length=1)] | None = None
    """Only in weights of this path, as `nnxlaunch explain --sharding` prints it (`*` is any text), and in their optimizer
    state. Such rules come before those for every tensor."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.mesh)) != len(self.mesh):
            raise ValueError(f"a mesh axis occurs twice in {', '.join(self.mesh)}")
        return self

    @property
    def rule(self) -> Rule:
        return self.axis, self.mesh

    def matches(self, weight: str) -> bool:
        """True for a rule attached to the weight of this path, in its own layer or with its repeats stacked."""
        return self.weight is not None and (fnmatchcase(weight, self.weight) or fnmatchcase(stacked_path(weight), self.weight))


class Sharding(Node):
    """The layout of tensors over the mesh."""

    rules: tuple[AxisRule, ...] = ()
    """Before the built-in table, in this order: of the rules that name a dim, the first whose mesh axes are free wins."""
    optimizer: Literal["as_weights", "over_data"] = "as_weights"
    """`over_data` (ZeRO, stage 1; Rajbhandari et al. 2020): the optimizer state and the weights as stored are split over
    `data` too, and a step begins with one gathering of the weights, in compute dtype."""
    context: Context = Gather()
    """How attention works where the mesh splits sequences (`mesh.*.context`)."""
    unsharded_limit: Fraction = 0.02
    """Largest share of the parameters that may lie in weights which a mesh axis for weights does not split."""

    def table(self, weight: str | None = None) -> tuple[Rule, ...]:
        """All rules in order: those attached to `weight` (a path), those for every tensor, the built-in table."""
        attached = [rule.rule for rule in self.rules if weight is not None and rule.matches(weight)]
        return (*attached, *(rule.rule for rule in self.rules if rule.weight is None), *RULES)
