#!/bin/sh
# Compile the hash-locked requirement files from pyproject.toml. Needs uv. `--no-header`: the header names machine paths.
set -eu
cd "$(dirname "$0")/.."
UV=${UV:-uv}
lock() { out=$1; shift; "$UV" pip compile pyproject.toml --universal --generate-hashes --no-header --no-python-downloads --python-version 3.12 --group build "$@" -o "requirements/$out" >/dev/null; }
lock launcher.txt "$@"
lock train.txt --extra train "$@"
lock dev.txt --extra train --group dev "$@"
"$UV" pip compile pyproject.toml --universal --generate-hashes --no-header --no-python-downloads --python-version 3.12 --group build --extra tpu --no-annotate "$@" -o requirements/tpu.txt >/dev/null
