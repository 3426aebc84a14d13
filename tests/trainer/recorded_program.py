"""`python -m trainer`, and beside the run directory a line for every batch each process is given: `{"n": 3, "rows": {"0": 17, "1": 4}}`,
the row of the data at each position of the global batch that this process feeds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer import contract
from trainer.parent import link


def record(file: Path) -> None:
    """Write down what training takes from its loader from now on."""
    from trainer.data.loader import BatchLoader
    from trainer.data.split import EvalSplit

    create, iterate = BatchLoader.__init__, BatchLoader.__iter__

    def made(self: Any, split: Any, *, local_rows: Any = None, **options: Any) -> None:
        create(self, split, local_rows=local_rows, **options)
        self.split, self.local_rows = split, local_rows

    def taken(self: Any) -> Iterator[Any]:
        for n, batch in iterate(self):
            if not isinstance(self.split, EvalSplit):
                ids, positions = self.split.batch_rows(n), self.local_rows(n)
                with file.open("a") as lines:
                    lines.write(json.dumps({"n": n, "rows": {str(place): int(ids[place]) for place in positions}}) + "\n")
            yield n, batch

    BatchLoader.__init__, BatchLoader.__iter__ = made, taken


def main() -> None:
    arguments = sys.argv[1:]
    if link.VARIABLE not in os.environ:
        from trainer.parent.process import Parent, leave

        leave(Parent([sys.executable, "-m", "tests.trainer.recorded_program", *arguments]).run())
    from trainer.worker import main as train

    folder = Path(arguments[arguments.index("--config") + 1]).parent
    record(folder / f"rows-{os.environ[contract.ATTEMPT]}-{os.environ[contract.COMPLETION_INDEX]}.jsonl")
    train(arguments)


if __name__ == "__main__":
    main()
