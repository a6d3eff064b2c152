"""Learning on a robot: the residual stage, unchanged, on a ``fake`` one that moves in real time, and through an actor beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import tiny_flow

from vla_rl.algos.bc import BCConfig
from vla_rl.cli.main import main
from vla_rl.data.episode import Episode
from vla_rl.data.writer import EpisodeWriter
from vla_rl.pretrain import PretrainSettings, pretrain
from vla_rl.types import STATE, FeatureSpec

sys.path.insert(0, str(Path(__file__).parent))
from reach_arm import ACTION, ROBOT

WRONG_M = np.array([0.12, -0.05])  # where the base goes instead of the origin
STEPS = 40


def write_wrong_set(root: Path) -> Path:
    """Demonstrations of somebody who aims beside the origin."""
    writer = EpisodeWriter.open_or_create(
        root, action_spec=ACTION, observation_spec={STATE: FeatureSpec((2,))}, task="reach", recipe={}
    )
    rng = np.random.default_rng(0)
    for scene in range(40):
        places, actions = [rng.uniform(-0.5, 0.5, 2)], []
        for _ in range(STEPS):
            actions.append(np.clip(0.3 * (WRONG_M - places[-1]) + rng.normal(0, 0.01, 2), -0.1, 0.1))
            places.append(places[-1] + actions[-1])
        action_TA = np.array(actions, np.float32)
        success_T = np.arange(STEPS) == STEPS - 1
        writer.add(
            Episode(
                {STATE: np.array(places, np.float32)},
                action_TA,
                action_TA,
                success_T.astype(np.float32),
                success_T,
                True,
                False,
                "reach",
                {"source": "human", "scene_seed": scene},
            )
        )
    return root


@pytest.fixture
def base(tmp_path: Path) -> Path:
    data = write_wrong_set(tmp_path / "demos")
    settings = PretrainSettings(policy=tiny_flow(4, 2, 3), bc=BCConfig(steps=600, batch_size=64, warmup_steps=10))
    pretrain([data], tmp_path / "base", settings)
    return tmp_path / "base"


@pytest.fixture
def robot(tmp_path: Path) -> Iterator[Path]:
    """File of a robot whose arm moves in another process."""
    arm = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("reach_arm.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert arm.stdout is not None
    path = tmp_path / "reach.yaml"
    path.write_text(ROBOT.replace("ADDRESS", arm.stdout.readline().strip()))
    yield path
    arm.kill()
    arm.wait()


def options(**changes: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "max-episode-steps": STEPS,
        "env-steps": 4000,
        "base-episodes": 8,
        "noise-episodes": 8,
        "order-episodes": 6,
        "anchor-updates": 300,
        "warmup-updates": 300,
        "imitation-updates": 0,
        "updates-per-step": 1.0,
        "ramp-steps": 0,
        "selection-scenes": 24,
        "select-every": 1000,
        "stop-at": 0.9,
        "residual.width": 32,
        "residual.depth": 1,
        "residual.scale": 0.6,
        "residual.critic.width": 32,
        "residual.critic.depth": 1,
        "td3.actor-rate": 3e-3,
        "td3.critic-rate": 3e-3,
        "td3.n-steps": 3,
        "td3.discount": 0.95,
    }
    return [word for name, value in (chosen | changes).items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_residual_learns_on_a_robot_and_improves_its_base(base: Path, robot: Path, tmp_path: Path) -> None:
    out = tmp_path / "residual"
    words = ["residual", "--policy", str(base), "--robot", str(robot), "--task", "reach", "--out", str(out)]
    assert (
        main([*words, *options(), "--robot-log", str(tmp_path / "steps.jsonl"), "--json", str(tmp_path / "r.json")])
        == 0
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["base_selection_success"] < 0.3
    assert results["selection_success"] > results["base_selection_success"] + 0.4
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert sum("sent" in step for step in steps) >= results["env_steps"]
    assert not any(step.get("fault") for step in steps)


@pytest.fixture
def actor(robot: Path) -> Iterator[str]:
    """Address of an actor beside the robot."""
    words = ["actor", "--robot", str(robot), "--task", "reach", "--max-episode-steps", str(STEPS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_rl.cli.main", *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    assert process.wait(20) in (0, -15, 130), "the actor did not come to rest and end"


@pytest.mark.slow
def test_a_learner_elsewhere_learns_through_the_actor_beside_the_robot(
    actor: str, base: Path, robot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It never opens the robot itself: the robot's log is of one connection, the actor's."""
    words = ["residual", "--policy", str(base), "--robot", str(robot), "--task", "reach", "--actors", actor]
    few = options(
        **{"env-steps": 300, "base-episodes": 3, "noise-episodes": 2, "order-episodes": 3, "selection-scenes": 6}
    )
    assert main([*words, *few, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["env_steps"] >= 300
    assert results["selection_scenes"] == 6
    assert results["selection_env_steps"] > 0
    capsys.readouterr()
    assert main([*words, *options(**{"max-episode-steps": 7}), "--out", str(tmp_path / "other")]) == 2
    assert "the learner's episodes have up to 7 steps, the actor's 40" in capsys.readouterr().err


def test_a_robot_and_what_is_not_for_it(
    robot: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["residual", "--policy", str(base), "--task", "reach", "--out", str(tmp_path / "out")]
    assert main([*words, "--robot", str(robot), "--actors", "process"]) == 2
    assert "a robot wants actors own, or the one address" in capsys.readouterr().err
    assert main([*words, "--operator", "keyboard"]) == 2
    assert "operator, robot_log and judge want a robot" in capsys.readouterr().err
    assert main([*words, "--robot", "ros2_control_arm"]) == 2
    assert "wants a person to set each scene" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_online_stage_learns_on_a_robot(base: Path, robot: Path, tmp_path: Path) -> None:
    words = [
        "online",
        "--policy",
        str(base),
        "--robot",
        str(robot),
        "--task",
        "reach",
        "--max-episode-steps",
        str(STEPS),
    ]
    few = {"env-steps": 240, "decisions": 60, "selection-scenes": 4, "select-every": 2}
    words += [word for name, value in few.items() for word in (f"--{name}", str(value))]
    log = tmp_path / "steps.jsonl"
    assert (
        main([*words, "--robot-log", str(log), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["env_steps"] >= 240
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum("sent" in step for step in steps) >= 240
    assert not any(step.get("fault") for step in steps)
