"""The laws of the house: who may import whom, what starts without JAX, how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the outside in: a module may import modules of its own layer and of those below it, never above.
TRAINER_LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "trainer.__main__",
        "trainer.worker",
        "trainer.smoke",
        "trainer.probe",
        "trainer.export",
        "trainer.importing",
        "trainer.data.__main__",
        "trainer.decode.__main__",
        "trainer.aot.__main__",
    ),
    ("trainer.run", "trainer.decode"),
    ("trainer.loop", "trainer.aot"),
    ("trainer.worlds",),
    ("trainer.step", "trainer.feed", "trainer.sizes"),
    ("trainer.silent",),
    ("trainer.ledger",),
    ("trainer.observe", "trainer.distributed", "trainer.parent", "trainer.attempts", "trainer.data"),
    ("trainer.parameters",),
    ("trainer.checkpoint",),
    ("trainer.state", "trainer.replicas"),
    ("trainer.model", "trainer.optim", "trainer.loss", "trainer.initial"),
    ("trainer.parallel",),
    ("trainer.errors",),
    ("trainer.config",),
    ("trainer.contract",),
)
LAUNCHER_LAYERS: tuple[tuple[str, ...], ...] = (
    ("launcher.cli", "launcher.__main__"),
    ("launcher.pinning",),
    ("launcher.backend", "launcher.observe", "launcher.explain"),
    ("launcher.doctor",),
    ("launcher.manifest", "launcher.checks"),
    ("launcher.spec",),
    ("launcher.tpu",),
    ("launcher.registry",),
    ("launcher.image",),
    ("launcher.errors", "launcher.redact", "launcher.kinds", "launcher.labels"),
)
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "numpy", "kubernetes", "google.cloud.storage")
WITHOUT_JAX = ("trainer.contract", "trainer.config", "trainer.__main__")
KUBERNETES_CLIENT = "launcher.backend.kubernetes"
"""The modules that begin like this may import the client."""
MAX_LINES = 400


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("launcher", "trainer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """Every name a module imports, at its top or inside a function, in absolute form."""
    package = path.parent.relative_to(ROOT).parts
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node, package)}


def imported(node: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Names of one statement of a module of `package`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = package[: len(package) + 1 - node.level] if node.level else ()
    origin = ".".join((*base, *([node.module] if node.module else ())))
    return {origin, *(f"{origin}.{alias.name}" for alias in node.names)}


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import x", {"p.q", "p.q.x"}),
        ("from .x import y", {"p.q.x", "p.q.x.y"}),
        ("from ..x import y", {"p.x", "p.x.y"}),
    ],
)
def test_imports_of_every_form_are_counted(statement: str, names: set[str]) -> None:
    assert imported(ast.parse(statement).body[0], ("p", "q")) == names


def layer(module: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    """The index of the layer whose longest name begins `module`."""
    named = [(len(name), index) for index, names in enumerate(layers) for name in names if module == name or module.startswith(f"{name}.")]
    return max(named)[1] if named else None


@pytest.mark.parametrize(("package", "layers"), [("trainer", TRAINER_LAYERS), ("launcher", LAUNCHER_LAYERS)])
def test_every_module_has_a_layer_and_imports_only_from_its_own_or_lower_ones(package: str, layers) -> None:
    wrong: list[str] = []
    for module, path in modules():
        if not module.startswith(f"{package}."):
            continue
        own = layer(module, layers)
        if own is None:
            wrong.append(f"{module} has no layer")
            continue
        for name in imports(path):
            other = layer(name, layers)
            if other is not None and other < own:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_trainer_never_imports_the_launcher_and_the_launcher_only_config_and_contract() -> None:
    wrong: list[str] = []
    for module, path in modules():
        for name in imports(path):
            if module.startswith("trainer") and name.split(".")[0] == "launcher":
                wrong.append(f"{module} imports {name}")
            allowed = name in ("trainer.contract", "trainer.config", "trainer") or name.startswith(("trainer.contract.", "trainer.config."))
            if module.startswith("launcher") and name.split(".")[0] == "trainer" and not allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_model_knows_no_mesh_and_only_one_module_knows_the_kubernetes_client() -> None:
    for module, path in modules():
        found = imports(path)
        if module.startswith("trainer.model"):
            assert not {name for name in found if name.startswith(("jax.sharding", "trainer.parallel.mesh"))}, module
        if any(name.split(".")[0] == "kubernetes" for name in found):
            assert module.startswith(KUBERNETES_CLIENT), module


def loaded_by(names: Iterable[str]) -> list[str]:
    """What is heavy of all that a fresh interpreter has loaded after importing `names`."""
    program = f"import {', '.join(names)}, sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_a_fresh_interpreter_imports_it_without_jax(module: str) -> None:
    assert loaded_by([module]) == []


def test_a_fresh_interpreter_imports_the_whole_launcher_without_jax_and_without_a_client() -> None:
    names = [module for module, _ in modules() if module.startswith("launcher") and not module.startswith(KUBERNETES_CLIENT)]
    assert len(names) > 50 and loaded_by(names) == []


def test_what_says_how_a_job_is_doing_does_not_load_what_describes_jobs() -> None:
    program = "import launcher.observe.why, launcher.observe.report, launcher.cli.show, sys; print(*sys.modules, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "launcher.spec", "launcher.manifest", "launcher.tpu", "trainer.config"}.intersection(found)


def test_no_launcher_module_names_an_array_library_even_inside_a_function() -> None:
    arrays = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy"}
    wrong = {module: found for module, path in modules() if module.startswith("launcher")
             if (found := {name for name in imports(path) if name.split(".")[0] in arrays})}  # fmt: skip
    assert not wrong


def test_no_source_file_is_longer_than_the_limit() -> None:
    long = {str(path.relative_to(ROOT)): count for _, path in modules() if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long
