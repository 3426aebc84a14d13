"""Names and label values: what Kubernetes accepts, and what the names derived from them become.

js = name of the JobSet, rj = name of its replicated job, R = slices, C = hosts of a slice, d(n) = decimal digits of n.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from launcher.spec import JobSpec, Layout
from launcher.spec.capacity import Reservation, Tas
from launcher.spec.pod import Claim, FromSecret, GcsFuse
from trainer import contract
from trainer.config import Problem

DNS_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?", re.ASCII)
"""RFC 1035 label, at most 63 characters."""
DNS_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
"""RFC 1123 subdomain, at most 253 characters: the name of most objects."""
LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", re.ASCII)
LABEL_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", re.ASCII)
OWN_PREFIXES: Final = (
    "nnxlaunch/",
    "xpk.google.com/workload",
    "app.kubernetes.io/managed-by",
    "jobset.sigs.k8s.io/",
    "kueue.x-k8s.io/",
    "batch.kubernetes.io/",
)
MAX_ANNOTATION_BYTES: Final = 262_144
_POD_SUFFIX: Final = 5  # the random characters the Job controller appends
_COORDINATOR: Final = (0, 0)  # job index, pod index


def digits(number: int) -> int:
    return len(str(number))


def name_is_a_label(spec: JobSpec) -> Iterator[Problem]:
    """JobSet and Job names are DNS labels that begin with a letter."""
    if not DNS_LABEL.fullmatch(spec.name):
        slug = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-").lstrip("-0123456789")[:40].strip("-")
        message = f"{spec.name[:80]!r} is not a name: lower-case letters, digits and dashes, beginning with a letter"
        yield Problem(path="name", message=message, hint=f"such as {slug or 'my-run'!r}", code="name", value=spec.name)


def created_account_is_the_jobs_own(spec: JobSpec) -> Iterator[Problem]:
    """The created account has the job's name; every namespace has one called `default`, which other pods use."""
    if spec.name == "default" and spec.service_account is None:
        message = "'default' is also the name of the account of a namespace's other pods, which the job's own account would replace"
        yield Problem(
            path="name", message=message, hint="another name, or `service_account: default`", code="account-name", value=spec.name
        )


def job_names_fit(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """len(js) + len(rj) + d(R-1) + 2 <= 63: the child Jobs' names."""
    rest = len(contract.REPLICATED_JOB) + digits(layout.slices - 1) + 2
    yield from _too_long(spec, f"Jobs are called NAME-{contract.REPLICATED_JOB}-{layout.slices - 1}", rest, "job-name-length")


def pod_names_fit(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """len(js) + len(rj) + d(R-1) + d(C-1) + 9 <= 63: longer pod names are cut and then do not resolve."""
    last = f"{layout.slices - 1}-{layout.hosts_per_slice - 1}"
    rest = len(contract.REPLICATED_JOB) + digits(layout.slices - 1) + digits(layout.hosts_per_slice - 1) + 4 + _POD_SUFFIX
    yield from _too_long(spec, f"pods are called NAME-{contract.REPLICATED_JOB}-{last}-abcde", rest, "pod-name-length")


def coordinator_label_fits(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """len(js) + len(rj) + d(job index) + d(pod index) + len(subdomain) + 4 <= 63: a label value."""
    del layout
    rest = len(contract.REPLICATED_JOB) + sum(map(digits, _COORDINATOR)) + len(spec.subdomain) + 4
    shown = f"the coordinator's label is NAME-{contract.REPLICATED_JOB}-0-0.{spec.subdomain[:63]}"
    yield from _too_long(spec, shown, rest, "coordinator-label-length")


def _too_long(spec: JobSpec, what: str, rest: int, code: str) -> Iterator[Problem]:
    limit = 63 - rest
    if len(spec.name) > limit:
        message = f"has {len(spec.name)} characters; {what}, at most 63 characters, which leaves {limit}"
        yield Problem(path="name", message=message, hint=f"shorten it to {limit} characters", code=code, value=spec.name, limit=limit)


def subdomain_is_a_label(spec: JobSpec) -> Iterator[Problem]:
    """The headless service's name: a DNS label of at most 63 characters."""
    given = spec.network.subdomain
    if given is not None and not (DNS_LABEL.fullmatch(given) and len(given) <= 63):
        message, hint = f"{given[:80]!r} is not a DNS label of at most 63 characters", "such as 'n', or leave it out"
        yield Problem(path="network.subdomain", message=message, hint=hint, code="subdomain", value=given, limit=63)


def object_names(spec: JobSpec) -> Iterator[Problem]:
    """Names of objects that exist already: DNS subdomains, where a label holds them at most 63 characters."""
    named: dict[str, tuple[str | None, int]] = {
        "priority": (spec.priority, 253),
        "service_account": (spec.service_account, 253),
        "scheduler": (spec.scheduler, 253),
        "queue.name": (spec.queue.name if spec.queue else None, 63),
        "queue.priority": (spec.queue.priority if spec.queue else None, 63),
        **{f"image.pull_secrets.{i}": (name, 253) for i, name in enumerate(spec.image.pull_secrets if spec.image else ())},
        **{f"volumes.{i}.claim": (v.claim, 253) for i, v in enumerate(spec.volumes) if isinstance(v, Claim)},
        **{f"env.{key}.secretKeyRef.name": (v.secretKeyRef.name, 253) for key, v in spec.env.items() if isinstance(v, FromSecret)},
    }
    for path, (name, limit) in named.items():
        if name is not None and not (DNS_SUBDOMAIN.fullmatch(name) and len(name) <= limit):
            message = f"{name[:80]!r} is not the name of an object: lower-case letters, digits, dashes and dots, at most {limit}"
            yield Problem(path=path, message=message, hint="check the spelling", code="object-name", value=name, limit=limit)
    for index, volume in enumerate(spec.volumes):
        if isinstance(volume, GcsFuse) and not re.fullmatch(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]", volume.bucket, re.ASCII):
            yield Problem(
                path=f"volumes.{index}.bucket",
                message=f"{volume.bucket[:80]!r} is not a bucket",
                hint="the bucket's name without gs:// and without a path",
                code="bucket",
                value=volume.bucket,
            )


def selector_values(spec: JobSpec) -> Iterator[Problem]:
    """Values that become node labels."""
    values: dict[str, str | None] = {}
    if isinstance(spec.capacity, Reservation):
        reservation = spec.capacity
        parts = {"name": reservation.name, "project": reservation.project, "block": reservation.block, "sub_block": reservation.sub_block}
        values |= {f"capacity.{key}": value for key, value in parts.items()}
    if spec.tpu is not None:
        values["tpu.placement_policy"] = spec.tpu.placement_policy
    for path, value in values.items():
        if value is not None and not (value and LABEL_VALUE.fullmatch(value) and len(value) <= 63):
            message = f"{value[:80]!r} cannot be the value of a node label: letters, digits, '-', '_', '.', at most 63"
            yield Problem(path=path, message=message, hint="the short name, without a path", code="label-value", value=value, limit=63)
    if isinstance(spec.placement, Tas) and spec.placement.level is not None:
        yield from _key("placement.level", spec.placement.level, own=())


def labels_are_valid(spec: JobSpec) -> Iterator[Problem]:
    """Keys are `[prefix/]name`; values have at most 63 characters; the launcher's and the controllers' own keys are taken."""
    for key, value in spec.labels.items():
        yield from _key(f"labels.{key}", key, own=OWN_PREFIXES)
        if not LABEL_VALUE.fullmatch(value) or len(value) > 63:
            message = f"{value[:80]!r} cannot be a label value: letters, digits, '-', '_', '.', at most 63"
            yield Problem(path=f"labels.{key}", message=message, hint="use an annotation", code="label-value", value=value, limit=63)


def annotations_are_valid(spec: JobSpec) -> Iterator[Problem]:
    for key in spec.annotations:
        yield from _key(f"annotations.{key}", key, own=("nnxlaunch/", "jobset.sigs.k8s.io/", "alpha.jobset.sigs.k8s.io/"))
    size = _bytes(spec.annotations)
    if size > MAX_ANNOTATION_BYTES:
        message, limit = f"{size:,} bytes of annotations; at most {MAX_ANNOTATION_BYTES:,}", MAX_ANNOTATION_BYTES
        yield Problem(path="annotations", message=message, hint="move the text into a file", code="annotations-size", limit=limit)


def _bytes(entries: Mapping[str, str]) -> int:
    return sum(len(key.encode()) + len(value.encode()) for key, value in entries.items())


def _key(path: str, key: str, *, own: tuple[str, ...]) -> Iterator[Problem]:
    prefix, slash, name = key.rpartition("/")
    if any(key == taken or (taken.endswith("/") and key.startswith(taken)) for taken in own):
        message = f"{key[:80]!r} is set by the launcher or a controller"
        yield Problem(path=path, message=message, hint="use a key of your own", code="own-key", value=key)
    elif not (LABEL_NAME.fullmatch(name) and len(name) <= 63) or (slash and not (DNS_SUBDOMAIN.fullmatch(prefix) and len(prefix) <= 253)):
        message = f"{key[:80]!r} is not a key: letters, digits, '-', '_', '.', at most 63, after an optional DNS prefix and '/'"
        yield Problem(path=path, message=message, hint="such as 'team' or 'example.com/team'", code="label-key", value=key)
