"""From manifests to a job: what the server is asked beforehand, in which order things are made, and what an interrupted
submit leaves for the next one to finish.

The JobSet is created first, because its name is what two submits compete for, but suspended and marked unfinished:
nothing starts before its config map, service account and network policy exist. One last change takes mark and suspension
away. A submit that is killed between any two calls leaves a marked JobSet, which the next submit of the same spec
completes; everything else is owned by the JobSet and goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

from launcher.backend.kubernetes_api import CREATABLE, JOB, JOBSET, POD, Api, Resource
from launcher.backend.kubernetes_errors import NotAllowed, OverQuota
from launcher.backend.kubernetes_schema import jobset_schema, require_known
from launcher.backend.status import QUEUE_LABEL, SUBMITTED_BY_ANNOTATION, Manifest, job_status, user
from launcher.backend.values import items, mapping
from launcher.errors import AlreadyExists, NotFound, way_past

UNFINISHED: Final = "nnxlaunch/unfinished-submit"
"""Annotation of a JobSet whose submit has not come to its end."""
SPEC_HASH_LABEL: Final = "nnxlaunch/spec-hash"


class Submission:
    """One job to be created in one namespace."""

    def __init__(self, api: Api, namespace: str, manifests: Sequence[Manifest]) -> None:
        self._api, self._namespace = api, namespace
        self._resources = [(CREATABLE[manifest["apiVersion"], manifest["kind"]], manifest) for manifest in manifests]
        (self._jobset,) = (manifest for resource, manifest in self._resources if resource is JOBSET)
        self.name: str = self._jobset["metadata"]["name"]

    def check(self, *, replace: bool) -> None:
        """Have the server try all of `create` without doing it: schema, webhooks, permissions, and the name last.

        JobSet takes what its Jobs and their pods would only be refused for later, where nobody looks: one of each is
        tried too, as far as this user may. Raises launcher.errors.Unavailable, AlreadyExists.
        """
        published = self._api.published_schema(JOBSET.api_version)
        if published and (schema := jobset_schema(published)):
            require_known(schema, self._jobset, where=self._api.where)
        for resource, manifest in self._resources:
            try:
                self._api.create(resource, self._namespace, self._placed(manifest), dry_run=True)
            except AlreadyExists:
                if resource is JOBSET and not replace:
                    self._unfinished()
        made = {manifest["metadata"]["name"] for _, manifest in self._resources if manifest["kind"] == "ServiceAccount"}
        for resource, manifest in first_children(self._jobset, made):
            with suppress(AlreadyExists, NotAllowed, OverQuota):  # room for it may come
                self._api.create(resource, self._namespace, self._placed(manifest), dry_run=True)

    def create(self, *, remove: Callable[[str], None] | None) -> None:
        """Create it, or complete what an interrupted submit of the same spec has begun.

        `remove` deletes the job of that name and waits; None where one that exists is an error. Raises as `check`.
        """
        self.check(replace=remove is not None)
        if remove is not None:
            with suppress(NotFound):
                remove(self.name)
        starts_by_itself = not self._jobset["spec"].get("suspend") and QUEUE_LABEL not in mapping(self._jobset["metadata"].get("labels"))
        with ExitStack() as undo:
            try:
                jobset = self._api.create(JOBSET, self._namespace, self._placed(self._held(suspend=starts_by_itself)))
                undo.callback(self._api.delete, JOBSET, self._namespace, self.name, uid=jobset["metadata"]["uid"])
            except AlreadyExists:
                jobset = self._unfinished()  # of somebody else, perhaps, who is about to complete it
            for resource, manifest in self._resources:
                if resource is not JOBSET:
                    self._create_owned(resource, manifest, owner=jobset)
            finished: Manifest = {"metadata": {"annotations": {UNFINISHED: None}}}
            self._api.merge(JOBSET, self._namespace, self.name, {**finished, **({"spec": {"suspend": False}} if starts_by_itself else {})})
            undo.pop_all()

    def _held(self, *, suspend: bool) -> Manifest:
        metadata = self._jobset["metadata"]
        marks = {**mapping(metadata.get("annotations")), UNFINISHED: "true", SUBMITTED_BY_ANNOTATION: user()}
        marked = {**metadata, "annotations": marks}
        return {**self._jobset, "metadata": marked, "spec": {**self._jobset["spec"], **({"suspend": True} if suspend else {})}}

    def _unfinished(self) -> Manifest:
        """The JobSet an interrupted submit of this spec has left. Raises AlreadyExists when it is anything else."""
        present = self._api.get(JOBSET, self._namespace, self.name)
        metadata = present["metadata"]
        by = mapping(metadata.get("annotations")).get(SUBMITTED_BY_ANNOTATION)
        what = f"a job {self.name!r}{f' of {by}' if by else ''} exists already in namespace {self._namespace!r}"
        if metadata.get("deletionTimestamp"):
            raise AlreadyExists(f"{what} and is being deleted", hint="wait until it is gone, or add --replace, which waits")
        same = mapping(metadata.get("labels")).get(SPEC_HASH_LABEL) == self._jobset["metadata"]["labels"][SPEC_HASH_LABEL]
        unfinished = UNFINISHED in mapping(metadata.get("annotations"))
        if unfinished and same:
            return present
        if unfinished:
            what += ", left by an interrupted submit of another spec"
        raise AlreadyExists(what, hint=way_past(finished=job_status(present, []).state.finished))

    def _create_owned(self, resource: Resource, manifest: Manifest, *, owner: Manifest) -> None:
        """Create it owned by the JobSet; what an earlier job of the same name has left behind gives way."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")} | {key: owner["metadata"][key] for key in ("name", "uid")}
        placed = self._placed(manifest)
        placed["metadata"]["ownerReferences"] = [{**reference, "controller": True, "blockOwnerDeletion": False}]
        try:
            self._api.create(resource, self._namespace, placed)
        except AlreadyExists:
            name = manifest["metadata"]["name"]
            present = self._api.get(resource, self._namespace, name)
            owners = [o for o in items(present["metadata"].get("ownerReferences")) if o["kind"] == JOBSET.kind and o["name"] == self.name]
            if any(o["uid"] == reference["uid"] for o in owners):
                return  # made by the submit that this one completes
            if not owners:
                raise AlreadyExists(
                    f"{resource.kind} {name!r} exists already in namespace {self._namespace!r} and is not this job's",
                    hint=f"choose another job name, or: kubectl delete {resource.plural} {name} -n {self._namespace}",
                ) from None
            self._api.delete(resource, self._namespace, name, uid=present["metadata"]["uid"], at_once=True)
            self._api.create(resource, self._namespace, placed)

    def _placed(self, manifest: Manifest) -> Manifest:
        return {**manifest, "metadata": {**manifest["metadata"], "namespace": self._namespace}}


def first_children(jobset: Manifest, accounts: set[str]) -> Iterator[tuple[Resource, Manifest]]:
    """The first Job of each kind in the JobSet, and its first pod; as the namespace's default service account where the
    pod's own is one of `accounts`, which are yet to be made."""
    for part in jobset["spec"]["replicatedJobs"]:
        name, job = f"{jobset['metadata']['name']}-{part['name']}-0", part["template"]
        metadata: dict[str, Any] = {**mapping(job.get("metadata")), "name": name}
        yield JOB, {"apiVersion": JOB.api_version, "kind": JOB.kind, "metadata": metadata, "spec": job["spec"]}
        pod = job["spec"]["template"]
        metadata = {**mapping(pod.get("metadata")), "name": f"{name}-0"}
        spec = {key: value for key, value in pod["spec"].items() if key != "serviceAccountName" or value not in accounts}
        yield POD, {"apiVersion": POD.api_version, "kind": POD.kind, "metadata": metadata, "spec": spec}
