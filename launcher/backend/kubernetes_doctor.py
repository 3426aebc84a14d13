"""Looking at a cluster before a job does: what `launcher.doctor` judges, read from the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from launcher.backend.kubernetes_api import JOBSET, Api, Resource
from launcher.backend.kubernetes_errors import JOBSET_INSTALL, NotAllowed
from launcher.backend.kubernetes_queue import GROUP
from launcher.backend.kubernetes_scene import NODE
from launcher.backend.kubernetes_schema import installed_release, jobset_schema, require_known
from launcher.backend.status import QUEUE_LABEL, Manifest
from launcher.backend.values import items, mapping
from launcher.doctor import rules
from launcher.doctor.finding import Finding, bad, good, warn
from launcher.doctor.permissions import QUEUE_USER, SUBMITTER, VIEWER, Right, judge
from launcher.doctor.pools import node_pools
from launcher.errors import NnxlaunchError, NotFound, Unavailable
from launcher.labels import ACCELERATOR_LABEL
from launcher.manifest import render
from launcher.spec import JobSpec

OLDEST_KUBERNETES: Final = (1, 31)
REVIEW: Final = Resource("authorization.k8s.io/v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews")
NAMESPACE: Final = Resource("v1", "Namespace", "namespaces")
PRIORITY: Final = Resource("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses")
JOBSET_RESTART: Final = "kubectl -n jobset-system rollout restart deployment/jobset-controller-manager"
KUEUE_RESTART: Final = "kubectl -n kueue-system rollout restart deployment/kueue-controller-manager"
KUEUE_INSTALL: Final = "kubectl apply --server-side -f https://github.com/kubernetes-sigs/kueue/releases/latest/download/manifests.yaml"


class Doctor:
    """One look at one namespace, for one spec or for any."""

    def __init__(self, api: Api, namespace: str, spec: JobSpec | None) -> None:
        self._api, self._namespace, self._spec = api, namespace, spec

    def examine(self) -> Iterator[Finding]:
        """Findings in the order in which they matter; a server that does not answer is the only one. Creates nothing."""
        try:
            version = self._api.read("/version", "read the server's version")
        except NnxlaunchError as error:
            yield bad("access", str(error), error.hint)
            return
        yield self._access(version)
        try:
            yield from rules.pod_security(self._api.get(NAMESPACE, "", self._namespace), self._spec)
        except NotAllowed:
            pass  # the missing right is a finding of its own
        except (NotFound, Unavailable) as error:
            yield bad("namespace", f"namespace {self._namespace!r} cannot be used: {error}", error.hint)
            return
        kueue = self._api.served_version(GROUP)
        denied = [right for right in (*SUBMITTER, *QUEUE_USER, *VIEWER) if (kueue or "kueue" not in right.group) and not self._may(right)]
        yield from judge(denied, namespace=self._namespace, queues=kueue is not None)
        yield from self._jobset()
        classes = self._read(lambda: self._api.list_whole(PRIORITY, "")) or []
        yield from self._kueue(kueue, classes)
        if self._spec is not None:
            yield from rules.priorities(self._spec, classes)
        nodes = self._read(lambda: self._api.list_whole(NODE, "", labels=ACCELERATOR_LABEL))
        if nodes is not None and (self._spec is None or self._spec.layout.tpu is not None):
            yield from node_pools(nodes, self._spec)

    def _access(self, version: Manifest) -> Finding:
        said = f"{self._api.where} answers: Kubernetes {version['gitVersion']}"
        major, minor = (int("".join(filter(str.isdigit, version[key]))) for key in ("major", "minor"))
        if (major, minor) < OLDEST_KUBERNETES:
            return warn("access", f"{said}, older than {'.'.join(map(str, OLDEST_KUBERNETES))}", "upgrade the cluster")
        return good("access", said)

    def _may(self, right: Right) -> bool:
        resource, _, sub = right.resource.partition("/")
        namespace = "" if right in VIEWER else self._namespace
        attributes = {"namespace": namespace, "group": right.group, "resource": resource, "subresource": sub, "verb": right.verb}
        review = {
            "apiVersion": REVIEW.api_version,
            "kind": REVIEW.kind,
            "metadata": {"name": ""},
            "spec": {"resourceAttributes": attributes},
        }
        return bool(mapping(self._api.create(REVIEW, "", review).get("status")).get("allowed"))

    def _jobset(self) -> Iterator[Finding]:
        published = self._api.published_schema(JOBSET.api_version)
        schema = jobset_schema(published) if published else None
        if schema is None:
            yield bad("jobset", f"JobSet is not installed in {self._api.where}", JOBSET_INSTALL)
            return
        release = f"JobSet {installed_release(schema)} (or newer) is installed"
        if self._spec is not None:
            try:
                require_known(schema, render(self._spec)[-1], where=self._api.where)
            except Unavailable as error:
                yield bad("jobset", str(error), error.hint)
        try:
            tried = self._api.create(JOBSET, self._namespace, _smallest(self._namespace), dry_run=True)
        except NotAllowed:
            yield warn("jobset", f"{release}; you may not create one, so its webhook was not tried", "see `rights`")
        except NnxlaunchError as error:
            yield bad("jobset", str(error), KUEUE_RESTART if "kueue" in str(error).lower() else JOBSET_RESTART)
        else:
            defaulted = mapping(tried["spec"].get("network")).get("enableDNSHostnames") is True
            words = "no webhook of JobSet looks at new jobs, so wrong ones would be taken"
            yield (
                good("jobset", f"{release} and its webhook answers")
                if defaulted
                else bad("jobset", f"{release}, but {words}", JOBSET_INSTALL)
            )

    def _kueue(self, version: str | None, classes: Sequence[Manifest]) -> Iterator[Finding]:
        queue = self._spec.queue.name if self._spec and self._spec.queue else ""
        if version is None:
            if queue:
                yield bad("queue", f"the spec names queue {queue!r}, but Kueue is not installed", f"{KUEUE_INSTALL}; or leave `queue` out")
            else:
                yield good("queue", "Kueue is not installed; jobs start at once")
            return
        local_kind, cluster_kind = Resource(version, "LocalQueue", "localqueues"), Resource(version, "ClusterQueue", "clusterqueues")
        local = self._read(lambda: self._api.list_whole(local_kind, self._namespace))
        if local is None:
            return
        clusters: dict[str, Manifest | None] = {}
        flavors: list[Manifest] = []
        for name in sorted({thing["spec"]["clusterQueue"] for thing in local}):
            try:
                found = clusters[name] = self._api.get(cluster_kind, "", name)
            except NotFound:
                clusters[name] = None
                continue
            except NotAllowed:
                continue
            flavors += self._flavors(version, found)
        yield from rules.queues(self._spec, self._namespace, local, clusters, flavors)
        if local:
            yield from self._takes_jobs(queue or local[0]["metadata"]["name"])
        home = (
            local if self._namespace == rules.XPK_NAMESPACE else self._read(lambda: self._api.list_whole(local_kind, rules.XPK_NAMESPACE))
        )
        yield from rules.xpk(self._spec, self._namespace, home or [], classes)

    def _flavors(self, version: str, cluster: Manifest) -> list[Manifest]:
        kind = Resource(version, "ResourceFlavor", "resourceflavors")
        names: set[str] = {flavor["name"] for group in items(cluster["spec"].get("resourceGroups")) for flavor in items(group["flavors"])}
        found = (self._read(lambda: self._api.get(kind, "", name)) for name in sorted(names))  # noqa: B023
        return [flavor for flavor in found if flavor is not None]

    def _takes_jobs(self, queue: str) -> Iterator[Finding]:
        """Kueue suspends every JobSet of a queue when it is made; one that stays as it is would start beside the queue."""
        try:
            tried = self._api.create(JOBSET, self._namespace, _smallest(self._namespace, queue), dry_run=True)
        except NnxlaunchError:
            return  # said under `jobset`, where the same is tried without a queue
        if tried["spec"].get("suspend") is not True:
            fix = f"turn on the integration jobset.x-k8s.io/jobset for this namespace (k8s/README.md), then: {KUEUE_RESTART}"
            yield bad("queue", f"Kueue does not take JobSets of namespace {self._namespace} into its queues", fix)

    def _read[T](self, ask: Callable[[], T]) -> T | None:
        """None where it may not be read, or is not there."""
        try:
            return ask()
        except (NotAllowed, NotFound):
            return None


def _smallest(namespace: str, queue: str = "") -> dict[str, Any]:
    """The least a JobSet must have; it is only ever tried."""
    hardened = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}
    container = {"name": "trainer", "image": "none", "securityContext": {**hardened, "seccompProfile": {"type": "RuntimeDefault"}}}
    job = {"parallelism": 1, "completions": 1, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    return {
        "apiVersion": JOBSET.api_version,
        "kind": JOBSET.kind,
        "metadata": {"name": "nnxlaunch-doctor", "namespace": namespace, **({"labels": {QUEUE_LABEL: queue}} if queue else {})},
        "spec": {"replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}]},
    }
