"""Where actions go: the robot, or its simulation, behind a safety filter."""

from vla_rl.runtime.platform import choose_gl_backend

choose_gl_backend()  # MuJoCo reads MUJOCO_GL once, when it is imported
