"""`nnxlaunch why`."""

from __future__ import annotations

from dataclasses import asdict

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace, Output, OutputFormat

EXAMPLES = """  nnxlaunch why my-run
  nnxlaunch why my-run --output json | jq -r .code
"""


def command(
    name: JobName,
    output: OutputFormat = Output.TABLE,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Say in one sentence why a job does not run, has failed or restarts, by what object that is known, and what to do.

    One cause, the one that must go first. Its code is stable, for scripts. At most five requests to the cluster.
    """
    from launcher.cli.backends import connect, flags, look
    from launcher.cli.output import emit, screen
    from launcher.observe.remarks import progress_of, remarks
    from launcher.observe.why import why

    scene = look(connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name), backend, name)
    found = why(scene).told_with(flags(backend, namespace))
    further = list(remarks(scene, progress_of(scene)))
    if output is not Output.TABLE:
        state = scene.status.state.value
        emit({"name": name, "state": state, "code": found.code, "sentence": found.sentence, "fix": found.fix,
              "evidence": list(found.evidence), "remarks": [asdict(remark) for remark in further],
              "unreadable": list(scene.unreadable)}, output)  # fmt: skip
        return
    rows = [(name, scene.status.state.value), ("cause", f"{found.sentence} [{found.code}]"), ("fix", found.fix)]
    rows += [("evidence" if number == 0 else "", line) for number, line in enumerate(found.evidence)]
    rows += [("remark", str(remark)) for remark in further]
    if scene.unreadable:
        rows.append(("not seen", f"this user may not read {', '.join(scene.unreadable)}"))
    print(screen(rows))
