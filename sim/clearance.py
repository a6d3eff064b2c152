"""Collision tests that cannot find a contact are left out, with proof, so that not one bit of the physics changes.

Half of a substep of robosuite's Panda goes into mesh-against-mesh tests of links that are near one another and never touch. For two
convex meshes A and B and a unit vector n fixed to A, let g be the gap between them along n, from the vertices:

    g = min_B n.v - max_A n.v

While g > 0 the plane between them separates them. Once measured, it is known from the motion of B in A's frame alone to be at least

    g0 + n.(p - p0) - r_B |R^T n - R0^T n|

for position p, rotation R and radius r_B of B. While that stays positive the pair's entry among the model's contact exclusions holds;
otherwise the gap is measured anew, along the line between the nearest points, and a pair that is close is left to MuJoCo. The entries
are compiled into the model with ``with_exclusions``; outside a control step they carry a signature that fits no pair.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import NamedTuple

import mujoco
import numba
import numpy as np

from sim.native import mj_geomDistance

SAFETY_M = 5e-5  # above MuJoCo's collision tolerance (1e-6 m)
NEAR_M = 0.1  # meshes that are farther apart at the start are seldom tested
RECHECK_SUBSTEPS = 20  # how long a pair that is close is left to MuJoCo before it is measured again
NO_PAIR = 0  # the signature of the world with itself, which MuJoCo never tests


class Clearances(NamedTuple):
    """P pairs of meshes, each the only colliding geom of its body, and the plane that was last found between them."""

    exclude_signature: np.ndarray  # of the model, (nexclude,) uint32
    slot_P: np.ndarray  # index into exclude_signature
    signature_P: np.ndarray  # what makes the slot exclude the pair
    geoms_P2: np.ndarray
    vertices_P4: np.ndarray  # first vertex and number of vertices of A, of B
    radius_P: np.ndarray  # of B about its own origin, m
    vertices_V3: np.ndarray  # of all meshes
    geom_xpos: np.ndarray
    geom_xmat: np.ndarray
    gap_P: np.ndarray  # when measured, m
    normal_P3: np.ndarray  # in A's frame
    normal_B_P3: np.ndarray  # in B's frame when measured
    offset_P: np.ndarray  # n.p when measured, m
    wait_P: np.ndarray  # substeps to leave a close pair alone
    fromto_6: np.ndarray  # scratch


def _only_mesh(model: mujoco.MjModel, body: int) -> int | None:
    """The colliding geom of a body, if it is just one and a mesh."""
    geoms = np.flatnonzero((model.geom_bodyid == body) & ((model.geom_contype != 0) | (model.geom_conaffinity != 0)))
    return int(geoms[0]) if len(geoms) == 1 and model.geom_type[geoms[0]] == mujoco.mjtGeom.mjGEOM_MESH else None


def _may_collide(model: mujoco.MjModel, a: int, b: int) -> bool:
    """Whether MuJoCo tests two bodies: not welded together, and not parent and child (except children of the world)."""
    weld_a, weld_b = model.body_weldid[[a, b]]
    parent_a, parent_b = model.body_weldid[model.body_parentid[[weld_a, weld_b]]]
    related = weld_a != 0 and weld_b != 0 and (weld_a == parent_b or weld_b == parent_a)
    return weld_a != weld_b and not related


def near_mesh_pairs(model: mujoco.MjModel, data: mujoco.MjData) -> list[tuple[str, str]]:
    """Name the pairs of bodies with one colliding mesh each that are near one another in the present state."""
    if model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_NATIVECCD or model.geom_margin.any():
        return []
    meshes = {body: _only_mesh(model, body) for body in range(1, model.nbody)}
    found = [(body, geom) for body, geom in meshes.items() if geom is not None]
    names = []
    for i, (a, geom_a) in enumerate(found):
        for b, geom_b in found[i + 1 :]:
            near = mujoco.mj_geomDistance(model, data, geom_a, geom_b, 2 * NEAR_M, None) < NEAR_M
            if near and _may_collide(model, a, b):
                names.append((model.body(a).name, model.body(b).name))
    return names


def with_exclusions(xml: str, pairs: list[tuple[str, str]]) -> str:
    """Add a contact exclusion for each pair of bodies to a model in MJCF."""
    root = ET.fromstring(xml)
    contact = root.find("contact")
    if contact is None:
        contact = ET.SubElement(root, "contact")
    for a, b in pairs:
        ET.SubElement(contact, "exclude", body1=a, body2=b)
    return ET.tostring(root, encoding="unicode")


def clearances(model: mujoco.MjModel, data: mujoco.MjData, pairs: list[tuple[str, str]]) -> Clearances:
    """Take the exclusions of ``pairs`` out of force, to be managed by ``exclude_clear_pairs``."""
    bodies = [sorted((model.body(a).id, model.body(b).id)) for a, b in pairs]
    signatures = np.array([(a << 16) + b for a, b in bodies], dtype=model.exclude_signature.dtype)
    slots = np.array([np.flatnonzero(model.exclude_signature == s)[0] for s in signatures], dtype=np.int64)
    model.exclude_signature[slots] = NO_PAIR
    geoms = np.array([[_only_mesh(model, body) for body in pair] for pair in bodies], dtype=np.int32).reshape(-1, 2)
    mesh = model.geom_dataid[geoms]
    first, number = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    ends = zip(first[:, 1], number[:, 1], strict=True)
    count = len(pairs)
    return Clearances(
        exclude_signature=model.exclude_signature,
        slot_P=slots,
        signature_P=signatures,
        geoms_P2=geoms,
        vertices_P4=np.stack([first[:, 0], number[:, 0], first[:, 1], number[:, 1]], axis=1).astype(np.int64),
        radius_P=np.array(
            [np.linalg.norm(model.mesh_vert[at : at + n].astype(np.float64), axis=1).max() for at, n in ends]
        ),
        vertices_V3=model.mesh_vert,
        geom_xpos=data.geom_xpos,
        geom_xmat=data.geom_xmat,
        gap_P=np.zeros(count),
        normal_P3=np.zeros((count, 3)),
        normal_B_P3=np.zeros((count, 3)),
        offset_P=np.zeros(count),
        wait_P=np.zeros(count, dtype=np.int64),
        fromto_6=np.zeros(6),
    )


@numba.njit(cache=True, nogil=True)
def _measure(model: int, data: int, pairs: Clearances, p: int) -> float:
    """Find the plane between the nearest points of a pair, and return the gap along its normal (m)."""
    a, b = pairs.geoms_P2[p]
    distance_m = mj_geomDistance(model, data, a, b, 2.0, pairs.fromto_6.ctypes.data)
    if distance_m < SAFETY_M:
        return 0.0
    for i in range(3):
        pairs.normal_P3[p, i] = pairs.normal_B_P3[p, i] = 0.0
        for k in range(3):
            along = (pairs.fromto_6[3 + k] - pairs.fromto_6[k]) / distance_m
            pairs.normal_P3[p, i] += pairs.geom_xmat[a, 3 * k + i] * along
            pairs.normal_B_P3[p, i] += pairs.geom_xmat[b, 3 * k + i] * along
    offset = 0.0
    for k in range(3):
        along = (pairs.fromto_6[3 + k] - pairs.fromto_6[k]) / distance_m
        offset += along * (pairs.geom_xpos[b, k] - pairs.geom_xpos[a, k])
    pairs.offset_P[p] = offset
    far_A, near_B = -np.inf, np.inf
    first_A, number_A, first_B, number_B = pairs.vertices_P4[p]
    for v in range(first_A, first_A + number_A):
        reach = 0.0
        for i in range(3):
            reach += pairs.vertices_V3[v, i] * pairs.normal_P3[p, i]
        far_A = max(far_A, reach)
    for v in range(first_B, first_B + number_B):
        reach = 0.0
        for i in range(3):
            reach += pairs.vertices_V3[v, i] * pairs.normal_B_P3[p, i]
        near_B = min(near_B, reach)
    return offset + near_B - far_A


@numba.njit(cache=True, nogil=True)
def exclude_clear_pairs(model: int, data: int, pairs: Clearances) -> None:
    """Exclude each pair that provably has no contact in the present kinematics (between mj_kinematics and mj_collision)."""
    for p in range(pairs.slot_P.size):
        if pairs.wait_P[p] > 0:
            pairs.wait_P[p] -= 1
            continue
        a, b = pairs.geoms_P2[p]
        offset = turned = 0.0
        for i in range(3):
            normal_B = 0.0
            for k in range(3):
                along = 0.0
                for j in range(3):
                    along += pairs.geom_xmat[a, 3 * k + j] * pairs.normal_P3[p, j]
                normal_B += pairs.geom_xmat[b, 3 * k + i] * along
                if i == 0:
                    offset += along * (pairs.geom_xpos[b, k] - pairs.geom_xpos[a, k])
            turned += (normal_B - pairs.normal_B_P3[p, i]) ** 2
        gap = pairs.gap_P[p] + offset - pairs.offset_P[p] - pairs.radius_P[p] * np.sqrt(turned)
        if not gap > SAFETY_M:
            gap = _measure(model, data, pairs, p)
            pairs.gap_P[p] = gap
        if gap > SAFETY_M:
            pairs.exclude_signature[pairs.slot_P[p]] = pairs.signature_P[p]
        else:
            pairs.wait_P[p] = RECHECK_SUBSTEPS
            pairs.exclude_signature[pairs.slot_P[p]] = NO_PAIR


@numba.njit(cache=True, nogil=True)
def include_all_pairs(pairs: Clearances) -> None:
    """Leave the model as it was: every pair is tested."""
    for p in range(pairs.slot_P.size):
        pairs.exclude_signature[pairs.slot_P[p]] = NO_PAIR
