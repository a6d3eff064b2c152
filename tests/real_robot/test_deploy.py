"""``vla-rl deploy`` and the filter in ``vla-rl eval`` as a user meets them."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from real_robot.operators.base import Input, Situation
from real_robot.robot import load_robot
from real_robot.simulated import SimulatedGuard, measured_features
from vla_rl.cli import deploy
from vla_rl.cli.main import main
from vla_rl.data.reader import load_dataset
from vla_rl.data.replay import Replay
from vla_rl.inference.base_policy import BaseSpec
from vla_rl.inference.bases import own_base
from vla_rl.inference.steps import label_demonstrations
from vla_rl.residual_checks import require_demonstrations, shown_steps
from vla_rl.runtime.config import CONFIG_ROOT
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import TEST_SCENES
from vla_rl.types import STATE, Observation

pygame = importlib.import_module("pygame")


@pytest.fixture(scope="module")
def robot_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated pusher with limits that a tiny policy does not run into."""
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    raw["safety"] |= {"max_chunk_deviation": [2.0, 2.0], "inference_s": 5.0, "joints_age_s": 3.0, "heartbeat_s": 3.0}
    raw["answer_s"] = 10.0
    path = tmp_path_factory.mktemp("robot") / "pusher.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vla-rl:")]
    return line


def test_a_run_is_recorded_and_counted(policy: Path, robot_file: Path, tmp_path: Path) -> None:
    out, numbers = tmp_path / "run", tmp_path / "run.json"
    words = f"deploy {policy} --robot {robot_file} --episodes 2 --seconds 1.5 --out {out} --json {numbers}"
    assert main(words.split()) == 0
    found = json.loads(numbers.read_text())
    assert found["episodes"] == 2
    assert [s["length"] for s in found["scenes"]] == [30, 30]
    assert found["fault_rate"] == 0
    assert found["timing"]["steps"] == 60
    data = load_dataset(out / "episodes")
    episode = data.episode(0)
    assert episode.length == 30
    assert episode.provenance["robot"] == "push_t_fake"
    assert episode.provenance["strategy"] == "live"
    sent = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    begun = next(i for i, line in enumerate(sent) if line.get("event", "").startswith("reset"))
    logged = np.array([line["sent"] for line in sent[begun + 1 : begun + 31]])
    np.testing.assert_allclose(episode.action_TA, logged, atol=1e-6)
    assert {"wanted", "sent", "measured", "clipped", "reason", "fault", "holding"} <= set(sent[begun + 1])
    assert main([*words.split(), "--episodes", "2"]) == 0, "the same command goes on, here with nothing left to do"
    assert load_dataset(out / "episodes").num_episodes == 2


def test_dry_checks_everything_and_sends_nothing(
    policy: Path, robot_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "dry.json"
    assert main(f"deploy {policy} --robot {robot_file} --mode dry --json {numbers} --out {tmp_path}".split()) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["fits"]


def test_shadow_runs_the_policy_and_sends_nothing(policy: Path, robot_file: Path, tmp_path: Path) -> None:
    words = f"deploy {policy} --robot {robot_file} --mode shadow --seconds 1 --out {tmp_path / 'run'}"
    assert main(words.split()) == 0
    episode = load_dataset(tmp_path / "run" / "episodes").episode(0)
    state_TS = episode.observations[STATE]
    assert abs(state_TS - state_TS[0]).max() < 1e-3, "it moved"
    assert abs(episode.intended_TA - state_TS[:-1]).max() > 0.01, "the policy wanted nothing"


def test_a_policy_that_is_for_another_robot_is_refused(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"deploy {policy} --robot lift_fake".split()) == 2
    assert "and of robot 'panda_lift_fake' differ in names" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["safety"].pop("max_jerk"), "max_jerk"),
        (lambda raw: raw["safety"].update(max_velocity=None), "max_velocity"),
        (lambda raw: raw["safety"].update(enabled=False), "no option 'enabled' in safety"),
        (lambda raw: raw["safety"].update(max_velocity=[1.0, float("inf")]), "max_velocity of y wants a finite number"),
        (lambda raw: raw.update(type="serial"), "type wants one of fake, ros"),
        (lambda raw: raw["action"].update(units=["m", "deg"]), "differ in units"),
        (lambda raw: raw.update(answer_s=0.0), "watchdog_s, speed, answer_s want numbers > 0"),
    ],
)
def test_a_robot_without_limits_is_not_moved(
    change, says, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    change(raw)
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert main(["deploy", str(policy), "--robot", str(path)]) == 2
    assert says in one_line(capsys)


def test_no_option_switches_the_filter_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "--help"]) == 0
    text = capsys.readouterr().out
    assert "WITHOUT A SAFETY RATING" in text
    assert "emergency stop" in text
    assert "safety" not in "".join(line for line in text.splitlines() if line.strip().startswith("--"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_brings_the_robot_to_rest(
    number: signal.Signals, policy: Path, robot_file: Path, tmp_path: Path
) -> None:
    words = ["deploy", str(policy), "--robot", str(robot_file), "--seconds", "60", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_rl.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "steps.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count('"sent"') > 20):
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "stopping" in err
    assert "ended by operator" in out
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["event"] == "stopped"
    sent = [line for line in lines if "sent" in line]
    assert sent[-1]["holding"]
    assert sent[-1]["sent"] == sent[-2]["sent"], "it left before it was at rest"
    assert load_dataset(tmp_path / "run" / "episodes").num_episodes == 1, "what was recorded is kept"


def test_eval_runs_through_the_filter_and_says_what_it_did(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    raw["safety"] |= {"max_velocity": [0.05, 0.05], "max_acceleration": [1.0, 1.0]}
    slow = tmp_path / "slow.yaml"
    slow.write_text(yaml.safe_dump(raw))
    words = f"eval {policy} --episodes 2 --max-episode-steps 40 --num-envs 2"
    for robot, name in ((None, "usual"), (slow, "slow")):
        more = [] if robot is None else ["--robot", str(robot)]
        assert main([*words.split(), *more, "--json", str(tmp_path / f"{name}.json")]) == 0
    usual, slowed = (json.loads((tmp_path / f"{name}.json").read_text())["safety"] for name in ("usual", "slow"))
    assert usual["robot"] == slowed["robot"] == "push_t_fake"
    assert slowed["clip_rate"] > 0.5 >= usual["clip_rate"]
    assert slowed["clipped_by"]["velocity"] > 0.3
    assert usual["fault_rate"] == 0
    assert "limits of push_t_fake" in capsys.readouterr().out
    assert main([*words.split(), "--robot", "lift_fake"]) == 2
    assert "differ in names" in one_line(capsys)


def test_each_slot_of_a_batch_has_a_filter_of_its_own() -> None:
    config = load_robot("push_t_fake")
    config = replace(config, safety=replace(config.safety, max_velocity=(1.0, 1.0), max_acceleration=(10.0, 10.0)))
    guard = SimulatedGuard(config, 2)
    assert measured_features(config) == {0: (STATE, 0), 1: (STATE, 1)}
    features = {STATE: np.array([[0.0, 0.0], [0.2, -0.2]])}
    for slot in range(2):
        guard.begin(slot, {STATE: features[STATE][slot]})
    wish = np.array([[0.3, 0.0], [0.2, -0.2]])
    sent = guard.filter(wish, features, np.array([True, True]))
    assert 0 < sent[0, 0] < 0.3
    assert sent[1].tolist() == wish[1].astype(np.float32).tolist()
    assert guard.finish(0)["clipped_steps"] == 1
    assert guard.finish(1) == {"clipped_steps": 0}
    beyond = guard.filter(np.array([[np.nan, 0], [0.2, -0.2]]), features, np.array([True, True]))
    assert np.isfinite(beyond).all()
    assert "not finite" in str(guard.finish(0)["fault"])
    assert "fault" not in guard.finish(1)


def test_ros_robots_know_where_their_places_are_in_the_features() -> None:
    where = measured_features(load_robot("ros2_control_arm"))
    assert where[0] == (STATE, 0)
    assert where[6] == (STATE, 6)


def test_nothing_is_left_of_a_run_that_was_refused(policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["deploy", str(policy), "--robot", "lift_fake", "--out", str(out)]) == 2
    assert not out.exists()


@pytest.mark.parametrize(
    ("robot", "episodes", "says"),
    [
        ("push_t_fake", 1, "wants its dead-man switch held; say by what with --operator"),
        ("ros2_control_arm", 2, "sets the scene"),
    ],
)
def test_what_wants_a_person_is_refused_where_none_is_named(
    robot: str, episodes: int, says: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / f"{robot}.yaml").read_text())
    raw["safety"]["dead_man"] = robot == "push_t_fake"
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert main(["deploy", str(policy), "--robot", str(path), "--episodes", str(episodes)]) == 2
    assert says in one_line(capsys)


def test_an_operator_that_is_not_there_is_one_line(
    policy: Path, robot_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main(f"deploy {policy} --robot {robot_file} --operator gamepad".split()) == 2
    assert "no gamepad: none is connected" in one_line(capsys)


def test_a_key_pressed_before_the_first_step_stops_the_run(
    policy: Path, robot_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame.display.init()
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_ESCAPE))
    numbers = tmp_path / "run.json"
    words = f"deploy {policy} --robot {robot_file} --operator keyboard --episodes 3 --json {numbers} --out {tmp_path}"
    assert main(words.split()) == 0
    found = json.loads(numbers.read_text())
    assert [(s["ended_by"], s["length"]) for s in found["scenes"]] == [("operator", 1)]
    assert found["stopped"]
    assert not pygame.display.get_init(), "its window is left open"


class Hand:
    """A person who says by step of which try what they do, and moves the pusher to one side."""

    def __init__(self, tries: list[dict[str, range]]) -> None:
        self.tries, self.at, self.elapsed_s, self.step = tries, 0, 0.0, -1
        self.led: list[np.ndarray] = []

    def poll(self, situation: Situation) -> Input:
        if situation.elapsed_s < self.elapsed_s:
            self.at, self.step = self.at + 1, -1
        self.elapsed_s, self.step = situation.elapsed_s, self.step + 1
        said = {name: self.step in steps for name, steps in self.tries[self.at].items()}
        if not said.pop("takes_over", False):
            return Input(**said)
        self.led.append(np.clip(situation.state.command_A + np.array([0.004, -0.004]), -0.34, 0.34))
        return Input(takeover_A=self.led[-1], **said)


def test_take_overs_become_data_of_the_residual_stage(
    policy: Path, robot_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was executed is what is learnt from, the base's action is its own on what was seen, and failures earn nothing."""
    hand = Hand(
        [
            {"takes_over": range(3), "rerecord": range(5, 6)},
            {"takes_over": range(10, 20), "success": range(30, 31)},
            {"takes_over": range(4, 8), "failure": range(12, 13)},
            {"stop": range(3, 4)},
        ]
    )
    monkeypatch.setattr(deploy, "open_person", lambda *_: nullcontext(hand))
    out, numbers = tmp_path / "run", tmp_path / "run.json"
    words = f"deploy {policy} --robot {robot_file} --operator keyboard --episodes 9 --out {out} --json {numbers}"
    assert main(words.split()) == 0
    found = json.loads(numbers.read_text())
    assert [(s["scene_seed"] - TEST_SCENES, s["ended_by"], s["taken_over"]) for s in found["scenes"]] == [
        (0, "success", 10),
        (1, "failure", 4),
        (2, "operator", 0),
    ], "the same scene again, and nothing of the first try"
    assert found["recorded_again"] == 1
    data, base = load_dataset(out / "episodes"), own_base(policy)
    require_demonstrations(data, base)
    echo = replace(base, open=lambda num_envs, seed: Echo(base.spec))
    replay = Replay.open(None, data.observation_spec, 2, 200)
    labelled = label_demonstrations(data, echo, 1, 0)
    for steps in labelled:
        replay.add(steps, "demonstration")
    assert replay.interventions().tolist() == [*range(10, 20), *range(34, 38)]
    batch = replay.gather(torch.arange(30 + 12 + 3), 1, 1.0)
    sent = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    begun = [i for i, line in enumerate(sent) if line.get("event", "").startswith("reset")]
    logged = [sent[begun[k] + 1 + step]["sent"] for k, length in ((1, 30), (2, 12), (3, 3)) for step in range(length)]
    np.testing.assert_allclose(batch.action_BA.numpy(), logged, atol=1e-6, err_msg="not what was executed")
    np.testing.assert_allclose(batch.action_BA[10:20].numpy(), hand.led[3:13], atol=1e-6, err_msg="not the person's")
    np.testing.assert_array_equal(batch.now.base_BA.numpy(), batch.now.features[STATE].numpy() / 2)
    assert batch.reward_B.nonzero().flatten().tolist() == [29]
    assert (batch.discount_B == 0).nonzero().flatten().tolist() == [29, 41], "what a person stopped goes on"
    assert batch.shown_B.tolist() == [True] * 30 + [False] * 15
    replay.draw_only(shown_steps(labelled))
    assert set(replay.draw(500, torch.Generator()).tolist()) == set(replay.interventions().tolist())
    expert = [replace(s, episode=replace(s.episode, provenance={"source": "expert"})) for s in labelled]
    assert shown_steps(expert).tolist() == list(range(45)), "a demonstration is all an expert's"
    with pytest.raises(UserError, match="no step is left to be drawn of 45"):
        replay.draw_only(shown_steps([replace(s, episode=replace(s.episode, intervened_T=None)) for s in labelled]))


class Echo:
    """A base that wants to be half way to the middle, seen from where it is."""

    def __init__(self, spec: BaseSpec) -> None:
        self.spec = replace(spec, execute_steps=1)

    def reset(self, env_ids: Sequence[int], scene_seeds: Sequence[int]) -> None:
        pass

    def chunk(self, observation: Observation, env_ids: Sequence[int], leftovers: None = None) -> np.ndarray:
        return observation.features()[STATE][list(env_ids), -1:].numpy() / 2
