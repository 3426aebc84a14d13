"""`nnxlaunch import FOLDER`."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.cli.export import Dtype

EXAMPLES = """  nnxlaunch import gs://bucket/Qwen3-8B                             keys for the train section of a job spec
  nnxlaunch import gs://bucket/Qwen3-8B --out gs://bucket/qwen3     the same, and the weights as a parameter-only checkpoint
"""


def command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="With config.json and safetensors, local or gs://.")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="CHECKPOINT", help="A new folder for a parameter-only checkpoint, local or gs://.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of --out; default: the folder's.")] = None,
) -> None:
    """Check a Hugging Face folder and print what a job spec needs to start from it; with --out, convert its weights.

    Every tensor's name, shape and dtype is compared with the model that config.json describes. A run reads the folder itself,
    straight to its shards: converting is for what is not wanted in Hugging Face's layout. Needs the trainer's packages.
    """
    from launcher.cli.tool import run_trainer_module

    arguments = [folder]
    arguments += ["--out", out] if out is not None else []
    arguments += ["--dtype", dtype.value] if dtype is not None else []
    raise typer.Exit(run_trainer_module("trainer.importing", arguments).returncode)
