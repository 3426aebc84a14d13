"""python -m trainer.export RUN_DIRECTORY --out FOLDER [--step N]: a checkpoint as a Hugging Face folder.

Reads one weight at a time, on the CPU. Prints one JSON object. Exit codes as in trainer/contract.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from etils import epath

from trainer.checkpoint.commit import META_FILE, Damaged, checkpoint_directory, inspect, read_commit, verify_contents
from trainer.checkpoint.layout import Leaf, Move, Same, plan, shorten
from trainer.checkpoint.storage import Storage, open_storage
from trainer.config import ConfigError, TrainConfig, validate
from trainer.config.data import HuggingFaceTokenizer, SentencePiece
from trainer.config.model import Model
from trainer.config.weights import parameter_count, weights
from trainer.contract import Exit
from trainer.errors import CheckpointError, TrainerError

PARAMS: Final = "params"
# What a Hugging Face folder holds besides weights; taken along from the checkpoint a run began from.
COMPANIONS: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def export(run_directory: str, out: str, *, step: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write the parameters of a committed step (default: the newest) to the folder `out`, local or gs://.

    dtype: `float32`, `float16` or `bfloat16`; default: that of the checkpoint the run began from, else float32.
    Raises CheckpointError where the step is missing or damaged, `out` is not empty, or no Hugging Face family
    describes the model.
    """
    from trainer.checkpoint.arrays import read
    from trainer.checkpoint.huggingface import export_huggingface

    target = epath.Path(out)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{out} is not empty", hint="give a new folder")
    storage = open_storage(checkpoint_directory(run_directory))
    step = _verified_step(storage, step)
    meta = json.loads(storage.read(f"{step}/{META_FILE}"))
    config = validate(TrainConfig, meta["run"]["config"])
    # All repeats of a weight together, whatever form they were saved in.
    model = config.model.model_copy(update={"layers": "scan"})
    abstract, moves = _stacked(model, meta["items"][PARAMS])
    folder = f"{storage.root}/{step}/{PARAMS}"
    original, companions = _companions(config)
    export_huggingface(
        lambda path: read(folder, (moves[path],), {path: abstract[path]})[path],
        model,
        out,
        max_positions=config.batch.sequence_length,
        dtype=dtype,
        original=original,
        companions=companions,
    )
    written = json.loads((target / "config.json").read_text())
    return {
        "folder": out,
        "step": step,
        "model_type": written["model_type"],
        "dtype": written.get("dtype") or written.get("torch_dtype"),
        "parameters": parameter_count(config.model),
        "files": sorted(file.name for file in target.iterdir()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        print(json.dumps(export(options.run_directory, options.out, step=options.step, dtype=options.dtype), indent=2))
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return Exit.CONFIG
    except TrainerError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return Exit.DONE


def _verified_step(storage: Storage, step: int | None) -> int:
    """The step, or the newest, after its parameters were compared with their checksums."""
    if step is None:
        steps = inspect(storage).steps
        if not steps:
            raise CheckpointError(f"{storage.root} holds no committed step", hint="give the run_directory of a run that has saved")
        step = steps[-1]
    try:
        commit = read_commit(storage, step)
    except Damaged as reason:
        steps = inspect(storage).steps
        raise CheckpointError(
            f"step {step} of {storage.root} cannot be exported: {reason}",
            hint=f"committed steps: {', '.join(map(str, steps)) or 'none'}",
        ) from None
    needed = [path for path in commit.files if path == META_FILE or path.startswith(f"{PARAMS}/")]
    if wrong := verify_contents(storage, commit, needed):
        raise CheckpointError(f"step {step} of {storage.root} is damaged: {'; '.join(wrong[:3])}", hint="choose another with --step")
    return step


def _stacked(model: Model, saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Move]]:
    """The parameters of `model` by path, and how each is made of the saved ones, which must be those of the saved config."""
    import jax
    import jax.numpy as jnp

    declared = {weight.path: weight.shape for weight in weights(model)}
    found = plan(
        {path: Leaf(tuple(leaf["shape"]), leaf["dtype"]) for path, leaf in saved.items()},
        {path: Leaf(shape, "float32") for path, shape in declared.items()},
    )
    if found.problems:
        raise CheckpointError(f"the checkpoint's parameters are not those of its config:\n{shorten(list(found.problems))}")
    moves = {move.path if isinstance(move, Same) else move.targets[0].path: move for move in found.moves}
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in declared.items()}, moves


def _companions(config: TrainConfig) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """config.json of the checkpoint the run began from, where there was one, and the files to take along, by name."""
    original: dict[str, Any] | None = None
    files: dict[str, str] = {}
    if start := config.checkpoint.start_from:
        folder = epath.Path(start)
        try:
            original = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            print(f"warning: {start} is gone; config.json is made anew, without token ids", file=sys.stderr)
        files = {name: f"{start.rstrip('/')}/{name}" for name in COMPANIONS if (folder / name).exists()}
    match config.data.tokenizer:
        case HuggingFaceTokenizer(path=path):
            files["tokenizer.json"] = path
        case SentencePiece(path=path):
            files["tokenizer.model"] = path
        case _:
            pass
    return original, files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description="Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("run_directory", metavar="RUN_DIRECTORY", help="of the run, local or gs://")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder, local or gs://")
    parser.add_argument("--step", type=int, metavar="N", help="a committed step; default: the newest")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as the run's first checkpoint, else float32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
