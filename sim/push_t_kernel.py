"""Push-T's control step, compiled: physics, coverage and observation in one call without the GIL.

The numbers are those of ``sim.tasks.push_t``; a step of its physics takes 25 us, so that a tenth of that in Python would show.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

import sim.native
import sim.stepping
from sim.native import source_of
from sim.stepping import is_healthy, step_implicitfast

BAD_ACTION, DIVERGED = -1.0, -2.0


@numba.njit(cache=True, nogil=True)
def _clip(polygon: np.ndarray, corners: int, axis: int, sign: float, limit: float, clipped: np.ndarray) -> int:
    """Keep the part of a convex polygon where sign * coordinate <= limit (Sutherland and Hodgman 1974); return its corners."""
    kept = 0
    for i in range(corners):
        here, there = polygon[i], polygon[(i + 1) % corners]
        a, b = limit - sign * here[axis], limit - sign * there[axis]
        if a >= 0.0:
            clipped[kept] = here
            kept += 1
        if (a > 0.0 > b) or (a < 0.0 < b):
            share = a / (a - b)
            clipped[kept, 0] = here[0] + share * (there[0] - here[0])
            clipped[kept, 1] = here[1] + share * (there[1] - here[1])
            kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def overlap_m2(rectangles_R42: np.ndarray, x_m: float, y_m: float, cos: float, sin: float) -> float:
    """Area that axis-aligned rectangles share with themselves moved and turned: exact, by clipping one against the other.

    Args:
        rectangles_R42: corners, counter-clockwise from the lower left, (R, 4, 2); they overlap one another nowhere.
        x_m: how far the others are moved.
        y_m: likewise.
        cos: of the angle they are turned by.
        sin: likewise.
    """
    area_m2 = 0.0
    now, then = np.empty((12, 2)), np.empty((12, 2))
    for moving in range(rectangles_R42.shape[0]):
        for still in range(rectangles_R42.shape[0]):
            for i in range(4):
                px, py = rectangles_R42[moving, i, 0], rectangles_R42[moving, i, 1]
                now[i, 0] = cos * px - sin * py + x_m
                now[i, 1] = sin * px + cos * py + y_m
            low, high = rectangles_R42[still, 0], rectangles_R42[still, 2]
            corners = _clip(now, 4, 0, 1.0, high[0], then)
            corners = _clip(then, corners, 0, -1.0, -low[0], now)
            corners = _clip(now, corners, 1, 1.0, high[1], then)
            corners = _clip(then, corners, 1, -1.0, -low[1], now)
            twice = 0.0
            for i in range(corners):
                k = (i + 1) % corners
                twice += now[i, 0] * now[k, 1] - now[k, 0] * now[i, 1]
            area_m2 += 0.5 * twice
    return area_m2


@numba.njit(cache=True, nogil=True)
def observe(qpos: np.ndarray, outline_83: np.ndarray, state_2: np.ndarray, environment_22: np.ndarray) -> None:
    """Fill in the pusher's position, and the T's position, heading, corners and the pusher in the T's frame (float32)."""
    x_m, y_m = qpos[0], qpos[1]
    cos, sin = np.cos(qpos[2]), np.sin(qpos[2])
    state_2[0], state_2[1] = qpos[3], qpos[4]
    environment_22[0], environment_22[1], environment_22[2], environment_22[3] = x_m, y_m, cos, sin
    for i in range(8):
        px, py = outline_83[i, 0], outline_83[i, 1]
        environment_22[4 + 2 * i] = cos * px - sin * py + x_m
        environment_22[5 + 2 * i] = sin * px + cos * py + y_m
    dx, dy = qpos[3] - x_m, qpos[4] - y_m
    environment_22[20], environment_22[21] = cos * dx + sin * dy, cos * dy - sin * dx


def _compiled(sources: str) -> Callable[..., float]:
    """Build ``control_step``; ``sources`` is what it calls in other files (see ``sim.native.source_of``)."""

    @numba.njit(cache=True, nogil=True)
    def control_step(
        model: int,
        data: int,
        qpos: np.ndarray,
        ctrl: np.ndarray,
        warnings: np.ndarray,
        rectangles_R42: np.ndarray,
        outline_83: np.ndarray,
        action_2: np.ndarray,
        reach_m: float,
        substeps: int,
        state_2: np.ndarray,
        environment_22: np.ndarray,
    ) -> float:
        """Move the set point, simulate and observe.

        Args:
            model: address of the mjModel.
            data: address of the mjData that the next three arrays view.
            qpos: positions.
            ctrl: set points of the pusher.
            warnings: MuJoCo's counters.
            rectangles_R42: that make up the T.
            outline_83: its corners.
            action_2: target of the pusher (m), clipped to +-reach_m.
            reach_m: limit.
            substeps: MuJoCo steps.
            state_2: observation to fill in.
            environment_22: likewise.

        Returns:
            Area of the target that is covered (m2), or BAD_ACTION (nothing has moved), or DIVERGED.
        """
        _ = sources
        if not (np.isfinite(action_2[0]) and np.isfinite(action_2[1])):
            return BAD_ACTION
        for i in range(2):
            ctrl[i] = min(max(action_2[i], -reach_m), reach_m)
        for _substep in range(substeps):
            step_implicitfast(model, data)
        if not is_healthy(warnings, qpos):
            return DIVERGED
        observe(qpos, outline_83, state_2, environment_22)
        return overlap_m2(rectangles_R42, qpos[0], qpos[1], np.cos(qpos[2]), np.sin(qpos[2]))

    return control_step


control_step = _compiled(source_of(sim.native, sim.stepping))
