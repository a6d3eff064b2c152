"""A point in the plane as a ``fake`` robot in a process of its own: it moves by the clock, and succeeds near the origin."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from sim.real_time import RealTimeArm
from sim.task import Outcome, TaskConfig, TaskEnv
from vla_rl.cli.robot_simulate import Desk
from vla_rl.runtime.wire import listen, serve_one
from vla_rl.types import STATE, ActionSpec

HZ = 50.0
NEAR_M = 0.04
ACTION = ActionSpec(("dx", "dy"), ("m", "m"), (-0.1, -0.1), (0.1, 0.1), "delta", HZ)
ROBOT = f"""
type: fake
name: reach_fake
task: reach
address: ADDRESS
action: {{names: [dx, dy], units: [m, m], low: [-0.1, -0.1], high: [0.1, 0.1], mode: delta, control_hz: {HZ}}}
observations: {{observation.state: [2]}}
measured: {{dx dy: [0, 1]}}
safety:
  max_step: [0.1, 0.1]
  max_velocity: [5.0, 5.0]
  max_acceleration: [500.0, 500.0]
  max_jerk: [50000.0, 50000.0]
  max_tracking_error: [0.5, 0.5]
  max_chunk_deviation: [0.5, 0.5]
  rotations: []
  workspaces: []
  joints_age_s: 2.0
  camera_age_s: 2.0
  other_age_s: 2.0
  clock_jump_s: 2.0
  inference_s: 20.0
  heartbeat_s: 2.0
  ramp_s: 0.0
  dead_man: false
"""  # long times: the suite's machine is loaded


@dataclass(frozen=True)
class Reach(TaskConfig):
    """See the module."""

    name: str = "reach"
    instruction: str = "reach the origin"
    max_episode_steps: int = 10_000


class ReachEnv(TaskEnv):
    """The point; its first step from a reset is as any other."""

    action_spec = ACTION
    action_space = TaskEnv.box(ACTION)
    observation_space = gym.spaces.Dict({STATE: gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)})  # type: ignore[assignment]

    def __init__(self) -> None:
        self.config = Reach()
        self._place = np.zeros(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self._place = np.random.default_rng(seed).uniform(-0.4, 0.4, 2)
        return self._see(), {"success": False}

    def step(self, action: np.ndarray) -> Outcome:
        self._place = self._place + self.checked_action(action)
        success = bool(np.linalg.norm(self._place) < NEAR_M)
        return self._see(), float(success), success, False, {"success": success}

    def _see(self) -> dict[str, np.ndarray]:
        return {STATE: self._place.astype(np.float32)}

    def render_rgb(self, width: int, height: int) -> np.ndarray:
        raise NotImplementedError


def main() -> None:
    """Move until standard input ends."""
    arm = RealTimeArm(ReachEnv(), watchdog_s=0.5)
    sock = listen("127.0.0.1", 0, "")
    desk = Desk(arm, "reach")

    def serve() -> None:
        while True:
            serve_one(sock, "", desk.answer)

    for _ in range(6):
        threading.Thread(target=serve, daemon=True).start()

    def follow() -> None:
        sys.stdin.read()
        arm.close()

    threading.Thread(target=follow, daemon=True).start()
    sys.stdout.write(f"tcp://127.0.0.1:{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    arm.run()


if __name__ == "__main__":
    main()
