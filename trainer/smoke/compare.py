"""`python -m trainer.smoke.compare RUN RUN STEP`: are the checkpoints of a step of two runs bitwise equal?

Prints the number of tensors; what differs goes to standard error, with exit code 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import META_FILE, checkpoint_directory
from trainer.config.run import Checkpoint


def main(one: str, other: str, step: int) -> int:
    expected, got = load(one, step), load(other, step)
    if expected.keys() != got.keys():
        print(f"the checkpoints hold different tensors: {sorted(expected.keys() ^ got.keys())}", file=sys.stderr)
        return 1
    different = [path for path in expected if not same_bits(expected[path], got[path])]
    if different:
        print(f"{len(different)} of {len(expected)} tensors differ, the first is {different[0]}", file=sys.stderr)
        return 1
    print(len(expected))
    return 0


def load(run_directory: str, step: int) -> dict[str, np.ndarray]:
    """Every tensor of a committed step on this host, by `item/path`."""
    described = json.loads(Path(checkpoint_directory(run_directory), str(step), META_FILE).read_text())["items"]
    wanted = {
        item: {path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"]) for path, leaf in leaves.items()}
        for item, leaves in described.items()
    }
    restored = Checkpoints(Checkpoint(), run_directory).restore(step, wanted)
    return {f"{item}/{path}": np.asarray(value) for item, leaves in restored.items() for path, value in leaves.items()}


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.tobytes() == other.tobytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
