"""The kind path of k8s/README.md, typed as it stands there, apart from what makes the cluster and brings the image into its node."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.cluster.tools import PATIENCE_SECONDS, kubectl

K8S = Path(__file__).parents[2] / "k8s"
NAMESPACE = "train"
CLAIM = "shared"
# This cluster is there, with JobSet; its image was built and loaded, under the name of TEST_IMAGE.
DONE_BEFORE = (
    "kind create cluster",
    "kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/",
    "kubectl -n jobset-system rollout status ",
    "nnxlaunch image build ",
    "kind load docker-image ",
    "docker exec kind-control-plane ",
)


def blocks() -> list[str]:
    """The path's blocks of commands, in order, without those that were done before."""
    (section,) = re.findall(r"^## On kind.*?(?=^## )", (K8S / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    found = re.findall(r"^```(?:sh|bash \w+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert all(any(line.startswith(words) for block in found for line in block.splitlines()) for words in DONE_BEFORE)
    left = ["\n".join(line for line in block.splitlines() if not line.startswith(DONE_BEFORE)) for block in found]
    return [block for block in left if block]


@pytest.fixture
def volume(tmp_path: Path) -> Generator[None]:
    """What kind's default storage class would make of the claim: a folder of the node."""
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(0o777)
    name = f"kind-path-{uuid.uuid4().hex[:8]}"
    spec = {
        "capacity": {"storage": "5Gi"},
        "accessModes": ["ReadWriteOnce"],
        "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
        "hostPath": {"path": str(folder)},
    }
    manifest = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}
    kubectl("create", "-f", "-", stdin=json.dumps(manifest))
    yield
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    kubectl("delete", "persistentvolume", name)


def test_the_kind_path_leads_to_a_finished_job(volume: None, image: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    spec = tmp_path / "k8s" / "examples" / "cpu-two-hosts.job.yaml"
    text = spec.read_text()
    for theirs, ours in (
        ("image: nnxlaunch-trainer:cpu\n", f"image: {image}\n"),
        ('cpu: "1"', 'cpu: "500m"'),
    ):  # a node of two cores, shared
        assert text.count(theirs) == 1
        text = text.replace(theirs, ours)
    spec.write_text(text)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = ""
    for block in blocks():
        command = ["bash", "-euc", block]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=2 * PATIENCE_SECONDS
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        said = done.stdout
    assert re.search(r"^state +completed$", said, re.MULTILINE), said
    assert (tmp_path / "volume" / "runs" / "cpu-two-hosts" / "checkpoints" / "80" / "commit.json").is_file()
