"""Draw docs/learning.svg from docs/learning.json. Needs matplotlib only."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false
from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

STYLES = {
    "torch_float32": ("PyTorch, float32", "#999999", 3.0, "-"),
    "trainer_float32": ("trainer, float32", "#0b62a4", 1.2, "-"),
    "trainer_bfloat16": ("trainer, bfloat16", "#d1495b", 1.2, "--"),
}


def main(path: Path) -> None:
    result = json.loads(path.read_text())
    matplotlib.rcParams["svg.hashsalt"] = "learning"  # the same file from the same numbers
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, (label, colour, width, line) in STYLES.items():
        run = result["runs"][name]
        steps = [10 * index + 5 for index in range(len(run["loss"]))]
        label = f"{label}: {run['bits_per_byte']:.4f} held out"
        axes.plot(steps, [loss / math.log(2) for loss in run["loss"]], line, color=colour, linewidth=width, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, bits a token (mean of 10 steps)")
    axes.set_ylim(1.5, 6)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
