"""Throw random commands and observations at the safety filter, and look whether anything beyond a limit is ever sent.

Not a number, infinite, huge, jumping, at the limits, from policies that shake or hang; observations that are late, reordered, repeated or
missing; clocks that jump; faults that are resumed. Position, velocity, acceleration and jerk of what is sent are counted by finite
differences, as the robot's own controller would see them.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from real_robot.limits import Rules, SafetyConfig, WorkspaceConfig, make_rules
from real_robot.motion import FilterState
from real_robot.safety import View, chunk_fault, filter_step, resume, start
from vla_rl.cli.common import CommandConfig
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionMode, ActionSpec

EXAMPLE = "vla-rl bench safety --steps 1000000 --json results/safety.json"
POSITIONALS = ()
EPISODE = 400  # steps until the limits are drawn anew
TOLERANCE = 2e-6  # of a limit; the filter's own slack for policies that answer in float32 is 1e-6
MODES: tuple[ActionMode, ...] = ("absolute", "delta", "velocity")
JOINTS = 4


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench safety``.

    steps: commands and observations
    seed: of them and of the limits
    """

    steps: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seed < 0:
            raise ValueError(f"steps wants at least 1, seed a number >= 0, got {self.steps}, {self.seed}")


def draw_rules(rng: np.random.Generator) -> Rules:
    """Random limits of an arm with a gripper."""
    mode = MODES[rng.integers(len(MODES))]
    hz = float(rng.choice([10.0, 20.0, 50.0, 100.0, 500.0]))
    dim = JOINTS + 1
    while True:
        v, a, j = 10 ** rng.uniform([-1, -0.3, 0.7], [0.6, 1.6, 3.7])
        reach = {"absolute": 10 ** rng.uniform(-1, 0.5), "delta": v / hz, "velocity": v}[mode]
        unit = {"absolute": "rad", "delta": "m", "velocity": "m/s"}[mode]
        spec = ActionSpec(
            (*(f"a{i}" for i in range(JOINTS)), "gripper"),
            (unit,) * JOINTS + ("1",),
            (-reach,) * JOINTS + (-1.0,),
            (reach,) * JOINTS + (1.0,),
            mode,
            hz,
        )
        boxes: tuple[WorkspaceConfig, ...] = ()
        if mode != "absolute" and rng.random() < 0.7:
            boxes = (
                WorkspaceConfig(("a0", "a1", "a2"), (-0.4, -0.5, 0.0), (0.4, 0.5, 0.8), float(max(0.05, 3 * v / hz))),
            )
        config = SafetyConfig(
            max_step=(float(10 ** rng.uniform(-2, 0)),) * dim,
            max_velocity=(v,) * dim,
            max_acceleration=(a,) * dim,
            max_jerk=(j,) * dim,
            max_tracking_error=(0.3,) * dim,
            max_chunk_deviation=(0.3,) * dim,
            rotations=(),
            workspaces=boxes,
            joints_age_s=0.1,
            camera_age_s=0.2,
            other_age_s=0.5,
            clock_jump_s=0.2,
            inference_s=0.5,
            heartbeat_s=max(0.1, 2.5 / hz),
            ramp_s=float(rng.choice([0.0, 0.5, 2.0])),
            dead_man=bool(rng.random() < 0.2),
        )
        try:
            return make_rules(spec, config)
        except UserError:
            continue  # such limits take too long to stop, and are refused


class Wishes:
    """A policy that is anything but well-behaved."""

    def __init__(self, rules: Rules, rng: np.random.Generator) -> None:
        self.rules, self.rng = rules, rng
        self.kind, self.left, self.phase = "calm", 0, 0.0

    def next(self, state: FilterState) -> np.ndarray | None:
        """The next wish."""
        rng, spec = self.rng, self.rules.spec
        if self.left == 0:
            kinds = ["calm", "noise", "square", "limits", "huge", "nan", "inf", "none", "jump", "shake"]
            self.kind = str(rng.choice(kinds, p=[0.3, 0.1, 0.1, 0.15, 0.05, 0.03, 0.02, 0.05, 0.1, 0.1]))
            self.left = int(rng.integers(1, 60))
            self.phase, self.jump_A = 0.0, rng.uniform(spec.low, spec.high)
        self.left -= 1
        self.phase += self.rules.dt
        low_A, high_A = np.array(spec.low), np.array(spec.high)
        base_A = state.command_A if spec.mode == "absolute" else np.zeros(spec.dim)
        wish_A = {
            "calm": base_A + 0.3 * self.rules.v_max_A * self.rules.dt * math.sin(self.phase),
            "noise": rng.normal(0, 1, spec.dim) * high_A,
            "square": np.where(math.sin(9 * self.phase) > 0, low_A, high_A),
            "limits": rng.choice([low_A, high_A]),
            "huge": rng.choice([-1, 1], spec.dim) * 10.0 ** rng.uniform(0, 300, spec.dim),
            "nan": np.where(rng.random(spec.dim) < 0.5, np.nan, base_A),
            "inf": np.where(rng.random(spec.dim) < 0.5, np.inf, base_A),
            "none": None,
            "jump": self.jump_A,
            "shake": base_A + rng.normal(0, 0.02, spec.dim),
        }[self.kind]
        if self.kind in ("nan", "inf") and rng.random() < 0.9:
            return base_A  # a fault would end most episodes
        return wish_A


@dataclass
class Worst:
    """Farthest beyond each limit, as a share of it (negative: within)."""

    position: float = -math.inf
    velocity: float = -math.inf
    acceleration: float = -math.inf
    jerk: float = -math.inf
    unfinished: int = 0


def run(config: Config) -> dict[str, Any]:
    """Soak the filter; return what was found."""
    rng = np.random.default_rng(config.seed)
    worst, counts = Worst(), {"faults": 0, "clipped": 0, "held": 0, "resumed": 0, "chunks": 0, "chunks_refused": 0}
    reasons: dict[str, int] = {}
    begun_s, done = time.monotonic(), 0
    bar = tqdm(
        total=config.steps, desc="safety", unit="step", unit_scale=True, mininterval=1 if sys.stderr.isatty() else 30
    )
    while done < config.steps:
        steps = min(EPISODE, config.steps - done)
        _episode(draw_rules(rng), rng, steps, worst, counts, reasons)
        done += steps
        bar.update(steps)
    bar.close()
    seconds = time.monotonic() - begun_s
    beyond = {name: getattr(worst, name) for name in ("position", "velocity", "acceleration", "jerk")}
    violated = [name for name, share in beyond.items() if share > TOLERANCE] + (
        ["not finite"] if worst.unfinished else []
    )
    table = Table("limit", "farthest beyond it, share")
    for name, share in beyond.items():
        table.add_row(name, f"{share:+.1e}")
    Console().print(table)
    print(
        f"{done} steps in {seconds:.0f} s ({1e6 * seconds / done:.0f} us each): {counts['clipped']} limited, {counts['held']} held, "
        f"{counts['faults']} faults, {counts['resumed']} resumed, {counts['chunks_refused']} of {counts['chunks']} chunks refused; "
        f"beyond a limit: {', '.join(violated) or 'nothing'}"
    )
    return {
        "steps": done,
        "seed": config.seed,
        "violations": violated,
        "beyond": beyond,
        **counts,
        "reasons": dict(sorted(reasons.items())),
        "timing": {"seconds": round(seconds, 1), "us_per_step": round(1e6 * seconds / done, 1)},
        "exit_code": int(bool(violated)),
    }


def _episode(
    rules: Rules, rng: np.random.Generator, steps: int, worst: Worst, counts: dict[str, int], reasons: dict[str, int]
) -> None:
    spec, moving_A = rules.spec, rules.moving_A
    bounded_A = np.isfinite(rules.low_A)
    place_A = np.zeros(spec.dim)
    low_A, high_A = rules.low_A[bounded_A], rules.high_A[bounded_A]
    place_A[bounded_A] = low_A + rng.uniform(0.3, 0.7, len(low_A)) * (high_A - low_A)
    state = start(rules, place_A)
    wishes = Wishes(rules, rng)
    before_A, v_A, a_A, now_s = state.command_A.copy(), np.zeros(spec.dim), np.zeros(spec.dim), 0.0
    for _ in range(steps):
        now_s += rules.dt * (1 if rng.random() < 0.999 else rng.uniform(-5, 20))
        if state.fault is not None and state.at_rest and rng.random() < 0.3:
            state = resume(rules, state, place_A)
            if spec.mode == "absolute":  # it begins where the robot is, if that was moved by hand
                before_A = state.command_A.copy()
            counts["resumed"] += 1
        wanted_A = wishes.next(state)
        if rng.random() < 0.01 and wanted_A is not None and state.fault is None:
            counts["chunks"] += 1
            counts["chunks_refused"] += chunk_fault(rules, state, np.stack([wanted_A] * 8)) is not None
        state, decision = filter_step(rules, state, wanted_A, _view(rules, rng, now_s, place_A))
        counts["clipped"] += bool(decision.reasons)
        counts["held"] += decision.holding
        counts["faults"] += decision.new_fault
        for reason in decision.reasons:
            reasons[reason] = reasons.get(reason, 0) + 1
        sent_A = decision.sent_A
        if not np.isfinite(sent_A).all():
            worst.unfinished += 1
            return
        moved_A = sent_A - before_A if spec.mode == "absolute" else sent_A * (1 if spec.mode == "delta" else rules.dt)
        now_v_A = moved_A / rules.dt
        now_a_A = (now_v_A - v_A) / rules.dt
        jerk_A = (now_a_A - a_A) / rules.dt
        worst.velocity = max(worst.velocity, float((abs(now_v_A) / rules.v_max_A - 1)[moving_A].max()))
        worst.acceleration = max(worst.acceleration, float((abs(now_a_A) / rules.a_max_A - 1)[moving_A].max()))
        worst.jerk = max(worst.jerk, float((abs(jerk_A) / rules.j_max_A - 1)[moving_A].max()))
        before_A, v_A, a_A = sent_A.copy(), now_v_A, now_a_A
        place_A = sent_A.copy() if spec.mode == "absolute" else place_A + np.where(moving_A, now_v_A * rules.dt, 0.0)
        low_A, high_A = np.maximum(rules.low_A, -1e9), np.minimum(rules.high_A, 1e9)
        beyond_A = np.maximum(low_A - place_A, place_A - high_A) / np.maximum(high_A - low_A, 1e-9)
        worst.position = max(worst.position, float(beyond_A[moving_A].max()))


def _view(rules: Rules, rng: np.random.Generator, now_s: float, place_A: np.ndarray) -> View:
    """What the robot says: mostly the truth."""
    measured_A = place_A.copy()
    odd = rng.random()
    ages: dict[str, Any] = {"arm": ("joints", 0.02), "camera": ("camera", 0.05)}
    broken: tuple[str, ...] = ()
    if odd < 0.0005:
        ages["arm"] = ("joints", float(rng.choice([0.3, math.inf, math.nan, 1e9])))
    elif odd < 0.001:
        measured_A += rng.choice([-1, 1]) * (
            np.where(np.isfinite(rules.jump_A), rules.jump_A, 0.5) + rng.uniform(0.2, 2)
        )
    elif odd < 0.0015:
        broken = ("link: cut",)
    elif odd < 0.002:
        measured_A[:] = np.nan
    return View(
        now_s, measured_A, ages, broken, float(rng.choice([0.0, 0.7], p=[0.9995, 0.0005])), bool(rng.random() < 0.95)
    )
