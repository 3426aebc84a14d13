"""`nnxlaunch export RUN_DIRECTORY --out FOLDER`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

EXAMPLES = """  nnxlaunch export gs://bucket/my-run --out exported           the newest checkpoint
  nnxlaunch export runs/my-run --out exported --step 1000      another one
"""


class Dtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def command(
    run_directory: Annotated[str, typer.Argument(metavar="RUN_DIRECTORY", help="`train.run_directory` of the job, local or gs://.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="A new folder, local or gs://.")],
    step: Annotated[int | None, typer.Option("--step", min=0, help="A committed step; default: the newest.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Default: as the checkpoint the run began from, else float32.")] = None,
) -> None:
    """Write a checkpoint as Hugging Face safetensors, with config.json and tokenizer; print what was written.

    Needs the trainer's packages. Weights are read and written one at a time.
    """
    import importlib.util
    import subprocess
    import sys

    from launcher.errors import Unavailable

    if importlib.util.find_spec("jax") is None:
        raise Unavailable("the trainer's packages are not installed here", hint="in the clone: ./setup.sh train")
    arguments = [run_directory, "--out", out]
    arguments += ["--step", str(step)] if step is not None else []
    arguments += ["--dtype", dtype.value] if dtype is not None else []
    raise typer.Exit(subprocess.run([sys.executable, "-m", "trainer.export", *arguments], check=False).returncode)
