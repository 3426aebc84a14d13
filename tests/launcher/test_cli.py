"""The command line as a person and a script see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from keyword import iskeyword
from pathlib import Path

import pytest
import yaml

from launcher.cli import COMMANDS, main
from launcher.errors import (
    EXIT_CODES,
    AlreadyExists,
    JobFailed,
    NnxlaunchError,
    NotFound,
    SpecError,
    ToolFailed,
    Unavailable,
    WaitTimeout,
)
from tests.launcher.regenerate import EXAMPLES

ROOT = Path(__file__).parents[2]
QUICKSTART = str(EXAMPLES / "quickstart.job.yaml")
HEAVY = ("jax", "kubernetes", "google.cloud.storage", "orbax", "flax", "numpy", "rich")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    code = ended.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


def test_help_lists_every_command_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS) and "Examples:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    out = capsys.readouterr().out
    assert "Usage: nnxlaunch" in out and f"nnxlaunch {name}" in out.split("Usage:", 1)[1].split("\n", 1)[1]
    examples = import_module(f"launcher.cli.{name}{'_' * iskeyword(name)}").EXAMPLES.splitlines()
    assert {line.strip() for line in examples} <= {line.strip() for line in out.splitlines()}  # each on a line of its own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("list", "--output", "xml"), "error: invalid value for '--output' / '-o': 'xml' is not one of 'table', 'wide', 'json', 'yaml'\n"),
        (("status",), "error: missing argument 'NAME'\nhint: nnxlaunch status --help\n"),
        (("sumbit",), "error: no such command 'sumbit'. Did you mean 'submit'?\nhint: nnxlaunch --help\n"),
    ],
)
def test_wrong_usage_is_said_as_every_other_error(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_command_interrupted_at_any_moment_of_its_start_says_nothing_and_exits_130() -> None:
    """The signal comes with the n-th audit event of an import, so at another place of the start for every n."""
    program = (
        "import os, signal, sys\n"
        "from launcher.__main__ import main\n"
        "left = int(sys.argv.pop(1))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background is started without
        "def hook(event, arguments):\n"
        "    global left\n"
        "    left -= event == 'import'\n"
        "    if event == 'import' and left == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(hook)\n"
        "main()\n"
    )
    for imports in (1, 60, 300):
        words = [sys.executable, "-c", program, str(imports), "validate", QUICKSTART]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (130, ""), imports


def test_what_the_machine_refuses_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "launcher", "init"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
    (tmp_path / "file").touch()
    monkeypatch.setenv("NNXLAUNCH_STATE", str(tmp_path / "file"))
    assert run("submit", QUICKSTART, "--backend", "local") == Unavailable.exit_code
    assert "cannot be written: Not a directory\nhint: set NNXLAUNCH_STATE" in capsys.readouterr().err
    (tmp_path / "default").mkdir()
    monkeypatch.setenv("NNXLAUNCH_STATE", str(tmp_path))
    assert run("status", "a" * 300, "--backend", "local") == 1
    assert capsys.readouterr().err.endswith(": File name too long\n")


def test_the_version_is_the_installed_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"nnxlaunch {version('nnxlaunch')}\n"


def test_options_that_cannot_mean_anything_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, said in (
        (("list", "--backend", "local", "--context", "prod"), 69, "choose a cluster"),
        (("list", "--backend", "kubernetes", "-n", "Bad_NS"), 69, "'Bad_NS' is not the name of a namespace"),
        (("render", QUICKSTART, "-o", "table"), 2, "json or yaml"),
        (("validate", QUICKSTART, "--set", "directory=~/runs"), 64, "error: directory: '~' stands for a home folder in a shell only"),
    ):
        assert run(*words) == code
        assert said in capsys.readouterr().err


def test_types_shows_every_machine_an_ambiguous_name_can_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("types", "v6e-8", "-o", "json") == 0
    found = [(row["hosts"], row["chips"], row["machine"]) for row in json.loads(capsys.readouterr().out)]
    assert sorted(found) == [(1, 8, "ct6e-standard-8t"), (2, 8, "ct6e-standard-4t")]


def test_no_arguments_shows_help_and_a_misspelt_command_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert run("validat") == 2
    assert "validate" in capsys.readouterr().err


def imported(*words: str) -> set[str]:
    """Modules of a fresh interpreter after one command."""
    program = "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\nfrom launcher.cli import main\nmain()"
    result = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stderr.split())


def test_help_imports_neither_pydantic_nor_a_client() -> None:
    assert not {"pydantic", "yaml", *HEAVY} & imported("--help")


@pytest.mark.parametrize("command", ["validate", "render", "explain"])
def test_pure_commands_import_no_client_and_no_array_library(command: str) -> None:
    assert not set(HEAVY) & imported(command, QUICKSTART)


@pytest.mark.parametrize("line", ["nnxlaunch vali", "nnxlaunch validate --se", "nnxlaunch types v5p-12"])
def test_the_shell_completes_commands_and_options(line: str) -> None:
    environment = {**os.environ, "_NNXLAUNCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    result = subprocess.run([sys.executable, "-m", "launcher"], cwd=ROOT, env=environment, capture_output=True, text=True)
    types = ["v5p-128", "v5p-1280", "v5p-12032", "v5p-12160", "v5p-12288"]
    assert result.stdout.split() == {"vali": ["validate"], "--se": ["--set"], "v5p-12": types}[line.split()[-1]]


@pytest.mark.parametrize("target", ["cpu", "tpu"])
def test_the_starter_spec_validates_as_it_is(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    assert run("init", "--target", target, "--name", "first", str(path)) == 0
    assert run("validate", str(path)) == 0
    assert capsys.readouterr().out.startswith("first: valid")
    assert run("init", str(path)) == 73


@pytest.mark.parametrize("name", ["1abc", "Abc", "a-", "-a", "a_b", "a: b", "", "a" * 60, "é", "a\nb"])
def test_init_writes_no_spec_with_a_name_that_validate_would_refuse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", f"--name={name}") == 64
    printed = capsys.readouterr()
    assert printed.out == "" and "error: name: " in printed.err


@pytest.mark.parametrize("name", ["true", "null", "on", "a" * 40])
def test_init_writes_a_spec_that_validates_with_every_name_it_takes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", "--name", name, str(tmp_path / "job.yaml")) == 0
    assert run("validate", str(tmp_path / "job.yaml")) == 0
    assert capsys.readouterr().out.startswith(f"{name}: valid")
    assert run("init", "--target", "tpu", "--name", name) == 0
    assert f"directory: gs://my-bucket/runs   # checkpoints, metrics and logs go to gs://my-bucket/runs/{name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["data", "prepare", QUICKSTART], ["export", "runs/x", "--out", "y"]], ids=" ".join)
def test_without_the_trainers_packages_the_hint_names_the_clones_setup(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        del name

    monkeypatch.setattr("importlib.util.find_spec", absent)
    assert run(*words) == Unavailable.exit_code
    assert "in the clone: ./setup.sh train" in capsys.readouterr().err


def test_validate_says_path_value_limit_hint_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("validate", QUICKSTART, "--set", "train.batch.global_batch=17", "--set", "grace_seconds=3")
    assert run(*words) == 64
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == sum(line.startswith("hint: ") for line in lines) == 2
    assert run(*words, "-o", "json") == 64
    problems = {problem["path"]: problem for problem in json.loads(capsys.readouterr().out)}
    assert problems["train.batch.global_batch"] | {"message": ""} == {
        "path": "train.batch.global_batch", "message": "", "value": 17, "limit": 8, "hint": "16 or 24", "code": "batch-shards",
    }  # fmt: skip
    assert run("validate", QUICKSTART, "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out) == []


def test_a_spec_is_checked_for_where_it_goes_before_anything_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("validate", QUICKSTART, "--backend", "kubernetes"), ("submit", QUICKSTART, "--backend", "kubernetes")):
        assert run(*words) == 64
        assert "directory: 'runs/quickstart' is a folder of the pod" in capsys.readouterr().err
    assert run("validate", QUICKSTART, "--backend", "local") == 0


def test_render_gives_the_same_objects_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("render", QUICKSTART) == 0
    as_yaml = list(yaml.safe_load_all(capsys.readouterr().out))
    assert run("render", QUICKSTART, "--output", "json") == 0
    assert json.loads(capsys.readouterr().out) == as_yaml


def test_explain_prints_sections_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", QUICKSTART) == 0
    out = capsys.readouterr().out
    assert "tokens per step" in out and "restart, free" in out
    assert run("explain", QUICKSTART, "--sharding") == 0
    assert "segments/0/0/attention/query" in capsys.readouterr().out
    assert run("explain", QUICKSTART, "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["hardware"]["devices"] == 8


def test_types_lists_families_names_and_one_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("types") == run("types", "v5p", "--all") == run("types", "trillium-256") == 0
    out = capsys.readouterr().out
    assert "ironwood" in out and "v5p-12288" in out and "16x16" in out
    assert run("types", "v5p", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)[4]["type"] == "v5p-128"
    assert run("types", "v5p-120") == 64
    assert "v5p-128" in capsys.readouterr().err


def test_every_error_has_a_documented_exit_code() -> None:
    classes = (NnxlaunchError, SpecError, NotFound, Unavailable, ToolFailed, AlreadyExists, WaitTimeout, JobFailed)
    assert {one.exit_code for one in classes} <= set(EXIT_CODES)


def test_a_defect_keeps_its_traceback() -> None:
    program = "import launcher.cli as c\nfrom launcher.cli import validate\nvalidate.command = lambda: 1 / 0\nc.main(['validate'])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr
