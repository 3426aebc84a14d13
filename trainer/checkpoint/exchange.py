"""Parameters from and to safetensors folders, whatever names they have there: layer by layer, straight to and from shards.

A table says for each weight, by the path it has when all repeats of its segment are stacked, which tensors of the
folder hold which part of it (`Source`). Runs and checkpoints hold the same weight stacked, one by one or by pipeline
stage; `holdings` says which repeats are where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from trainer.checkpoint.huggingface_files import DTYPES, SafetensorsFolder
from trainer.config.base import near_miss
from trainer.config.weights import split_repeat, stacked_path

Slices = tuple[slice, ...]
ReadLayer = Callable[[str, int | None], np.ndarray]
"""One repeat of a weight by its stacked path; None: a weight outside of the segments."""


@dataclass(frozen=True)
class Source:
    """A tensor of theirs, or a part of one: one layer of one of our weights, or one expert of it."""

    name: str
    shape: tuple[int, ...]  # theirs, of the whole tensor
    repeat: int | None  # ours, where theirs is not stacked; None: a weight outside of the segments
    ours: tuple[int, ...]  # of what is there
    expert: int | None = None  # ours, where theirs is of one expert
    inputs: int = 0  # leading dims of ours that are their trailing dim; 0 where the order is the same
    columns: slice = slice(None)  # of their last dim
    within: tuple[int, ...] = ()  # in their leading dims

    @property
    def place(self) -> tuple[int, ...]:
        """In the dims of one repeat of ours."""
        return () if self.expert is None else (self.expert,)

    @property
    def rows_dim(self) -> int:
        """Our dim, after `place`, that leads theirs, after `within`: rows of it are contiguous in the file."""
        return self.inputs

    def read(self, folder: SafetensorsFolder, first: int, last: int) -> np.ndarray:
        """Ours, only `first` up to `last` of its rows dim."""
        per_row = self.shape[len(self.within)] // self.ours[self.rows_dim]
        piece = folder.read(self.name, first * per_row, last * per_row, self.within)[..., self.columns]
        piece = piece.reshape(last - first, *self.ours[self.inputs + 1 :], *self.ours[: self.inputs])
        outputs = range(piece.ndim - self.inputs)
        return piece.transpose(*range(len(outputs), piece.ndim), *outputs)

    def write(self, values: np.ndarray, out: np.ndarray) -> None:
        """Put ours into their tensor `out`, of `within` on."""
        if self.inputs:
            values = values.reshape(math.prod(self.ours[: self.inputs]), -1).T
        theirs = out[..., self.columns]
        theirs[...] = values.reshape(theirs.shape)


Table = Mapping[str, tuple[Source, ...]]


@dataclass(frozen=True)
class Holding:
    """The part of a stacked weight that one array holds."""

    stacked: str  # its path when all repeats are stacked
    first_repeat: int
    leading: tuple[int, ...] | None  # dims that hold repeats; None: outside of the segments; (): one repeat

    def index(self, repeat: int | None) -> tuple[int, ...] | None:
        """Of a repeat in the leading dims; None where it is not held."""
        if self.leading is None or repeat is None:
            return ()
        within = repeat - self.first_repeat
        if not 0 <= within < math.prod(self.leading):
            return None
        return tuple(int(at) for at in np.unravel_index(within, self.leading)) if self.leading else ()


def holdings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Holding]:
    """What each of a run's or checkpoint's parameters holds, by path (`trainer.config.weights` spells them)."""
    pipelined = {path.split("/")[1]: math.prod(shape[:3]) for path, shape in shapes.items() if _form(path) == "pipeline"}
    return {path: _holding(path, shape, pipelined) for path, shape in shapes.items()}


def load_tensors(files: SafetensorsFolder, table: Table, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Every abstract parameter in its dtype and sharding. A process reads the rows its own devices need, one weight at a time."""
    held = holdings({path: leaf.shape for path, leaf in abstract.items()})
    return {path: _load(files, table[held[path].stacked], held[path], leaf) for path, leaf in abstract.items()}


def layer_reader(files: SafetensorsFolder, table: Table) -> ReadLayer:
    """Reads weights of the folder layer by layer."""
    groups: dict[tuple[str, int | None], list[Source]] = {}
    for path, group in table.items():
        for source in group:
            groups.setdefault((path, source.repeat), []).append(source)

    def read(path: str, repeat: int | None) -> np.ndarray:
        found = [source.read(files, 0, source.ours[source.rows_dim]) for source in groups[path, repeat]]
        return found[0] if groups[path, repeat][0].expert is None else np.stack(found)

    return read


def tensors_written(table: Table, read: ReadLayer) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Iterator[np.ndarray]]]:
    """Shapes of the folder's tensors, and a function of a name that gives the tensor in pieces, in order.

    What is read of ours at a time is one layer of the weights a piece consists of.
    """
    parts: dict[str, list[tuple[str, Source]]] = {}
    for path, group in table.items():
        for source in group:
            parts.setdefault(source.name, []).append((path, source))
    held: dict[tuple[str, int | None], np.ndarray] = {}

    def layer(path: str, repeat: int | None, needed: set[tuple[str, int | None]]) -> np.ndarray:
        for key in held.keys() - needed:
            del held[key]
        if (path, repeat) not in held:
            held[path, repeat] = np.asarray(read(path, repeat))
        return held[path, repeat]

    def pieces(name: str) -> Iterator[np.ndarray]:
        for within in dict.fromkeys(source.within for _, source in parts[name]):
            here = [(path, source) for path, source in parts[name] if source.within == within]
            needed = {(path, source.repeat) for path, source in here}
            out: np.ndarray | None = None
            for path, source in here:
                values = layer(path, source.repeat, needed)[source.place]
                out = np.empty(source.shape[len(within) :], values.dtype) if out is None else out
                source.write(values, out)
            assert out is not None
            yield out

    return {name: group[0][1].shape for name, group in parts.items()}, pieces


def misfits(files: SafetensorsFolder, table: Table, ignored: Callable[[str], bool]) -> Iterator[str]:
    """Every tensor that is missing, unknown, or of another shape or dtype, with the nearest name."""
    wanted = {source.name: source for group in table.values() for source in group}
    missing = _grouped(name for name in wanted if name not in files.tensors)
    unknown = _grouped(name for name in files.tensors if name not in wanted and not ignored(name))
    for pattern, names in missing.items():
        yield f"{_listed(names)}: missing{_near(pattern, unknown)}"
    for pattern, names in unknown.items():
        yield f"{_listed(names)}: unknown to this model{_near(pattern, missing)}"
    for name, source in wanted.items():
        tensor = files.tensors.get(name)
        if tensor is not None and tensor.shape != source.shape:
            yield f"{name}: shape {list(tensor.shape)}, wanted {list(source.shape)}"
        if tensor is not None and tensor.dtype not in DTYPES:
            yield f"{name}: dtype {tensor.dtype}; known: {', '.join(DTYPES)}"


def _form(path: str) -> str:
    parts = path.split("/")
    return parts[3] if parts[0] == "segments" and len(parts) > 4 and parts[3] in ("pipeline", "after") else ""


def _holding(path: str, shape: tuple[int, ...], pipelined: Mapping[str, int]) -> Holding:
    stacked = stacked_path(path)
    if not path.startswith("segments/"):
        return Holding(stacked, 0, None)
    form = _form(path)
    if form == "pipeline":
        return Holding(stacked, 0, shape[:3])
    first = pipelined[path.split("/")[1]] if form == "after" else 0
    _, repeat = split_repeat(path.replace("/after/", "/", 1) if form else path)
    return Holding(stacked, first, shape[:1]) if repeat is None else Holding(stacked, first + repeat, ())


def _load(files: SafetensorsFolder, group: tuple[Source, ...], held: Holding, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Each row is read once for all devices of this process."""
    if leaf.sharding is None:
        raise ValueError("every abstract parameter needs a sharding")
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    keys = {_key(index or (), leaf.shape) for index in indices}
    parts = {key: np.empty([stop - start for start, stop in key], leaf.dtype) for key in keys}
    for source in group:
        if (index := held.index(source.repeat)) is None:
            continue
        whole = (*index, *source.place)
        depth = len(whole)
        wanted = [key for key in keys if all(start <= at < stop for (start, stop), at in zip(key, whole, strict=False))]
        if not wanted:
            continue
        rows = depth + source.rows_dim
        first, last = min(key[rows][0] for key in wanted), max(key[rows][1] for key in wanted)
        values = source.read(files, first, last)
        for key in wanted:
            shift = [first if dim == source.rows_dim else 0 for dim in range(values.ndim)]
            cut = tuple(slice(start - by, stop - by) for (start, stop), by in zip(key[depth:], shift, strict=True))
            place = tuple(at - start for at, (start, _) in zip(whole, key, strict=False))
            parts[key][place] = values[cut]
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_key(index or (), leaf.shape)])


def _key(index: Slices, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in numbers only, together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return groups


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"


def _near(pattern: str, others: Mapping[str, list[str]]) -> str:
    close = near_miss(pattern, list(others))
    return f" (nearest: {others[close][0]})" if close else ""
