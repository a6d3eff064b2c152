"""A node of real ROS 1: /echo/KIND/out sends back what /echo/KIND/in takes, of nine types; nothing but rospy and the message packages.

"ready" on standard output says that it runs.
"""

from __future__ import annotations

import rospy
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped
from sensor_msgs.msg import CompressedImage, Image, JointState, PointCloud2
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

ECHOES = {
    "joint_state": JointState,
    "image": Image,
    "compressed_image": CompressedImage,
    "float64_multi_array": Float64MultiArray,
    "twist": Twist,
    "twist_stamped": TwistStamped,
    "pose_stamped": PoseStamped,
    "joint_trajectory": JointTrajectory,
    "point_cloud2": PointCloud2,
}

rospy.init_node("echo")
for kind, message_type in ECHOES.items():
    out = rospy.Publisher(f"/echo/{kind}/out", message_type, queue_size=10, tcp_nodelay=True)
    rospy.Subscriber(f"/echo/{kind}/in", message_type, out.publish, queue_size=10, buff_size=2**22, tcp_nodelay=True)
print("ready", flush=True)  # noqa: T201 - what the one who started it waits for
rospy.spin()
