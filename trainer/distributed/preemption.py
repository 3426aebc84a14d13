"""Leaving together: a SIGTERM to any one process becomes the same answer on all of them at the same step.

Before training the parent ends this process on a SIGTERM, since nothing is unsaved (trainer.parent). From the first
poll on, one process alone keeps its own flag; several leave the signal to JAX, whose notifier replaces our handler
during initialisation and whose coordination service finds the step that all of them can still reach.
"""

from __future__ import annotations

import signal

from trainer.parent import link

_asked = False
_polls = 0


def install_handlers() -> None:
    """Remember SIGTERM and SIGINT; before `initialise`, and only in the main thread."""

    def note(*_: object) -> None:
        global _asked
        _asked = True

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def asked_to_leave() -> bool:
    """Whether this process was, as far as it can tell by itself: where there are several, JAX has the signal."""
    return _asked


def preemption_requested(step: int) -> bool:
    """Whether all processes leave now, after `step` finished steps; every process must ask at the same points of its work.

    True at one point only, the same on all: save and leave then.
    """
    global _polls
    if not _polls:
        link.tell(phase="training")
    _polls += 1
    link.tell(step=step)
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(_polls))  # wants a number that grows
    return _asked
