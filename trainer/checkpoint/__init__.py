"""Save, commit, verify, restore onto any mesh.

`commit`, `storage`, `layout`, `mismatch` and `retention` import no JAX, and neither does this package until
`Checkpoints` is asked for: the trainer's parent process reads commit files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoints"]


def __getattr__(name: str) -> Any:
    if name == "Checkpoints":
        from trainer.checkpoint.checkpoints import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
