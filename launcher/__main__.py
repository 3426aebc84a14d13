"""`python -m launcher`, and the `nnxlaunch` script."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run one command and exit; interrupted while it loads, it says no more than one interrupted later."""
    try:
        from launcher.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
