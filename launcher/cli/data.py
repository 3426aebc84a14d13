"""`nnxlaunch data prepare SPEC`."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.cli.options import Overrides, SpecFile

command = typer.Typer(no_args_is_help=True, help="Prepare the tokenised, packed data cache.")

EXAMPLES = """\
  nnxlaunch data prepare job.yaml                     before the first submit, so that no accelerator waits for it
  nnxlaunch data prepare job.yaml --processes 8       with eight processes of this machine
"""

Processes = Annotated[int, typer.Option("--processes", min=1, help="Share the work among this many processes of this machine.")]


@command.callback()
def _group() -> None:
    pass


@command.command("prepare")
def prepare(
    spec: SpecFile,
    overrides: Overrides = [],  # noqa: B006
    processes: Processes = 1,
) -> None:
    """Tokenise and pack the spec's data into its cache directory, on this machine; print what is in it.

    The same cache is made by the job itself where it is missing. Needs the trainer's packages and access to the
    sources and the cache directory. Stopped at any moment, the next call continues.
    """
    from launcher.cli.tool import run_trainer_module
    from launcher.spec import from_yaml

    train = from_yaml(spec, overrides).train
    arguments = ["prepare", "--config", "/dev/stdin", "--processes", str(processes)]  # no file that a kill would leave behind
    done = run_trainer_module("trainer.data", arguments, needs="numpy", given=train.model_dump_json())
    raise typer.Exit(done.returncode)
