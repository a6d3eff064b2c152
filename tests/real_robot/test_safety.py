"""The filter: what reaches a robot is within its limits, what is amiss is latched, a stop is a stop and never a jump."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robot_toys import arm_rules, arm_spec, box, limits, rates
from scipy.spatial.transform import Rotation

from real_robot.limits import Rules, WorkspaceConfig, make_rules
from real_robot.safety import View, chunk_fault, filter_step, resume, start
from vla_rl.runtime.errors import UserError
from vla_rl.types import ActionSpec

NOTHING = np.zeros(4)


def view(rules, state, step, **changes):
    """What is known in a step of a robot that follows its commands at once."""
    measured_A = np.where(rules.follows_A, state.command_A, changes.pop("measured", 0.0))
    return View(**{"now_s": step * rules.dt, "measured_A": measured_A, **changes})


def drive(rules, wishes, *, state=None, **changes):
    """Filter a sequence of wishes; return what was sent (T, A), the decisions and the last state."""
    state = start(rules, np.zeros(rules.spec.dim)) if state is None else state
    decisions = []
    begin = 0 if math.isnan(state.last_s) else round(state.last_s / rules.dt) + 1
    for step, wish in enumerate(wishes, begin):
        state, decision = filter_step(rules, state, wish, view(rules, state, step, **changes))
        decisions.append(decision)
    return np.array([d.sent_A for d in decisions]), decisions, state


WILD = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-3, 3) | st.sampled_from([1e30, -1e30, 0.0])


@pytest.mark.parametrize("mode", ["absolute", "delta", "velocity"])
@given(
    wishes=st.lists(st.none() | st.lists(WILD, min_size=4, max_size=4), min_size=1, max_size=60),
    hz=st.sampled_from([10.0, 20.0, 100.0]),
)
@settings(max_examples=150, deadline=None)
def test_nothing_beyond_a_limit_is_sent(mode, wishes, hz) -> None:
    rules = arm_rules(mode, hz, heartbeat_s=0.5)
    sent_TA, _, _ = drive(rules, [None if w is None else np.array(w) for w in wishes])
    assert np.isfinite(sent_TA).all()
    moving = rules.moving_A
    v_TA, a_TA, j_TA = (abs(x[:, moving]).max() for x in rates(sent_TA, rules))
    assert v_TA <= 1.0 * (1 + 2e-6)
    assert a_TA <= 5.0 * (1 + 2e-6)
    assert j_TA <= 100.0 * (1 + 2e-6)
    low_A, high_A = np.array(rules.spec.low), np.array(rules.spec.high)
    room_A = 1e-9 if mode == "absolute" else 2e-6 * high_A  # a movement is its own velocity: the slack for float32
    assert ((sent_TA >= low_A - room_A) & (sent_TA <= high_A + room_A)).all()


def test_an_allowed_action_is_sent_to_the_last_bit() -> None:
    rules = arm_rules("absolute")
    t = np.arange(200) * rules.dt
    wishes = np.stack([0.2 * (1 - np.cos(t)), 0.1 * (1 - np.cos(2 * t)), 0 * t, 0.05 * np.sin(t)], axis=1).astype(
        np.float32
    )
    sent_TA, decisions, _ = drive(rules, list(wishes))
    assert (sent_TA == wishes).all()
    assert not any(d.reasons for d in decisions)


@pytest.mark.parametrize(
    ("changes", "wish", "reason"),
    [
        ({}, [3.0, 0, 0, 0], "range"),
        ({"max_step": (0.01,) * 4, "max_acceleration": (1e4,) * 4, "max_jerk": (1e6,) * 4}, [0.02, 0, 0, 0], "step"),
        ({"max_step": (0.2,) * 4, "max_acceleration": (1e4,) * 4, "max_jerk": (1e6,) * 4}, [0.1, 0, 0, 0], "velocity"),
        ({"max_jerk": (1e6,) * 4}, [0.04, 0, 0, 0], "acceleration"),
        ({"max_acceleration": (1e4,) * 4}, [0.04, 0, 0, 0], "jerk"),
        ({"ramp_s": 2.0, "max_acceleration": (1e4,) * 4, "max_jerk": (1e6,) * 4}, [0.04, 0, 0, 0], "ramp"),
        ({}, [0, 0, 0, 0.5], "step"),
    ],
)
def test_the_reason_names_the_limit(changes, wish, reason) -> None:
    rules = arm_rules("absolute", **changes)
    _, decisions, _ = drive(rules, [np.array(wish, float)])
    assert reason in decisions[0].reasons
    assert (decisions[0].sent_A != np.array(wish)).any()


def fault_of(rules, wish=NOTHING, **changes) -> str | None:
    state = drive(rules, [NOTHING])[2]
    _, decision = filter_step(rules, state, wish, view(rules, state, 1, **changes))
    return decision.fault


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ages_s": {"arm": ("joints", 0.11)}}, "stale observation: 'arm' is 110 ms old, 100 ms"),
        ({"ages_s": {"wrist": ("camera", 0.21)}}, "'wrist' is 210 ms old, 200 ms"),
        ({"ages_s": {"x": ("other", math.nan)}}, "stale observation"),
        ({"without_s": 0.51}, "inference deadline"),
        ({"now_s": 0.3}, "heartbeat"),
        ({"now_s": -1.0}, "heartbeat"),
        ({"broken": ("link: gone",)}, "link: gone"),
        ({"measured_A": np.array([0.4, 0, 0, 0])}, "tracking: a0"),
    ],
)
def test_what_is_amiss_is_a_fault(changes, says) -> None:
    assert says in str(fault_of(arm_rules("absolute"), **changes))


@pytest.mark.parametrize("bad", [[math.nan, 0, 0, 0], [math.inf, 0, 0, 0], [0, 0, 0]])
def test_an_action_that_is_no_action_is_a_fault(bad) -> None:
    assert "not finite" in str(fault_of(arm_rules("absolute"), np.array(bad, float)))


def test_ages_within_their_limits_are_no_fault() -> None:
    ages = {"arm": ("joints", 0.1), "wrist": ("camera", 0.2), "scene": ("other", 0.5)}
    assert fault_of(arm_rules("absolute"), ages_s=ages, without_s=0.5) is None


def test_a_fault_is_latched_until_it_is_resumed_and_the_hold_is_a_stop() -> None:
    rules = arm_rules("absolute")
    ramp = [np.array([0.02 * k, 0, 0, 0.1]) for k in range(40)]
    _, _, moving = drive(rules, ramp)
    assert moving.velocity_A[0] == pytest.approx(0.4, abs=1e-6)
    state, decision = filter_step(rules, moving, ramp[-1], view(rules, moving, 40, ages_s={"arm": ("joints", 1.0)}))
    assert decision.new_fault
    assert decision.holding
    held_TA, decisions, held = drive(rules, [np.array([1.0, 1, 1, 1])] * 60, state=state)
    assert all(d.fault == decision.fault and not d.new_fault for d in decisions)
    assert held.at_rest
    v_TA, _, _ = rates(np.vstack([decision.sent_A, held_TA]), rules, moving.command_A)
    assert (np.diff(v_TA[:, 0]) <= 1e-9).all(), "it did not come to rest, it went on"
    assert abs(np.diff(v_TA[:, 0], prepend=0.4) / rules.dt).max() <= 5 * (1 + 1e-6)
    assert (held_TA[:, 3] == ramp[-1][3]).all(), "the gripper keeps its last command"
    assert (np.diff(held_TA[20:], axis=0) == 0).all()


def test_resuming_goes_on_from_the_last_command_and_ramps_up() -> None:
    rules = arm_rules("absolute", ramp_s=1.0)
    _, _, moving = drive(rules, [np.array([0.02 * k, 0, 0, 0]) for k in range(30)])
    held = drive(rules, [None] * 40, state=moving)[2]
    state = filter_step(rules, held, NOTHING, view(rules, held, 70, broken=("link: cut",)))[0]
    with pytest.raises(UserError, match="coming to rest"):
        resume(rules, moving, moving.command_A)
    begun = resume(rules, state, state.command_A + 0.01)
    assert begun.fault is None
    assert begun.command_A[0] == state.command_A[0]
    sent_TA, _, _ = drive(rules, [np.array([2.0, 0, 0, 0])] * 20, state=begun)
    v_T = rates(sent_TA, rules, begun.command_A)[0][:, 0]
    assert (v_T <= (np.arange(20) + 1) / 20 * (1 + 1e-6)).all()
    assert v_T.max() > 0.5


def test_a_robot_that_was_moved_by_hand_is_resumed_where_it_is() -> None:
    rules = arm_rules("absolute")
    state = drive(rules, [NOTHING] * 3)[2]
    moved_A = np.array([0.5, 0.0, 0.03, 0.0])
    begun = resume(rules, state, moved_A)
    assert begun.command_A[0] == 0.5
    assert begun.command_A[2] == 0.0, "what is near stays the last command"


def test_the_dead_man_switch_holds_without_a_fault() -> None:
    rules = arm_rules("absolute", dead_man=True)
    wish = np.array([0.01, 0, 0, 0])
    _, decisions, state = drive(rules, [wish] * 5)
    assert all(d.holding and d.fault is None for d in decisions)
    assert (state.command_A == 0).all()
    _, decisions, _ = drive(rules, [wish], state=state, held_switch=True)
    assert not decisions[0].holding


def test_a_movement_stops_at_the_workspace_and_may_come_back() -> None:
    rules = arm_rules("velocity", workspaces=(box(),))
    state, place = start(rules, np.array([0.3, 0, 0, 0])), np.array([0.3, 0, 0, np.nan])
    farthest = 0.0
    for step in range(80):
        wish = np.array([1.0 if step < 50 else -1.0, 0, 0, 0])
        state, decision = filter_step(rules, state, wish, View(step * rules.dt, place.copy()))
        assert decision.fault is None
        place[:3] += decision.sent_A[:3] * rules.dt
        farthest = max(farthest, place[0])
        if step == 49:
            assert place[0] > 0.45
            assert abs(decision.sent_A[0]) < 0.05
    assert farthest <= 0.5 + 1e-6
    assert place[0] < 0


def test_a_measured_jump_and_a_missing_measurement_are_faults() -> None:
    rules = arm_rules("velocity", workspaces=(box(jump_m=0.1),))
    state = start(rules, np.zeros(4))
    jumped = View(0.0, np.array([0.2, 0, 0, np.nan]))
    assert "measured jump: a0" in str(filter_step(rules, state, NOTHING, jumped)[1].fault)
    nowhere = View(0.0, np.array([np.nan, 0, 0, np.nan]))
    assert "not measured" in str(filter_step(rules, state, NOTHING, nowhere)[1].fault)


def test_turns_are_compared_by_relative_rotation() -> None:
    """A rotation vector near half a turn flips its sign from one step to the next; the turn between them is small."""
    spec = ActionSpec(("rx", "ry", "rz"), ("rad",) * 3, (-4.0,) * 3, (4.0,) * 3, "absolute", 20.0)
    rules = make_rules(spec, limits(3, rotations=("rx",), max_tracking_error=(0.3,) * 3))
    turns = [Rotation.from_euler("z", angle) for angle in np.linspace(3.0, 3.3, 30)]
    state = start(rules, turns[0].as_rotvec())
    vectors, angles = [], []
    for step, turn in enumerate(turns):
        state, decision = filter_step(rules, state, turn.as_rotvec(), View(step * rules.dt, state.command_A))
        assert decision.fault is None
        vectors.append(turn.as_rotvec())
        angles.append((Rotation.from_rotvec(decision.sent_A) * turn.inv()).magnitude())
    assert abs(np.diff(vectors, axis=0)).max() > 6, "the test has no flip"
    assert max(angles) < 0.03
    far = (Rotation.from_euler("z", 1.0) * turns[-1]).as_rotvec()
    _, decision = filter_step(rules, state, far, View(30 * rules.dt, state.command_A))
    moved = (Rotation.from_rotvec(decision.sent_A) * Rotation.from_rotvec(state.command_A).inv()).magnitude()
    assert moved <= 1.0 * rules.dt * math.sqrt(3)
    assert decision.reasons


def test_a_chunk_is_judged_as_a_whole_from_the_last_command() -> None:
    rules = arm_rules("absolute")
    state = drive(rules, [np.array([0.01, 0, 0, 0])] * 10)[2]
    good_HA = np.zeros((16, 4))
    good_HA[:, 0] = 0.01 + 0.1 * (1 - np.cos(np.arange(1, 17) * 0.05))
    assert chunk_fault(rules, state, good_HA) is None
    jump_HA = good_HA + np.array([0.5, 0, 0, 0])
    assert "chunk refused" in str(chunk_fault(rules, state, jump_HA))
    assert "a0" in str(chunk_fault(rules, state, jump_HA))
    bad_HA = good_HA.copy()
    bad_HA[9, 1] = np.nan
    assert "not finite" in str(chunk_fault(rules, state, bad_HA))
    assert "shape" in str(chunk_fault(rules, state, good_HA[:, :3]))
    fast_HA = good_HA.copy()
    fast_HA[:, 2] = np.linspace(0, 2.0, 16)
    assert "a2" in str(chunk_fault(rules, state, fast_HA))


def test_it_begins_where_the_robot_is_and_nowhere_else() -> None:
    rules = arm_rules("absolute")
    assert start(rules, np.array([0.3, -0.2, 0, 0])).command_A[:2].tolist() == [0.3, -0.2]
    with pytest.raises(UserError, match="a1 is not measured"):
        start(rules, np.array([0.0, np.nan, 0, 0]))
    with pytest.raises(UserError, match=r"a0 is at 2\.5 rad, outside -2 to 2"):
        start(rules, np.array([2.5, 0, 0, 0]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_jerk": (100.0,) * 3}, "max_jerk wants one number for each"),
        ({"max_velocity": (1.0, math.inf, 1.0, 1.0)}, "max_velocity of a1 wants a finite number"),
        ({"max_acceleration": (1.0, 1.0, -1.0, 1.0)}, "max_acceleration of a2"),
        ({"max_step": (0.0, 1.0, 1.0, 1.0)}, "max_step of a0"),
        ({"max_acceleration": (1e-5,) * 4}, "would not come to rest"),
        ({"rotations": ("roll",)}, "an action 'roll'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes, says) -> None:
    with pytest.raises(UserError, match=says):
        arm_rules("absolute", **changes)


def test_every_limit_is_required() -> None:
    with pytest.raises(TypeError, match="max_velocity"):
        type(limits(4))(max_step=(1.0,))  # type: ignore[call-arg]
    with pytest.raises(UserError, match="effort"):
        make_rules(ActionSpec(("t",), ("Nm",), (-1.0,), (1.0,), "effort", 20.0), limits(1))


def test_the_filter_never_changes_a_state_it_was_given() -> None:
    rules = arm_rules("absolute")
    state = drive(rules, [np.array([0.02, 0, 0, 0])] * 5)[2]
    before = {name: np.copy(value) for name, value in vars(state).items()}
    drive(rules, [np.array([1.0, -1, 1, 1]), None, np.array([math.nan] * 4)], state=state)
    for name, value in vars(state).items():
        np.testing.assert_array_equal(value, before[name])


def test_arm_spec_has_a_free_gripper() -> None:
    assert arm_rules("delta").moving_A.tolist() == [True, True, True, False]
    assert arm_spec("delta").units[-1] == "1"


def test_a_rotation_is_resumed_as_a_whole() -> None:
    """Two vectors of nearly the same rotation: of neither may a part be taken."""
    spec = ActionSpec(("rx", "ry", "rz"), ("rad",) * 3, (-4.0,) * 3, (4.0,) * 3, "absolute", 20.0)
    rules = make_rules(spec, limits(3, rotations=("rx",), max_tracking_error=(0.7,) * 3))
    command_3 = np.array([3.10, 0.30, 0.0])
    measured = Rotation.from_rotvec(command_3) * Rotation.from_euler("z", 0.03)
    state = start(rules, command_3)
    begun = resume(rules, state, measured.as_rotvec())
    assert (Rotation.from_rotvec(begun.command_A) * Rotation.from_rotvec(command_3).inv()).magnitude() < 1e-9
    far = resume(rules, state, (measured * Rotation.from_euler("x", 1.0)).as_rotvec())
    assert (Rotation.from_rotvec(far.command_A) * measured.inv()).magnitude() == pytest.approx(1.0, abs=1e-6)


def test_an_axis_that_is_found_slightly_outside_comes_back_without_a_jump() -> None:
    rules = arm_rules("absolute")
    outside_A = np.array([2.15, 0.0, 0.0, 0.0])
    state = start(rules, outside_A)
    assert state.command_A[0] == 2.15
    sent_TA, decisions, _ = drive(rules, [np.array([3.0, 0, 0, 0])] * 40, state=state)
    assert not any(d.fault for d in decisions)
    v_TA, a_TA, _ = rates(sent_TA, rules, outside_A)
    assert abs(v_TA).max() <= 1 + 1e-5
    assert abs(a_TA).max() <= 5 * (1 + 1e-5)
    assert (np.diff(sent_TA[:, 0], prepend=2.15) <= 1e-12).all(), "it went farther out"
    assert sent_TA[-1, 0] == 2.0


def test_a_gripper_begins_where_it_is_measured() -> None:
    rules = arm_rules("absolute")
    state = start(rules, np.array([0.0, 0, 0, 0.7]))
    _, decision = filter_step(rules, state, None, view(rules, state, 0))
    assert decision.sent_A[3] == 0.7


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_an_arm_that_lags_stays_in_its_workspace(lag: int) -> None:
    """What was sent and is not measured yet leads out of a workspace too."""
    rules = arm_rules("velocity", workspaces=(box(jump_m=0.3),), joints_age_s=0.2)
    places = [np.array([0.0, 0, 0, np.nan])] * (lag + 1)
    state, v = start(rules, places[0]), 0.0
    for step in range(120):
        wish_A = np.array([1.0 if step < 60 else -1.0, 0, 0, 0])
        seen = View(step * rules.dt, places[-1 - lag].copy(), {"arm": ("joints", lag * rules.dt)})
        state, decision = filter_step(rules, state, wish_A, seen)
        assert decision.fault is None
        assert abs(decision.sent_A[0] - v) <= 5 * rules.dt * (1 + 1e-6)
        v = decision.sent_A[0]
        places.append(places[-1] + np.array([v * rules.dt, 0, 0, 0]))
        if step == 59:
            assert places[-1][0] > 0.4, "it never gets near the bound"
    assert max(p[0] for p in places) <= 0.5 + 1e-6
    assert places[-1][0] < 0


def two_links(places_A: np.ndarray) -> np.ndarray:
    """Tool of two links of 0.5 m that turn about z."""
    near, far = places_A[0], places_A[0] + places_A[1]
    return 0.5 * np.array([np.cos(near) + np.cos(far), np.sin(near) + np.sin(far), 0.0])


def linked(jump_m: float = 0.2) -> Rules:
    workspace = WorkspaceConfig((), (-0.9, -0.9, -0.1), (0.9, 0.9, 0.1), jump_m)
    spec = ActionSpec(("q0", "q1"), ("rad",) * 2, (-3.0,) * 2, (3.0,) * 2, "absolute", 50.0)
    slow = {
        "max_step": (0.1,) * 2,
        "max_velocity": (3.0,) * 2,
        "max_acceleration": (6.0,) * 2,
        "max_tracking_error": (1.0,) * 2,
    }
    return make_rules(spec, limits(2, workspaces=(workspace,), **slow), two_links)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_point_of_an_arm_stays_in_its_box_on_the_way_of_a_stop_too(seed: int) -> None:
    rules, rng = linked(), np.random.default_rng(seed)
    state = start(rules, np.array([0.8, 1.2]))
    wish_A, farthest_m = np.array([0.8, 1.2]), 0.0
    for step in range(300):
        if step % 20 == 0:
            wish_A = rng.uniform(-3, 3, 2)
        held = None if step % 50 > 40 else wish_A
        state, decision = filter_step(rules, state, held, View(step * rules.dt, state.command_A.copy()))
        assert decision.fault is None
        farthest_m = max(farthest_m, rules.reaches[0].beyond_m(decision.sent_A))
    assert farthest_m < 1e-3  # between the places that are looked at


def test_the_point_of_an_arm_that_jumps_is_a_fault() -> None:
    rules = linked(jump_m=0.05)
    state = start(rules, np.array([0.8, 1.2]))
    _, decision = filter_step(rules, state, None, View(0.0, np.array([0.8, 1.5])))
    assert "measured jump: the arm's point moved by" in str(decision.fault)


@pytest.mark.parametrize("length", [1e3, 1e160])
def test_a_rotation_vector_that_means_nothing_is_a_fault(length: float) -> None:
    spec = ActionSpec(("rx", "ry", "rz"), ("rad",) * 3, (-4.0,) * 3, (4.0,) * 3, "absolute", 20.0)
    rules = make_rules(spec, limits(3, rotations=("rx",)))
    state, wish_A = start(rules, np.zeros(3)), np.array([length, 0, 0])
    assert "chunk refused" in str(chunk_fault(rules, state, wish_A[None]))
    state, decision = filter_step(rules, state, wish_A, View(0.0, np.zeros(3)))
    assert "not a turn" in str(decision.fault)
    assert np.isfinite(decision.sent_A).all()
