"""Flat dicts of arrays to and from storage: the only module that knows Orbax.

An item is `{path: jax.Array}`, written by Orbax's PyTree handler (OCDBT, zarr 2) into a folder of its own. Each
process writes the shards of which it holds the first replica, as they are: no computation, no collective, no
barrier. The handler is used without Orbax's checkpointers because the commit protocol above it is ours
(see `commit`): a second one would add barriers that wait without being told of a failure elsewhere.
Orbax is imported by the first save or restore.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from trainer.checkpoint.layout import Leaf, Move, Part, Regroup, Same
from trainer.checkpoint.passing import on_first_replica, pass_on, shared_over

if TYPE_CHECKING:
    from orbax.checkpoint import PyTreeCheckpointHandler

Item = Mapping[str, jax.Array]
AbstractItem = Mapping[str, jax.ShapeDtypeStruct]

CHUNK_BYTES: Final = 64 * 2**20
"""A shard is stored in pieces of at most this size, so that another mesh need not read all of it for a part."""


def describe(item: Item | AbstractItem) -> dict[str, Leaf]:
    return {path: Leaf(tuple(leaf.shape), str(leaf.dtype)) for path, leaf in item.items()}


class Writing:
    """A save whose values are copied off the devices; the writing goes on."""

    def __init__(self, folders: list[str], futures: list[Any]) -> None:
        self._folders = folders
        self._futures = futures

    def wait(self, remaining_seconds: Callable[[], float]) -> None:
        """Until this process has written its part. Raises what the writing raised, TimeoutError when time is up."""
        for future in self._futures:
            future.result(timeout=max(remaining_seconds(), 0.001))

    def settle(self, remaining_seconds: Callable[[], float]) -> None:
        """After a failure: until nothing is written any more."""
        for future in self._futures:
            with contextlib.suppress(Exception):  # the first one is reported already
                future.result(timeout=max(remaining_seconds(), 0.001))

    def merge(self) -> None:
        """On process 0, once every process has written: one index over the parts."""
        from etils import epath

        for folder in self._folders:
            _handler().finalize(epath.Path(folder))


def start_writing(directory: str, items: Mapping[str, Item]) -> Writing:
    """Copy every value to the host and begin to write `directory`/<item>/. The arrays may be donated on return."""
    import orbax.checkpoint as ocp

    copied = threading.Event()
    folders = {name: _Folder(f"{directory}/{name}", copied) for name in items}

    async def copy() -> list[Any]:
        futures: list[Any] = []
        for name, item in items.items():
            options = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in item}
            futures += await _handler().async_save(folders[name], args=ocp.args.PyTreeSave(dict(item), options)) or []
        return futures

    try:
        return Writing([f"{directory}/{name}" for name in items], asyncio.run(copy()))
    finally:
        copied.set()


class _Folder:
    """Orbax's PathAwaitingCreation: its threads wait here until all items are copied, so that they do not slow the copy."""

    def __init__(self, path: str, copied: threading.Event) -> None:
        from etils import epath

        self.path = epath.Path(path)
        self._copied = copied

    def __truediv__(self, other: str) -> _Folder:
        return _Folder(str(self.path / other), self._copied)

    async def await_creation(self) -> Any:
        self._copied.wait()
        if not str(self.path).startswith("gs:"):
            self.path.mkdir(parents=True, exist_ok=True)
        return self.path


Meeting = Callable[[], AbstractContextManager[None]]
"""What a process reads inside of it is told of: it ends when all processes have read, and raises where one has failed."""


def read(folder: str, moves: tuple[Move, ...], wanted: AbstractItem, meeting: Meeting | None = None) -> dict[str, jax.Array]:
    """The wanted tensors, each read straight into its sharding; converted ones one tensor at a time.

    With a `meeting`, what several replicas have in common is read by the first one and passed on to the others: every process
    calls this with the same arguments.
    """
    read_as_is = {move.path: wanted[move.path] for move in moves if isinstance(move, Same)}
    found = _read(folder, read_as_is, meeting)
    for move in moves:
        match move:
            case Same():
                pass
            case Regroup(sources, targets):
                found |= _regrouped(folder, sources, [wanted[target.path] for target in targets], targets, meeting)
    return found


def read_part(folder: str, path: str, index: tuple[int, ...]) -> np.ndarray:
    """What is at `index` of a saved tensor's leading dims; of the tensor only the chunks that hold it are read."""
    import tensorstore as ts

    root = folder if "://" in folder else f"file://{os.path.abspath(folder)}"
    kvstore = {"driver": "ocdbt", "base": f"{root.rstrip('/')}/", "path": f"{path}/"}
    array = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    return array[index].read().result()


def _regrouped(
    folder: str, sources: tuple[Part, ...], leaves: list[jax.ShapeDtypeStruct], targets: tuple[Part, ...], meeting: Meeting | None
) -> dict[str, jax.Array]:
    """All parts of one weight. Nothing is computed: dims are joined and split."""
    parts = _read(folder, {part.path: _read_as(part, leaves[0], targets[0]) for part in sources}, meeting)
    last = [sum(target.repeats for target in targets[: n + 1]) for n in range(len(targets))]

    def regroup(parts: list[jax.Array]) -> tuple[jax.Array, ...]:
        joined = [array.reshape(part.repeats, *part.layer_shape) for array, part in zip(parts, sources, strict=True)]
        whole = joined[0] if len(joined) == 1 else jnp.concatenate(joined)
        cuts = [whole[end - target.repeats : end] for end, target in zip(last, targets, strict=True)]
        return tuple(cut.reshape(target.shape) for cut, target in zip(cuts, targets, strict=True))

    placed = jax.jit(regroup, out_shardings=tuple(leaf.sharding for leaf in leaves))([parts[part.path] for part in sources])
    return {target.path: array for target, array in zip(targets, placed, strict=True)}


def _read_as(part: Part, leaf: jax.ShapeDtypeStruct, target: Part) -> jax.ShapeDtypeStruct:
    """How a saved part is read: each layer laid out as in `leaf`; over the stages of a pipeline that takes it, layers are split too."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(target.shape) - len(sharding.spec))]
        split: list[Any] = [None] * part.layer_dims
        stage = spec[1] if target.layer_dims == 3 else None
        dim = 1 if part.layer_dims == 3 else 0
        if stage is not None and split and part.shape[dim] % sharding.mesh.shape["stage"] == 0:
            split[dim] = "stage"
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*split, *spec[target.layer_dims :]))
    return jax.ShapeDtypeStruct(part.shape, leaf.dtype, sharding=sharding)


def _read(folder: str, wanted: AbstractItem, meeting: Meeting | None) -> dict[str, jax.Array]:
    if meeting is None:
        return _read_here(folder, wanted)
    shared = {path: axes for path, leaf in wanted.items() if (axes := shared_over(leaf.sharding))}
    mine = {path: on_first_replica(leaf, shared[path]) if path in shared else leaf for path, leaf in wanted.items()}
    with meeting():
        # A process with no device of the first replica does not even open the folder for what all have in common.
        found = _read_here(
            folder, {path: leaf for path, leaf in mine.items() if leaf.sharding is None or leaf.sharding.addressable_devices}
        )
    return {
        path: pass_on(found.pop(path, None), leaf, shared[path]) if path in shared else found.pop(path) for path, leaf in wanted.items()
    }


def _read_here(folder: str, wanted: AbstractItem) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp
    from etils import epath

    if not wanted:
        return {}
    placed = {
        path: leaf if leaf.sharding else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))
        for path, leaf in wanted.items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    arguments = ocp.args.PyTreeRestore(item=dict(placed), restore_args=restore_args, partial_restore=True)
    return _handler().restore(epath.Path(folder), args=arguments)


_handlers: list[PyTreeCheckpointHandler] = []
_handlers_lock = threading.Lock()


def warm_up() -> None:
    """Import Orbax beside the first steps, so that neither the start of the run nor the first save waits for it."""
    threading.Thread(target=_handler, name="import of orbax", daemon=True).start()


def _handler() -> PyTreeCheckpointHandler:
    """One for the process. Uncompressed: trained float32 weights shrink by a tenth at twice the time."""
    with _handlers_lock:
        if not _handlers:
            import orbax.checkpoint as ocp

            # Orbax logs every phase, and each failure once per thread it passes through; all of them reach us as exceptions.
            logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
            arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
            registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
            _handlers.append(ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry))
        return _handlers[0]
