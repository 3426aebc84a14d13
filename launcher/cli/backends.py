"""Opening the backend a command was told to use."""

from __future__ import annotations

from pathlib import Path

from launcher.backend import Backend, BackendKind, JobStatus, Scene, open_backend
from launcher.backend.values import check_namespace
from launcher.errors import NotFound, Unavailable


def connect(kind: BackendKind, *, context: str | None, kubeconfig: Path | None, namespace: str | None, name: str = "") -> Backend:
    """`name`: the job the command is about, for the hint that it is a local one."""
    if kind is BackendKind.LOCAL and (context or kubeconfig):
        raise Unavailable("--context and --kubeconfig choose a cluster, and this is about --backend local", hint="leave one of them out")
    if namespace is not None:
        check_namespace(namespace)
    try:
        return open_backend(kind, context=context, kubeconfig=str(kubeconfig) if kubeconfig else None, namespace=namespace)
    except Unavailable as error:
        raise Unavailable(str(error), hint=_local_hint(kind, name, namespace) or error.hint) from None


def job(backend: Backend, kind: BackendKind, name: str) -> JobStatus:
    """Its status. Raises NotFound, with a hint when the name is that of a local job."""
    try:
        return backend.get(name)
    except NotFound as error:
        raise NotFound(str(error), hint=_local_hint(kind, name, None) or error.hint) from None


def look(backend: Backend, kind: BackendKind, name: str) -> Scene:
    """All that says how the job is doing. Raises NotFound as `job`."""
    try:
        return backend.scene(name)
    except NotFound as error:
        raise NotFound(str(error), hint=_local_hint(kind, name, None) or error.hint) from None


def flags(kind: BackendKind, namespace: str | None) -> str:
    """What must follow another command about the same job."""
    return (f" -n {namespace}" if namespace else "") + (" --backend local" if kind is BackendKind.LOCAL else "")


def _local_hint(kind: BackendKind, name: str, namespace: str | None) -> str:
    if kind is BackendKind.LOCAL or not name:
        return ""
    from launcher.backend.local import LocalBackend

    try:
        LocalBackend(namespace=namespace or "default").get(name)
    except NotFound:
        return ""
    return f"{name!r} is a job of this machine: add --backend local, or set NNXLAUNCH_BACKEND=local"
