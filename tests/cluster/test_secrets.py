"""What a pod of the default security can reach, and that a secret it is given is shown by no command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from launcher.cli import main
from launcher.redact import has_secret_form
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, document, kubectl

CANARY = "hf_canaryCanaryCANARY0123456789abcdef"
ONE_HOST = {"slices": 1, "hosts": 1, "devices_per_host": 1}  # the end of one of two hosts could end the other before it speaks
LOOKS = """
import os, sys
from pathlib import Path
assert os.environ["HUB_TOKEN"].startswith("hf_")
found = {"user": os.getuid(), "token": Path("/var/run/secrets/kubernetes.io").exists()}
for place in ("/", "/usr", "/etc"):
    try:
        Path(place, "written").write_text("")
        found[place] = "written"
    except OSError as error:
        found[place] = error.strerror
Path("/tmp/written").write_text("")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
found |= {"capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16), "no_new_privileges": int(status["NoNewPrivs"])}
found["seccomp"] = int(status["Seccomp"])
import json
print(json.dumps(found))
sys.exit(77)
"""


def test_a_pod_has_no_token_no_root_and_a_secret_by_reference_that_no_command_shows(
    backend: KubernetesBackend, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        """All that a command prints, on both streams."""
        with pytest.raises(SystemExit):
            main([*words, "-n", namespace])
        return "".join(capsys.readouterr())

    assert has_secret_form(CANARY)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": CANARY}}
    kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(secret))
    env = {"HUB_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    spec = tmp_path / "job.yaml"
    spec.write_text(yaml.safe_dump(document("secretive", env=env, cpu=ONE_HOST)))
    backend.create(cheap_job("secretive", LOOKS, env=env, cpu=ONE_HOST))
    *_, status = backend.watch("secretive", timeout_seconds=PATIENCE_SECONDS)
    assert status.state is JobState.FAILED

    logs = said("logs", "secretive")
    shown = {verb: said(verb, "secretive") for verb in ("describe", "why", "events")}
    shown |= {"status": said("status", "secretive", "--output", "json"), "list": said("list", "--output", "yaml")}
    shown |= {"submit": said("submit", str(spec)), "doctor": said("doctor", str(spec), "--no-pod", "--output", "json")}
    assert all("secretive" in text for verb, text in shown.items() if verb != "doctor"), shown
    assert not [verb for verb, text in {**shown, "logs": logs}.items() if CANARY in text]
    in_clear = {**env, "OTHER_TOKEN": CANARY}
    spec.write_text(yaml.safe_dump(document("in-clear", env=in_clear)))
    refused = said("submit", str(spec))
    assert "error: env.OTHER_TOKEN" in refused and CANARY not in refused

    read_only = "Read-only file system"
    assert logs.count("\n") == 1
    for line in logs.splitlines():
        assert json.loads(line.partition("] ")[2]) == {
            "user": 10001, "token": False, "/": read_only, "/usr": read_only, "/etc": read_only,
            "capabilities": 0, "no_new_privileges": 1, "seccomp": 2,
        }, line  # fmt: skip
    backend.delete("secretive")
