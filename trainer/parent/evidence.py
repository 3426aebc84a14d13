"""What is kept of a failed process: the pod's termination message and a crash bundle without secrets."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trainer.contract import ATTEMPT, COMPLETION_INDEX, HINT, JOB_INDEX, TERMINATION_LOG, TERMINATION_LOG_PATH

MESSAGE_BYTES: Final = 2000  # Kubernetes keeps 4096 a container and 12 kB a pod
TAIL_BYTES: Final = 64 * 1024
REMOVED: Final = "[removed]"
CRASH: Final = ".crash.json"

_SECRET_NAME: Final = re.compile(
    r"secret|token|passw|passphrase|credential|api_?key|access_?key|private|auth|cookie|(^|_)key($|_)", re.IGNORECASE
)
_SECRET_VALUE: Final = re.compile(
    r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)"  # user:password in a URL
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bya29\.[\w-]{10,}|\bAIza[\w-]{30,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    re.DOTALL,
)
_SHORTEST_SECRET: Final = 6


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: REMOVED if _SECRET_NAME.search(name) else _SECRET_VALUE.sub(REMOVED, value) for name, value in sorted(environment.items())
    }


def redact(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the values of secret variables and without what looks like a credential."""
    secrets = {value for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    return _SECRET_VALUE.sub(REMOVED, text)


def write_termination_message(text: str, environment: Mapping[str, str]) -> None:
    """Where Kubernetes reads it, or where the local backend asks for it; nowhere else."""
    target = environment.get(TERMINATION_LOG) or TERMINATION_LOG_PATH
    if target == TERMINATION_LOG_PATH and not os.access(target, os.W_OK):
        return
    try:
        Path(target).write_text(_shortened(redact(text, environment)))
    except OSError as error:
        print(f"cannot write {target}: {error.strerror}", file=sys.stderr)


def _shortened(text: str) -> str:
    """What does not fit is left out before the hint, not of it; of a hint that leaves no room for the cause nothing is kept."""
    head, mark, hint = text.rpartition(f"\n{HINT}")
    end = f"{mark}{hint}".encode()
    if not mark or len(end) > MESSAGE_BYTES // 2:
        head, end = text, b""
    return (head.encode()[: MESSAGE_BYTES - len(end)] + end).decode(errors="ignore")


def write_bundle(log_file: Path | None, facts: Mapping[str, Any], *, tail: str, stacks: str, environment: Mapping[str, str]) -> Path | None:
    """A JSON file beside the log, else beside the termination message, else in the temporary directory; None where none can be written."""
    bundle = {
        **facts,
        "argv": sys.orig_argv,
        "environment": without_secrets(environment),
        "stacks": stacks.splitlines(),
        "last_lines": redact(tail, environment).splitlines(),
    }
    where = "-".join(re.sub(r"\D", "", environment.get(name, "")) or "0" for name in (ATTEMPT, JOB_INDEX, COMPLETION_INDEX))
    name = f"nnxlaunch-crash-{where}-{os.getpid()}.json"
    targets = [Path(crash_stem(str(log_file.with_suffix("")), facts["exit_code"]) + CRASH)] if log_file else []
    targets += [Path(environment[TERMINATION_LOG]).with_name(name)] if environment.get(TERMINATION_LOG) else []
    for target in [*targets, Path(tempfile.gettempdir(), name)]:
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w") as file:
                json.dump(bundle, file, indent=1)
            return target
        except OSError as error:
            print(f"cannot write {target}: {error.strerror}", file=sys.stderr)
    return None


def crash_stem(log: str, code: int) -> str:
    """Of the bundle beside a log: whoever lists the folder knows the exit codes."""
    return f"{log}.exit-{code}"


def container_memory_kills() -> int:
    """How often the memory limit of this container (cgroup v2 or v1) killed a process; 0 where that is not known."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            found = re.search(r"^oom_kill (\d+)$", Path(path).read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0
