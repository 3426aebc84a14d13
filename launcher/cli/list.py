"""`nnxlaunch list`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from launcher.backend import BackendKind, JobState, JobStatus
from launcher.cli.options import BackendChoice, Context, Kubeconfig, Namespace, Output

EXAMPLES = """  nnxlaunch list
  nnxlaunch list --mine --state running --state queued
  nnxlaunch list -o wide
  nnxlaunch list --output json | jq -r '.[] | select(.state == "failed") | .name'
"""


class Form(StrEnum):
    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


States = Annotated[list[JobState], typer.Option("--state", help="Only jobs in this state; may be repeated.")]
Mine = Annotated[bool, typer.Option("--mine", help="Only jobs that were submitted under your user name of this machine.")]
FormChoice = Annotated[Form, typer.Option("--output", "-o", help="Form of the result; `wide` has slices, queue and user too.")]


def command(
    state: States = [],  # noqa: B006  (Typer wants a list, and never changes it)
    mine: Mine = False,
    output: FormChoice = Form.TABLE,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List jobs of one namespace."""
    from launcher.backend.status import SUBMITTED_BY_ANNOTATION, as_data, user
    from launcher.cli.backends import connect
    from launcher.cli.output import emit, table

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace)
    found = target.list()
    found = [status for status in found if not state or status.state in state]
    if mine:
        found = [status for status in found if status.annotations.get(SUBMITTED_BY_ANNOTATION) == user()]
    if output in (Form.JSON, Form.YAML):
        emit([as_data(status) for status in found], Output(output.value))
        return
    if not found:
        print(f"no {'such jobs' if state or mine else 'jobs'} in namespace {target.namespace}")
        return
    wide = output is Form.WIDE
    header = ("NAME", "STATE", "READY", "RESTARTS", "FREE", "AGE", *(("SLICES", "QUEUE", "USER") if wide else ()), "MESSAGE")
    print(table([_row(status, wide=wide) for status in found], header))


def _row(status: JobStatus, *, wide: bool) -> tuple[str, ...]:
    from launcher.backend.status import QUEUE_LABEL, SUBMITTED_BY_ANNOTATION
    from launcher.cli.show import age
    from launcher.errors import visible

    hosts, slices = f"{status.ready}/{status.hosts}", f"{sum(part.ready == part.hosts for part in status.slices)}/{len(status.slices)}"
    if status.state.finished:
        hosts = slices = "-"
    more = (slices, status.labels.get(QUEUE_LABEL, ""), status.annotations.get(SUBMITTED_BY_ANNOTATION, ""))
    message = " ".join(visible(status.message).split())
    return (
        status.name, str(status.state), hosts, f"{status.restarts_used}/{status.restarts_max}",
        str(status.restarts_free), age(status.created_at), *(more if wide else ()), message if wide else message[:100],
    )  # fmt: skip
