"""python -m trainer.decode SOURCE --prompt TEXT: continue prompts with the weights of a run or of a Hugging Face folder.

Text streams to standard output; what was loaded and how fast it went is said on standard error. Exit codes as in
trainer/contract.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from trainer.config import ConfigError, validate
from trainer.config.mesh import MESH_AXES, AxisDegrees, Mesh
from trainer.config.model import Model
from trainer.config.weights import parameter_count
from trainer.contract import Exit
from trainer.errors import DataError, TrainerError
from trainer.worker import prepare_environment

LENGTH_UNIT: Final = 128
"""Caches hold a multiple of this many tokens."""
LONGEST: Final = 2**24
"""Positions that float32, of which RoPE's angles are made, tells apart."""
MOST_SLOTS: Final = 16


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    prepare_environment()
    try:
        _generate(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return Exit.CONFIG
    except TrainerError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return Exit.DONE


def _generate(options: argparse.Namespace) -> None:
    import jax

    from trainer.data.tokenizer import encode_beginning, load_tokenizer
    from trainer.decode.drafting import DraftingEngine
    from trainer.decode.engine import Engine
    from trainer.decode.sampling import Sampling
    from trainer.decode.serve import Drafts, Request, serve
    from trainer.decode.source import chosen_tokenizer, for_decoding, load, open_source
    from trainer.parallel.mesh import build_mesh
    from trainer.parallel.sharding import Layout

    texts = [*options.prompt, *_lines(options.prompts)]
    if not texts:
        raise DataError("there is no prompt", hint="give --prompt TEXT, or --prompts FILE with one on each line")
    try:
        settings = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, seed=options.seed)
        drawn = [replace(settings, seed=options.seed + number) for number in range(len(texts))]
    except ValueError as error:
        raise DataError(f"{error}") from None
    source = open_source(options.source, step=options.step, weights=options.weights, drafts=options.draft)
    named = chosen_tokenizer(options.tokenizer) if options.tokenizer else source.tokenizer
    if named is None:
        raise DataError(f"{options.source} has no tokenizer", hint="give --tokenizer: a tokenizer.json, a SentencePiece .model, or `bytes`")
    tokenizer = load_tokenizer(named)
    model = for_decoding(source.model, dtype=options.dtype)
    if tokenizer.vocabulary > model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocabulary} ids, the model {model.vocab_size}", hint="give the model's own with --tokenizer"
        )
    layout = Layout(build_mesh(_mesh(options.mesh, model, jax.device_count()), jax.devices(), slices=1))
    prompts = [encode_beginning(tokenizer, text) for text in texts]
    slots = min(options.slots or MOST_SLOTS, len(prompts))
    length = math.ceil((max(map(len, prompts)) + options.max_tokens) / LENGTH_UNIT) * LENGTH_UNIT
    if length > LONGEST:
        raise DataError(f"{length:,} tokens of prompt and answer; at most {LONGEST:,} fit", hint="a lower --max-tokens")
    axes = " ".join(f"{axis}={degree}" for axis, degree in layout.mesh.shape.items() if degree > 1) or "one device"
    if options.draft and not model.depth:
        raise DataError(f"{options.source}: the model has no module of multi-token prediction to draft with", hint="leave out --draft")
    engine = (DraftingEngine if options.draft else Engine)(model, load(source, model, layout), layout, slots=slots, max_length=length)
    beside = f"{slots} slot{'s' * (slots > 1)}"
    print(f"{source.description}: {parameter_count(model):,} parameters, {model.compute_dtype}, {axes}, {beside}", file=sys.stderr)
    stop = sorted({*tokenizer.end, *source.end_tokens})
    if source.longest and (most := max(map(len, prompts)) + options.max_tokens) > source.longest:
        print(f"warning: up to {most} tokens, but the model was trained on sequences of {source.longest}", file=sys.stderr)
    requests: list[Request] = []
    for number, (prompt, sampling) in enumerate(zip(prompts, drawn, strict=True), 1):
        try:
            engine.require_fits(prompt, options.max_tokens, stop)
        except ValueError as error:
            raise DataError(f"prompt {number}: {error}") from None
        requests.append(Request(prompt, options.max_tokens, sampling, stop))
    printer = Printer(tokenizer, prompts, as_json=options.output == "json")
    begin = time.monotonic()
    drafts = Drafts()
    for piece in serve(engine, requests, drafts):
        printer.add(piece)
    seconds = time.monotonic() - begin
    print(f"{printer.tokens} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    if options.draft:
        print(f"drafts: {drafts.accepted} of {drafts.proposed} right ({drafts.accepted / max(drafts.proposed, 1):.1%})", file=sys.stderr)


class Printer:
    """Text: answers in the order of the prompts, the first unfinished one as it comes. JSON: a line for each that is done."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Sequence[int]], *, as_json: bool) -> None:
        from trainer.decode.text import TextStream

        self._streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._text = [""] * len(prompts)
        self._done = [False] * len(prompts)
        self._as_json = as_json
        self._current = -1
        self.tokens = 0

    def add(self, piece: Any) -> None:
        number, text = piece.request, ""
        if piece.token is not None:
            self.tokens += 1
            self._ids[number].append(piece.token)
            text = self._streams[number].push(piece.token)
        if piece.finish is not None:
            text += self._streams[number].finish()
            self._done[number] = True
        self._text[number] += text
        if not self._as_json:
            self._show(number, text)
        elif piece.finish is not None:
            line = {"prompt": number, "text": self._text[number], "tokens": self._ids[number], "finish": piece.finish}
            print(json.dumps(line, ensure_ascii=False), flush=True)

    def _show(self, number: int, text: str) -> None:
        if self._current < 0:
            self._begin(0)
        elif number == self._current:
            print(text, end="", flush=True)
        while self._done[self._current]:
            print(flush=True)
            if self._current + 1 == len(self._done):
                return
            self._begin(self._current + 1)

    def _begin(self, number: int) -> None:
        self._current = number
        if len(self._done) > 1:
            print(f"--- {number + 1}")
        print(self._text[number], end="", flush=True)


def _lines(path: str | None) -> list[str]:
    """The lines of a file, or of standard input for `-`; empty ones are left out."""
    if path is None:
        return []
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return [line for line in text.splitlines() if line]


def _mesh(words: str | None, model: Model, devices: int) -> Mesh:
    """`tensor=4,fsdp=2`; by default the largest degree of `tensor` that divides every layer's heads, and `fsdp` for the rest."""
    if words is None:
        blocks = [block for segment in model.segments for block in segment.pattern]
        tensor = max(d for d in range(1, devices + 1) if devices % d == 0 and all(b.attention.heads % d == 0 for b in blocks))
        return Mesh(ici=AxisDegrees(tensor=tensor, fsdp=-1))
    degrees: dict[str, Any] = {}
    for word in words.split(","):
        axis, _, size = word.partition("=")
        degrees[axis] = int(size) if size.removeprefix("-").isdigit() else size
    try:
        return Mesh(ici=validate(AxisDegrees, degrees))
    except ConfigError as error:
        raise ConfigError([replace(problem, path=f"--mesh {problem.path}") for problem in error.problems]) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.decode", description="Continue prompts with a trained model.")
    parser.add_argument("source", metavar="SOURCE", help="a run directory or a Hugging Face folder, local or gs://")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt on each line; `-` reads standard input")
    parser.add_argument("--step", type=int, metavar="N", help="a committed step of the run; default: the newest")
    parser.add_argument("--weights", choices=["trained", "ema"], default="trained", help="of a run: its parameters, or their average")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens for each prompt; default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens; default: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens of probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from tokens at least P times as likely as the first")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each further one takes the next; default: 0")
    parser.add_argument("--draft", action="store_true", help="guess tokens with the model's modules of multi-token prediction")
    parser.add_argument("--slots", type=int, metavar="N", help=f"prompts answered at once; default: all, at most {MOST_SLOTS}")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=f"axes: {', '.join(MESH_AXES)}; default: tensor, then fsdp")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of matmuls and caches; default: the model's")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, a .model, or `bytes`; default: the source's")
    parser.add_argument("--output", choices=["text", "json"], default="text", help="json: a line for each answer that is done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
