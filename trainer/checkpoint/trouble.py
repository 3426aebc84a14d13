"""What went wrong with storage, in one sentence with the fix. No JAX here."""

from __future__ import annotations

import errno
import os
import re
from typing import Final

from trainer.errors import CheckpointError, PeerLost, SaveFailed, TrainerError

_LASTING: Final = {
    errno.ENOSPC: "free space, or lower checkpoint.keep_last; committed steps are untouched",
    errno.EDQUOT: "free space, or lower checkpoint.keep_last; committed steps are untouched",
    errno.EFBIG: "raise the file size limit (ulimit -f); committed steps are untouched",
    errno.EROFS: "mount the run directory writable; committed steps are untouched",
    errno.EACCES: "give this user write permission on the run directory; committed steps are untouched",
    errno.EPERM: "give this user write permission on the run directory; committed steps are untouched",
}
"""Errors a restart cannot cure, and what can."""
_OUT_OF_REACH: Final = re.compile(r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED)\b")


def save_error(step: int, directory: str, error: BaseException) -> TrainerError:
    """`error`, met while saving `step`, as an exception of ours: lasting causes are CheckpointError, others SaveFailed."""
    if isinstance(error, TrainerError):
        return error
    for cause in _chain(error):
        for number, hint in _LASTING.items():
            # TensorStore's errors are ValueErrors whose text ends in the system's words.
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                return CheckpointError(f"step {step} could not be saved to {directory}: {os.strerror(number)}", hint=hint)
    text = str(error) or type(error).__name__
    return SaveFailed(f"step {step} could not be saved to {directory}: {text[:1000]}", hint="the newest committed step is untouched")


def read_error(directory: str, error: Exception) -> TrainerError:
    """`error`, met while reading, as an exception of ours: CheckpointError, or PeerLost where the storage was out of reach."""
    if isinstance(error, TrainerError):
        return error
    for cause in _chain(error):
        # TensorStore's errors are ValueErrors that begin with the name of their status.
        if isinstance(cause, ConnectionError | TimeoutError) or _OUT_OF_REACH.search(str(cause)):
            return PeerLost(f"{directory} is out of reach: {str(error)[:1000] or type(error).__name__}", hint="a restart tries again")
    reason = (error.strerror if isinstance(error, OSError) else "") or str(error)[:1000]
    return CheckpointError(f"{directory} cannot be read: {reason}", hint="check the path and the permissions")


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
