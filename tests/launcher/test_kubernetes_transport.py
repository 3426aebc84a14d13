"""What is sent to an API server on behalf of a kubeconfig's user, as a server on this machine sees it."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.backend.kubernetes_api import POD, Api, parsed
from launcher.backend.kubernetes_login import log_in
from launcher.errors import NotFound, Unavailable


class Server(ThreadingHTTPServer):
    """Answers every request with an empty list, or with 401 while it does not accept the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, str]] = []
        self.accepted: str | None = None
        self.answer = b'{"items": []}'
        self.ahead = timedelta()  # its clock

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        told = {name: "|".join(self.headers.get_all(name, [])) for name in self.headers}
        self.server.seen.append({"path": self.path, **told})
        known = self.server.accepted in (None, self.headers.get("Authorization"))
        body = self.server.answer if known else b'{"kind": "Status", "message": "Unauthorized", "reason": "Unauthorized"}'
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return format_datetime(datetime.now(UTC) + self.server.ahead, usegmt=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def api(folder: Path, server: str, user: dict[str, Any]) -> Api:
    document = {
        "current-context": "main",
        "clusters": [{"name": "prod", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": user}],
        "contexts": [{"name": "main", "context": {"cluster": "prod", "user": "me"}}],
    }
    (folder / "config").write_text(yaml.safe_dump(document))
    return Api(log_in(context=None, kubeconfig=str(folder / "config")))


@pytest.mark.parametrize(
    ("user", "header", "value"),
    [
        ({"token": "t"}, "Authorization", "Bearer t"),
        ({"tokenFile": "token"}, "Authorization", "Bearer from-a-file"),
        ({"tokenFile": "token", "token": "t"}, "Authorization", "Bearer from-a-file"),
        ({"username": "u", "password": "p"}, "Authorization", f"Basic {base64.b64encode(b'u:p').decode()}"),
        ({"token": "t", "as": "someone"}, "Impersonate-User", "someone"),
        ({"token": "t", "as": "someone", "as-groups": ["a", "b"]}, "Impersonate-Group", "a|b"),
        ({}, "Authorization", None),
    ],
)
def test_every_form_of_login_reaches_the_server(
    tmp_path: Path, server: Server, user: dict[str, Any], header: str, value: str | None
) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    assert api(tmp_path, f"{server.url}/prefix/", user).list(POD, "team a", labels="a=b,c") == []
    assert server.seen[0]["path"] == "/prefix/api/v1/namespaces/team%20a/pods?labelSelector=a%3Db%2Cc&limit=500"
    assert server.seen[0].get(header) == value


def plugin(folder: Path, **status: str) -> dict[str, Any]:
    """It counts how often it was asked: its tokens are 1, 2, ..."""
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    (folder / "plugin.py").write_text(
        "import json, os, pathlib\n"
        "asked = pathlib.Path(os.environ['COUNTER'])\n"
        "asked.write_text(str(int(asked.read_text() or 0) + 1))\n"
        f"answer = {answer!r}\n"
        "answer['status']['token'] = asked.read_text()\n"
        "assert json.loads(os.environ['KUBERNETES_EXEC_INFO'])['kind'] == 'ExecCredential'\n"
        "print(json.dumps(answer))\n"
    )
    (folder / "asked").write_text("")
    environment = [{"name": "COUNTER", "value": str(folder / "asked")}]
    command = {"command": sys.executable, "args": ["-S", str(folder / "plugin.py")], "env": environment}
    return {"exec": {"apiVersion": answer["apiVersion"], "interactiveMode": "Never", **command}}


def test_a_token_is_asked_for_once_and_again_when_the_server_refuses_it(tmp_path: Path, server: Server) -> None:
    connection = api(tmp_path, server.url, plugin(tmp_path))
    connection.list(POD, "a")
    connection.list(POD, "a")
    assert [seen["Authorization"] for seen in server.seen] == ["Bearer 1", "Bearer 1"]
    server.accepted = "Bearer 2"
    connection.list(POD, "a")
    server.accepted = "another"
    with pytest.raises(Unavailable, match="does not accept the credentials"):
        connection.list(POD, "a")
    assert [seen["Authorization"] for seen in server.seen[2:]] == ["Bearer 1", "Bearer 2", "Bearer 2", "Bearer 3"]


def test_a_token_that_is_about_to_expire_is_asked_for_again(tmp_path: Path, server: Server) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=5)).isoformat(timespec="seconds").replace("+00:00", "Z")
    connection = api(tmp_path, server.url, plugin(tmp_path, expirationTimestamp=soon))
    connection.list(POD, "a")
    connection.list(POD, "a")
    first, second = (int(seen["Authorization"].removeprefix("Bearer ")) for seen in server.seen)
    assert second > first


def test_a_server_that_is_none_is_said_so(tmp_path: Path, server: Server) -> None:
    server.answer = b"<html>sign in</html>"
    with pytest.raises(Unavailable, match="does not answer as an API server"):
        api(tmp_path, server.url, {}).list(POD, "a")
    with pytest.raises(Unavailable, match="is no address"):
        api(tmp_path, "prod.example.com", {})


def test_a_name_that_leads_to_all_jobs_is_none(tmp_path: Path, server: Server) -> None:
    connection = api(tmp_path, server.url, {})
    for name in ("", ".", ".."):
        for call in (connection.get, connection.delete):
            with pytest.raises(NotFound, match="nothing has such a name"):
                call(POD, "a", name)
    assert server.seen == []


def test_times_are_of_the_servers_clock_where_this_machines_is_wrong(tmp_path: Path, server: Server) -> None:
    connection = api(tmp_path, server.url, {})
    connection.list(POD, "a")
    assert connection.ahead == timedelta()
    server.ahead = timedelta(hours=2)
    connection.list(POD, "a")
    assert timedelta(minutes=119) < connection.now() - datetime.now(UTC) < timedelta(minutes=121)


names = st.text(st.sampled_from('abk:"{}[],\\'), max_size=12)
fields = st.recursive(st.just({}), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=6)
managers = st.lists(st.fixed_dictionaries({"manager": names, "fieldsV1": fields}), min_size=1, max_size=3)


@given(st.lists(st.tuples(names, managers, names), max_size=4))
def test_who_set_a_field_is_cut_out_and_all_else_stays_whatever_the_strings_say(parts: list[tuple[str, Any, str]]) -> None:
    """The oracle is the same parse, with the key taken out of the objects."""
    written = [{"metadata": {"name": name, "managedFields": managed}, "spec": {"text": text}} for name, managed, text in parts]
    text = json.dumps({"items": written}, separators=(",", ":")).encode()
    found = parsed(text)["items"]
    for item in found:  # left in where its end was not found
        item["metadata"].pop("managedFields", None)
    assert found == [{"metadata": {"name": name}, "spec": {"text": text}} for name, _, text in parts]
    assert b"managedFields" not in json.dumps(parsed(b'{"metadata":{"name":"x","managedFields":[{"manager":"m"}]}}')).encode()
