"""Round trips: what is lost, damaged or old does not count, and ratios are against the bare library of the same run."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from real_robot.round_trip.ours import OurClient, echo
from real_robot.round_trip.rows import Tally, with_ratios
from real_robot.round_trip.stopwatch import CONTENTS, KINDS, Burst, Kind, Mark, Timer, unheard
from real_robot.transports.dds import DdsConfig
from vla_rl.cli.main import main
from vla_rl.runtime.config import load_named

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import free_domain, ros_environment

SMALL = KINDS["image_96x96"]


class Wire:
    """A client whose messages come back at once, as ``does`` says."""

    def __init__(self, does: Callable[[int], list[tuple[int, Mark]]]) -> None:
        self.heard, self._does = unheard, does

    def send(self, kind: Kind, number: int) -> None:
        for back, mark in self._does(number):
            self.heard(kind.name, back, 1e9, lambda mark=mark: mark)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real_robot.round_trip.stopwatch.QUIET_S", 0.5)


def true(number: int) -> tuple[int, Mark]:
    return number, SMALL.mark(number)


@pytest.mark.parametrize(
    ("does", "counts"),
    [
        (lambda n: [true(n)], {"lost": 0, "wrong": 0, "twice": 0, "came": 12}),
        (lambda n: [true(n)] if n % 3 else [], {"lost": 4, "wrong": 0, "twice": 0, "came": 8}),
        (lambda n: [(n, SMALL.mark(n + 1))], {"lost": 0, "wrong": 12, "twice": 0, "came": 0}),
        (lambda n: [true(n), true(n)], {"lost": 0, "wrong": 0, "twice": 12, "came": 12}),
        (lambda n: [true(n - 1000)], {"lost": 12, "wrong": 0, "twice": 0, "came": 0}),
    ],
    ids=["whole", "lost", "damaged", "twice", "old"],
)
def test_only_what_comes_back_whole_and_new_counts(does, counts) -> None:
    timer = Timer(Wire(does))
    result = timer.measure(SMALL, 12, 1000.0)
    assert result["sent"] == 12
    assert {name: result[name] for name in ("lost", "wrong", "twice")} | {"came": len(result["delays_s"])} == counts


def test_contents_differ_from_one_message_to_the_next() -> None:
    for kind in KINDS.values():
        assert len({kind.mark(number) for number in range(CONTENTS)}) == CONTENTS


def test_checking_is_not_charged_to_the_transport() -> None:
    burst = Burst(0, 1, {0: SMALL.mark(0)})
    burst.sent_s[0] = 0.0

    def slow() -> Mark:
        for _ in range(200):
            mark = SMALL.mark(0)
        return mark

    burst.returned(0, 0.5, slow)
    assert burst.result(1.0)["cpu_s"] < 1.0 - 0.005
    assert burst.result(1.0)["delays_s"] == [0.5]


def test_ratios_are_of_the_same_kind_of_message() -> None:
    tallies = [Tally(pair, "echo", kind, 20.0) for pair in ("bare", "ours") for kind in ("joints", "image")]
    for tally, median_s in zip(tallies, (0.002, 0.010, 0.003, 0.005), strict=True):
        for shift in (-0.001, 0.0, 0.001):
            tally.add(
                {
                    "sent": 3,
                    "lost": 1,
                    "wrong": 0,
                    "twice": 0,
                    "delays_s": [median_s + shift / 10] * 2,
                    "cpu_s": median_s,
                }
            )
    rows = {(row["transport"], row["kind"]): row for row in with_ratios(tallies, "bare")}
    assert rows["ours", "joints"]["median_ratio"] == pytest.approx(1.5)
    assert rows["ours", "image"]["median_ratio"] == pytest.approx(0.5)
    assert rows["bare", "image"]["median_ratio"] == 1.0
    assert rows["ours", "joints"]["n"] == 6
    assert rows["ours", "joints"]["lost"] == 3
    assert rows["ours", "joints"]["cpu_ms"] == pytest.approx(1.5)


def test_messages_come_back_whole_over_dds() -> None:
    hz = dict.fromkeys(KINDS, 50.0)
    with free_domain() as domain:
        here, there = (DdsConfig(domain=domain).build() for _ in range(2))
        here.open()
        there.open()
        try:
            threading.Thread(target=echo, args=(there, "/test", hz), daemon=True).start()
            timer = Timer(OurClient(here, "/test", hz))
            for kind in (KINDS["joints"], SMALL, KINDS["image_480x640"]):
                assert timer.join(kind), kind.name
                result = timer.measure(kind, 10, 20.0)
                assert result["wrong"] == result["twice"] == 0
                assert len(result["delays_s"]) >= 8
                assert 0 < min(result["delays_s"]) < 1.0
        finally:
            here.close()
            there.close()


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["--rounds", "5", "--messages", "2"], "rounds wants 1 to messages, got 5 of 2"),
        (["--rate", "0"], "rate and image_rate want 0 to 1000 Hz"),
        (["--domain", "999"], "domain wants 0 to 232, got 999"),
    ):
        assert main(["bench", "bridge", *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_against_real_ros_measures_every_pair(tmp_path: Path) -> None:
    numbers = tmp_path / "bridge.json"
    with free_domain() as domain:
        words = f"bench bridge --transports dds --messages 6 --rounds 1 --domain {domain} --json {numbers}"
        assert main([*words.split(), "--ros-python", str(ros_environment("kilted"))]) == 0
    found = json.loads(numbers.read_text())
    assert found["left_out"] == []
    pairs = {(row["transport"], row["echo"]) for row in found["rows"] if row["n"]}
    bare = "bare rclpy"
    assert pairs == {(bare, bare), (f"{bare}, shared memory", bare), ("dds", bare), ("dds", "dds")}
    assert sum(row["wrong"] for row in found["rows"]) == 0
    assert all(row["median_ratio"] > 0 for row in found["rows"])


def test_without_ros_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("VLA_RL_ROS_PYTHON", "VLA_RL_ROS1_PYTHON", "ROSBRIDGE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert main(["bench", "bridge", "--transports", "rclpy", "ros1", "rosbridge"]) == 2
    assert "nothing was measured: bare rclpy: option ros_python names no Python" in capsys.readouterr().err


def test_the_arm_is_the_same_behind_every_transport() -> None:
    arms = [load_named("robot", f"lift_{name}") for name in ("dds", "rclpy", "ros1", "rosbridge")]
    assert [arm.pop("transport")["type"] for arm in arms] == ["dds", "rclpy", "ros1", "rosbridge"]
    assert all(arm == arms[0] for arm in arms)
