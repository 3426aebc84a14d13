"""Valid job specs drawn at random, and ways to break one, each with the path the problem must name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from launcher.tpu import resolve

Document = dict[str, Any]
Mutator = Callable[[Document], str | None]
"""Breaks a document in place and returns the path of the problem; None where this one cannot be broken so."""

ONE_HOST = ("v4-8", "v5e-1", "v5e-4", "v5p-8", "v6e-1", "v6e-4", "tpu7x-2", "tpu7x-8")
SEVERAL_HOSTS = (
    "v4-16", "v4-4x4x8", "v5e-16", "v5litepod-256", "v5p-16", "v5p-128", "v5p-1152", "v5p-4x4x20", "trillium-32",
    "v6e-256", "tpu7x-16", "ironwood-128", "tpu7x-1024",
)  # fmt: skip


def small_model() -> Document:
    """Divisible by tensor 1, 2, 4 and fsdp up to 64."""
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 48}
    block = {"attention": attention, "mlp": {"hidden": 640}}
    return {"vocab_size": 512, "width": 192, "segments": [{"pattern": [block], "repeats": 2}]}


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """A document that passes `validate` and may be sent to a cluster."""
    on_tpu = draw(st.booleans())
    document: Document = {
        "name": draw(st.from_regex(r"[a-z]([a-z0-9-]{0,18}[a-z0-9])?", fullmatch=True)),
        "image": draw(st.sampled_from(["registry.example.com/a/b:1", "trainer:dev", f"localhost:5000/t@sha256:{'0' * 64}"])),
    }
    if on_tpu:
        several = draw(st.booleans())
        kind = draw(st.sampled_from(SEVERAL_HOSTS if several else ONE_HOST))
        one = resolve(kind)
        slices = draw(st.integers(1, 4)) if several else 1
        devices = one.devices
        forms = [{"type": kind}, {"accelerator": one.family.name, "topology": one.topology_text}]
        document["tpu"] = {**draw(st.sampled_from(forms)), "slices": slices}
    else:
        cpu = {"hosts": draw(st.integers(1, 8)), "devices_per_host": draw(st.sampled_from([1, 2, 4, 8])), "slices": draw(st.integers(1, 3))}
        document["cpu"], slices, devices = cpu, cpu["slices"], cpu["hosts"] * cpu["devices_per_host"]
    document |= draw(_storage())
    document["train"] = draw(_train(slices, devices))
    document |= draw(_scheduling(on_tpu=on_tpu))
    document |= draw(_details())
    if document.get("security") == "privileged" and on_tpu:
        document["network"] = {"host_network": draw(st.booleans())}
    return document


@st.composite
def _train(draw: st.DrawFn, slices: int, devices: int) -> Document:
    tensor = draw(st.sampled_from([degree for degree in (1, 2, 4) if devices % degree == 0]))
    rest = devices // tensor
    fsdp = draw(st.sampled_from([degree for degree in (1, 2, 4, 8, 16, 32, 64) if rest % degree == 0]))
    accumulation = draw(st.integers(1, 3))
    batch = rest * slices * accumulation * draw(st.integers(1, 2))
    schedule = draw(
        st.sampled_from(
            [
                {"type": "constant", "learning_rate": 1e-3},
                {"type": "cosine", "learning_rate": 1e-3, "warmup_steps": 5},
                {"type": "wsd", "learning_rate": 1e-3, "warmup_steps": 1, "decay_steps": 4},
            ]
        )
    )
    return {
        "steps": draw(st.integers(10, 10_000)),
        "model": small_model(),
        "batch": {"global_batch": batch, "sequence_length": draw(st.sampled_from([8, 128])), "accumulation": accumulation},
        "mesh": {"ici": {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}, "dcn": {"data": draw(st.sampled_from([slices, -1]))}},
        "schedule": schedule,
        "sharding": {"unsharded_limit": 1.0},  # dims of any size are drawn, few of which every axis divides
        "data": {"sources": [draw(st.sampled_from([{"type": "synthetic"}, {"type": "text", "paths": ["gs://text/*.txt"]}]))]},
        **draw(st.sampled_from([{}, {"eval": {"every_steps": 5}}, {"checkpoint": {"every_steps": 5, "keep_every_steps": 10}}])),
    }


@st.composite
def _storage(draw: st.DrawFn) -> Document:
    cache = {"type": "empty_directory", "mount_path": "/scratch", "size_gib": 10}
    extra = draw(st.sampled_from([[], [cache], [{"type": "memory", "mount_path": "/ram", "size_gib": 1}]]))
    if draw(st.booleans()):
        return {"directory": draw(st.sampled_from(["gs://bucket", "gs://bucket/a/b/"])), "volumes": extra}
    kind = draw(st.sampled_from([{"type": "pvc", "claim": "shared"}, {"type": "gcs", "bucket": "runs", "only_directory": "a"}]))
    return {"directory": "/shared/runs", "volumes": [{**kind, "mount_path": "/shared"}, *extra]}


@st.composite
def _scheduling(draw: st.DrawFn, *, on_tpu: bool) -> Document:
    queue = draw(st.sampled_from([None, "research", {"name": "q", "priority": "high", "max_run_seconds": 3600}]))
    capacities: list[Any] = ["on_demand", "spot", "flex_start", {"type": "reservation", "name": "r", "project": "p", "block": "b"}]
    placements: list[Any] = [None, "none", "exclusive", {"type": "exclusive", "topology_key": "kubernetes.io/hostname"}]
    if queue is not None:
        capacities.append({"type": "dws", "max_run_seconds": 3600})
        placements.append({"type": "tas", "level": "cloud.provider.com/rack"})
        placements += ["tas"] if on_tpu else []
    found: Document = {"capacity": draw(st.sampled_from(capacities)), "placement": draw(st.sampled_from(placements))}
    return {**found, **({"queue": queue} if queue else {}), **({"priority": "high"} if draw(st.booleans()) else {})}


@st.composite
def _details(draw: st.DrawFn) -> Document:
    env = {"MY_FLAG": "1", "LIBTPU_INIT_ARGS": "--xla_flag=true", "HF_TOKEN": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    return {
        "env": {key: env[key] for key in draw(st.sets(st.sampled_from(sorted(env))))},
        "security": draw(st.sampled_from(["restricted", "root_no_caps", "privileged"])),
        "failure": {"mode": draw(st.sampled_from(["smart", "strict", "simple"])), "max_restarts": draw(st.integers(0, 100))},
        "grace_seconds": draw(st.sampled_from([None, 15, 30])),
        "ttl_seconds": draw(st.sampled_from([None, 0, 3600])),
        "labels": draw(st.sampled_from([{}, {"team": "a", "example.com/cost-centre": "42"}])),
        "annotations": draw(st.sampled_from([{}, {"example.com/note": "any text: {}"}])),
        "resources": draw(st.sampled_from([{}, {"cpu": "2", "memory": "4Gi"}])),
        **draw(st.sampled_from([{}, {"service_account": "trainer"}])),
    }


def mutated(document: Document, mutator: Mutator) -> tuple[Document, str] | None:
    """A broken copy of a valid document and the path of its problem; None where the mutator does not apply."""
    changed = copy.deepcopy(document)
    path = mutator(changed)
    return None if path is None else (changed, path)


def _put(path: str, value: Any, *, at: str | None = None) -> Mutator:
    """A mutator that writes `value` at `path`; the problem is there, or `at` another place."""

    def mutate(document: Document) -> str:
        *parents, last = path.split(".")
        node: Any = document
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value
        return at or path

    mutate.__name__ = f"{path} = {str(value)[:30]}"
    return mutate


def _tpu(value: Document, at: str) -> Mutator:
    def mutate(document: Document) -> str:
        document.pop("cpu", None)
        document["tpu"] = value
        return at

    mutate.__name__ = f"tpu = {value}"
    return mutate


def _both_accelerators(document: Document) -> str:
    document["tpu"], document["cpu"] = {"type": "v5e-16"}, {"hosts": 1}
    return "cpu"


def _remove(key: str) -> Mutator:
    def mutate(document: Document) -> str:
        del document[key]
        return key

    mutate.__name__ = f"no {key}"
    return mutate


def _odd_batch(document: Document) -> str | None:
    batch, mesh = document["train"]["batch"], document["train"]["mesh"]["ici"]
    if batch["accumulation"] * mesh["data"] * mesh["fsdp"] == 1 or batch["accumulation"] > 1:
        return None
    batch["global_batch"] += 1
    return "train.batch.global_batch"


def _odd_width(document: Document) -> str | None:
    document["train"]["model"]["width"] += 1
    return "train.model.width" if document["train"]["mesh"]["ici"]["fsdp"] > 1 else None


def _host_network(document: Document) -> str:
    document["network"], document["security"] = {"host_network": True}, "restricted"
    return "network.host_network"


def _too_few_devices(document: Document) -> str:
    document["train"]["mesh"]["ici"]["data"] += 1
    return "train.mesh.ici"


def _wrong_slices(document: Document) -> str:
    document["train"]["mesh"]["dcn"] = {"data": 7}
    return "train.mesh.dcn"


MUTATORS: tuple[Mutator, ...] = (
    _put("name", "Upper"),
    _put("name", "9lives"),
    _put("name", "a" * 60),
    _put("name", 5),
    _put("nmae", "x"),
    _remove("name"),
    _remove("directory"),
    _remove("train"),
    _both_accelerators,
    _tpu({"type": "v5p-120"}, "tpu.type"),
    _tpu({"type": "v9-8"}, "tpu.type"),
    _tpu({"type": "v6e-8"}, "tpu.type"),
    _tpu({"type": "v5p-8", "slices": 0}, "tpu.slices"),
    _tpu({"type": "v5p-8", "slices": 2}, "tpu.slices"),
    _tpu({"type": "v5e-16", "machine": "ct5lp-hightpu-8t"}, "tpu.machine"),
    _tpu({"accelerator": "v5p", "topology": "8x4x4"}, "tpu.topology"),
    _tpu({"accelerator": "v5p"}, "tpu"),
    _tpu({"typ": "v5p-8"}, "tpu.typ"),
    _put("directory", "../runs"),
    _put("directory", "gs://"),
    _put("directory", "s3://bucket/x"),
    _put("directory", "/not/mounted"),
    _put("train.steps", 0),
    _put("train.stesp", 3),
    _put("train.model.preset", "llama9", at="train.model.preset"),
    _odd_width,
    _put("train.schedule.warmpu_steps", 3),
    _put("train.schedule.type", "cosin"),
    _put("train.data.sources", []),
    _put("train.data.sources.0.type", "txt"),
    _put("train.eval", {"every_steps": 10**6}, at="train.eval.every_steps"),
    _put("train.run_directory", "gs://other/place"),
    _odd_batch,
    _too_few_devices,
    _wrong_slices,
    _put("image", "UPPER CASE", at="image.reference"),
    _put("env.A", 3),
    _put("env.NNX_JOB_INDEX", "0"),
    _put("env.TPU_WORKER_ID", "0"),
    _put("env.API_TOKEN", "x"),
    _put("env.SETTING", "ghp_" + "a1B2" * 8),
    _put("env.a-b", "x"),
    _put("env.GOOGLE_APPLICATION_CREDENTIALS", "/key.json"),
    _put("capacity", "spott", at="capacity.type"),
    _put("capacity", {"type": "reservation"}, at="capacity.name"),
    _put("queue", "Not A Queue", at="queue.name"),
    _put("priority", "UPPER"),
    _put("security", "open"),
    _host_network,
    _put("network", {"coordinator_port": 80}, at="network.coordinator_port"),
    _put("network", {"subdomain": "a.b"}, at="network.subdomain"),
    _put("grace_seconds", 3),
    _put("failure.mode", "clever"),
    _put("failure.max_restarts", -1),
    _put("ttl_seconds", -1),
    _put("volumes", [{"type": "pvc", "claim": "c", "mount_path": "relative"}], at="volumes.0.mount_path"),
    _put("volumes", [{"type": "pvc", "claim": "c", "mount_path": "/tmp"}], at="volumes.0.mount_path"),
    _put("volumes", [{"type": "disk", "mount_path": "/x"}], at="volumes.0.type"),
    _put("labels", {"nnxlaunch/job": "x"}, at="labels.nnxlaunch/job"),
    _put("labels", {"a": "b c"}, at="labels.a"),
    _put("annotations", {"bad key": "x"}, at="annotations.bad key"),
    _put("jobset_version", "0.5"),
    _put("resources", {"memory": "lots"}, at="resources.memory"),
)
