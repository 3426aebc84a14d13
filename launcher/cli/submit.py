"""`nnxlaunch submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, Kubeconfig, Namespace, Overrides

EXAMPLES = """  nnxlaunch submit job.yaml                          on the cluster of the current context
  nnxlaunch submit job.yaml --backend local          as processes of this machine
  nnxlaunch submit job.yaml --set train.steps=100 --replace
"""

DefaultSpec = Annotated[Path, typer.Argument(metavar="[SPEC]", help="The job spec, a YAML file; `-` reads standard input.")]
Replace = Annotated[bool, typer.Option("--replace", help="Delete a job of the same name first, and wait until it is gone.")]


def command(
    spec: DefaultSpec = Path("job.yaml"),
    overrides: Overrides = [],  # noqa: B006  (Typer reads it)
    replace: Replace = False,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Start a job: check the spec, render it, create what `render` shows.

    A run directory that already holds checkpoints of this run is resumed.
    """
    from launcher.checks import load
    from launcher.cli.backends import connect, flags
    from launcher.manifest import render

    parsed = load(spec, overrides, target=backend.value)
    manifests = render(parsed)
    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace)
    status = target.create(manifests, replace=replace)
    options = flags(backend, namespace)
    print(f"{status.name}: {status.state}{f': {status.message}' if status.message else ''}")
    print(f"run directory: {parsed.train.run_directory}")
    print(f"follow it:     nnxlaunch logs {status.name} -f{options}")
    print(f"stop it:       nnxlaunch cancel {status.name}{options}")
