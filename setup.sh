#!/bin/sh
# Make .venv ready: `./setup.sh LOCK` installs requirements/LOCK.txt (hash-checked), then this project on top.
# Needs a Python >= 3.12 with venv; never touches anything outside .venv. Run again, it only looks at a stamp of
# lock, project file, interpreter and place.
set -eu
cd "$(dirname "$0")"
lock=requirements/${1:?usage: ./setup.sh launcher|train|dev}.txt

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ] && ! usable "$PYTHON"; then
        echo "warning: PYTHON=$PYTHON does not run, is older than 3.12, or lacks venv; looking for another" >&2
    fi
    # A candidate is run, not only looked up: a version manager's shim may exist and fail.
    for candidate in ${PYTHON:+"$PYTHON"} python3.14 python3.13 python3.12 python3 \
        "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if usable "$candidate"; then
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return
        fi
    done
    if command -v uv >/dev/null 2>&1 && uv python install 3.12 >&2 && found=$(uv python find 3.12) && usable "$found"; then
        echo "$found"
        return
    fi
    cat >&2 <<'MESSAGE'
error: no Python >= 3.12 with the venv and ensurepip modules was found (tried $PYTHON, python3.14 ... python3.12, python3, pyenv's versions, uv).
hint: install one, for example `apt install python3.12 python3.12-venv`, `brew install python@3.12`, `pyenv install 3.12` or uv; or set PYTHON=/path/to/python3.
MESSAGE
    exit 1
}

digest() { if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi | cut -c1-64; }
stamp_of() { { cat "requirements/$1.txt" pyproject.toml; .venv/bin/python -VV; pwd; } | digest; }
installed() { [ -x .venv/bin/python ] && [ -f ".venv/stamp-$1" ] && [ "$(cat ".venv/stamp-$1")" = "$(stamp_of "$1")" ]; }

# The developer's lock holds everything the trainer's does.
if installed "$1" || { [ "$1" = train ] && installed dev; }; then
    exit 0
fi
# A `python -m venv` that was interrupted leaves an interpreter without pip.
installs() { command -v uv >/dev/null 2>&1 || "$1" -c 'import pip' >/dev/null 2>&1; }
if ! { [ -x .venv/bin/python ] && usable .venv/bin/python && installs .venv/bin/python; }; then
    python=$(find_python)
    echo "setting up .venv with $python" >&2
    rm -rf .venv
    "$python" -m venv .venv
fi
rm -f .venv/stamp-*
echo "installing $lock into .venv" >&2
if command -v uv >/dev/null 2>&1; then
    uv pip install --quiet --compile-bytecode --python .venv/bin/python --require-hashes -r "$lock"
    uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
else
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
# Compiled once, here as above: otherwise the first start pays for it, and every start where PYTHONDONTWRITEBYTECODE is set.
.venv/bin/python -m compileall -q launcher trainer
stamp_of "$1" >".venv/stamp-$1"
