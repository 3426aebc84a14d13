"""setup.sh with programs in the place of Python, which note what they are asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# `-m venv` writes another one like it; without pip, when a file says so, as an interrupted `-m venv` leaves it.
PYTHON = """#!/bin/sh
echo "$0 $*" >>"$CALLS"
case "$*" in
*"import pip"*) [ ! -e "$0.interrupted" ] ;;
*realpath*) echo "$0" ;;
"-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip "*) [ ! -e "$0.interrupted" ] ;;
esac
"""


def test_an_environment_whose_making_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    tools = tmp_path / "tools"  # all that setup.sh may find: no uv
    tools.mkdir()
    for name in ("cat", "cp", "cut", "dirname", "mkdir", "rm", "sh", "sha256sum", "shasum"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    clone = tmp_path / "clone"
    for folder in ("requirements", ".venv/bin"):
        (clone / folder).mkdir(parents=True)
    shutil.copy(ROOT / "setup.sh", clone)
    for name in ("requirements/launcher.txt", "pyproject.toml", ".venv/bin/python.interrupted"):
        (clone / name).touch()
    for path in (tools / "python3", clone / ".venv/bin/python"):
        path.write_text(PYTHON)
        path.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PATH": str(tools), "CALLS": str(calls), "PYTHON": str(tools / "python3"), "HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(["sh", "setup.sh", "launcher"], cwd=clone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    asked = calls.read_text()
    assert asked.count("-m venv .venv") == 1 and asked.count("-m pip install") == 2
    assert (clone / ".venv/stamp-launcher").exists()
