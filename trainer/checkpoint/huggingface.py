"""Parameters from and to a Hugging Face folder, one tensor at a time.

Names come from `huggingface_families`; shapes follow from `trainer.config.weights`: a matmul weight with input
dims I and output dims O is stored there as [prod(O), prod(I)], everything else flat in its own order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import jax
import numpy as np
from etils import epath

from trainer.checkpoint.huggingface_config import config_for_huggingface, differences, model_from_huggingface
from trainer.checkpoint.huggingface_families import BLOCK_PREFIX, BLOCK_TENSORS, IGNORED_SUFFIXES, MODEL_TENSORS, UNTRANSPOSED
from trainer.checkpoint.huggingface_files import CONFIG_FILE, DTYPES, SafetensorsFolder, write_safetensors
from trainer.config.base import near_miss
from trainer.config.model import Model
from trainer.config.pipeline import PipelinePlan
from trainer.config.weights import Weight, stacked_path, weights
from trainer.errors import CheckpointError

MAX_FILE_BYTES: Final = 5_000_000_000  # what transformers writes
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Source:
    """One of their tensors, which is one layer of one of our weights."""

    name: str
    shape: tuple[int, ...]  # theirs
    ours: tuple[int, ...]  # of one layer
    inputs: int  # leading dims of ours that are their trailing dim; 0 where the order is the same

    @property
    def rows_dim(self) -> int:
        """Our dim that leads theirs: rows of it are contiguous in the file."""
        return self.inputs

    def read(self, folder: SafetensorsFolder, first: int, last: int) -> np.ndarray:
        """One layer of our weight, only `first` up to `last` of its rows dim."""
        per_row = self.shape[0] // self.ours[self.rows_dim]
        piece = folder.read(self.name, first * per_row, last * per_row)
        piece = piece.reshape(last - first, *self.ours[self.inputs + 1 :], *self.ours[: self.inputs])
        outputs = range(piece.ndim - self.inputs)
        return piece.transpose(*range(len(outputs), piece.ndim), *outputs)

    def write(self, values: np.ndarray) -> np.ndarray:
        """One layer of our weight as they store it."""
        if self.inputs:
            values = values.reshape(math.prod(self.ours[: self.inputs]), -1).T
        return values.reshape(self.shape)


def sources(model: Model, pipeline: PipelinePlan | None = None) -> dict[str, tuple[Source, ...]]:
    """Their tensors for each of our weights, by path: one, or one for each stacked layer."""
    first_layer: list[int] = [0]
    for segment in model.segments:
        first_layer.append(first_layer[-1] + len(segment.pattern) * segment.repeats)
    return {weight.path: tuple(_sources(weight, model, first_layer)) for weight in weights(model, pipeline)}


def load_huggingface(
    folder: str, abstract: Mapping[str, jax.ShapeDtypeStruct], model: Model, pipeline: PipelinePlan | None = None
) -> dict[str, jax.Array]:
    """Parameters of `model` by path from a safetensors folder, local or gs://, each with the dtype and sharding of its abstract leaf.

    pipeline: how the model's layers are laid out, where some of them are pipelined. A process reads the rows its own
    devices need, one weight at a time. Raises CheckpointError that names every tensor which is missing, unknown, or of
    another shape or dtype, and every field in which config.json differs from `model`.
    """
    with SafetensorsFolder(folder) as files:
        table = sources(model, pipeline)
        if problems := list(_problems(files, table, model)):
            raise CheckpointError(
                f"{folder} does not fit this model:\n" + "\n".join(f"  {problem}" for problem in problems),
                hint="the model it was made for: " + _hint(files),
            )
        return {path: _load(files, table[path], leaf) for path, leaf in abstract.items()}


def export_huggingface(
    read: Callable[[str], jax.Array | np.ndarray],
    model: Model,
    folder: str,
    *,
    max_positions: int,
    dtype: str | None = None,
    original: Mapping[str, Any] | None = None,
    companions: Mapping[str, str] = MappingProxyType({}),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `model` as a Hugging Face folder: safetensors and config.json.

    read(path) gives a parameter; it is called once for each, in forward order, and one is held at a time.
    original: config.json of the checkpoint the run began from; its fields and dtype are kept.
    dtype: `float32`, `float16` or `bfloat16`; default: the original's, else float32.
    companions: further files to copy (a tokenizer's), by the name they get.
    Raises CheckpointError when no Hugging Face family describes the model.
    """
    dtype = dtype or _dtype(original or {}) or "float32"
    if original is not None and not differences(model, model_from_huggingface(original)):
        config = {**original, "torch_dtype" if "torch_dtype" in original else "dtype": dtype}
    else:
        config = config_for_huggingface(model, dtype=dtype, max_positions=max_positions)
    by_name = {source.name: (path, layer) for path, group in sources(model).items() for layer, source in enumerate(group)}
    described = {source.name: source for group in sources(model).values() for source in group}
    stacked = {weight.path for weight in weights(model) if weight.layer_dims}
    held: dict[str, np.ndarray] = {}

    def values(name: str) -> np.ndarray:
        path, layer = by_name[name]
        if path not in held:
            held.clear()
            held[path] = np.asarray(read(path))
        return described[name].write(held[path][layer] if path in stacked else held[path])

    shapes = {name: source.shape for name, source in described.items()}
    write_safetensors(folder, shapes, values, dtype=dtype, max_file_bytes=max_file_bytes)
    target = epath.Path(folder)
    for name, file in companions.items():
        (target / name).write_bytes(epath.Path(file).read_bytes())
    # Last: a folder with a config.json is complete.
    (target / CONFIG_FILE).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def _sources(weight: Weight, model: Model, first_layer: list[int]) -> Iterator[Source]:
    path = stacked_path(weight.path)
    parts = path.split("/", 3)
    inputs = 0 if path in UNTRANSPOSED else weight.inputs
    ours = weight.layer_shape
    shape = (math.prod(ours[inputs:]), math.prod(ours[:inputs])) if inputs else ours if weight.inputs else (math.prod(ours),)
    if parts[0] != "segments":
        yield Source(MODEL_TENSORS[path], shape, ours, inputs)
        return
    segment, position = int(parts[1]), int(parts[2])
    pattern = len(model.segments[segment].pattern)
    for turn in range(weight.first_repeat, weight.first_repeat + math.prod(weight.shape[: weight.layer_dims])):
        layer = first_layer[segment] + turn * pattern + position
        yield Source(BLOCK_PREFIX.format(layer=layer) + BLOCK_TENSORS[parts[3]], shape, ours, inputs)


def _problems(files: SafetensorsFolder, table: Mapping[str, tuple[Source, ...]], model: Model) -> Iterator[str]:
    try:
        theirs = model_from_huggingface(files.config)
    except CheckpointError as error:
        yield str(error)
        return
    yield from (f"config.json: {line}" for line in differences(model, theirs))
    wanted = {source.name: source for group in table.values() for source in group}
    ignored = {MODEL_TENSORS["head/kernel"]} if model.tie_embeddings else set[str]()
    missing = _grouped(name for name in wanted if name not in files.tensors)
    unknown = _grouped(name for name in files.tensors if name not in wanted and name not in ignored and not name.endswith(IGNORED_SUFFIXES))
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


def _hint(files: SafetensorsFolder) -> str:
    config = files.config
    return ", ".join(f"{key} {config.get(key)}" for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"))


def _load(files: SafetensorsFolder, group: tuple[Source, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Each row is read once for all devices of this process."""
    if leaf.sharding is None:
        raise ValueError("every abstract parameter needs a sharding")
    layer_dims = len(leaf.shape) - len(group[0].ours)
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    keys = {_key(index or (), leaf.shape) for index in indices}
    parts = {key: np.empty([stop - start for start, stop in key], leaf.dtype) for key in keys}
    for layer, source in enumerate(group):
        at = np.unravel_index(layer, leaf.shape[:layer_dims]) if layer_dims else ()
        wanted = [key for key in keys if all(start <= index < stop for index, (start, stop) in zip(at, key, strict=False))]
        if not wanted:
            continue
        rows = layer_dims + source.rows_dim
        first, last = min(key[rows][0] for key in wanted), max(key[rows][1] for key in wanted)
        values = source.read(files, first, last)
        for key in wanted:
            shift = [first if dim == source.rows_dim else 0 for dim in range(values.ndim)]
            cut = tuple(slice(start - by, stop - by) for (start, stop), by in zip(key[layer_dims:], shift, strict=True))
            place = tuple(index - start for index, (start, _) in zip(at, key, strict=False))
            parts[key][place] = values[cut]
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_key(index or (), leaf.shape)])


def _key(index: Slices, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _dtype(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")
