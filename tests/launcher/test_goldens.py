"""The examples of `k8s/examples` are valid, and their rendered manifests are what the launcher renders today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.checks import load
from launcher.manifest import render, to_yaml
from launcher.spec import JobSpec
from tests.launcher.regenerate import golden, specs
from trainer import contract

SENDABLE = [path for path in specs() if path.name != "quickstart.job.yaml"]
IDS = [path.name.removesuffix(".job.yaml") for path in specs()]


@pytest.mark.parametrize("path", specs(), ids=IDS)
def test_the_rendered_file_is_what_render_gives(path: Path) -> None:
    assert golden(path).read_text(encoding="utf-8") == to_yaml(render(load(path))), "run: python -m tests.launcher.regenerate"


@pytest.mark.parametrize("path", SENDABLE, ids=[path.name for path in SENDABLE])
def test_every_example_but_the_quickstart_may_be_sent_to_a_cluster_as_it_is(path: Path) -> None:
    load(path, target="kubernetes")


def job_of(spec: JobSpec) -> dict[str, Any]:
    return render(spec)[-1]["spec"]["replicatedJobs"][0]


def pod_of(spec: JobSpec) -> dict[str, Any]:
    return job_of(spec)["template"]["spec"]["template"]["spec"]


def example(name: str, *overrides: str) -> JobSpec:
    return load(specs()[0].with_name(f"{name}.job.yaml"), overrides)


@pytest.mark.parametrize(
    ("name", "replicas", "parallelism", "chips"),
    [
        ("v5e-16", 1, 4, 4),
        ("v5p-128-spot", 4, 16, 4),
        ("v6e-256-reservation", 2, 64, 4),
        ("tpu7x-128", 1, 16, 4),
        ("dws-queued", 1, 16, 4),
        ("cpu-two-hosts", 1, 2, None),
    ],
)
def test_one_job_a_slice_and_one_pod_a_host(name: str, replicas: int, parallelism: int, chips: int | None) -> None:
    spec = example(name)
    job, container = job_of(spec), pod_of(spec)["containers"][0]
    slice_job = job["template"]["spec"]
    assert (job["replicas"], slice_job["parallelism"], slice_job["completions"]) == (replicas, parallelism, parallelism)
    assert container["resources"].get("limits", {}).get("google.com/tpu") == chips
    assert container["resources"].get("requests", {}).get("google.com/tpu") == chips


def test_a_restarted_container_never_rejoins_alone_and_one_lost_host_fails_the_slice() -> None:
    job = job_of(example("v5e-16"))["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"], job["podReplacementPolicy"]) == ("Indexed", 0, "Failed")
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_trainer_is_process_one_and_there_is_no_shell_and_no_probe() -> None:
    container = pod_of(example("v5p-128-spot"))["containers"][0]
    assert container["command"] == ["python", "-m", "trainer", "--config", f"{contract.CONFIG_DIRECTORY}/{contract.CONFIG_FILE}"]
    assert not {"args", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle"} & set(container)


def names_of(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in container["env"]}


def test_ranks_come_from_the_downward_api_and_a_coordinator_is_named_only_without_tpus() -> None:
    cpu, tpu = (names_of(pod_of(example(name))["containers"][0]) for name in ("cpu-two-hosts", "v5p-128-spot"))
    for variables in (cpu, tpu):
        field = variables[contract.JOB_INDEX]["valueFrom"]["fieldRef"]["fieldPath"]
        assert field == "metadata.labels['jobset.sigs.k8s.io/job-index']"
        assert contract.COMPLETION_INDEX not in variables  # Kubernetes sets it
        assert not [name for name in variables if name.startswith(("TPU_", "MEGASCALE_"))]
    assert cpu[contract.COORDINATOR]["value"] == f"cpu-two-hosts-slice-0-0.{example('cpu-two-hosts').subdomain}:8482"
    assert cpu[contract.DEVICES_PER_HOST]["value"] == "4" and contract.PEAK_TFLOPS_PER_DEVICE not in cpu
    assert contract.COORDINATOR not in tpu and contract.DEVICES_PER_HOST not in tpu
    assert tpu[contract.PEAK_TFLOPS_PER_DEVICE]["value"] == "459" and tpu[contract.NUM_SLICES]["value"] == "4"


def test_a_device_of_tpu7x_is_half_a_chip() -> None:
    variables = names_of(pod_of(example("tpu7x-128"))["containers"][0])
    assert variables[contract.PEAK_TFLOPS_PER_DEVICE]["value"] == "1153.5"


def test_the_default_passes_the_restricted_pod_security_level() -> None:
    pod = pod_of(example("v5e-16"))
    container = pod["containers"][0]
    assert pod["securityContext"] | {"fsGroup": 0, "fsGroupChangePolicy": ""} == {
        "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 0, "fsGroupChangePolicy": "",
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True,
    }  # fmt: skip
    assert pod["automountServiceAccountToken"] is False and "hostNetwork" not in pod
    kinds = [set(volume) - {"name"} for volume in pod["volumes"]]
    assert all(kind <= {"configMap", "emptyDir", "csi", "persistentVolumeClaim"} for kind in kinds)


def test_host_networking_changes_the_dns_policy_with_it_and_drops_the_policy_that_cannot_bind() -> None:
    spec = example("v5e-16", "network.host_network=true", "security=privileged")
    pod = pod_of(spec)
    assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert [manifest["kind"] for manifest in render(spec)] == ["ConfigMap", "JobSet"]


def test_shared_memory_has_a_size_of_its_own() -> None:
    sizes = [volume["emptyDir"]["sizeLimit"] for spec in (example("v5e-16"), example("v5e-16", "resources.shared_memory_gib=2"))
             for volume in pod_of(spec)["volumes"] if volume["name"] == "shm"]  # fmt: skip
    assert sizes == ["8Gi", "2Gi"]


def test_two_jobs_of_a_namespace_have_different_headless_services() -> None:
    one, two = example("v5e-16"), example("v5e-16", "name=another")
    assert one.subdomain != two.subdomain and len(one.subdomain) == 6


@pytest.mark.parametrize(
    ("mode", "pod_rules", "actions"),
    [("smart", 3, ["FailJobSet", "RestartJobSetAndIgnoreMaxRestarts"]), ("strict", 1, ["FailJobSet"]), ("simple", 0, [])],
)
def test_each_failure_mode_has_its_rules(mode: str, pod_rules: int, actions: list[str]) -> None:
    spec = example("v5e-16", f"failure.mode={mode}", "failure.max_restarts=7")
    policy, job = render(spec)[-1]["spec"]["failurePolicy"], job_of(spec)["template"]["spec"]
    assert policy["maxRestarts"] == 7 and policy["restartStrategy"] == "BlockingRecreate"
    assert [rule["action"] for rule in policy.get("rules", [])] == actions
    assert len(job.get("podFailurePolicy", {}).get("rules", [])) == pod_rules


@pytest.mark.parametrize(
    ("capacity", "selector", "toleration"),
    [
        ("on_demand", {}, None),
        ("spot", {"cloud.google.com/gke-spot": "true"}, "cloud.google.com/gke-spot"),
        ("flex_start", {"cloud.google.com/gke-flex-start": "true"}, None),
        ("{type: dws, max_run_seconds: 600}", {"cloud.google.com/gke-flex-start": "true"}, "cloud.google.com/gke-queued"),
        (
            "{type: reservation, name: r, project: p, block: b, sub_block: s}",
            {
                "cloud.google.com/reservation-name": "r", "cloud.google.com/reservation-affinity": "specific",
                "cloud.google.com/reservation-project": "p", "cloud.google.com/reservation-blocks": "b",
                "cloud.google.com/reservation-subblocks": "s",
            },
            None,
        ),
    ],
)  # fmt: skip
def test_each_capacity_selects_and_tolerates_its_hosts(capacity: str, selector: dict[str, str], toleration: str | None) -> None:
    pod = pod_of(example("v5e-16", f"capacity={capacity}", "queue=q"))
    tpu = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4"}
    assert pod["nodeSelector"] == tpu | selector
    assert [one["key"] for one in pod["tolerations"]] == ["google.com/tpu", *([toleration] if toleration else [])]
    assert all(one["operator"] == "Exists" for one in pod["tolerations"])


def test_an_ambiguous_topology_selects_its_machine_by_chips_per_host() -> None:
    overrides = ("tpu={type: v6e-8, machine: ct6e-standard-8t}", "train.batch.global_batch=64")
    pod = pod_of(example("v5e-16", *overrides))
    assert pod["nodeSelector"]["cloud.google.com/gke-accelerator-count"] == "8"
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 8


def test_topology_aware_scheduling_names_whole_slices() -> None:
    request = ("queue=q", "placement=tas")
    one = job_of(example("v5e-16", *request))["template"]["spec"]["template"]["metadata"]["annotations"]
    assert one["kueue.x-k8s.io/podset-required-topology"] == "cloud.google.com/gke-tpu-slice-4x4-id"
    spec = example("v5p-128-spot", *request)
    several = job_of(spec)["template"]["spec"]["template"]["metadata"]["annotations"]
    assert several["kueue.x-k8s.io/podset-slice-required-topology"] == "cloud.google.com/gke-tpu-slice-4x4x4-id"
    assert several["kueue.x-k8s.io/podset-slice-size"] == "16"
    assert "annotations" not in render(spec)[-1]["metadata"]  # no exclusive placement beside it


def test_a_super_slice_asks_for_its_topology_by_annotation_instead_of_selector() -> None:
    spec = example("tpu7x-128", "placement=super_slice", "queue=q")
    template = job_of(spec)["template"]["spec"]["template"]
    assert template["metadata"]["annotations"]["cloud.google.com/gke-tpu-slice-topology"] == "4x4x4"
    assert "cloud.google.com/gke-tpu-topology" not in template["spec"]["nodeSelector"]


@pytest.mark.parametrize(
    ("image", "policy"),
    [("r.example/a:1", "Always"), ("user/a:1", "Always"), (f"r.example/a@sha256:{'0' * 64}", "IfNotPresent"), ("a:1", "IfNotPresent")],
)
def test_a_movable_tag_of_a_registry_is_pulled_again_at_every_restart(image: str, policy: str) -> None:
    assert pod_of(example("v5e-16", f"image={image}"))["containers"][0]["imagePullPolicy"] == policy


@pytest.mark.parametrize("text", ["y", "N", "on", "1e5", "12345678901234e5", "0o17", "1_000", ".5", "-m", "1:30", "null", "~", "0x1f"])
def test_text_that_another_yaml_parser_takes_for_something_else_is_quoted(text: str) -> None:
    assert to_yaml([{"key": text}]) == f"---\nkey: '{text}'\n"


def test_the_network_policy_lets_a_job_reach_itself_names_credentials_and_https_and_nothing_reach_it() -> None:
    (policy,) = (manifest for manifest in render(example("v5e-16")) if manifest["kind"] == "NetworkPolicy")
    own = {"podSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": "qwen3-small"}}}
    assert policy["spec"]["podSelector"] == own["podSelector"] and policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["ingress"] == [{"from": [own]}]
    allowed = {
        (str(peer.get("ipBlock", {}).get("cidr", "job" if peer else "all")), port.get("protocol", "all"), port.get("port", 0))
        for rule in policy["spec"]["egress"]
        for peer in rule.get("to", [{}])
        for port in rule.get("ports", [{}])
    }
    assert allowed == {
        ("job", "all", 0), ("all", "UDP", 53), ("all", "TCP", 53), ("all", "TCP", 443),
        ("169.254.169.252/32", "TCP", 987), ("169.254.169.252/32", "TCP", 988),
        ("169.254.169.254/32", "TCP", 80), ("169.254.169.254/32", "TCP", 8080),
    }  # fmt: skip
    assert not [manifest for manifest in render(example("v5e-16", "network.isolate=false")) if manifest["kind"] == "NetworkPolicy"]


def test_a_job_in_the_queue_of_xpk_carries_the_label_that_xpk_selects_by() -> None:
    label = "xpk.google.com/workload"
    spec = example("v5e-16", "queue=multislice-queue", "priority=medium")
    assert all(manifest["metadata"]["labels"][label] == "qwen3-small" for manifest in render(spec))
    assert job_of(spec)["template"]["spec"]["template"]["metadata"]["labels"][label] == "qwen3-small"
    assert label not in render(example("v5e-16", "queue=mine"))[-1]["metadata"]["labels"]
