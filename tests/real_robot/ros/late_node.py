"""A node of real ROS 2 that knows no type of a topic's when it meets those who have it, and subscribes to /joint_states later.

Writes "heard" as soon as a message comes, "nothing" if none does for ten seconds.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import rclpy

MEET_S = 3.0
HEAR_S = 10.0

rclpy.init()
node = rclpy.create_node(f"late_{time.monotonic_ns()}")
until_s = time.monotonic() + MEET_S
while time.monotonic() < until_s:
    rclpy.spin_once(node, timeout_sec=0.1)

from sensor_msgs.msg import JointState  # noqa: E402 - only now

heard: list[Any] = []
node.create_subscription(JointState, "/joint_states", heard.append, 10)
until_s = time.monotonic() + HEAR_S
while not heard and time.monotonic() < until_s:
    rclpy.spin_once(node, timeout_sec=0.1)
sys.stdout.write("heard\n" if heard else "nothing\n")
