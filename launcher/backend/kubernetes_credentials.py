"""Who we are to an API server: headers and a client certificate, from what the kubeconfig's user says, renewed when they are old."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from launcher.backend.kubernetes_config import Context, data_or_file
from launcher.backend.values import items, mapping, strings
from launcher.errors import Unavailable

REREAD_SECONDS: Final = 60
"""A token in a file is exchanged for a fresh one by others: kubelet, or an agent."""
MARGIN_SECONDS: Final = 60
_PLUGIN_HINTS: Final = {
    "gke-gcloud-auth-plugin": "install it with: gcloud components install gke-gcloud-auth-plugin",
    "gcloud": "install the Google Cloud CLI",
    "aws": "install the AWS CLI",
    "kubelogin": "install kubelogin",
}
_LOGIN_HINTS: Final = {"gke-gcloud-auth-plugin": "gcloud auth login", "gcloud": "gcloud auth login", "aws": "aws sso login"}


@dataclass(frozen=True)
class Identity:
    """`headers` of every request, `groups` to act as, each a header of its own; `certificate` and `key` in PEM, for the TLS handshake."""

    headers: dict[str, str] = field(default_factory=dict[str, str])
    certificate: bytes | None = None
    key: bytes | None = None
    groups: tuple[str, ...] = ()


class Credentials(Protocol):
    def identity(self, *, refused: Identity | None = None) -> Identity:
        """What to say now. With `refused`, the server does not accept that one: another one where there is another.

        Raises Unavailable where there is none to be had.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """As the kubeconfig has it: a certificate, a token, a password, or nothing."""

    known: Identity

    def identity(self, *, refused: Identity | None = None) -> Identity:
        return self.known


@dataclass
class TokenFile:
    """A bearer token that is in a file, read again each minute."""

    path: Path
    known: Identity
    _read_at: float = -REREAD_SECONDS

    def identity(self, *, refused: Identity | None = None) -> Identity:
        if refused is not None or time.monotonic() - self._read_at >= REREAD_SECONDS:
            try:
                token = self.path.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise Unavailable(f"the token in {self.path} cannot be read: {error}", hint="log in again") from None
            self.known = replace(self.known, headers={**self.known.headers, "Authorization": f"Bearer {token}"})
            self._read_at = time.monotonic()
        return self.known


@dataclass
class Plugin:
    """A program of the user's that gives credentials (client.authentication.k8s.io), asked again when they expire."""

    context: Context
    known: Identity
    _given: Identity | None = None
    _expires: datetime | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.settings = mapping(self.context.user["exec"])
        self.command = str(self.settings.get("command", ""))
        beside = self.context.user_folder / self.command  # a relative path is relative to the kubeconfig
        found = str(beside.absolute()) if beside.is_file() else shutil.which(self.command)
        if not found:
            raise Unavailable(
                f"context {self.context.name!r} logs in with {self.command!r}, which is not installed",
                hint=_PLUGIN_HINTS.get(Path(self.command).name, f"install {self.command}, or choose another context with --context"),
            )
        self._program = found

    def identity(self, *, refused: Identity | None = None) -> Identity:
        with self._lock:
            old = self._expires is not None and (self._expires - datetime.now(UTC)).total_seconds() < MARGIN_SECONDS
            if self._given is None or old or refused is self._given:
                self._given = self._ask()
            return self._given

    def _ask(self) -> Identity:
        mode = self.settings.get("interactiveMode", "IfAvailable")
        interactive = mode != "Never" and sys.stdin is not None and sys.stdin.isatty()  # pyright: ignore[reportUnnecessaryComparison]
        version = str(self.settings.get("apiVersion", ""))
        request: dict[str, Any] = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": interactive}}
        if self.settings.get("provideClusterInfo"):
            request["spec"]["cluster"] = _cluster_info(self.context)
        added = {str(entry["name"]): str(entry["value"]) for entry in items(self.settings.get("env"))}
        speaks = interactive and sys.stderr.isatty()  # a person may have to open a page that it names
        try:
            done = subprocess.run(
                [self._program, *map(str, strings(self.settings.get("args")))],
                stdin=None if interactive else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=None if speaks else subprocess.PIPE,
                env={**os.environ, **added, "KUBERNETES_EXEC_INFO": json.dumps(request)},
                check=False,
            )
        except OSError as error:
            raise self._failed(f"it cannot be started: {error.strerror}") from None
        if done.returncode:
            words = " ".join((done.stderr or b"").decode("utf-8", "replace").split())[-400:]
            raise self._failed(words or f"exit code {done.returncode}")
        try:
            answer: Any = json.loads(done.stdout)
            status = mapping(mapping(answer).get("status"))
            given = str(mapping(answer).get("apiVersion"))
            expires = status.get("expirationTimestamp")
            self._expires = datetime.fromisoformat(str(expires)) if expires else None
        except (ValueError, AttributeError):
            raise self._failed("its answer is no ExecCredential") from None
        if given != version:
            raise self._failed(f"it answers as {given}, the kubeconfig asks for {version}")
        token, certificate, key = (status.get(name) for name in ("token", "clientCertificateData", "clientKeyData"))
        if not token and not (certificate and key):
            raise self._failed("its answer has neither a token nor a certificate")
        headers = {**self.known.headers, **({"Authorization": f"Bearer {token}"} if token else {})}
        certificate, key = (str(part).encode() if part else None for part in (certificate, key))
        return replace(self.known, headers=headers, certificate=certificate, key=key)

    def _failed(self, why: str) -> Unavailable:
        login = _LOGIN_HINTS.get(Path(self.command).name)
        return Unavailable(
            f"context {self.context.name!r}: logging in with {self.command!r} failed: {why}",
            hint=f"log in again with: {login}" if login else "log in again",
        )


class Library:
    """The forms of login that kubectl itself has given up (`auth-provider`), as the Kubernetes client library knows them."""

    def __init__(self, context: Context) -> None:
        from kubernetes import client
        from kubernetes import config as untyped

        config: Any = untyped
        self._configuration: Any = client.Configuration()
        with _said() as said:
            try:
                config.load_kube_config(
                    config_file=context.file, context=context.name, client_configuration=self._configuration, persist_config=False
                )
            except (config.ConfigException, OSError, ValueError, KeyError, TypeError) as error:
                said.insert(0, (str(error).strip() or type(error).__name__).splitlines()[0])
        if said and not self._configuration.api_key:
            raise Unavailable(f"context {context.name!r}: logging in by its auth-provider failed: {said[0]}", hint="log in again")

    def identity(self, *, refused: Identity | None = None) -> Identity:
        names = ("authorization", "BearerToken")  # of older and newer versions of the library
        found: list[Any] = [self._configuration.get_api_key_with_prefix(name) for name in names]
        return Identity({"Authorization": str(next(filter(None, found)))} if any(found) else {})


def credentials(context: Context) -> Credentials:
    """Raises Unavailable for what is missing on this machine."""
    user = context.user
    headers = {
        **({"Impersonate-User": str(user["as"])} if user.get("as") else {}),
        **({"Impersonate-Uid": str(user["as-uid"])} if user.get("as-uid") else {}),
    }
    groups = tuple(strings(user.get("as-groups")))
    certificate, key = (data_or_file(user, f"client-{part}", context.user_folder) for part in ("certificate", "key"))
    if path := user.get("tokenFile"):
        return TokenFile(context.user_folder / str(path), Identity(headers, certificate, key, groups))
    if token := user.get("token"):
        headers["Authorization"] = f"Bearer {token}"
    elif user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    elif user.get("exec") and not certificate:
        return Plugin(context, Identity(headers, groups=groups))
    elif user.get("auth-provider") and not certificate:
        return Library(context)
    return Fixed(Identity(headers, certificate, key, groups))


def _cluster_info(context: Context) -> dict[str, Any]:
    cluster = context.cluster
    authority = data_or_file(cluster, "certificate-authority", context.cluster_folder)
    extensions = {entry.get("name"): entry.get("extension") for entry in items(cluster.get("extensions"))}
    known = ("server", "tls-server-name", "insecure-skip-tls-verify", "proxy-url")
    return {
        **{key: cluster[key] for key in known if cluster.get(key)},
        **({"certificate-authority-data": base64.b64encode(authority).decode()} if authority else {}),
        "config": extensions.get("client.authentication.k8s.io/exec"),
    }


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
