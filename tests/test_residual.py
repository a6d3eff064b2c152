"""The residual stage as a program: exact resume, who collects does not matter, never worse than the base, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import PUSH_LIMIT

from sim.expert_base import ExpertTeacher
from sim.experts.base import ExpertConfig
from sim.task import load_task
from vla_rl import distill_back as back
from vla_rl import evaluate as evaluate_module
from vla_rl import residual
from vla_rl import residual_checks as checks
from vla_rl.actors import (
    ChildHand,
    Desk,
    Hand,
    OwnHand,
    RemoteHand,
    Team,
    Worker,
    from_message,
    own_team,
    setting_of,
    to_message,
)
from vla_rl.algos.residual_ppo import ResidualPPO
from vla_rl.algos.residual_td3 import ResidualTD3, ResidualTD3Config
from vla_rl.bench_residual import ResidualBenchSettings, bench_residual
from vla_rl.cli.actor import open_setting
from vla_rl.cli.common import Simulation, base_finder, open_arena, open_task
from vla_rl.cli.main import main
from vla_rl.data.reader import EpisodeData, load_dataset, load_datasets
from vla_rl.data.replay import Replay
from vla_rl.data.schema import INTERVENED
from vla_rl.data.steps import StepEpisode
from vla_rl.data.writer import EpisodeWriter
from vla_rl.distill_back import DistillBackBCConfig, DistillBackSettings
from vla_rl.evaluate import Arena
from vla_rl.inference.base_policy import OwnBase
from vla_rl.inference.bases import BaseSource, own_base
from vla_rl.inference.checkpoint import save_residual
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.residual_controller import Greedy, NoiseConfig, ResidualAgent, ResidualController
from vla_rl.inference.steps import Order, collect_steps
from vla_rl.nets.step_critics import EnsembleCriticConfig
from vla_rl.policies.checkpoint import resolve_policy
from vla_rl.policies.residual import ResidualConfig, ResidualPolicy
from vla_rl.report.build import _curves
from vla_rl.residual import train_residual
from vla_rl.residual_runs import load_training
from vla_rl.residual_settings import ResidualSettings
from vla_rl.runtime.checkpoints import folder_digest, load_tensors, newest
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import read_json
from vla_rl.runtime.metrics import read_metrics
from vla_rl.runtime.wire import Connection, ConnectionLostError, WireError, connect, pack, read_token, unpack
from vla_rl.types import SpecMismatchError

SMALL = ResidualConfig(width=8, depth=1, scale=0.1, critic=EnsembleCriticConfig(width=8, depth=1, members=3))


def settings(**changes: Any) -> ResidualSettings:
    options: dict[str, Any] = {
        "env_steps": 1400,
        "base_episodes": 4,
        "noise_episodes": 4,
        "order_episodes": 4,
        "anchor_updates": 5,
        "warmup_updates": 5,
        "imitation_updates": 0,
        "updates_per_step": 0.05,
        "ramp_steps": 300,
        "label_copies": 2,
        "selection_scenes": 8,
        "select_every": 300,
        "residual": SMALL,
        "td3": ResidualTD3Config(batch_size=16, actor_rate=1e-2),
    }
    return ResidualSettings(**{**options, **changes})


@pytest.fixture
def base(policy: Path) -> BaseSource:
    return own_base(policy)


@pytest.fixture
def data(demos: Path) -> EpisodeData:
    return load_dataset(demos)


def train(
    out: Path,
    base: BaseSource,
    data: EpisodeData | None,
    arena: Arena,
    team: Callable[[], Team] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    chosen = settings(**changes)
    return train_residual(data, base, out, chosen, arena, team or (lambda: own_team(arena, base, chosen.residual)))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_tensors(path, "model")


def assert_same_weights(a: Path, b: Path) -> None:
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


class Cut(Exception):  # noqa: N818  (a kill)
    """The process is killed."""


class CutTeam(Team):
    """Is killed while it waits for an order."""

    def __init__(self, hands: list[Hand], at: int) -> None:
        super().__init__(hands)
        self.left = at

    def result(self) -> list[StepEpisode]:
        self.left -= 1
        if self.left < 0:
            raise Cut
        return super().result()


@pytest.fixture(scope="module")
def whole(policy: Path, demos: Path, arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, own_base(policy), load_dataset(demos), arena)
    return out


@pytest.mark.parametrize("at", [1, 3, 5])
def test_killed_and_resumed_is_as_uninterrupted(
    whole: Path, tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, at: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Cut):
        train(out, base, data, arena, lambda: CutTeam([OwnHand(Worker(arena, base, SMALL))], at))
    train(out, base, data, arena)
    for name in ("policy", "last"):
        assert_same_weights(whole / name, out / name)
    a, b = (read_json(path / "results.json") for path in (whole, out))
    assert {k: v for k, v in a.items() if k != "timing"} == {k: v for k, v in b.items() if k != "timing"}
    assert read_metrics(whole) == read_metrics(out)
    journals = [(path / "replay" / "episodes.jsonl").read_text() for path in (whole, out)]
    assert journals[0] == journals[1]


def test_steps_are_counted_with_the_warm_up_and_updates_keep_their_ratio(whole: Path) -> None:
    results = read_json(whole / "results.json")
    replayed = [json.loads(line) for line in (whole / "replay" / "episodes.jsonl").read_text().splitlines()[1:]]
    assert results["env_steps"] == sum(e["length"] for e in replayed) >= 1400
    warm = sum(e["length"] for e in replayed if e["source"] != "policy")
    assert results["warmup_env_steps"] == warm > 0
    assert [e["source"] for e in replayed[:9]] == ["base"] * 4 + ["noise"] * 4 + ["policy"]
    last_order = sum(e["length"] for e in replayed[-4:])
    assert results["gradient_steps"] == 10 + int(0.05 * (results["env_steps"] - warm - last_order))
    encoder = [weights(whole / "last")[f"encoder.state.{name}"] for name in ("center_SD", "scale_SD")]
    assert not torch.equal(encoder[0], torch.zeros_like(encoder[0]))  # fitted on what was seen
    assert not torch.equal(encoder[1], torch.ones_like(encoder[1]))
    assert all(e["scene_seed"] < 50_000 for e in replayed)


def test_another_process_collects_the_same(
    whole: Path, tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    """And where it is killed with an order half done, the one that takes its place does it again."""
    hand = ChildHand(setting_of(arena, base, SMALL))

    class Killing(Team):
        orders = 0

        def submit(self, order: Order, policy: Any) -> None:
            super().submit(order, policy)
            self.orders += 1
            if self.orders == 4:
                assert hand.pid is not None
                os.kill(hand.pid, signal.SIGKILL)

    train(tmp_path / "run", base, data, arena, lambda: Killing([hand]))
    assert_same_weights(whole / "last", tmp_path / "run" / "last")


@pytest.mark.slow
def test_two_ray_actors_collect_the_same_and_one_may_be_killed(base: BaseSource, arena: Arena) -> None:
    ray = pytest.importorskip("ray")
    from vla_rl.cli.residual import _desk
    from vla_rl.ray_hands import RayHand, ray_hands

    hands = ray_hands(2, _desk, setting_of(arena, base, SMALL))
    worker = Worker(arena, base, SMALL)
    order = Order(0, "noise", tuple(range(8)), 3, NoiseConfig())
    wanted = [
        s
        for half in ((0, 1, 2, 3), (4, 5, 6, 7))
        for s in worker.collect(replace(order, scenes=half), weights_of(worker))
    ]
    team = Team(hands)
    for kill in (False, True):
        team.submit(order, worker._policy)
        if kill:
            assert isinstance(hands[1], RayHand)
            os.kill(hands[1].pid, signal.SIGKILL)
        for a, b in zip(wanted, team.result(), strict=True):
            np.testing.assert_array_equal(a.episode.action_TA, b.episode.action_TA)
            np.testing.assert_array_equal(a.base_TA, b.base_TA)
    team.close()
    ray.shutdown()


@pytest.mark.slow
def test_an_actor_of_ray_that_cannot_be_set_up_says_why(base: BaseSource, arena: Arena) -> None:
    ray = pytest.importorskip("ray")
    from vla_rl.cli.residual import _desk
    from vla_rl.ray_hands import ray_hands

    hand = ray_hands(1, _desk, {**setting_of(arena, base, SMALL), "base": "/no/such/policy"})[0]
    worker = Worker(arena, base, SMALL)
    hand.submit(Order(0, "noise", (0,), 3, NoiseConfig()), weights_of(worker))
    with pytest.raises(UserError) as raised:
        hand.result()
    assert "/no/such/policy" in str(raised.value)
    assert "\n" not in str(raised.value)
    hand.close()
    ray.shutdown()


def test_what_arrives_at_an_actor_or_from_it_is_checked(base: BaseSource, arena: Arena) -> None:
    desk = Desk(lambda *_: (arena, base))
    setting = setting_of(arena, base, SMALL)
    for number in (float("inf"), 0, 10**6):
        with pytest.raises(UserError, match=r"num_envs wants 1 to 4096|cannot convert float infinity"):
            desk.answer({"call": "open", **setting, "num_envs": number})
    with pytest.raises(WireError, match="no episode"):
        from_message({"episode": {"nothing": 1}})


def test_a_token_that_is_no_text_and_no_actors_of_ray_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="it is no text"):
        read_token(tmp_path / "token")
    assert main(["residual", "--policy", "none", "--out", str(tmp_path / "run"), "--actors", "ray:0"]) == 2
    assert "actors through Ray look like ray:2, got 'ray:0'" in capsys.readouterr().err


def test_a_hand_that_dies_each_time_it_tries_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    class Dying(Connection):
        def __init__(self) -> None:
            pass

        def send(self, message: Any) -> None:
            pass

        def receive(self, *_: Any) -> dict[str, Any]:
            raise ConnectionLostError("the other side has closed the connection")

        def close(self) -> None:
            pass

    def reach() -> Connection:
        reached.append(1)
        return Dying()

    monkeypatch.setattr("vla_rl.actors.RETRY_S", 0.0)
    hand = RemoteHand(reach)
    hand.submit(Order(0, "base", (0,), 0, NoiseConfig()), b"")
    with pytest.raises(ConnectionLostError):
        hand.result()
    assert len(reached) == 6


def test_an_actor_of_ray_that_dies_each_time_is_given_up() -> None:
    """Ray itself would begin it anew for ever."""
    from vla_rl.ray_hands import RayHand

    asked = []

    class DiedError(Exception):
        pass

    class Actor:
        """Stands for a Ray actor, its class and its method."""

        def remote(self, *args: Any) -> Actor:
            if isinstance(args[0], dict):
                asked.append(args[0])
            return self

        @property
        def answer(self) -> Actor:
            return self

    class Cluster:
        class exceptions:  # noqa: N801
            RayTaskError = type("RayTaskError", (Exception,), {})
            RayActorError = DiedError

        @staticmethod
        def remote(**_: Any) -> Callable[[type], Actor]:
            return lambda _: Actor()

        @staticmethod
        def get(_: Any) -> None:
            assert len(asked) < 20, "it tries for ever"
            raise DiedError

    hand = RayHand(Cluster, lambda: Desk(open_setting), {})
    hand.submit(Order(0, "base", (0,), 0, NoiseConfig()), b"")
    with pytest.raises(UserError, match="died 6 times over one order"):
        hand.result()
    assert len(asked) == 6
    assert all(request == asked[0] for request in asked)


def test_an_actor_told_so_ends_with_its_first_learner_and_counts_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a long secret of this test\n")
    options = ["--once", "--token-file", str(tmp_path / "token"), "--json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "vla_rl.cli.main", "actor", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with pytest.raises(WireError, match="token"):
            connect(address, "a guess")
        learner = connect(address, "a long secret of this test")
        with pytest.raises(UserError, match="asked to open"):
            learner.ask({"call": "collect"}, 60.0)
        learner.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert read_json(tmp_path / "out.json")["served"] == 1


def weights_of(worker: Worker) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(worker._policy.state_dict())


def test_an_episode_crosses_the_wire_unchanged(base: BaseSource, arena: Arena) -> None:
    worker = Worker(arena, base, SMALL)
    steps = worker.collect(Order(0, "base", (3,), 0, NoiseConfig()), weights_of(worker))[0]
    again = from_message(unpack(pack(to_message(steps))))
    assert to_message(again).keys() == to_message(steps).keys()
    for key, value in steps.episode.observations.items():
        np.testing.assert_array_equal(value, again.episode.observations[key])
    np.testing.assert_array_equal(steps.base_TA, again.base_TA)
    assert again.episode.provenance == dict(steps.episode.provenance)
    assert again.episode.terminated is steps.episode.terminated


def test_an_actor_refuses_a_base_with_other_weights(base: BaseSource, arena: Arena) -> None:
    desk = Desk(open_setting)
    setting = setting_of(arena, base, SMALL)
    with pytest.raises(UserError, match="base has the hash"):
        desk.answer({"call": "open", **setting, "digest": "0" * 64})
    with pytest.raises(UserError, match="asked to open and then to collect, got 'collect'"):
        desk.answer({"call": "collect"})
    with pytest.raises(UserError, match="lacks something"):
        desk.answer({"call": "open"})


def test_a_base_that_gives_nan_is_said_to_the_learner_by_its_actor(
    base: BaseSource, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(lambda *_: (arena, base))
    desk.answer({"call": "open", **setting_of(arena, base, SMALL)})
    worker = Worker(arena, base, SMALL)
    request = {"call": "collect", "order": asdict(Order(0, "base", (7,), 0, NoiseConfig()))}
    assert len(desk.answer({**request, "weights": weights_of(worker)})["episodes"]) == 1
    for weights in (b"what is this", b""):
        with pytest.raises(UserError, match="does not fit"):
            desk.answer({**request, "weights": weights})
    monkeypatch.setattr(OwnBase, "chunk", lambda self, _, ids: np.full((len(ids), 8, 2), np.nan, np.float32))
    with pytest.raises(UserError, match="the policy's action is not finite in scene 7"):
        desk.answer({**request, "weights": weights_of(worker)})


def test_a_hand_that_never_comes_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from vla_rl.runtime.wire import ConnectionLostError

    def nobody() -> Any:
        raise ConnectionLostError("nobody answers")

    monkeypatch.setattr("vla_rl.actors.PATIENCE_S", 0.05)
    monkeypatch.setattr("vla_rl.actors.RETRY_S", 0.01)
    hand = RemoteHand(nobody)
    hand.submit(Order(0, "base", (0,), 0, NoiseConfig()), b"")
    with pytest.raises(ConnectionLostError, match="nobody answers"):
        hand.result()


def judged(monkeypatch: pytest.MonkeyPatch, verdicts: list[list[bool]]) -> None:
    """Evaluations go as told, one list of successes after the other."""
    queue = [list(v) for v in verdicts]

    def evaluate(agent: Any, arena: Any, scenes: list[int], **_: Any) -> dict[str, Any]:
        first = scenes[0] - 50_000
        if first == 0:
            judged_now[:] = queue.pop(0)
        return {"env_steps": 1, "scenes": [{"success": s} for s in judged_now[first : first + len(scenes)]]}

    judged_now: list[bool] = []
    monkeypatch.setattr(checks, "evaluate", evaluate)


def test_what_is_worse_is_rolled_back_and_the_best_is_left(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_does, better, ruined = [True, False] * 10, [True, True, True, False] * 5, [False] * 20
    similar = [True, False, True, True] * 4 + [True, False, False, True]
    # with the gate and without, each time
    judged(monkeypatch, [base_does, better, ruined, ruined, ruined, *[similar, ruined] * 8])
    results = train(tmp_path / "run", base, data, arena, selection_scenes=20, env_steps=1200)
    assert results["rollbacks"] == 1
    found_at = load_training(tmp_path / "run")
    assert found_at is not None
    assert found_at[2].actor_rate_share == 0.5  # the step that was too far is not taken again
    assert results["base_selection_success"] == 0.5
    assert results["selection_success"] == 0.75
    found = {m["step"]: m["selection/success"] for m in read_metrics(tmp_path / "run")}
    assert results["best_env_steps"] == sorted(found)[1]
    assert results["against_base"]["difference"] == pytest.approx(0.25)
    assert list(found.values())[2] == 0.0


def test_the_gate_goes_where_composing_always_does_better_and_comes_back(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(successes: int) -> list[bool]:
        return [True] * successes + [False] * (20 - successes)

    # the base; then with the gate and without; then without and with, as it acted without
    judged(monkeypatch, [share(8), share(9), share(12), share(10), share(11), *[share(10)] * 16])
    results = train(tmp_path / "run", base, data, arena, selection_scenes=20, env_steps=1200, worse_evidence=5.0)
    assert results["selection_success"] == 0.6
    assert not weights(tmp_path / "run" / "policy")["gated"]
    rows = [m for m in read_metrics(tmp_path / "run") if "selection/gated" in m]
    assert [m["selection/gated"] for m in rows][:3] == [0.0, 1.0, 1.0]
    assert [m["selection/success"] for m in rows][:2] == [0.6, 0.55]


@pytest.mark.parametrize("kept", [True, False])
def test_it_begins_from_imitation_unless_that_is_worse_than_the_base(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    base_does = (True,) * 8 + (False,) * 12
    seen: list[tuple[float, bool]] = []  # reach of what is judged, and whether it is the base

    def look(agent: ResidualAgent, *_: Any) -> checks.Judged:
        zero = not any(bool(p.any()) for p in agent.policy.actor.net[-1].parameters())
        seen.append((float(agent.policy.ramp), zero))
        return checks.Judged(base_does if zero else (kept,) * 18 + (False,) * 2, 1)

    monkeypatch.setattr(residual, "judge", look)
    out = tmp_path / "run"
    results = train(out, base, data, arena, env_steps=900, imitation_updates=3, ramp_steps=10_000, updates_per_step=0.0)
    assert seen[0][1]  # the base first,
    assert seen[1:3] == [(1.0, False)] * 2  # then what imitates, with its full reach, with the gate and without
    assert results["imitation_selection_success"] == 0.9 * kept
    assert results["gradient_steps"] == 10 + 3  # warm-up and imitation
    assert results["rollbacks"] == (not kept)
    assert seen[-1][1] != kept  # what learning goes on from
    assert (seen[-1][0] == 1.0) == kept  # a residual that was not imitated gains its reach slowly
    assert results["selection_success"] == (0.9 if kept else 0.4)


def test_the_report_draws_success_of_a_run_that_imitation_ended() -> None:
    metrics = [{"step": 900, "selection/success": 0.5, "selection/best": 0.5}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a legend of nothing
        drawn = _curves([*metrics, {"step": 900, "actor/imitation_loss": 0.1, "selection/success": 1.0}])
    assert "<!-- selection/success -->" in drawn


def test_the_critic_alone_learns_until_the_actor_does(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    train(tmp_path / "still", base, data, arena, env_steps=900, actor_from=10_000)
    train(tmp_path / "moves", base, data, arena, env_steps=900)
    still, moves = weights(tmp_path / "still" / "last"), weights(tmp_path / "moves" / "last")
    moved = {name for name, tensor in moves.items() if not torch.equal(tensor, still[name])}
    last = {name for name in still if name.startswith("actor.net.3")}
    assert last
    assert last <= moved
    assert all(not bool(still[name].any()) for name in last)
    # how many updates the critic makes does not hang on it
    results = [read_json(tmp_path / name / "results.json")["gradient_steps"] for name in ("still", "moves")]
    assert results[0] == results[1]


def test_what_goes_without_the_gate_and_is_as_good_as_the_best_is_judged_once(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []  # whether the gate was on

    def look(agent: ResidualAgent, *_: Any) -> checks.Judged:
        looked.append(bool(agent.policy.gated))
        succeeded = 8 if len(looked) == 1 else 12 if not looked[-1] else 9
        return checks.Judged((True,) * succeeded + (False,) * (20 - succeeded), 1)

    monkeypatch.setattr(residual, "judge", look)
    train(tmp_path / "run", base, data, arena, env_steps=1400, updates_per_step=0.0)
    assert looked[:3] == [True, True, False]
    assert len(looked) > 3
    assert not any(looked[3:])


@pytest.mark.parametrize(("successes", "taken"), [(8, False), (10, False), (20, True)])
def test_only_what_is_surely_better_takes_the_bases_place(
    tmp_path: Path,
    base: BaseSource,
    data: EpisodeData,
    arena: Arena,
    monkeypatch: pytest.MonkeyPatch,
    successes: int,
    taken: bool,
) -> None:
    judged(monkeypatch, [[True] * 8 + [False] * 12, *[[True] * successes + [False] * (20 - successes)] * 16])
    out = tmp_path / "run"
    results = train(out, base, data, arena, selection_scenes=20, env_steps=1200)
    assert results["env_steps"] > results["warmup_env_steps"]
    moved = any(bool(v.any()) for k, v in weights(out / "policy").items() if k.startswith("actor.net.3."))
    assert moved == taken
    assert (results["best_env_steps"] > 0) == taken
    assert results["selection_success"] == (1.0 if taken else 0.4)
    assert any(bool(v.any()) for k, v in weights(out / "last").items() if k.startswith("actor.net.3."))
    assert results["rollbacks"] == 0


def test_luck_hardly_ever_puts_a_worse_residual_in_the_bases_place() -> None:
    """Eleven looks at a residual that succeeds in 55 % of scenes, on a base that does in 60 %."""
    rng = np.random.default_rng(0)
    taken = 0
    for _ in range(200):
        base_does = tuple(bool(x) for x in rng.random(100) < 0.6)
        looks = [tuple(bool(x) for x in rng.random(100) < 0.55) for _ in range(11)]
        taken += any(checks.takes_the_place(base_does, look, 10.0, of_base=True) for look in looks)
    assert taken <= 4
    assert checks.takes_the_place((True, False), (False, True), 10.0, of_base=False)  # of a residual: as good is enough
    assert not checks.takes_the_place((True, False), (False, False), 10.0, of_base=False)


def test_a_sequential_test_stops_early_where_it_is_sure(
    base: BaseSource, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = ResidualAgent(base, Worker(arena, base, SMALL)._policy)
    judged(monkeypatch, [[False] * 80, [True] * 80, [False] * 80])
    assert len(checks.judge(agent, arena, 80, 0, Team([]).collect, (True,) * 80, 10.0).successes) == 20
    assert len(checks.judge(agent, arena, 80, 0, Team([]).collect, (True,) * 80, 10.0).successes) == 80
    assert len(checks.judge(agent, arena, 80, 0, Team([]).collect).successes) == 80


def test_alarms_ring_for_saturation_without_slope_and_for_drift() -> None:
    well = {"actor/saturation": 0.6, "actor/slope": 0.1, "critic/drift": 0.1}
    assert not list(checks.alarms(well))
    assert "end of their reach" in next(checks.alarms({**well, "actor/slope": 1e-4}))
    assert "-0.40 of the range" in next(checks.alarms({**well, "critic/drift": -0.4}))


def test_drift_is_what_the_critic_says_of_first_steps_less_what_came(
    whole: Path, base: BaseSource, arena: Arena
) -> None:
    td3 = settings().td3
    policy = Worker(arena, base, SMALL)._policy
    policy.critic.forward = lambda x_BD: torch.full((3, len(x_BD)), 0.7)  # type: ignore[method-assign]
    spec = base.spec.policy
    header = json.loads((whole / "replay" / "episodes.jsonl").read_text().splitlines()[0])
    replay = Replay.open(whole / "replay", spec.observation_spec, spec.action_spec.dim, header["capacity"])
    firsts = [first for first, e in replay.spans() if e["source"] == "policy"][-checks.RECENT :]
    realised = replay.returns(td3.discount)[torch.tensor(firsts)].mean()
    found = checks.newest_episodes(replay, policy, td3)
    assert found["critic/drift"] == pytest.approx(0.7 - float(realised), abs=1e-5)


def test_each_look_with_an_alarm_is_counted(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "DRIFT_ALARM", -1.0)
    results = train(tmp_path / "run", base, data, arena, env_steps=1200, selection_scenes=1)
    looks = [m for m in read_metrics(tmp_path / "run") if "critic/drift" in m]
    assert results["alarms"] == len(looks) > 1


def test_shares_noise_and_rate_fall_as_the_budget_is_spent(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, rates, noises = [], [], []
    draw, rate, submit = Replay.draw, ResidualTD3.set_actor_rate, Team.submit

    def drawn(self: Replay, count: int, g: torch.Generator) -> torch.Tensor:
        if self.folder is None:  # demonstrations
            shown.append(count)
        return draw(self, count, g)

    def rated(self: ResidualTD3, share: float) -> None:
        rates.append(share)
        rate(self, share)

    def submitted(self: Team, order: Order, policy: ResidualPolicy) -> None:
        noises.append((order.source, order.noise.std))
        submit(self, order, policy)

    monkeypatch.setattr(Replay, "draw", drawn)
    monkeypatch.setattr(ResidualTD3, "set_actor_rate", rated)
    monkeypatch.setattr(Team, "submit", submitted)
    td3 = ResidualTD3Config(batch_size=64, actor_rate=1e-2)
    results = train(tmp_path / "run", base, data, arena, td3=td3, noise=NoiseConfig(std=0.4), selection_scenes=1)
    assert shown[0] <= 32  # half of a batch,
    assert 16 <= shown[-1] < shown[0]  # falling to a quarter
    assert shown == sorted(shown, reverse=True)
    done = results["warmup_env_steps"] / results["env_steps"]
    assert rates[0] == pytest.approx(1 - 0.9 * done, abs=0.15)
    assert 0.1 <= rates[-1] < 0.5 < rates[0]
    acted = [std for source, std in noises if source == "policy"]
    assert acted == sorted(acted, reverse=True)
    assert 0.2 <= acted[-1] < acted[0] <= 0.4


def test_demonstrations_that_stand_in_no_batch_are_imitated_all_the_same(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    draw = Replay.draw

    def drawn(self: Replay, count: int, g: torch.Generator) -> torch.Tensor:
        if self.folder is None:  # demonstrations
            shown.append(count)
        return draw(self, count, g)

    monkeypatch.setattr(Replay, "draw", drawn)
    shares = {"demonstration_share": 0.0, "last_demonstration_share": 0.0}
    results = train(
        tmp_path / "run", base, data, arena, env_steps=600, imitation_updates=3, selection_scenes=1, **shares
    )
    assert results["imitation_selection_success"] is not None
    assert shown == [16] * 3  # imitation's batches alone


def test_returns_beyond_the_known_range_are_refused(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    td3 = ResidualTD3Config(batch_size=16, return_highest=0.5)
    with pytest.raises(UserError, match=r"td3.return_lowest to td3.return_highest is 0 to 0.5"):
        train(tmp_path / "run", base, data, arena, td3=td3)


def test_a_base_of_another_task_is_refused_before_a_folder_is_claimed(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    policy = replace(base.spec.policy, action_spec=replace(base.spec.policy.action_spec, control_hz=5.0))
    with pytest.raises(SpecMismatchError, match="control_hz"):
        train(tmp_path / "run", replace(base, spec=replace(base.spec, policy=policy)), None, arena)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_last_minute_not_from_the_last_look(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    never: dict[str, Any] = {"select_every": 10_000, "selection_scenes": 1}
    train(tmp_path / "straight", base, data, arena, **never)
    monkeypatch.setattr(residual, "CHECKPOINT_S", 0.0)
    out = tmp_path / "run"
    hands: list[Hand] = [OwnHand(Worker(arena, base, SMALL))]
    with pytest.raises(Cut):
        train(out, base, data, arena, lambda: CutTeam(hands, 5), **never)
    found = load_training(out)
    assert found is not None
    assert found[2].orders == 5
    train(out, base, data, arena, **never)
    assert_same_weights(tmp_path / "straight" / "last", out / "last")
    assert read_metrics(tmp_path / "straight") == read_metrics(out)


def test_without_demonstrations_it_learns_from_roll_outs_alone(tmp_path: Path, base: BaseSource, arena: Arena) -> None:
    results = train(tmp_path / "run", base, None, arena, env_steps=600)
    assert results["env_steps"] >= 600
    assert newest(tmp_path / "run" / "checkpoints") is not None


def test_bad_demonstrations_are_refused_before_a_folder_is_claimed(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    failed = data.episodes.assign(success=False)
    with pytest.raises(UserError, match="none of the 12 demonstrations succeeded"):
        train(tmp_path / "run", base, replace(data, episodes=failed), arena)
    with pytest.raises(UserError, match="which demonstrations succeeded"):
        train(tmp_path / "run", base, replace(data, episodes=data.episodes.drop(columns="success")), arena)
    with pytest.raises(UserError, match="cannot be asked about demonstrations"):
        train(tmp_path / "run", replace(base, labels=False), data, arena)
    assert not (tmp_path / "run").exists()


def test_another_run_does_not_go_on_in_its_folder(
    whole: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    with pytest.raises(UserError, match="holds a run with env_steps = 1400, not 900"):
        train(whole, base, data, arena, env_steps=900)


def test_another_bases_run_does_not_go_on_in_its_folder(
    whole: Path, base: BaseSource, data: EpisodeData, arena: Arena
) -> None:
    """Defect 9: what one base's warm-up found is nothing to another."""
    with pytest.raises(UserError, match="holds a run with policy = "):
        train(whole, replace(base, digest="0" * 64), data, arena)


def test_the_command_ends_in_something_that_can_be_evaluated(
    tmp_path: Path, policy: Path, demos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--env-steps 700 --base-episodes 4 --noise-episodes 4 --order-episodes 4 --anchor-updates 2"
    options += (
        " --warmup-updates 2 --imitation-updates 2 --max-episode-steps 48 --updates-per-step 0.02 --selection-scenes 4"
    )
    options += " --select-every 300 --num-envs 4 --residual.width 8 --residual.critic.width 8"
    out, numbers = str(tmp_path / "run"), str(tmp_path / "r.json")
    places = ["--policy", str(policy), "--data", str(demos), "--out", out, "--json", numbers]
    assert main(["residual", *places, *options.split()]) == 0
    assert read_json(tmp_path / "r.json")["env_steps"] >= 700
    left_alone = not read_json(tmp_path / "r.json")["best_env_steps"]
    assert left_alone == ("no residual was surely better than the base" in capsys.readouterr().out)
    assert (
        main(
            [
                "eval",
                out,
                str(policy),
                "--episodes",
                "4",
                "--json",
                str(tmp_path / "e.json"),
                "--max-episode-steps",
                "48",
            ]
        )
        == 0
    )
    assert read_json(tmp_path / "e.json")["a"]["episodes"] == 4
    capsys.readouterr()
    for option, words in (
        ("--actors nowhere", "an address looks like"),
        ("--actors own process", "own alone"),
        ("--residual.scale 3", "scale"),
        ("--policy nothing", "nothing"),
        ("--policy expert", "say which with --task"),
    ):
        assert main(["residual", "--policy", str(policy), "--out", str(tmp_path / "bad"), *option.split()]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_an_expert_and_nothing_are_bases_too(tmp_path: Path, arena: Arena) -> None:
    find = base_finder(arena)
    for reference in ("expert", "expert:human", "none"):
        worker = Worker(arena, find(reference), SMALL)
        found = worker.collect(Order(0, "base", (1, 2, 3, 4, 5), 0, NoiseConfig()), weights_of(worker))
        assert [s.episode.provenance["scene_seed"] for s in found] == [1, 2, 3, 4, 5]
        moved = np.abs(np.concatenate([s.episode.action_TA for s in found])).max()
        assert bool(moved == 0) is (reference == "none")
    with pytest.raises(UserError, match="no expert named 'tired'; there are clean, human"):
        find("expert:tired")


def supervised(base: BaseSource, arena: Arena, scenes: tuple[int, ...] = tuple(range(8))) -> list[StepEpisode]:
    """Episodes of the base in which an expert takes over now and then."""
    task = load_task("push_t", max_episode_steps=PUSH_LIMIT)
    teacher = ExpertTeacher(task, arena.env.unwrapped.envs, ExpertConfig(), chance=0.05, hold_steps=6, seed=0)  # type: ignore[attr-defined]
    made = Worker(arena, base, SMALL)._policy
    order = Order(0, "base", scenes, 0, NoiseConfig())
    return collect_steps(order, arena.env, arena.action_spec, "push", base, made, teacher)


def test_takeovers_are_recorded_where_a_teacher_acted_and_nowhere_else(base: BaseSource, arena: Arena) -> None:
    found = supervised(base, arena)
    shares = []
    for steps in found:
        taken_T = steps.episode.intervened_T
        assert taken_T is not None
        shares.append(taken_T.mean())
        np.testing.assert_array_equal(steps.episode.action_TA[~taken_T], steps.base_TA[:-1][~taken_T])
        runs = np.diff(np.flatnonzero(np.diff(np.r_[False, taken_T, False].astype(int))).reshape(-1, 2), axis=1)
        assert (runs[:-1] % 6 == 0).all()
    assert 0.05 < np.mean(shares) < 0.6


def test_takeovers_become_corrections_by_way_of_a_data_set(
    tmp_path: Path, base: BaseSource, data: EpisodeData, arena: Arena, demos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies out of the residual's reach is said; a demonstration that nobody watched has none."""
    found = supervised(base, arena)
    writer = EpisodeWriter.open_or_create(
        tmp_path / "taken",
        action_spec=arena.action_spec,
        observation_spec=arena.observation_spec,
        task="push_t",
        recipe={},
        watched=True,
    )
    for steps in found:
        writer.add(steps.episode)
    merged = load_datasets([demos, tmp_path / "taken"])
    assert int(merged.columns[INTERVENED].sum()) == sum(int(s.episode.intervened_T.sum()) for s in found)  # type: ignore[union-attr]
    np.testing.assert_array_equal(merged.episode(len(demos_of(data))).intervened_T, found[0].episode.intervened_T)
    small = train(tmp_path / "small", base, merged, arena, env_steps=400, residual=replace(SMALL, scale=0.01))
    whole = train(tmp_path / "whole", base, merged, arena, env_steps=400, residual=replace(SMALL, scale=2.0))
    count = sum(int(s.episode.intervened_T.sum()) for s in found)  # type: ignore[union-attr]
    assert small["corrections"]["steps"] == whole["corrections"]["steps"] == count
    assert small["corrections"]["out_of_reach"] > 0.5
    assert whole["corrections"]["out_of_reach"] == 0.0
    assert "corrections lie out of the residual's reach" in capsys.readouterr().err
    assert train(tmp_path / "none", base, data, arena, env_steps=400)["corrections"] is None


def demos_of(data: EpisodeData) -> range:
    return range(data.num_episodes)


def test_a_residual_is_distilled_back_and_kept_only_where_it_is_surely_better(
    tmp_path: Path, base: BaseSource, arena: Arena, demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual = ResidualAgent(base, Worker(arena, base, SMALL)._policy)
    save_residual(residual.policy, base, tmp_path / "residual", {})
    long = open_arena(open_task("push_t", Simulation(), 150), 4)

    class Expert:
        """Succeeds, as a composed policy should."""

        def __init__(self) -> None:
            self.found = base_finder(long)("expert")

        def controller(self, num_slots: int, seed: int) -> Any:
            made = Worker(long, self.found, SMALL)._policy
            return ResidualController(self.found.open(num_slots, seed), Greedy(made), num_slots)

    monkeypatch.setattr(ResidualAgent, "controller", lambda self, slots, seed: Expert().controller(slots, seed))
    for better in (True, False):
        monkeypatch.setattr(
            evaluate_module,
            "evaluate",
            lambda agent, arena, scenes, *, seed, name, better=better: {
                "scenes": [{"success": x} for x in [(name == "new") is better] * 20 + [name != "base"] * 20]
            },
        )
        out = tmp_path / f"back-{better}"
        bc = DistillBackBCConfig(steps=4, batch_size=8, warmup_steps=1)
        chosen = DistillBackSettings(episodes=6, selection_scenes=4, bc=bc)
        results = back.distill_back(tmp_path / "residual", residual, [demos], out, chosen, long)
        assert results["kept"] is better
        wanted = out / "imitation" if better else Path(base.reference)
        assert folder_digest(out / "policy") == folder_digest(resolve_policy(wanted))
        rollouts = load_dataset(out / "rollouts")
        assert rollouts.num_episodes == 6
        assert min(rollouts.episodes["provenance/scene_seed"]) == 20_000
    with pytest.raises(UserError, match="holds no residual on a policy of this project"):
        back.distill_back(tmp_path / "x", PolicyAgent(base.policy), [demos], tmp_path / "bad", chosen, long)  # type: ignore[arg-type]
    long.env.close()


def test_residual_ppo_runs_resumes_and_leaves_something_that_acts(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--num-envs 4 --order-episodes 4 --selection-scenes 4 --select-every 200 --max-episode-steps 48"
    options += " --residual.width 8 --ppo.value.width 8 --ppo.minibatch 64"

    def run(out: Path, steps: int) -> None:
        words = ["residual ppo", "--policy", str(policy), "--out", str(out), "--env-steps", str(steps)]
        assert main([*words[0].split(), *words[1:], *options.split()]) == 0

    run(tmp_path / "whole", 800)
    with monkeypatch.context() as cut:
        cut.setattr("vla_rl.residual_ppo.ResidualPPO.update", killed_at(2))
        with pytest.raises(Cut):
            run(tmp_path / "again", 800)
    run(tmp_path / "again", 800)
    assert_same_weights(tmp_path / "whole" / "policy", tmp_path / "again" / "policy")
    assert read_json(tmp_path / "whole" / "results.json")["env_steps"] >= 800
    assert main(["eval", str(tmp_path / "whole"), "--episodes", "4", "--max-episode-steps", "48"]) == 0


def killed_at(number: int) -> Callable[..., Any]:
    """An update that does its work until its turn comes."""
    work, done = ResidualPPO.update, []

    def update(self: ResidualPPO, *arguments: Any) -> Any:
        done.append(1)
        if len(done) == number:
            raise Cut
        return work(self, *arguments)

    return update


def test_the_bench_says_what_a_step_costs(base: BaseSource, arena: Arena) -> None:
    found = bench_residual(
        base, arena, ResidualBenchSettings(updates=4, residual=SMALL, td3=ResidualTD3Config(batch_size=16))
    )
    assert sum(found["share_at_one_update_per_step"].values()) == pytest.approx(1.0)
    assert all(v > 0 for part in ("ms_per_env_step", "ms_per_update") for v in found[part].values())
    assert found["steps_per_hour_in_two_processes"] > found["steps_per_hour_in_one_process"]
    step, update = (sum(found[part].values()) for part in ("ms_per_env_step", "ms_per_update"))
    assert found["updates_per_step_where_two_processes_are_in_balance"] == pytest.approx(step / update)


def test_the_command_hands_its_orders_to_whom_it_was_told(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla_rl.cli import residual as command

    teams: list[list[str]] = []

    def train(*arguments: Any) -> dict[str, Any]:
        team = arguments[-1]()
        teams.append([type(hand).__name__ for hand in team.hands])
        team.close()
        names = ("base_selection_success", "selection_success", "selection_scenes", "env_steps", "best_env_steps")
        return dict.fromkeys(names, 0)

    monkeypatch.setattr(command, "train_residual", train)
    for actors in (("own",), ("process", "127.0.0.1:7001")):
        command.run(command.Config(policy=str(policy), out=tmp_path / "run", actors=actors))
    assert teams == [["OwnHand"], ["ChildHand", "RemoteHand"]]
