"""`nnxlaunch export SOURCE --out FOLDER`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

EXAMPLES = """  nnxlaunch export gs://bucket/my-run --out exported           the newest checkpoint, for Hugging Face
  nnxlaunch export runs/my-run --out exported --step 1000      another one
  nnxlaunch export runs/my-run --out mean --weights ema        the average of its parameters
  nnxlaunch export runs/my-run --out kept --format parameters  parameters alone, in the trainer's own layout
"""


class Dtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Format(StrEnum):
    HUGGINGFACE = "huggingface"
    PARAMETERS = "parameters"


class Weights(StrEnum):
    TRAINED = "trained"
    EMA = "ema"


class Layers(StrEnum):
    SCAN = "scan"
    UNROLL = "unroll"


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A run directory (`train.run_directory`), or a folder of parameters, local or gs://."),
    ],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="A new folder, local or gs://.")],
    step: Annotated[int | None, typer.Option("--step", min=0, help="A committed step; default: the newest.")] = None,
    weights: Annotated[
        Weights, typer.Option("--weights", help="Of a run: its parameters, or the average that it keeps of them (`train.ema`).")
    ] = Weights.TRAINED,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Default: as the checkpoint the run began from, else float32.")] = None,
    form: Annotated[
        Format, typer.Option("--format", help="Hugging Face safetensors, or a parameter-only checkpoint in the trainer's layout.")
    ] = Format.HUGGINGFACE,
    layers: Annotated[Layers, typer.Option("--layers", help="Of --format parameters: layers stacked, or one by one.")] = Layers.SCAN,
) -> None:
    """Write a checkpoint's parameters with config and tokenizer; print what was written.

    Needs the trainer's packages. Weights are read and written one layer at a time.
    """
    arguments = [source, "--out", out, "--format", form.value, "--layers", layers.value, "--weights", weights.value]
    arguments += ["--step", str(step)] if step is not None else []
    arguments += ["--dtype", dtype.value] if dtype is not None else []
    from launcher.cli.tool import run_trainer_module

    raise typer.Exit(run_trainer_module("trainer.export", arguments).returncode)
