"""Pictures, clouds and depth in data sets: bit for bit, for us and for LeRobot, and whole after a kill."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import dataset_to_policy_features
from toys import TOY_ACTION, TOY_OBSERVATION, toy_episode

from vla_rl.data import schema
from vla_rl.data.decisions import Decisions
from vla_rl.data.episode import Episode
from vla_rl.data.info import describe
from vla_rl.data.reader import load_dataset, load_datasets
from vla_rl.data.replay import Replay
from vla_rl.data.steps import StepEpisode
from vla_rl.data.videos import Codec, write_video
from vla_rl.data.windows import Windows
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime import files
from vla_rl.runtime.errors import UserError
from vla_rl.types import ACTION, POINTS, STATE, ActionSpec, FeatureSpec, ObservationSpec

FRONT, WRIST, DEPTH, COLOURED, MASK = (
    "observation.images.front",
    "observation.images.wrist",
    "observation.images.depth",  # as maps of robots call it, though it is no picture
    "observation.coloured_points",
    "observation.mask",
)
SEEN: ObservationSpec = {
    **TOY_OBSERVATION,
    FRONT: FeatureSpec((3, 12, 16)),
    WRIST: FeatureSpec((10, 8, 3)),
    DEPTH: FeatureSpec((1, 5, 6)),
    POINTS: FeatureSpec((7, 3)),
    COLOURED: FeatureSpec((4, 6)),
    MASK: FeatureSpec((5, 6)),
}
BYTES = (FRONT, WRIST, MASK)


def seeing_episode(rng: np.random.Generator, length: int) -> Episode:
    plain = toy_episode(rng, length)
    made = {}
    for key, spec in SEEN.items():
        shape = (length + 1, *spec.shape)
        made[key] = rng.integers(0, 256, shape, np.uint8) if key in BYTES else rng.normal(size=shape).astype(np.float32)
    return replace(plain, observations={**made, **plain.observations})


def seeing_set(
    root: Path, lengths: list[int], seen: ObservationSpec = SEEN, seed: int = 0
) -> tuple[Path, list[Episode]]:
    rng = np.random.default_rng(seed)
    writer, episodes = writer_for(root, seen), []
    for length in lengths:
        whole = seeing_episode(rng, length)
        episodes.append(replace(whole, observations={k: whole.observations[k] for k in seen}))
        writer.add(episodes[-1])
    return root, episodes


def writer_for(root: Path, seen: ObservationSpec = SEEN) -> EpisodeWriter:
    return EpisodeWriter.open_or_create(root, action_spec=TOY_ACTION, observation_spec=seen, task="toy", recipe={})


def test_every_array_comes_back_to_the_bit(tmp_path: Path) -> None:
    root, episodes = seeing_set(tmp_path / "set", [6, 1, 4])
    data = load_dataset(root)
    for number, episode in enumerate(episodes):
        back = data.episode(number)
        for key, value in episode.observations.items():
            assert back.observations[key].dtype == value.dtype
            np.testing.assert_array_equal(back.observations[key], value, err_msg=key)
    anywhere = torch.tensor([[9, 0], [6, 7]])
    together = np.concatenate([e.observations[FRONT][:-1] for e in episodes])
    np.testing.assert_array_equal(data.rows(FRONT, anywhere).numpy(), together[anywhere])
    twice = load_datasets([root, seeing_set(tmp_path / "other", [3], seed=1)[0]])
    np.testing.assert_array_equal(twice.episode(2).observations[WRIST], episodes[2].observations[WRIST])
    assert twice.episode(3).observations[WRIST].shape == (4, 10, 8, 3)
    assert describe(root)["pictures"] == {FRONT: [3, 12, 16], WRIST: [10, 8, 3]}


def test_lerobot_gives_the_same_pixels_and_numbers(tmp_path: Path) -> None:
    root, episodes = seeing_set(tmp_path / "set", [5, 3])
    dataset = LeRobotDataset("local/seen", root=root, delta_timestamps={ACTION: [0.0, 0.05]})
    rows = {k: np.concatenate([e.observations[k][:-1] for e in episodes]) for k in SEEN}
    for frame in (0, 4, 7):
        item = dataset[frame]
        for key, shape in ((FRONT, (3, 12, 16)), (WRIST, (3, 10, 8))):
            pixels = rows[key][frame] if key == FRONT else np.moveaxis(rows[key][frame], 2, 0)
            assert item[key].shape == shape
            np.testing.assert_array_equal((item[key] * 255).round().numpy().astype(np.uint8), pixels)
        for key in (DEPTH, POINTS, COLOURED, MASK):
            np.testing.assert_array_equal(item[key].numpy(), rows[key][frame], err_msg=key)
    features = dataset_to_policy_features(dataset.meta.features)
    assert features[FRONT].shape == (3, 12, 16)
    assert features[WRIST].shape == (3, 10, 8)
    assert features[FRONT].type.name == "VISUAL"


def test_statistics_of_pictures_are_those_of_the_pixels(tmp_path: Path) -> None:
    """LeRobot 0.4.4 squares bytes, and would say a deviation near zero."""
    root, episodes = seeing_set(tmp_path / "set", [6, 1, 4])
    stats = json.loads((root / schema.STATS_PATH).read_text())
    pixels = np.concatenate([e.observations[FRONT][:-1] for e in episodes]) / 255.0
    for name, value in (("mean", pixels.mean((0, 2, 3))), ("std", pixels.std((0, 2, 3)))):
        assert np.shape(stats[FRONT][name]) == (3, 1, 1)
        np.testing.assert_allclose(np.ravel(stats[FRONT][name]), value, atol=1e-4)
    assert stats[FRONT]["count"] == [11]
    points = np.concatenate([e.observations[POINTS][:-1] for e in episodes]).reshape(-1, 3)
    np.testing.assert_allclose(stats[POINTS]["std"], points.std(0), atol=1e-4)
    depth = np.concatenate([e.observations[DEPTH][:-1] for e in episodes])
    np.testing.assert_allclose(np.ravel(stats[DEPTH]["mean"]), depth.mean(), atol=1e-4)
    loaded = LeRobotDataset("local/seen", root=root).meta.stats
    assert loaded is not None
    assert loaded[WRIST]["q50"].shape == (3, 1, 1)


@pytest.mark.parametrize("after", ["data", "rows", "stats"])
def test_a_kill_between_the_files_loses_only_that_episode(tmp_path: Path, after: str) -> None:
    whole, episodes = seeing_set(tmp_path / "whole", [3, 2, 4])
    cut, _ = seeing_set(tmp_path / "cut", [3, 2])
    left = [schema.file_path("data", 2), schema.file_path("meta/episodes", 2), schema.STATS_PATH]
    for name in left[: 1 + ["data", "rows", "stats"].index(after)]:
        shutil.copy(whole / name, cut / name)
    data = load_dataset(cut)
    assert data.num_episodes == 2
    assert len(data.pictures[FRONT]) == 5, "what a kill left is not counted"
    assert len(LeRobotDataset("local/cut", root=cut)) == 5
    writer = writer_for(cut)
    writer.add(episodes[2])
    assert files.sha256_tree(cut) == files.sha256_tree(whole)
    assert load_dataset(cut).digest == load_dataset(whole).digest


def test_other_pictures_are_another_set(tmp_path: Path) -> None:
    root, (episode,) = seeing_set(tmp_path / "set", [3])
    other = dict(episode.observations) | {FRONT: episode.observations[FRONT].copy()}
    other[FRONT][0, 0, 0, 0] ^= 1
    writer_for(tmp_path / "other").add(replace(episode, observations=other))
    assert load_dataset(root).digest != load_dataset(tmp_path / "other").digest


def test_what_does_not_fit_is_refused_and_the_set_is_as_before(tmp_path: Path) -> None:
    root, (episode,) = seeing_set(tmp_path / "set", [3])
    before = files.sha256_tree(root)
    for key, value, says in [
        (FRONT, episode.observations[FRONT].astype(np.float32), "as image, got float32"),
        (FRONT, episode.observations[FRONT][..., :-1], r"shape \(3, 12, 16\), got \(3, 12, 15\)"),
        (POINTS, np.full((4, 7, 3), np.nan, np.float32), "'observation.points' is not finite"),
    ]:
        with pytest.raises(UserError, match=says):
            writer_for(root).add(replace(episode, observations={**episode.observations, key: value}))
    assert files.sha256_tree(root) == before
    path = root / schema.file_path("data", 0)
    table = pq.read_table(path)
    rows = table.column(FRONT).to_pylist()
    rows[1]["bytes"] = rows[1]["bytes"][:20]
    broken = table.set_column(table.column_names.index(FRONT), table.schema.field(FRONT), [rows])
    pq.write_table(broken, path)
    with pytest.raises(UserError, match=r"'observation.images.front' in row 1 of .*file-000.parquet is no picture"):
        load_dataset(root).episode(0)


@pytest.mark.parametrize("share", [0.4, 0.0])
def test_pictures_are_decoded_once_in_memory_or_in_a_file(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_rl.data.pictures.IN_MEMORY", share)
    data = load_dataset(seeing_set(tmp_path / "set", [3, 5])[0])
    seen = data.seen([STATE, FRONT, WRIST])
    assert set(seen.observation_spec) == {STATE, FRONT, WRIST}
    assert not seen.pictures
    everything = torch.arange(data.num_frames)
    for key in (FRONT, WRIST):
        assert torch.equal(seen.columns[key], data.rows(key, everything))
    assert np.array_equal(seen.final(FRONT), data.final(FRONT))
    batch = Windows(seen, 2, 3).batch(torch.tensor([0, 4]))
    assert all(batch.observation.features()[k].dtype == torch.uint8 for k in (FRONT, WRIST))
    assert FRONT not in data.seen([STATE]).columns, "what is not read is not decoded"


def test_clouds_go_through_windows_and_decisions(tmp_path: Path) -> None:
    seen = {k: SEEN[k] for k in (*TOY_OBSERVATION, POINTS)}
    root, episodes = seeing_set(tmp_path / "set", [5, 4], seen)
    data = load_dataset(root)
    windows = Windows(data, 2, 3).batch(torch.tensor([0, 6]))
    assert windows.observation.points_BOP3 is not None
    np.testing.assert_array_equal(windows.observation.points_BOP3[1].numpy(), episodes[1].observations[POINTS][:2])
    decisions = Decisions(data, 2, 3, 0.99)
    after = decisions.batch(torch.tensor([3, 8])).next_observation
    assert after.points_BOP3 is not None
    np.testing.assert_array_equal(after.points_BOP3[0].numpy(), episodes[0].observations[POINTS][4:6])
    np.testing.assert_array_equal(after.points_BOP3[1, -1].numpy(), episodes[1].observations[POINTS][-1])
    np.testing.assert_array_equal(after.state_BOS[1, -1].numpy(), episodes[1].observations[STATE][-1])


def test_a_replay_keeps_pictures_and_refuses_depth_among_them(tmp_path: Path) -> None:
    episode = seeing_episode(np.random.default_rng(0), 4)
    steps = StepEpisode(episode, np.zeros((5, 2), np.float32), np.zeros(5, np.int64))
    seen = {k: SEEN[k] for k in (STATE, FRONT, POINTS)}
    replay = Replay.open(tmp_path / "replay", seen, 2, 20)
    replay.add(steps, "policy")
    batch = replay.gather(torch.tensor([1, 3]), 2, 0.9)
    np.testing.assert_array_equal(batch.now.features[FRONT].numpy(), episode.observations[FRONT][[1, 3]])
    np.testing.assert_array_equal(batch.following.features[POINTS].numpy(), episode.observations[POINTS][[3, 4]])
    with pytest.raises(UserError, match=r"keeps 'observation.images.depth' as uint8, got float32"):
        Replay.open(None, {DEPTH: SEEN[DEPTH]}, 2, 20).add(steps, "policy")


def test_one_axis_stays_an_axis(tmp_path: Path) -> None:
    spec = ActionSpec(("x",), ("m",), (-2.0,), (2.0,), "absolute", 20.0)
    whole = toy_episode(np.random.default_rng(0), 4)
    action_TA = whole.action_TA[:, :1]
    one = replace(
        whole, observations={STATE: whole.observations[STATE][:, :1]}, action_TA=action_TA, intended_TA=action_TA
    )
    writer = EpisodeWriter.open_or_create(
        tmp_path / "set", action_spec=spec, observation_spec={STATE: FeatureSpec((1,))}, task="toy", recipe={}
    )
    writer.add(one)
    data = load_dataset(tmp_path / "set")
    np.testing.assert_array_equal(data.episode(0).observations[STATE], one.observations[STATE])
    assert Windows(data, 2, 3).batch(torch.tensor([0])).action_BHA.shape == (1, 3, 1)


@pytest.mark.parametrize("videos", [False, True])
def test_pictures_that_lerobot_wrote_are_seen_channels_first(tmp_path: Path, videos: bool) -> None:
    kind = "video" if videos else "image"
    features = {
        STATE: {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        FRONT: {"dtype": kind, "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
        ACTION: {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    theirs = LeRobotDataset.create("local/theirs", fps=10, features=features, root=tmp_path / "set", use_videos=videos)
    rng, shown = np.random.default_rng(0), []
    for length in (3, 5):
        for _ in range(length):
            numbers = {STATE: rng.normal(size=3).astype("f"), ACTION: rng.normal(size=2).astype("f")}
            shown.append(smooth(rng, 64, 96))
            theirs.add_frame({**numbers, FRONT: shown[-1], "task": "t"})
        theirs.save_episode()
    theirs.finalize()
    data = load_dataset(tmp_path / "set")
    assert data.observation_spec[FRONT].shape == (3, 64, 96)
    seen = data.seen([STATE, FRONT])
    found = seen.columns[FRONT].numpy().transpose(0, 2, 3, 1).astype(int)
    apart = np.abs(found - np.stack(shown)).mean()
    assert apart < 6 if videos else apart == 0
    assert torch.equal(data.rows(FRONT, torch.tensor([7, 0])), seen.columns[FRONT][[7, 0]])
    assert len(Windows(seen, 1, 1)) == 8


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture that a codec can keep: big spots of colour."""
    coarse = rng.integers(0, 256, (4, 6, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


VIDEO_SEEN: ObservationSpec = {
    STATE: TOY_OBSERVATION[STATE],
    FRONT: FeatureSpec((3, 64, 80)),
    WRIST: FeatureSpec((48, 64, 3)),
}


def filmed_set(root: Path, codec: Codec | None, lengths: list[int]) -> tuple[Path, list[Episode]]:
    rng, episodes = np.random.default_rng(3), []
    writer = EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=VIDEO_SEEN, task="toy", recipe={}, video=codec
    )
    for length in lengths:
        plain = toy_episode(rng, length)
        front = np.stack([smooth(rng, 64, 80).transpose(2, 0, 1) for _ in range(length + 1)])
        wrist = np.stack([smooth(rng, 48, 64) for _ in range(length + 1)])
        episodes.append(replace(plain, observations={STATE: plain.observations[STATE], FRONT: front, WRIST: wrist}))
        writer.add(episodes[-1])
    return root, episodes


@pytest.mark.parametrize(("codec", "largest"), [("lossless", 0.0), ("h264", 6.0), ("av1", 6.0)])
def test_video_comes_back_exactly_or_within_the_codecs_error(tmp_path: Path, codec: Codec, largest: float) -> None:
    root, episodes = filmed_set(tmp_path / "set", codec, [4, 7, 2])
    data = load_dataset(root)
    for number, episode in enumerate(episodes):
        found = data.episode(number)
        for key in (FRONT, WRIST):
            apart = np.abs(found.observations[key][:-1].astype(int) - episode.observations[key][:-1]).mean()
            assert apart <= largest
            assert np.array_equal(found.observations[key][-1], episode.observations[key][-1]), "the final one is a PNG"
    seen = data.seen([STATE, FRONT, WRIST])
    order = torch.tensor([[12, 0], [5, 5]])
    for key in (FRONT, WRIST):
        assert torch.equal(seen.columns[key][order], data.rows(key, order))
    both = load_datasets([root, filmed_set(tmp_path / "other", codec, [3])[0]])
    assert torch.equal(both.rows(FRONT, torch.tensor([2])), data.rows(FRONT, torch.tensor([2])))
    assert len(both.pictures[FRONT]) == 16
    with pytest.raises(UserError, match="as PNG and some as video"):
        load_datasets([root, filmed_set(tmp_path / "png", None, [3])[0]])


def test_lerobot_reads_the_videos(tmp_path: Path) -> None:
    root, episodes = filmed_set(tmp_path / "set", "h264", [4, 6])
    theirs = LeRobotDataset("local/toy", root=root, video_backend="pyav")
    assert theirs.meta.video_keys == [FRONT, WRIST]
    for row, (number, step) in enumerate([(0, 0), (0, 3), (1, 0), (1, 5)]):
        index = step if number == 0 else 4 + step
        shown = (theirs[index][FRONT].numpy() * 255).round()
        assert np.abs(shown - episodes[number].observations[FRONT][step]).mean() < 6, row


def test_a_video_that_is_cut_short_or_lost_is_named(tmp_path: Path) -> None:
    root, _ = filmed_set(tmp_path / "set", "h264", [4, 5])
    path = root / schema.video_path(FRONT, 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"file-001\.mp4 is no video, or is cut short"):
        load_dataset(root).seen([STATE, FRONT])
    path.unlink()
    with pytest.raises(UserError, match=r"file-001\.mp4.* cannot be read"):
        load_dataset(root)


def test_a_kill_leaves_no_video_of_an_episode_that_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, episodes = filmed_set(tmp_path / "set", "h264", [3])
    writer = EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=VIDEO_SEEN, task="toy", recipe={}, video="h264"
    )
    monkeypatch.setattr(writer, "_write_stats", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer.add(episodes[0])
    assert (root / schema.video_path(FRONT, 1)).exists()
    EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=VIDEO_SEEN, task="toy", recipe={}, video="h264"
    )
    assert not (root / schema.video_path(FRONT, 1)).exists()
    assert load_dataset(root).num_episodes == 1


def test_odd_sides_want_the_lossless_codec(tmp_path: Path) -> None:
    pictures = np.zeros((2, 3, 9, 12), np.uint8)
    write_video(tmp_path / "odd.mp4", pictures, "lossless", 10.0)
    with pytest.raises(UserError, match="codec h264 wants pictures with even sides, got 12 x 9"):
        write_video(tmp_path / "other.mp4", pictures, "h264", 10.0)
