#!/usr/bin/env bash
# Make the virtual environment from requirements.lock and install the project into it, editable.
set -euo pipefail
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}

command -v "$PYTHON" >/dev/null || PYTHON=python3
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "this project wants Python 3.11, and '$PYTHON' is $("$PYTHON" --version 2>&1 || echo not here); set PYTHON=/path/to/python3.11" >&2
  exit 2
fi

# OpenCV and off-screen OpenGL want the libraries; evdev, a dependency of lerobot that ships as source, wants a compiler and headers
PACKAGES="libegl1 libgl1 libgl1-mesa-dri libopengl0 libglib2.0-0 gcc libc6-dev linux-libc-dev"
header=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
[ -f "$header" ] || PACKAGES="$PACKAGES python3.11-dev"
"$PYTHON" -c 'import ensurepip' 2>/dev/null || PACKAGES="$PACKAGES python3.11-venv"
missing=""
for package in $PACKAGES; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
done
if [ -n "$missing" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq || echo "apt-get update failed; trying with the package lists that are here" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
      echo "could not install:$missing; going on, but set-up or videos may fail" >&2
  else
    echo "these system packages are not here and cannot be installed without root:$missing" >&2
    echo "set-up or videos may fail without them; ask for: apt-get install$missing" >&2
  fi
fi

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then  # also where an earlier attempt left half of one
  rm -rf "$VENV"
  "$PYTHON" -m venv "$VENV"
fi
if "$VENV/bin/python" -m pip install -q uv; then
  UV="$VENV/bin/uv"
  VIRTUAL_ENV=$VENV "$UV" pip install -q --require-hashes -r requirements.lock
  VIRTUAL_ENV=$VENV "$UV" pip install -q --no-deps --no-build-isolation -e . -e plugins/lerobot_policy_vla_rl
else
  "$VENV/bin/python" -m pip install -q --require-hashes -r requirements.lock
  "$VENV/bin/python" -m pip install -q --no-deps --no-build-isolation -e . -e plugins/lerobot_policy_vla_rl
fi
