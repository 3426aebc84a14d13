"""`nnxlaunch compile SPEC`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.options import Output, OutputFormat, Overrides, SpecFile

EXAMPLES = """  nnxlaunch compile job.yaml                                    does it fit, what does it send, what limits it?
  nnxlaunch compile job.yaml --topology v5p-128 --slices 2      on other hardware
  nnxlaunch compile job.yaml --save step.executable             for `train.compiler.executable`: start without compiling
"""

Topology = Annotated[str | None, typer.Option("--topology", metavar="TYPE", help="A TPU type such as v5p-128; default: the spec's.")]
Slices = Annotated[int | None, typer.Option("--slices", min=1, help="Slices of it; default: the spec's.")]
Save = Annotated[str | None, typer.Option("--save", metavar="PATH", help="Write the executable there, a file or gs://.")]
Hlo = Annotated[Path | None, typer.Option("--hlo", metavar="FILE", help="Write the compiled program's text there.")]


def command(
    spec: SpecFile,
    overrides: Overrides = [],  # noqa: B006
    topology: Topology = None,
    slices: Slices = None,
    save: Save = None,
    hlo: Hlo = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Compile the job's train step for its hardware, on this machine; no accelerator is needed.

    Prints memory of a device, collectives by region, and what limits a step. Exit code 1: it does not fit the memory.
    Needs the trainer's packages and, for a TPU, libtpu; a large model takes some minutes.
    """
    import importlib.util
    import json
    import tempfile

    from launcher.checks import load
    from launcher.cli.output import emit
    from launcher.cli.tool import run_trainer_module
    from launcher.errors import NotFound, ToolFailed, Unavailable
    from launcher.explain.compiled import described, target_of
    from launcher.spec import from_yaml

    if topology is not None:
        overrides = ["cpu=null", f"tpu={{type: {topology}, slices: {slices or 1}}}", *overrides]
    elif slices is not None:
        overrides = [*overrides, f"{from_yaml(spec, overrides).layout.target}.slices={slices}"]
    # As a job of this machine: the image and the pods' files do not matter to the compiler.
    job = load(spec, overrides, target="local")
    if hlo is not None and not hlo.parent.is_dir():
        raise NotFound(f"--hlo: there is no folder {hlo.parent}")
    target = target_of(job)
    if target.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise Unavailable("libtpu is not installed here: it holds the TPU compiler", hint="in the clone: ./setup.sh dev, on Linux x86_64")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(job.world.model_dump_json())
        file.flush()
        arguments = ["--config", file.name, "--target", target.model_dump_json()]
        arguments += ["--save", save] if save is not None else []
        arguments += ["--hlo", str(hlo)] if hlo is not None else []
        done = run_trainer_module("trainer.aot", arguments, capture=True)
    if not done.stdout.startswith("{"):
        if done.returncode in (64, 70):
            raise typer.Exit(done.returncode)
        raise ToolFailed(f"the compilation ended with exit code {done.returncode}", hint="its own words are above")
    found: dict[str, Any] = json.loads(done.stdout)
    if output is Output.TABLE:
        print(described(found))
    else:
        emit(found, output)
    raise typer.Exit(done.returncode)
