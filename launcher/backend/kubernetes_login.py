"""From a kubeconfig to an authenticated client. The client library's own word on a failed login is a log line and an
anonymous client; here it is an error with its fix."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from kubernetes import client
from kubernetes import config as untyped_config

from launcher.backend.values import items, mapping
from launcher.errors import Unavailable

config: Any = untyped_config  # the library has no types there
_PLUGIN_HINTS: Final = {
    "gke-gcloud-auth-plugin": "install it with: gcloud components install gke-gcloud-auth-plugin",
    "gcloud": "install the Google Cloud CLI",
    "aws": "install the AWS CLI",
    "kubelogin": "install kubelogin",
}
_LOGIN_HINTS: Final = {"gke-gcloud-auth-plugin": "gcloud auth login", "gcloud": "gcloud auth login", "aws": "aws sso login"}
_POD_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, kw_only=True)
class Login:
    client: client.ApiClient
    where: str  # the cluster, for a person
    namespace: str  # of the context; `default` where it names none


def log_in(*, context: str | None, kubeconfig: str | None) -> Login:
    """The client for `context` of `kubeconfig` (default: $KUBECONFIG, ~/.kube/config, or the pod this runs in).

    Raises Unavailable for a missing file or context, a missing credential plugin, or a login that has expired.
    """
    paths = _paths(kubeconfig)
    if not any(path.exists() for path in paths):
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            return _from_pod()
        raise Unavailable(
            f"no kubeconfig: {os.pathsep.join(map(str, paths))} does not exist",
            hint="name one with --kubeconfig or $KUBECONFIG (for GKE: gcloud container clusters get-credentials), or use --backend local",
        )
    file = os.pathsep.join(map(str, paths))
    name, settings = _context(file, context)
    plugin = _plugin(paths, str(settings.get("user", "")))
    if plugin and _missing(plugin, paths):
        raise Unavailable(
            f"context {name!r} logs in with {plugin!r}, which is not installed",
            hint=_PLUGIN_HINTS.get(Path(plugin).name, f"install {plugin}, or choose another context with --context"),
        )
    configuration = _configuration()
    with _said() as said:
        try:
            config.load_kube_config(config_file=file, context=name, client_configuration=configuration, persist_config=False)
        except (config.ConfigException, yaml.YAMLError, OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"context {name!r} of {file} cannot be used: {_line(error)}", hint="fetch the kubeconfig again") from None
    if said and not configuration.api_key and not configuration.cert_file:
        login = _LOGIN_HINTS.get(Path(plugin or "").name)
        raise Unavailable(
            f"context {name!r}: logging in with {plugin or 'its credential plugin'!r} failed: {said[0]}",
            hint=f"log in again with: {login}" if login else "log in again",
        )
    where = f"cluster {settings.get('cluster', name)!r} (context {name!r})"
    return Login(client=client.ApiClient(configuration), where=where, namespace=settings.get("namespace") or "default")


def _from_pod() -> Login:
    configuration = _configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
        namespace = _POD_NAMESPACE.read_text().strip()
    except (config.ConfigException, OSError) as error:
        raise Unavailable(f"this pod has no service account token: {_line(error)}", hint="set automountServiceAccountToken: true") from None
    return Login(client=client.ApiClient(configuration), where="this pod's cluster", namespace=namespace)


def _configuration() -> client.Configuration:
    configuration = client.Configuration()
    configuration.retries = False  # who may try again is decided above this, with an error that names the cause
    configuration.connection_pool_maxsize = 1024  # a followed log holds its connection
    return configuration


def _paths(kubeconfig: str | None) -> list[Path]:
    text = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    return [Path(part).expanduser() for part in text.split(os.pathsep) if part]


def _context(file: str, wanted: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the context in use and its `cluster`, `user`, `namespace`."""
    try:
        contexts, current = config.list_kube_config_contexts(file)
        known: dict[str, dict[str, Any]] = {entry["name"]: entry["context"] for entry in contexts}
        name: str = wanted or current["name"]
    except (config.ConfigException, yaml.YAMLError, OSError, TypeError, KeyError) as error:
        hint = "it must be a kubeconfig, a YAML file; for GKE: gcloud container clusters get-credentials writes one"
        raise Unavailable(f"{file} cannot be used: {_line(error)}", hint=hint) from None
    if name not in known:
        raise Unavailable(f"context {name!r} is not in {file}", hint=f"choose one of: {', '.join(sorted(known)) or 'none'}")
    return name, known[name]


def _plugin(paths: list[Path], user: str) -> str | None:
    """The command of the user's `exec` credential plugin."""
    for path in paths:
        if path.exists():
            document = mapping(yaml.safe_load(path.read_text()))
            for entry in items(document.get("users")):
                if entry.get("name") == user:
                    return mapping(mapping(entry.get("user")).get("exec")).get("command")
    return None


def _missing(plugin: str, paths: list[Path]) -> bool:
    return shutil.which(plugin) is None and not any((path.parent / plugin).exists() for path in paths)


@contextmanager
def _said() -> Generator[list[str]]:
    """What is logged as an error on the root logger meanwhile; it is not printed."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(" ".join(record.getMessage().split())[:400])

    keep, root = Keep(logging.ERROR), logging.getLogger()
    root.addHandler(keep)
    try:
        yield said
    finally:
        root.removeHandler(keep)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
