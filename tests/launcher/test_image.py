"""Image names, the revision of a checkout, and the line of a spec that pins an image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from launcher import image
from launcher.image import Reference
from launcher.spec.pin import pin_image, pinned
from launcher.spec.pod import DEFAULT_IMAGES

PIN = "registry.example/p/trainer:0.1.0-tpu-abc@sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "repository", "tag", "digest", "has_registry"),
    [
        ("nnxlaunch:0.1.0-cpu", "nnxlaunch", "0.1.0-cpu", None, False),
        ("team/trainer", "team/trainer", None, None, False),
        ("localhost:5000/trainer", "localhost:5000/trainer", None, None, True),
        ("localhost:5000/trainer:v1", "localhost:5000/trainer", "v1", None, True),
        (PIN, "registry.example/p/trainer", "0.1.0-tpu-abc", "sha256:" + "0" * 64, True),
        ("registry.example/p/trainer@sha256:ab", "registry.example/p/trainer", None, "sha256:ab", True),
    ],
)
def test_an_image_name_is_taken_apart_and_put_together(
    text: str, repository: str, tag: str | None, digest: str | None, has_registry: bool
) -> None:
    reference = Reference.parse(text)
    assert (reference.repository, reference.tag, reference.digest) == (repository, tag, digest)
    assert reference.has_registry is has_registry
    assert str(reference) == text


SPECS = {
    "a plain line with a comment": "name: a # mine\nimage: old:1   # the image\ntrain: {}\n",
    "quotes": "name: a\nimage: 'old:1'\ntrain: {}\n",
    "a mapping": "name: a\nimage:\n  reference: old:1 # here\n  pull_policy: always\n",
    "a flow mapping": "name: a\nimage: {reference: old:1, pull_policy: always}\n",
    "no image": "# top\nname: a # mine\ncpu: {hosts: 2}\n",
    "an empty image": "name: a\nimage:\ncpu: {hosts: 2}\n",
    "no line end": "cpu: {hosts: 2}\nname: a",
    "Windows line ends": "name: a\r\ncpu: {hosts: 2}\r\n",
    "JSON": '{"name": "a", "cpu": {"hosts": 2}}',
}


@pytest.mark.parametrize("text", SPECS.values(), ids=SPECS.keys())
def test_pinning_changes_the_image_and_nothing_else(text: str) -> None:
    before, after = yaml.safe_load(text), yaml.safe_load(pinned(text, PIN))
    found = after.pop("image")
    assert (found["reference"] if isinstance(found, dict) else found) == PIN
    before.pop("image", None)
    assert after == before
    assert pinned(pinned(text, PIN), PIN) == pinned(text, PIN)
    for comment in ("# mine", "# the image", "# here", "# top"):
        assert (comment in text) == (comment in pinned(text, PIN))
    assert ("\r\n" in text) == ("\r\n" in pinned(text, PIN))


def test_a_pinned_file_keeps_its_mode_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_bytes(b"name: a\r\nimage: old\r\n")
    spec.chmod(0o640)
    pin_image(spec, PIN)
    assert spec.read_bytes() == f"name: a\r\nimage: {PIN}\r\n".encode()
    assert spec.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [spec]


def test_a_changed_part_of_the_image_makes_the_revision_dirty_and_another_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "Dockerfile").write_text("FROM scratch\n")
    (tmp_path / "notes.md").write_text("one\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.chdir(tmp_path)
    clean = image.find_source()
    assert len(clean.revision) == 40
    (tmp_path / "notes.md").write_text("two\n")
    assert image.find_source() == clean
    (tmp_path / "docker" / "Dockerfile").write_text("FROM other\n")
    dirty = image.find_source()
    assert dirty.revision == f"{clean.revision}-dirty"
    exact, newest = dirty.references(image.DEFAULT_REPOSITORY, "tpu")
    assert exact.tag == f"tpu-{clean.revision[:12]}-dirty"
    assert str(newest) == DEFAULT_IMAGES["tpu"]


def test_without_docker_the_error_is_one_sentence_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(image.Unavailable, match="docker is not installed") as caught:
        image.build(image.Source(root=tmp_path, revision="unknown"), target="cpu", repository="nnxlaunch")
    assert "install Docker" in caught.value.hint


def test_an_image_without_a_registry_is_not_pushed() -> None:
    with pytest.raises(image.ToolFailed, match="names no registry"):
        image.push(Reference.parse("nnxlaunch:0.1.0-cpu"))
