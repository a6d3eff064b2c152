"""``vla-rl deploy --bag``: every message of a run, and a run that does not care what becomes of the recording."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from real_robot import recorder
from real_robot.bags import BagFile
from vla_rl.cli.main import main
from vla_rl.data.reader import load_dataset
from vla_rl.runtime.config import CONFIG_ROOT

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import free_domain

NUMBERS = "std_msgs/msg/Float64MultiArray"


def pusher_on_dds(domain: int) -> dict[str, Any]:
    """The simulated pusher behind topics, with limits that an untrained policy and a loaded machine keep."""
    raw = yaml.safe_load((CONFIG_ROOT / "robot" / "push_t_fake.yaml").read_text())
    ages = {"joints_age_s": 3.0, "other_age_s": 3.0, "heartbeat_s": 3.0, "inference_s": 5.0, "clock_jump_s": 3.0}
    seen = {"type": NUMBERS, "hz": 20.0, "quality": "state"}
    place = {"topic": "pusher", "source": "data", "size": 2, "unit": "m"}
    return {
        "type": "ros",
        "name": "push_t_dds",
        "transport": {"type": "dds", "domain": domain, "interface": "127.0.0.1"},
        "action": raw["action"],
        "safety": {**raw["safety"], **ages, "max_chunk_deviation": [2.0, 2.0]},
        "map": {
            "topics": {
                "pusher": {"topic": "/pusher", "kind": "joints", **seen},
                "scene": {"topic": "/scene", **seen},
                "status": {"topic": "/status", **seen},
                "goal": {"topic": "/goal", **seen, "quality": "command"},
            },
            "observations": {
                "observation.state": [place],
                "observation.environment_state": [{"topic": "scene", "source": "data", "size": 22}],
            },
            "measured": {"x y": place},
            "commands": [{"actions": ["x", "y"], "part": {**place, "topic": "goal"}}],
            "status": {"topic": "status", "source": "data", "size": 4},
        },
        "reset": {"how": "topic", "timeout_s": 60.0},
    }


@pytest.fixture(scope="module")
def pusher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """File of a robot on DDS whose simulated arm runs."""
    path = tmp_path_factory.mktemp("dds") / "pusher.yaml"
    with free_domain() as domain:
        path.write_text(yaml.safe_dump(pusher_on_dds(domain)))
        words = [sys.executable, "-m", "vla_rl.cli.main", "robot", "simulate", "push_t", "--robot", str(path)]
        with subprocess.Popen([*words, "--follow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as arm:
            assert arm.stdout is not None
            assert "tcp://" in arm.stdout.readline()
            yield path
            assert arm.stdin is not None
            arm.stdin.close()


def deployed(policy: Path, robot: Path, out: Path, *more: str) -> dict[str, Any]:
    numbers = out.with_suffix(".json")
    words = f"deploy {policy} --robot {robot} --seconds 2 --out {out} --bag --json {numbers}"
    assert main([*words.split(), *more]) == 0
    return json.loads(numbers.read_text())


def test_the_bag_of_a_run_holds_every_command_and_becomes_its_episodes(
    policy: Path, pusher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = deployed(policy, pusher, tmp_path / "run", "--episodes", "2")
    assert "0 are missing; it is whole" in capsys.readouterr().out
    assert [s["length"] for s in found["scenes"]] == [40, 40]
    (path,) = (tmp_path / "run" / "bags").iterdir()
    assert found["bag"]["path"] == str(path)
    assert not found["bag"]["dropped"]
    bag = BagFile(path)
    assert not bag.cut
    assert bag.about["robot"] == "push_t_dds"
    kinds = {topic: NUMBERS for topic in ("/pusher", "/scene", "/status", "/goal", "/vla_rl/reset")}
    rows = [(topic, message) for topic, _, message in bag.messages(kinds)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "sent" in line]
    first = next(i for i, line in enumerate(steps) if not line["holding"])
    commanded = [message["data"].tolist() for topic, message in rows if topic == "/goal"]
    np.testing.assert_allclose(commanded, [line["sent"] for line in steps[first:]], atol=1e-6)
    for topic in ("/pusher", "/scene", "/status"):
        assert sum(name == topic for name, _ in rows) > 40, topic
    words = f"bag import {path} --robot {pusher} --out {tmp_path / 'set'} --split status"
    assert main(words.split()) == 0
    live, imported = load_dataset(tmp_path / "run" / "episodes"), load_dataset(tmp_path / "set")
    lengths = imported.episodes["length"].tolist()[-2:]  # the arm's own scene is before them
    assert all(abs(length - 40) <= 3 for length in lengths), lengths
    assert live.episodes["length"].tolist() == [40, 40]


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def slow(*_: object) -> None:
    time.sleep(0.5)


@pytest.mark.parametrize("write", [full, slow])
def test_a_recorder_that_fails_or_is_slow_leaves_the_run_alone(
    write: Any, policy: Path, pusher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder.BagWriter, "write", write)
    monkeypatch.setattr(recorder, "QUEUE", 4)
    found = deployed(policy, pusher, tmp_path / "run")
    assert [s["length"] for s in found["scenes"]] == [40]
    assert found["faults"] == []
    assert sum(found["bag"]["dropped"].values()) > 40
    assert found["timing"]["send"]["p50_ms"] < 100, "who commands does not wait for the disk"
    assert load_dataset(tmp_path / "run" / "episodes").num_episodes == 1
    if write is full:
        assert "No space left on device" in found["bag"]["failure"]


def test_what_cannot_be_recorded_is_refused(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in [
        ("--robot push_t_fake", "wants --out"),
        (
            f"--robot push_t_fake --out {tmp_path}/run",
            "'push_t_fake' has no topics to record; bags want a robot of type",
        ),
    ]:
        assert main(f"deploy {policy} --bag {words}".split()) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
