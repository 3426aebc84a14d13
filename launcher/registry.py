"""What a tag means now: asked of the registry by its own protocol, with Docker's credentials where there are some.

Protocol: https://github.com/opencontainers/distribution-spec/blob/main/spec.md (manifests), and the token service of
https://distribution.github.io/distribution/spec/auth/token/.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlencode, urlsplit

from launcher.errors import Unavailable
from launcher.image import Reference

TIMEOUT_SECONDS: Final = 5
ACCEPT: Final = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
DOCKER_HUB: Final = "registry-1.docker.io"
HUB_LOGIN: Final = "https://index.docker.io/v1/"
"""The name under which Docker keeps the credentials of its hub."""


def resolved(reference: Reference) -> Reference:
    """The same with the digest its tag has now (`latest` where it has none). Raises Unavailable when the registry does not tell."""
    host, _, name = reference.repository.partition("/")
    if not reference.has_registry:
        host, name = DOCKER_HUB, reference.repository
    url = f"{_scheme(host)}://{host}/v2/{name}/manifests/{reference.tag or 'latest'}"
    what = f"cannot resolve image {str(reference)!r}"
    try:
        digest = _head(url, _credentials(HUB_LOGIN if host == DOCKER_HUB else host))
    except urllib.error.HTTPError as error:
        said = {401: "the registry wants a login", 403: "the registry denies it", 404: "there is no such image"}
        hint = "docker login, or check the name" if error.code in said else "try again in a moment"
        raise Unavailable(f"{what}: {said.get(error.code, 'the registry refused')} ({error.code})", hint=hint) from None
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        raise Unavailable(f"{what}: {host} cannot be reached: {cause}", hint="check the network and the name of the registry") from None
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise Unavailable(f"{what}: {host} does not tell digests", hint="write the digest into the spec: `image: NAME@sha256:...`")
    return Reference(reference.repository, reference.tag, digest)


def _scheme(host: str) -> str:
    """Docker's rule: a registry on this machine needs no TLS."""
    return "http" if host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"


def _head(url: str, login: str | None) -> str:
    """The digest in the answer; a refusal that names a way to log in is followed once."""
    try:
        return _digest(_open(url, {}, method="HEAD"))
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        scheme, _, challenge = (error.headers.get("WWW-Authenticate") or "").partition(" ")
        if scheme.lower() == "basic" and login:
            return _digest(_open(url, {"Authorization": f"Basic {login}"}, method="HEAD"))
        if scheme.lower() != "bearer":
            raise
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        return _digest(_open(url, {"Authorization": f"Bearer {_token(fields, login)}"}, method="HEAD"))


def _token(challenge: dict[str, str], login: str | None) -> str:
    realm = challenge.get("realm", "")
    if urlsplit(realm).scheme not in ("https", "http"):
        raise ValueError(f"no token service: {realm[:80]!r}")
    query = urlencode({key: challenge[key] for key in ("service", "scope") if key in challenge})
    request = urllib.request.Request(f"{realm}?{query}", headers={"Authorization": f"Basic {login}"} if login else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return str(found.get("token") or found.get("access_token") or "")


def _open(url: str, headers: dict[str, str], *, method: str) -> Message:
    request = urllib.request.Request(url, headers={"Accept": ACCEPT, **headers}, method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return cast("Message", answer.headers)


def _digest(headers: Message) -> str:
    return headers.get("Docker-Content-Digest") or ""


def _credentials(host: str) -> str | None:
    """`user:password` in base64, as Docker keeps it or its helper gives it; None where there is none."""
    path = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    helpers: dict[str, str] = config.get("credHelpers", {})
    helper = helpers.get(host) or config.get("credsStore")
    if helper and re.fullmatch(r"[-\w.]+", helper):
        command = [f"docker-credential-{helper}", "get"]
        try:
            done = subprocess.run(command, input=host, capture_output=True, text=True, check=True, timeout=30)
            found: dict[str, str] = json.loads(done.stdout)
            return base64.b64encode(f"{found['Username']}:{found['Secret']}".encode()).decode()
        except (OSError, ValueError, KeyError, subprocess.SubprocessError):
            pass  # what the file itself holds may still do
    kept: dict[str, dict[str, str]] = config.get("auths", {})
    return kept.get(host, {}).get("auth")
