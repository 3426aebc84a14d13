"""What ends a job, what restarts it, and what restarts it for free: the table of `launcher.explain.outcome`, on real pods.

Each row is a job of two hosts. Worker 1 ends as the row says; worker 0 waits for its SIGTERM, as a survivor does.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from launcher.explain.outcome import Effect, Event, Mode, effect
from tests.cluster.tools import CHEAP_IMAGE, PATIENCE_SECONDS, cheap_job, kubectl
from trainer.contract import FATAL_EXIT_CODES, SURVIVOR_WAIT_SECONDS

AT_ONCE = 8

# In the first attempt only. An eviction or a delete comes from outside: the pod then ends with CODE.
ENDS = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
if os.environ["NNX_RESTART_ATTEMPT"] != "0":
    sys.exit(0)
if os.environ["JOB_COMPLETION_INDEX"] == "1":
    if OUTSIDE:
        print("told to leave from here on, it does", flush=True)
        signal.sigwait([signal.SIGTERM])
    sys.exit(CODE)
signal.sigwait([signal.SIGTERM])
sys.exit(143)
"""
# The trainer's own parent process, with a child that dies of its peer as JAX lets it die, SECONDS after the peer.
SURVIVES = """
import os, socket, sys
if os.environ["NNX_RESTART_ATTEMPT"] != "0":
    sys.exit(0)
host, port = os.environ["NNX_COORDINATOR"].rsplit(":", 1)
if os.environ["JOB_COMPLETION_INDEX"] == "1":
    child = '''
import os, socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2]))).sendall(b"here")
        break
    except OSError:
        time.sleep(0.1)
sys.exit(CODE)
'''
else:
    child = '''
import os, socket, sys, time
server = socket.create_server(("", int(sys.argv[2])))
server.accept()[0].recv(4)
time.sleep(SECONDS)
print("Terminating process because the JAX distributed service detected fatal errors", file=sys.stderr, flush=True)
os.abort()
'''
from trainer.parent.process import Parent, leave
leave(Parent([sys.executable, "-c", child, host, port]).run())
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    end: int | Event
    mode: Mode = "smart"
    budget: int = 1
    peer_seconds: int | None = None  # the peer's process dies this long after the cause; None: it waits to be told
    deleted: int | None = None  # by `kubectl delete pod`, which is no disruption: then it ends with this code

    @property
    def name(self) -> str:
        what = "drain" if isinstance(self.end, Event) else f"x{self.end}"
        deleted = "" if self.deleted is None else "-deleted"
        return f"{self.mode}-{what}{deleted}-{self.budget}" + ("" if self.peer_seconds is None else f"-peer{self.peer_seconds}")


ROWS = [
    *(Row(end=code, budget=3) for code in FATAL_EXIT_CODES),
    *(Row(end=code) for code in (75, 76, 134, 137, 139, 143)),
    *(Row(end=code, budget=0) for code in (75, 76)),
    Row(end=Event.DISRUPTION, budget=0),
    Row(end=75, deleted=75, budget=0),
    Row(end=143, deleted=143),
    *(Row(end=code, budget=3, peer_seconds=seconds) for code in (64, 75) for seconds in (0, 1, 5)),
    *(Row(end=end, mode="strict") for end in (70, 75, 134, Event.DISRUPTION)),
    *(Row(end=end, mode="simple") for end in (64, 75, Event.DISRUPTION)),
]


def judge(backend: KubernetesBackend, image: str, row: Row) -> str:
    """Empty when the cluster did what the table says."""
    outside = row.deleted is not None or isinstance(row.end, Event)
    code = 143 if isinstance(row.end, Event) else row.end
    program = SURVIVES if row.peer_seconds is not None else ENDS
    program = program.replace("CODE", str(code)).replace("OUTSIDE", str(outside)).replace("SECONDS", str(row.peer_seconds))
    resources = {"cpu": "10m", "memory": "64Mi"}
    failure = {"mode": row.mode, "max_restarts": row.budget}
    grace = 2 if row.peer_seconds is None else 2 * SURVIVOR_WAIT_SECONDS
    where = CHEAP_IMAGE if row.peer_seconds is None else {"reference": image, "pull_policy": "never"}
    backend.create(cheap_job(row.name, program, failure=failure, grace_seconds=grace, resources=resources, image=where))
    if outside:
        # PID 1 of a container does not hear a SIGTERM that comes before it listens.
        next(backend.logs(row.name, follow=True, worker=1))
        (victim,) = (pod.name for pod in backend.get(row.name).pods if pod.worker == 1)
        take_away(backend.namespace, victim, evict=row.deleted is None)
    *_, status = backend.watch(row.name, timeout_seconds=PATIENCE_SECONDS)
    expected = {
        Effect.STOP: (JobState.FAILED, 0, 0),
        Effect.FREE: (JobState.COMPLETED, 0, 1),
        Effect.COUNTED: (JobState.COMPLETED, 1, 0) if row.budget else (JobState.FAILED, 0, 0),
    }[effect(row.mode, row.end)]
    found = (status.state, status.restarts_used, status.restarts_free)
    if found == expected and (status.state is JobState.COMPLETED or f"worker 1 exited with {code}" in status.message):
        backend.delete(row.name)
        return ""
    return f"{row.name}: {found}, not {expected}: {status.message}"


def take_away(namespace: str, pod: str, *, evict: bool) -> None:
    if not evict:
        kubectl("-n", namespace, "delete", "pod", pod, "--wait=false")
        return
    wish = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
    kubectl("create", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction", "-f", "-", stdin=json.dumps(wish))


def test_every_row_of_the_failure_table_is_what_the_cluster_does(backend: KubernetesBackend, image: str) -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [answer for answer in pool.map(lambda row: judge(backend, image, row), ROWS) if answer]
    if wrong:
        pytest.fail("\n".join(wrong))
