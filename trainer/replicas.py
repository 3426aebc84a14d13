"""A state of several replicas (DiLoCo): outer parameters and their momentum, and every replica's model and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.config.diloco import DiLoCo, Part, fragment_parts
from trainer.config.train import TrainConfig
from trainer.initial import random_key
from trainer.parallel.diloco import outer_step, synchronise
from trainer.parallel.sharding import Layout

if TYPE_CHECKING:
    from trainer.state import StateSpec

AXIS: Final = "diloco"
REPLICAS: Final = "replicas"
"""Its part of the state: leaves of a plain state's model and optimizer, with a leading dim that counts replicas."""
MOMENTUM: Final = ("optimizer", "opt_state", "momentum")
KEY: Final = ("key",)

Path = tuple[Any, ...]
Step = Callable[[nnx.State, dict[str, jax.Array]], tuple[nnx.State, dict[str, jax.Array]]]


def describe_replicas(spec: StateSpec, mesh: Mesh) -> StateSpec:
    """The spec of the state whose replicas are as `spec` says."""
    count = mesh.shape[AXIS]
    abstract, shardings = _flat(spec.abstract), _flat(spec.shardings)
    placed: dict[Path, nnx.Variable[Any]] = {}
    lying: dict[Path, nnx.Variable[Any]] = {}
    for path, variable in abstract.items():
        one, sharding = variable.get_value(), shardings[path].get_value()
        if not _own(path):
            placed[path], lying[path] = variable, shardings[path]
            continue
        if path[0] == "model":
            placed[path], lying[path] = variable, shardings[path]
        spread = NamedSharding(mesh, PartitionSpec(AXIS, *sharding.spec))
        leaf = jax.ShapeDtypeStruct((count, *one.shape), one.dtype, sharding=spread)
        placed[(REPLICAS, *path)], lying[(REPLICAS, *path)] = _stacked(variable, leaf), _stacked(variable, spread)
    for path in _trained(spec):
        placed[(*MOMENTUM, *path)] = nnx.OptState(abstract[("model", *path)].get_value())
        lying[(*MOMENTUM, *path)] = nnx.OptState(shardings[("model", *path)].get_value())
    return replace(spec, abstract=_nested(placed), shardings=_nested(lying), replica=spec)


def replicate(spec: StateSpec, state: nnx.State) -> nnx.State:
    """The first state: every replica has the model and the optimizer of `state`, nothing has moved. To be called in a jit."""
    assert spec.replica is not None
    given, found = _flat(state), dict[Path, nnx.Variable[Any]]()
    for path, variable in _flat(spec.abstract).items():
        if path[0] == REPLICAS:
            found[path] = variable.replace(jnp.broadcast_to(given[path[1:]].get_value(), variable.get_value().shape))
        elif path[: len(MOMENTUM)] == MOMENTUM:
            found[path] = variable.replace(jnp.zeros(variable.get_value().shape, variable.get_value().dtype))
        else:
            found[path] = given[path]
    return _nested(found)


def over_replicas(config: TrainConfig, diloco: DiLoCo, spec: StateSpec, layout: Layout, step: Step) -> Step:
    """`step` for every replica on its rows of the batch, and the sync after it where one is due.

    The batch's rows are the replicas' in order. Metrics get a leading dim that counts replicas: nothing is exchanged for them.
    Where every slice is a world of its own, the world has one replica, its metrics no such dim, and the sync is `meet`.
    """
    assert spec.replica is not None
    templates, trained, count = _flat(spec.replica.abstract), _trained(spec.replica), layout.mesh.shape[AXIS]
    fragments = fragment_parts(config.model, diloco) if diloco.fragments > 1 else None

    def train_step(state: nnx.State, batch: dict[str, jax.Array]) -> tuple[nnx.State, dict[str, jax.Array]]:
        flat = _flat(state)
        shared = {path: flat[path].get_value() for path in templates if not _own(path)}
        own = {path: flat[(REPLICAS, *path)].get_value() for path in templates if _own(path)}

        def one(own: dict[Path, jax.Array], batch: dict[str, jax.Array], index: jax.Array) -> tuple[dict[Path, jax.Array], jax.Array, Any]:
            values = own | shared | {KEY: _own_key(shared[KEY], index)}
            after, metrics = step(_nested({path: variable.replace(values[path]) for path, variable in templates.items()}), batch)
            found = _flat(after)
            return {path: found[path].get_value() for path in own}, found[("optimizer", "step")].get_value(), metrics

        rows = {name: _split_rows(x, count, layout) for name, x in batch.items()}
        own, done, metrics = jax.vmap(one, out_axes=(0, None, 0), spmd_axis_name=AXIS)(own, rows, jnp.arange(count))
        if diloco.files:
            new = {(REPLICAS, *path): value for path, value in own.items()} | {("optimizer", "step"): done}
            return _replaced(flat, new), jax.tree.map(lambda x: x[0], metrics)
        own, outer, momentum = _synchronised(flat, own, done)
        new = {("optimizer", "step"): done}
        new |= {(REPLICAS, *path): value for path, value in own.items()}
        new |= {("model", *path): value for path, value in outer.items()} | {(*MOMENTUM, *path): value for path, value in momentum.items()}
        return _replaced(flat, new), metrics

    def _synchronised(flat: Mapping[Path, nnx.Variable[Any]], own: dict[Path, jax.Array], done: jax.Array) -> Any:
        names = {"/".join(map(str, path[1:])): path[1:] for path in own if path[0] == "model"}
        outer = {name: flat[("model", *path)].get_value() for name, path in names.items()}
        momentum = {name: flat[(*MOMENTUM, *path)].get_value() for name, path in names.items() if path in trained}
        inner = {name: own[("model", *path)] for name, path in names.items()}
        parts = fragments or (tuple(Part(name) for name in names),)
        outer, momentum, inner = synchronise(diloco, parts, outer, momentum, inner, done)
        back = {("model", *names[name]): value for name, value in inner.items()}
        return own | back, {names[name]: value for name, value in outer.items()}, {names[name]: value for name, value in momentum.items()}

    return train_step


def moved(spec: StateSpec, dtype: str) -> Callable[[nnx.State], dict[str, jax.Array]]:
    """Of a world with one replica: the jitted `state -> outer - inner` of each tensor of the model, by path, in `dtype`, laid out as it."""

    def program(state: nnx.State) -> dict[str, jax.Array]:
        flat = _flat(state)
        return {
            name: (flat[path].get_value() - flat[(REPLICAS, *path)].get_value()[0]).astype(dtype)
            for name, path in _model_paths(spec.abstract).items()
        }

    return jax.jit(program, out_shardings={name: _at(spec.shardings, path) for name, path in _model_paths(spec.abstract).items()})


def meet(diloco: DiLoCo, spec: StateSpec) -> Callable[[nnx.State, dict[str, jax.Array], jax.Array], nnx.State]:
    """Of a world with one replica: the jitted `(state, mean of what replicas moved, done) -> state` of a sync after `done` steps.

    The outer parameters take their step, the replica goes on from them, and its next step is `done` (int32). The state is donated.
    """
    assert spec.replica is not None
    trained = _trained(spec.replica)

    def program(state: nnx.State, mean: dict[str, jax.Array], done: jax.Array) -> nnx.State:
        flat = _flat(state)
        new: dict[Path, jax.Array] = {}
        for name, path in _model_paths(spec.abstract).items():
            outer, step = flat[path].get_value(), mean[name].astype(jnp.float32)
            if path[1:] in trained:
                new[path], new[(*MOMENTUM, *path[1:])] = outer_step(diloco, outer, flat[(*MOMENTUM, *path[1:])].get_value(), step)
            else:
                new[path] = outer - step
        return _gone_on(flat, new, done)

    return jax.jit(program, donate_argnums=0, out_shardings=spec.shardings)


def rejoin(spec: StateSpec, replica: int, seed: int) -> Callable[[nnx.State, jax.Array], nnx.State]:
    """Of a world with one replica: the jitted `(state, done) -> state` of replica `replica` that begins at the outer parameters of `state`.

    Its optimizer's state is the one in `state`, its next step is `done` (int32), its random numbers are its own, as those of
    replica `replica` of one world. The state is donated.
    """

    def program(state: nnx.State, done: jax.Array) -> nnx.State:
        key = _own_key(jax.random.key_data(random_key(seed)), jnp.int32(replica))
        return _gone_on(_flat(state), {KEY: key}, done)

    return jax.jit(program, donate_argnums=0, out_shardings=spec.shardings)


def _gone_on(flat: Mapping[Path, nnx.Variable[Any]], new: dict[Path, jax.Array], done: jax.Array) -> nnx.State:
    """The state with `new` in it, whose replica is at the outer parameters and has `done` steps behind it."""
    for path, variable in flat.items():
        if path[:2] == (REPLICAS, "model"):
            new[path] = jnp.expand_dims(new[path[1:]] if path[1:] in new else flat[path[1:]].get_value(), 0)
        elif path == ("optimizer", "step") or path == (REPLICAS, "optimizer", "opt_state", "count"):
            value = variable.get_value()
            new[path] = jnp.full(value.shape, done, value.dtype)
    return _replaced(flat, new)


def _replaced(flat: Mapping[Path, nnx.Variable[Any]], new: Mapping[Path, jax.Array]) -> nnx.State:
    return _nested({path: variable.replace(new.get(path, variable.get_value())) for path, variable in flat.items()})


def _model_paths(state: nnx.State) -> dict[str, Path]:
    return {"/".join(map(str, path[1:])): path for path in _flat(state) if path[0] == "model"}


def _at(state: nnx.State, path: Path) -> Any:
    return _flat(state)[path].get_value()


def _own(path: Path) -> bool:
    return path[0] == "model" or path[:2] == ("optimizer", "opt_state")


def _trained(spec: StateSpec) -> set[Path]:
    return set(_flat(nnx.filter_state(spec.abstract["model"], spec.trained)))


def _split_rows(x: jax.Array, count: int, layout: Layout) -> jax.Array:
    """[B, T] -> [R, B / R, T]."""
    shape = (x.shape[0] // count, *x.shape[1:])
    sharding = NamedSharding(layout.mesh, PartitionSpec(AXIS, *layout.spec(("batch", "length"), shape)))
    return jax.lax.with_sharding_constraint(x.reshape(count, *shape), sharding)


def _own_key(data: jax.Array, index: jax.Array) -> jax.Array:
    """Replica 0 has the run's key, as a run without replicas; the others one of their own."""
    folded = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data), index))
    return jnp.where(index == 0, data, folded)


def _stacked(variable: nnx.Variable[Any], value: Any) -> nnx.Variable[Any]:
    axes = variable.get_metadata().get("axes")
    return variable.replace(value, axes=("replica", *axes)) if axes is not None else variable.replace(value)


def _flat(state: nnx.State) -> dict[Path, nnx.Variable[Any]]:
    return dict(nnx.to_flat_state(state))


def _nested(flat: Mapping[Path, nnx.Variable[Any]]) -> nnx.State:
    return nnx.from_flat_state(list(flat.items()))
