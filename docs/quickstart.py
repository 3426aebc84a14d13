"""The first run, for `make run`: submit a job, kill one of its processes, watch it resume and finish.

Everything goes through the command line a user types, and every command is printed before it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SPEC = "k8s/examples/quickstart.job.yaml"
NAME = "quickstart"
RUN = Path("runs") / NAME
STEPS_BEFORE_THE_KILL = 30


def main() -> int:
    started = time.monotonic()
    if elsewhere := run_of_another_clone():
        print(f"error: a job {NAME} of this machine runs in {elsewhere}", file=sys.stderr)
        print(f"hint: let it end, or stop it: nnxlaunch cancel {NAME} --backend local", file=sys.stderr)
        return 1
    say("0. A fresh start: an earlier quickstart and its run directory are removed.")
    nnxlaunch("cancel", NAME, check=False)
    shutil.rmtree(RUN, ignore_errors=True)
    say("1. Submit: the checked spec becomes a JobSet, the JobSet becomes two trainer processes.")
    nnxlaunch("submit", SPEC, *sys.argv[1:])
    follower = subprocess.Popen(command("logs", NAME, "-f"))
    try:
        kill_one_process()
        finished = nnxlaunch("wait", NAME, "--timeout", "900", check=False)
        follower.wait(timeout=30)
    except KeyboardInterrupt:
        follower.terminate()
        say("Interrupted: the job is cancelled.")
        nnxlaunch("cancel", NAME, check=False)
        return 130
    nnxlaunch("status", NAME, check=False)
    return finished.returncode or summary(records(), time.monotonic() - started)


def run_of_another_clone() -> str:
    """The run directory of an unfinished job of the same name that was started elsewhere: jobs are a user's, not a clone's."""
    words = [sys.executable, "-m", "launcher", "list", "--backend", "local", "--output", "json"]
    for job in json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout):
        directory = job["annotations"].get("nnxlaunch/run-directory", "")
        if job["name"] == NAME and job["state"] not in ("completed", "failed") and directory != str(RUN.absolute()):
            return directory
    return ""


def kill_one_process() -> None:
    """SIGKILL the second host's trainer once a checkpoint is committed and a few more steps are done."""
    while not (committed() and steps() >= STEPS_BEFORE_THE_KILL):
        if status()["state"] not in ("pending", "running"):
            return
        time.sleep(0.5)
    pid = int(next(pod["node"] for pod in status()["pods"] if pod["worker"] == 1).removeprefix("pid "))
    say(f"2. kill -9 {pid}: the trainer of the second host dies. The job restarts within its budget and resumes.")
    os.kill(pid, signal.SIGKILL)


def summary(lines: list[dict[str, Any]], seconds: float) -> int:
    """The last screen; 1 when the run did not show what it is there to show."""
    trained = [line for line in lines if line["kind"] == "step"]
    resumed = [str(line["step"]) for line in lines if line.get("event") == "resumed"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    speeds = sorted(line["tokens_per_second"] for line in trained if "tokens_per_second" in line)
    say(f"3. Done in {seconds:.0f} s.")
    print(f"first loss    {trained[0]['loss']:.4f}")
    print(f"last loss     {trained[-1]['loss']:.4f}")
    print(f"eval loss     {evaluations[-1]['loss']:.4f}   (perplexity {evaluations[-1]['perplexity']:.2f} a byte)")
    print(f"speed         {speeds[len(speeds) // 2]:,.0f} tokens/s")
    print(f"resumed from  step {', '.join(resumed) or 'nowhere'}")
    print(f"checkpoint    {RUN / 'checkpoints' / str(committed()[-1])}")
    print("\nNext:")
    print("  .venv/bin/nnxlaunch explain k8s/examples/v5p-128-spot.job.yaml   what a real spec means")
    print("  .venv/bin/nnxlaunch init > job.yaml                              a spec of your own")
    print("  less README.md")
    if resumed and trained[-1]["loss"] < trained[0]["loss"]:
        return 0
    print("\nerror: the run did not resume, or its loss did not fall", file=sys.stderr)
    return 1


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def command(*arguments: str) -> list[str]:
    words = [*arguments, "--backend", "local"]
    print(f"\n$ .venv/bin/nnxlaunch {' '.join(words)}", flush=True)
    return [sys.executable, "-m", "launcher", *words]


def nnxlaunch(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), check=check)


def status() -> dict[str, Any]:
    words = [sys.executable, "-m", "launcher", "status", NAME, "--backend", "local", "--output", "json"]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def records() -> list[dict[str, Any]]:
    """What the trainer reported so far; a last line that is still being written is left out."""
    file = RUN / "metrics" / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps() -> int:
    return max((line["done"] for line in records() if line["kind"] == "step"), default=0)


def committed() -> list[int]:
    return sorted(int(path.parent.name) for path in (RUN / "checkpoints").glob("*/commit.json") if path.parent.name.isdigit())


if __name__ == "__main__":
    sys.exit(main())
