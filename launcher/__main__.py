"""`python -m launcher`: the same as the `nnxlaunch` script."""

from launcher.cli import main

if __name__ == "__main__":
    main()
