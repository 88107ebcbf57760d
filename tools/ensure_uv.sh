#!/bin/sh
# Print a command that runs uv, fetching uv with pip into .uv-env/ where the machine has none that works.
# A `uv` on PATH may be a shim that fails here, so each candidate is tried, not only looked up.
set -eu
cd "$(dirname "$0")/.."
UV_VERSION=0.13.9

if python3 -m uv --version >/dev/null 2>&1; then
    echo "python3 -m uv"
elif uv --version >/dev/null 2>&1; then
    echo "uv"
else
    if ! .uv-env/bin/uv --version >/dev/null 2>&1; then
        # The second candidate is for a version manager that lacks the version .python-version asks for.
        for python in python3.12 python3 /usr/bin/python3; do
            rm -rf .uv-env
            if "$python" -m venv .uv-env >/dev/null 2>&1; then break; fi
        done
        if [ ! -x .uv-env/bin/python ]; then
            echo "no uv and no python3 with the venv module was found; install either (Debian: apt install python3-venv)" >&2
            exit 1
        fi
        .uv-env/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" >&2
    fi
    echo ".uv-env/bin/uv"
fi
