"""Real ROS software as the other side of tests: environments, and processes on loopback that are gone when their block ends.

sys.path.insert(0, str(Path(__file__).parent / "ros"))
from peers import free_domain, start_arm

with free_domain() as domain, start_arm("kilted", domain) as arm: ...
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SCRIPT = ROOT / "scripts" / "ros_peers.sh"
CACHE = Path(tempfile.gettempdir()) / f"vla-rl-ros-{os.getuid()}"
DEBIAN_PYTHON = "/usr/bin/python3"
UNAVAILABLE = 69  # exit code of the script
SETUP_S = 280.0
CHECKS_S = 240.0
START_S = 30.0
END_S = 5.0
DOMAINS = range(1, 100)  # above 101 the ports of a domain may collide with ephemeral ones


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@functools.cache
def ros_environment(distro: str) -> Path:
    """Python of an environment with ``kilted``, ``jazzy`` or ``ros1``, made if there is none; the test is skipped where it cannot be had.

    It is kept in the system's folder for temporary files under a name that changes with what is in it, and is shared by processes.
    """
    content = SCRIPT.read_bytes() + str(ROOT).encode()
    lock = HERE / f"{distro}.lock"
    if lock.exists():
        content += lock.read_bytes()
    target = CACHE / f"{distro}-{hashlib.sha256(content).hexdigest()[:12]}"
    with _locked(CACHE / f"{distro}.making"):
        if not (target / ".ready").exists():
            done = subprocess.run(
                ["bash", str(SCRIPT), distro, str(target)],
                capture_output=True,
                text=True,
                check=False,
                timeout=SETUP_S,
                env=_own_environment(),
            )
            if done.returncode == UNAVAILABLE:
                pytest.skip(done.stderr.strip().splitlines()[-1])
            assert done.returncode == 0, done.stderr
    return target / "bin" / "python"


@functools.cache
def action_package(distro: str) -> Path:
    """A folder with the package ``peer_interfaces``, built for an environment; the test is skipped where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("ROS 2's wheels bring no action type, and to make one g++ is wanted, which is not here")
    python = ros_environment(distro)
    sources = [HERE / "build_action.py", HERE / "action" / "Move.idl"]
    content = b"".join(path.read_bytes() for path in sources) + str(python).encode()
    target = CACHE / f"action-{hashlib.sha256(content).hexdigest()[:12]}"
    with _locked(CACHE / "action.making"):
        if not (target / ".ready").exists():
            argv = [str(python), str(sources[0]), str(target)]
            done = subprocess.run(argv, capture_output=True, text=True, check=False, env=_own_environment())
            assert done.returncode == 0, done.stderr
            (target / ".ready").touch()
    return target


def _own_environment() -> dict[str, str]:
    """This process's environment without what a sourced ROS or a test runner has put there."""
    ours = (
        "ROS",
        "_ROS",
        "AMENT",
        "FASTDDS",
        "FASTRTPS",
        "RMW",
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "PYTEST_",
    )
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def loopback_environment(distro: str, domain: int) -> dict[str, str]:
    """A whole environment for a process of ROS 2 that sees and is seen by this machine alone."""
    profiles = "FASTDDS_DEFAULT_PROFILES_FILE" if distro == "kilted" else "FASTRTPS_DEFAULT_PROFILES_FILE"
    return _own_environment() | {
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SYSTEM_DEFAULT",  # the profile decides
        profiles: str(HERE / "fastdds.xml"),
        "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
        "ROS_LOG_DIR": str(CACHE / "log"),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def with_action(distro: str, environment: dict[str, str]) -> dict[str, str]:
    """An environment in which ``peer_interfaces`` can be imported."""
    folder = str(action_package(distro))
    return environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}:{folder}", "LD_LIBRARY_PATH": folder}


@contextlib.contextmanager
def free_domain() -> Iterator[int]:
    """A ROS domain id that no other test process of this machine holds."""
    for domain in DOMAINS:
        with _locked(CACHE / f"domain-{domain}.held", wait=False) as held:
            if held:
                yield domain
                return
    raise RuntimeError(f"all domains {DOMAINS} are held")


@functools.cache
def _may_unshare(*options: str) -> bool:
    try:
        return subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def in_loopback_namespace(argv: list[str]) -> list[str]:
    """The command as it runs in a network of its own that has loopback alone, where the system lets us; else as it is."""
    for options in (["-n"], ["-rn"]):
        if _may_unshare(*options):
            return ["unshare", *options, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *argv]
    return argv


class Process:
    """A process of somebody else; ``lines`` is what it has printed so far."""

    def __init__(self, argv: list[str], environment: dict[str, str], folder: Path | None = None) -> None:
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            argv, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_for(self, text: str, timeout_s: float = START_S) -> None:
        """Read its output until a line contains the text."""
        assert self.popen.stdout is not None
        until_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.popen.stdout, selectors.EVENT_READ)
            rest = ""
            while time.monotonic() < until_s:
                if not selector.select(0.1):
                    continue
                read = os.read(self.popen.stdout.fileno(), 65536).decode(errors="replace")
                *lines, rest = (rest + read).split("\n")
                self.lines += lines
                if any(text in line for line in lines):
                    return
                if not read:
                    break
        raise AssertionError(f"no line with {text!r} from {self.popen.args}: {[*self.lines[-20:], rest]}")

    def kill(self) -> None:
        """End it and its children at once, as a crash would (kill -9)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def end(self) -> None:
        """Ask it to end, and end it if it does not."""
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(END_S)
        self.kill()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


@contextlib.contextmanager
def start(
    argv: list[str], environment: dict[str, str], *, ready: str = "", timeout_s: float = START_S
) -> Iterator[Process]:
    """A process that has printed ``ready``, if given; it is gone when the block ends."""
    process = Process(argv, environment)
    try:
        if ready:
            process.wait_for(ready, timeout_s)
        yield process
    finally:
        process.end()


def ros1_environment(port: int = 11311) -> dict[str, str]:
    """A whole environment for a process of ROS 1 on loopback."""
    return _own_environment() | {
        "ROS_MASTER_URI": f"http://127.0.0.1:{port}",
        "ROS_IP": "127.0.0.1",
        "ROS_HOME": str(CACHE / "ros1-home"),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def start_ros1_master() -> Iterator[dict[str, str]]:
    """A master of ROS 1 on loopback; gives the environment of those who use it."""
    ros_environment("ros1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = ros1_environment(port)
    # Debian's programs name no interpreter of their own: another Python that comes first in PATH has no rospy
    with start([DEBIAN_PYTHON, "/usr/bin/rosmaster", "--core", "-p", str(port)], environment):
        until_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            assert time.monotonic() < until_s, "the master of ROS 1 does not listen"
            time.sleep(0.05)
        yield environment


@contextlib.contextmanager
def start_ros1_echo(environment: dict[str, str]) -> Iterator[Process]:
    """``ros1_node.py`` on Debian's rospy; see there for its topics."""
    with start([DEBIAN_PYTHON, str(HERE / "ros1_node.py")], environment, ready="ready") as process:
        yield process


@contextlib.contextmanager
def start_ros1_chain(environment: dict[str, str], urdf: str) -> Iterator[None]:
    """Debian's joint_state_publisher, which takes /joint_commands (50 Hz), and robot_state_publisher, which makes /tf of what it sends."""
    with xmlrpc.client.ServerProxy(environment["ROS_MASTER_URI"]) as master:
        master.setParam("/peers", "/robot_description", urdf)
    states, frames = "/usr/lib/joint_state_publisher", "/usr/lib/robot_state_publisher"
    source = [DEBIAN_PYTHON, f"{states}/joint_state_publisher", "_rate:=50", "_source_list:=[/joint_commands]"]
    with start(source, environment), start([f"{frames}/robot_state_publisher"], environment):
        yield


@contextlib.contextmanager
def start_arm(distro: str, domain: int, *arguments: str) -> Iterator[Process]:
    """``arm_node.py`` on real rclpy; see there for its topics and arguments. ``kill()`` it to play a crash."""
    argv = [str(ros_environment(distro)), str(HERE / "arm_node.py"), *arguments]
    environment = loopback_environment(distro, domain)
    if "--action" in arguments:
        environment = with_action(distro, environment)
    with start(argv, environment, ready="ready") as process:
        yield process


Outcome = tuple[list[str], list[tuple[str, str]]]  # what went wrong, and numbers that were measured


def names_of(checks: Path) -> list[str]:
    """The checks in a file."""
    return re.findall(r"^def (test_\w+)", checks.read_text(), re.MULTILINE)


def run_checks(checks: Path, distro: str, environment: dict[str, str], which: str = "") -> dict[str, Outcome]:
    """Run a file of checks with the environment's own Python and, where the system lets us, in a network of its own.

    ROS cannot be imported where this runs, but pytest and our packages can be where ROS is. ``which`` is as pytest's -k.
    """
    record = CACHE / f"checks-{os.getpid()}.xml"
    record.unlink(missing_ok=True)
    argv = [
        str(ros_environment(distro)),
        "-m",
        "pytest",
        str(checks),
        "-q",
        "--noconftest",
        f"--junitxml={record}",
        "-k",
        which,
    ]
    argv += [
        "-c",
        "/dev/null",
        "--rootdir",
        str(HERE),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "markers=expected",
    ]
    done = subprocess.run(
        in_loopback_namespace(argv),
        env=environment | {"PEER_DISTRO": distro},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHECKS_S,
    )
    assert record.exists(), done.stdout + done.stderr
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(record).iter("testcase"):
        wrong, numbers = found.setdefault(case.get("name", "").partition("[")[0], ([], []))
        numbers += [(part.get("name", ""), part.get("value", "")) for part in case.iter("property")]
        wrong += [part.text or "" for part in case if part.tag in ("failure", "error", "skipped")]
    record.unlink()
    return found
