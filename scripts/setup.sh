#!/usr/bin/env bash
# Make the virtual environment from requirements.lock and install the project into it, editable.
set -euo pipefail
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}

# libraries for off-screen OpenGL, and a compiler for the one dependency that ships as source (evdev)
PACKAGES="libegl1 libgl1 libgl1-mesa-dri libopengl0 libglib2.0-0 gcc linux-libc-dev"
missing=""
for package in $PACKAGES; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
done
if [ -n "$missing" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
  else
    echo "videos need these system packages, which are not here and cannot be installed without root:$missing" >&2
    echo "ask for: apt-get install$missing" >&2
  fi
fi

command -v "$PYTHON" >/dev/null || PYTHON=python3
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "this project wants Python 3.11, and '$PYTHON' is $("$PYTHON" --version 2>&1 || echo not here); set PYTHON=/path/to/python3.11" >&2
  exit 2
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
if "$VENV/bin/python" -m pip install -q uv; then
  UV="$VENV/bin/uv"
  VIRTUAL_ENV=$VENV "$UV" pip install -q --require-hashes -r requirements.lock
  VIRTUAL_ENV=$VENV "$UV" pip install -q --no-deps --no-build-isolation -e .
else
  "$VENV/bin/python" -m pip install -q --require-hashes -r requirements.lock
  "$VENV/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
fi
