"""What the image holds, and what it must not hold."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from importlib import metadata
from pathlib import PurePosixPath

from tests.container.engine import docker, run, run_python

OURS = ("opt/venv/", "opt/nnxlaunch/")
ACCOUNTS = {f"etc/{name}{backup}" for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid") for backup in ("", "-")}
# What the engine itself puts into every container, and useradd's records of logins.
BOOKKEEPING = {
    *(".dockerenv", "dev/console", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"),
    *("var/log/faillog", "var/log/lastlog"),
}


def files(image: str) -> dict[str, tuple[int, int]]:
    """Path -> (mode, size) of every file in an image."""
    container = docker("create", image, "nothing").stdout.strip()
    try:
        with subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE) as export:
            with tarfile.open(fileobj=export.stdout, mode="r|") as archive:
                return {member.name: (member.mode, member.size) for member in archive if not member.isdir()}
    finally:
        docker("rm", container)


def test_outside_of_its_two_folders_the_image_is_the_base_image_with_one_more_account(image: str) -> None:
    base, ours = files("python:3.12-slim"), files(image)
    outside = {path: entry for path, entry in ours.items() if not path.startswith(OURS)}
    changed = {path for path in outside if outside[path] != base.get(path)} | (base.keys() - outside.keys())
    assert changed <= ACCOUNTS | BOOKKEEPING
    names = {PurePosixPath(path).name for path in ours if path.startswith(OURS)}
    assert "pip.conf" not in names
    assert "pip" not in names, "the image must not be able to install packages"


def test_its_configuration_and_history_name_nothing_of_the_build_machine(image: str) -> None:
    (facts,) = json.loads(docker("image", "inspect", image).stdout)
    config = facts["Config"]
    base = json.loads(docker("image", "inspect", "python:3.12-slim").stdout)[0]["Config"]
    assert config["Entrypoint"] == ["python", "-m", "trainer"]
    assert config["User"] == "10001:10001"
    added = {entry.partition("=")[0] for entry in config["Env"]} - {entry.partition("=")[0] for entry in base["Env"] or []}
    assert added == {
        "HOME", "NNX_IMAGE_REVISION", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "TPU_LOG_DIR"
    }  # fmt: skip
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == metadata.version("nnxlaunch")
    assert f"NNX_IMAGE_REVISION={labels['org.opencontainers.image.revision']}" in config["Env"]
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    for word in ("http://", "https://", "PIP_", os.uname().nodename, "/root/.config"):
        assert word not in history


def test_it_runs_as_a_user_with_a_name_and_a_home(image: str) -> None:
    code = "import getpass, os, pathlib; print(getpass.getuser(), pathlib.Path.home(), os.getuid(), os.getcwd())"
    assert run_python(image, code).split() == ["nnxlaunch", "/tmp", "10001", "/tmp"]


def test_every_module_has_its_bytecode(image: str) -> None:
    code = """
import importlib.util, pathlib, sys
missing = [str(path) for root in ("/opt/nnxlaunch", "/opt/venv/lib") for path in pathlib.Path(root).rglob("*.py")
           if not pathlib.Path(importlib.util.cache_from_source(str(path))).exists()]
print(len(missing), missing[:5])
"""
    count, _, some = run_python(image, code).partition(" ")
    assert int(count) < 20, some  # templates and sources for other Python versions do not compile


def test_a_bad_config_ends_with_64_and_says_so(image: str) -> None:
    done = run(image, "--config", "/nowhere.json")
    assert done.returncode == 64
    assert "/nowhere.json" in done.stdout
    assert "Traceback" not in done.stdout
