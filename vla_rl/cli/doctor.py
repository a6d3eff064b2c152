"""Say what works on this machine (OpenGL, GPU, ROS, threads) and how to get the rest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console

from vla_rl.cli.common import CommandConfig
from vla_rl.pipeline import versions

EXAMPLE = "vla-rl doctor --json doctor.json"
GL_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl doctor``."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis; ``cure`` says how to get what is missing."""

    name: str
    works: bool
    found: str
    cure: str = ""


_RENDER_ONE_FRAME = """
import mujoco, os
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 64, 64)
renderer.update_scene(data)
os._exit(0 if renderer.render().any() else 1)
"""


def gl_check(backend: str, package: str) -> Check:
    """Whether MuJoCo renders with a back-end; tried in a process of its own, since a broken driver may crash it."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    command = [sys.executable, "-c", _RENDER_ONE_FRAME]
    try:
        works = (
            subprocess.run(command, env=environment, capture_output=True, timeout=GL_TIMEOUT_S, check=False).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        works = False
    return Check(
        f"rendering by {backend}", works, "renders" if works else "does not render", f"apt-get install {package}"
    )


def checks() -> list[Check]:
    """All checks of this machine."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = psutil.virtual_memory().total / 2**30
    free_gib = shutil.disk_usage(os.getcwd()).free / 2**30
    cuda = torch.cuda.is_available()
    ros = importlib.util.find_spec("rclpy") is not None
    dds = importlib.util.find_spec("cyclonedds") is not None
    return [
        Check("cores", cores >= 2, f"{cores}", "two or more are wanted: simulation and learning run side by side"),
        Check("memory", memory_gib >= 4, f"{memory_gib:.0f} GiB", "4 GiB or more are wanted"),
        Check("disk", free_gib >= 2, f"{free_gib:.0f} GiB free here", "free 2 GiB or more"),
        Check(
            "threads per process",
            torch.get_num_threads() == 1,
            f"{torch.get_num_threads()}",
            "unset OMP_NUM_THREADS: more threads than one are slower for small nets, more cores are used by more processes",
        ),
        gl_check("egl", "libegl1 libgl1-mesa-dri libopengl0"),
        gl_check("osmesa", "libosmesa6"),
        Check(
            "GPU",
            cuda,
            torch.cuda.get_device_name(0) if cuda else "none: everything runs on the CPU",
            "optional; an NVIDIA driver is enough, torch brings the rest",
        ),
        Check(
            "ROS 2 (rclpy)",
            ros,
            "importable" if ros else "not here",
            "optional; source a ROS 2 installation before starting Python",
        ),
        Check(
            "DDS without ROS (cyclonedds)",
            dds,
            "importable" if dds else "not here",
            "optional; comes with the ROS bridge",
        ),
    ]


def run(config: Config) -> dict[str, Any]:
    """Print the diagnosis and return it."""
    console = Console(highlight=False, soft_wrap=True)
    found = checks()
    for check in found:
        mark = "[green]ok[/]     " if check.works else "[yellow]missing[/]"
        console.print(f"{mark} {check.name}: {check.found}" + ("" if check.works else f" -- {check.cure}"))
    renders = any(c.works for c in found if c.name.startswith("rendering"))
    if not renders:
        console.print("[red]no off-screen rendering: training and evaluation work, videos do not[/]")
    console.print("versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    return {"checks": [vars(c) for c in found], "rendering": renders, "versions": versions()}
