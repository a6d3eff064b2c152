"""A position-controlled arm as a node of real ROS 2: nothing but rclpy and the standard interface packages.

    /joint_states                                  sends JointState, reliable, depth 10
    /joint_trajectory_controller/joint_trajectory  takes JointTrajectory, reliable
    /position_controller/commands                  takes Float64MultiArray, reliable
    /echo/KIND/in, /echo/KIND/out                  sends back what it takes, of eight types, reliable, depth 10
    /best_effort                                   sends Float64MultiArray, best effort, 10 Hz
    /latched                                       takes Float64MultiArray, but only from a transient-local publisher
    /report                                        sends String, reliable, 10 Hz: JSON of what it took and whom it sees
    /trigger, /enable                              services Trigger and SetBool
    /move                                          with --action: action peer_interfaces/action/Move, refused for joints that it lacks

"ready" on standard output says that it spins.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import rclpy
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.task import Future
from sensor_msgs.msg import CompressedImage, Image, JointState, PointCloud2
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
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
REPORT_S = 0.1
RELIABLE = QoSProfile(depth=10)
BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Arm(Node):
    """Joints that move towards their targets at a bounded speed."""

    def __init__(self, names: list[str], rate_hz: float, speed: float) -> None:
        super().__init__("arm")
        self.names, self.period_s, self.speed = names, 1 / rate_hz, speed
        self.position, self.velocity = [0.0] * len(names), [0.0] * len(names)
        self.plan: list[tuple[float, list[float]]] = []  # (time, joints), in order
        self.target = list(self.position)
        self.took: Counter[str] = Counter()
        self.enabled = True
        self.states = self.create_publisher(JointState, "/joint_states", RELIABLE)
        self.reports = self.create_publisher(String, "/report", RELIABLE)
        self.loose = self.create_publisher(Float64MultiArray, "/best_effort", BEST_EFFORT)
        self.create_subscription(
            JointTrajectory, "/joint_trajectory_controller/joint_trajectory", self.follow, RELIABLE
        )
        self.create_subscription(Float64MultiArray, "/position_controller/commands", self.go, RELIABLE)
        self.create_subscription(Float64MultiArray, "/latched", lambda message: self.count("latched"), LATCHED)
        for kind, message_type in ECHOES.items():
            out = self.create_publisher(message_type, f"/echo/{kind}/out", RELIABLE)
            self.create_subscription(message_type, f"/echo/{kind}/in", out.publish, RELIABLE)
        self.create_service(Trigger, "/trigger", self.trigger)
        self.create_service(SetBool, "/enable", self.enable)
        self.ticks: list[Future] = []
        self.create_timer(self.period_s, self.step)
        self.create_timer(REPORT_S, self.report)

    def now_s(self) -> float:
        return self.get_clock().now().nanoseconds * 1e-9

    def count(self, what: str) -> None:
        self.took[what] += 1

    def follow(self, message: JointTrajectory) -> None:
        """Take a trajectory in place of the one before; joints that it does not name stay."""
        self.count("joint_trajectory")
        now_s = self.now_s()
        self.plan = []
        for point in message.points:
            joints = list(self.plan[-1][1] if self.plan else self.target)
            for name, value in zip(message.joint_names, point.positions, strict=True):
                joints[self.names.index(name)] = value
            after_s = point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec
            self.plan.append((now_s + after_s, joints))

    def go(self, message: Float64MultiArray) -> None:
        self.count("commands")
        if self.enabled and len(message.data) == len(self.names):
            self.plan, self.target = [], list(message.data)

    def step(self) -> None:
        """Move for one period and say where the joints are."""
        now_s = self.now_s()
        while self.plan and self.plan[0][0] <= now_s:
            self.target = self.plan.pop(0)[1]
        most = self.speed * self.period_s
        for i, target in enumerate(self.target):
            moved = max(-most, min(most, target - self.position[i]))
            self.position[i] += moved
            self.velocity[i] = moved / self.period_s
        message = JointState(name=self.names, position=self.position, velocity=self.velocity)
        message.header.stamp = self.get_clock().now().to_msg()
        self.states.publish(message)
        for tick in self.ticks:
            tick.set_result(None)
        self.ticks = []

    def report(self) -> None:
        """Say what was taken and who is seen, by topic: [node, type] of publishers and of subscribers."""
        graph = {}
        for topic, _ in self.get_topic_names_and_types():
            publishers = [[i.node_name, i.topic_type] for i in self.get_publishers_info_by_topic(topic)]
            subscribers = [[i.node_name, i.topic_type] for i in self.get_subscriptions_info_by_topic(topic)]
            graph[topic] = {"publishers": publishers, "subscribers": subscribers}
        text = json.dumps({"took": self.took, "target": self.target, "enabled": self.enabled, "graph": graph})
        self.reports.publish(String(data=text))
        self.loose.publish(Float64MultiArray(data=[1.0]))

    def trigger(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.count("trigger")
        response.success, response.message = True, f"trigger {self.took['trigger']}"
        return response

    def enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.enabled = request.data
        response.success, response.message = True, "enabled" if request.data else "disabled"
        return response

    def offer_action(self) -> None:
        from peer_interfaces.action import Move
        from rclpy.action import ActionServer, CancelResponse, GoalResponse

        async def execute(handle: Any) -> Any:
            self.follow(handle.request.trajectory)
            while self.plan or any(self.velocity):
                if handle.is_cancel_requested:
                    self.count("cancelled")
                    self.plan, self.target = [], list(self.position)
                    handle.canceled()
                    return Move.Result(error_code=1, error_string="cancelled")
                handle.publish_feedback(Move.Feedback(actual=self.position))
                self.ticks.append(Future(executor=self.executor))
                await self.ticks[-1]
            handle.succeed()
            return Move.Result(error_string="arrived")

        def judge(goal: Any) -> GoalResponse:
            known = set(goal.trajectory.joint_names) <= set(self.names)
            return GoalResponse.ACCEPT if known else GoalResponse.REJECT

        self.server = ActionServer(
            self, Move, "/move", execute, goal_callback=judge, cancel_callback=lambda _: CancelResponse.ACCEPT
        )


def main() -> None:
    """Spin until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--joints", nargs="+", default=[f"joint_{i + 1}" for i in range(6)])
    parser.add_argument("--rate-hz", type=float, default=100.0)
    parser.add_argument("--speed", type=float, default=3.0, help="rad/s")
    parser.add_argument("--action", action="store_true")
    options = parser.parse_args()
    rclpy.init()
    arm = Arm(options.joints, options.rate_hz, options.speed)
    if options.action:
        arm.offer_action()
    print("ready", flush=True)  # noqa: T201 - what the one who started it waits for
    try:
        rclpy.spin(arm)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        arm.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
