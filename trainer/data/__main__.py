"""python -m trainer.data prepare --config FILE [--set a.b=VALUE]: make the data cache of a run without training.

Prints one JSON object: for every source its rows, tokens, documents and folder. Exit codes as in trainer/contract.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from trainer.config import ConfigError, load_train_config
from trainer.contract import Exit
from trainer.data.api import Data, prepare_data
from trainer.data.packing import row_count
from trainer.errors import TrainerError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        config = load_train_config(options.config, options.set)
        data = prepare_data(config, processes=options.processes)
    except ConfigError as error:
        for problem in error.problems:
            _complain(f"{problem.path}: {problem.message}", problem.hint)
        return Exit.CONFIG
    except TrainerError as error:
        _complain(str(error), error.hint)
        return error.exit_code
    print(json.dumps(_summary(data, config.batch.sequence_length), indent=2))
    return Exit.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.data", description=__doc__.split("\n")[0] if __doc__ else None)
    prepare = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("prepare", help="tokenise and pack what the cache lacks")
    prepare.add_argument("--config", required=True, metavar="FILE", help="a TrainConfig, YAML or JSON")
    prepare.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; may be repeated")
    prepare.add_argument("--processes", type=int, default=1, metavar="N", help="share the work among N processes of this machine")
    return parser


def _summary(data: Data, length: int) -> dict[str, Any]:
    sources = [
        {
            "source": prepared.content.source,
            "files": prepared.content.files,
            "bytes": prepared.content.size,
            "folder": prepared.folder.url,
            **{
                split: {
                    "documents": prepared.documents[split],
                    "tokens": sum(prepared.tokens[split]),
                    "rows": sum(row_count(tokens, length) for tokens in prepared.tokens[split]),
                }
                for split in prepared.tokens
            },
        }
        for prepared in data.prepared
    ]
    return {"fingerprint": data.identity.dataset, "sources": sources}


def _complain(message: str, hint: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
