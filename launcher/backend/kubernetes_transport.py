"""HTTPS to one API server, with its authority, our identity and the way there (proxies)."""

from __future__ import annotations

import os
import ssl
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import urllib3

from launcher.backend.kubernetes_config import Context, data_or_file
from launcher.backend.kubernetes_credentials import Credentials, Identity
from launcher.errors import Unavailable

CONNECTIONS: Final = 1024
"""Kept open at most; a followed log holds its own."""


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    authority: bytes | None = None  # PEM; None: this machine's
    insecure: bool = False
    server_name: str | None = None  # in its certificate, where the address is another
    proxy: str | None = None


def server_of(context: Context) -> Server:
    """Raises Unavailable for an address that is none, and an authority that cannot be read."""
    cluster = context.cluster
    url = str(cluster["server"]).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unavailable(
            f"{url!r}, the server of cluster {context.cluster_name!r}, is no address", hint="it is https://HOST[:PORT] in the kubeconfig"
        )
    return Server(
        url=url,
        authority=data_or_file(cluster, "certificate-authority", context.cluster_folder),
        insecure=bool(cluster.get("insecure-skip-tls-verify")),
        server_name=str(cluster["tls-server-name"]) if cluster.get("tls-server-name") else None,
        proxy=str(cluster["proxy-url"]) if cluster.get("proxy-url") else _proxy_of_environment(parts.scheme, parts.netloc),
    )


class Transport:
    """Requests to a server; many threads may use one."""

    def __init__(self, server: Server, credentials: Credentials) -> None:
        self._server, self._credentials = server, credentials
        self._lock = threading.Lock()
        self._identity = credentials.identity()
        self._pool = _pool(server, self._identity)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        headers: dict[str, str],
        connect_seconds: float,
        read_seconds: float,
    ) -> urllib3.BaseHTTPResponse:
        """The answer, whatever its status, its body not read yet. A login that has expired is renewed once.

        Raises urllib3's HTTPError or OSError where there is no answer, Unavailable where there is no login.
        """
        url = f"{self._server.url}{path}" + (f"?{urlencode(query)}" if query else "")
        timeout = urllib3.Timeout(connect=connect_seconds, read=read_seconds)
        identity: Identity | None = None
        while True:
            refused, identity = identity, self._current(identity)
            sent = urllib3.HTTPHeaderDict({**headers, **identity.headers})
            for group in identity.groups:
                sent.add("Impersonate-Group", group)
            response = self._pool.request(method, url, body=body, headers=sent, timeout=timeout, preload_content=False, redirect=False)
            if response.status != 401 or refused is not None:
                return response
            if self._current(identity) is identity:  # there is no other
                return response
            response.drain_conn()

    def _current(self, refused: Identity | None) -> Identity:
        identity = self._credentials.identity(refused=refused)
        with self._lock:
            if (identity.certificate, identity.key) != (self._identity.certificate, self._identity.key):
                self._pool = _pool(self._server, identity)
            self._identity = identity
        return identity


def _pool(server: Server, identity: Identity) -> urllib3.PoolManager:
    context = _tls(server, identity)
    if server.insecure:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    further: dict[str, Any] = {"server_hostname": server.server_name, "assert_hostname": server.server_name} if server.server_name else {}
    if not server.proxy:
        return urllib3.PoolManager(maxsize=CONNECTIONS, retries=False, ssl_context=context, **further)
    if urlsplit(server.proxy).scheme not in ("http", "https"):
        raise Unavailable(f"the proxy {server.proxy} is neither http:// nor https://", hint="use an HTTP proxy for the API server")
    return urllib3.ProxyManager(server.proxy, maxsize=CONNECTIONS, retries=False, ssl_context=context, **further)


def _tls(server: Server, identity: Identity) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=server.authority.decode() if server.authority else None)
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # clusters have authorities without a key identifier
        if server.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if identity.certificate and identity.key:
            with tempfile.TemporaryDirectory(prefix="nnxlaunch-") as folder:  # OpenSSL reads a key from a file only
                path = Path(folder, "client.pem")
                path.touch(mode=0o600)
                path.write_bytes(identity.certificate + b"\n" + identity.key)
                context.load_cert_chain(path)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise Unavailable(f"a certificate of the kubeconfig cannot be used: {error}", hint="fetch the kubeconfig again") from None
    return context


def _proxy_of_environment(scheme: str, netloc: str) -> str | None:
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib.request import getproxies, proxy_bypass

    return None if proxy_bypass(netloc) else getproxies().get(scheme)
