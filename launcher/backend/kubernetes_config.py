"""What a kubeconfig says about one context: files merged as kubectl merges them, nothing opened or run yet.

Read here, and not by the Kubernetes client library: its import costs more CPU time than the rest of a command.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from launcher.backend.values import items, mapping
from launcher.errors import Unavailable

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_HINT: Final = "it must be a kubeconfig, a YAML file; for GKE: gcloud container clusters get-credentials writes one"


@dataclass(frozen=True, kw_only=True)
class Context:
    """One context; `cluster` and `user` as the file has them, with the folder that relative paths in them start from."""

    name: str
    cluster_name: str
    namespace: str  # empty where the context names none
    cluster: dict[str, Any]
    cluster_folder: Path
    user: dict[str, Any]
    user_folder: Path
    file: str  # for a person


def kubeconfig_paths(kubeconfig: str | None) -> list[Path]:
    text = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    return [Path(part).expanduser() for part in text.split(os.pathsep) if part]


def read_context(paths: list[Path], wanted: str | None) -> Context:
    """The context `wanted`, or the current one. An entry of an earlier file wins over one of its name in a later file.

    Raises Unavailable for files that are no kubeconfig, and for a context that they do not have.
    """
    file = os.pathsep.join(map(str, paths))
    documents = [(path.parent, _document(path, file)) for path in paths if path.exists()]
    known = _entries(documents, "contexts", "context")
    name = wanted or next((str(found["current-context"]) for _, found in documents if found.get("current-context")), None)
    if name is None:
        raise _unusable(file, "it has no current-context")
    if name not in known:
        raise Unavailable(f"context {name!r} is not in {file}", hint=f"choose one of: {', '.join(sorted(known)) or 'none'}")
    settings, _ = known[name]
    cluster_name, user_name = str(settings.get("cluster", "")), str(settings.get("user", ""))
    clusters, users = _entries(documents, "clusters", "cluster"), _entries(documents, "users", "user")
    if cluster_name not in clusters or not clusters[cluster_name][0].get("server"):
        raise _unusable(file, f"cluster {cluster_name!r} of context {name!r} has no server")
    if user_name and user_name not in users:
        raise _unusable(file, f"user {user_name!r} of context {name!r} is not there")
    cluster, cluster_folder = clusters[cluster_name]
    user, user_folder = users.get(user_name, ({}, Path()))
    return Context(
        name=name,
        cluster_name=cluster_name,
        namespace=str(settings.get("namespace") or ""),
        cluster=cluster,
        cluster_folder=cluster_folder,
        user=user,
        user_folder=user_folder,
        file=file,
    )


def data_or_file(entry: dict[str, Any], key: str, folder: Path) -> bytes | None:
    """The content of `KEY-data`, which is base64, else of the file `KEY`. Raises Unavailable for what cannot be read."""
    try:
        if encoded := entry.get(f"{key}-data"):
            return base64.b64decode(str(encoded), validate=False)
        if path := entry.get(key):
            return (folder / str(path)).read_bytes()
    except (binascii.Error, OSError) as error:
        raise Unavailable(f"{key} of the kubeconfig cannot be read: {error}", hint="fetch the kubeconfig again") from None
    return None


def _document(path: Path, file: str) -> dict[str, Any]:
    try:
        found: Any = yaml.load(path.read_bytes(), Loader=_LOADER)
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise _unusable(file, (str(error).strip() or type(error).__name__).splitlines()[0]) from None
    if not isinstance(found, dict):
        raise _unusable(file, "it is empty" if found is None else "it is not a mapping")
    return mapping(found)


def _entries(documents: list[tuple[Path, dict[str, Any]]], plural: str, singular: str) -> dict[str, tuple[dict[str, Any], Path]]:
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    for folder, document in documents:
        listed: Any = document.get(plural)
        for entry in items(listed) if isinstance(listed, list) else []:
            content: Any = entry.get(singular) if isinstance(entry, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance]
            if isinstance(content, dict | None) and content is not None:
                found.setdefault(str(entry.get("name")), (mapping(content), folder))
    return found


def _unusable(file: str, why: str) -> Unavailable:
    return Unavailable(f"{file} cannot be used: {why}", hint=_HINT)
