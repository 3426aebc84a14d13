"""`nnxlaunch submit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.backend import Backend, BackendKind
from launcher.cli.options import BackendChoice, Context, Kubeconfig, Namespace, Overrides
from launcher.manifest.names import SPEC_HASH_LABEL

EXAMPLES = """  nnxlaunch submit job.yaml                          on the cluster of the current context
  nnxlaunch submit job.yaml --backend local          as processes of this machine
  nnxlaunch submit job.yaml --set train.steps=100 --replace
  nnxlaunch submit job.yaml --attach                 and follow it; one that exists already is followed as it is
"""

DefaultSpec = Annotated[Path, typer.Argument(metavar="[SPEC]", help="The job spec, a YAML file; `-` reads standard input.")]
Replace = Annotated[bool, typer.Option("--replace", help="Delete a job of the same name first, and wait until it is gone.")]
Attach = Annotated[bool, typer.Option("--attach", help="Follow its logs until it ends; a job of that name that exists is not touched.")]


def command(
    spec: DefaultSpec = Path("job.yaml"),
    overrides: Overrides = [],  # noqa: B006  (Typer reads it)
    replace: Replace = False,
    attach: Attach = False,
    backend: BackendChoice = BackendKind.KUBERNETES,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Start a job: check the spec, render it, create what `render` shows.

    A tag of a registry becomes the digest it has now, so that every restart runs the same code (`image.digest_policy`).
    A run directory that already holds checkpoints of this run is resumed. A submit that was interrupted is completed by
    the same one again.
    """
    from launcher.backend.status import RUN_DIRECTORY_ANNOTATION
    from launcher.checks import load
    from launcher.cli.backends import connect, flags
    from launcher.cli.saves import hold_against
    from launcher.errors import AlreadyExists
    from launcher.explain.verdict import too_large
    from launcher.manifest import render
    from launcher.observe.saves import asked_for_last_save

    parsed = load(spec, overrides, target=backend.value)
    last_save = asked_for_last_save(parsed.train.run_directory)
    if fault := too_large(parsed):
        print(f"note: estimated at {fault}", file=sys.stderr)
    manifests = render(parsed)
    target = connect(backend, context=context, kubeconfig=kubeconfig, namespace=namespace)
    if backend is BackendKind.KUBERNETES:
        from launcher.pinning import pinned_if_told

        manifests, trouble = pinned_if_told(parsed, manifests)
        if trouble:
            print(f"note: {trouble}; the job runs whatever the tag means at each start", file=sys.stderr)
    options = flags(backend, namespace)
    if not (attach and _is_there(target, parsed.name)):
        hold_against(parsed, last_save())
    try:
        status = target.create(manifests, replace=replace)
    except AlreadyExists:
        if not attach:
            raise
        status = target.get(parsed.name)
        if status.labels.get(SPEC_HASH_LABEL) != parsed.hash:
            print(f"note: {parsed.name} runs another spec than {spec}; it goes on unchanged", file=sys.stderr)
    print(f"{status.name}: {status.state}{f': {status.message}' if status.message else ''}")
    print(f"run directory: {status.annotations.get(RUN_DIRECTORY_ANNOTATION, parsed.train.run_directory)}")
    if not attach:
        print(f"follow it:     nnxlaunch logs {status.name} -f{options}")
    print(f"stop it:       nnxlaunch cancel {status.name}{options}", flush=True)
    if attach:
        from launcher.cli.follow import follow

        follow(target, status.name, options=options)


def _is_there(target: Backend, name: str) -> bool:
    from launcher.errors import NotFound

    try:
        target.get(name)
    except NotFound:
        return False
    return True
