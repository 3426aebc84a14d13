"""The trainer's exception tree; each class carries the exit code its process ends with.

TrainerError
├── DataError          the data cannot be read, or is not what the checkpoint was trained on (64)
├── CheckpointError    the checkpoint directory cannot be used (64)
│   ├── ResumeMismatch the run directory holds another run; names every difference (64)
│   └── SaveFailed     a save failed or took too long for a reason that may pass (76)
├── NumericsError      NaN or Inf in loss or gradients (77)
├── Preempted          asked to leave; whatever could be saved is committed (75)
├── PeerLost           another process vanished or never came (76)
├── WorldError         the processes do not form one world: a duplicate, a wrong count, another version (64)
├── NotInstalled       JAX is missing (64)
├── CompilerRefused    the compiler does not take the step, for a reason other than memory (64)
└── NoProgress         several attempts started at the same committed step (70)
`trainer.config.ConfigError` (a ValueError, 64) stands beside it because the launcher raises it too.
"""

from __future__ import annotations

from trainer.contract import Exit


class TrainerError(Exception):
    exit_code: Exit = Exit.SOFTWARE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class DataError(TrainerError):
    exit_code = Exit.CONFIG


class CheckpointError(TrainerError):
    exit_code = Exit.CONFIG


class ResumeMismatch(CheckpointError):
    pass


class SaveFailed(CheckpointError):
    exit_code = Exit.PEER


class NumericsError(TrainerError):
    exit_code = Exit.NUMERICS


class Preempted(TrainerError):
    exit_code = Exit.PREEMPTED


class PeerLost(TrainerError):
    exit_code = Exit.PEER


class WorldError(TrainerError):
    exit_code = Exit.CONFIG


class NotInstalled(TrainerError):
    exit_code = Exit.CONFIG


class CompilerRefused(TrainerError):
    exit_code = Exit.CONFIG


class NoProgress(TrainerError):
    exit_code = Exit.SOFTWARE
