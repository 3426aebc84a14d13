"""`nnxlaunch image push` with a real engine and a registry of this test: the digest ends in the spec."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from launcher.image import find_source
from launcher.spec import from_yaml
from tests.container.engine import docker
from tests.container.registry import registry

ROOT = Path(__file__).parents[2]


def test_a_pushed_image_is_pinned_in_the_spec_by_the_digest_the_registry_has(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    text = (ROOT / "k8s" / "examples" / "v5e-16.job.yaml").read_text()
    with registry() as server:
        name = f"{server.host}/project/trainer"
        spec.write_text(re.sub(r"^image: .*$", f"image: {name}  # ours", text, flags=re.MULTILINE))
        exact, _ = find_source().references(name, "tpu")
        # The smallest image there is stands for the trainer's: a push does not look inside.
        docker("build", "--tag", str(exact), "--file", "-", str(tmp_path), stdin="FROM scratch\nCOPY job.yaml /\n")
        done = subprocess.run([sys.executable, "-m", "launcher", "image", "push", str(spec)], cwd=ROOT, capture_output=True, text=True)
        docker("image", "rm", "--force", str(exact))
        assert done.returncode == 0, done.stderr
        pushed = done.stdout.strip()
        assert re.fullmatch(re.escape(str(exact)) + r"@sha256:[0-9a-f]{64}", pushed)
        assert f"project/trainer@{pushed.partition('@')[2]}" in server.manifests
    assert yaml.safe_load(spec.read_text())["image"] == pushed
    assert f"image: {pushed}  # ours\n" in spec.read_text()
    assert from_yaml(spec).container_image.reference == pushed
    again = subprocess.run([sys.executable, "-m", "launcher", "image", "push", str(spec)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 66
    assert "has not been built" in again.stderr
