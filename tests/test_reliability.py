"""kill -9 at random instants: the command given again ends with the artefacts of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from vla_rl.data.reader import load_dataset
from vla_rl.runtime.files import sha256_tree

MANY = 20
SMALL = "--policy flow_mlp --policy.net.width 32 --policy.net.depth 1 --bc.batch-size 32 --checkpoint-every 20 --validate-every 20"
COMMANDS = {
    "collect": "collect --task push_t --episodes 40 --workers 2 --out {out} --expert human",
    "pretrain": f"pretrain --data {{demos}} --out {{out}} {SMALL} --bc.steps 400",
    "eval": "eval {policy} --episodes 60 --num-envs 4 --max-episode-steps 100 --json {out}/eval.json",
    "residual": "residual --policy {policy} --data {demos} --out {out} --actors process --num-envs 4 --max-episode-steps 40"
    " --env-steps 3200 --base-episodes 4 --noise-episodes 4 --order-episodes 4 --select-every 400 --selection-scenes 4"
    " --label-copies 1 --anchor-updates 5 --warmup-updates 5 --imitation-updates 20 --updates-per-step 0.05"
    " --residual.width 8 --residual.critic.width 8",
}


def command(words: str) -> list[str]:
    return [sys.executable, "-m", "vla_rl.cli.main", *words.split()]


def run(words: str) -> None:
    done = subprocess.run(command(words), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


def kill_at(words: str, name: str, out: Path, wanted: int, jitter_s: float) -> bool:
    """Kill the command a moment after it has got as far as wanted; return whether it was still running."""
    process = subprocess.Popen(
        command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while process.poll() is None and progress(name, out) < wanted:
            time.sleep(0.005)
        time.sleep(jitter_s)
        if process.poll() is not None:
            assert process.returncode == 0
            return False
        os.kill(process.pid, signal.SIGKILL)  # the process alone: its workers have to notice
        process.wait()
        return True
    finally:
        _wait_for_group(process.pid)


def progress(name: str, out: Path) -> int:
    """How far the artefacts on disk have got: episodes, checkpointed steps, scenes."""
    if name == "collect":
        info = out / "meta/info.json"
        return int(json.loads(info.read_text())["total_episodes"]) if info.exists() else 0
    if name == "pretrain":
        return max((int(p.name[5:13]) for p in out.glob("checkpoints/step-*")), default=0)
    if name == "residual":
        journal = out / "replay" / "episodes.jsonl"
        return max(journal.read_text().count("\n") - 1, 0) if journal.exists() else 0
    journals = list(out.glob("*.journal"))
    return sum(path.read_text().count("\n") - 1 for path in journals) if journals else 0


def _wait_for_group(group: int) -> None:
    """Workers follow the process that started them."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("a worker outlived the killed process by 30 s")


def artefacts(name: str, out: Path) -> object:
    if name == "pretrain":
        return sha256_tree(out / "policy")
    if name == "eval":
        result = json.loads((out / "eval.json").read_text())
        result.pop("timing")
        return result
    if name == "residual":
        results = json.loads((out / "results.json").read_text())
        results.pop("timing")
        journal = (out / "replay" / "episodes.jsonl").read_text()
        return results, journal, sha256_tree(out / "policy"), sha256_tree(out / "last")
    return sha256_tree(out)


QUICK = ("collect", "pretrain", "eval")  # the others start a second process each time
END = {"collect": 40, "pretrain": 400, "eval": 60, "residual": 80}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    paths = {name: root / name for name in COMMANDS} | {"demos": root / "collect", "policy": root / "pretrain"}
    for name in QUICK:
        run(COMMANDS[name].format(out=paths[name], **{k: paths[k] for k in ("demos", "policy")}))
    return paths


def trial(name: str, prepared: dict[str, Path], tmp_path: Path, seed: int, most: int) -> int:
    """Kill the command up to ``most`` times at random instants of its work, let it end, compare; return the number of kills."""
    rng, out, kills = random.Random(f"{name}{seed}"), tmp_path / f"{name}{seed}", 0
    words = COMMANDS[name].format(out=out, **{k: prepared[k] for k in ("demos", "policy")})
    while kills < most:
        done = progress(name, out)
        wanted = done + rng.randint(0, max(int(0.6 * (END[name] - done)), 0))
        if not kill_at(words, name, out, wanted, rng.uniform(0.0, 0.1)):
            break
        kills += 1
        if name == "collect" and progress(name, out):
            data = load_dataset(out)  # what is there opens at once, for us and for LeRobot
            assert len(LeRobotDataset("local/cut", root=out)) == data.num_frames
    run(words)
    assert artefacts(name, out) == artefacts(name, prepared[name])
    assert not [p for p in out.rglob("*.tmp")]
    shutil.rmtree(out)
    return kills


@pytest.mark.parametrize("name", QUICK)
def test_killed_and_given_again_ends_the_same(name: str, prepared: dict[str, Path], tmp_path: Path) -> None:
    assert trial(name, prepared, tmp_path, 0, 1) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_twenty_times_and_given_again_ends_the_same(
    name: str, prepared: dict[str, Path], tmp_path: Path
) -> None:
    if name not in QUICK:
        run(COMMANDS[name].format(out=prepared[name], **{k: prepared[k] for k in ("demos", "policy")}))
    kills = seed = 0
    while kills < MANY:
        kills += trial(name, prepared, tmp_path, 100 + seed, 3)
        seed += 1
