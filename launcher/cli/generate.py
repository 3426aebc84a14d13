"""`nnxlaunch generate SOURCE --prompt TEXT`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """  nnxlaunch generate gs://bucket/my-run --prompt "Once upon a time"           the newest checkpoint
  nnxlaunch generate runs/my-run --step 1000 --prompt "def " --temperature 0.8 --top-p 0.9
  nnxlaunch generate runs/my-run --prompt "def " --weights ema --draft          averaged weights; drafts by multi-token prediction
  nnxlaunch generate exported --prompts prompts.txt --output json              one line of JSON for each answer
  nnxlaunch generate exported --prompt "Hello" --mesh tensor=4,fsdp=2          over eight devices
"""


class Weights(StrEnum):
    TRAINED = "trained"
    EMA = "ema"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Form(StrEnum):
    TEXT = "text"
    JSON = "json"


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run directory or a Hugging Face folder, local or gs://.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; may be repeated.")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt on each line; `-`: standard input.")] = None,
    step: Annotated[int | None, typer.Option("--step", min=0, help="A committed step of the run; default: the newest.")] = None,
    weights: Annotated[Weights, typer.Option("--weights", help="Of a run: its parameters, or the average it keeps.")] = Weights.TRAINED,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens for each prompt, at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from the K most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Draw from the fewest tokens of this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="Draw from tokens this likely, as a share of the first.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first prompt; each further one takes the next.")] = 0,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Guess tokens with the model's modules of multi-token prediction: the same answers in fewer steps."),
    ] = False,
    slots: Annotated[int | None, typer.Option("--slots", min=1, help="Prompts answered at once; default: all, at most 16.")] = None,
    mesh: Annotated[str | None, typer.Option("--mesh", metavar="AXIS=N,...", help="Default: tensor, then fsdp.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of matmuls and caches; default: the model's.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="FILE", help="tokenizer.json, a .model, or `bytes`; default: the source's.")
    ] = None,
    output: Annotated[Form, typer.Option("--output", "-o", help="text streams; json is a line for each answer that is done.")] = Form.TEXT,
) -> None:
    """Continue prompts with a trained model, on the devices of this machine; the text goes to standard output.

    Needs the trainer's packages. An answer ends with the tokenizer's end token or after --max-tokens.
    """
    from launcher.cli.tool import run_trainer_module

    options = {
        "prompts": prompts,
        "step": step,
        "weights": weights,
        "max-tokens": max_tokens,
        "temperature": temperature,
        "top-k": top_k,
        "top-p": top_p,
        "min-p": min_p,
        "seed": seed,
        "slots": slots,
        "mesh": mesh,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "output": output,
    }
    arguments = [source, *(f"--prompt={text}" for text in prompt)]
    arguments += [f"--{name}={value}" for name, value in options.items() if value is not None]
    arguments += ["--draft"] if draft else []
    given = sys.stdin.read() if str(prompts) == "-" else ""
    raise typer.Exit(run_trainer_module("trainer.decode", arguments, given=given).returncode)
