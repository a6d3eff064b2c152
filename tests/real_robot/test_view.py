"""A run that is shown: what can be read back, and that a viewer never holds the loop up."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from robot_toys import toy_robot

from real_robot import view as view_module
from real_robot.loop import Timing
from real_robot.robot import Robot
from real_robot.view import PLACES, View, open_view, require_view
from vla_rl.cli.main import main
from vla_rl.runtime.config import CONFIG_ROOT
from vla_rl.runtime.errors import UserError

HZ = 50.0


def column(path: Path, entity: str) -> list[Any]:
    """The numbers of an entity, by step."""
    import rerun.dataframe as frames

    table = frames.load_recording(path).view(index="step", contents=entity).select().read_all()
    (name,) = [n for n in table.column_names if n.startswith(entity) and n.endswith(("scalars", "text", "buffer"))]
    return [row for row in table[name].to_pylist() if row is not None]


def entities(path: Path) -> set[str]:
    import rerun.dataframe as frames

    return {c.entity_path for c in frames.load_recording(path).schema().component_columns()}


def test_what_is_shown_is_what_happened(tmp_path: Path) -> None:
    file = tmp_path / "run.rrd"
    robot, driver = toy_robot(hz=HZ)
    picture = np.zeros((3, 6, 8), np.uint8)
    decisions, timing = [], Timing()
    with open_view(str(file), robot.action_spec, timing) as view:
        view.inference_s = [0.012]
        for step in range(20):
            reading = robot.observe()
            reading = replace(reading, features={**reading.features, "observation.images.front": picture + step})
            timing.parts_s["observe"].append(0.003)
            decision = robot.send(np.array([0.3, 0.01, 0.0, 0.0]) if step < 15 else None)
            decisions.append((reading, decision))
            view.step(reading, decision)
        driver.says = {"broken": ("link: cut",)}
        view.step(robot.observe(), robot.send(None))
    robot.stop()
    assert (view.shown, view.dropped, view.failure) == (21, 0, None)
    shown = np.array(column(file, "/action/a0"))
    assert shown.shape == (21, 3)
    np.testing.assert_allclose(shown[:15, 0], 0.3)
    assert np.isnan(shown[15:, 0]).all(), "nothing was wanted"
    np.testing.assert_allclose(shown[:20, 1], [d.sent_A[0] for _, d in decisions])
    np.testing.assert_allclose(shown[:20, 2], [r.measured_A[0] for r, _ in decisions])
    assert column(file, "/latency_ms/inference") == [[12.0]] * 21
    assert column(file, "/latency_ms/observe") == [[3.0]] * 21
    said = [text for (text,) in column(file, "/filter/reasons")]
    assert "acceleration" in said[0]
    assert said[-1] == "fault: link: cut"
    pictures = column(file, "/observation/images/front")
    assert len(pictures) == 20
    assert bytes(pictures[7][0]) == bytes([7] * picture.size)
    assert {"/observation/state", "/filter/holding", "/age_ms/arm"} <= entities(file)


class Stuck:
    """A stream that takes nothing any more, as one to a viewer that hangs."""

    def __init__(self) -> None:
        self.freed = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.freed.wait(30)


class Broken:
    """A stream that fails, as one on a full disk."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space left on device")

        return fail


def show_steps(robot: Robot, view: View, steps: int) -> float:
    """Show so many steps; seconds that the view took of them, of the slowest one."""
    reading, slowest_s = robot.observe(), 0.0
    decision = robot.send(None)
    for _ in range(steps):
        begun_s = time.perf_counter()
        view.step(reading, decision)
        slowest_s = max(slowest_s, time.perf_counter() - begun_s)
    return slowest_s


def test_a_viewer_that_hangs_costs_the_loop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "CLOSE_S", 0.2)
    robot, _ = toy_robot(hz=HZ)
    view = View(stuck := Stuck(), robot.action_spec, Timing(), None)
    assert show_steps(robot, view, PLACES + 100) < 0.1
    assert view.dropped >= 99, "steps without a place have to be dropped"
    begun_s = time.monotonic()
    view.close()
    assert time.monotonic() - begun_s < 5
    assert "has not taken everything" in str(view.failure)
    stuck.freed.set()
    robot.stop()


def test_a_viewer_that_fails_ends_the_view_and_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    robot, _ = toy_robot(hz=HZ)
    view = View(Broken(), robot.action_spec, Timing(), None)
    assert show_steps(robot, view, PLACES + 10) < 0.1
    view.close()
    assert view.failure == "no space left on device"
    assert "the robot goes on: no space left on device" in capsys.readouterr().err
    robot.stop()


def test_a_view_that_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.rrd"
    there.touch()
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for view, says in (
        ("window", "wants 'live', or a file that ends with .rrd, got 'window'"),
        (str(there), "is there already"),
        ("live", "wants a display"),
    ):
        with pytest.raises(UserError, match=says):
            require_view(view)
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main(["deploy", "no-policy", "--robot", "push_t_fake", "--view", str(tmp_path / "run.rrd")]) == 2
    assert "wants the package rerun-sdk: pip install 'vla-rl[view]'" in capsys.readouterr().err


def test_deploy_writes_a_view_of_the_pusher(policy: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    raw["safety"] |= {"max_chunk_deviation": [2.0, 2.0], "inference_s": 5.0, "joints_age_s": 3.0, "heartbeat_s": 3.0}
    robot, file, numbers = tmp_path / "pusher.yaml", tmp_path / "view" / "run.rrd", tmp_path / "run.json"
    robot.write_text(yaml.safe_dump(raw))
    words = f"deploy {policy} --robot {robot} --seconds 1 --out {tmp_path / 'run'} --view {file} --json {numbers}"
    assert main(words.split()) == 0
    assert json.loads(numbers.read_text())["view"] == {"shown": 20, "dropped": 0, "failure": None}
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    begun = next(i for i, line in enumerate(lines) if line.get("event", "").startswith("reset"))
    logged = [line["sent"][1] for line in lines[begun + 1 :] if "sent" in line][:20]
    np.testing.assert_allclose(np.array(column(file, "/action/y"))[:, 1], logged, atol=1e-8)
    wanted = {
        "/action/x",
        "/action/y",
        "/observation/state",
        "/latency_ms/act",
        "/latency_ms/inference",
        "/age_ms/robot",
    }
    assert wanted <= entities(file)
