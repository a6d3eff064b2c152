"""Is the task done? A binary classifier of observations, learned from episodes whose outcome is known: a robot's reward.

As in SERL and HIL-SERL (arXiv 2401.16013, 2410.21845): a net with sigmoid on observations, positives where an episode succeeded and
negatives everywhere else, drawn half and half. Differs: the threshold is the least one that no negative of some held-out episodes
passes, but at least one half, since a reward that is given wrongly is learned at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from vla_rl.data import schema
from vla_rl.data.normalizer import Normalizer
from vla_rl.data.reader import EpisodeData
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.seeding import derive_seed, initial_weights, torch_generator
from vla_rl.types import ObservationSpec


@dataclass(frozen=True)
class SuccessConfig:
    """The classifier and how it is trained.

    width: of the two hidden layers
    steps: of AdamW
    batch_size: half of it successes
    learning_rate: of AdamW
    held_out: share of the episodes that nothing is learned from: half of them to choose the threshold on, half to judge it
    seed: of all draws
    """

    width: int = 64
    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.steps) < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise ValueError("width and steps want at least 1, batch_size at least 2, learning_rate a positive number")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out wants a share in (0, 1), got {self.held_out}")


class SuccessClassifier(nn.Module):
    """The chance that the task is done, by some features of an observation."""

    threshold: Tensor

    def __init__(self, features: ObservationSpec, config: SuccessConfig) -> None:
        """Set up.

        Args:
            features: those that are looked at; numbers with one axis.
            config: of the net.
        """
        super().__init__()
        self.features = dict(features)
        dim = sum(spec.shape[0] for spec in features.values())
        self.normalizer = Normalizer(dim)
        layers: list[nn.Module] = []
        for before in (dim, config.width):
            layers += [nn.Linear(before, config.width), nn.LayerNorm(config.width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(config.width, 1))
        self.register_buffer("threshold", torch.tensor(0.5))

    def join(self, observation: Mapping[str, Tensor]) -> Float[Tensor, "B D"]:
        """The features, one after the other."""
        return torch.cat([observation[name].float() for name in self.features], dim=-1)

    def logits(self, joined_BD: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Log-odds of success."""
        return self.net(self.normalizer.normalize(joined_BD))[:, 0]

    @torch.no_grad()
    def forward(self, observation: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Chance of success of each row."""
        return torch.sigmoid(self.logits(self.join(observation)))


@dataclass(frozen=True)
class Fitted:
    """What training came to.

    recall: share of the successes that pass the threshold, in episodes that it was not chosen on
    wrong: share of what is no success there that does
    held_out: number of those episodes
    positives, negatives: observations that were learned from
    """

    recall: float
    wrong: float
    held_out: int
    positives: int
    negatives: int


def labelled(data: EpisodeData, names: tuple[str, ...]) -> tuple[Float[Tensor, "N D"], Bool[Tensor, " N"], Tensor]:
    """Observations of all episodes, the last one of each too: features (N, D), whether the task was done, and the episode (N,).

    An observation is a success where the step that led to it was.

    Raises:
        UserError: the data do not say, or a feature is a picture.
    """
    for name in names:
        if name not in data.observation_spec:
            raise UserError(f"the data have no feature {name!r}; there are {', '.join(data.observation_spec)}")
        if len(data.observation_spec[name].shape) != 1:
            raise UserError(f"a success classifier looks at numbers with one axis; leave {name!r} out of --features")
    if schema.SUCCESS not in data.columns:
        raise UserError("the data do not say which steps succeeded; data sets of 'vla-rl deploy' and 'collect' do")
    rows, done, episodes = [], [], []
    for index in range(data.num_episodes):
        episode = data.episode(index)
        joined = [torch.from_numpy(episode.observations[name]).float() for name in names]
        rows.append(torch.cat(joined, dim=-1))
        done.append(torch.cat([torch.zeros(1, dtype=torch.bool), torch.from_numpy(episode.success_T)]))
        episodes.append(torch.full((episode.length + 1,), index))
    return torch.cat(rows), torch.cat(done), torch.cat(episodes)


def fit_success(data: EpisodeData, names: tuple[str, ...], config: SuccessConfig) -> tuple[SuccessClassifier, Fitted]:
    """Train a classifier and choose its threshold.

    Raises:
        UserError: the data do not say what succeeded, or nothing did, or everything, on either side of the held-out episodes.
    """
    joined_ND, done_N, episode_N = labelled(data, names)
    order_E = torch.randperm(data.num_episodes, generator=torch_generator(config.seed, "success held out"))
    count = max(1, round(config.held_out * data.num_episodes / 2))
    chosen_N, judged_N = torch.isin(episode_N, order_E[:count]), torch.isin(episode_N, order_E[count : 2 * count])
    learned_N = ~(chosen_N | judged_N)
    for where, mask_N in (("learn from", learned_N), ("hold out", chosen_N), ("judge on", judged_N)):
        for kind, wanted in (("success", done_N), ("observation that is none", ~done_N)):
            if not (mask_N & wanted).any():
                raise UserError(
                    f"of {data.num_episodes} episodes, those to {where} hold no {kind}; a classifier wants both kinds: record more episodes"
                )
    with initial_weights(derive_seed(config.seed, "success weights")):
        model = SuccessClassifier({name: data.observation_spec[name] for name in names}, config)
    model.normalizer = Normalizer.fit(joined_ND[learned_N][:, None], "mean_std")
    kinds = [torch.nonzero(learned_N & wanted)[:, 0] for wanted in (done_N, ~done_N)]
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    generator = torch_generator(config.seed, "success batches")
    half = config.batch_size // 2
    label_B = torch.cat([torch.ones(half), torch.zeros(half)])
    for _ in range(config.steps):
        index_B = torch.cat([kind[torch.randint(len(kind), (half,), generator=generator)] for kind in kinds])
        loss = binary_cross_entropy_with_logits(model.logits(joined_ND[index_B]), label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        chance_N = torch.sigmoid(model.logits(joined_ND))
    model.threshold.fill_(max(0.5, float(chance_N[chosen_N & ~done_N].max())))
    passes_N = chance_N > model.threshold
    return model, Fitted(
        recall=float(passes_N[judged_N & done_N].float().mean()),
        wrong=float(passes_N[judged_N & ~done_N].float().mean()),
        held_out=count,
        positives=len(kinds[0]),
        negatives=len(kinds[1]),
    )
