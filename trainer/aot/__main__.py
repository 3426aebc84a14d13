"""python -m trainer.aot --config FILE --target JSON [--save FILE]: compile the train step for devices that are not here.

Prints one JSON object. Exit codes: 0, 1 where the step does not fit the device's memory, else those of trainer/contract.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from trainer.config import ConfigError, load_train_config, validate
from trainer.config.target import Target
from trainer.contract import Exit
from trainer.errors import TrainerError
from trainer.parent.installed import require_jax

DOES_NOT_FIT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        target = validate(Target, json.loads(options.target))
        config = load_train_config(options.config, [])
        require_jax()
        prepare_environment(target)
        found = compile_and_report(config, target, options.save, options.hlo)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return Exit.CONFIG
    except OSError as error:
        print(f"error: {error.filename or options.save or options.hlo} cannot be written: {error.strerror or error}", file=sys.stderr)
        return Exit.CONFIG
    except TrainerError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return DOES_NOT_FIT if found["fits"] is False else Exit.DONE


def prepare_environment(target: Target) -> None:
    """What JAX and libtpu read when they are imported: no accelerator is looked for, and several compilations may run at once."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.platform == "cpu":
        os.environ["JAX_NUM_CPU_DEVICES"] = str(target.devices)
        return
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    # Without them libtpu complains on standard error of hardware that is not here; they change nothing else.
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost", TPU_STDERR_LOG_LEVEL="3")


def compile_and_report(config: Any, target: Target, save: str | None, hlo: str | None) -> dict[str, Any]:
    """The report of `trainer.aot.report`; the executable goes to `save`, the program's text to `hlo`."""
    import importlib.util

    import jax

    from trainer.aot.executable import save_executable
    from trainer.aot.lower import compile_step, layout_of
    from trainer.aot.report import report, too_large
    from trainer.errors import CompilerRefused, NotInstalled
    from trainer.parallel.compiler import check_options

    if target.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise NotInstalled("libtpu is not installed here: it holds the TPU compiler", hint="in the clone: ./setup.sh dev, on Linux x86_64")
    layout = layout_of(config, target)
    check_options(config.compiler, layout.mesh.devices.flat[0])
    try:
        compiled = compile_step(config, layout)
    except jax.errors.JaxRuntimeError as error:
        words = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in words:
            return too_large(config, target, layout, words)
        raise CompilerRefused(
            f"the compiler refused the step: {words}", hint="try without compiler.options, or with compiler.default_options=false"
        ) from None
    found = report(config, target, compiled)
    if hlo is not None:
        with open(hlo, "w", encoding="utf-8") as file:
            file.write(compiled.step.as_text() or "")
    if save is not None:
        found["saved"] = save_executable(save, config, compiled)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.aot", description="Compile the train step for devices that are not here.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the TrainConfig, YAML or JSON")
    parser.add_argument("--target", required=True, metavar="JSON", help="a trainer.config.target.Target")
    parser.add_argument("--save", metavar="FILE", help="write the executable there, local or gs://")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
