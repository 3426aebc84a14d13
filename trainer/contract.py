"""What launcher and trainer agree on: exit codes, environment variables, paths. Standard library only.

Everything the two sides share besides the TrainConfig document is in this file; neither side may
spell one of these names by itself.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """Exit codes of a trainer process; the rendered failure policy acts on them."""

    DONE = 0
    CONFIG = 64  # the config, data or checkpoint directory is unusable: stop
    SOFTWARE = 70  # an unexpected error in the program, or no progress over several attempts: stop
    PREEMPTED = 75  # asked to leave; checkpoint saved: restart without using the budget
    PEER = 76  # another process was lost or timed out: restart within the budget
    NUMERICS = 77  # NaN or Inf: stop


# Codes after which a restart cannot help. 1 and 2: a Python or usage error outside our handlers;
# 126-128: the command could not be started.
FATAL_EXIT_CODES: Final = (1, 2, 64, 70, 77, 126, 127, 128)
FREE_EXIT_CODES: Final = (75,)
# Everything else (76, 134, 137, 139, 143, ...) restarts within the budget.

MEANING: Final[dict[int, str]] = {
    0: "done",
    1: "the program failed outside the trainer's own handlers",
    2: "wrong usage of the command",
    64: "the config, the data or the checkpoint directory cannot be used",
    70: "software error, or several attempts without progress",
    75: "preempted after saving a checkpoint",
    76: "lost a peer process",
    77: "NaN or Inf in the loss or the gradients",
    126: "the command is not executable",
    127: "the command was not found",
    128: "the container could not start the command",
    134: "aborted (SIGABRT)",
    137: "killed (SIGKILL; often out of memory)",
    139: "segmentation fault",
    143: "terminated (SIGTERM) before it could save",
}

# Environment variables set by the launcher in every pod.
RUN_NAME: Final = "NNX_RUN_NAME"
JOB_INDEX: Final = "NNX_JOB_INDEX"  # index of the slice
COMPLETION_INDEX: Final = "JOB_COMPLETION_INDEX"  # index of the host in its slice; set by Kubernetes
NUM_SLICES: Final = "NNX_NUM_SLICES"
HOSTS_PER_SLICE: Final = "NNX_HOSTS_PER_SLICE"
REPLICA: Final = "NNX_REPLICA"  # set by the trainer itself where every slice is a world of its own: its index
REPLICAS: Final = "NNX_REPLICAS"  # and their number
COORDINATOR: Final = "NNX_COORDINATOR"  # host:port of process 0; only where no TPU runtime provides it
JAX_COORDINATOR_PORT: Final = "JAX_COORDINATOR_PORT"  # TPU target: JAX's own name for the port
DEVICES_PER_HOST: Final = "NNX_DEVICES_PER_HOST"  # CPU target only: forced host devices
POD_NAME: Final = "NNX_POD_NAME"
POD_IP: Final = "NNX_POD_IP"
NODE_NAME: Final = "NNX_NODE_NAME"
ATTEMPT: Final = "NNX_RESTART_ATTEMPT"
JOB_UID: Final = "NNX_JOB_UID"  # of the slice's Job, where that replaces pods by itself: its attempts are counted within it
GRACE_SECONDS: Final = "NNX_GRACE_SECONDS"
SPEC_HASH: Final = "NNX_SPEC_HASH"
PEAK_TFLOPS_PER_DEVICE: Final = "NNX_PEAK_BF16_TFLOPS_PER_DEVICE"
TERMINATION_LOG: Final = "NNX_TERMINATION_LOG"  # where the parent writes the pod's last message

# Image facts, baked by the Dockerfile.
IMAGE_REVISION: Final = "NNX_IMAGE_REVISION"

# Paths inside the container.
CONFIG_DIRECTORY: Final = "/etc/nnxlaunch"
CONFIG_FILE: Final = "train.json"
TERMINATION_LOG_PATH: Final = "/dev/termination-log"
CONTAINER_NAME: Final = "trainer"
REPLICATED_JOB: Final = "slice"

# JAX's coordination service. 8482 is what JAX itself uses on TPU since 0.8.1.
COORDINATOR_PORT: Final = 8482
# A survivor of a dead peer waits this long before it exits, so that the process with the cause is seen first.
SURVIVOR_WAIT_SECONDS: Final = 10
# Attempts that may start at the same committed step before the job is ended with Exit.SOFTWARE.
ATTEMPTS_WITHOUT_PROGRESS: Final = 3

# The trainer runs with the config of a directory; these names are fixed in it.
CHECKPOINT_FOLDER: Final = "checkpoints"
COMMIT_FILE: Final = "commit.json"  # in a step's folder of it: what makes the step one that counts
SAVE_SECONDS: Final = "save_seconds"  # in that file: how long the save took, from when it was asked for
METRICS_FOLDER: Final = "metrics"
METRICS_FILE: Final = "metrics.jsonl"  # in that folder, where it is local
LOG_FOLDER: Final = "logs"
ATTEMPTS_FILE: Final = "attempts.json"
SLICES_FOLDER: Final = "slices"  # run directories of slices that are worlds of their own, except the first one's
ROUNDS_FOLDER: Final = "rounds"  # where they meet

# How the last part of a termination message begins that says what to do; `why` repeats it.
HINT: Final = "hint: "

# How process 0 begins to say what ended the attempt before its own; `why` and `status` read it.
ATTEMPT_ENDED: Final = "end of attempt"
# And what it says of a save.
COMMITTED: Final = "checkpoint committed"
GRACE_SHORT: Final = "grace too short"


def grace_needed(save_seconds: float) -> int:
    """Seconds a host must be given to leave with its work: a save, after the wait for the cause where it lost a peer."""
    return math.ceil(save_seconds) + SURVIVOR_WAIT_SECONDS


def slice_directory(run_directory: str, index: int) -> str:
    """Where slice `index`, a world of its own, keeps checkpoints and metrics: the first in the run directory itself."""
    return f"{run_directory.rstrip('/')}/{SLICES_FOLDER}/{index}" if index else run_directory
