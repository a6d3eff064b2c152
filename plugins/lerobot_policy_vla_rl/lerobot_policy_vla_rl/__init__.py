"""vla-rl's policies and tasks in LeRobot: ``--policy.type=vla_rl`` and ``--env.type=vla_rl``."""

from lerobot_policy_vla_rl.configuration_vla_rl import VlaRlConfig
from lerobot_policy_vla_rl.env_vla_rl import LeRobotTaskEnv, VlaRlEnvConfig
from lerobot_policy_vla_rl.modeling_vla_rl import VlaRlPolicy
from lerobot_policy_vla_rl.processor_vla_rl import make_vla_rl_pre_post_processors

__all__ = ["LeRobotTaskEnv", "VlaRlConfig", "VlaRlEnvConfig", "VlaRlPolicy", "make_vla_rl_pre_post_processors"]
