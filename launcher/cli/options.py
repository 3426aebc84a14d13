"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.kinds import BackendKind


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `2h`, `1d` or a bare number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise typer.BadParameter("a number of seconds, or such as 90s, 10m, 2h, 1d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The job spec, a YAML file; `-` reads standard input.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B=VALUE", help="Override one key of the spec; may be repeated.")]
OutputFormat = Annotated[Output, typer.Option("--output", "-o", help="Form of the result on standard output.")]
JobName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Kubernetes namespace; default: the context's.")]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig; default: the current one.")]
Kubeconfig = Annotated[Path | None, typer.Option("--kubeconfig", help="Kubeconfig file; default: $KUBECONFIG or ~/.kube/config.")]
BackendChoice = Annotated[
    BackendKind,
    typer.Option("--backend", envvar="NNXLAUNCH_BACKEND", help="Where the job runs: on a cluster, or as processes of this machine."),
]
