"""The laws of the house: who may import whom, what starts without JAX, how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the outside in: a module may import modules of its own layer and of those below it, never above.
TRAINER_LAYERS: tuple[tuple[str, ...], ...] = (
    ("trainer.__main__", "trainer.worker", "trainer.smoke", "trainer.export", "trainer.data.__main__"),
    ("trainer.run",),
    ("trainer.loop", "trainer.step", "trainer.feed"),
    ("trainer.observe", "trainer.distributed", "trainer.parent", "trainer.attempts", "trainer.data"),
    ("trainer.checkpoint",),
    ("trainer.state",),
    ("trainer.model", "trainer.optim", "trainer.loss", "trainer.initial"),
    ("trainer.parallel",),
    ("trainer.errors",),
    ("trainer.config",),
    ("trainer.contract",),
)
LAUNCHER_LAYERS: tuple[tuple[str, ...], ...] = (
    ("launcher.cli", "launcher.__main__"),
    ("launcher.backend", "launcher.observe", "launcher.image", "launcher.explain"),
    ("launcher.manifest", "launcher.checks"),
    ("launcher.spec",),
    ("launcher.tpu",),
    ("launcher.errors", "launcher.redact", "launcher.kinds"),
)
WITHOUT_JAX = (
    "launcher.cli",
    "launcher.spec",
    "launcher.checks",
    "launcher.manifest",
    "trainer.contract",
    "trainer.config",
    "trainer.__main__",
)
MAX_LINES = 400


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("launcher", "trainer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


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
            assert module.startswith("launcher.backend.kubernetes"), module


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_a_fresh_interpreter_imports_it_without_jax(module: str) -> None:
    heavy = "('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'numpy', 'kubernetes', 'google.cloud.storage')"
    program = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_source_file_is_longer_than_the_limit() -> None:
    long = {str(path.relative_to(ROOT)): count for _, path in modules() if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long
