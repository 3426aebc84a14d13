"""`nnxlaunch events`."""

from __future__ import annotations

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace, Output, OutputFormat

EXAMPLES = """  nnxlaunch events my-run
  nnxlaunch events my-run --output json | jq -r '.[] | select(.warning) | .message'
"""


def command(
    name: JobName,
    output: OutputFormat = Output.TABLE,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print what the cluster said about a job, its slices and pods of all attempts, oldest first.

    A cluster keeps events for an hour unless it is told otherwise.
    """
    from launcher.backend.status import as_data
    from launcher.cli.backends import connect, job
    from launcher.cli.output import emit, table
    from launcher.cli.show import age
    from launcher.errors import visible

    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name)
    job(target, backend, name)
    events = target.events(name)
    if output is not Output.TABLE:
        emit([as_data(event) for event in events], output)
        return
    rows = [
        (age(event.at), "warning" if event.warning else "normal", event.about, event.reason, visible(" ".join(event.message.split())))
        for event in events
    ]
    print(table(rows, ("AGE", "KIND", "ABOUT", "EVENT", "MESSAGE")) if rows else "no events")
