"""The processes of a measurement: each side of each pair is one of its own, in the Python and with the environment that it wants."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import real_robot
from vla_rl.runtime.errors import UserError

ROOT = Path(real_robot.__file__).resolve().parents[1]
START_S = 60.0
ANSWER_S = 120.0
END_S = 10.0
MASTER = "from rosmaster.main import rosmaster_main; rosmaster_main()"
# Fast DDS on this machine alone, with buffers in which a picture has room
PROFILE = """<?xml version="1.0" encoding="UTF-8" ?>
<profiles xmlns="http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles">
  <transport_descriptors>
    <transport_descriptor>
      <transport_id>loopback</transport_id><type>UDPv4</type>
      <sendBufferSize>4194304</sendBufferSize><receiveBufferSize>4194304</receiveBufferSize>
      <maxInitialPeersRange>40</maxInitialPeersRange>
      <interfaceWhiteList><address>127.0.0.1</address></interfaceWhiteList>
    </transport_descriptor>
    <transport_descriptor>
      <transport_id>shared</transport_id><type>SHM</type><segment_size>16777216</segment_size>
    </transport_descriptor>
  </transport_descriptors>
  <participant profile_name="loopback" is_default_profile="true">
    <rtps>
      <userTransports>{transports}</userTransports>
      <useBuiltinTransports>false</useBuiltinTransports>
      <sendSocketBufferSize>4194304</sendSocketBufferSize><listenSocketBufferSize>4194304</listenSocketBufferSize>
      <builtin>
        <initialPeersList><locator><udpv4><address>127.0.0.1</address></udpv4></locator></initialPeersList>
        <metatrafficUnicastLocatorList><locator><udpv4><address>127.0.0.1</address></udpv4></locator></metatrafficUnicastLocatorList>
      </builtin>
    </rtps>
  </participant>
</profiles>
"""
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


class SideError(UserError):
    """A process could not begin, or has ended, or says what is wrong."""


@dataclass(frozen=True)
class Side:
    """A client or an echo.

    module: bare or ours
    python: that runs it
    options: of the module, beside role, prefix and rates
    environment: what is added to this process's
    """

    module: Literal["bare", "ours"]
    python: str
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pair:
    """A client and its echo.

    name: of what the client uses
    echo: name of what the echo is
    """

    name: str
    echo: str
    client_side: Side
    echo_side: Side


class Process:
    """A side that runs; a line of JSON is asked, a line is answered."""

    def __init__(self, side: Side, role: str, prefix: str, hz: Mapping[str, float]) -> None:
        asked = {"role": role, "prefix": prefix, "hz": dict(hz), **side.options}
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | dict(side.environment)
        environment["PYTHONPATH"] = f"{ROOT}:{inherited}" if inherited else str(ROOT)
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in ``end``
        self._rest = b""
        try:
            self._popen = subprocess.Popen(
                [side.python, "-m", f"real_robot.round_trip.{side.module}", json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=environment,
            )
        except OSError as error:
            self._complaints.close()
            raise SideError(f"cannot run {side.python}: {error.strerror}") from error

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """Have something done and return the answer; raises SideError."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ``answer`` says why
            self._popen.stdin.write(json.dumps(dict(what)).encode() + b"\n")
            self._popen.stdin.flush()
        return self.answer(ANSWER_S)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line; raises SideError where it says what is wrong, or none comes."""
        assert self._popen.stdout is not None
        until_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._popen.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, until_s - time.monotonic())):
                    raise SideError(f"no answer within {timeout_s:g} s; {self._complaint()}")
                read = os.read(self._popen.stdout.fileno(), 2**20)
                if not read:
                    raise SideError(f"it has ended: {self._complaint()}")
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        told = json.loads(line)
        if "error" in told:
            raise SideError(told["error"])
        return told

    def _complaint(self) -> str:
        """The last line that it wrote to standard error."""
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return " ".join(lines[-1].split()) if lines else "it said nothing"

    def end(self) -> None:
        """Let it leave; end it if it does not."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()
        self._complaints.close()


@contextlib.contextmanager
def running(pair: Pair, prefix: str, hz: Mapping[str, float]) -> Iterator[Process]:
    """The client of a pair, which has its echo; raises SideError where one of them cannot begin."""
    with contextlib.ExitStack() as stack:
        echo = Process(pair.echo_side, "echo", prefix, hz)
        stack.callback(echo.end)
        client = Process(pair.client_side, "client", prefix, hz)
        stack.callback(client.end)
        echo.answer(START_S)
        client.answer(START_S)
        yield client


def ros2_environment(domain: int, folder: Path, *, shared_memory: bool = False) -> dict[str, str] | None:
    """What a process of ROS 2 has set beside what is set here already; None where that leaves shared memory no say.

    Args:
        domain: that it joins.
        folder: for a profile of Fast DDS, unless one is set here.
        shared_memory: between the processes of this machine too, as Fast DDS has it of itself; else UDP alone.
    """
    given = {"ROS_DOMAIN_ID": str(domain)}
    if any(name in os.environ for name in (*PROFILE_VARIABLES, "RMW_IMPLEMENTATION")):
        return None if shared_memory else given
    transports = [*(["shared"] if shared_memory else []), "loopback"]
    profile = folder / f"{transports[0]}.xml"
    profile.write_text(
        PROFILE.format(transports="".join(f"<transport_id>{name}</transport_id>" for name in transports))
    )
    given |= dict.fromkeys(PROFILE_VARIABLES, str(profile))
    return given | {"RMW_IMPLEMENTATION": "rmw_fastrtps_cpp", "ROS_AUTOMATIC_DISCOVERY_RANGE": "SYSTEM_DEFAULT"}


@contextlib.contextmanager
def ros1_environment(python: str, folder: Path) -> Iterator[dict[str, str]]:
    """What a process of ROS 1 has set; there is a master while the block lasts. Raises SideError where none can be had."""
    given = {"ROS_HOME": str(folder), "ROS_IP": os.environ.get("ROS_IP", "127.0.0.1")}
    if "ROS_MASTER_URI" in os.environ:
        yield given
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given["ROS_MASTER_URI"] = f"http://127.0.0.1:{port}"
    with (folder / "master.log").open("wb") as log:
        try:
            master = subprocess.Popen(
                [python, "-c", MASTER, "--core", "-p", str(port)], env=os.environ | given, stdout=log, stderr=log
            )
        except OSError as error:
            raise SideError(f"cannot run {python}: {error.strerror}") from error
        try:
            _await(port, master, folder / "master.log")
            yield given
        finally:
            master.terminate()
            master.wait()


def _await(port: int, master: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and master.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.05)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise SideError(f"the master of ROS 1 does not begin: {lines[-1] if lines else 'it said nothing'}")
