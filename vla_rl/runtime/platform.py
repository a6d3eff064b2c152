"""Settings of the process that must be made before torch or MuJoCo are used: threads, OpenGL, hub access."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def set_single_thread() -> None:
    """Use one compute thread in this process and its children.

    Two threads under contention were 2-12 times slower for small nets (design.md); more cores are used by more
    processes. A user's own setting of a variable is kept.
    """
    for name in _THREAD_VARIABLES:
        os.environ.setdefault(name, "1")
    _avoid_avx512()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def keep_freed_memory() -> None:
    """Have glibc keep the memory of tensors that are freed: giving it back and getting it anew, page by page, costs small nets a third.

    A user's own setting of a variable is kept; other C libraries are left alone.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    library = ctypes.CDLL(None)
    there = hasattr(library, "gnu_get_libc_version")
    if there and library.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20):  # an old one refuses: then all stays as it is
        library.mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


def _avoid_avx512() -> None:
    """Have OpenBLAS use its AVX2 kernels where it would use AVX-512 ones.

    Not once numpy is loaded: its OpenBLAS and SciPy's would then run different kernels, and robosuite's controller uses both.

    For the 3 x 3 to 7 x 7 matrices of a robot's controller they cost less (a simulated step of robosuite's lift takes 7 % less time), and
    machines with and without AVX-512 come to the same bits.
    """
    if "numpy" in sys.modules:
        return
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if " avx512f" in flags and " avx2" in flags:
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


def set_offline() -> None:
    """Keep Hugging Face libraries from asking a hub: nothing is downloaded at set-up, demo or test time."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def choose_gl_backend() -> str | None:
    """Set ``MUJOCO_GL`` to an off-screen back-end whose library is there, unless the user has set it.

    Returns:
        The back-end in force, or None if no OpenGL library was found.
    """
    if "MUJOCO_GL" not in os.environ:
        for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
            if ctypes.util.find_library(library):
                os.environ["MUJOCO_GL"] = backend
                os.environ.setdefault("PYOPENGL_PLATFORM", backend)
                break
    return os.environ.get("MUJOCO_GL")
