"""Cross-field rules. A rule is a generator of problems; all rules run, and all problems are reported at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from launcher.checks import accelerator, names, paths, pod
from launcher.checks.further import further_problems, on_any_accelerator
from launcher.checks.server import check_jobset
from launcher.errors import SpecError
from launcher.manifest import render
from launcher.spec import JobSpec, Layout
from launcher.spec.load import NoTrainFile, read
from trainer.config import ConfigError, Problem, validate

__all__ = ["check", "check_jobset", "load", "problems_in", "problems_of_document"]

Target = Literal["kubernetes", "local"]

SPEC_RULES: Final[tuple[Callable[[JobSpec], Iterator[Problem]], ...]] = (
    names.name_is_a_label,
    names.created_account_is_the_jobs_own,
    names.subdomain_is_a_label,
    names.object_names,
    names.selector_values,
    names.labels_are_valid,
    names.annotations_are_valid,
    accelerator.tpu_exists,
    accelerator.queued_provisioning_needs_a_queue,
    paths.directory_is_usable,
    pod.host_network_needs_privileges,
    pod.grace_fits_capacity,
    pod.jobset_knows_the_fields,
    pod.environment_is_valid,
    pod.environment_has_no_secrets,
    pod.text_has_no_secrets,
    pod.mounts_are_apart,
    pod.image_is_a_reference,
)
"""Rules that need no devices."""

LAYOUT_RULES: Final[tuple[Callable[[JobSpec, Layout], Iterator[Problem]], ...]] = (
    names.job_names_fit,
    names.pod_names_fit,
    names.coordinator_label_fits,
    accelerator.several_slices_need_several_hosts,
    accelerator.train_config_fits,
    accelerator.placement_fits,
    accelerator.super_slice_fits,
    pod.host_network_ports,
    pod.coordinator_port_is_free,
)
"""Rules that need to know the slices, hosts and devices: they wait until the accelerator exists."""

CLUSTER_RULES: Final[tuple[Callable[[JobSpec, Layout], Iterator[Problem]], ...]] = (
    paths.files_outlive_pods,
    paths.image_is_reachable,
)
"""Rules for a job that goes to a cluster. TPU jobs always do; a CPU job may stay on this machine."""

LOCAL_RULES: Final[tuple[Callable[[JobSpec, Layout], Iterator[Problem]], ...]] = (paths.files_are_here,)
"""Rules for a job that is said to stay on this machine."""


def check(spec: JobSpec, *, target: Target | None = None) -> list[Problem]:
    """Every problem of a spec. Without a target, a TPU job is taken to go to a cluster, and a CPU job to stay here."""
    problems = [problem for rule in SPEC_RULES for problem in rule(spec)]
    rules = LAYOUT_RULES
    if (target or ("kubernetes" if spec.tpu else "local")) == "kubernetes":
        rules += CLUSTER_RULES
    elif target == "local":
        rules += LOCAL_RULES

    def laid_out(spec: JobSpec) -> Iterator[Problem]:
        return (problem for rule in rules for problem in rule(spec, spec.layout))

    if any(problem.code.startswith("tpu-") for problem in problems):
        return problems + on_any_accelerator(spec, laid_out)
    problems += laid_out(spec)
    return problems or list(check_jobset(render(spec)[-1]))


def problems_in(path: str | Path, overrides: Iterable[str] = (), *, target: Target | None = None) -> tuple[JobSpec | None, list[Problem]]:
    """The spec in a file, if it has the form of one, and all its problems: of form and across fields, together."""
    try:
        document, _ = read(path, overrides)
    except NoTrainFile as error:
        _, others = problems_of_document(error.rest, target=target)
        return None, error.problems + [problem for problem in others if problem.path.partition(".")[0] != "train"]
    except ConfigError as error:
        return None, error.problems
    return problems_of_document(document, target=target)


def problems_of_document(document: dict[str, Any], *, target: Target | None = None) -> tuple[JobSpec | None, list[Problem]]:
    """As `problems_in`, for a parsed document."""
    try:
        spec = validate(JobSpec, document, hidden=("env",))
    except ConfigError as error:
        if error.problems[-1].code == "too-many":
            return None, error.problems
        return None, error.problems + further_problems(document, functools.partial(check, target=target))
    return spec, check(spec, target=target)


def load(path: str | Path, overrides: Iterable[str] = (), *, target: Target | None = None) -> JobSpec:
    """The spec in a file. Raises SpecError with every problem it has."""
    spec, problems = problems_in(path, overrides, target=target)
    if spec is None or problems:
        raise SpecError(problems)
    return spec
