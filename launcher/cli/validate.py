"""`nnxlaunch validate`."""

from __future__ import annotations

import typer

from launcher.cli.options import Output, OutputFormat, Overrides, SpecFile

EXAMPLES = """  nnxlaunch validate job.yaml
  nnxlaunch validate job.yaml --set tpu.type=v5p-256 --set train.batch.global_batch=512
  nnxlaunch validate job.yaml --output json      problems as data, for scripts
"""


def command(spec: SpecFile, overrides: Overrides = [], output: OutputFormat = Output.TABLE) -> None:  # noqa: B006  (Typer reads it)
    """Check a job spec; print every problem at once. Exit code 64 when there is one."""
    from launcher.checks import problems_in
    from launcher.errors import SpecError

    parsed, problems = problems_in(spec, overrides)
    if output is not Output.TABLE:
        from launcher.cli.output import emit
        from launcher.redact import redact

        keys = ("path", "message", "value", "limit", "hint", "code")
        found = [{key: getattr(problem, key) for key in keys} for problem in problems]
        emit([{key: redact(value) if isinstance(value, str) else value for key, value in entry.items()} for entry in found], output)
        raise typer.Exit(SpecError.exit_code if problems else 0)
    if problems or parsed is None:
        raise SpecError(problems)
    layout = parsed.layout
    what = layout.tpu.name if layout.tpu else "cpu"
    print(f"{parsed.name}: valid: {layout.slices} x {what}, {layout.hosts} hosts, {layout.devices} devices")
