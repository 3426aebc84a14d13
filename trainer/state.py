"""TrainState: model and optimizer as one unit; its abstract tree, its layout over the mesh, its initial value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from trainer.config.layouts import working_dtype
from trainer.config.pipeline import PipelinePlan, plan_pipeline
from trainer.config.train import TrainConfig
from trainer.config.treatment import treatments
from trainer.config.weights import weights
from trainer.initial import initial_keys, initial_parameters, random_key
from trainer.model import create_abstract_model
from trainer.optim import build_optimizer, build_schedule
from trainer.parallel.sharding import Layout, constrain
from trainer.replicas import REPLICAS, describe_replicas, replicate

Items = dict[str, dict[str, Any]]

OPTIMIZER: Final = ("optimizer", "opt_state")
"""Where the state has what the optimizer keeps of the tensors."""
HOST: Final = "pinned_host"
"""JAX's name of the host's memory that a device copies from by itself."""


class RandomKey(nnx.Variable[jax.Array]):
    """Raw threefry key data, uint32 [2]; keys for dropout and sampling are folded from it, it never advances."""


class TrainState(nnx.Module):
    """Model, optimizer and the run's random key; `optimizer.step` is the one step counter. `ema`, where it is kept: the average model."""

    def __init__(self, model: nnx.Module, optimizer: nnx.Optimizer[Any], key: jax.Array, ema: nnx.Module | None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.key = RandomKey(key)
        if ema is not None:
            self.ema = ema


@dataclass(frozen=True)
class StateSpec:
    """The state without its values."""

    graphdef: nnx.GraphDef[TrainState]
    model: nnx.GraphDef[nnx.Module]
    """Of the model alone, whose state is `model` of the whole."""
    abstract: nnx.State  # leaves jax.ShapeDtypeStruct with sharding
    shardings: nnx.State  # leaves NamedSharding
    trained: nnx.filterlib.Filter = nnx.Param
    """Selects the parameters that are not frozen, out of the model and its parts of the state."""
    pipeline: PipelinePlan | None = None
    """How the model's layers are laid out, where some of them are pipelined."""
    replica: StateSpec | None = None
    """Of one replica's state, where there are replicas."""


def describe_state(config: TrainConfig, layout: Layout) -> StateSpec:
    """Structure, shapes, dtypes and shardings of the state; nothing is computed or allocated."""
    graphdefs: list[nnx.GraphDef[TrainState]] = []
    pipeline = plan_pipeline(config, layout.mesh.shape)

    def build(params: nnx.State) -> nnx.State:
        graphdef, state = nnx.split(_train_state(config, nnx.merge(model_def, params), pipeline))
        graphdefs.append(graphdef)
        return state

    model_def, params = nnx.split(create_abstract_model(config.model, pipeline), nnx.Param)
    abstract = jax.eval_shape(build, params)
    flat = nnx.to_flat_state(abstract)
    offload = config.optimizer.state_memory == "host"
    shardings = [(path, variable.replace(_sharding(variable, layout, host=offload and path[:2] == OPTIMIZER))) for path, variable in flat]
    leaves = [
        (path, variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding.get_value())))
        for (path, variable), (_, sharding) in zip(flat, shardings, strict=True)
    ]
    model = nnx.merge(model_def, params)
    wrt, graph = trained(config, model, pipeline), nnx.graphdef(model)
    one = StateSpec(graphdefs[0], graph, nnx.from_flat_state(leaves), nnx.from_flat_state(shardings), wrt, pipeline)
    return one if config.diloco is None else describe_replicas(one, layout.mesh)


def initial_state(config: TrainConfig, spec: StateSpec, parameters: Mapping[str, jax.Array] | None = None) -> nnx.State:
    """The first state of a run, computed where it lives.

    Without `parameters` (arrays by path, laid out as `spec` says; they are used up) the same random ones for every
    mesh, process count and layer form.
    """

    def assemble(values: Mapping[str, jax.Array]) -> nnx.State:
        model_def, abstract = nnx.split(create_abstract_model(config.model, spec.pipeline), nnx.Param)
        params = [(path, variable.replace(values[join_path(path)])) for path, variable in nnx.to_flat_state(abstract)]
        state = nnx.split(_train_state(config, nnx.merge(model_def, nnx.from_flat_state(params)), spec.pipeline))[1]
        return state if spec.replica is None else replicate(spec, state)

    def init(keys: Mapping[str, jax.Array]) -> nnx.State:
        return assemble(initial_parameters(config.model, keys, spec.pipeline))

    if parameters is not None:
        return jax.jit(assemble, donate_argnums=0, out_shardings=spec.shardings)(dict(parameters))
    # Keys are arguments: as constants, the compiler would evaluate all random bits by itself, slowly. The program
    # runs once and its arithmetic is exact, so on a CPU it is compiled with little optimisation: a quarter of the time.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=spec.shardings, compiler_options=options)(initial_keys(config.model, config.seed, spec.pipeline))


def state_items(state: nnx.State) -> Items:
    """The state as flat dicts of arrays by path: parameters, optimizer state, the rest (step counter and random key), `replicas`, `ema`.

    Where there are replicas, `params` are the outer parameters and `opt` is the outer optimizer's state.
    """
    items: Items = {"params": {}, "opt": {}, "rest": {}}
    for path, variable in nnx.to_flat_state(state):
        item, name = _address(path)
        items.setdefault(item, {})[name] = variable.get_value()
    return items


def state_from_items(spec: StateSpec, items: Items) -> nnx.State:
    """The inverse of `state_items`; what `items` lacks as a whole, the state lacks too."""
    flat = [(path, variable, *_address(path)) for path, variable in nnx.to_flat_state(spec.abstract)]
    return nnx.from_flat_state([(path, variable.replace(items[item][name])) for path, variable, item, name in flat if item in items])


def join_path(path: tuple[Any, ...]) -> str:
    """A path of the model's state as the weight table spells it."""
    return "/".join(str(part) for part in path)


def _address(path: tuple[Any, ...]) -> tuple[str, str]:
    match path:
        case ("model", *rest):
            return "params", join_path(tuple(rest))
        case ("ema", *rest):
            return "ema", join_path(tuple(rest))
        case ("optimizer", "opt_state", *rest):
            return "opt", join_path(tuple(rest))
        case ("replicas", *rest):
            return REPLICAS, join_path(tuple(rest))
        case _:
            return "rest", join_path(path)


def _train_state(config: TrainConfig, model: nnx.Module, pipeline: PipelinePlan | None) -> TrainState:
    treated = {treatment.weight.path: treatment for treatment in treatments(config.optimizer, weights(config.model, pipeline))}
    wrt = trained(config, model, pipeline)
    mine = [treated[join_path(path)] for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
    tx = build_optimizer(config.optimizer, build_schedule(config.schedule, config.steps), mine)
    key = jax.random.key_data(random_key(config.seed))
    return TrainState(model, nnx.Optimizer(model, tx, wrt=wrt), key, _copy(model) if config.ema else None)


def _copy(model: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def with_average(spec: StateSpec, state: nnx.State) -> nnx.State:
    """`state` of a run without an average, as that of a run whose average begins with its parameters."""
    program = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=spec.shardings["ema"])
    return nnx.State({**state, "ema": program(state["model"])})


def trained(config: TrainConfig, model: nnx.Module, pipeline: PipelinePlan | None) -> nnx.filterlib.Filter:
    """Selects the parameters of `model` that are not frozen."""
    declared = weights(config.model, pipeline)
    frozen = {treatment.weight.path for treatment in treatments(config.optimizer, declared) if treatment.frozen}
    if not frozen:
        return nnx.Param
    return nnx.All(nnx.Param, lambda path, _: join_path(path) not in frozen)


def gathered(config: TrainConfig, state: nnx.State) -> nnx.State:
    """The weights in `state` (a model's, or a part of it) as a step computes with them: laid out by the rules alone.

    Where the state is stored split over `data` too, this is the one gathering of a step, in the dtype that
    `working_dtype` says. Call it inside `use_layout` and outside of what is differentiated: the gradient by its result is partial
    over `data`, so that laying it out as the state is stored costs half of the reduction that plain data parallelism has.
    """
    if config.sharding.optimizer == "as_weights":
        return state

    def gather(variable: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        if not isinstance(variable, nnx.Param):
            return variable
        dtype = working_dtype(config.model, path=variable.path, inputs=variable.inputs, exact=variable.exact)
        return variable.replace(constrain(variable[...].astype(dtype), variable.axes, variable.path))

    return jax.tree.map(gather, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def fetched(spec: StateSpec, state: nnx.State, gradients: Any) -> tuple[nnx.State, Any]:
    """Inside of a program: `state` with what `spec` keeps in the host's memory on the device, and `gradients`.

    It is copied when there are gradients: any earlier, it would lie on the device during the backward pass.
    """
    flat, kept = nnx.to_flat_state(state), _kept_by_host(spec)
    away = {path: variable.get_value() for path, variable in flat if path in kept}
    away, gradients = jax.lax.optimization_barrier((away, gradients))
    here = {path: jax.device_put(value, kept[path].with_memory_kind("device")) for path, value in away.items()}
    return nnx.from_flat_state([(path, variable.replace(here[path]) if path in kept else variable) for path, variable in flat]), gradients


def stored(spec: StateSpec, state: nnx.State) -> nnx.State:
    """Inside of a program: `state` with what `spec` keeps in the host's memory there."""
    kept = _kept_by_host(spec)
    return nnx.from_flat_state([
        (path, variable.replace(jax.device_put(variable.get_value(), kept[path])) if path in kept else variable)
        for path, variable in nnx.to_flat_state(state)
    ])  # fmt: skip


def _kept_by_host(spec: StateSpec) -> dict[tuple[Any, ...], NamedSharding]:
    found = {path: variable.get_value() for path, variable in nnx.to_flat_state(spec.shardings)}
    return {path: sharding for path, sharding in found.items() if sharding.memory_kind == HOST}


def _sharding(variable: nnx.Variable[Any], layout: Layout, *, host: bool) -> NamedSharding:
    """Derived from the logical axes and the leaf's own shape; a leaf without axes (counters, keys) is replicated, on the device."""
    axes = variable.get_metadata().get("axes")
    shape = variable.get_value().shape
    if axes is None or len(axes) != len(shape):
        return layout.replicated
    found = layout.stored(axes, shape, variable.get_metadata().get("path"))
    return found.with_memory_kind(HOST) if host else found
