"""Parameters of a run, of a Hugging Face folder or of a parameter-only checkpoint, to be read layer by layer."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from etils import epath

from trainer.checkpoint.arrays import read_part
from trainer.checkpoint.commit import META_FILE, Damaged, checkpoint_directory, inspect, other_steps, read_commit, verify_contents
from trainer.checkpoint.exchange import ReadLayer, holdings, layer_reader, misfits
from trainer.checkpoint.huggingface import left_out, load_problems, open_huggingface
from trainer.checkpoint.huggingface import sources as huggingface_sources
from trainer.checkpoint.huggingface_config import family_of, model_from_huggingface
from trainer.checkpoint.huggingface_families import text_config
from trainer.checkpoint.huggingface_files import CONFIG_FILE, UNFINISHED, SafetensorsFolder
from trainer.checkpoint.parameters import PARAMETERS_FILE, is_parameters, stored_model
from trainer.checkpoint.parameters import sources as parameters_sources
from trainer.checkpoint.storage import Storage, open_storage
from trainer.config import TrainConfig, validate
from trainer.config.data import Bytes, HuggingFaceTokenizer, SentencePiece
from trainer.config.model import Model
from trainer.config.weights import Weight, weights
from trainer.errors import CheckpointError

Kind = Literal["trained", "ema"]
ITEMS: Final[Mapping[Kind, str]] = {"trained": "params", "ema": "ema"}
"""Where a checkpoint has them."""
# What a Hugging Face folder holds besides weights; taken along.
COMPANIONS: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """A model whose weights are not read yet."""

    description: str
    model: Model
    read: ReadLayer
    dtype: str | None = None
    """Of the folder, or of the folder the run began from."""
    step: int | None = None
    original: Mapping[str, Any] | None = None
    """config.json of the folder, or of the one the run began from."""
    companions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Files to take along, by name."""
    max_positions: int = 2048
    notes: tuple[str, ...] = ()
    """What does not come along, in words."""


def open_parameters(source: str, opened: ExitStack, *, step: int | None = None, weights: Kind = "trained") -> Parameters:
    """`source` is a folder with a config.json (Hugging Face), a parameter-only checkpoint, or else a run directory.

    weights: of a run, the parameters it trains or the average it keeps of them.
    opened: closes the files. Raises CheckpointError where it is none of them, does not fit its own description, or the
    step is missing or damaged.
    """
    folder = epath.Path(source)
    if not (is_parameters(source) or (folder / CONFIG_FILE).exists()):
        return _of_run(source, step, ITEMS[weights])
    if weights != "trained":
        raise CheckpointError(f"{source} is no run directory and has one set of weights", hint="leave out --weights")
    if step is not None:
        raise CheckpointError(f"{source} is no run directory and has no steps", hint="leave out --step")
    return _of_parameters(source, opened) if is_parameters(source) else _of_huggingface(source, opened)


def _of_parameters(folder: str, opened: ExitStack) -> Parameters:
    files = opened.enter_context(SafetensorsFolder(folder, PARAMETERS_FILE))
    model = stored_model(files.config, folder)
    table = parameters_sources(model, {name: tensor.shape for name, tensor in files.tensors.items()})
    if problems := list(misfits(files, table, lambda _: False)):
        raise CheckpointError(f"{folder} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))
    read = layer_reader(files, table)
    return Parameters(folder, model, read, files.config.get("dtype"), companions=_companions(folder))


def _of_huggingface(folder: str, opened: ExitStack) -> Parameters:
    files = opened.enter_context(open_huggingface(folder))
    model = model_from_huggingface(files.config)
    table = huggingface_sources(model, family_of(files.config))
    if problems := list(load_problems(files, table, model)):
        raise CheckpointError(f"{folder} does not fit its config.json:\n" + "\n".join(f"  {problem}" for problem in problems))
    dtype = files.config.get("dtype") or files.config.get("torch_dtype")
    longest = files.config.get("max_position_embeddings") or 2048
    read = layer_reader(files, table)
    notes = tuple(left_out(files))
    return Parameters(folder, model, read, dtype, original=files.config, companions=_companions(folder), max_positions=longest, notes=notes)


def require_average(where: str, items: Container[str]) -> None:
    """Raises CheckpointError where a checkpoint, whose items these are, has no average of its parameters."""
    if ITEMS["ema"] not in items:
        raise CheckpointError(f"{where} has no average of its parameters", hint="leave out --weights; a run with `train.ema` keeps one")


def _of_run(directory: str, step: int | None, item: str) -> Parameters:
    storage = open_storage(checkpoint_directory(directory))
    step = _verified_step(directory, storage, step, item)
    meta = json.loads(storage.read(f"{step}/{META_FILE}"))
    if item != ITEMS["trained"]:
        require_average(f"step {step} of {directory}", meta["items"])
    config = validate(TrainConfig, meta["run"]["config"])
    read = _layers_of_checkpoint(f"{storage.root}/{step}/{item}", config.model, meta["items"][item])
    original, companions = _of_the_beginning(config)
    dtype = (original or {}).get("dtype") or (original or {}).get("torch_dtype")
    length = config.batch.sequence_length
    what = f"step {step} of {directory}" + (", averaged" if item != ITEMS["trained"] else "")
    bytes_only = isinstance(config.data.tokenizer, Bytes) and not any(name.startswith("tokenizer.") for name in companions)
    notes = ("the run's tokenizer is `bytes`, which has no file: `generate` of what is written needs --tokenizer bytes",)
    return Parameters(what, config.model, read, dtype, step, original, companions, length, notes if bytes_only else ())


def _layers_of_checkpoint(folder: str, model: Model, saved: Mapping[str, Any]) -> ReadLayer:
    """Raises CheckpointError where the saved parameters are not those of `model`."""
    shapes = {path: tuple(leaf["shape"]) for path, leaf in saved.items()}
    places: dict[tuple[str, int | None], tuple[str, tuple[int, ...]]] = {}
    found: dict[tuple[str, int | None], tuple[int, ...]] = {}
    for path, holding in holdings(shapes).items():
        for within in range(math.prod(holding.leading)) if holding.leading is not None else (None,):
            repeat = None if within is None else holding.first_repeat + within
            places[holding.stacked, repeat] = path, holding.index(repeat) or ()
            found[holding.stacked, repeat] = shapes[path][len(holding.leading or ()) :]
    declared = {key: weight.layer_shape for weight in weights(model.model_copy(update={"layers": "scan"})) for key in _repeats(weight)}
    if declared != found:
        unlike = sorted(
            {path for path, repeat in declared.keys() | found.keys() if declared.get((path, repeat)) != found.get((path, repeat))}
        )
        raise CheckpointError(f"the checkpoint's parameters are not those of its config: {', '.join(unlike[:5])}")

    def read(path: str, repeat: int | None) -> np.ndarray:
        return read_part(folder, *places[path, repeat])

    return read


def _repeats(weight: Weight) -> list[tuple[str, int | None]]:
    return [(weight.path, repeat) for repeat in range(weight.shape[0])] if weight.layer_dims else [(weight.path, None)]


def nothing_there(source: str, skipped: Mapping[int, str]) -> CheckpointError:
    """What to say of a source without a committed step; skipped: why those steps are none that it does hold."""
    hint = "give the run_directory of a run that has saved, a Hugging Face folder or a parameter-only checkpoint"
    folder = epath.Path(source)
    if (folder / UNFINISHED).exists():
        return CheckpointError(f"{source}: an export that did not come to its end", hint="the command that began it begins it anew")
    if "://" not in source and not folder.exists():
        return CheckpointError(f"{source} does not exist", hint=hint)
    reasons = "".join(f"\n  step {step}: {reason}" for step, reason in [*skipped.items()][-3:])
    return CheckpointError(f"{checkpoint_directory(source)} holds no committed step{reasons}", hint=hint)


def _verified_step(source: str, storage: Storage, step: int | None, item: str) -> int:
    """The step, or the newest, after its parameters were compared with their checksums."""
    if step is None:
        found = inspect(storage)
        if not found.steps:
            raise nothing_there(source, found.skipped)
        step = found.steps[-1]
    try:
        commit = read_commit(storage, step)
    except Damaged as reason:
        raise CheckpointError(f"step {step} of {storage.root} cannot be used: {reason}", hint=other_steps(storage)) from None
    needed = [path for path in commit.files if path == META_FILE or path.startswith(f"{item}/")]
    if wrong := verify_contents(storage, commit, needed):
        raise CheckpointError(f"step {step} of {storage.root} is damaged: {'; '.join(wrong[:3])}", hint="choose another with --step")
    return step


def _companions(folder: str) -> dict[str, str]:
    return {name: f"{folder.rstrip('/')}/{name}" for name in COMPANIONS if (epath.Path(folder) / name).exists()}


def _of_the_beginning(config: TrainConfig) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """config.json of the folder the run began from, where there was one, and the files to take along, by name."""
    original: dict[str, Any] | None = None
    files: dict[str, str] = {}
    if start := config.checkpoint.start_from:
        if (epath.Path(start) / CONFIG_FILE).exists():
            original = dict(text_config(json.loads((epath.Path(start) / CONFIG_FILE).read_text())))
        elif not is_parameters(start):
            print(f"warning: {start} is gone; config.json is made anew, without token ids", file=sys.stderr)
        files = _companions(start)
    match config.data.tokenizer:
        case HuggingFaceTokenizer(path=path):
            files["tokenizer.json"] = path
        case SentencePiece(path=path):
            files["tokenizer.model"] = path
        case _:
            pass
    for name, path in list(files.items()):
        if not epath.Path(path).exists():
            print(f"warning: {files.pop(name)} is gone; the folder will have no {name}", file=sys.stderr)
    return original, files
