"""What stages that go on from a policy, reinforcement learning above all, ask of recorded episodes."""

from __future__ import annotations

from vla_rl.data.decisions import Decisions
from vla_rl.data.reader import PROVENANCE_PREFIX, EpisodeData
from vla_rl.data.windows import Windows
from vla_rl.policies.base import ChunkPolicy
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import SELECTION_SCENES
from vla_rl.types import require_same_observation

SCENE = PROVENANCE_PREFIX + "scene_seed"


def require_own(data: EpisodeData, policy: ChunkPolicy) -> None:
    """Refuse data that are not this policy's.

    Raises:
        UserError: one episode, scenes that are not for training, or states that the policy's normaliser was not fitted on.
        SpecMismatchError: actions or observations differ.
    """
    policy.spec.action_spec.require_equal(data.action_spec, mine="the policy", theirs="the data")
    require_same_observation(policy.spec.observation_spec, data.observation_spec, me="the policy", them="the data")
    if data.num_episodes < 2:
        raise UserError(f"this stage wants at least 2 episodes, one of them held out; got {data.num_episodes}")
    scenes = data.episodes[SCENE].dropna() if SCENE in data.episodes else []
    if len(scenes) and max(scenes) >= SELECTION_SCENES:
        raise UserError(
            f"scenes from {SELECTION_SCENES} are for selection and tests, not for data; these data have scene {int(max(scenes))}"
        )
    policy.require_normalizer_fits(Windows(data, policy.config.observation_steps, policy.config.chunk_steps))


def require_usable(data: EpisodeData, policy: ChunkPolicy) -> None:
    """Refuse data that are not this policy's, or that reinforcement learning cannot use.

    Raises:
        UserError: as ``require_own``, or no record of rewards, successes or endings.
        SpecMismatchError: actions or observations differ.
    """
    require_own(data, policy)
    if "success" not in data.episodes:
        raise UserError("reinforcement learning wants to know which episodes succeeded; the data do not say")
    Decisions(data, policy.config.observation_steps, policy.config.execute_steps, 1.0)  # rewards and endings are there
