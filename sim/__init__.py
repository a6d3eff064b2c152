"""Where data comes from: tasks as Gymnasium environments, vectorised, and their scripted experts."""

from vla_rl.runtime.platform import choose_gl_backend

choose_gl_backend()  # MuJoCo reads MUJOCO_GL once, when it is imported

import sim.rendering  # noqa: E402, F401  (imports MuJoCo, and says in one line why it cannot where it cannot)
