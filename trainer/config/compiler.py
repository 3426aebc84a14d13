"""How the train step is compiled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.config.base import Node

OptionName = Annotated[str, Field(pattern=r"^xla_[a-z0-9_]{1,200}$")]
OptionValue = Annotated[bool, Field(strict=True)] | Annotated[int, Field(strict=True)] | Annotated[str, Field(max_length=200)]


class Compiler(Node):
    """XLA options of the train step, and a step compiled beforehand. Neither changes what is computed beyond rounding."""

    default_options: bool = True
    """On meshes like those they were tried on (`fsdp`, alone or with other axes within a slice), use the options this project
    measured for the TPU generation (docs/compile.md); false: the compiler's own defaults."""
    options: dict[OptionName, OptionValue | None] = Field(default_factory=dict[str, OptionValue | None])
    """XLA compiler options by name, on top of the defaults; null takes one of the defaults away."""
    executable: Annotated[str, Field(min_length=1)] | None = None
    """A file of `nnxlaunch compile --save`, local or gs://. It is run instead of compiling where its fingerprint is this
    job's; otherwise the log says what differs and the step is compiled. Loading runs code: keep it where only you write."""
