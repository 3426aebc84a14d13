"""python -m trainer.export SOURCE --out FOLDER: a run's checkpoint, or another folder of parameters, in another form.

Reads and writes one layer of one weight at a time, on the CPU. Prints one JSON object. Exit codes as in trainer/contract.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from etils import epath

from trainer.checkpoint.huggingface_files import CONFIG_FILE, INDEX_FILE, UNFINISHED
from trainer.config import ConfigError
from trainer.config.weights import parameter_count
from trainer.contract import Exit
from trainer.errors import CheckpointError, TrainerError

Format = Literal["huggingface", "parameters"]
Layers = Literal["scan", "unroll"]


def export(
    source: str,
    out: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    form: Format = "huggingface",
    layers: Layers = "scan",
    weights: Literal["trained", "ema"] = "trained",
) -> dict[str, Any]:
    """Write parameters to the folder `out`, local or gs://.

    source: a run directory (of its committed steps `step`, default: the newest), a Hugging Face folder or a
    parameter-only checkpoint. dtype: `float32`, `float16` or `bfloat16`; default: that of the folder, or of the
    checkpoint the run began from, else float32. form: Hugging Face's, or a parameter-only checkpoint in our layout, with
    `layers` stacked or one by one. weights: of a run, its parameters or the average it keeps. Raises CheckpointError
    where the step is missing or damaged, there is no average, `out` is not empty or cannot be written, or no Hugging Face
    family describes the model. A folder that an earlier call left unfinished counts as empty.
    """
    from trainer.checkpoint.huggingface import export_huggingface
    from trainer.checkpoint.parameters import export_parameters
    from trainer.parameters import open_parameters

    target = epath.Path(out)
    with ExitStack() as opened:
        _clear(target)
        found = open_parameters(source, opened, step=step, weights=weights)
        model = found.model
        for note in found.notes:
            print(f"note: {source}: {note}", file=sys.stderr)
        dtype = dtype or found.dtype
        opened.enter_context(_unfinished(target))
        if form == "parameters":
            facts = {"source": found.description}
            export_parameters(
                found.read, found.model, out, dtype=dtype or "float32", layers=layers, facts=facts, companions=found.companions
            )
        else:
            model = export_huggingface(
                found.read,
                found.model,
                out,
                max_positions=found.max_positions,
                dtype=dtype,
                original=found.original,
                companions=found.companions,
            )
            if model.depth != found.model.depth:
                left = "modules of multi-token prediction are left out: the family has no place for them; --format parameters keeps them"
                print(f"note: {source}: {left}", file=sys.stderr)
    written = json.loads((target / ("parameters.json" if form == "parameters" else "config.json")).read_text())
    return {
        "folder": out,
        "source": found.description,
        "step": found.step,
        "model_type": written.get("model_type"),
        "dtype": written.get("dtype") or written.get("torch_dtype"),
        "parameters": parameter_count(model),
        "files": sorted(file.name for file in target.iterdir()),
    }


def _clear(target: epath.Path) -> None:
    """Raises CheckpointError where `target` is in use; removes what an export left there that did not come to its end."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file", hint="give a new folder")
    files = list(target.iterdir())
    if any(file.name == UNFINISHED for file in files):
        for file in files:
            if _ours(file.name):
                file.unlink()
    if left := sorted(file.name for file in target.iterdir() if file.name != UNFINISHED):
        raise CheckpointError(f"{target} is not empty: {', '.join(left[:3])}", hint="give a new folder")


def _ours(name: str) -> bool:
    from trainer.checkpoint.parameters import PARAMETERS_FILE
    from trainer.parameters import COMPANIONS

    return name in (*COMPANIONS, CONFIG_FILE, PARAMETERS_FILE, INDEX_FILE) or (name.startswith("model") and name.endswith(".safetensors"))


@contextmanager
def _unfinished(target: epath.Path) -> Iterator[None]:
    """Holds the folder: whoever finds the mark knows that what is there may be written anew."""
    mark = target / UNFINISHED
    try:
        target.mkdir(parents=True, exist_ok=True)
        mark.write_text("an export that did not come to its end; the same command begins anew\n")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}", hint="give a folder that can be made, and written to") from None
    try:
        yield
        mark.unlink()
    except CheckpointError:
        if [file.name for file in target.iterdir()] == [UNFINISHED]:  # refused before anything was written
            mark.unlink()
        raise
    except OSError as error:
        hint = "what is there is not complete; the same command begins anew"
        raise CheckpointError(f"{target} cannot be written: {error}", hint=hint) from None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    def run() -> None:
        wanted = {"step": options.step, "dtype": options.dtype, "layers": options.layers, "weights": options.weights}
        result = export(options.source, options.out, form=options.format, **wanted)
        print(json.dumps(result, indent=2))

    return guarded(run)


def guarded(run: Any) -> int:
    """`run()` on the CPU; its exit code, what is wrong on stderr."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        run()
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return Exit.CONFIG
    except TrainerError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return Exit.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description="Write parameters as a Hugging Face or a plain folder.")
    parser.add_argument("source", metavar="SOURCE", help="run directory, Hugging Face folder or parameter-only checkpoint, local or gs://")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder, local or gs://")
    parser.add_argument("--step", type=int, metavar="N", help="a committed step; default: the newest")
    parser.add_argument("--weights", choices=["trained", "ema"], default="trained", help="of a run: its parameters, or their average")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as the run's first checkpoint, else float32")
    parser.add_argument("--format", choices=["huggingface", "parameters"], default="huggingface", help="default: huggingface")
    parser.add_argument("--layers", choices=["scan", "unroll"], default="scan", help="of --format parameters: stacked, or one by one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
