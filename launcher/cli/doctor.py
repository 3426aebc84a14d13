"""`nnxlaunch doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import Context, Kubeconfig, Namespace, Output, OutputFormat, Overrides

if TYPE_CHECKING:
    from launcher.doctor import Finding

EXAMPLES = """  nnxlaunch doctor                                   the cluster and the namespace of the current context
  nnxlaunch doctor job.yaml                          and all that this job needs; starts one small pod
  nnxlaunch doctor job.yaml --tpu                    that pod on a TPU host: devices, memlock, versions
  nnxlaunch doctor --output json | jq -r '.[] | select(.level == "fail") | .fix'
"""

OptionalSpec = Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="A job spec: look at what this job needs, too.")]
Tpu = Annotated[bool, typer.Option("--tpu", help="Run the pod on a TPU host of the spec's type, in the spec's queue.")]
Pod = Annotated[bool, typer.Option("--pod/--no-pod", help="Whether to start the pod that tries image, account, storage and volumes.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=1, help="How long to wait for that pod.")]


def command(
    spec: OptionalSpec = None,
    overrides: Overrides = [],  # noqa: B006  (Typer reads it)
    tpu: Tpu = False,
    pod: Pod = True,
    timeout: Timeout = 180,
    output: OutputFormat = Output.TABLE,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Check that a cluster can run jobs; print what is wrong and the command that repairs it.

    Access, rights by verb, JobSet, Kueue's queues, TPU nodes, the namespace's Pod Security level. With SPEC also whether
    its pods start: one pod with the job's image, account, variables and volumes writes a file where checkpoints go, and
    is removed. Exit code 1 where anything fails.
    """
    from launcher.checks import load
    from launcher.cli.output import emit
    from launcher.doctor import Level

    if tpu and spec is None:
        raise typer.BadParameter("give the SPEC whose TPU host is meant", param_hint="--tpu")
    parsed = load(spec, overrides, target="kubernetes") if spec else None
    if tpu and parsed is not None and parsed.layout.tpu is None:
        raise typer.BadParameter("the spec has no `tpu`", param_hint="--tpu")
    found: list[Finding] = []
    where = (context, str(kubeconfig) if kubeconfig else None, namespace)
    for finding in _findings(where, parsed, pod=pod, tpu=tpu, timeout=timeout):
        found.append(finding)
        if output is Output.TABLE:
            print(f"{finding.level:<4}  {finding.check:<9}  {finding.message}", flush=True)
            if finding.fix:
                print(f"{'':<15}  fix: {finding.fix}", flush=True)
    if output is not Output.TABLE:
        emit([finding.as_data() for finding in found], output)
    raise SystemExit(1 if any(finding.level is Level.FAIL for finding in found) else 0)


def _findings(where: tuple[str | None, str | None, str | None], spec: object, *, pod: bool, tpu: bool, timeout: float) -> Iterator[Finding]:
    from launcher.backend.kubernetes import KubernetesBackend
    from launcher.backend.kubernetes_probe import probe
    from launcher.doctor.finding import Level, bad
    from launcher.errors import Unavailable
    from launcher.spec import JobSpec

    context, kubeconfig, namespace = where
    parsed = spec if isinstance(spec, JobSpec) else None
    try:
        backend = KubernetesBackend(context=context, kubeconfig=kubeconfig, namespace=namespace)
    except Unavailable as error:
        yield bad("access", str(error), error.hint)
        return
    fatal = False
    for finding in backend.examine(parsed):
        fatal |= finding.level is Level.FAIL and finding.check in ("access", "namespace", "rights", "jobset")
        yield finding
    if parsed is not None and pod and not fatal:
        yield from probe(backend, parsed, tpu=tpu, timeout_seconds=timeout)
