"""The program as its user meets it: help, errors in one line with exit code 2, the same numbers for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
import zarr

from vla_rl.cli.main import command_names, main
from vla_rl.data.info import describe
from vla_rl.data.reader import load_dataset
from vla_rl.inference.controller import PolicyAgent
from vla_rl.policies.checkpoint import load_policy
from vla_rl.runtime.files import exclusive
from vla_rl.types import ACTION, ENVIRONMENT_STATE, STATE

TINY = (
    "--policy flow_mlp --policy.net.width 32 --policy.net.depth 1 --bc.batch-size 32 --bc.steps 20 --bc.warmup-steps 5"
)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demos") / "set"
    assert main(["collect", "--task", "push_t", "--episodes", "4", "--workers", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["pretrain", "--data", str(demos), "--out", str(out), *TINY.split()]) == 0
    return out


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("vla-rl:")]


@pytest.mark.parametrize("words", command_names())
def test_every_command_has_help_with_an_example(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vla-rl {words}")
    assert "example:\n  vla-rl " + words in text
    assert "--json" in text


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for words in command_names():
        assert words in text


def test_help_imports_no_command() -> None:
    """Which takes seconds."""
    program = "import sys; from vla_rl.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fly", ["'fly'", "collect"]),
        ("data burn", ["data info"]),
        ("collect --out x", ["--task is missing"]),
        ("collect --task lfit --out {tmp}/x", ["'lfit'", "push_t"]),
        ("collect --task push_t --out {tmp}/x --episodes 0", ["episodes", "0"]),
        ("collect --task push_t --out {tmp}/x --expert.failure-share 2", ["failure_share", "2"]),
        ("collect --task push_t --out {tmp}/x --nonsense 1", ["nonsense"]),
        ("collect push_t --out {tmp}/x", ["unexpected 'push_t'"]),
        ("collect --task push_t --out {tmp}/x --seed 100000", ["for tests"]),
        ("collect --task push_t --episodes 1 --out /proc/nothing/x", ["/proc/nothing"]),
        ("collect --task gym:HalfCheetah-v3 --out {tmp}/x", ["HalfCheetah-v3"]),
        ("pretrain --data {demos} --out {tmp}/x --validation-share 0.99", ["validation_share", "none of the"]),
        ("pretrain --data {demos} --out {tmp}/x --validation-share 0 --patience 3", ["patience"]),
        ("data import {tmp}/file.hdf5 --out {tmp}/x --control-hz -5", ["no file"]),
        ("pretrain --data {tmp}/nothing --out {tmp}/x", ["no LeRobotDataset", "collect"]),
        ("pretrain --data {demos} --out {tmp}/x --policy.solver rk4", ["policy.solver", "rk4", "euler"]),
        ("pretrain --data {demos} --out {tmp}/x --bc.steps many", ["bc.steps", "many"]),
        ("eval {tmp}/nothing", ["no checkpoint"]),
        ("eval", ["POLICIES", "missing"]),
        ("eval {trained} --episodes 0", ["episodes"]),
        ("eval {trained} --task gym:Pendulum-v1", ["action spec", "names"]),
        ("eval {trained} {trained} {trained}", ["one policy", "3"]),
        ("run {tmp}/missing.yaml --out {tmp}/x", ["missing.yaml"]),
        ("report {tmp}", ["no run"]),
        ("data info {tmp}", ["no LeRobotDataset"]),
        ("data import {tmp}/file.xyz --out {tmp}/x", ["format"]),
        ("data import {tmp}/file.hdf5 --out {tmp}/x", ["no file"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, words: list[str], tmp_path: Path, demos: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments.format(tmp=tmp_path, demos=demos, trained=trained).split()) == 2
    said = lines(capsys)
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written is left


@pytest.mark.parametrize(
    ("words", "held"),
    [
        ("collect --task push_t --episodes 4 --out {held}", "set"),
        ("pretrain --data {demos} --out {held}", "run"),
        ("eval {trained} --episodes 2 --json {root}/a.json", "a.json.0.journal"),
        ("run demo --out {held}", "demo"),
    ],
)
def test_a_second_command_on_the_same_place_is_refused(
    words: str, held: str, demos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / held
    place.write_text("") if place.suffix else place.mkdir()
    with exclusive(place):
        assert main(words.format(held=place, demos=demos, trained=trained, root=tmp_path).split()) == 2
    assert f"another process is working on {place}" in lines(capsys)[0]


def evaluate(trained: Path, target: Path, *more: str) -> dict:
    assert main(["eval", str(trained), *more, "--episodes", "6", "--num-envs", "4", "--json", str(target)]) == 0
    return json.loads(target.read_text())


def test_the_same_seed_gives_the_same_numbers_but_for_times(trained: Path, tmp_path: Path) -> None:
    a, b = evaluate(trained, tmp_path / "a.json"), evaluate(trained, tmp_path / "b.json")
    assert a.pop("timing") != b.pop("timing")
    assert a == b
    assert a["episodes"] == 6
    assert [s["scene_seed"] for s in a["scenes"]] == list(range(100_000, 100_006))
    other = evaluate(trained, tmp_path / "c.json", "--policy-seed", "1")
    assert [s["max_coverage"] for s in other["scenes"]] != [s["max_coverage"] for s in a["scenes"]]
    assert not list(tmp_path.glob("*.journal"))


def test_two_policies_are_compared_on_the_same_scenes(
    trained: Path, demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, target = tmp_path / "other", tmp_path / "pair.json"
    assert main(["pretrain", "--data", str(demos), "--out", str(other), *TINY.split(), "--seed", "1"]) == 0
    alone = [evaluate(path, tmp_path / "alone.json", "--task", "push_t")["scenes"] for path in (trained, other)]
    assert alone[0] != alone[1]
    pair = evaluate(trained, target, str(other))
    assert [pair["a"]["scenes"], pair["b"]["scenes"]] == alone
    successes = [sum(scene["success"] for scene in scenes) for scenes in alone]
    assert pair["paired"]["difference"] == pytest.approx((successes[1] - successes[0]) / 6)
    assert "McNemar" in capsys.readouterr().out


def test_the_films_of_a_comparison_are_of_the_last_policy(
    trained: Path, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report shows them below it."""
    other = tmp_path / "other"
    assert main(["pretrain", "--data", str(demos), "--out", str(other), *TINY.split(), "--seed", "2"]) == 0
    filmed: list[tuple[str, list[dict]]] = []

    def kept(config: object, agent: PolicyAgent, arena: object, result: dict) -> None:
        digest = str(next(agent.policy.parameters()).sum().item())
        filmed.append((digest, result["scenes"]))

    monkeypatch.setattr("vla_rl.cli.eval._film", kept)
    pair = evaluate(trained, tmp_path / "pair.json", str(other), "--video", str(tmp_path / "films"))
    wanted = str(next(load_policy(other).parameters()).sum().item())
    assert filmed == [(wanted, pair["b"]["scenes"])]
    assert pair["a"]["scenes"] != pair["b"]["scenes"]


def test_films_are_mp4_files_of_the_scenes(trained: Path, tmp_path: Path) -> None:
    import av

    evaluate(
        trained,
        tmp_path / "a.json",
        "--video",
        str(tmp_path / "reel.mp4"),
        "--videos",
        "1",
        "--max-episode-steps",
        "30",
    )
    with av.open(str(tmp_path / "reel.mp4")) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert frames >= 30
    evaluate(
        trained, tmp_path / "b.json", "--video", str(tmp_path / "films"), "--videos", "2", "--max-episode-steps", "30"
    )
    films = list((tmp_path / "films").glob("*.mp4"))
    assert 1 <= len(films) <= 4


def test_data_info_prints_and_returns(demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(demos), "--json", str(tmp_path / "info.json")]) == 0
    text = capsys.readouterr().out
    assert "4 episodes" in text
    assert "strategy" in text
    assert json.loads((tmp_path / "info.json").read_text())["episodes"] == 4


def test_robomimic_import(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    written = {}
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        for i, length in enumerate((5, 11, 7)):
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["rewards"] = (np.arange(length) == length - 1).astype(float)
            demo["dones"] = demo["rewards"][:]
            for key, size in parts.items():
                demo[f"obs/{key}"] = rng.normal(size=(length, size))
                demo[f"next_obs/{key}"] = rng.normal(size=(length, size))
            written[i] = {
                "actions": demo["actions"][:],
                "state": np.concatenate([demo[f"obs/{k}"][:] for k in list(parts)[:3]], 1),
                "last": demo["next_obs/object"][-1],
            }
    assert (
        main(
            [
                "data",
                "import",
                str(tmp_path / "low_dim.hdf5"),
                "--out",
                str(tmp_path / "set"),
                "--instruction",
                "lift it",
            ]
        )
        == 0
    )
    data = load_dataset(tmp_path / "set")
    assert data.num_episodes == 3
    assert data.action_spec.units[:2] == ("m", "m")
    scale = np.array([0.05] * 3 + [0.5] * 3 + [1.0])
    for i in range(3):
        rows = slice(int(data.episode_from_E[i]), int(data.episode_to_E[i]))
        assert np.allclose(data.columns[ACTION][rows].numpy(), written[i]["actions"] * scale, atol=1e-6)
        assert np.allclose(data.columns[STATE][rows].numpy(), written[i]["state"], atol=1e-6)
        assert np.allclose(data.episodes[f"final/{ENVIRONMENT_STATE}"][i], written[i]["last"], atol=1e-6)
    assert describe(tmp_path / "set")["success"]["successes"] == 3
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["something"] = 1
    assert main(["data", "import", str(tmp_path / "other.hdf5"), "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_diffusion_policy_zarr_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    action, state, ends = (
        rng.uniform(0, 512, (20, 2)).astype("f"),
        rng.normal(size=(20, 5)).astype("f"),
        np.array([8, 20]),
    )
    root = zarr.open_group(tmp_path / "pusht.zarr", mode="w")
    root.create_array("data/action", data=action)
    root.create_array("data/state", data=state)
    root.create_array("meta/episode_ends", data=ends)
    arguments = ["data", "import", str(tmp_path / "pusht.zarr"), "--out", str(tmp_path / "set"), "--control-hz", "10"]
    assert main(arguments) == 0
    data = load_dataset(tmp_path / "set")
    assert data.episode_to_E.tolist() == [8, 20]
    assert np.allclose(data.columns[ACTION].numpy(), action)
    assert np.allclose(data.columns[STATE].numpy(), state)
    assert data.action_spec.control_hz == 10
    root["meta/episode_ends"][1] = 19
    assert main(["data", "import", str(tmp_path / "pusht.zarr"), "--out", str(tmp_path / "none")]) == 2
    assert "episode_ends" in lines(capsys)[0]


def experiment(path: Path, **eval_options: object) -> Path:
    stages = {
        "collect": {"episodes": 3, "workers": 1},
        "pretrain": {
            "data": "@collect",
            "policy": {"name": "flow_mlp", "net": {"width": 16, "depth": 1}},
            "bc": {"steps": 6, "batch_size": 8, "warmup_steps": 1},
        },
        "eval": {
            "policies": ["@pretrain"],
            "episodes": 4,
            "num_envs": 2,
            "videos": 1,
            "max_episode_steps": 25,
            **eval_options,
        },
        "report": {},
    }
    path.write_text(yaml.safe_dump({"task": "push_t", "stages": stages}, sort_keys=False))
    return path


def test_run_writes_a_self_contained_report_and_skips_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = experiment(tmp_path / "tiny.yaml"), tmp_path / "run"
    assert main(["run", str(file), "--out", str(out)]) == 0
    html = (out / "report.html").read_text()
    assert 'src="http' not in html
    assert 'href="http' not in html
    for part in (
        "data:video/mp4;base64,",
        "<svg",
        "scene 100000",
        "95 % interval",
        "torch",
        "solver: euler",
        "gradient steps",
    ):
        assert part in html, part
    results = json.loads((out / "results.json").read_text())
    assert results["eval"]["success"]["n"] == 4
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stages"]["pretrain"]["begun"]["inputs"]["collect"] == manifest["stages"]["collect"]["output"]
    assert manifest["stages"]["collect"]["budget"]["frames"] > 0
    capsys.readouterr()
    assert main(["run", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("done before") == 4
    assert manifest["stages"]["pretrain"]["seed"] == 0
    assert "on test scenes 100000 to 100003" in html
    # what a stage left is looked at, not only the record of it
    (out / "eval" / "eval.json").unlink()
    assert main(["run", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("done before") == 2
    assert "since it went on" not in html
    assert (out / "report.html").read_text().count("since it went on") == 1  # seconds that are not all of the stage's
    # a changed stage runs again, and those after it, not those before
    assert main(["run", str(experiment(file, seed=100_500)), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("done before") == 2
    assert "scene 100500" in (out / "report.html").read_text()
    # also where it trains or collects; what it left before is kept aside
    text = file.read_text().replace("steps: 6", "steps: 8")
    file.write_text(text)
    assert main(["run", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("done before") == 1
    assert json.loads((out / "pretrain" / "results.json").read_text())["gradient_steps"] == 8
    assert json.loads((out / "pretrain.previous" / "results.json").read_text())["gradient_steps"] == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: push_t\n", ["stages"]),
        ("task: push_t\nstages: {fly: {}}\n", ["'fly'", "collect"]),
        ("task: push_t\nstages: {pretrain: {data: '@collect'}}\n", ["@collect", "before"]),
        ("task: push_t\nstages: {collect: {episdoes: 3}}\n", ["episdoes"]),
        ("task: push_t\nstages: {collect: {episodes: 2}, eval: {policies: [x], epsiodes: 3}}\n", ["epsiodes"]),
        ("1: 2\na: 3\n", ["task", "stages"]),
        ("task: lfit\nstages: {collect: {}}\n", ["lfit"]),
        ("task: push_t\nstages: {collect: {episodes: .nan}}\n", ["plain numbers"]),
        ("task: push_t\nstages: {pretrain: {data: x, policy: {type: [flow]}}}\n", ["policy.type"]),
        ("task: push_t\nstages: {'../x': {}}\n", ["../x"]),
        ("task: [", ["YAML"]),
        ("task: push_t\nstages: {collect: 3}\n", ["collect", "3"]),
    ],
)
def test_bad_experiment_files_are_one_line(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = lines(capsys)
    assert len(said) == 1
    assert not (tmp_path / "run").exists()
    for word in words:
        assert word in said[0]


def test_bench_data_measures_both(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--seconds", "0.3", "--json", str(tmp_path / "bench.json")]
    assert main(["bench", "data", *options]) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["ratio"] >= 100


def test_doctor_names_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    found = {c["name"]: c for c in json.loads((tmp_path / "doctor.json").read_text())["checks"]}
    assert {"cores", "GPU", "rendering by egl", "rendering by osmesa", "ROS 2 (rclpy)", "threads per process"} <= set(
        found
    )
    assert all(c["cure"] for c in found.values())
