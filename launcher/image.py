"""The trainer's container image: its name, how it is built and pushed, and the line of a spec that pins it.

The container engine is run as a program with an argument list; nothing goes through a shell.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

from launcher.errors import NotFound, ToolFailed, Unavailable

Target = Literal["cpu", "tpu"]
DEFAULT_REPOSITORY: Final = "nnxlaunch-trainer"  # `launcher.spec.pod.DEFAULT_IMAGES`: what a spec that names none uses
PLATFORMS: Final[dict[Target, str | None]] = {"cpu": None, "tpu": "linux/amd64"}  # libtpu has no wheel for another
DOCKERFILE: Final = Path("docker", "Dockerfile")
# What the image is made of: a change there makes the revision dirty, an edited README does not.
_PARTS: Final = ("docker", "launcher", "pyproject.toml", "requirements", "trainer", ".dockerignore")
_REVISION_DIGITS: Final = 12


def version() -> str:
    return metadata.version("nnxlaunch")


@dataclass(frozen=True)
class Reference:
    """`repository[:tag][@digest]`."""

    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        name, _, digest = text.partition("@")
        repository, colon, tag = name.rpartition(":")
        if not colon or "/" in tag:  # the colon of `host:port/name`
            repository, tag = name, ""
        return cls(repository, tag or None, digest or None)

    @property
    def has_registry(self) -> bool:
        """Whether the first part names a host, by Docker's own rule."""
        host, slash, _ = self.repository.partition("/")
        return bool(slash) and ("." in host or ":" in host or host == "localhost")

    def __str__(self) -> str:
        return self.repository + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkout that an image can be built from."""

    root: Path
    revision: str  # commit, with `-dirty` when the image's parts differ from it; `unknown` without git

    @property
    def short(self) -> str:
        commit, dash, dirty = self.revision.partition("-")
        return commit[:_REVISION_DIGITS] + dash + dirty

    def references(self, repository: str, target: Target) -> tuple[Reference, Reference]:
        """The name of exactly this revision, and the one of the newest."""
        return Reference(repository, f"{target}-{self.short}"), Reference(repository, target)


def find_source() -> Source:
    """The checkout in the current folder, or the one this launcher runs from. Raises NotFound."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / DOCKERFILE).is_file():
            return Source(root=root, revision=_revision(root))
    raise NotFound(f"no {DOCKERFILE} here: an image is built from a clone of the repository", hint="change to the clone and run it there")


def own_revision() -> str:
    """The revision of the checkout this launcher runs from; `unknown` where it was installed."""
    root = Path(__file__).resolve().parent.parent
    return _revision(root) if (root / DOCKERFILE).is_file() else "unknown"


def _revision(root: Path) -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    commit = _quiet([git, "-C", str(root), "rev-parse", "HEAD"])
    if commit is None:
        return "unknown"
    changed = _quiet([git, "-C", str(root), "status", "--porcelain", "--", *(part for part in _PARTS if (root / part).exists())])
    return commit + ("-dirty" if changed else "")


def build(source: Source, *, target: Target, repository: str, pip_config: Path | None = None) -> Reference:
    """Build and tag; returns the name of exactly this revision. Progress goes to standard error. Raises Unavailable, ToolFailed."""
    exact, newest = source.references(repository, target)
    command = [*_builder(), "--file", str(DOCKERFILE), "--tag", str(exact), "--tag", str(newest)]
    for name, value in {"TARGET": target, "VERSION": version(), "REVISION": source.revision}.items():
        command += ["--build-arg", f"{name}={value}"]
    if platform := PLATFORMS[target]:
        command += ["--platform", platform]
    if pip_config:
        command += ["--secret", f"id=pip.conf,src={pip_config.resolve()}"]
    _run([*command, "."], folder=source.root, doing="build the image")
    return exact


def push(reference: Reference) -> Reference:
    """Push a built image; returns its name with the digest the registry gave it. Raises Unavailable, ToolFailed, NotFound."""
    if not reference.has_registry:
        raise ToolFailed(
            f"{str(reference)!r} names no registry, so there is nowhere to push it",
            hint="name a repository: `image: REGISTRY/PROJECT/trainer` in the spec, or --name",
        )
    docker = _docker()
    if _quiet([docker, "image", "inspect", str(reference)]) is None:
        raise NotFound(f"image {str(reference)!r} has not been built", hint="nnxlaunch image build")
    _run([docker, "push", str(reference)], folder=None, doing=f"push {reference}")
    digests: list[str] = json.loads(_quiet([docker, "image", "inspect", "--format", "{{json .RepoDigests}}", str(reference)]) or "[]")
    for text in digests:
        if (pushed := Reference.parse(text)).repository == reference.repository:
            return replace(reference, digest=pushed.digest)
    raise ToolFailed(f"the container engine reports no digest for {str(reference)!r} after the push")


def _docker() -> str:
    docker = shutil.which("docker")
    if docker is None:
        raise Unavailable("docker is not installed", hint="install Docker with buildx, or name a ready image in the spec")
    if _quiet([docker, "version", "--format", "{{.Server.Version}}"]) is None:
        where = os.environ.get("DOCKER_HOST", "its default socket")
        raise Unavailable(f"the Docker daemon does not answer at {where}", hint="start Docker, or set DOCKER_HOST")
    return docker


def _builder() -> list[str]:
    """buildx where it is, else the BuildKit that clients before 23 carried themselves."""
    docker = _docker()
    if _quiet([docker, "buildx", "version"]) is not None:
        return [docker, "buildx", "build", "--load"]
    major = (_quiet([docker, "version", "--format", "{{.Client.Version}}"]) or "0").partition(".")[0]
    if major.isdigit() and int(major) >= 23:
        raise Unavailable(f"{docker} has no buildx", hint="install the docker-buildx plugin (Debian: apt install docker-buildx)")
    return [docker, "build"]


def _run(command: Sequence[str], *, folder: Path | None, doing: str) -> None:
    """Run with the terminal as it is, but nothing on our standard output, which carries the result."""
    try:
        code = subprocess.run(command, cwd=folder, env={**os.environ, "DOCKER_BUILDKIT": "1"}, stdout=2, check=False).returncode
    except OSError as error:
        raise ToolFailed(f"cannot {doing}: {command[0]}: {error.strerror}") from None
    if code:
        raise ToolFailed(f"cannot {doing}: {' '.join(command[:2])} ended with exit code {code}", hint="its own words are above")


def _quiet(command: Sequence[str]) -> str | None:
    """Standard output of a program; None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
