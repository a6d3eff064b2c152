"""Windows against LeRobot's own class, element by element."""

from __future__ import annotations

from pathlib import Path

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from vla_rl.data.reader import load_dataset
from vla_rl.data.windows import Windows
from vla_rl.types import ACTION, ENVIRONMENT_STATE, STATE

HZ = 20.0


def test_same_samples_as_lerobot(toy_set: Path) -> None:
    offsets = {STATE: [-2, -1, 0], ENVIRONMENT_STATE: [-1, 0], ACTION: list(range(-1, 6)), "next.reward": [0, 1, 2]}
    theirs = LeRobotDataset(
        "local/toy", root=toy_set, delta_timestamps={k: [i / HZ for i in v] for k, v in offsets.items()}
    )
    data = load_dataset(toy_set)
    windows = Windows(data, 3, 6)
    assert len(theirs) == len(windows) == data.num_frames == 36
    for index in range(len(theirs)):
        sample = theirs[index]
        for key, deltas in offsets.items():
            values, is_pad = windows.gather(key, torch.tensor([index]), torch.tensor(deltas))
            assert torch.equal(values[0].reshape(len(deltas), -1), sample[key].reshape(len(deltas), -1)), (index, key)
            assert torch.equal(is_pad[0], sample[f"{key}_is_pad"])


def test_batch_is_history_and_chunk(toy_set: Path) -> None:
    data = load_dataset(toy_set)
    windows = Windows(data, 2, 4)
    last = int(data.episode_to_E[0]) - 1
    batch = windows.batch(torch.tensor([0, last]))
    assert torch.equal(batch.observation.state_BOS[0, 0], batch.observation.state_BOS[0, 1])  # clamped at the start
    assert batch.is_pad_BH.tolist() == [[False] * 4, [False, True, True, True]]
    assert torch.equal(batch.action_BHA[1], data.columns[ACTION][last].expand(4, -1))
    assert torch.equal(windows.padding(torch.tensor([0, last])), batch.is_pad_BH)


def test_windows_of_chosen_episodes_stay_in_them(toy_set: Path) -> None:
    data = load_dataset(toy_set)
    windows = Windows(data, 1, 1, episodes=[1, 3])
    assert set(data.frame_episode()[windows.frames_W].tolist()) == {1, 3}
    assert len(windows) == 3 + 5
