"""C and Fortran functions by their symbol, callable from numba code that holds no GIL: MuJoCo's, and LAPACK's through SciPy.

``ExternalFunction`` keeps a symbol's name, not its address, so code compiled with it can be cached on disk. Everything is passed by
address: models and data (``model._address``), arrays (``array.ctypes.data``), and in LAPACK scalars too. MuJoCo's errors (out of
memory, a malformed model) end the process here, since its Python bindings, which turn them into exceptions, are not in between.
"""

# ruff: noqa: N816 (the functions keep their C names)
from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite.binding
import mujoco
from numba import types
from numba.extending import get_cython_function_address

_LIBRARIES = [p for p in Path(mujoco.__file__).parent.iterdir() if p.name.startswith(("libmujoco", "mujoco.dll"))]
if len(_LIBRARIES) != 1:
    raise ImportError(f"expected one MuJoCo library beside {mujoco.__file__}, found {[p.name for p in _LIBRARIES]}")
llvmlite.binding.load_library_permanently(str(_LIBRARIES[0]))


def source_of(*modules: ModuleType) -> str:
    """The text of modules, for compiled functions to close over.

    Numba's disk cache follows a function's own file only, and would keep machine code of what it calls in other files; what it closes
    over is part of the cache's key.
    """
    return "".join(Path(inspect.getfile(module)).read_text() for module in modules)


def _stage(name: str) -> Callable[..., Any]:
    return types.ExternalFunction(name, types.void(types.uintp, types.uintp))


def _lapack(name: str, arguments: int) -> Callable[..., Any]:
    symbol = f"vla_rl_{name}"
    llvmlite.binding.add_symbol(symbol, get_cython_function_address("scipy.linalg.cython_lapack", name))
    return types.ExternalFunction(symbol, types.void(*[types.uintp] * arguments))


# (mjModel*, mjData*): the parts of mj_step, in their order
mj_checkPos = _stage("mj_checkPos")
mj_checkVel = _stage("mj_checkVel")
mj_kinematics = _stage("mj_kinematics")
mj_comPos = _stage("mj_comPos")
mj_camlight = _stage("mj_camlight")
mj_flex = _stage("mj_flex")
mj_tendon = _stage("mj_tendon")
mj_makeM = _stage("mj_makeM")
mj_factorM = _stage("mj_factorM")
mj_collision = _stage("mj_collision")
mj_makeConstraint = _stage("mj_makeConstraint")
mj_island = _stage("mj_island")
mj_transmission = _stage("mj_transmission")
mj_projectConstraint = _stage("mj_projectConstraint")
mj_sensorPos = _stage("mj_sensorPos")
mj_fwdVelocity = _stage("mj_fwdVelocity")
mj_sensorVel = _stage("mj_sensorVel")
mj_fwdActuation = _stage("mj_fwdActuation")
mj_fwdAcceleration = _stage("mj_fwdAcceleration")
mj_fwdConstraint = _stage("mj_fwdConstraint")
mj_sensorAcc = _stage("mj_sensorAcc")
mj_checkAcc = _stage("mj_checkAcc")
mj_Euler = _stage("mj_Euler")
mj_implicit = _stage("mj_implicit")
# (mjModel*, mjData*, double* jacp (3, nv), double* jacr (3, nv), int site)
mj_jacSite: Callable[..., Any] = types.ExternalFunction(
    "mj_jacSite", types.void(types.uintp, types.uintp, types.uintp, types.uintp, types.int32)
)
# (mjModel*, mjData*, int geom1, int geom2, double distmax, double* fromto (6,)) -> double
mj_geomDistance: Callable[..., Any] = types.ExternalFunction(
    "mj_geomDistance", types.float64(types.uintp, types.uintp, types.int32, types.int32, types.float64, types.uintp)
)

dgebd2 = _lapack("dgebd2", 10)  # m, n, a, lda, d, e, tauq, taup, work, info
dbdsqr = _lapack("dbdsqr", 15)  # uplo, n, ncvt, nru, ncc, d, e, vt, ldvt, u, ldu, c, ldc, work, info
dorm2r = _lapack("dorm2r", 12)  # side, trans, m, n, k, a, lda, tau, c, ldc, work, info
dorml2 = _lapack("dorml2", 12)
