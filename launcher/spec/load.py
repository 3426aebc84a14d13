"""A spec file in, a JobSpec out, with every problem of it at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launcher.spec.job import JobSpec
from trainer.config import ConfigError, Problem, apply_overrides, parse_document, read_document, validate


class NoTrainFile(ConfigError):
    """The train file that a spec names cannot be used; `rest` is the document without it."""

    def __init__(self, problem: Problem, rest: dict[str, Any]) -> None:
        super().__init__([problem])
        self.rest = rest


def from_yaml(path: str | Path, overrides: Iterable[str] = ()) -> JobSpec:
    """The spec in a YAML file (`-`: standard input), with `a.b=value` overrides on top.

    Raises ConfigError with every problem of form. Cross-field rules are `launcher.checks.check`.
    """
    return from_document(*read(path, overrides))


def read(path: str | Path, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], Path]:
    """The document with overrides and a referenced train file in place, and the folder it lies in."""
    if str(path) == "-":
        folder, document = Path.cwd(), parse_document(sys.stdin.buffer.read(1_000_001), name="standard input")
    else:
        folder, document = Path(path).parent, read_document(path)
    try:
        document = apply_overrides(_with_train_file(document, folder), overrides)
        return _with_train_file(document, folder), folder
    except NoTrainFile as error:
        rest = {key: value for key, value in apply_overrides(error.rest, overrides).items() if key != "train"}
        raise NoTrainFile(error.problems[0], rest) from None


def from_document(document: dict[str, Any], folder: Path | None = None) -> JobSpec:
    """The spec in a parsed document; a train file it names is looked up in `folder`."""
    return validate(JobSpec, _with_train_file(document, folder or Path.cwd()), hidden=("env",))


def _with_train_file(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = document.get("train")
    if not isinstance(name, str):
        return document
    try:
        root = folder.resolve()
        path = (root / name).resolve()
    except (OSError, ValueError) as error:
        raise _train_problem(document, f"is not a path: {error}", "") from None
    if not path.is_relative_to(root):
        raise _train_problem(document, "is outside of the folder of the spec", "keep the train file beside the spec, or below it")
    try:
        train = read_document(path)
    except ConfigError as error:
        raise _train_problem(document, error.problems[0].message, error.problems[0].hint) from None
    # A file that is also used without the launcher names a run directory; here it follows from the spec.
    return {**document, "train": {key: value for key, value in train.items() if key != "run_directory"}}


def _train_problem(document: dict[str, Any], message: str, hint: str) -> NoTrainFile:
    name = str(document["train"])
    problem = Problem(path="train", message=f"{name[:80]!r} {message}", hint=hint, code="train-file", value=name)
    return NoTrainFile(problem, {key: value for key, value in document.items() if key != "train"})
