"""A learned judge of success: right on episodes that it has not seen, and where it does not fit, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from robot_toys import toy_robot
from toys import write_reaching_set

from vla_rl.algos.success import SuccessConfig, fit_success, labelled
from vla_rl.cli.main import main
from vla_rl.data.reader import load_dataset
from vla_rl.inference.success import load_judge
from vla_rl.runtime.errors import UserError
from vla_rl.types import STATE, FeatureSpec

NEAR_M = 0.15  # of the reaching world


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reaching_set(tmp_path_factory.mktemp("reach") / "set", 160, gains=(0.3, 0.6))


@pytest.fixture(scope="module")
def judge(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judge") / "judge"
    assert main(["robot", "judge", "--data", str(data), "--out", str(out), "--steps", "1500"]) == 0
    return out


def seen(place: np.ndarray) -> dict[str, np.ndarray]:
    return {STATE: place.astype(np.float32)}


def test_an_observation_is_a_success_where_its_step_was(data: Path) -> None:
    rows_ND, done_N, episode_N = labelled(load_dataset(data), (STATE,))
    near_N = torch.linalg.norm(rows_ND, dim=1) < NEAR_M
    first_N = torch.cat([torch.tensor([True]), episode_N[1:] != episode_N[:-1]])
    assert (done_N == (near_N & ~first_N)).all(), "the world says who is near, but for where an episode begins"
    assert len(done_N) == load_dataset(data).num_frames + 160


def test_it_knows_success_where_it_was_not_shown(judge: Path) -> None:
    rng = np.random.default_rng(1)
    right = []
    for _ in range(300):
        place = rng.uniform(-1, 1, 2)
        distance = float(np.linalg.norm(place))
        if abs(distance - NEAR_M) < 0.05:
            continue  # too near to the line
        judged = load_judge(judge, {STATE: FeatureSpec((2,))}, "toy")
        said = [judged(seen(place)) for _ in range(2)]
        assert said[0] == (0.0, False), "one observation may be noise"
        right.append(said[1][1] == (distance < NEAR_M))
    assert np.mean(right) > 0.97
    judged = load_judge(judge, {STATE: FeatureSpec((2,))}, "toy")
    found = [judged(seen(np.zeros(2)))[1], judged(seen(np.ones(2)))[1], judged(seen(np.zeros(2)))[1]]
    assert found == [False, False, False], "not twice in a row"


def test_the_same_seed_gives_the_same_classifier(data: Path) -> None:
    config = SuccessConfig(steps=50)
    found = [fit_success(load_dataset(data), (STATE,), config)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    other = fit_success(load_dataset(data), (STATE,), replace(config, seed=1))[0].state_dict()
    assert not torch.equal(found[0]["net.0.weight"], other["net.0.weight"])


def test_what_cannot_be_learned_from_or_does_not_fit_is_refused(
    data: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["robot", "judge", "--out", str(tmp_path / "out"), "--data"]
    assert main([*words, str(data), "--features", "observation.nothing"]) == 2
    assert "no feature 'observation.nothing'; there are observation.state" in capsys.readouterr().err
    failures = write_reaching_set(tmp_path / "failures", 20, gains=(-0.3, -0.2))
    assert main([*words, str(failures)]) == 2
    assert "hold no success" in capsys.readouterr().err
    assert main(["robot", "judge", "--data", str(data), "--out", str(judge)]) == 2
    assert "exists" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    robot, _ = toy_robot()
    robot.stop()
    with pytest.raises(UserError, match=r"looks at 'observation.state' of shape \(2,\), robot 'toy' has \(4,\)"):
        load_judge(judge, robot.observation_spec, "toy")
