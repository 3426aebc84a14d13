"""`nnxlaunch image build|push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.options import Overrides

command = typer.Typer(no_args_is_help=True, help="Build or push the trainer image.")

EXAMPLES = """\
  nnxlaunch image build --target cpu                  nnxlaunch-trainer:cpu, for this machine
  nnxlaunch image build job.yaml                      for the spec's accelerator, under the name in the spec
  nnxlaunch image push job.yaml                       push it, and pin its digest in the spec
"""

OptionalSpec = Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="Take accelerator and image name from this job spec.")]
TargetOption = Annotated[str | None, typer.Option("--target", metavar="cpu|tpu", help="What the image runs on; default: the spec's.")]
NameOption = Annotated[str | None, typer.Option("--name", metavar="REPOSITORY", help="Image name without tag; default: the spec's.")]
PipConfig = Annotated[
    Path | None, typer.Option("--pip-config", metavar="FILE", help="pip.conf for a private index; used to build, never kept.")
]


@command.command("build")
def build_command(
    spec: OptionalSpec = None,
    target: TargetOption = None,
    name: NameOption = None,
    pip_config: PipConfig = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Build the image from this clone; print its name.

    It gets two tags: TARGET-REVISION, which is printed, and TARGET, which a spec without an image uses.
    """
    from launcher import image

    chosen, repository = _chosen(spec, target, name, overrides)
    print(image.build(image.find_source(), target=chosen, repository=repository, pip_config=pip_config))


@command.command("push")
def push_command(
    spec: OptionalSpec = None,
    target: TargetOption = None,
    name: NameOption = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Push the image of this revision; print its name with the digest and pin that in SPEC's `image:` line."""
    from launcher import image

    chosen, repository = _chosen(spec, target, name, overrides)
    exact, _ = image.find_source().references(repository, chosen)
    pushed = str(image.push(exact))
    if spec is not None:
        from launcher.spec.pin import pin_image

        pin_image(spec, pushed)
    print(pushed)


def _chosen(spec: Path | None, target: str | None, name: str | None, overrides: list[str]) -> tuple[Any, str]:
    """Target and repository. Raises typer.BadParameter when nothing says what to build for."""
    from launcher.image import DEFAULT_REPOSITORY, Reference

    if target not in (None, "cpu", "tpu"):
        raise typer.BadParameter(f"{target!r} is not cpu or tpu", param_hint="--target")
    if spec is not None:
        from launcher.spec import from_yaml

        job = from_yaml(spec, overrides)
        target = target or job.layout.target
        name = name or (Reference.parse(job.image.reference).repository if job.image else None)
    if target is None:
        raise typer.BadParameter("give a SPEC, or --target cpu or --target tpu", param_hint="--target")
    return target, name or DEFAULT_REPOSITORY
