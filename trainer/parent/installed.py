"""What the trainer needs and a launcher's installation does not have, told before anything is written."""

from __future__ import annotations

import importlib.util

from trainer.errors import NotInstalled


def require_jax() -> None:
    """Raises NotInstalled where JAX cannot be imported; imports nothing."""
    if importlib.util.find_spec("jax") is None:
        raise NotInstalled(
            "JAX is not installed here: training needs more than the launcher does",
            hint="run `./setup.sh train` in the clone, or use the trainer's image",
        )
