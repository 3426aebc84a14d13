"""python -m trainer.importing FOLDER [--out CHECKPOINT]: the model of a Hugging Face folder, as a job spec says it.

Prints the `model` and `checkpoint` keys of a spec's `train` section as YAML, after every tensor of the folder was
compared with them (names, shapes, dtypes; of the weights nothing is read). With --out the weights are written as a
parameter-only checkpoint, layer by layer. Exit codes as in trainer/contract.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import yaml

from trainer.config.model import Model
from trainer.export import export, guarded


def train_section(folder: str, out: str | None = None, *, dtype: str | None = None) -> dict[str, Any]:
    """`model` and `checkpoint` of a run that starts from `folder`, or from `out`, which is written then.

    dtype: of `out`; default: the folder's. Raises CheckpointError where the folder is none, or is not what it says.
    """
    from trainer.parameters import open_parameters

    with ExitStack() as opened:
        found = open_parameters(folder, opened)
    if out is not None:
        export(folder, out, dtype=dtype, form="parameters")
    else:
        for note in found.notes:
            print(f"note: {folder}: {note}", file=sys.stderr)
    return {"model": spelled(found.model), "checkpoint": {"start_from": out or folder}}


def spelled(model: Model) -> dict[str, Any]:
    """The model as a person writes it: what differs from the defaults, and the `type` of each node that has one."""
    return cast("dict[str, Any]", _spelled(model.model_dump(mode="json"), model.model_dump(mode="json", exclude_defaults=True)))


def _spelled(whole: Any, changed: Any) -> Any:
    if isinstance(whole, list):
        return [_spelled(*pair) for pair in zip(cast("list[Any]", whole), cast("list[Any]", changed), strict=True)]
    if not isinstance(whole, Mapping):
        return changed
    fields = cast("Mapping[str, Any]", whole)
    return {key: _spelled(value, changed.get(key, value)) for key, value in fields.items() if key == "type" or key in changed}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    def run() -> None:
        section = train_section(options.folder, options.out, dtype=options.dtype)
        print(yaml.safe_dump(section, sort_keys=False), end="")

    return guarded(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.importing", description="A Hugging Face folder's model for a job spec.")
    parser.add_argument("folder", metavar="FOLDER", help="with config.json and safetensors, local or gs://")
    parser.add_argument("--out", metavar="CHECKPOINT", help="new folder for a parameter-only checkpoint, local or gs://")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of --out; default: the folder's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
