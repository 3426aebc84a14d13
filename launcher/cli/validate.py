"""`nnxlaunch validate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from launcher.cli.options import Output, OutputFormat, Overrides, SpecFile
from launcher.kinds import BackendKind

EXAMPLES = """  nnxlaunch validate job.yaml
  nnxlaunch validate job.yaml --set tpu.type=v5p-256 --set train.batch.global_batch=512
  nnxlaunch validate job.yaml --backend kubernetes   a CPU job that is to go to a cluster
  nnxlaunch validate job.yaml --output json      problems as data, for scripts
"""

Backend = Annotated[BackendKind | None, typer.Option("--backend", help="Where it is to run; default: TPU on a cluster, CPU here.")]


def command(
    spec: SpecFile,
    overrides: Overrides = [],  # noqa: B006  (Typer reads it)
    backend: Backend = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Check a job spec; print every problem at once. Exit code 64 when there is one."""
    from launcher.checks import problems_in
    from launcher.cli.output import count, emit
    from launcher.cli.saves import grace_problems, note
    from launcher.errors import SpecError
    from launcher.explain.verdict import too_large
    from launcher.observe.saves import last_save

    parsed, problems = problems_in(spec, overrides, target=backend.value if backend else None)
    save = last_save(parsed.train.run_directory) if parsed else None
    if parsed and save and not problems:
        problems = grace_problems(parsed, save)
    if output is not Output.TABLE:
        from launcher.redact import redact

        keys = ("path", "message", "value", "limit", "hint", "code")
        found = [{key: getattr(problem, key) for key in keys} for problem in problems]
        emit([{key: redact(value) if isinstance(value, str) else value for key, value in entry.items()} for entry in found], output)
        raise typer.Exit(SpecError.exit_code if problems else 0)
    if problems or parsed is None:
        raise SpecError(problems)
    if backend is BackendKind.LOCAL:
        from launcher.backend.local_pod import refuse_what_cannot_run_here
        from launcher.manifest import render

        for manifest in render(parsed):
            if manifest["kind"] == "JobSet":
                refuse_what_cannot_run_here(manifest)
    layout = parsed.layout
    what = layout.tpu.name if layout.tpu else "cpu"
    print(f"{parsed.name}: valid: {layout.slices} x {what}, {count(layout.hosts, 'host')}, {count(layout.devices, 'device')}")
    if fault := too_large(parsed):
        print(f"note: estimated at {fault}", file=sys.stderr)
    note(parsed, save)
