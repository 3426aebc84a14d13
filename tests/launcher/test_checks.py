"""Every cross-field rule: a value it refuses, with path and code, and the nearest value it accepts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.checks import problems_in, problems_of_document
from tests.launcher.regenerate import EXAMPLES
from trainer.config import Problem, apply_overrides

TPU = yaml.safe_load("""
name: run
tpu: {type: v5e-16}
image: registry.example.com/trainer:1
directory: gs://bucket/runs
train:
  steps: 100
  model: {preset: tiny}
  batch: {global_batch: 32, sequence_length: 128}
  mesh: {ici: {data: -1}}
  schedule: {type: cosine, learning_rate: 1.0e-3, warmup_steps: 10}
  data: {sources: [{type: synthetic}]}
""")
CPU = {**TPU, "cpu": {"hosts": 2, "devices_per_host": 4}}
del CPU["tpu"]


def found(document: dict[str, Any], *overrides: str, target: Any = "kubernetes") -> list[Problem]:
    return problems_of_document(apply_overrides(copy.deepcopy(document), overrides), target=target)[1]


def test_the_documents_of_this_file_have_no_problem() -> None:
    assert found(TPU) == [] and found(CPU) == []


STAGES = ["train.mesh.ici={data: 8, stage: 2}"]
RAMP, FIVE = "train.batch.ramp_up", ", steps_per_size: 5}"
RULES = [
    # document, overrides refused, overrides accepted, path, code
    (TPU, ["name=Run"], ["name=run-2"], "name", "name"),
    (TPU, ["name=2run"], ["name=run2"], "name", "name"),
    (TPU, ["name=default"], ["name=default", "service_account=default"], "name", "account-name"),
    # Pods are called NAME-slice-0-3-abcde: 63 - 5 - 1 - 1 - 9 = 47.
    (TPU, [f"name={'a' * 48}", "network.subdomain=n"], [f"name={'a' * 47}", "network.subdomain=n"], "name", "pod-name-length"),
    # Two digits of hosts and of slices: 63 - 5 - 2 - 2 - 9 = 45.
    (CPU, [f"name={'a' * 46}", "cpu={hosts: 11, slices: 11, devices_per_host: 1}", "train.batch.global_batch=121"],
     [f"name={'a' * 45}", "cpu={hosts: 11, slices: 11, devices_per_host: 1}", "train.batch.global_batch=121"], "name", "pod-name-length"),
    # Jobs are called NAME-slice-0: 63 - 5 - 1 - 2 = 55.
    (TPU, [f"name={'a' * 56}"], [f"name={'a' * 46}"], "name", "job-name-length"),
    # NAME-slice-0-0.SUBDOMAIN: 63 - 5 - 2 - 20 - 4 = 32.
    (TPU, [f"name={'a' * 33}", f"network.subdomain={'s' * 20}"], [f"name={'a' * 32}", f"network.subdomain={'s' * 20}"],
     "name", "coordinator-label-length"),
    (TPU, ["network.subdomain=a.b"], ["network.subdomain=n"], "network.subdomain", "subdomain"),
    (TPU, ["priority=High"], ["priority=high"], "priority", "object-name"),
    (TPU, ["queue=a_b"], ["queue=a-b"], "queue.name", "object-name"),
    (TPU, [f"queue={'q' * 64}"], [f"queue={'q' * 63}"], "queue.name", "object-name"),
    (TPU, ["queue={name: q, priority: A}"], ["queue={name: q, priority: a}"], "queue.priority", "object-name"),
    (TPU, ["service_account=a/b"], ["service_account=a.b"], "service_account", "object-name"),
    (TPU, ["image={reference: a, pull_secrets: [A]}"], ["image={reference: a, pull_secrets: [a]}"], "image.pull_secrets.0", "object-name"),
    (TPU, ["volumes=[{type: pvc, claim: A, mount_path: /d}]"], ["volumes=[{type: pvc, claim: a, mount_path: /d}]"],
     "volumes.0.claim", "object-name"),
    (TPU, ["volumes=[{type: gcs, bucket: 'gs://b', mount_path: /d}]"], ["volumes=[{type: gcs, bucket: bkt, mount_path: /d}]"],
     "volumes.0.bucket", "bucket"),
    (TPU, ["capacity={type: reservation, name: a/b}"], ["capacity={type: reservation, name: a-b}"], "capacity.name", "label-value"),
    (TPU, ["labels={k: 'a b'}"], ["labels={k: a.b}"], "labels.k", "label-value"),
    (TPU, [f"labels={{k: {'v' * 64}}}"], [f"labels={{k: {'v' * 63}}}"], "labels.k", "label-value"),
    (TPU, ["labels={'a b': v}"], ["labels={example.com/a-b: v}"], "labels.a b", "label-key"),
    (TPU, ["labels={app.kubernetes.io/managed-by: me}"], ["labels={app.kubernetes.io/name: me}"],
     "labels.app.kubernetes.io/managed-by", "own-key"),
    (TPU, ["annotations={a//b: v}"], ["annotations={a/b: v}"], "annotations.a//b", "label-key"),
    (TPU, [f"annotations={{k: {'v' * 262_144}}}"], [f"annotations={{k: {'v' * 262_143}}}"], "annotations", "annotations-size"),
    (TPU, ["tpu.type=v5p-120"], ["tpu.type=v5p-64"], "tpu.type", "tpu-size"),
    (TPU, ["tpu={type: v6e-8}", "train.mesh.ici.data=8"], ["tpu={type: v6e-8, machine: ct6e-standard-8t}", "train.mesh.ici.data=8"],
     "tpu.type", "tpu-ambiguous"),
    (TPU, ["tpu={type: null, accelerator: v5p, topology: 4x4x640}"], ["tpu={type: null, accelerator: v5p, topology: 2x2x4}"],
     "tpu.topology", "tpu-topology"),
    (TPU, ["tpu={type: v5e-4, slices: 2}"], ["tpu={type: v5e-4}"], "tpu.slices", "multislice-single-host"),
    (TPU, ["capacity=dws"], ["capacity=dws", "queue=q"], "queue", "dws-queue"),
    (TPU, ["placement=tas"], ["placement=tas", "queue=q"], "queue", "tas-queue"),
    (CPU, ["placement=tas", "queue=q"], ["placement={type: tas, level: kubernetes.io/hostname}", "queue=q"],
     "placement.level", "tas-level"),
    (TPU, ["placement={type: tas, level: 'a b'}", "queue=q"], ["placement={type: tas, level: a/b}", "queue=q"],
     "placement.level", "label-key"),
    (TPU, ["placement={type: exclusive, topology_key: ''}"], ["placement=exclusive"], "placement.topology_key", "placement-key"),
    (TPU, ["placement=super_slice", "queue=q"], ["tpu.type=tpu7x-128", "train.batch.global_batch=128", "placement=super_slice", "queue=q"],
     "placement", "super-slice-family"),
    (TPU, ["tpu.type=tpu7x-64", "train.batch.global_batch=64", "placement=super_slice", "queue=q"],
     ["tpu.type=tpu7x-128", "train.batch.global_batch=128", "placement=super_slice", "queue=q"], "tpu", "super-slice-topology"),
    (TPU, ["tpu.type=tpu7x-128", "train.batch.global_batch=128", "placement=super_slice", "queue=q", f"name={'a' * 29}"],
     ["tpu.type=tpu7x-128", "train.batch.global_batch=128", "placement=super_slice", "queue=q", f"name={'a' * 28}"],
     "name", "super-slice-name"),
    (TPU, ["network.host_network=true"], ["network.host_network=true", "security=privileged"], "network.host_network", "host-network"),
    (TPU, ["network.host_network=true", "security=root_no_caps"], ["security=root_no_caps"], "network.host_network", "host-network"),
    (CPU, ["network.host_network=true", "security=privileged"], ["security=privileged"], "network.host_network", "host-network-ports"),
    (TPU, ["network.coordinator_port=8471"], ["network.coordinator_port=8470"], "network.coordinator_port", "port"),
    (TPU, ["capacity=spot", "grace_seconds=31"], ["capacity=spot", "grace_seconds=30"], "grace_seconds", "grace-spot"),
    (TPU, ["grace_seconds=14"], ["grace_seconds=15"], "grace_seconds", "grace-short"),
    (TPU, ["jobset_version='0.9'"], ["jobset_version='0.9'", "failure.mode=strict"], "jobset_version", "jobset-version"),
    (TPU, ["jobset_version='0.6'", "failure.mode=simple"], ["jobset_version='0.7'", "failure.mode=simple"],
     "jobset_version", "jobset-version"),
    (TPU, ["env={a-b: x}"], ["env={a_b: x}"], "env.a-b", "env-name"),
    (TPU, ["env={NNX_JOB_INDEX: '0'}"], ["env={MY_JOB_INDEX: '0'}"], "env.NNX_JOB_INDEX", "env-reserved"),
    (TPU, ["env={MEGASCALE_SLICE_ID: '0'}"], ["env={XLA_FLAGS: '0'}"], "env.MEGASCALE_SLICE_ID", "env-reserved"),
    (TPU, ["env={JAX_PLATFORMS: cpu}"], ["env={JAX_TRACEBACK_FILTERING: 'off'}"], "env.JAX_PLATFORMS", "env-reserved"),
    (TPU, ["env={JAX_NUM_CPU_DEVICES: '8'}"], ["env={JAX_LOG_COMPILES: '1'}"], "env.JAX_NUM_CPU_DEVICES", "env-reserved"),
    (TPU, ["env={PYTHONPATH: /mine}"], ["env={PYTHONFAULTHANDLER: '1'}"], "env.PYTHONPATH", "env-reserved"),
    (TPU, ["env={PATH: {secretKeyRef: {name: a, key: b}}}"], ["env={MY_PATH: /bin}"], "env.PATH", "env-reserved"),
    (TPU, ["env={HOME: /home/me}"], ["env={HF_HOME: /tmp/hf}"], "env.HOME", "env-reserved"),
    (TPU, ["env={HF_TOKEN: x}"], ["env={HF_TOKEN: {secretKeyRef: {name: a, key: b}}}"], "env.HF_TOKEN", "secret"),
    (TPU, ["env={TOKENIZERS_TOKEN: x}"], ["env={TOKENIZERS_PARALLELISM: 'false'}"], "env.TOKENIZERS_TOKEN", "secret"),
    (TPU, ["env={DB: 'postgres://me:hunter2@db/x'}"], ["env={DB: 'postgres://db/x'}"], "env.DB", "secret"),
    (TPU, ["env={A: q8Zr3Lm0Xw7Tb5Yc9Vd2Nf4K}"], ["env={A: --xla_tpu_scoped_vmem_limit_kib=98304}"], "env.A", "secret"),
    (TPU, ["env={A: 0f1e2d3c4b5a69788796a5b4c3d2e1f0}"], ["env={A_COMMIT: 0f1e2d3c4b5a69788796a5b4c3d2e1f0}"], "env.A", "secret"),
    (TPU, ["env={GOOGLE_APPLICATION_CREDENTIALS: /k}"], [], "env.GOOGLE_APPLICATION_CREDENTIALS", "key-file"),
    (TPU, ["env={A: {secretKeyRef: {name: a, key: 'a b'}}}"], ["env={A: {secretKeyRef: {name: a, key: a.b}}}"],
     "env.A.secretKeyRef.key", "secret-key"),
    (TPU, ["annotations={note: 'AKIAABCDEFGHIJKLMNOP'}"], ["annotations={note: 'AKIA'}"], "annotations.note", "secret"),
    (TPU, ["volumes=[{type: memory, size_gib: 1, mount_path: x}]"], ["volumes=[{type: memory, size_gib: 1, mount_path: /x}]"],
     "volumes.0.mount_path", "mount-path"),
    (TPU, ["volumes=[{type: memory, size_gib: 1, mount_path: /a/../b}]"], [], "volumes.0.mount_path", "mount-path"),
    (TPU, ["volumes=[{type: memory, size_gib: 1, mount_path: /dev/shm/}]"], [], "volumes.0.mount_path", "mount-twice"),
    (TPU, ["image=A:1"], ["image=a:1"], "image.reference", "image"),
    (TPU, ["image='a:1; rm -rf /'"], ["image='r.example.com:5000/a/b:1.2-x'"], "image.reference", "image"),
    (TPU, ["image=UPPER/x"], ["image=UPPER.example.com/x"], "image.reference", "image"),
    (TPU, ["image=Registry/x"], ["image='Registry:5000/x'"], "image.reference", "image"),
    (TPU, ["image=a..b/X"], ["image=localhost/x"], "image.reference", "image"),
    (TPU, ["image='a:b:1/x'"], ["image='localhost:5000/x'"], "image.reference", "image"),
    (TPU, ["image=me/X"], ["image=me/x"], "image.reference", "image"),
    (TPU, ["image=null"], [], "image", "image-needed"),
    (TPU, ["directory=gs://b/../c"], ["directory=gs://bkt/c"], "directory", "path"),
    (TPU, ["directory=gs://UPPER/c"], ["directory=gs://lower/c"], "directory", "path"),
    (TPU, ["directory=https://bucket/c"], [], "directory", "path"),
    (TPU, ["train.run_directory=gs://bucket/other"], ["train.run_directory=gs://bucket/runs/run"], "train.run_directory", "run-directory"),
    (TPU, ["directory=/data"], ["directory=/data", "volumes=[{type: pvc, claim: c, mount_path: /data}]"], "directory", "path-not-mounted"),
    (TPU, ["directory=/data", "volumes=[{type: memory, size_gib: 1, mount_path: /data}]"],
     ["directory=/data", "volumes=[{type: gcs, bucket: bkt, mount_path: /data}]"], "directory", "path-not-kept"),
    (TPU, ["directory=/data", "volumes=[{type: pvc, claim: c, mount_path: /data, read_only: true}]"], [], "directory", "path-read-only"),
    (TPU, ["train.data.cache_directory=/cache"], ["train.data.cache_directory=gs://bucket/cache"],
     "train.data.cache_directory", "path-not-mounted"),
    # The trainer's own rules, seen from the spec.
    (TPU, ["train.mesh.ici={data: 3}"], ["train.mesh.ici={data: 16}"], "train.mesh.ici", "mesh"),
    (TPU, ["train.mesh.dcn={data: 2}"], ["train.mesh.dcn={data: 1}"], "train.mesh.dcn", "mesh"),
    (TPU, ["train.batch.global_batch=40"], ["train.batch.global_batch=48"], "train.batch.global_batch", "batch-shards"),
    (TPU, ["train.batch.accumulation=4"], ["train.batch.accumulation=2"], "train.batch.global_batch", "batch-shards"),
    (TPU, ["train.batch.ramp_up={start: 32, increment: 16, steps_per_size: 5}"],
     ["train.batch.ramp_up={start: 16, increment: 16, steps_per_size: 5}"], "train.batch.ramp_up.start", "ramp-up"),
    (TPU, ["train.batch.ramp_up={start: 16, increment: 16, steps_per_size: 100}"],
     ["train.batch.ramp_up={start: 16, increment: 16, steps_per_size: 99}"], "train.batch.ramp_up.steps_per_size", "never"),
    (TPU, ["train.batch.global_batch=96", "train.batch.ramp_up={start: 16, increment: 40, steps_per_size: 5}"],
     ["train.batch.global_batch=96", "train.batch.ramp_up={start: 16, increment: 32, steps_per_size: 5}"],
     "train.batch.ramp_up", "batch-shards"),
    (TPU, ["train.batch={global_batch: 128, accumulation: 4, ramp_up: {start: 16, increment: 32, steps_per_size: 5}}"],
     ["train.batch={global_batch: 128, accumulation: 4, ramp_up: {start: 32, increment: 32, steps_per_size: 5}}"],
     "train.batch.ramp_up", "ramp-up"),
    (TPU, [*STAGES, "train.pipeline.microbatches=4", "train.batch.global_batch=64", f"{RAMP}={{start: 16, increment: 16{FIVE}"],
     [*STAGES, "train.pipeline.microbatches=4", "train.batch.global_batch=64", f"{RAMP}={{start: 32, increment: 32{FIVE}"],
     "train.batch.ramp_up", "pipeline"),
    (CPU, ["train.batch={global_batch: 32, ramp_up: {start: 8, increment: 5, steps_per_size: 5}}", "train.mesh.ici={data: 4}",
           "cpu.slices=2", "train.steps=40", "train.diloco={sync_every_steps: 10, transport: files}"],
     ["train.batch={global_batch: 32, ramp_up: {start: 16, increment: 16, steps_per_size: 5}}", "train.mesh.ici={data: 8}",
      "cpu.slices=2", "train.steps=40", "train.diloco={sync_every_steps: 10, transport: files}"],
     "train.batch.ramp_up.increment", "diloco"),
    (TPU, ["train.eval={every_steps: 5, global_batch: 8}"], ["train.eval={every_steps: 5, global_batch: 16}"],
     "train.eval.global_batch", "batch-shards"),
    (TPU, ["train.mesh.ici={data: 1, tensor: 16}"], ["train.mesh.ici={data: 8, tensor: 2}"],
     "train.model.segments.0.pattern.0.attention.heads", "model-shards"),
    (TPU, ["train.model.width=200", "train.mesh.ici={fsdp: 16}"], ["train.mesh.ici={fsdp: 16}"], "train.model.width", "model-shards"),
    (TPU, ["train.mesh.ici={data: 2, context: 8}", "train.batch.sequence_length=100"],
     ["train.mesh.ici={data: 2, context: 8}", "train.batch.sequence_length=112"], "train.batch.sequence_length", "length-shards"),
    (TPU, ["train.mesh.ici={data: 8, stage: 2}"],
     ["train.mesh.ici={data: 8, stage: 2}", "train.pipeline={}"], "train.pipeline", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.layers=3"], [*STAGES, "train.pipeline.layers=2"], "train.pipeline.layers", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.layers=6"], [*STAGES, "train.pipeline.layers=4"], "train.pipeline.layers", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.repeats=4"], [*STAGES, "train.pipeline.repeats=2"], "train.pipeline.layers", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.segment=1"], [*STAGES, "train.pipeline.segment=0"], "train.pipeline.segment", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.microbatches=3"],
     [*STAGES, "train.pipeline.microbatches=4"], "train.pipeline.microbatches", "pipeline"),
    (TPU, [*STAGES, "train.pipeline={delayed_forwarding: true, microbatches: 2}"],
     [*STAGES, "train.pipeline={delayed_forwarding: true, microbatches: 4}"], "train.pipeline.microbatches", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.gather=repeat"], [*STAGES, "train.pipeline={gather: repeat, repeats: 2}"],
     "train.pipeline.gather", "pipeline"),
    (TPU, [*STAGES, "train.pipeline.microbatches=4", "train.batch.global_batch=48"],
     [*STAGES, "train.pipeline.microbatches=4", "train.batch.global_batch=64"], "train.batch.global_batch", "pipeline"),
    (TPU, [*STAGES, "train.pipeline={}", "train.eval={every_steps: 10, global_batch: 24}"],
     [*STAGES, "train.pipeline={}", "train.eval={every_steps: 10, global_batch: 48}"], "train.eval.global_batch", "pipeline"),
    (TPU, ["train.mesh.ici={data: 8, diloco: 2}"], ["train.mesh.ici={data: 8, expert: 2}"], "train.mesh.ici.diloco", "axis-unused"),
    (TPU, ["train.mesh.ici={data: 4, tensor: 4}"], ["train.mesh.ici={data: 4, tensor: 4}", "train.sharding.unsharded_limit=0.08"],
     "train.sharding.unsharded_limit", "unsharded"),
    (TPU, ["train.optimizer.groups=[{tensors: ['axis:vocb'], frozen: true}]"],
     ["train.optimizer.groups=[{tensors: ['axis:vocab'], frozen: true}]"], "train.optimizer.groups.0.tensors.0", "selects-nothing"),
    (TPU, ["train.optimizer.groups=[{tensors: ['*/mlp/*', '*/nrm/*']}]"],
     ["train.optimizer.groups=[{tensors: ['*/mlp/*', '*_norm/*']}]"], "train.optimizer.groups.0.tensors.1", "selects-nothing"),
    (TPU, ["train.optimizer.groups=[{tensors: ['*'], frozen: true}]"],
     ["train.optimizer.groups=[{tensors: ['axis:embed'], frozen: true}]"], "train.optimizer.groups", "frozen"),
    (TPU, ["train.sharding.rules=[{axis: mpl, mesh: [fsdp]}]"], ["train.sharding.rules=[{axis: mlp, mesh: [fsdp]}]"],
     "train.sharding.rules.0.axis", "logical-axis"),
    (TPU, ["train.sharding.rules=[{axis: mlp, mesh: [fsdp], weight: embed/table}]"],
     ["train.sharding.rules=[{axis: vocab, mesh: [fsdp], weight: embed/table}]"], "train.sharding.rules.0.axis", "logical-axis"),
    (TPU, ["train.sharding.rules=[{axis: vocab, mesh: [fsdp], weight: embd/table}]"],
     ["train.sharding.rules=[{axis: vocab, mesh: [fsdp], weight: 'embed/*'}]"], "train.sharding.rules.0.weight", "weight-pattern"),
    (TPU, ["train.sharding.rules=[{axis: mlp, mesh: []}, {axis: act_heads, mesh: [data]}]"],
     ["train.sharding.rules=[{axis: mlp, mesh: []}, {axis: act_heads, mesh: [tensor]}]"], "train.sharding.rules.1.mesh", "heads-rule"),
    (TPU, ["train.model.attention_kernel=splash", "train.batch.sequence_length=320"],
     ["train.model.attention_kernel=splash", "train.batch.sequence_length=384"], "train.model.attention_kernel", "kernel"),
    (TPU, ["train.model.preset=gpt-oss-20b", "train.model.expert_kernel=megablox"],
     ["train.model.preset=gpt-oss-20b", "train.model.expert_kernel=ragged_dot"], "train.model.expert_kernel", "kernel"),
    (TPU, ["train.mesh.ici={data: 8, context: 2}", "train.batch.sequence_length=256", "train.model.attention_kernel=splash"],
     ["train.mesh.ici={data: 8, context: 2}", "train.batch.sequence_length=256"], "train.model.attention_kernel", "kernel"),
    (TPU, ["train.batch.sequence_length=256", "train.loss.tiles=3"], ["train.batch.sequence_length=256", "train.loss.tiles=2"],
     "train.loss.tiles", "tiles"),
    (TPU, ["train.schedule.warmup_steps=101"], ["train.schedule.warmup_steps=100"], "train.schedule.warmup_steps", "schedule"),
    (TPU, ["train.schedule.decay_until_step=10"], ["train.schedule.decay_until_step=11"], "train.schedule.decay_until_step", "schedule"),
    (TPU, ["train.eval={every_steps: 101}"], ["train.eval={every_steps: 100}"], "train.eval.every_steps", "never"),
    (TPU, ["train.checkpoint={every_steps: 10, keep_every_steps: 15}"], ["train.checkpoint={every_steps: 10, keep_every_steps: 20}"],
     "train.checkpoint.keep_every_steps", "never"),
    (TPU, ["train.ema={decay: 0.999}", "train.diloco={sync_every_steps: 10}", "train.mesh.ici={data: 8, diloco: 2}"],
     ["train.diloco={sync_every_steps: 10}", "train.mesh.ici={data: 8, diloco: 2}"], "train.ema", "ema"),
    (TPU, ["train.eval={every_steps: 5, weights: ema}"], ["train.eval={every_steps: 5, weights: ema}", "train.ema={decay: 0.999}"],
     "train.eval.weights", "ema"),
    (TPU, ["train.checkpoint.restore=one_replica", "train.mesh.ici={fsdp: 16}"],
     ["train.checkpoint.restore=one_replica", "train.mesh.ici={data: 2, fsdp: 8}"], "train.checkpoint.restore", "restore"),
    (TPU, ["train.checkpoint.restore=one_replica", "train.mesh.ici={data: 2, fsdp: 8}", "train.sharding.optimizer=over_data"],
     ["train.checkpoint.restore=one_replica", "train.mesh.ici={data: 2, fsdp: 8}"], "train.checkpoint.restore", "restore"),
    (TPU, ["train.profiler={first_step: 1, last_step: 100}"], ["train.profiler={first_step: 1, last_step: 99}"],
     "train.profiler.last_step", "never"),
    (TPU, ["train.profiler={first_step: 1, last_step: 2, processes: [4]}"],
     ["train.profiler={first_step: 1, last_step: 2, processes: [3]}"], "train.profiler.processes.0", "never"),
    (TPU, ["train.model.vocab_size=256", "train.data.sources=[{type: text, paths: ['gs://bkt/a']}]"],
     ["train.model.vocab_size=258", "train.data.sources=[{type: text, paths: ['gs://bkt/a']}]"], "train.model.vocab_size", "vocabulary"),
    (TPU, ["train.data.sources=[{type: text, paths: [\"gs://bkt/a\\tb\"]}]"], [], "train.data.sources.0.paths.0", "path"),
    (TPU, ["train.compile_cache=gs://bucket//x"], ["train.compile_cache=gs://bucket/x"], "train.compile_cache", "path"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "refused", "accepted", "path", "code"), RULES, ids=[f"{code}-{i}" for i, (*_, code) in enumerate(RULES)]
)
def test_a_rule_refuses_what_breaks_it_and_accepts_what_does_not(
    document: dict[str, Any], refused: list[str], accepted: list[str], path: str, code: str
) -> None:
    problems = found(document, *refused)
    assert (path, code) in [(problem.path, problem.code) for problem in problems], problems
    (problem,) = [problem for problem in problems if (problem.path, problem.code) == (path, code)]
    assert problem.message and problem.hint
    if accepted:
        assert found(document, *accepted) == []


def test_all_problems_are_reported_in_one_run_those_of_form_and_those_across_fields() -> None:
    problems = found(TPU, "nmae=x", "grace_seconds=3", "train.mesh.ici={data: 5}", "env={A_TOKEN: x}", "train.stpes=4", "capacity=spott")
    assert {problem.path for problem in problems} >= {
        "nmae", "grace_seconds", "train.mesh.ici", "env.A_TOKEN", "train.stpes", "capacity.type",
    }  # fmt: skip


def test_a_model_or_schedule_that_is_not_known_hides_no_other_problem_and_brings_none() -> None:
    others = "name=A_B", "train.mesh.ici={data: 5}", "train.steps=x"
    for wrong, path in (
        ("train.model.preset=tinny", "train.model.preset"), ("train.model=null", "train.model"),
        ("train.schedule.type=cosin", "train.schedule.type"),
    ):  # fmt: skip
        assert {problem.path for problem in found(TPU, wrong, *others)} == {path, "name", "train.mesh.ici", "train.steps"}
        assert {problem.path for problem in found(TPU, wrong, "train.batch.global_batch=7")} == {path, "train.batch.global_batch"}
        for example in sorted(EXAMPLES.glob("*.job.yaml")):
            document = yaml.safe_load(example.read_text())
            assert [problem.path for problem in found(document, wrong, target=None)] == [path], (example.name, wrong)


def test_an_accelerator_that_does_not_exist_hides_no_other_problem_and_brings_none() -> None:
    wrong = "tpu={type: v5p-129}"
    others = "directory=runs", "network.coordinator_port=8471", "image=null", "train.steps=5"
    assert {problem.path for problem in found(TPU, wrong, *others)} == {
        "tpu.type", "directory", "network.coordinator_port", "image", "train.schedule.warmup_steps",
    }  # fmt: skip
    for example in sorted(EXAMPLES.glob("*.job.yaml")):
        document = yaml.safe_load(example.read_text())
        if "tpu" in document:
            document["tpu"] = {"type": "v5p-129", "slices": document["tpu"].get("slices", 1)}
            assert [problem.path for problem in found(document, target=None)] == ["tpu.type"], example.name


def test_a_train_file_that_cannot_be_read_hides_no_problem_of_the_rest_and_brings_none(tmp_path: Path) -> None:
    for example in sorted(EXAMPLES.glob("*.job.yaml")):
        spec = tmp_path / example.name
        spec.write_text(yaml.safe_dump({**yaml.safe_load(example.read_text()), "train": "no-such.yaml"}))
        for overrides, wrong in (((), set[str]()), (("name=5", "grace_seconds=3"), {"name", "grace_seconds"})):
            none, problems = problems_in(spec, overrides)
            assert none is None and {problem.path for problem in problems} == {"train", *wrong}, example.name
    (problem,) = [problem for problem in found(TPU, "name=5", "directory=runs") if problem.path == "directory"]
    assert "runs/NAME" in problem.message


def test_a_mesh_or_slices_that_do_not_fit_hide_no_problem_that_needs_no_mesh() -> None:
    alone = "train.steps=5", "train.eval={every_steps: 2, weights: ema}"
    expected = {"train.schedule.warmup_steps", "train.eval.weights"}
    assert {problem.path for problem in found(TPU, "train.mesh.ici={data: 5}", *alone)} == {"train.mesh.ici", *expected}
    apart = "tpu.slices=3", "train.diloco={sync_every_steps: 5, transport: files}"
    assert {problem.path for problem in found(TPU, *apart, *alone)} == {"train.batch.global_batch", *expected}
    found_in_all = {problem.path for problem in found(TPU, *apart, *alone, "train.mesh.ici={data: 5}")}
    assert found_in_all == {"train.batch.global_batch", "train.mesh.ici", *expected}


@pytest.mark.parametrize("key", ["name", "directory"])
@pytest.mark.parametrize("value", ["123", "null", None])
def test_a_name_or_directory_that_is_no_text_is_one_problem_and_what_follows_from_it_is_none(key: str, value: str | None) -> None:
    for document in (TPU, CPU):
        without = {other: part for other, part in document.items() if other != key}
        assert [problem.path for problem in found(without, *([f"{key}={value}"] if value else []))] == [key]


def test_a_cpu_job_may_keep_its_files_on_this_machine_but_not_on_a_cluster() -> None:
    assert found(CPU, "directory=runs", target=None) == []
    assert [problem.code for problem in found(CPU, "directory=runs")] == ["path-not-mounted"]


def test_files_that_a_job_of_this_machine_reads_are_there(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/text.txt").touch()
    source = "train.data.sources=[{type: text, paths: ['%s']}]"
    for path, problems in (
        ("a/b/text.txt", 0), ("a/**/*.txt", 0), ("a/**", 0), ("a/*.txt", 1), ("a/b", 1), ("a/c/text.txt", 1),
    ):  # fmt: skip
        override = source % (tmp_path / path)
        missing = found(CPU, override, "directory=runs", target="local")
        assert [(p.path, p.code) for p in missing] == [("train.data.sources.0.paths.0", "no-such-file")] * problems, path
        assert all(str(tmp_path / path) in problem.message and problem.hint for problem in missing)
        assert found(CPU, override, "directory=runs", target=None) == []  # it may be meant for another machine
    tokenizer = f"train.data.tokenizer={{type: huggingface, path: {tmp_path}/tokenizer.json}}"
    assert [problem.path for problem in found(CPU, tokenizer, "directory=runs", target="local")] == ["train.data.tokenizer.path"]
    assert found(CPU, source % "gs://bucket/no-such-file", "directory=runs", target="local") == []
    assert found(TPU, tokenizer, target="local") == []  # as for `compile`, which reads no data


def test_an_axis_that_is_not_one_comes_with_the_nearest() -> None:
    rules = "[{axis: mpl, mesh: [fsdb]}, {axis: headss, mesh: [tensor]}, {axis: vocab, mesh: [fsdp], weight: embed/tabel}]"
    hints = {problem.path: problem.hint for problem in found(TPU, f"train.sharding.rules={rules}")}
    assert hints == {"train.sharding.rules.0.mesh.0": "did you mean 'fsdp'?"}
    hints = {problem.path: problem.hint for problem in found(TPU, f"train.sharding.rules={rules.replace('fsdb', 'fsdp')}")}
    assert hints == {
        "train.sharding.rules.0.axis": "did you mean 'mlp'?",
        "train.sharding.rules.1.axis": "did you mean 'heads'?",
        "train.sharding.rules.2.weight": "did you mean 'embed/table'?",
    }


def test_a_name_that_is_not_one_comes_with_one_that_is() -> None:
    (problem,) = [problem for problem in found(TPU, "name=My Run_3") if problem.code == "name"]
    assert "my-run-3" in problem.hint
