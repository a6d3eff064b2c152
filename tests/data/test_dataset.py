"""Writer and reader: LeRobot opens what we write, nothing is lost, bad sets are refused with a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from toys import TOY_ACTION, TOY_OBSERVATION, toy_episode, write_toy_set

from vla_rl.data import schema
from vla_rl.data.info import describe
from vla_rl.data.reader import load_dataset, load_datasets
from vla_rl.data.writer import EpisodeWriter
from vla_rl.runtime import files
from vla_rl.runtime.errors import UserError
from vla_rl.types import ACTION, STATE, ActionSpec, SpecMismatchError


def writer_for(root: Path, seed: int = 0) -> EpisodeWriter:
    return EpisodeWriter.open_or_create(
        root, action_spec=TOY_ACTION, observation_spec=TOY_OBSERVATION, task="toy", recipe={"seed": seed}
    )


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    episodes = [toy_episode(rng, n, success=n != 4, scene=n) for n in (6, 4)]
    writer = writer_for(tmp_path / "set")
    for episode in episodes:
        writer.add(episode)
    data = load_dataset(tmp_path / "set")
    for number, episode in enumerate(episodes):
        rows = slice(int(data.episode_from_E[number]), int(data.episode_to_E[number]))
        assert np.array_equal(data.columns[ACTION][rows].numpy(), episode.action_TA)
        assert np.array_equal(data.columns[STATE][rows].numpy(), episode.observations[STATE][:-1])
        assert data.columns[schema.TERMINATED][rows].tolist() == [False] * (episode.length - 1) + [episode.terminated]
        assert data.columns[schema.TRUNCATED][rows].tolist() == [False] * (episode.length - 1) + [episode.truncated]
        final = np.asarray(data.episodes[schema.FINAL_PREFIX + STATE][number], np.float32)
        assert np.array_equal(final, episode.observations[STATE][-1])
    assert data.episodes["success"].tolist() == [True, False]
    assert data.episodes["provenance/scene_seed"].tolist() == [6, 4]
    assert data.action_spec == TOY_ACTION


def test_lerobot_opens_it_and_a_policy_of_lerobot_trains_on_it(toy_set: Path) -> None:
    from lerobot.configs.types import FeatureType
    from lerobot.datasets.utils import dataset_to_policy_features
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    chunk = 4
    dataset = LeRobotDataset("local/toy", root=toy_set, delta_timestamps={ACTION: [i / 20 for i in range(chunk)]})
    assert dataset.meta.total_episodes == 5
    features = dataset_to_policy_features(dataset.meta.features)
    outputs = {k: v for k, v in features.items() if v.type is FeatureType.ACTION}
    assert list(outputs) == [ACTION]
    config = ACTConfig(
        input_features={k: v for k, v in features.items() if k not in outputs}, output_features=outputs, chunk_size=chunk,
        n_action_steps=chunk, dim_model=32, n_heads=2, dim_feedforward=32, n_encoder_layers=1, use_vae=False, device="cpu",
    )  # fmt: skip
    policy = ACTPolicy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    torch.manual_seed(0)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=16)))
    losses = []
    for _ in range(80):
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_statistics_are_those_of_the_whole_set(toy_set: Path) -> None:
    stats = json.loads((toy_set / schema.STATS_PATH).read_text())
    action = load_dataset(toy_set).columns[ACTION].double()
    assert np.allclose(stats[ACTION]["mean"], action.mean(0), atol=1e-6)
    assert np.allclose(stats[ACTION]["std"], action.std(0, correction=0), atol=1e-5)
    assert np.allclose(stats[ACTION]["min"], action.amin(0))


def fingerprint(root: Path) -> str:
    return files.sha256_tree(root)


@pytest.mark.parametrize("after", ["data", "rows", "stats"])
def test_a_kill_between_the_files_of_an_episode_loses_only_that_episode(tmp_path: Path, after: str) -> None:
    whole = write_toy_set(tmp_path / "whole", [5, 8, 6])
    cut = write_toy_set(tmp_path / "cut", [5, 8])
    rows, stats = schema.file_path("meta/episodes", 2), schema.STATS_PATH
    shutil.copy(whole / schema.file_path("data", 2), cut / schema.file_path("data", 2))
    if after in ("rows", "stats"):
        shutil.copy(whole / rows, cut / rows)
    if after == "stats":
        shutil.copy(whole / stats, cut / stats)
    assert load_dataset(cut).num_episodes == 2  # it opens as it is
    assert len(LeRobotDataset("local/cut", root=cut)) == 13
    rng = np.random.default_rng(0)
    episodes = [toy_episode(rng, n, scene=i) for i, n in enumerate([5, 8, 6])]
    writer = writer_for(cut)
    assert writer.total_episodes == 2
    writer.add(episodes[2])
    assert fingerprint(cut) == fingerprint(whole)


def test_no_space_left_leaves_the_set_as_it_was(toy_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(toy_set)
    writer = writer_for(toy_set)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="no space left"):
        writer.add(toy_episode(np.random.default_rng(1), 4))
    assert fingerprint(toy_set) == before
    assert not list(toy_set.rglob("*.tmp"))
    monkeypatch.undo()
    writer.add(toy_episode(np.random.default_rng(1), 4))
    assert load_dataset(toy_set).num_episodes == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting wants root")
def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no permission to mount here")
    try:
        writer = writer_for(mount / "set")
        rng = np.random.default_rng(0)
        episodes = (toy_episode(rng, 40, scene=scene) for scene in range(100))
        with pytest.raises(UserError, match="no space left"):
            list(map(writer.add, episodes))
        assert not list(mount.rglob("*.tmp"))
        data = load_dataset(mount / "set")
        assert data.num_episodes >= 1
        assert len(LeRobotDataset("local/full", root=mount / "set")) == data.num_frames
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def rewrite(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = root / schema.file_path("data", 1)
    pq.write_table(change(pq.read_table(path)), path)


def with_nan(table: pa.Table) -> pa.Table:
    rows = table.column(STATE).to_pylist()
    rows[1] = [float("nan")] * 3
    return table.set_column(table.column_names.index(STATE), STATE, pa.array(rows, type=table.schema.field(STATE).type))


def make_ragged(table: pa.Table) -> pa.Table:
    rows = table.column(STATE).to_pylist()
    rows[1] = rows[1] + [0.0]
    return table.set_column(table.column_names.index(STATE), STATE, pa.array(rows, type=pa.list_(pa.float32())))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_nan, ["observation.state", "not finite", "episode 1"]),
        (lambda t: t.slice(0, t.num_rows - 1), ["frames", "info.json says"]),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), ["ragged episode 1"]),
        (lambda t: t.drop_columns([ACTION]), [ACTION]),
        (make_ragged, ["observation.state", "ragged"]),
    ],
)
def test_a_damaged_set_is_refused_with_a_sentence(toy_set: Path, change: Callable, words: list[str]) -> None:
    rewrite(toy_set, change)
    with pytest.raises(UserError) as caught:
        load_dataset(toy_set)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_column_everywhere_is_named(toy_set: Path) -> None:
    for path in (toy_set / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns([ACTION]), path)
    with pytest.raises(UserError, match="lacks the column 'action'"):
        load_dataset(toy_set)


def test_another_version_is_refused_and_the_cure_named(toy_set: Path) -> None:
    info = json.loads((toy_set / schema.INFO_PATH).read_text())
    (toy_set / schema.INFO_PATH).write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(UserError, match=r"v2\.1.*convert_dataset_v21_to_v30"):
        load_dataset(toy_set)


def test_a_cut_file_is_refused(toy_set: Path) -> None:
    path = toy_set / schema.file_path("data", 0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cut short"):
        load_dataset(toy_set)


def test_bad_episodes_are_refused_before_anything_is_written(toy_set: Path) -> None:
    writer, rng = writer_for(toy_set), np.random.default_rng(0)
    before = fingerprint(toy_set)
    good = toy_episode(rng, 5)
    nan = good.action_TA.copy()
    nan[2] = np.nan
    import dataclasses

    for bad in (
        dataclasses.replace(good, action_TA=nan),
        dataclasses.replace(good, reward_T=good.reward_T[:-1]),
        dataclasses.replace(good, truncated=True),
        dataclasses.replace(good, observations={STATE: good.observations[STATE]}),
    ):
        with pytest.raises(UserError):
            writer.add(bad)
    assert fingerprint(toy_set) == before


def test_several_sets_load_as_one_and_other_specs_are_refused(tmp_path: Path) -> None:
    a = write_toy_set(tmp_path / "a", [4, 6], seed=1)
    b = write_toy_set(tmp_path / "b", [5], seed=2)
    both = load_datasets([a, b])
    assert both.num_episodes == 3
    assert both.episode_from_E.tolist() == [0, 4, 10]
    assert both.columns["index"].tolist() == list(range(15))
    assert torch.equal(both.columns[ACTION][10:], load_dataset(b).columns[ACTION])
    extra = json.loads((b / schema.EXTRA_PATH).read_text())
    extra["action_spec"]["control_hz"] = 10.0
    (b / schema.EXTRA_PATH).write_text(json.dumps(extra))
    with pytest.raises(SpecMismatchError, match=r"control_hz: 20.0 and 10.0"):
        load_datasets([a, b])


def test_another_recipe_is_refused(toy_set: Path) -> None:
    with pytest.raises(UserError, match="seed = 0, not 5"):
        writer_for(toy_set, seed=5)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt"):
        writer_for(tmp_path)


def test_a_set_that_lerobot_wrote_loads(tmp_path: Path) -> None:
    features = {
        STATE: {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        ACTION: {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    dataset = LeRobotDataset.create(
        "local/theirs", fps=10, features=features, root=tmp_path / "theirs", use_videos=False
    )
    rng = np.random.default_rng(0)
    for length in (4, 6):
        for _ in range(length):
            dataset.add_frame(
                {STATE: rng.normal(size=3).astype("f"), ACTION: rng.normal(size=2).astype("f"), "task": "their task"}
            )
        dataset.save_episode()
    dataset.finalize()
    data = load_dataset(tmp_path / "theirs")
    assert data.num_episodes == 2
    assert data.tasks == ("their task",)
    assert data.action_spec.names == ("x", "y")
    assert data.action_spec.control_hz == 10
    assert describe(tmp_path / "theirs")["success"] is None


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "mine" / "data" / "2024-001" / "scan001.csv"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        writer_for(tmp_path / "mine")
    inside = write_toy_set(tmp_path / "set", [4]) / "data" / "chunk-000" / "notes.txt"
    inside.write_text("mine")
    writer_for(tmp_path / "set")
    assert inside.exists()
    assert foreign.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "text"),
    [(schema.EXTRA_PATH, '{"a": 1}'), (schema.EXTRA_PATH, "[]"), (schema.INFO_PATH, "[]"), (schema.INFO_PATH, "{")],
)
def test_garbage_in_the_meta_files_is_named(toy_set: Path, name: Path, text: str) -> None:
    (toy_set / name).write_text(text)
    with pytest.raises(UserError, match=name.name.split(".")[0]):
        load_dataset(toy_set)


def test_missing_tables_are_named(toy_set: Path) -> None:
    (toy_set / schema.TASKS_PATH).unlink()
    with pytest.raises(UserError, match=r"tasks.parquet"):
        load_dataset(toy_set)
    for path in (toy_set / "meta/episodes").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["dataset_from_index"]), path)
    with pytest.raises(UserError, match="dataset_from_index"):
        load_dataset(toy_set)


def test_describe_counts(make_set: Callable[..., Path]) -> None:
    summary = describe(make_set("mixed", [3, 9, 5], successes=[True, False, True]))
    assert summary["episodes"] == 3
    assert summary["success"]["successes"] == 2
    assert summary["lengths"] == {"min": 3.0, "median": 5.0, "max": 9.0}
    assert summary["provenance"]["source"] == {"expert": 3}


def test_action_spec_round_trip_and_limits() -> None:
    assert ActionSpec.from_dict(json.loads(json.dumps(TOY_ACTION.to_dict()))) == TOY_ACTION
    with pytest.raises(ValueError, match="low < high"):
        ActionSpec(("x",), ("m",), (1.0,), (1.0,), "delta", 20.0)
