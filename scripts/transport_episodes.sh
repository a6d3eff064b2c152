#!/usr/bin/env bash
# Episodes of a policy on the simulated arm of task lift, through one transport; OUT gets the recording, OUT.json the numbers.
#   transport_episodes.sh dds|rclpy|ros1|rosbridge|rosbridge_ros1 EPISODES POLICY OUT
# rclpy and ros1 run with the Python that VLA_RL_ROS_PYTHON or VLA_RL_ROS1_PYTHON names (scripts/ros_peers.sh makes such environments).
# Through rosbridge, ROSBRIDGE_URL names the server: one of ROS 2 in domain ROS_DOMAIN_ID, which the arm joins over dds, or one of ROS 1
# (rosbridge_ros1) at the master ROS_MASTER_URI, which it joins over ros1. For ros1 alone a master is started unless ROS_MASTER_URI names one.
# Exit code: that of `vla-rl deploy`; 69 where a transport's environment or server is not named.
set -euo pipefail
USAGE="usage: transport_episodes.sh dds|rclpy|ros1|rosbridge|rosbridge_ros1 EPISODES POLICY OUT"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
MINE=$VENV/bin/python
UNAVAILABLE=69
START_S=120
[ $# = 4 ] || { echo "$USAGE" >&2; exit 2; }
TRANSPORT=$1 EPISODES=$2 POLICY=$3 OUT=$4
export PYTHONPATH=$ROOT ROS_DOMAIN_ID=${ROS_DOMAIN_ID:-0} ROS_AUTOMATIC_DISCOVERY_RANGE=${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}
WORK=$(mktemp -d)
STARTED=()
leave() {
  for pid in "${STARTED[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${STARTED[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$WORK"
}
trap leave EXIT

want() { # NAME: an environment variable that has to be set
  [ -n "${!1:-}" ] || { echo "transport_episodes.sh $TRANSPORT wants $1 to be set" >&2; exit $UNAVAILABLE; }
}

robot() { # NAME TRANSPORT: the robot lift_NAME with this transport
  sed "s|^transport:.*|transport: $2|" "$ROOT/configs/robot/lift_$1.yaml" >"$WORK/lift_$1.yaml"
  echo "$WORK/lift_$1.yaml"
}

master() { # of ROS 1
  export ROS_IP=${ROS_IP:-127.0.0.1} ROS_HOME=${ROS_HOME:-$WORK/ros}
  [ -z "${ROS_MASTER_URI:-}" ] || return 0
  local port
  port=$("$MINE" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export ROS_MASTER_URI=http://127.0.0.1:$port
  "$VLA_RL_ROS1_PYTHON" -c 'from rosmaster.main import rosmaster_main; rosmaster_main()' --core -p "$port" >"$WORK/master.log" 2>&1 &
  STARTED+=($!)
}

DDS=$(robot dds "{type: dds, domain: $ROS_DOMAIN_ID}")
case $TRANSPORT in
dds)
  SIM=$MINE SIM_ROBOT=$DDS PYTHON=$MINE ROBOT=$DDS ;;
rclpy)
  want VLA_RL_ROS_PYTHON
  SIM=$VLA_RL_ROS_PYTHON SIM_ROBOT=lift_rclpy PYTHON=$VLA_RL_ROS_PYTHON ROBOT=lift_rclpy ;;
ros1)
  want VLA_RL_ROS1_PYTHON
  master
  SIM=$VLA_RL_ROS1_PYTHON SIM_ROBOT=lift_ros1 PYTHON=$VLA_RL_ROS1_PYTHON ROBOT=lift_ros1 ;;
rosbridge)
  want ROSBRIDGE_URL
  SIM=$MINE SIM_ROBOT=$DDS PYTHON=$MINE
  ROBOT=$(robot rosbridge "{type: rosbridge, url: \"$ROSBRIDGE_URL\", ros: 2}") ;;
rosbridge_ros1)
  want ROSBRIDGE_URL
  want VLA_RL_ROS1_PYTHON
  want ROS_MASTER_URI
  master
  SIM=$VLA_RL_ROS1_PYTHON SIM_ROBOT=lift_ros1 PYTHON=$MINE
  ROBOT=$(robot rosbridge "{type: rosbridge, url: \"$ROSBRIDGE_URL\", ros: 1}") ;;
*) echo "$USAGE" >&2; exit 2 ;;
esac

"$SIM" -m vla_rl.cli.main robot simulate lift --robot "$SIM_ROBOT" >"$WORK/arm.log" 2>&1 &
ARM=$!
STARTED+=($ARM)
for _ in $(seq $((2 * START_S))); do
  grep -q "a simulated arm does" "$WORK/arm.log" && break
  kill -0 $ARM 2>/dev/null || break
  sleep 0.5
done
grep -q "a simulated arm does" "$WORK/arm.log" || { tail -n 1 "$WORK/arm.log" >&2; exit 1; }
"$PYTHON" -m vla_rl.cli.main deploy "$POLICY" --robot "$ROBOT" --episodes "$EPISODES" --out "$OUT" --json "$OUT.json"
