"""Two hundred hostile inputs: each gives a clear error with a path and exit code 64, never a traceback, and fast."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.checks import load, problems_in
from launcher.cli import main
from launcher.errors import SpecError
from tests.launcher.test_checks import TPU
from trainer.config.load import MAX_DEPTH, MAX_DOCUMENT_BYTES, parse_document

GOOD = yaml.safe_dump(TPU, sort_keys=False)


def with_key(path: str, value: Any) -> str:
    document = copy.deepcopy(TPU)
    *parents, last = path.split(".")
    node: Any = document
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return json.dumps(document)


def texts() -> dict[str, bytes]:
    """Inputs that are not a spec, or try to be more than one."""
    levels = zip("abcdefgh", "bcdefghi", strict=True)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in levels)
    found: dict[str, str | bytes] = {
        "empty": "",
        "only a comment": "# nothing\n",
        "null": "null",
        "a number": "42",
        "a list": "- name: x\n",
        "text": "hello",
        "two documents": f"{GOOD}---\n{GOOD}",
        "a tab as indentation": "name: x\n\ttpu: 3\n",
        "unclosed bracket": "name: [1, 2\n",
        "unclosed quote": 'name: "abc\n',
        "unclosed mapping": "{name: x",
        "wrong indentation": "name: x\n  tpu: y\n",
        "a colon too many": "name: a: b\n",
        "duplicate key": f"{GOOD}name: other\n",
        "duplicate key inside": GOOD.replace("  steps: 100", "  steps: 100\n  steps: 200"),
        "duplicate key in flow style": "{name: a, name: b}",
        "duplicate numeric keys": "name: x\nlabels: {1: a, 0x1: b}\n",
        "alias bomb": bomb,
        "an alias": "name: &n run\nlabels: {a: *n}\n",
        "an anchor to itself": "name: &a [*a]\n",
        "merge key": "base: &b {name: x}\n<<: *b\n",
        "unknown alias": "name: *nowhere\n",
        "python object": "!!python/object/apply:os.system ['true']",
        "python name": "name: !!python/name:os.system\n",
        "python tuple": "name: !!python/tuple [1]\n",
        "custom tag": "name: !secret x\n",
        "binary tag": "name: !!binary aGVsbG8=\n",
        "set tag": "name: !!set {a, b}\n",
        "timestamp": "name: 2026-01-01\n",
        "bad timestamp": "name: 2026-13-45\n",
        "sexagesimal": "name: 1:30:00\n",
        "a complex key": "? [a, b]\n: c\n",
        "a mapping as a key": "{{a: b}: c}",
        "deep list": "name: " + "[" * 5000 + "]" * 5000,
        "deep mapping": "{a: " * 2000 + "x" + "}" * 2000,
        "deep block": "".join(f"{' ' * i}a:\n" for i in range(300)),
        "too large": b"name: x\n" + b"# " + b"x" * MAX_DOCUMENT_BYTES,
        "one huge word": b"name: " + b"x" * (MAX_DOCUMENT_BYTES // 2),
        "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
        "a huge integer": "name: run\nttl_seconds: " + "9" * 5000,
        "a huge exponent": "name: run\nttl_seconds: 1e999\n",
        "nul byte": b"name: a\x00b\n",
        "escape byte": b"name: a\x1b[2Jb\n",
        "not utf-8": b"name: \xff\xfe\xfa\n",
        "utf-16": GOOD.encode("utf-16"),
        "utf-16 without mark": GOOD.encode("utf-16-le"),
        "latin-1": "name: é\n".encode("latin-1"),
        "lone surrogate": b'name: "\\ud800"\n',
        "random bytes": bytes(random.Random(0).randrange(256) for _ in range(4096)),
        "an ELF header": b"\x7fELF\x02\x01\x01" + b"\x00" * 64,
        "html": "<!DOCTYPE html><html><body>404</body></html>",
        "a template": "name: {{ name }}\n",
        "windows path": 'directory: "C:\\runs"\n',
        "a directive": "%YAML 9.9\n---\nname: x\n",
        "tag directive": "%TAG ! tag:evil,2026:\n---\n!x y: z\n",
        "only braces": "{}",
        "a carriage return": "name: x\rname: y\r",
        "bom twice": b"\xef\xbb\xbf\xef\xbb\xbfname: x\n",
    }
    return {f"text: {name}": text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for name, text in found.items()}


WRONG_TYPES: dict[str, list[Any]] = {
    "name": [None, 5, 1.5, True, [], {}, "", "a" * 5000, "../../etc", "a/b", "a b", "\uff41\uff42\uff43", "\u0430pple", "run\n",
        "run\u202e", "run\u200b", "-a", "a-", "A", "💥"],
    "tpu": [5, "v5p-128", [], {}, {"type": None}, {"type": 5}, {"type": ["v5p-8"]}, {"type": "v5p-8", "slices": True}, {"type": "v5p-8",
        "slices": 1.5},
            {"type": "v5p-8", "slices": -1}, {"type": "v5p-8", "slices": 10**30}, {"type": "v5p-" + "8" * 100}, {"type": "v5p-0x80"},
        {"type": "v5p-4x4x4x4"},
            {"type": "v5p-\u0661\u0662\u0668"}, {"accelerator": "v5p", "topology": "4x4x-4"}, {"accelerator": "v5p", "topology": "0x0x0"},
            {"accelerator": "v5p", "topology": "4X4X4"}, {"accelerator": "v5p", "topology": "²x²x¹"}, {"type": "v5p-8", "machine": {}}],
    "image": [5, [], {}, {"reference": ""}, {"reference": "a\nb"}, {"reference": "-v /:/host a"}, {"reference": "a@sha256:short"},
        {"pull_policy": "x"}],
    "directory": [None, 5, [], {}, "", "gs://", "gs:///a", "gs://a", "gs://b..b/../x", "gs://bucket/../x", "gs://bucket/a\x00b",
        "gs://bucket/a\nb",
                  "/data/../etc", "file:///etc", "s3://b/x", "gs://BUCKET/x", "gs://bucket//x", "x" * 2000, "~root/../x",
        "\\\\server\\share\\..\\x"],
    "train": [None, 5, [], "", "..", "/etc/passwd", "nope.yaml", {}, {"steps": 1}, "job.yaml/x", "\u0000"],
    "train.steps": [None, 0, -1, 1.5, "ten", [], {}, 10**30, "1e3", True],
    "train.batch": [None, [], 5, {"global_batch": 0, "sequence_length": 8}, {"global_batch": 3, "sequence_length": 8, "accumulation": 2}],
    "train.mesh": [None, [], 5, {"ici": {"data": 0}}, {"ici": {"data": -2}}, {"ici": {"data": -1, "fsdp": -1}}, {"ici": {"x": 1}},
        {"ici": {"data": 2**40}}],
    "train.model": [None, [], 5, {}, {"preset": 5}, {"preset": "../../x"}, {"preset": "tiny", "width": "wide"}, {"preset": "tiny",
        "segments": []}, {"preset": ["tiny"]}],
    "train.schedule": [None, [], "cosine", {}, {"type": "x"}, {"type": ["cosine"]}, {"type": "cosine", "learning_rate": float("nan")}],
    "train.data": [None, [], 5, {}, {"sources": None}, {"sources": {}}, {"sources": [5]}, {"sources": [{"type": "text",
        "paths": ["a\tb"]}]}],
    "env": [5, [], "A=b", {"A": None}, {"A": 5}, {"A": []}, {"": "x"}, {"A=B": "x"}, {"A\nB": "x"}, {"A": {"secretKeyRef": "x"}}],
    "labels": [5, [], {"a": 5}, {"": "x"}, {"a/b/c": "x"}, {"ü": "x"}, {"a": "ü"}],
    "volumes": [5, {}, [5], [{}], [{"type": "pvc"}], [{"type": "pvc", "claim": "c", "mount_path": "/../etc"}], [{"type": "host_path",
        "path": "/"}]],
    "capacity": [5, [], "free", {"type": []}, {"type": "dws", "max_run_seconds": 10**12}],
    "failure": [5, "never", {"max_restarts": 2**31}, {"mode": []}],
    "network": [5, {"coordinator_port": 0}, {"coordinator_port": 99999}, {"subdomain": "a_b"}, {"host_network": "perhaps"}],
    "ttl_seconds": [-1, 2**40, "soon", 1.5],
    "jobset_version": [0.1, "v1", "99999.1", "1.2.3"],
    "__class__": ["x"],
    "model_config": [{}],
}  # fmt: skip


def wrong() -> dict[str, bytes]:
    return {f"{path} = {repr(v)[:40]}": with_key(path, v).encode() for path, values in WRONG_TYPES.items() for v in values}


HOSTILE = texts() | wrong()


def test_there_are_two_hundred_of_them() -> None:
    assert len(HOSTILE) >= 200


def test_the_document_they_are_made_of_is_good(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    assert load(tmp_path / "job.yaml").name == "run"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_input_gives_a_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(HOSTILE[name])
    started = time.process_time()
    with pytest.raises(SpecError) as caught:
        load(path)
    assert time.process_time() - started < 3
    assert caught.value.exit_code == 64
    for problem in caught.value.problems:
        assert problem.path and problem.message and problem.code
        assert len(problem.message) < 600, problem.message


FORBIDDEN_FORMS = {
    "an alias": ("env: {A: &x one, B: *x}\n", "anchors and aliases are not accepted here"),
    "an anchor nobody uses": ("env: {A: &x one}\n", "anchors and aliases are not accepted here"),
    "an anchor of a mapping": ("env: &x {A: one}\n", "anchors and aliases are not accepted here"),
    "an alias as a key": ("labels: {&x a: b, *x : c}\n", "anchors and aliases are not accepted here"),
    "41 levels": ("labels: " + "[" * 40 + "]" * 40 + "\n", "nested deeper than 40 levels"),
    "200,000 open lists": ("labels: " + "[" * 200_000, "nested deeper than 40 levels"),
    "200,000 lists": ("labels: " + "[" * 200_000 + "]" * 200_000, "nested deeper than 40 levels"),
    "mappings": ("labels: " + "{a: " * 100_000, "nested deeper than 40 levels"),
    "block lists": ("labels:\n" + "- " * 100_000 + "x\n", "nested deeper than 40 levels"),
    "keys of keys": ("? " * 100_000 + "x\n", "nested deeper than 40 levels"),
}


def test_depth_anchors_and_aliases_are_refused_in_a_spec_that_is_good_otherwise(tmp_path: Path) -> None:
    """In a process of its own: what the parser's C code cannot bear would end this one."""
    for name, (text, _) in FORBIDDEN_FORMS.items():
        (tmp_path / name).write_text(GOOD + text)
    program = """
import sys
from pathlib import Path
from trainer.config import ConfigError
from trainer.config.load import read_document
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_document(path)
    except ConfigError as error:
        print(path.name, *[problem.message for problem in error.problems], sep=": ", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-300:]
    line = GOOD.count("\n") + 1
    for (name, (_, said)), printed in zip(sorted(FORBIDDEN_FORMS.items()), ended.stdout.splitlines(), strict=True):
        assert printed.startswith(f"{name}: not valid YAML: {said} (line {line + ('block' in name)}, column "), printed


def test_the_deepest_document_that_is_accepted_has_as_many_levels_as_the_limit_says() -> None:
    inner = MAX_DEPTH - 1
    assert list(parse_document("a: " + "[" * inner + "]" * inner, name="x")) == ["a"]


def test_a_deep_override_is_refused_like_a_deep_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(tmp_path / "job.yaml"), "--set", "labels=" + "[" * 50_000])
    assert ended.value.code == 64
    assert "nested deeper than 40 levels" in capsys.readouterr().err


def test_a_folder_a_missing_file_and_a_file_one_may_not_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.yaml", Path("/proc/self/mem"), tmp_path / ("x" * 300)):
        _, (problem,) = problems_in(path)
        assert "cannot be read" in problem.message or "is not" in problem.message, problem


OVERRIDES = ["", "=", "name", ".=x", "a..b=x", "name=[", "name=*x", "train.data.sources.9.type=x", "\x1b[2J=x", "name.x=1"]


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_malformed_override_gives_a_clear_error(override: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    with pytest.raises(SpecError):
        load(tmp_path / "job.yaml", [override])


CANARIES = (
    "hf_abcdefghijklmnopqrstuvwxyz012345",
    "AKIAQWERTYUIOPASDFGH",
    "ghp_0123456789abcdefghijABCDEFGHIJ",
    "correct horse battery staple",
)


@pytest.mark.parametrize(
    "place",
    [
        "env.MY_TOKEN={value}", "env.MY_TOKEN=[{value}]", "env.MY_TOKEN={{a: {value}}}", "env.A={value}", "env={value}",
        "env.A={{secretKeyRef: {value}}}",
        "env={{A: {value}, A: x}}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("canary", CANARIES)
@pytest.mark.parametrize("verb", [["validate"], ["validate", "--output", "json"], ["render"], ["explain"]], ids=" ".join)
def test_a_secret_in_the_wrong_place_is_never_repeated(
    place: str, canary: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "A={value}" in place and " " in canary:
        return  # nothing tells words in a variable called A from a setting
    (tmp_path / "job.yaml").write_text(GOOD)
    with pytest.raises(SystemExit) as ended:
        main([verb[0], str(tmp_path / "job.yaml"), "--set", place.format(value=canary), *verb[1:]])
    printed = capsys.readouterr()
    assert ended.value.code == 64
    assert canary not in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_control_characters_of_a_spec_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(with_key("name", "a\x1b]0;owned\x07b"))
    with pytest.raises(SystemExit):
        main(["validate", str(tmp_path / "job.yaml")])
    assert capsys.readouterr().err.isascii() and "\x1b" not in capsys.readouterr().err
