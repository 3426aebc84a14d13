"""A parameter-only checkpoint in our own layout: safetensors whose tensors are named by their weight's path, and the model.

Any model can be written so, also one that no Hugging Face family describes. Layers are stacked as in a scan
(`segments/0/0/attention/query`, leading dim = repeats) or one by one (`segments/0/0/7/attention/query`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import jax
from etils import epath

from trainer.checkpoint.exchange import ReadLayer, Source, Table, load_tensors, misfits, tensors_written
from trainer.checkpoint.huggingface import MAX_FILE_BYTES, load_huggingface
from trainer.checkpoint.huggingface_config import differences
from trainer.checkpoint.huggingface_files import SafetensorsFolder, write_safetensors
from trainer.config import ConfigError, validate
from trainer.config.model import Model
from trainer.config.weights import Weight, join_repeat, weights
from trainer.errors import CheckpointError

PARAMETERS_FILE: Final = "parameters.json"
FORMAT: Final = 1
Layers = Literal["scan", "unroll"]


def is_parameters(folder: str) -> bool:
    """Whether `folder` is such a checkpoint."""
    return (epath.Path(folder) / PARAMETERS_FILE).exists()


def load_folder(folder: str, abstract: Mapping[str, jax.ShapeDtypeStruct], model: Model) -> dict[str, jax.Array]:
    """Parameters of `model` from a parameter-only checkpoint in our layout or a Hugging Face folder: see `load_huggingface`."""
    return (load_parameters if is_parameters(folder) else load_huggingface)(folder, abstract, model)


def stored_model(description: Mapping[str, Any], folder: str) -> Model:
    """The model a `parameters.json` describes. Raises CheckpointError where this version cannot read it."""
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{folder}/{PARAMETERS_FILE}: format {description.get('format')!r}; this version reads {FORMAT}")
    try:
        return validate(Model, description["model"])
    except ConfigError as error:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        raise CheckpointError(f"{folder}/{PARAMETERS_FILE} describes no model:\n{lines}") from None


def load_parameters(folder: str, abstract: Mapping[str, jax.ShapeDtypeStruct], model: Model) -> dict[str, jax.Array]:
    """As `load_huggingface`, from a parameter-only checkpoint in our layout."""
    with SafetensorsFolder(folder, PARAMETERS_FILE) as files:
        table = sources(model, {name: tensor.shape for name, tensor in files.tensors.items()})
        theirs = stored_model(files.config, folder)
        problems = [f"{PARAMETERS_FILE}: {line}" for line in differences(model, theirs, PARAMETERS_FILE)]
        problems += misfits(files, table, lambda _: False)
        if problems:
            raise CheckpointError(f"{folder} does not fit this model:\n" + "\n".join(f"  {problem}" for problem in problems))
        return load_tensors(files, table, abstract)


def export_parameters(
    read: ReadLayer,
    model: Model,
    folder: str,
    *,
    dtype: str = "float32",
    layers: Layers = "scan",
    facts: Mapping[str, Any] = MappingProxyType({}),
    companions: Mapping[str, str] = MappingProxyType({}),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `model` as a parameter-only checkpoint; arguments as of `export_huggingface`.

    layers: stacked, or one by one. facts: what else `parameters.json` says.
    """
    shapes = {weight.path: weight.shape for weight in weights(model.model_copy(update={"layers": layers}))}
    tensors, pieces = tensors_written(sources(model, shapes), read)
    write_safetensors(folder, tensors, pieces, dtype=dtype, max_file_bytes=max_file_bytes)
    target = epath.Path(folder)
    for name, file in companions.items():
        (target / name).write_bytes(epath.Path(file).read_bytes())
    # Last: a folder with this file is complete.
    description = {"format": FORMAT, "dtype": dtype, "layers": layers, **facts, "model": model.model_dump(mode="json")}
    (target / PARAMETERS_FILE).write_text(json.dumps(description, indent=2) + "\n")


def sources(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """The tensors of a folder that holds `shapes` for each of our weights, stacked or one by one as there."""
    declared = weights(model.model_copy(update={"layers": "scan"}))
    return {weight.path: tuple(_sources(weight, shapes)) for weight in declared}


def _sources(weight: Weight, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Source]:
    if not weight.layer_dims:
        yield Source(weight.path, weight.shape, None, weight.shape)
        return
    one_by_one = join_repeat(weight.path, 0) in shapes
    for repeat in range(weight.shape[0]):
        if one_by_one:
            yield Source(join_repeat(weight.path, repeat), weight.layer_shape, repeat, weight.layer_shape)
        else:
            yield Source(weight.path, weight.shape, repeat, weight.layer_shape, within=(repeat,))
