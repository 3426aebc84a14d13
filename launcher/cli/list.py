"""`nnxlaunch list`."""

from __future__ import annotations

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, Kubeconfig, Namespace, Output, OutputFormat

EXAMPLES = """  nnxlaunch list
  nnxlaunch list --backend local
  nnxlaunch list --output json | jq -r '.[] | select(.state == "failed") | .name'
"""


def command(
    output: OutputFormat = Output.TABLE,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List jobs of one namespace."""
    from launcher.backend.status import as_data
    from launcher.cli.backends import connect
    from launcher.cli.output import emit, table
    from launcher.cli.status import age

    found = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace).list()
    if output is not Output.TABLE:
        emit([as_data(status) for status in found], output)
        return
    rows = [
        (
            status.name, str(status.state), f"{status.ready}/{status.hosts}", f"{status.restarts_used}/{status.restarts_max}",
            str(status.restarts_free), age(status.created_at), status.message[:100],
        )
        for status in found
    ]  # fmt: skip
    print(table(rows, ("NAME", "STATE", "READY", "RESTARTS", "FREE", "AGE", "MESSAGE")))
