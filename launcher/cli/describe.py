"""`nnxlaunch describe`."""

from __future__ import annotations

from dataclasses import replace

from launcher.backend import BackendKind
from launcher.cli.options import BackendChoice, Context, JobName, Kubeconfig, Namespace

EXAMPLES = """  nnxlaunch describe my-run
"""


def command(
    name: JobName,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print everything known of a job: its status, labels and conditions, every cause that was found, every restart and event."""
    from launcher.cli.backends import connect, flags, look
    from launcher.cli.output import screen, table
    from launcher.cli.show import age, whole
    from launcher.errors import visible
    from launcher.observe.history import restarts
    from launcher.observe.report import report
    from launcher.observe.why import causes

    scene = look(connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace, name=name), backend, name)
    status, options = scene.status, flags(backend, namespace)
    told = report(scene)
    print(whole(replace(told, cause=told.cause.told_with(options)), f"{backend}, namespace {scene.namespace}"))
    marks = sorted([*status.labels.items(), *status.annotations.items()])
    if marks:
        print(f"\nlabels and annotations\n{screen(marks)}")
    if status.conditions:
        rows = [(c.type, str(c.status), age(c.changed_at), c.reason, visible(c.message)) for c in status.conditions]
        print(f"\n{table(rows, ('CONDITION', 'STATUS', 'AGE', 'REASON', 'MESSAGE'))}")
    print("\ncauses, the first must go first")
    for cause in dict.fromkeys(cause.told_with(options) for cause in causes(scene)):
        print(screen([(cause.code, cause.sentence), ("", f"fix: {cause.fix}"), *(("", words) for words in cause.evidence)]))
    if history := restarts(scene):
        rows = [(age(ended.at), "free" if ended.free else "counted", visible(ended.sentence)) for ended in history]
        print(f"\n{table(rows, ('AGE', 'RESTART', 'BECAUSE'))}")
