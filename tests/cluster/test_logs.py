"""Logs of real pods that die: nothing lost, nothing twice, in order."""

from __future__ import annotations

import random
import threading

from launcher.backend import JobState, LogLine
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import cheap_job, kubectl, nnxlaunch

ROUNDS = 3
BURST = 2_000
# Every pod numbers its lines: a burst, then slowly until it is told to leave; its last line says how many there were.
TALKS = """
import itertools, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
attempt = int(os.environ["NNX_RESTART_ATTEMPT"])
for number in itertools.count():
    print("line", number)
    if number >= BURST and (attempt == ROUNDS or signal.sigtimedwait([signal.SIGTERM], 0.05)):
        break
print("end", number + 1)
sys.exit(0 if attempt == ROUNDS else 75)
""".replace("BURST", str(BURST)).replace("ROUNDS", str(ROUNDS))


def test_followed_logs_have_every_line_once_however_the_pods_die(backend: KubernetesBackend, namespace: str) -> None:
    backend.create(cheap_job("talks", TALKS, grace_seconds=60))  # which no pod needs
    lines: list[LogLine] = []
    seen: dict[tuple[int, int], int] = {}
    choice = random.Random(7)

    def kill(attempt: int) -> None:
        pods = [pod.name for pod in backend.get("talks").pods if pod.attempt == attempt]
        kubectl("-n", namespace, "delete", "pod", choice.choice(pods), "--wait=false")

    killers: list[threading.Thread] = []
    for line in backend.logs("talks", follow=True):
        lines.append(line)
        seen[line.attempt, line.worker] = seen.get((line.attempt, line.worker), 0) + 1
        both = all(seen.get((line.attempt, worker), 0) > BURST for worker in (0, 1))
        if both and line.attempt < ROUNDS and len(killers) == line.attempt:
            killers.append(threading.Thread(target=kill, args=(line.attempt,)))
            killers[-1].start()
    for killer in killers:
        killer.join()
    assert backend.get("talks").state is JobState.COMPLETED
    for attempt in range(ROUNDS + 1):
        for worker in (0, 1):
            said = [line.text for line in lines if (line.attempt, line.worker) == (attempt, worker)]
            count = len(said) - 1
            assert said == [*(f"line {number}" for number in range(count)), f"end {count}"], (attempt, worker, said[-3:])

    own = kubectl("-n", namespace, "logs", backend.get("talks").pods[1].name).splitlines()
    one = nnxlaunch("logs", "talks", "-n", namespace, "--slice", "0", "--worker", "1", "--since", "1h")
    assert one.stdout.splitlines() == [f"[s0/w1 a{ROUNDS}] {text}" for text in own]
    some = nnxlaunch("logs", "talks", "-n", namespace, "--grep", "^end")
    assert sorted(some.stdout.splitlines()) == [f"[s0/w{worker} a{ROUNDS}] end {BURST + 1}" for worker in (0, 1)]
    backend.delete("talks")
