"""From a kubeconfig to an authenticated connection; every way this fails is one sentence with its fix."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from launcher.backend.kubernetes_config import kubeconfig_paths, read_context
from launcher.backend.kubernetes_credentials import Identity, TokenFile, credentials
from launcher.backend.kubernetes_transport import Server, Transport, server_of
from launcher.errors import Unavailable

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, kw_only=True)
class Login:
    transport: Transport
    where: str  # the cluster, for a person
    namespace: str  # of the context; `default` where it names none


def log_in(*, context: str | None, kubeconfig: str | None) -> Login:
    """The connection for `context` of `kubeconfig` (default: $KUBECONFIG, ~/.kube/config, or the pod this runs in).

    Raises Unavailable for a missing file or context, a missing credential plugin, or a login that has expired.
    """
    paths = kubeconfig_paths(kubeconfig)
    if not any(path.exists() for path in paths):
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            return _from_pod()
        raise Unavailable(
            f"no kubeconfig: {os.pathsep.join(map(str, paths))} does not exist",
            hint="name one with --kubeconfig or $KUBECONFIG (for GKE: gcloud container clusters get-credentials); "
            "a job of this machine: submit --backend local",
        )
    found = read_context(paths, context)
    where = f"cluster {found.cluster_name!r} (context {found.name!r})"
    return Login(transport=Transport(server_of(found), credentials(found)), where=where, namespace=found.namespace or "default")


def _from_pod() -> Login:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    try:
        namespace, authority = (_ACCOUNT / "namespace").read_text().strip(), (_ACCOUNT / "ca.crt").read_bytes()
        (_ACCOUNT / "token").read_text()
    except OSError as error:
        raise Unavailable(
            f"this pod has no service account token: {error.strerror}: {error.filename}", hint="set automountServiceAccountToken: true"
        ) from None
    server = Server(url=f"https://{f'[{host}]' if ':' in host else host}:{port}", authority=authority)
    return Login(transport=Transport(server, TokenFile(_ACCOUNT / "token", Identity())), where="this pod's cluster", namespace=namespace)
