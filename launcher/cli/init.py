"""`nnxlaunch init`."""

from __future__ import annotations

from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """  nnxlaunch init > job.yaml            a job on this machine's CPU
  nnxlaunch init --target tpu job.yaml
"""


class Target(StrEnum):
    CPU = "cpu"
    TPU = "tpu"


File = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to write it; default: standard output. Never overwritten.")]
TargetOption = Annotated[Target, typer.Option("--target", "-t", help="What the job runs on.")]
Name = Annotated[str, typer.Option("--name", help="Name of the job.")]


def command(file: File = None, target: TargetOption = Target.CPU, name: Name = "my-run") -> None:
    """Write a commented starter spec. It validates as it is."""
    import json

    import yaml

    from launcher.checks import problems_of_document
    from launcher.errors import AlreadyExists, NotFound, SpecError

    text = (resources.files("launcher.spec") / f"starter.{target}.yaml").read_text(encoding="utf-8")
    _, problems = problems_of_document({**yaml.safe_load(text), "name": name})
    if problems:
        raise SpecError(problems)
    word = name if yaml.safe_load(name) == name else json.dumps(name)  # `true` is not text in YAML
    text = text.replace("name: my-run", f"name: {word}").replace("my-run", name)
    if file is None:
        print(text, end="")
        return
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise AlreadyExists(f"{file} exists", hint="choose another name") from None
    except OSError as error:
        raise NotFound(f"{file} cannot be written: {error.strerror}", hint="check the folder") from None
    typer.echo(f"wrote {file}; next: nnxlaunch validate {file}", err=True)
