"""What went wrong between here and the API server, as one sentence with its fix.

Nothing here imports the Kubernetes client: an error is looked at by its HTTP status and the server's words.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any, Final

from launcher.backend.values import mapping
from launcher.errors import AlreadyExists, NnxlaunchError, NotFound, Unavailable

JOBSET_INSTALL: Final = "kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml"
_RBAC = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]*)"')
_WEBHOOK = re.compile(r'^admission webhook "(?P<name>[^"]*)" denied the request: (?P<words>.*)', re.DOTALL)
_POLICY = re.compile(r"ValidatingAdmissionPolicy '(?P<name>[^']*)'.* denied request: (?P<words>.*)", re.DOTALL)
_PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
_ACCOUNT = re.compile(r"error looking up service account (?P<namespace>[^/\s]+)/(?P<name>[^:\s]+):")
_LIMIT_RANGE = re.compile(r"forbidden: \[?(?P<words>(maximum|minimum) .* usage per .*)", re.DOTALL)
_TRANSIENT_STATUS: Final = frozenset({429, 500, 502, 503, 504})


class TemporarilyUnavailable(Unavailable):
    """The connection or the server failed in a way that may pass: a reader may try again."""


class NotAllowed(Unavailable):
    """This user has no right to it (RBAC)."""


class OverQuota(Unavailable):
    """The namespace's resource quota has no room now."""


def from_status(status: int, body: str | bytes | None, *, doing: str, where: str) -> NnxlaunchError:
    """The error for an HTTP answer that is not a success.

    `doing` completes "cannot ..."; `where` names the cluster for a person.
    """
    reply = _status_object(body)
    message = str(reply.get("message") or "").strip()
    reason = str(reply.get("reason") or "")
    details = mapping(reply.get("details"))
    kind = str(details.get("kind", ""))
    if status == 401:
        return Unavailable(
            f"cannot {doing}: {where} does not accept the credentials (401)",
            hint="the login has expired or belongs to another cluster; log in again (for GKE: gcloud auth login)",
        )
    if status == 403 and (match := _RBAC.search(message)):
        verb, resource = match["verb"], match["resource"]
        return NotAllowed(
            f"cannot {doing}: user {match['user']!r} is not allowed to {verb} {resource} in {where}",
            hint=f"ask for the role in k8s/README.md; check with: kubectl auth can-i {verb} {resource}",
        )
    if status == 404 and kind == "namespaces":
        name = details.get("name", "")
        return Unavailable(f"cannot {doing}: namespace {name!r} does not exist in {where}", hint=f"kubectl create namespace {name}")
    if status == 404 and kind in ("pods/log", "nodes"):  # the pod is there: its kubelet has just started, or its node was deleted
        return TemporarilyUnavailable(f"cannot {doing}: its node does not know it now: {message}", hint="try again in a moment")
    if status == 404 and not reply:
        return Unavailable(
            f"cannot {doing}: JobSet is not installed in {where}", hint=f"an administrator installs it with: {JOBSET_INSTALL}"
        )
    if status == 404:
        return NotFound(f"cannot {doing}: not found in {where}", hint="list what there is with: nnxlaunch list")
    if status == 409 and reason == "AlreadyExists":
        return AlreadyExists(f"cannot {doing}: {message}", hint="choose another name, or add --replace")
    if "strict decoding error" in message:
        return Unavailable(
            f"cannot {doing}: the server does not know a field: {_after(message, 'strict decoding error:')}",
            hint=f"the JobSet installed in {where} is older than this launcher needs (0.10 or newer); an administrator updates it",
        )
    if "violates PodSecurity" in message:
        return Unavailable(
            f"cannot {doing}: the namespace's Pod Security level forbids it: {_after(message, 'violates PodSecurity')}",
            hint="use `security: restricted` without host network and host paths, or a namespace with another level",
        )
    if "exceeded quota" in message:
        return OverQuota(f"cannot {doing}: {message}", hint="free some of the namespace's quota, or ask for more")
    if status == 409:
        return Unavailable(
            f"cannot {doing}: somebody else changed it at the same time: {message}", hint="try again; it is read anew each time"
        )
    if match := _PRIORITY.search(message):
        return Unavailable(
            f"cannot {doing}: there is no PriorityClass {match['name']!r} in {where}",
            hint="see what there is with: kubectl get priorityclasses; then change `priority` in the spec, or leave it out",
        )
    if match := _ACCOUNT.search(message):
        return Unavailable(
            f"cannot {doing}: there is no service account {match['name']!r} in namespace {match['namespace']!r}",
            hint=f"kubectl -n {match['namespace']} create serviceaccount {match['name']}; or leave `service_account` out of the spec",
        )
    if match := _LIMIT_RANGE.search(message):
        return Unavailable(
            f"cannot {doing}: a LimitRange of the namespace forbids it: {match['words'].rstrip(']')}",
            hint="change `resources` in the spec; see the limits with: kubectl describe limitrange",
        )
    if "because it is being terminated" in message:
        return Unavailable(f"cannot {doing}: the namespace is being deleted", hint="use another namespace: -n NAMESPACE")
    if match := _WEBHOOK.search(message) or _POLICY.search(message):
        return Unavailable(f"cannot {doing}: {match['name']} of {where} denies it: {match['words']}", hint=_denial_hint(match["name"]))
    if "failed calling webhook" in message:
        return TemporarilyUnavailable(
            f"cannot {doing}: an admission webhook of {where} does not answer: {message}",
            hint="its controller is down; look with: kubectl get pods -A | grep -E 'jobset|kueue'",
        )
    if status in _TRANSIENT_STATUS:
        return TemporarilyUnavailable(
            f"cannot {doing}: {where} answered {status}: {message or 'no reason given'}", hint="try again in a moment"
        )
    return Unavailable(f"cannot {doing}: {where} refused it: {message or f'HTTP {status}'}")


def _denial_hint(name: str) -> str:
    """Who made the rule, by the name of the webhook or policy."""
    if name.endswith(".kb.io"):
        return "a rule of JobSet or Kueue that its message names; change that part of the spec"
    return f"a rule of this cluster: whoever runs {name!r} can say what it allows"


def from_connection(error: BaseException, *, doing: str, where: str) -> Unavailable:
    """The error for a request that got no answer at all."""
    text = _innermost(error)
    lowered = text.lower()
    if "certificate" in lowered:
        return Unavailable(
            f"cannot {doing}: the certificate of {where} is not accepted: {text}",
            hint="the kubeconfig is old or of another cluster; fetch it again (for GKE: gcloud container clusters get-credentials)",
        )
    if isinstance(_root(error), socket.gaierror) or "resolve" in lowered or "name or service" in lowered:
        return TemporarilyUnavailable(
            f"cannot {doing}: the address of {where} does not resolve", hint="check the network or VPN, and --context"
        )
    return TemporarilyUnavailable(f"cannot {doing}: {where} cannot be reached: {text}", hint="check the network or VPN, and --context")


def _status_object(body: str | bytes | None) -> dict[str, Any]:
    try:
        parsed: Any = json.loads(body or "null")
    except ValueError:
        return {}
    return mapping(parsed) if isinstance(parsed, dict) else {}


def _after(text: str, marker: str) -> str:
    return text.partition(marker)[2].strip() or text


def _root(error: BaseException) -> BaseException:
    """The first error of the chain that urllib3 wraps in its own."""
    inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
    return _root(inner) if isinstance(inner, BaseException) and inner is not error else error


def _innermost(error: BaseException) -> str:
    root = _root(error)
    text = (root.strerror or "") if isinstance(root, OSError) else ""
    return (text or str(root) or type(root).__name__).strip().splitlines()[0]
