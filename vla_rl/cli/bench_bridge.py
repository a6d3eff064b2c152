"""Measure how long a message takes there and back through each transport, and what it costs, against bare rclpy in the same run.

Each side is a process of its own. Rounds alternate between the transports, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import typing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from real_robot.round_trip.rows import Tally, with_ratios
from real_robot.round_trip.sides import Pair, Process, Side, SideError, ros1_environment, ros2_environment, running
from real_robot.round_trip.stopwatch import JOIN_S, KINDS, Kind
from vla_rl.cli.common import CommandConfig
from vla_rl.runtime.errors import UserError

EXAMPLE = "vla-rl bench bridge --ros-python ~/kilted/bin/python --messages 300 --json results/bridge.json"
BARE, BARE_ROS1 = "bare rclpy", "bare rospy"
DDS_LIMIT = 2.0  # times bare rclpy's median, which dds has to keep
Choice = Literal["dds", "rclpy", "rosbridge", "ros1"]


def _from_environment(name: str) -> Any:
    return field(default_factory=lambda: os.environ.get(name))


def _server(ros: str) -> Any:
    return field(
        default_factory=lambda: os.environ.get("ROSBRIDGE_URL") if os.environ.get("ROSBRIDGE_ROS", "2") == ros else None
    )


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl bench bridge``.

    transports: that are measured
    messages: measured, of each kind through each transport
    rounds: into which they are divided; the transports take turns in each
    rate: joint states per second
    image_rate: pictures per second
    domain: of ROS 2, in which all meet (none: ROS_DOMAIN_ID, or 0)
    ros_python: Python with rclpy, of scripts/ros_peers.sh or a sourced ROS 2 (none: VLA_RL_ROS_PYTHON; without it rclpy is left out)
    ros1_python: Python with rospy (none: VLA_RL_ROS1_PYTHON); a master is started unless ROS_MASTER_URI names one
    rosbridge: URL of a rosbridge server of ROS 2, in the same domain (none: ROSBRIDGE_URL, where ROSBRIDGE_ROS is not 1)
    rosbridge_ros1: URL of a rosbridge server of ROS 1, at the master of ROS_MASTER_URI (none: ROSBRIDGE_URL, where ROSBRIDGE_ROS is 1)
    """

    transports: tuple[Choice, ...] = typing.get_args(Choice)
    messages: int = 200
    rounds: int = 10
    rate: float = 50.0
    image_rate: float = 20.0
    domain: int | None = None
    ros_python: str | None = _from_environment("VLA_RL_ROS_PYTHON")
    ros1_python: str | None = _from_environment("VLA_RL_ROS1_PYTHON")
    rosbridge: str | None = _server("2")
    rosbridge_ros1: str | None = _server("1")

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.messages:
            raise ValueError(f"rounds wants 1 to messages, got {self.rounds} of {self.messages} messages")
        if not (0 < self.rate <= 1000 and 0 < self.image_rate <= 1000):
            raise ValueError(f"rate and image_rate want 0 to 1000 Hz, got {self.rate:g} and {self.image_rate:g}")
        if self.domain is not None and not 0 <= self.domain <= 232:
            raise ValueError(f"domain wants 0 to 232, got {self.domain}")
        if not self.transports:
            raise ValueError("transports wants at least one")

    @property
    def domain_id(self) -> int:
        """In which all meet."""
        return int(os.environ.get("ROS_DOMAIN_ID", 0)) if self.domain is None else self.domain

    def hz(self, kind: Kind) -> float:
        """Messages of a kind per second."""
        return self.image_rate if kind.height else self.rate


class Plan:
    """Pairs that are measured, and those that are not, with the reason."""

    def __init__(self, config: Config, folder: Path, stack: ExitStack) -> None:
        self.pairs: list[Pair] = []
        self.left_out: list[dict[str, str]] = []
        self._config, self._folder = config, folder
        wanted = config.transports
        self._plain2 = self._plain_ros2()
        self._plain1 = self._plain_ros1(stack) if {"ros1", "rosbridge"} & set(wanted) else None
        if self._plain2 is not None:
            self.pairs.append(Pair(BARE, BARE, self._plain2, self._plain2))
            self._add_shared_memory()
        else:
            self.leave_out(BARE, "option ros_python names no Python with rclpy")
        for name in wanted:
            getattr(self, f"_add_{name}")()

    def leave_out(self, name: str, why: str) -> None:
        """Note what is not measured."""
        self.left_out.append({"transport": name, "why": why})

    def _plain_ros2(self) -> Side | None:
        if self._config.ros_python is None:
            return None
        environment = ros2_environment(self._config.domain_id, self._folder)
        assert environment is not None
        return Side("bare", self._config.ros_python, {"ros": 2}, environment)

    def _plain_ros1(self, stack: ExitStack) -> Side | None:
        python = self._config.ros1_python
        if python is None:
            return None
        try:
            environment = stack.enter_context(ros1_environment(python, self._folder))
        except SideError as why:
            self.leave_out(BARE_ROS1, str(why))
            return None
        return Side("bare", python, {"ros": 1}, environment)

    def _add_shared_memory(self) -> None:
        environment = ros2_environment(self._config.domain_id, self._folder, shared_memory=True)
        if environment is not None and self._config.ros_python is not None:
            side = Side("bare", self._config.ros_python, {"ros": 2}, environment)
            self.pairs.append(Pair(f"{BARE}, shared memory", BARE, side, side))

    def _add_dds(self) -> None:
        side = Side("ours", sys.executable, {"transport": {"type": "dds", "domain": self._config.domain_id}})
        if self._plain2 is not None:
            self.pairs.append(Pair("dds", BARE, side, self._plain2))
        self.pairs.append(Pair("dds", "dds", side, side))

    def _add_rclpy(self) -> None:
        plain = self._plain2
        if plain is None:
            self.leave_out("rclpy", "option ros_python names no Python with rclpy")
            return
        side = Side("ours", plain.python, {"transport": {"type": "rclpy"}}, plain.environment)
        self.pairs.append(Pair("rclpy", BARE, side, plain))

    def _add_ros1(self) -> None:
        plain = self._plain1
        if plain is None:
            if self._config.ros1_python is None:
                self.leave_out("ros1", "option ros1_python names no Python with rospy")
            return
        self.pairs.append(Pair(BARE_ROS1, BARE_ROS1, plain, plain))
        side = Side("ours", plain.python, {"transport": {"type": "ros1"}}, plain.environment)
        self.pairs.append(Pair("ros1", BARE_ROS1, side, plain))

    def _add_rosbridge(self) -> None:
        config = self._config
        if config.rosbridge is None and config.rosbridge_ros1 is None:
            self.leave_out("rosbridge", "options rosbridge and rosbridge_ros1 name no server")
        self._add_server(2, config.rosbridge, self._plain2, "ros_python")
        self._add_server(1, config.rosbridge_ros1, self._plain1, "ros1_python")

    def _add_server(self, ros: int, url: str | None, plain: Side | None, option: str) -> None:
        if url is None:
            return
        if plain is None:
            self.leave_out(f"rosbridge of ROS {ros}", f"its echo is a plain node, which wants option {option}")
            return
        if ros == 1 and "ROS_MASTER_URI" not in os.environ:
            self.leave_out("rosbridge of ROS 1", "ROS_MASTER_URI does not name the master that its server is at")
            return
        for encoding in ("json", "cbor"):
            transport = {"type": "rosbridge", "url": url, "ros": ros, "encoding": encoding}
            side = Side("ours", sys.executable, {"transport": transport})
            echo = BARE if ros == 2 else BARE_ROS1
            self.pairs.append(Pair(f"rosbridge {encoding}, ROS {ros}", echo, side, plain))


def run(config: Config) -> dict[str, Any]:
    """Measure, print and return the rows, and what was left out and why."""
    hz = {kind.name: config.hz(kind) for kind in KINDS.values()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = Plan(config, folder, stack)
        clients = dict(_begin(plan, hz, stack))
        tallies = _measure(config, plan, clients)
    rows = with_ratios([tally for tally in tallies if tally.sent], BARE)
    if not rows:
        raise UserError(f"nothing was measured: {plan.left_out[0]['transport']}: {plan.left_out[0]['why']}")
    _show(rows)
    for one in plan.left_out:
        print(f"left out: {one['transport']}: {one['why']}")
    results = {"rows": rows, "left_out": plan.left_out, "messages": config.messages, "rounds": config.rounds}
    return results | _judge(rows)


def _begin(plan: Plan, hz: Mapping[str, float], stack: ExitStack) -> Iterator[tuple[Pair, Process]]:
    """Start all pairs; those that cannot begin are left out. Topics have names of this run, so that no other's messages come in."""
    run_name = secrets.token_hex(4)
    for number, pair in enumerate(plan.pairs):
        try:
            yield pair, stack.enter_context(running(pair, f"/bridge_{run_name}/pair_{number}", hz))
        except SideError as why:
            plan.leave_out(_title(pair), str(why))


def _title(pair: Pair) -> str:
    return f"{pair.name} to {pair.echo}"


def _measure(config: Config, plan: Plan, clients: Mapping[Pair, Process]) -> list[Tally]:
    tallies: dict[tuple[str, Pair], Tally] = {}
    for kind in KINDS.values():
        for pair, client in clients.items():
            if _ask(plan, pair, client, {"do": "join", "kind": kind.name}, kind).get("joined"):
                tallies[kind.name, pair] = Tally(pair.name, pair.echo, kind.name, config.hz(kind))
    order = list(tallies)
    for number in tqdm(range(config.rounds), "rounds", mininterval=1 if sys.stderr.isatty() else 30):
        share = config.messages // config.rounds + (number < config.messages % config.rounds)
        for key in order if number % 2 == 0 else reversed(order):
            kind, pair = KINDS[key[0]], key[1]
            asked = {"do": "measure", "kind": kind.name, "count": share, "hz": config.hz(kind)}
            burst = _ask(plan, pair, clients[pair], asked, kind)
            if burst:
                tallies[key].add(burst)
        order = [key for key in order if len(tallies[key].medians_s) == number + 1]  # the others have ended
    return list(tallies.values())


def _ask(plan: Plan, pair: Pair, client: Process, asked: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The answer; none where the pair has to be left out."""
    try:
        answer = client.ask(asked)
    except SideError as why:
        plan.leave_out(f"{_title(pair)}, {kind.name}", str(why))
        return {}
    if answer.get("joined") is False:
        plan.leave_out(f"{_title(pair)}, {kind.name}", f"its messages did not come back within {JOIN_S:g} s")
    return answer


def _show(rows: list[dict[str, Any]]) -> None:
    columns = (
        "message",
        "transport",
        "echo",
        "n",
        "lost",
        "median, ms",
        "p99, ms",
        "CPU, ms",
        "median / bare",
        "CPU / bare",
    )
    table = Table(*columns)
    for kind in KINDS:
        for row in (row for row in rows if row["kind"] == kind):
            numbers = [row[key] for key in ("median_ms", "p99_ms", "cpu_ms", "median_ratio", "cpu_ratio")]
            counts = [str(row["n"]), str(row["lost"] + row["wrong"])]
            table.add_row(
                kind, row["transport"], row["echo"], *counts, *("none" if x is None else f"{x:.2f}" for x in numbers)
            )
        table.add_section()
    Console(width=140).print(table)
    wrong = sum(row["wrong"] for row in rows)
    if wrong:
        print(f"{wrong} messages came back with another content than they were sent with; they count as lost")


def _judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether dds keeps to its limit against bare rclpy, where both were measured."""
    ratios = [
        (row["median_ratio"], row) for row in rows if row["transport"] == "dds" and row["median_ratio"] is not None
    ]
    if not ratios:
        return {"dds_largest_ratio": None, "dds_within_limit": None}
    worst, row = max(ratios, key=lambda pair: pair[0])
    verdict = "within" if worst <= DDS_LIMIT else "beyond"
    print(
        f"dds takes at most {worst:.2f} times bare rclpy's median ({row['kind']}, echo {row['echo']}), {verdict} the {DDS_LIMIT:g} wanted"
    )
    return {"dds_largest_ratio": worst, "dds_within_limit": worst <= DDS_LIMIT}
