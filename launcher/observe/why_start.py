"""Why a pod that has a node does not run: images, secrets, volumes, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import Event
from launcher.backend.values import items, mapping
from launcher.observe.cause import Cause, Pod, one_line, pods_of, said_by

IMAGE_REASONS: Final = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "SignatureValidationFailed")
_LATE: Final = "failed to sync "  # the kubelet's cache is behind for a moment
_MISSING: Final = re.compile(r'(?P<kind>secret|configmap) "(?P<name>[^"]+)" not found')
_NO_KEY: Final = re.compile(r"couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) [^/\s]+/(?P<name>\S+)")
_MOUNT: Final = re.compile(r'(?:MountVolume\.\w+|Unable to attach or mount volumes|AttachVolume\.\w+).*?(?:volume "(?P<volume>[^"]+)"|:)')
_SECRETS: Final = re.compile(r"image pull secrets \((?P<names>[^)]+)\)")
_EXECUTABLE: Final = re.compile(r'exec: "(?P<program>[^"]+)": (?P<why>[^:]+)')


def not_started(scene: Scene) -> Iterator[Cause]:
    for pod in pods_of(scene):
        if pod.status.node and pod.status.phase == "Pending" and not pod.status.leaving:
            events = [event for event in scene.said(about=f"pod/{pod.status.name}") if _LATE not in event.message]
            yield from _causes(scene, pod, events)


def _causes(scene: Scene, pod: Pod, events: list[Event]) -> Iterator[Cause]:
    reason, words = str(pod.waiting.get("reason", "")), _words(pod, events)
    evidence = said_by(*(event for event in events if event.warning))
    if pod.waiting.get("message"):
        evidence = (f"pod/{pod.status.name}: {reason}: {one_line(pod.waiting['message'])}", *evidence)
    for code, sentence, fix in _meanings(scene, pod, reason, words):
        yield Cause(code=code, sentence=f"{pod.where}: {sentence}", fix=fix, evidence=evidence)


def _words(pod: Pod, events: list[Event]) -> str:
    ended = mapping(next((mapping(c.get("state")).get("terminated") for c in _containers(pod)), None))
    told = [str(pod.waiting.get("message", "")), str(ended.get("message", "")), *(event.message for event in events if event.warning)]
    return "\n".join(filter(None, told))


def _containers(pod: Pod) -> list[dict[str, object]]:
    return items(mapping(pod.manifest.get("status")).get("containerStatuses"))


def _meanings(scene: Scene, pod: Pod, reason: str, words: str) -> Iterator[tuple[str, str, str]]:
    here, image = f"-n {scene.namespace}", pod.image
    if "InvalidImageName" in (reason, words) or "couldn't parse image" in words:
        yield "image-name", f"{image!r} is not the name of an image", "correct `image` of the spec and submit with --replace"
    if reason == "ErrImageNeverPull" or "is not present with pull policy of Never" in words:
        yield (
            "image",
            f"image {image} is not on the node, and its pull policy is never",
            "load the image into every node, or set image.pull_policy to if_not_present and push it to a registry",
        )
    if reason in IMAGE_REASONS or "Failed to pull image" in words:
        if found := _SECRETS.search(words):
            yield (
                "pull-secret",
                f"image pull secret {found['names']} does not exist in namespace {scene.namespace!r}, and {image} cannot be pulled without",
                f"kubectl create secret docker-registry {found['names'].split(',')[0]} {here} "
                "--docker-server=... --docker-username=... --docker-password=...",
            )
        yield (
            "image",
            f"image {image} cannot be pulled: {_pull_failure(words)}",
            "check `image` of the spec, that it was pushed (nnxlaunch image push), and that the nodes may read it (image.pull_secrets)",
        )
    if found := _NO_KEY.search(words):
        kind = "secret" if found["kind"] == "Secret" else "config map"
        yield (
            "no-secret" if kind == "secret" else "no-config-map",
            f"{kind} {found['name']!r} has no key {found['key']!r}",
            f"add the key, or correct `env` of the spec: kubectl edit {kind.replace(' ', '')} {found['name']} {here}",
        )
    mount = _MOUNT.search(words)
    if found := _MISSING.search(words):
        kind = "secret" if found["kind"] == "secret" else "config map"
        own = kind == "config map" and found["name"].startswith(f"{scene.name}-")
        volume = f"volume {mount['volume']!r} cannot be mounted: " if mount and mount["volume"] else ""
        make = f"kubectl create secret generic {found['name']} {here} --from-literal=KEY=VALUE"
        yield (
            "no-volume" if mount else ("no-secret" if kind == "secret" else "no-config-map"),
            f"{volume}{kind} {found['name']!r} does not exist in namespace {scene.namespace!r}",
            "it belongs to the job and was deleted: submit the same spec with --replace" if own
            else (make if kind == "secret" else f"kubectl create configmap {found['name']} {here} --from-file=..."),
        )  # fmt: skip
    elif mount:
        yield (
            "no-volume",
            f"a volume cannot be mounted: {one_line(next(line for line in words.splitlines() if _MOUNT.search(line)))}",
            f"check `volumes` of the spec; the kubelet's words: kubectl describe pod {pod.status.name} {here}",
        )
    if "runAsNonRoot" in words or "runAsUser breaks non-root policy" in words:
        yield (
            "runs-as-root",
            f"image {image} runs as root, which the pod's security settings forbid",
            "use an image with a numeric non-root USER, or set security.user of the spec",
        )
    if "executable file not found" in words or reason in ("RunContainerError", "StartError") or "StartError" in words:
        found = _EXECUTABLE.search(words)
        what = f"program {found['program']!r}: {found['why']}" if found else one_line(words.splitlines()[0] if words else reason)
        yield "command", f"the container cannot be started: {what}", f"is {image} an image of the trainer? See: nnxlaunch image --help"
    if reason in ("CreateContainerConfigError", "CreateContainerError", "InvalidImageName"):
        yield "container", f"its container cannot be made: {one_line(words)}", f"kubectl describe pod {pod.status.name} {here}"
    if "FailedCreatePodSandBox" in words or "failed to create pod sandbox" in words:
        yield "sandbox", f"the node cannot set up the pod: {one_line(words)}", f"kubectl describe node {pod.status.node}"


def _pull_failure(words: str) -> str:
    line = next((line for line in words.splitlines() if "failed to" in line), words)
    if "no such host" in line:
        return "the registry's name is unknown"
    if "not found" in line:
        return "the registry has no such image or tag"
    if re.search(r"401|403|unauthorized|denied|Forbidden", line):
        return "the registry refuses access"
    if re.search(r"timeout|refused|unreachable", line):
        return "the registry does not answer"
    return one_line(line.rpartition(": ")[2] or "its events say why", 120)
