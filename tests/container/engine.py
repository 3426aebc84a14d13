"""Containers as hard as a restricted pod: read-only root, no capabilities, no network, the image's own user."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager

HARD = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--user", "10001", "--network", "none"),
)


def docker(*words: str, stdin: str = "", check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One docker command; its output is captured, both streams together."""
    both = subprocess.STDOUT
    return subprocess.run(["docker", *words], input=stdin, stdout=subprocess.PIPE, stderr=both, text=True, check=check, timeout=timeout)


def run(image: str, *words: str, options: Sequence[str] = (), timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`docker run --rm` in the hard form; the exit code is the container's."""
    return docker("run", "--rm", *HARD, *options, image, *words, check=False, timeout=timeout)


def run_python(image: str, code: str, *, options: Sequence[str] = ()) -> str:
    """What a Python program prints in the image."""
    done = run(image, "-c", code, options=("--entrypoint", "python", *options))
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def started(image: str, *words: str, options: Sequence[str] = ()) -> Generator[str]:
    """A container that runs in the background, removed at the end. Gives its name."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    docker("run", "--detach", "--name", name, *HARD, *options, image, *words)
    try:
        yield name
    finally:
        docker("rm", "--force", name, check=False)


def wait_for_line(container: str, part: str) -> None:
    """Until the container has printed a line with `part`. Fails when it ends before."""
    with subprocess.Popen(["docker", "logs", "--follow", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as logs:
        said: list[str] = []
        for line in logs.stdout or ():
            said.append(line)
            if part in line:
                logs.kill()
                return
    raise AssertionError(f"it never printed {part!r}:\n{''.join(said)}")


@contextmanager
def new_volume(image: str) -> Generator[str]:
    """An empty volume that the image's user may write."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    docker("volume", "create", name)
    try:
        docker("run", "--rm", "--user", "0", "--volume", f"{name}:/volume", "--entrypoint", "chown", image, "10001", "/volume")
        yield name
    finally:
        docker("volume", "rm", "--force", name, check=False)
