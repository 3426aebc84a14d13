"""Logging in: every way a kubeconfig fails is one sentence with its fix, and nothing is printed beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backend.kubernetes_login import log_in
from launcher.errors import Unavailable


def kubeconfig(folder: Path, user: dict[str, Any], *, namespace: str | None = None) -> str:
    context = {"cluster": "prod", "user": "me"} | ({"namespace": namespace} if namespace else {})
    path = folder / "config"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "main",
                "clusters": [{"name": "prod", "cluster": {"server": "https://127.0.0.1:1"}}],
                "users": [{"name": "me", "user": user}],
                "contexts": [{"name": "main", "context": context}, {"name": "other", "context": {**context, "namespace": "team-b"}}],
            }
        )
    )
    return str(path)


def plugin(folder: Path, body: str) -> dict[str, Any]:
    """A credential plugin that is this Python running `body`."""
    script = folder / "plugin.py"
    script.write_text(body)
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(script)]}}


def test_a_missing_credential_plugin_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "gke-gcloud-auth-plugin"}}
    with pytest.raises(Unavailable) as caught:
        log_in(context=None, kubeconfig=kubeconfig(tmp_path, user))
    assert str(caught.value) == "context 'main' logs in with 'gke-gcloud-auth-plugin', which is not installed"
    assert caught.value.hint == "install it with: gcloud components install gke-gcloud-auth-plugin"
    assert capfd.readouterr() == ("", "")


def test_a_plugin_that_fails_speaks_for_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    user = plugin(tmp_path, "import sys; sys.exit('Reauthentication failed. Please run: gcloud auth login')")
    with pytest.raises(Unavailable, match=r"failed: .*Reauthentication failed\. Please run: gcloud auth login") as caught:
        log_in(context=None, kubeconfig=kubeconfig(tmp_path, user))
    assert "log in again" in caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_a_plugin_that_answers_gives_a_token_and_the_context_its_namespace(tmp_path: Path) -> None:
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "t"}}
    user = plugin(tmp_path, f"print({json.dumps(answer)!r})")
    path = kubeconfig(tmp_path, user, namespace="team-a")
    login = log_in(context=None, kubeconfig=path)
    assert login.namespace == "team-a"
    assert login.where == "cluster 'prod' (context 'main')"
    assert log_in(context="other", kubeconfig=path).namespace == "team-b"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not: a kubeconfig\n", "cannot be used"),
        ("{broken", "cannot be used"),
        ("", "cannot be used"),
        ("apiVersion: v1\nkind: Config\nclusters: []\ncontexts: []\nusers: []\n", "cannot be used"),
    ],
)
def test_a_file_that_is_no_kubeconfig_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(Unavailable, match=sentence):
        log_in(context=None, kubeconfig=str(path))


def test_a_missing_file_and_an_unknown_context_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"no kubeconfig: .*nowhere does not exist"):
        log_in(context=None, kubeconfig=str(tmp_path / "nowhere"))
    monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path, {"token": "t"}))
    with pytest.raises(Unavailable, match="context 'third' is not in") as caught:
        log_in(context="third", kubeconfig=None)
    assert caught.value.hint == "choose one of: main, other"


def test_kubeconfigs_in_a_list_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{kubeconfig(tmp_path, {'token': 't'}, namespace='team-a')}")
    assert log_in(context=None, kubeconfig=None).namespace == "team-a"
