"""Reading a scene from a cluster in at most five requests, however large the job is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from launcher.backend.kubernetes_api import EVENT, JOB, JOBSET, POD, Api, Resource
from launcher.backend.kubernetes_errors import NotAllowed, TemporarilyUnavailable
from launcher.backend.kubernetes_queue import workload_of
from launcher.backend.scene import USUAL_EVENTS, Scene, is_queued, own_events
from launcher.backend.status import JOBSET_NAME_LABEL, QUEUE_LABEL, Manifest, PodStatus, job_status, pod_status, replicated_jobs
from launcher.backend.values import items, mapping
from launcher.errors import NnxlaunchError, NotFound, Unavailable
from launcher.labels import ACCELERATOR_LABEL

REQUESTS: Final = 5
LOG_LINES: Final = 2000
NODE: Final = Resource("v1", "Node", "nodes")
KUEUE: Final = "kueue.x-k8s.io"
KUEUE_VERSIONS: Final = ("v1beta2", "v1beta1")
"""What clusters serve, newest first: 0.16 and later, and before."""


class SceneReader:
    """Reads scenes of one namespace; remembers what this user may not read and what the cluster does not serve."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._kueue = 0  # index of the version that is served
        self._denied: set[str] = set()
        self._left = 0
        self._lock = threading.Lock()

    def read(self, jobset: Manifest) -> Scene:
        """`jobset` has just been read: that was the first request."""
        self._left = REQUESTS - 1
        self._absent: list[str] = []
        parts: dict[str, Any] = self._queued(jobset) if is_queued(jobset) else self._started(jobset)
        return Scene(
            jobset=jobset,
            read_at=self._api.now().isoformat(),
            absent=tuple(self._absent),
            unreadable=tuple(sorted(self._denied)),
            **parts,
        )

    def _queued(self, jobset: Manifest) -> dict[str, Any]:
        queue = jobset["metadata"]["labels"][QUEUE_LABEL]
        workloads = self._workloads()
        found: dict[str, Any] = {"workloads": tuple(workloads)}
        local = self._get(self._of_kueue("LocalQueue", "localqueues"), self._namespace, queue)
        if local:
            found["local_queue"] = local
            if cluster := self._get(self._of_kueue("ClusterQueue", "clusterqueues"), "", local["spec"]["clusterQueue"]):
                found["cluster_queue"] = cluster
        if workload_of(jobset, workloads) is None:
            found["events"] = self._events(jobset)
        elif local:
            found["pending"] = self._pending(local)
        return found

    def _started(self, jobset: Manifest) -> dict[str, Any]:
        own = f"{JOBSET_NAME_LABEL}={jobset['metadata']['name']}"
        events = _Meanwhile(lambda: self._events(jobset))
        pods = self._list(POD, labels=own)
        states = [pod_status(pod) for pod in pods]
        waiting = [pod for pod, state in zip(pods, states, strict=True) if state.node is None and not state.leaving]
        lost = any(_lost(pod) for pod in pods)
        more = _Meanwhile(lambda: {"nodes": self._nodes(waiting or pods)} if waiting or lost else self._speech(states))
        # Jobs tell how a job came to fail; of one that is not there yet, what counts is who has its place.
        others = {"rivals": self._rivals(jobset)} if waiting and not _finished(jobset) else {"jobs": tuple(self._list(JOB, labels=own))}
        return {"pods": tuple(pods), **others, "events": events.result(), **more.result()}

    def _rivals(self, jobset: Manifest) -> tuple[Manifest, ...]:
        """From the JobSets, which count their Jobs: those are many, and the template of the pods is in each of them."""
        name = jobset["metadata"]["name"]
        found = self._ask("jobsets", lambda: self._api.list_whole(JOBSET, self._namespace))
        return tuple(rival for other in found or () if other["metadata"]["name"] != name for rival in _parts_with_pods(other))

    def _workloads(self) -> list[Manifest]:
        """Of the cluster where this user may list them, so that whoever uses the quota has a name; else of the namespace."""
        for version in range(self._kueue, len(KUEUE_VERSIONS)):
            self._kueue = version
            resource = self._of_kueue("Workload", "workloads")
            try:
                found = self._ask("workloads of other namespaces", lambda: self._api.list_whole(resource, ""))  # noqa: B023
                return self._list(resource) if found is None else found
            except TemporarilyUnavailable:
                raise
            except (NotFound, Unavailable):  # this version is not served
                continue
        self._absent.append("api/kueue")
        return []

    def _pending(self, local: Manifest) -> tuple[Manifest, ...]:
        """Kueue's order of the cluster queue, else of the local queue."""
        version = f"visibility.{KUEUE}/{KUEUE_VERSIONS[self._kueue]}"
        paths = {
            "positions": Resource(version, "", "clusterqueues").path("", local["spec"]["clusterQueue"], "pendingworkloads"),
            "positions in a queue": Resource(version, "", "localqueues").path(
                self._namespace, local["metadata"]["name"], "pendingworkloads"
            ),
        }
        for what, path in paths.items():
            try:
                listing = self._ask(what, lambda: self._api.read(path, "read the order of the queue"))  # noqa: B023
            except (NotFound, Unavailable):  # this service of Kueue is optional
                self._denied.add(what)
                continue
            if listing is not None:
                return tuple(items(listing.get("items")))
        return ()

    def _events(self, jobset: Manifest) -> tuple[Manifest, ...]:
        unusual = ",".join(f"reason!={reason}" for reason in USUAL_EVENTS)
        return own_events(jobset, self._list(EVENT, fields=unusual))

    def _nodes(self, pods: list[Manifest]) -> tuple[Manifest, ...]:
        """Those of TPUs where the job wants TPUs; the alternatives are part of the answer, so not only those it asks for."""
        tpu = any(ACCELERATOR_LABEL in mapping(pod["spec"].get("nodeSelector")) for pod in pods)
        found = self._ask("nodes", lambda: self._api.list_whole(NODE, "", labels=ACCELERATOR_LABEL if tpu else None))
        return tuple(map(_lean_node, found or []))

    def _speech(self, pods: list[PodStatus]) -> dict[str, Any]:
        """The end of process 0's log; empty as well where the node that has it does not answer: a log is not worth failing for."""
        pod = _process_0(pods)
        if pod is None:
            return {}
        try:
            lines = self._ask(
                "pods/log", lambda: list(self._api.log(self._namespace, pod.name, container=pod.container, follow=False, tail=LOG_LINES))
            )
        except (NotFound, Unavailable):
            return {}
        return {"log": tuple(line.decode("utf-8", "replace") for line in lines or ())}

    def _of_kueue(self, kind: str, plural: str) -> Resource:
        return Resource(f"{KUEUE}/{KUEUE_VERSIONS[self._kueue]}", kind, plural)

    def _list(self, resource: Resource, *, labels: str | None = None, fields: str | None = None) -> list[Manifest]:
        if not self._take():
            return []
        return self._api.list_whole(resource, self._namespace, labels=labels, fields=fields)

    def _take(self) -> bool:
        """Whether there is a request left; it is taken."""
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _get(self, resource: Resource, namespace: str, name: str) -> Manifest | None:
        try:
            return self._ask(resource.plural, lambda: self._api.get(resource, namespace, name))
        except NotFound:
            self._absent.append(f"{resource.kind.lower()}/{name}")
            return None

    def _ask[T](self, what: str, ask: Callable[[], T]) -> T | None:
        """None where this user may not, or where the requests are used up."""
        if what in self._denied or not self._take():
            return None
        try:
            return ask()
        except NotAllowed:
            self._denied.add(what)
            return None


class _Meanwhile[T]:
    """`ask` in a thread of its own: the server answers one request while another answer is being parsed."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Waits; raises what `ask` has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        self._error: NnxlaunchError | None = None
        try:
            self._found = self._ask()
        except NnxlaunchError as error:
            self._error = error


def _process_0(pods: list[PodStatus]) -> PodStatus | None:
    started = [pod for pod in pods if (pod.slice_index, pod.worker) == (0, 0) and pod.started_at]
    return max(started, key=lambda pod: pod.attempt, default=None)


def _lost(pod: Manifest) -> bool:
    """Whether it runs and is not ready: a trainer has no readiness probe, so its node has stopped to answer."""
    status = mapping(pod.get("status"))
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in items(status.get("conditions")))
    return status.get("phase") == "Running" and not ready and "deletionTimestamp" not in pod["metadata"]


def _parts_with_pods(jobset: Manifest) -> Iterator[Manifest]:
    """Of each replicated job with pods: whose it is, how many pods that are, on which nodes they may be, and what they take there."""
    counts = {part["name"]: part for part in items(mapping(jobset.get("status")).get("replicatedJobsStatus"))}
    name = jobset["metadata"]["name"]
    for part in replicated_jobs(jobset):
        job = part["template"]["spec"]
        pod, hosts, count = job["template"]["spec"], int(job.get("parallelism", 1)), mapping(counts.get(part["name"]))
        if active := count.get("active", 0):
            yield {
                "metadata": {"name": f"{name}-{part['name']}", "labels": {JOBSET_NAME_LABEL: name}},
                "spec": {
                    "nodeSelector": mapping(pod.get("nodeSelector")),
                    "containers": [{"resources": mapping(container.get("resources"))} for container in pod["containers"]],
                },
                "status": {"active": active * hosts, "ready": count.get("ready", 0) * hosts},
            }


def _finished(jobset: Manifest) -> bool:
    return job_status(jobset, []).state.finished


def _lean_node(node: Manifest) -> Manifest:
    """Labels, taints, chips and health; the list of its images is most of a node."""
    status = mapping(node.get("status"))
    return {
        "metadata": {"name": node["metadata"]["name"], "labels": mapping(node["metadata"].get("labels"))},
        "spec": {key: value for key, value in mapping(node.get("spec")).items() if key in ("taints", "unschedulable")},
        "status": {
            "allocatable": mapping(status.get("allocatable")),
            "conditions": [condition for condition in items(status.get("conditions")) if condition.get("type") == "Ready"],
        },
    }
