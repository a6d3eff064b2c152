"""``vla-rl bench faults``: what it does to a robot, and that it would see one that does not hold, or jumps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from robot_toys import arm_rules

from real_robot.fault_trials import Line, arm_gap, arm_hold, jumps
from real_robot.limits import Rules
from real_robot.safety import View, filter_step, resume, start
from vla_rl.cli.main import main
from vla_rl.data.reader import load_dataset
from vla_rl.runtime.config import CONFIG_ROOT

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import free_domain

LOAD = 8.0  # the suite shares two cores with all that it starts: what takes 0.1 s on a robot may take this many times as long


def filtered_lines(rules: Rules) -> tuple[list[Line], float]:
    """The log of a robot that moves, is held by a fault, and resumed; and when."""
    state, lines, resumed_s = start(rules, np.zeros(rules.spec.dim)), [{"event": "reset 0"}], 0.0
    for step in range(80):
        now_s, at_A = step * rules.dt, state.command_A
        if step == 50:
            state, resumed_s = resume(rules, state, at_A), now_s - rules.dt / 2
        broken = ("link: cut",) if step == 20 else ()
        wish_A = np.full(rules.spec.dim, 0.5 * np.sin(now_s))
        state, decision = filter_step(rules, state, wish_A, View(now_s, at_A, broken=broken))
        lines.append({"t": now_s, "sent": decision.sent_A.round(9).tolist(), "measured": at_A.tolist()})
    return lines, resumed_s


@pytest.mark.parametrize("mode", ["absolute", "delta"])
def test_a_jump_on_resume_is_seen_and_a_filtered_command_is_none(mode) -> None:
    rules = arm_rules(mode)
    lines, resumed_s = filtered_lines(rules)
    assert jumps(lines, resumed_s, rules) == []
    for line in lines[55:]:
        line["sent"] = (np.array(line["sent"]) + 0.03).tolist()
    assert any("jerk" in found for found in jumps(lines, resumed_s, rules))
    if mode == "absolute":
        for line in lines[51:55]:
            line["sent"] = (np.array(line["sent"]) + 0.03).tolist()
        assert jumps(lines, resumed_s, rules, lost=True) == [], "it begins anew where commands were lost"


def test_an_arm_that_jumps_by_itself_is_seen() -> None:
    rules = arm_rules()
    lines, resumed_s = filtered_lines(rules)
    for line in lines[53:]:
        line["measured"] = (np.array(line["measured"]) + 0.2).tolist()
    assert any("the arm jumped" in found for found in jumps(lines, resumed_s, rules))


def arm_rows(rules: Rules, lost: int) -> tuple[list[Line], list[Line], float]:
    """What an arm executed, and was sent, whose link loses commands from step 10 to 30."""
    place = [np.full(rules.spec.dim, 0.004 * min(i, 10 + lost)) for i in range(60)]
    steps = [{"t": 0.05 * i, "sent": place[i].tolist()} for i in range(60)]
    rows = []
    for i in range(60):
        heard = i if i < 10 or i >= 30 else 9
        rows.append({"t": 0.05 * i + 0.01, "action": place[heard], "holding": 11 <= i < 30})
    return rows, steps, 0.05 * 28


def test_when_an_arm_held_by_itself_is_counted_from_the_last_command_that_it_was_told() -> None:
    rules = arm_rules()
    rows, steps, over_s = arm_rows(rules, lost=0)
    assert arm_hold(rows, steps, over_s) == (pytest.approx(0.45), pytest.approx(0.56))
    assert arm_hold([{**row, "holding": False} for row in rows], steps, over_s) is None, "it never held"


def test_commands_that_were_lost_are_a_jump_for_an_arm_that_is_told_places() -> None:
    rules = arm_rules()
    rows, _, over_s = arm_rows(rules, lost=0)
    gap = arm_gap(rows, over_s, rules)
    assert gap == pytest.approx(0.004 / 0.05)
    rows, _, over_s = arm_rows(rules, lost=20)
    assert arm_gap(rows, over_s, rules) == pytest.approx(21 * gap)
    assert arm_gap(rows[:25], over_s, rules) is None, "it was told nothing"


@pytest.fixture
def patient_robot(tmp_path: Path) -> Path:
    """The simulated pusher on a machine that is busy."""
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    raw["safety"] |= {"joints_age_s": 0.1 * LOAD, "heartbeat_s": 0.1 * LOAD, "inference_s": 1.0}
    raw["safety"] |= {"camera_age_s": 0.2 * LOAD, "other_age_s": 0.2 * LOAD}
    path = tmp_path / "pusher.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def bench(robot: Path, out: Path, faults: list[str], domain: int = 0) -> dict[str, dict[str, Any]]:
    """The numbers of one trial of each fault."""
    words = ["bench", "faults", "--robot", str(robot), "--trials", "1", "--hold-ms", str(100 * LOAD)]
    words += ["--faults", *faults, "--domain", str(domain), "--out", str(out), "--json", str(out) + ".json"]
    assert main(words) in (0, 1)
    return json.loads(Path(str(out) + ".json").read_text())["faults"]


def test_it_holds_latches_records_and_resumes_gently(patient_robot: Path, tmp_path: Path) -> None:
    names = ["policy_killed", "inference_hangs", "clock_jumps", "robot_silent", "not_finite"]
    found = bench(patient_robot, tmp_path / "out", names)
    for name, row in found.items():
        assert (row["failed"], row["wrong"]) == (0, []), name
        assert row["held_in_time"] == row["latched"] == row["recorded"] == row["n"] == 1, name
        assert row["jumps"] == 0, name
    assert found["inference_hangs"]["said"] == found["policy_killed"]["said"] == ["inference deadline"]
    assert found["inference_hangs"]["latch_median_ms"] > 1000 > found["inference_hangs"]["hold_median_ms"]
    data = load_dataset(tmp_path / "out" / "push_t_fake")
    assert sorted(data.episode(i).instruction for i in range(data.num_episodes)) == sorted(names)


def test_an_arm_whose_link_is_cut_holds_by_itself_and_a_frozen_camera_is_noticed(
    patient_robot: Path, tmp_path: Path
) -> None:
    with free_domain() as domain:
        found = bench(
            patient_robot, tmp_path / "out", ["link_cut", "bridge_hangs", "bridge_killed", "frozen_camera"], domain
        )
    for name, row in found.items():
        assert row["held_in_time"] == row["latched"] == row["recorded"] == row["n"] == 1, name
    assert found["link_cut"]["said"] == found["bridge_killed"]["said"] == ["stale observation"]
    assert found["frozen_camera"]["said"] == ["frozen camera"]
    del found[
        "bridge_hangs"
    ]  # it goes on with what waits in its socket, which it was sent long ago on a machine that is so patient
    assert [row["jumps"] for row in found.values()] == [0, 0, 0], [row["wrong"] for row in found.values()]
    assert found["frozen_camera"]["notice_median_ms"] > 900


@pytest.mark.slow
def test_nothing_is_left_running_after_an_interrupt(patient_robot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["bench", "faults", "--robot", str(patient_robot), "--faults", "inference_hangs", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_rl.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log, deadline = out / "push_t_fake.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "inference deadline" in log.read_text()):
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) >= 3, "arm, nursery and policy are processes of their own"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(others, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--faults", "earthquake"], "got earthquake"),
        (["--robot", "lift_dds"], "faults are done to simulated robots"),
        (["--trials", "0"], "trials wants at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "faults", *words]) == 2
    assert says in capsys.readouterr().err
