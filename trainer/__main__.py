"""`python -m trainer`: the parent of the trainer proper; see `trainer.parent`.

The handlers come before every other import: as PID 1 a process without a handler does not even get SIGTERM.
"""

import signal

_early: list[int] = []


def _note(number: int, _: object) -> None:
    _early.append(number)


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(_number, _note)

    import sys

    if sys.argv[1:] == ["smoke"]:
        from trainer.smoke import main as smoke

        sys.exit(smoke())

    from trainer.parent.process import main

    main(sys.argv[1:], _early)
