"""The first run, for `make run`: submit a job, kill one of its processes, watch it resume and finish.

Everything goes through the command line a user types, and every command is printed before it runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPEC = "k8s/examples/quickstart.job.yaml"
NAME = "quickstart"
RUN = Path("runs") / NAME
STEPS_BEFORE_THE_KILL = 30


def main() -> int:
    os.environ["NNXLAUNCH_BACKEND"] = "local"
    started = time.monotonic()
    known = len(records())
    say("1. Submit: the checked spec becomes a JobSet, the JobSet becomes two trainer processes.")
    nnxlaunch("submit", SPEC, "--replace", *sys.argv[1:])
    follower = subprocess.Popen(command("logs", NAME, "-f"))
    killer = threading.Thread(target=kill_one_process, args=(known,), daemon=True)
    killer.start()
    finished = nnxlaunch("wait", NAME, "--timeout", "900", check=False)
    follower.wait(timeout=30)
    if finished.returncode:
        nnxlaunch("status", NAME, check=False)
        return finished.returncode
    nnxlaunch("status", NAME)
    summary(records()[known:], time.monotonic() - started)
    return 0


def kill_one_process(known: int) -> None:
    """SIGKILL the second host's trainer once a checkpoint is committed and a few more steps are done."""
    wait_for(lambda: steps(known) >= STEPS_BEFORE_THE_KILL and committed())
    pid = next(pid for pid, words in processes() if "trainer.worker" in words and f"{NAME}-slice-0-1" in words)
    say(f"2. kill -9 {pid}: the trainer of the second host dies. The job restarts within its budget and resumes.")
    os.kill(pid, signal.SIGKILL)


def summary(lines: list[dict[str, Any]], seconds: float) -> None:
    trained = [line for line in lines if line["kind"] == "step"]
    resumed = [line for line in lines if line.get("event") == "resumed"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    speeds = sorted(line["tokens_per_second"] for line in trained if "tokens_per_second" in line)
    say(f"3. Done in {seconds:.0f} s.")
    print(f"first loss    {trained[0]['loss']:.4f}")
    print(f"last loss     {trained[-1]['loss']:.4f}")
    print(f"eval loss     {evaluations[-1]['loss']:.4f}   (perplexity {evaluations[-1]['perplexity']:.2f} a byte)")
    print(f"speed         {speeds[len(speeds) // 2]:,.0f} tokens/s")
    print(f"resumed from  step {', '.join(str(line['step']) for line in resumed) or 'nowhere: it was never killed'}")
    print(f"checkpoint    {RUN / 'checkpoints' / str(committed()[-1])}")
    print("\nNext:")
    print("  .venv/bin/nnxlaunch explain k8s/examples/v5p-128-spot.job.yaml   what a real spec means")
    print("  .venv/bin/nnxlaunch init > job.yaml                                a spec of your own")
    print("  less README.md")


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def command(*arguments: str) -> list[str]:
    print(f"\n$ nnxlaunch {' '.join(arguments)}", flush=True)
    return [sys.executable, "-m", "launcher", *arguments]


def nnxlaunch(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), check=check)


def records() -> list[dict[str, Any]]:
    """What the trainer reported so far; a last line that is still being written is left out."""
    file = RUN / "metrics" / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps(known: int) -> int:
    return max((line["done"] for line in records()[known:] if line["kind"] == "step"), default=0)


def committed() -> list[int]:
    return sorted(int(path.parent.name) for path in (RUN / "checkpoints").glob("*/commit.json") if path.parent.name.isdigit())


def processes() -> list[tuple[int, str]]:
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=", "-o", "command="], capture_output=True, text=True, check=True).stdout
    return [(int(pid), words) for pid, _, words in (line.strip().partition(" ") for line in listing.splitlines())]


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
