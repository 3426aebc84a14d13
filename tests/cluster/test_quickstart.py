"""The quickstart on real pods, typed as a person types it: submit, follow, cancel, submit again, wait, look."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.cluster.tools import kubectl, nnxlaunch
from tests.gcs_emulator import Gcs

SPEC = str(Path(__file__).parents[2] / "k8s" / "examples" / "quickstart.job.yaml")
STEPS = 80


@pytest.fixture
def settings(image: str, storage: Gcs) -> list[str]:
    """Overrides that put the quickstart on this cluster: its image, its object store, little CPU."""
    values = {
        "image": image,
        "directory": f"{storage.url}/{uuid.uuid4().hex[:8]}",
        "grace_seconds": "60",
        "resources": "{cpu: 100m, memory: 3Gi}",
        "train.data.sources.0.max_bytes": "1_000_000",
        **{f"env.{name}": json.dumps(value) for name, value in storage.environment.items()},
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def follow(namespace: str, until: str) -> list[str]:
    """Lines of `logs -f` up to the first with `until`."""
    command = [sys.executable, "-m", "launcher", "logs", "quickstart", "-f", "-n", namespace]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as logs:
        for line in logs.stdout or ():
            lines.append(line)
            if until in line:
                logs.kill()
    return lines


def test_the_quickstart_runs_to_completion_over_a_cancel_and_a_resume(namespace: str, settings: list[str]) -> None:
    here = ("-n", namespace)
    submitted = nnxlaunch("submit", SPEC, *settings, *here)
    assert submitted.returncode == 0, submitted.stderr
    both_have_met = " process(es)"
    assert any(both_have_met in line for line in follow(namespace, both_have_met))
    status = json.loads(nnxlaunch("status", "quickstart", *here, "--output", "json").stdout)
    assert status["state"] == "running"
    assert [(pod["slice_index"], pod["worker"], pod["phase"]) for pod in status["pods"]] == [(0, 0, "Running"), (0, 1, "Running")]
    assert nnxlaunch("wait", "quickstart", *here, "--timeout", "1s").returncode == 124
    again = nnxlaunch("submit", SPEC, *settings, *here)
    assert again.returncode == 73
    assert "--replace" in again.stderr

    before = follow(namespace, f"[10/{STEPS}]")
    assert f"[10/{STEPS}]" in "".join(before), before
    assert nnxlaunch("cancel", "quickstart", *here).returncode == 0
    assert kubectl("-n", namespace, "get", "pods", "-l", "jobset.sigs.k8s.io/jobset-name=quickstart", "-o", "name") == ""
    assert nnxlaunch("status", "quickstart", *here).returncode == 66

    assert nnxlaunch("submit", SPEC, *settings, *here).returncode == 0
    lines = follow(namespace, "nothing prints this")
    text = "".join(lines)
    assert {line.split("]")[0] for line in lines} >= {"[s0/w0 a0", "[s0/w1 a0"}, text
    assert "resumed: step" in text
    assert f"[{STEPS}/{STEPS}]" in text
    assert f"[ 5/{STEPS}]" not in text, "it began again instead of resuming"

    waited = nnxlaunch("wait", "quickstart", *here, "--timeout", "2m")
    assert waited.returncode == 0, waited.stderr
    done = json.loads(nnxlaunch("status", "quickstart", *here, "--output", "json").stdout)
    assert done["state"] == "completed"
    assert [pod["exit_code"] for pod in done["pods"]] == [0, 0]
    listed = nnxlaunch("list", *here).stdout
    assert "quickstart" in listed
    assert "completed" in listed
    assert nnxlaunch("cancel", "quickstart", *here).returncode == 0
