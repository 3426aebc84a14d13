"""`nnxlaunch render`."""

from __future__ import annotations

import typer

from launcher.cli.options import Output, OutputFormat, Overrides, SpecFile

EXAMPLES = """  nnxlaunch render job.yaml
  nnxlaunch render job.yaml | kubectl apply -f -
  nnxlaunch render job.yaml --output json
"""


def command(spec: SpecFile, overrides: Overrides = [], output: OutputFormat = Output.YAML) -> None:  # noqa: B006  (Typer reads it)
    """Print the Kubernetes manifests of a job spec. Nothing is sent anywhere; `submit` sends exactly this."""
    from launcher.checks import load
    from launcher.cli.output import emit
    from launcher.manifest import render, to_yaml

    if output is Output.TABLE:
        raise typer.BadParameter("manifests are json or yaml, not a table", param_hint="--output")
    manifests = render(load(spec, overrides))
    if output is Output.JSON:
        emit(manifests, output)
    else:
        print(to_yaml(manifests), end="")
