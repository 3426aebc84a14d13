"""Parameters from and to a Hugging Face folder, one layer at a time.

Names come from `huggingface_names`; shapes follow from `trainer.config.weights`: a matmul weight with input
dims I and output dims O is stored there as [prod(O), prod(I)] unless its table says otherwise, a vector flat.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import jax
import numpy as np
from etils import epath

from trainer.checkpoint.exchange import ReadLayer, Source, Table, load_tensors, misfits, tensors_written
from trainer.checkpoint.huggingface_config import config_for_huggingface, differences, family_of, model_from_huggingface
from trainer.checkpoint.huggingface_families import Family, text_config
from trainer.checkpoint.huggingface_files import CONFIG_FILE, SafetensorsFolder, write_safetensors
from trainer.checkpoint.huggingface_names import (
    BLOCK_PREFIX,
    IGNORED_SUFFIXES,
    IMAGE_PREFIXES,
    LANGUAGE_PREFIXES,
    MODEL,
    MODULE,
    MODULE_COPIES,
    Stored,
)
from trainer.checkpoint.quantized import unpacked
from trainer.config.model import Model
from trainer.config.weights import Weight, weights
from trainer.errors import CheckpointError

MAX_FILE_BYTES: Final = 5_000_000_000  # what transformers writes
COMPARED_ROWS: Final = 256
"""Of an embedding or head that a module of multi-token prediction holds a second time."""


def sources(model: Model, family: Family, *, copies: bool = False) -> Table:
    """Their tensors for each of our weights. Raises CheckpointError for a weight the family has no name for.

    copies: also what a module of multi-token prediction holds a second time.
    """
    declared = weights(model.model_copy(update={"layers": "scan"}))
    named = {weight.path: _stored(weight.path, family) for weight in declared}
    if nameless := [path for path, stored in named.items() if stored is None]:
        raise CheckpointError(f"{family.model_type} has no tensor for: {', '.join(nameless[:5])}")
    first_layer: list[int] = [0]
    for segment in model.segments:
        first_layer.append(first_layer[-1] + len(segment.pattern) * segment.repeats)
    table = {
        weight.path: tuple(_sources(weight, stored, model, first_layer))
        for weight in declared
        if (stored := named[weight.path]) is not None
    }
    if copies:
        table |= {path: (*table[path], *(copy for _, copy in held)) for path, held in _copies(model, table).items()}
    return table


def load_huggingface(folder: str, abstract: Mapping[str, jax.ShapeDtypeStruct], model: Model) -> dict[str, jax.Array]:
    """Parameters of `model` by path from a safetensors folder, local or gs://, each with the dtype and sharding of its abstract leaf.

    A process reads the rows its own devices need, one weight at a time. Raises CheckpointError that names every
    tensor which is missing, unknown, or of another shape or dtype, and every field in which config.json differs
    from `model`.
    """
    with open_huggingface(folder) as files:
        theirs = model_from_huggingface(files.config)
        table = sources(model, family_of(files.config))
        problems = [f"config.json: {line}" for line in differences(model, theirs)]
        problems += load_problems(files, table, model)
        if problems := problems or list(_unlike_copies(files, table, model)):
            raise CheckpointError(
                f"{folder} does not fit this model:\n" + "\n".join(f"  {problem}" for problem in problems),
                hint="the model it was made for: " + _hint(files.config),
            )
        return load_tensors(files, table, abstract)


def open_huggingface(folder: str) -> SafetensorsFolder:
    """The folder's language model: of one that also sees images, config and names are those of its language model alone.

    Tensors in fewer bits stand there as the values they mean (`quantized`).
    """
    with ExitStack() as opening:  # closes what was opened where it is refused
        files = opening.enter_context(SafetensorsFolder(folder))
        inner = text_config(files.config)
        if inner is not files.config:
            files.config = dict(inner)
            files.tensors = {_of_language(name): tensor for name, tensor in files.tensors.items()}
        files.tensors = unpacked(files.tensors, files.config, folder)
        opening.pop_all()
    return files


def left_out(files: SafetensorsFolder) -> list[str]:
    """What of a folder is not read, in words."""
    images = sum(name.startswith(IMAGE_PREFIXES) for name in files.tensors)
    modules = sum(_module_of(name, files.config) is not None for name in files.tensors)
    lines = [f"{images} tensors of what sees images are left out"] if images else []
    if modules:
        read = "; a run with `model.multi_token: {depth: 1}` and `generate --draft` read them"
        readable = family_of(files.config).modules_keys
        lines.append(f"{modules} tensors of modules of multi-token prediction are left out" + (read if readable else ""))
    return lines


def modules_of(files: SafetensorsFolder) -> int:
    """Modules of multi-token prediction in the folder."""
    found = {_module_of(name, files.config) for name in files.tensors} - {None}
    return len(found) if family_of(files.config).modules_keys else 0


def load_problems(files: SafetensorsFolder, table: Table, model: Model) -> Iterator[str]:
    """Every tensor of a Hugging Face folder that does not fit."""
    yield from misfits(files, table, lambda name: _ignored(name, model, files.config))


def export_huggingface(
    read: ReadLayer,
    model: Model,
    folder: str,
    *,
    max_positions: int,
    dtype: str | None = None,
    original: Mapping[str, Any] | None = None,
    companions: Mapping[str, str] = MappingProxyType({}),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Model:
    """Write `model` as a Hugging Face folder: safetensors and config.json. Returns the model that is there: `model`, without modules
    of multi-token prediction where its family has none.

    read: gives one repeat of a weight; what is held at a time is one layer of a weight (of two where theirs holds both).
    original: config.json of the checkpoint the run began from; its fields and dtype are kept.
    dtype: `float32`, `float16` or `bfloat16`; default: the original's, else float32.
    companions: further files to copy (a tokenizer's), by the name they get.
    Raises CheckpointError when no Hugging Face family describes the model.
    """
    dtype = dtype or _dtype(original or {}) or "float32"
    if original is not None and not differences(model, model_from_huggingface(original)):
        kept = {key: value for key, value in original.items() if key != "quantization_config"}
        config = {**kept, "torch_dtype" if "torch_dtype" in original else "dtype": dtype}
    else:
        config = config_for_huggingface(model, dtype=dtype, max_positions=max_positions)
    family = family_of(config)
    if not family.modules_keys:
        model = model.model_copy(update={"multi_token": None})
    else:
        config[next((key for key in family.modules_keys if key in config), family.modules_keys[0])] = model.depth
    shapes, pieces = tensors_written(sources(model, family, copies=True), read)
    write_safetensors(folder, shapes, pieces, dtype=dtype, max_file_bytes=max_file_bytes)
    target = epath.Path(folder)
    for name, file in companions.items():
        (target / name).write_bytes(epath.Path(file).read_bytes())
    # Last: a folder with a config.json is complete.
    (target / CONFIG_FILE).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    return model


def _stored(path: str, family: Family) -> Stored | None:
    match path.split("/"):
        case ["segments", _, _, *rest]:
            return family.names.get("/".join(rest))
        case ["multi_token", _, *rest]:
            table = family.names if rest[0] == "block" else MODULE
            return table.get("/".join(rest).removeprefix("block/")) if family.modules_keys else None
        case _:
            return MODEL.get(path)


def _sources(weight: Weight, stored: Stored, model: Model, first_layer: list[int]) -> Iterator[Source]:
    parts = weight.path.split("/", 3)
    ours = weight.layer_shape
    batch, inner = ours[: weight.batch], ours[weight.batch :]
    inputs = weight.inputs if stored.transposed else 0
    theirs = (math.prod(inner[inputs:]), math.prod(inner[:inputs])) if inputs else inner if weight.inputs else (math.prod(inner),)
    by_expert = "{expert}" in stored.name
    experts = range(ours[0]) if by_expert else [None]
    theirs, ours = (theirs, inner) if by_expert else ((*batch, *theirs), ours)
    columns = stored.columns(theirs[-1])
    theirs = (*theirs[:-1], theirs[-1] * stored.share)
    layers: list[tuple[int | None, str]] = [(None, "")]
    match parts:
        case ["segments", segment, position, _]:
            pattern, first = len(model.segments[int(segment)].pattern), first_layer[int(segment)] + int(position)
            repeats = range(model.segments[int(segment)].repeats)
            layers = [(repeat, BLOCK_PREFIX.format(layer=first + repeat * pattern)) for repeat in repeats]
        case ["multi_token", module, *_]:
            layers = [(None, BLOCK_PREFIX.format(layer=first_layer[-1] + int(module)))]
        case _:
            pass
    for repeat, prefix in layers:
        for expert in experts:
            yield Source(prefix + stored.name.format(expert=expert), theirs, repeat, ours, expert, inputs, columns)


def _copies(model: Model, table: Table) -> dict[str, list[tuple[Source, Source]]]:
    """Of our weights that modules of multi-token prediction hold a second time: tensor and copy."""
    prefixes = [BLOCK_PREFIX.format(layer=model.layer_count + module) for module in range(model.depth)]
    return {
        path: [(table[path][0], replace(table[path][0], name=prefix + name)) for prefix in prefixes]
        for path, name in MODULE_COPIES.items()
        if path in table
    }


def _unlike_copies(files: SafetensorsFolder, table: Table, model: Model) -> Iterator[str]:
    """Embeddings and heads of modules that are not the model's: seen by some of their rows."""
    for source, copy in (pair for pairs in _copies(model, table).values() for pair in pairs):
        rows = min(COMPARED_ROWS, source.shape[0])
        if copy.name in files.tensors and not np.array_equal(files.read(copy.name, 0, rows, ()), files.read(source.name, 0, rows, ())):
            yield f"{copy.name}: another one than {source.name}, but modules of multi-token prediction share it here"


def _ignored(name: str, model: Model, config: Mapping[str, Any]) -> bool:
    """Buffers every reader computes, a tied head, what sees images, and of modules of multi-token prediction those that are not asked
    for and what they hold a second time."""
    if name.endswith(IGNORED_SUFFIXES) or name.startswith(IMAGE_PREFIXES) or (model.tie_embeddings and name == MODEL["head/kernel"].name):
        return True
    module = _module_of(name, config)
    return module is not None and (module >= model.depth or name.split(".", 3)[3] in MODULE_COPIES.values())


def _of_language(name: str) -> str:
    prefix = next((prefix for prefix in LANGUAGE_PREFIXES if name.startswith(prefix)), "")
    return LANGUAGE_PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def _module_of(name: str, config: Mapping[str, Any]) -> int | None:
    """Which module of multi-token prediction a tensor is of; versions of transformers write their number under two keys."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    extra = config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0
    module = -1 if found is None else int(found[1]) - config["num_hidden_layers"]
    return module if 0 <= module < extra else None


def _hint(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {config.get(key)}" for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"))


def _dtype(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")
