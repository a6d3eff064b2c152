"""What an environment shows beside, or in place of, the state: pictures of cameras and point clouds."""

from __future__ import annotations

from dataclasses import dataclass

from sim.point_cloud import PointCloud


@dataclass(frozen=True)
class Sensors:
    """What is seen of the scene. Without cameras or points it is what the task itself observes.

    cameras: names of the model's cameras; each is a feature observation.images.NAME, (3, height, width) uint8 RGB, in the light look
    width: pixels of every camera
    height: pixels of every camera
    points: cloud of the scene, a feature observation.points, (points, 3) float32 in the world (m)
    environment_state: whether the poses of objects are observed too
    """

    cameras: tuple[str, ...] = ()
    width: int = 84
    height: int = 84
    points: PointCloud | None = None
    environment_state: bool = True

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 8:
            raise ValueError(f"width and height of a camera want at least 8 pixels, got {self.width} and {self.height}")
        if len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"cameras want names that differ, got {', '.join(self.cameras)}")

    @property
    def enabled(self) -> bool:
        """Whether anything differs from what the task itself observes."""
        return bool(self.cameras) or self.points is not None or not self.environment_state
