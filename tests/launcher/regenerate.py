"""Write the rendered manifests beside every example spec: `python -m tests.launcher.regenerate`."""

from __future__ import annotations

from pathlib import Path

from launcher.checks import load
from launcher.manifest import render, to_yaml

EXAMPLES = Path(__file__).parents[2] / "k8s" / "examples"


def specs() -> list[Path]:
    return sorted(EXAMPLES.glob("*.job.yaml"))


def golden(spec: Path) -> Path:
    """The rendered manifests of `NAME.job.yaml` are in `NAME.rendered.yaml`."""
    return spec.with_name(spec.name.replace(".job.yaml", ".rendered.yaml"))


if __name__ == "__main__":
    for path in specs():
        golden(path).write_text(to_yaml(render(load(path))), encoding="utf-8")
        print(golden(path))
