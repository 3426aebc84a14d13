"""The API server as a few verbs on plain dicts. No typed models: they cost a second to parse what stays a dict here, and the
Kubernetes client library, which has them, half a second to import.

Every method raises launcher.errors.Unavailable (TemporarilyUnavailable where trying again may help), NotFound or
AlreadyExists; `doing` of an error is built from the verb and the object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote

import urllib3

from launcher.backend.kubernetes_errors import TemporarilyUnavailable, from_connection, from_status
from launcher.backend.kubernetes_login import Login
from launcher.backend.status import Manifest
from launcher.backend.values import mapping
from launcher.errors import NotFound, Unavailable

CONNECT_SECONDS: Final = 10
READ_SECONDS: Final = 30
PAGE: Final = 500
FIELD_MANAGER: Final = "nnxlaunch"
CLOCKS_AGREE: Final = timedelta(seconds=5)


@dataclass(frozen=True)
class Resource:
    """A kind of object and where the API serves it."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str, name: str = "", sub: str = "") -> str:
        """An empty namespace: the object has none, or those of all are meant."""
        root = "api" if "/" not in self.api_version else "apis"
        scope = ["namespaces", quote(namespace, safe="")] if namespace else []
        parts = [root, self.api_version, *scope, self.plural]
        return "/" + "/".join([*parts, *([quote(name, safe="")] if name else []), *([sub] if sub else [])])


JOBSET: Final = Resource("jobset.x-k8s.io/v1alpha2", "JobSet", "jobsets")
JOB: Final = Resource("batch/v1", "Job", "jobs")
POD: Final = Resource("v1", "Pod", "pods")
EVENT: Final = Resource("v1", "Event", "events")
CONFIG_MAP: Final = Resource("v1", "ConfigMap", "configmaps")
SERVICE_ACCOUNT: Final = Resource("v1", "ServiceAccount", "serviceaccounts")
NETWORK_POLICY: Final = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
CREATABLE: Final = {(r.api_version, r.kind): r for r in (JOBSET, CONFIG_MAP, SERVICE_ACCOUNT, NETWORK_POLICY)}


class Api:
    """Verbs on the objects of one cluster."""

    def __init__(self, login: Login) -> None:
        self.where = login.where
        self.requests = 0
        """Made so far."""
        self.ahead = timedelta()
        """How far the server's clock, which all times of its objects are of, is ahead of this machine's."""
        self._transport = login.transport

    def now(self) -> datetime:
        """By the server's clock, once it has answered; this machine's may be wrong."""
        return datetime.now(UTC) + self.ahead

    def get(self, resource: Resource, namespace: str, name: str) -> Manifest:
        return self._json("get", _path(resource, namespace, name), f"read {_said(resource, name)}")

    def list(self, resource: Resource, namespace: str, *, labels: str | None = None) -> list[Manifest]:
        items: list[Manifest] = []
        following: dict[str, Any] = {}
        while True:
            page = self._json("get", resource.path(namespace), f"list {resource.plural}", labelSelector=labels, limit=PAGE, **following)
            items.extend(page["items"])
            following = {key: value for key, value in mapping(page.get("metadata")).items() if key == "continue" and value}
            if not following:
                return items

    def list_whole(self, resource: Resource, namespace: str, *, labels: str | None = None, fields: str | None = None) -> list[Manifest]:
        """In one request, however many there are."""
        path = resource.path(namespace)
        return self._json("get", path, f"list {resource.plural}", labelSelector=labels, fieldSelector=fields)["items"]

    def list_at(self, resource: Resource, namespace: str, *, labels: str | None = None) -> tuple[list[Manifest], str]:
        """All of them, and the version of the whole from which `changes` goes on."""
        page = self._json("get", resource.path(namespace), f"list {resource.plural}", labelSelector=labels)
        return page["items"], page["metadata"]["resourceVersion"]

    def changes(
        self, resource: Resource, namespace: str, version: str, *, labels: str | None = None, timeout_seconds: float
    ) -> Iterator[Manifest]:
        """Each object as it changes after `version`, deleted ones too, for that long or until the server ends it: look again then."""
        response = self._request(
            "get",
            resource.path(namespace),
            f"watch {resource.plural}",
            labelSelector=labels,
            resourceVersion=version,
            timeoutSeconds=max(1, round(timeout_seconds)),
            watch=True,
            read_seconds=timeout_seconds + READ_SECONDS,
        )
        rest = b""
        try:
            for chunk in response.stream():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":  # the version is too old
                        return
                    yield event["object"]
        except urllib3.exceptions.HTTPError:
            pass  # the stream was cut
        finally:
            response.close()

    def read(self, path: str, doing: str) -> Manifest:
        """What is served at `path`; `doing` completes "cannot ..."."""
        return self._json("get", path, doing)

    def create(self, resource: Resource, namespace: str, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Create it, or have the server check that it could be. A field that the server does not know is refused."""
        return self._json(
            "post",
            resource.path(namespace),
            f"{'check' if dry_run else 'create'} {_said(resource, manifest['metadata']['name'])}",
            body=manifest,
            dryRun="All" if dry_run else None,
            fieldManager=FIELD_MANAGER,
            fieldValidation="Strict",
        )

    def served_version(self, group: str) -> str | None:
        """`GROUP/VERSION` as the cluster prefers it; None where the group is not served."""
        try:
            return self._json("get", f"/apis/{group}", f"look for {group}")["preferredVersion"]["groupVersion"]
        except (NotFound, Unavailable):
            return None

    def published_schema(self, group_version: str) -> Manifest | None:
        """The OpenAPI document of an API group (some 400 KB for JobSet); None where the server does not show it."""
        try:
            return self._json("get", f"/openapi/v3/apis/{group_version}", f"read the schema of {group_version}")
        except (NotFound, Unavailable):
            return None

    def merge(self, resource: Resource, namespace: str, name: str, change: Manifest) -> Manifest:
        """Merge `change` into the object (RFC 7386)."""
        return self._json(
            "patch",
            _path(resource, namespace, name),
            f"change {_said(resource, name)}",
            body=change,
            content_type="application/merge-patch+json",
            fieldManager=FIELD_MANAGER,
        )

    def delete(self, resource: Resource, namespace: str, name: str, *, uid: str | None = None, at_once: bool = False) -> None:
        """Ask for deletion: dependents first, or `at_once` for an object that has none. With `uid`, only that very object."""
        policy = "Background" if at_once else "Foreground"
        options: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy}
        if uid:
            options["preconditions"] = {"uid": uid}
        self._json("delete", _path(resource, namespace, name), f"delete {_said(resource, name)}", body=options)

    def wait_for_change(self, resource: Resource, seen: Manifest, *, timeout_seconds: float) -> None:
        """Return when the object is no longer as it was `seen`, or after the time."""
        metadata = seen["metadata"]
        response = self._request(
            "get",
            resource.path(metadata["namespace"]),
            f"watch {_said(resource, metadata['name'])}",
            fieldSelector=f"metadata.name={metadata['name']}",
            resourceVersion=metadata["resourceVersion"],
            timeoutSeconds=max(1, round(timeout_seconds)),
            watch=True,
            read_seconds=timeout_seconds + READ_SECONDS,
        )
        try:
            next(response.stream(), None)
        except urllib3.exceptions.HTTPError:
            pass  # the stream was cut: the caller looks again either way
        finally:
            response.close()

    def log(
        self, namespace: str, pod: str, *, container: str, follow: bool, since: str | None = None, tail: int | None = None
    ) -> Iterator[bytes]:
        """The lines of a container's log, or the last `tail` of them, each with its time, without line ends.

        With `follow` it ends when the container has ended, or has been silent for READ_SECONDS: a connection that a
        gateway has dropped looks like a silent one. Raises TemporarilyUnavailable when the stream is cut.
        """
        doing, path = f"read the log of pod {pod!r}", POD.path(namespace, pod, "log")
        response = self._request(
            "get", path, doing, accept="*/*", container=container, timestamps=True, follow=follow, sinceTime=since, tailLines=tail
        )
        rest = b""
        try:
            for chunk in response.stream():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if follow and isinstance(error, urllib3.exceptions.ReadTimeoutError):
                return
            raise from_connection(error, doing=doing, where=self.where) from None
        finally:
            response.close()
        if rest:
            yield rest

    def _json(self, method: str, path: str, doing: str, *, body: Manifest | None = None, **parameters: Any) -> Manifest:
        response = self._request(method, path, doing, body=body, accept_encoding="gzip", **parameters)
        try:
            return parsed(response.data)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise from_connection(error, doing=doing, where=self.where) from None
        except ValueError:
            raise Unavailable(
                f"cannot {doing}: {self.where} does not answer as an API server", hint="check the server in the kubeconfig"
            ) from None

    def _request(
        self,
        method: str,
        path: str,
        doing: str,
        *,
        body: Manifest | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        accept_encoding: str = "identity",
        read_seconds: float = READ_SECONDS,
        **parameters: str | float | bool | None,
    ) -> urllib3.BaseHTTPResponse:
        """`parameters` are the API's own names; None is not sent."""
        self.requests += 1
        sent = [(key, _said_in_query(value)) for key, value in parameters.items() if value is not None]
        headers = {"Accept": accept, "Accept-Encoding": accept_encoding, "User-Agent": FIELD_MANAGER}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            response = self._transport.request(
                method.upper(), path, query=sent, body=None if body is None else json.dumps(body).encode(), headers=headers,
                connect_seconds=CONNECT_SECONDS, read_seconds=read_seconds,
            )  # fmt: skip
            self._compare_clocks(response.headers.get("Date"))
            if response.status < 300:
                return response
            status, answer = response.status, response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise from_connection(error, doing=doing, where=self.where) from None
        raise from_status(status, answer, doing=doing, where=self.where)

    def _compare_clocks(self, date: str | None) -> None:
        """A few seconds are the way of the answer, and the header's own precision."""
        try:
            ahead = parsedate_to_datetime(date or "") - datetime.now(UTC)
        except ValueError:
            return
        self.ahead = ahead if abs(ahead) > CLOCKS_AGREE else timedelta()


class Patience:
    """Counts how long a reader that must not give up at the first fault has met nothing but faults."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._since: float | None = None
        self._pause = 0.5

    def good(self) -> None:
        self._since, self._pause = None, 0.5

    def pause(self, error: TemporarilyUnavailable) -> float:
        """Seconds to wait before the next try. Raises `error` when patience is over."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > self.limit_seconds:
            raise error
        self._pause = min(self._pause * 2, 15.0)
        return self._pause


def parsed(text: bytes) -> Any:
    """The JSON of an answer, without `managedFields`: the bookkeeping of who set which field is half of an object, nobody here reads
    it, and parsing it takes most of the time of a large job's listing.

    A quote inside of a JSON string is escaped, so the key is found only where it is one. Its list has no list in it and ends with
    the first `}]`, unless a key in it has such letters: then what is left is no JSON, and all of it is parsed.
    """
    first, *rest = text.split(b',"managedFields":[')
    try:
        return json.loads(b"".join([first, *(part.partition(b"}]")[2] for part in rest)]))
    except ValueError:
        if not rest:
            raise
        return json.loads(text)


def _path(resource: Resource, namespace: str, name: str) -> str:
    """Of one object. Raises NotFound for a name that would lead to another place: to all objects of the kind, say."""
    if name in ("", ".", ".."):
        raise NotFound(f"{resource.kind} {name!r}: nothing has such a name", hint="list what there is with: nnxlaunch list")
    return resource.path(namespace, name)


def _said_in_query(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _said(resource: Resource, name: str) -> str:
    return f"{resource.kind} {name!r}"
