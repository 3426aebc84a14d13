"""Problems across fields of a document in which the form of some parts is wrong.

Those parts are left out, or stand-ins take their place where something is required. What two different stand-ins agree on is a
problem of the document, not of a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, cast

from pydantic import ValidationError

from launcher.spec import JobSpec
from launcher.spec.accelerator import Tpu
from trainer.config import Problem
from trainer.config.load import problems_of

NUMBERS: Final = (1, 720_720)
"""The second is divisible by every number up to 16, so that few rules object to both."""
PARTS: Final[dict[str, tuple[Any, Any]]] = {
    "name": ("NAME", "NAME"),  # seen in the paths that are said to be wrong
    "train.model": ({"preset": "tiny"}, {"preset": "mixtral-8x7b"}),
    "train.schedule": ({"type": "constant", "learning_rate": 1.0}, {"type": "cosine", "learning_rate": 1.0}),
}
"""Two stand-ins each for parts that cannot be made up by their kind alone."""
FOLLOWS_MODEL: Final = ("sharding", "optimizer", "pipeline", "diloco")
"""Sections of `train` that name tensors or layers of a model: of another model than the spec's nothing is said about them."""
ROUNDS: Final = 20
ACCELERATORS: Final = ("v5e-16", "v6e-256")


def further_problems(document: dict[str, Any], check: Callable[[JobSpec], list[Problem]]) -> list[Problem]:
    """Problems across fields, without those in the parts that have a problem of form."""
    first, second = (_problems(document, number, check) for number in NUMBERS)
    return [problem for problem in first if problem in second]


def on_any_accelerator(spec: JobSpec, check: Callable[[JobSpec], Iterator[Problem]]) -> list[Problem]:
    """Problems of a spec whose accelerator does not exist that it would have on any."""
    slices = spec.tpu.slices if spec.tpu else 1
    first, second = (list(check(spec.model_copy(update={"tpu": Tpu(type=name, slices=slices)}))) for name in ACCELERATORS)
    return [problem for problem in first if problem in second]


def _problems(document: dict[str, Any], number: int, check: Callable[[JobSpec], list[Problem]]) -> list[Problem]:
    touched: set[tuple[str, ...]] = set()
    waiting: dict[str, list[Any]] = {}
    for turn in range(ROUNDS):
        try:
            spec = JobSpec.model_validate(document)
        except ValidationError as error:
            problems = problems_of(JobSpec, error)
            touched |= {_section(problem.path) for problem in problems}
            missing = {problem.path for problem in problems if problem.code == "missing"}
            document = _without(document, _present(document, {problem.path for problem in problems} - missing))
            for place in missing:
                part = next((part for part in PARTS if place.startswith(f"{part}.")), "")
                if part and turn >= ROUNDS // 2:  # too much of it is wrong
                    document = _without(document, {part})
                    continue
                left = waiting.setdefault(
                    place, [PARTS[place][NUMBERS.index(number)]] if place in PARTS else [number, "stand-in", {}, [{"type": "synthetic"}]]
                )
                parent = _inside(document, place.split(".")[:-1])
                if left and isinstance(parent, dict):
                    cast("dict[str, Any]", parent)[place.rpartition(".")[2]] = left.pop(0)
                else:
                    document = _without(document, {place.rpartition(".")[0]})
        else:
            found = [problem for problem in check(spec) if _section(problem.path) not in touched]
            return [problem for problem in found if "train.model" not in waiting or not _follows_model(problem)]
    return []


def _follows_model(problem: Problem) -> bool:
    return problem.code == "axis-unused" or _section(problem.path) in {("train", name) for name in FOLLOWS_MODEL}


def _section(path: str) -> tuple[str, ...]:
    """The part of a spec a path lies in: `tpu`, `train.mesh`."""
    parts = path.split(".")
    return tuple(parts[:2] if parts[0] == "train" else parts[:1])


def _present(document: dict[str, Any], places: Collection[str]) -> set[str]:
    """The places, or what they would lie in where they are not there themselves (the kind of a union that names none)."""
    found: set[str] = set()
    for place in places:
        parts = place.split(".")
        while len(parts) > 1 and not _is_there(document, parts):
            parts.pop()
        found.add(".".join(parts))
    return found


def _is_there(document: Any, parts: list[str]) -> bool:
    """Also where it is null."""
    around = _inside(document, parts[:-1])
    return _inside(document, parts) is not None or (isinstance(around, dict) and parts[-1] in around)


def _inside(document: Any, parts: list[str]) -> Any:
    for part in parts:
        if isinstance(document, dict):
            document = cast("dict[str, Any]", document).get(part)
        elif isinstance(document, list) and part.isdecimal():
            items = cast("list[Any]", document)
            document = items[int(part)] if int(part) < len(items) else None
        else:
            return None
    return document


def _without(document: Any, places: set[str], here: str = "") -> Any:
    """A copy of `document` without the parts at the dotted `places`."""
    if isinstance(document, dict):
        entries = [(key, f"{here}{key}", value) for key, value in cast("dict[str, Any]", document).items()]
        return {key: _without(value, places, f"{place}.") for key, place, value in entries if place not in places}
    if isinstance(document, list):
        listed = [(f"{here}{index}", value) for index, value in enumerate(cast("list[Any]", document))]
        return [_without(value, places, f"{place}.") for place, value in listed if place not in places]
    return document
