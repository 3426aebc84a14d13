"""Leaving together: a SIGTERM to any one process becomes the same answer on all of them at the same step.

Before training the parent ends this process on a SIGTERM, since nothing is unsaved (trainer.parent). From the first
poll on, one process alone keeps its own flag; several leave the signal to JAX, whose notifier replaces our handler
during initialisation and whose coordination service finds the step that all of them can still reach.
"""

from __future__ import annotations

import signal

from trainer.parent import link

_asked = False
_training = False


def install_handlers() -> None:
    """Remember SIGTERM and SIGINT; before `initialise`, and only in the main thread."""

    def note(*_: object) -> None:
        global _asked
        _asked = True

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def preemption_requested(step: int) -> bool:
    """Whether all processes leave at `step`; every process must ask at the same steps, in growing order.

    True at one step only, the same on all: save and leave then.
    """
    global _training
    if not _training:
        link.tell(phase="training")
        _training = True
    link.tell(step=step)
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(step))
    return _asked
