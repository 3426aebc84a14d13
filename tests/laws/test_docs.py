"""The documentation is true: the reference is today's, every command shown is run, every command is shown."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "k8s" / "README.md", *(ROOT / "docs").glob("*.md")])
# What this test cannot run inside itself, and the file that does.
ELSEWHERE = {
    "make run": ".ci/run",
    "make test": ".ci/run",
    "make lint": ".ci/run",
}


def blocks(page: Path, kind: str) -> list[str]:
    """The commands of all blocks marked exactly `kind`, without comments, in order."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    joined = "\n".join(found).replace("\\\n", " ")
    return [line for raw in joined.splitlines() if (line := re.sub(r"\s+#.*$", "", raw).strip()) and not line.startswith("#")]


def test_the_reference_is_what_the_generator_writes_today() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "generate.py"))["reference"]()
    assert (ROOT / "docs" / "reference.md").read_text() == reference, "run: python docs/generate.py"


def test_every_command_has_a_section_in_the_reference() -> None:
    sections = re.findall(r"^### nnxlaunch (\w+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert set(sections) == set(COMMANDS)


def test_every_feature_that_works_names_tests_that_exist() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "features.md").read_text().splitlines() if line.startswith("| ")]
    works = [row for row in rows if row[1].startswith("works")]
    assert len(works) > 30
    for feature, _, files in works:
        named = re.findall(r"`(\S+?)`", files)
        assert named, f"{feature}: no test"
        assert not [name for name in named if not (ROOT / "tests" / name).is_file()], feature


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_plain_command_of_a_page_succeeds_in_order(page: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in blocks(page, "bash"):
        if line in ELSEWHERE:
            assert line in (ROOT / ELSEWHERE[line]).read_text(), f"{ELSEWHERE[line]} does not run {line}"
            continue
        if line.startswith("source "):
            continue
        result = subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"$ {line}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("kind", ["cluster", "container", "run"])
def test_every_command_that_needs_more_is_run_by_the_tests_that_have_it(kind: str) -> None:
    folder = {"cluster": "cluster", "container": "container", "run": "launcher"}[kind]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / folder).rglob("*.py"))
    for page in PAGES:
        for line in blocks(page, f"bash {kind}"):
            words = [word for word in shlex.split(line) if not word.startswith("-")]
            if words[0] == "nnxlaunch":
                assert re.search(rf"""["']{words[1]}["']""", tests), f"no test in tests/{folder} runs: {line}"
            elif words[0] == "docker":
                assert words[-1] in tests, f"no test in tests/{folder} runs: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_spec_of_the_readme_is_valid(tmp_path: Path) -> None:
    text = re.search(r"^```yaml\n(name:.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert text
    path = tmp_path / "job.yaml"
    path.write_text(text[1])
    result = subprocess.run([sys.executable, "-m", "launcher", "validate", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(text[1])["name"] == "my-run"
