"""How old an observation really is, whatever its stamps say."""

from __future__ import annotations

import numpy as np
import pytest

from real_robot.messages import conform, image_message, stamp
from real_robot.parts import TopicConfig
from real_robot.streams import Streams

JOINTS = TopicConfig("/joint_states", "sensor_msgs/msg/JointState", 50.0, "state")
CAMERA = TopicConfig("/image", "sensor_msgs/msg/Image", 30.0, "sensor", frozen_s=0.5)


def joints(at_s: float | None) -> dict:
    header = {} if at_s is None else {"header": {"stamp": stamp(at_s)}}
    return conform(JOINTS.type, {"name": ["a"], "position": [0.0], **header})


def streams() -> Streams:
    return Streams({"joints": JOINTS, "camera": CAMERA}, 0.2)


def feed(made: Streams, pairs: list[tuple[float, float]]) -> None:
    """Stamps and arrival times."""
    for stamp_s, received_s in pairs:
        made.take("joints", joints(stamp_s), received_s)


def age(made: Streams, now_s: float) -> float:
    return made.ages_s(now_s)["joints"][1]


def test_it_is_ready_when_every_stream_has_begun() -> None:
    made = streams()
    made.take("joints", joints(1.0), 100.0)
    assert made.newest() is None
    assert made.silent() == ["/image"]
    made.take("camera", image_message(np.zeros((2, 2, 3), np.uint8), 1.0), 100.0)
    assert made.newest() is not None


def test_the_other_clock_is_never_compared_with_ours() -> None:
    made = streams()
    feed(made, [(1e9 + 0.02 * k, 5.0 + 0.02 * k) for k in range(50)])
    assert age(made, 5.98) == pytest.approx(0, abs=1e-4)
    assert made.broken(5.98) == ()


@pytest.mark.parametrize("late", [[(1.02, 0.06)], [(1.04, 0.08)]], ids=["reordered", "repeated"])
def test_what_is_not_newer_is_not_fresh(late) -> None:
    made = streams()
    feed(made, [(1.0, 0.0), (1.04, 0.04)])
    feed(made, late)
    assert age(made, 0.1) == pytest.approx(0.06, abs=1e-4)
    newest = made.newest() or {"joints": None}
    assert newest["joints"] is None or newest["joints"]["header"]["stamp"]["nanosec"] == 40_000_000


def test_a_link_that_buffers_cannot_make_old_look_new() -> None:
    made = streams()
    feed(made, [(1.0 + 0.02 * k, 0.02 * k) for k in range(10)])
    feed(made, [(1.2 + 0.02 * k, 0.35 + 0.02 * k) for k in range(10)])  # from now on 0.15 s late
    assert age(made, 0.53) == pytest.approx(0.15, abs=1e-3)
    assert made.broken(0.53) == ()


def test_a_hiccup_is_over_when_the_link_has_caught_up() -> None:
    made = streams()
    feed(made, [(1.0, 0.0), (1.02, 0.02), (1.04, 0.34), (1.34, 0.345), (1.36, 0.36)])
    assert made.broken(0.36) == ()
    assert age(made, 0.36) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("jump_s", [5.0, -5.0, 0.5, -0.5])
def test_a_clock_that_jumps_is_a_fault_until_it_is_looked_after(jump_s: float) -> None:
    made = streams()
    feed(made, [(10 + 0.02 * k, 0.02 * k) for k in range(8)])
    feed(made, [(10.16 + jump_s, 0.16)])
    assert "clock" in made.broken(0.17)[0]
    made.forget_clock()
    feed(made, [(10.18 + jump_s, 0.18), (10.2 + jump_s, 0.2)])
    assert made.broken(0.2) == ()
    assert age(made, 0.2) == pytest.approx(0, abs=1e-3)


def test_a_late_first_message_is_no_clock_that_jumps() -> None:
    made = streams()
    feed(made, [(10.0, 0.3), (10.3, 0.301), (10.32, 0.32)])
    assert made.broken(0.32) == ()
    assert age(made, 0.32) == pytest.approx(0, abs=1e-3)


def test_pictures_that_never_change_are_frozen_even_with_new_stamps() -> None:
    made = streams()
    picture = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    for k in range(30):
        made.take("camera", image_message(picture, 1 + k / 30), k / 30)
    assert "frozen camera" in made.broken(29 / 30)[0]
    picture[0, 0, 0] += 1
    made.take("camera", image_message(picture, 2.0), 1.0)
    assert made.broken(1.0) == ()


def test_without_stamps_arrival_counts() -> None:
    made = streams()
    for k in range(5):
        made.take("joints", joints(None), 0.02 * k)
    assert age(made, 0.1) == pytest.approx(0.02)


def test_rates_are_of_fresh_messages() -> None:
    made = streams()
    feed(made, [(1 + 0.02 * k, 0.02 * k) for k in range(51)])
    assert made.rates_hz()["joints"] == pytest.approx(50)


def test_a_clock_that_steps_back_a_little_is_cleared_by_a_person() -> None:
    """It only seems late, and stays so until somebody has looked."""
    made = streams()
    feed(made, [(10 + 0.02 * k, 0.02 * k) for k in range(50)])
    feed(made, [(9.85 + 0.02 * k, 0.02 * k) for k in range(60, 400)])
    assert age(made, 7.98) > 0.14
    made.forget_clock()
    feed(made, [(9.85 + 0.02 * k, 0.02 * k) for k in range(400, 410)])
    assert age(made, 8.18) < 0.001


def test_clocks_that_drift_apart_do_not_age_what_is_fresh() -> None:
    made = streams()
    feed(made, [((1 - 3e-4) * 0.02 * k, 0.02 * k) for k in range(30_000)])  # ten minutes
    assert age(made, 0.02 * 29_999) < 0.001
