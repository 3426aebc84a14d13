"""The job spec: a tree of small frozen models, read from YAML."""

from launcher.spec.accelerator import Cpu, Layout, Tpu
from launcher.spec.job import Failure, JobSpec, run_directory
from launcher.spec.load import from_document, from_yaml

__all__ = ["Cpu", "Failure", "JobSpec", "Layout", "Tpu", "from_document", "from_yaml", "run_directory"]
