"""A pod of a rendered JobSet as a process of this machine: its argv, environment and files.

What a node and a cluster's DNS would do is done to the strings: mount paths become folders, headless host names
become 127.0.0.1, the ports behind them free ports of this attempt, `python` the running interpreter.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from launcher.backend.local_jobset import container_of
from launcher.backend.status import COMPLETION_INDEX_LABEL, Manifest
from launcher.backend.values import items, mapping, strings
from launcher.errors import Unavailable
from trainer.contract import COMPLETION_INDEX, IMAGE_REVISION, TERMINATION_LOG

ADDRESS: Final = "127.0.0.1"
POD_MARK: Final = "NNXLAUNCH_LOCAL_POD"
"""In the environment of every process of a local pod, so that none of them can hide from its end."""

# The shell's own values of these would contradict what a pod is told.
_NOT_INHERITED: Final = re.compile(
    r"^(NNX_|TPU_|MEGASCALE_|JOBSET_|JOB_COMPLETION_INDEX$|XLA_FLAGS$|JAX_COORDINATOR|JAX_LOCAL_DEVICE|JAX_NUM_)"
)
_REFERENCE: Final = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_OWN_ENTRYPOINT: Final = ("python", "-m", "trainer")


@dataclass(frozen=True, kw_only=True)
class PodProcess:
    argv: list[str]
    environment: dict[str, str]
    directory: Path
    termination_log: Path
    grace_seconds: float


def refuse_what_cannot_run_here(jobset: Manifest) -> None:
    """Raises Unavailable naming the first thing in the JobSet that this machine or this backend does not have."""
    spec = jobset["spec"]
    policy = mapping(spec.get("successPolicy"))
    if policy.get("operator", "All") != "All":
        raise Unavailable("the local backend knows only the success policy `All`")
    for rule in items(mapping(spec.get("failurePolicy")).get("rules")):
        if rule["action"] not in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"):
            raise Unavailable(f"the local backend does not know the failure action {rule['action']!r}")
    for replicated in spec["replicatedJobs"]:
        if replicated.get("dependsOn"):
            raise Unavailable("the local backend starts all replicated jobs at once; `dependsOn` is not known to it")
        pod = replicated["template"]["spec"]["template"]["spec"]
        if len(pod["containers"]) > 1 or pod.get("initContainers"):
            raise Unavailable("the local backend runs pods of one container")
        limits = mapping(mapping(container_of(pod).get("resources")).get("limits"))
        if "google.com/tpu" in limits:
            raise Unavailable(
                "this job asks for TPU chips; the local backend has none",
                hint="try it with `cpu: {hosts: ..., devices_per_host: ...}` in place of `tpu`, or submit with --backend kubernetes",
            )
        for volume in items(pod.get("volumes")):
            if not {"configMap", "emptyDir"} & set(volume):
                kind = next((key for key in volume if key != "name"), "?")
                raise Unavailable(f"the local backend cannot mount a {kind} volume", hint="use a local folder as `directory`")
        for entry in items(container_of(pod).get("env")):
            _secret(entry)


def free_ports(count: int) -> list[int]:
    """So many different ports that are free now."""
    sockets = [socket.create_server((ADDRESS, 0)) for _ in range(count)]
    try:
        return [server.getsockname()[1] for server in sockets]
    finally:
        for server in sockets:
            server.close()


class Names:
    """The JobSet's headless host names, each with its ports of this attempt."""

    def __init__(self, jobset: Manifest) -> None:
        name = jobset["metadata"]["name"]
        subdomain = str(mapping(jobset["spec"].get("network")).get("subdomain") or name)
        jobs = "|".join(re.escape(replicated["name"]) for replicated in jobset["spec"]["replicatedJobs"])
        self._host = re.compile(
            rf"(?<![\w.-])({re.escape(name)}-(?:{jobs})-\d+-\d+)\.{re.escape(subdomain)}(?:\.[\w-]+\.svc(?:\.[\w-]+)*)?(?::(\d+))?(?![\w-])"
        )
        self._ports: dict[tuple[str, str], int] = {}

    def new_attempt(self) -> None:
        """A port of the attempt before may still be in use by what is leaving."""
        self._ports.clear()

    def resolve(self, text: str) -> str:
        return self._host.sub(lambda match: ADDRESS + (f":{self._port(match[1], match[2])}" if match[2] else ""), text)

    def _port(self, host: str, port: str) -> int:
        if (host, port) not in self._ports:
            self._ports[host, port] = free_ports(1)[0]
        return self._ports[host, port]


def pod_process(
    pod: Manifest, folder: Path, config_maps: Mapping[str, Mapping[str, str]], names: Names, *, directory: Path, base: Mapping[str, str]
) -> PodProcess:
    """Prepare the pod's files in `folder` and say how to start it. `base` is the environment of this machine's user."""
    spec = pod["spec"]
    container = container_of(spec)
    mounts = _make_volumes(spec, container, folder, config_maps)

    def local(text: str) -> str:
        return _mounted(names.resolve(text), mounts)

    termination_log = folder / "termination-log"
    environment = {name: value for name, value in base.items() if not _NOT_INHERITED.search(name)}
    environment |= {TERMINATION_LOG: str(termination_log), POD_MARK: pod["metadata"]["uid"]}
    environment[IMAGE_REVISION] = base.get(IMAGE_REVISION, "unknown")  # of the code that runs instead of an image
    environment["PYTHONSAFEPATH"] = "1"  # the folder one submits from is not searched for modules
    environment[COMPLETION_INDEX] = pod["metadata"]["labels"][COMPLETION_INDEX_LABEL]
    if "/tmp" in mounts:
        environment["TMPDIR"] = str(mounts["/tmp"])
    given: dict[str, str] = {}
    for entry in items(container.get("env")):
        given[entry["name"]] = local(_expand(_value(entry, pod), given))
    argv = [*(strings(container.get("command")) or _OWN_ENTRYPOINT), *strings(container.get("args"))]
    # The interpreter is this machine's wherever it lies, below a mount path too.
    argv = [word if word == sys.executable else local(_expand(word, given)) for word in argv]
    if argv[0] in ("python", "python3"):
        argv[0] = sys.executable
    return PodProcess(
        argv=argv,
        environment={**environment, **given},
        directory=directory,
        termination_log=termination_log,
        grace_seconds=float(spec.get("terminationGracePeriodSeconds", 30)),
    )


def _make_volumes(spec: Manifest, container: Manifest, folder: Path, config_maps: Mapping[str, Mapping[str, str]]) -> dict[str, Path]:
    """Folder of each mount path."""
    folders: dict[str, Path] = {}
    for volume in items(spec.get("volumes")):
        place = folders[volume["name"]] = folder / "volumes" / volume["name"]
        place.mkdir(parents=True, exist_ok=True)
        source = volume.get("configMap")
        if source:
            data = config_maps.get(source["name"])
            if data is None:
                raise Unavailable(f"the job mounts the ConfigMap {source['name']!r}, which is not among its manifests")
            chosen = {item["key"]: item["path"] for item in items(source.get("items"))} or {key: key for key in data}
            for key, path in chosen.items():
                (place / Path(path).name).write_text(data[key])
    return {
        mount["mountPath"].rstrip("/"): folders[mount["name"]] / mount.get("subPath", "") for mount in items(container.get("volumeMounts"))
    }


def _mounted(text: str, mounts: Mapping[str, Path]) -> str:
    """`text` with a leading mount path replaced by its folder; the longest mount path wins."""
    for path in sorted(mounts, key=len, reverse=True):
        if text == path or text.startswith(f"{path}/"):
            return f"{mounts[path]}{text[len(path) :]}"
    return text


def _value(entry: Manifest, pod: Manifest) -> str:
    source = entry.get("valueFrom")
    if not source:
        return str(entry.get("value", ""))
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    return _secret(entry)


def _field(pod: Manifest, path: str) -> str:
    match = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if match:
        return str(pod["metadata"][match[1]].get(match[2], ""))
    known = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"]["namespace"],
        "metadata.uid": pod["metadata"]["uid"],
        "spec.nodeName": socket.gethostname(),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": ADDRESS,
        "status.hostIP": ADDRESS,
    }
    if path not in known:
        raise Unavailable(f"the local backend does not know the field {path!r}")
    return known[path]


def _secret(entry: Manifest) -> str:
    """There are no Secrets here: the variable of the same name in the shell that submits stands in for it."""
    source = mapping(mapping(entry.get("valueFrom")).get("secretKeyRef"))
    if not source:
        return ""
    value = os.environ.get(entry["name"])
    if value is None and not source.get("optional"):
        raise Unavailable(
            f"{entry['name']} comes from the Secret {source['name']!r}, and there are no Secrets on this machine",
            hint=f"set {entry['name']} in the shell that submits; it is passed on and written nowhere",
        )
    return value or ""


def _expand(text: str, given: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`; an unknown name stays as it is, `$$` is a dollar."""
    return _REFERENCE.sub(lambda match: "$" if match[0] == "$$" else given.get(match[1], match[0]), text)


def descendants(uids: Sequence[str]) -> Iterator[int]:
    """Processes of this user that carry the mark of one of these pods (Linux; nothing elsewhere)."""
    marks = [f"{POD_MARK}={uid}".encode() for uid in uids]
    for entry in Path("/proc").glob("[0-9]*/environ") if sys.platform == "linux" else ():
        try:
            variables = entry.read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or another user's
        if any(mark in variables for mark in marks):
            yield int(entry.parent.name)
