"""What each encoder promises: order of points, where things are, no effect of one sample on another, words that modulate, exact crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_rl.encoders.augment import DRAWS, AugmentConfig, augment, centre_crop, to_float
from vla_rl.encoders.base import Film, ImageEncoderConfig
from vla_rl.encoders.cnn import CNNConfig
from vla_rl.encoders.point_net import PointNet, PointNetConfig
from vla_rl.encoders.pool import Keypoints
from vla_rl.encoders.regularizers import PictureDecoder, PointDecoder, chamfer, gaussian_kl
from vla_rl.encoders.resampler import Resampler, ResamplerConfig
from vla_rl.encoders.resnet import ResNet18Config
from vla_rl.encoders.vit import ViTConfig
from vla_rl.runtime.errors import UserError

IMAGES = {
    "cnn": CNNConfig(channels=(8, 16), kernels=(5, 3), strides=(2, 2)),
    "resnet18": ResNet18Config(),
    "vit": ViTConfig(patch=8, width=32, depth=2, heads=2),
}
SIZE = (40, 48)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", list(ImageEncoderConfig.get_known_choices()))
def test_every_image_encoder_is_a_function_of_one_picture(name: str) -> None:
    """A statistic of the batch in it would make likelihood ratios differ from one."""
    torch.manual_seed(0)
    net = IMAGES[name].build(SIZE).eval()
    batch = pictures(5)
    with torch.no_grad():
        whole, alone = net(batch), torch.cat([net(batch[i : i + 1]) for i in range(5)])
    assert whole.shape[:2] == (5, net.channels)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("name", list(IMAGES))
def test_words_modulate_every_image_encoder_and_say_nothing_at_first(name: str) -> None:
    torch.manual_seed(0)
    net = IMAGES[name].build(SIZE, words=6).eval()
    batch, words, others = pictures(2), torch.randn(2, 6), torch.randn(2, 6)
    assert torch.equal(net(batch, words), net(batch, others))  # FiLM begins as the identity
    films = [m for m in net.modules() if isinstance(m, Film)]
    assert films
    for film in films:
        torch.nn.init.normal_(film.net.weight, std=0.1)
    assert not torch.allclose(net(batch, words), net(batch, others))


def test_a_batch_norm_is_found_nowhere_in_the_resnet() -> None:
    net = ResNet18Config().build(SIZE)
    assert not [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def test_weights_that_are_not_here_are_named(tmp_path: object) -> None:
    with pytest.raises(UserError, match=r"encoder\.image\.weights names '.*absent\.safetensors'"):
        ResNet18Config(weights=tmp_path / "absent.safetensors").build(SIZE)  # type: ignore[operator]


def test_torchvisions_convolutions_are_taken_over(tmp_path: object) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(3)
    theirs = resnet18(weights=None)
    path = tmp_path / "theirs.safetensors"  # type: ignore[operator]
    save_file({k: v.clone() for k, v in theirs.state_dict().items()}, path)
    ours = ResNet18Config(weights=path).build(SIZE)
    assert torch.equal(ours.enter[0].weight, theirs.conv1.weight)  # type: ignore[attr-defined]
    assert torch.equal(ours.stages[3][1].conv2.weight, theirs.layer4[1].conv2.weight)  # type: ignore[attr-defined]
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(UserError, match=r"lacks 'stages\.0\.0\.conv1\.weight'"):
        ResNet18Config(weights=path).build(SIZE)


@given(st.permutations(range(12)), st.integers(0, 11))
@settings(max_examples=20, deadline=None)
def test_the_order_of_points_and_a_point_twice_change_nothing(order: list[int], twice: int) -> None:
    torch.manual_seed(0)
    net = PointNet(PointNetConfig(widths=(16, 32)), 8)
    points = torch.randn(3, 12, 3)
    told = net(points)
    torch.testing.assert_close(net(points[:, order]), told)
    torch.testing.assert_close(net(torch.cat([points, points[:, twice : twice + 1]], 1)), told)


def test_keypoints_say_where_a_spot_is() -> None:
    pool = Keypoints(1, (9, 13), 1, 4)
    torch.nn.init.constant_(pool.maps.weight, 1.0)
    torch.nn.init.zeros_(pool.maps.bias)  # type: ignore[arg-type]
    grid = torch.zeros(1, 1, 9, 13)
    grid[0, 0, 2, 9] = 100.0
    column, row = pool.where(grid)[0, 0].tolist()
    assert row == pytest.approx(-1 + 2 * 2 / 8, abs=1e-4)
    assert column == pytest.approx(-1 + 2 * 9 / 12, abs=1e-4)


def test_the_resampler_reads_every_camera_and_the_words() -> None:
    torch.manual_seed(0)
    net = Resampler(ResamplerConfig(queries=3, depth=2, heads=2), 5, {"a": (3, 4), "b": (2, 2)}, 8)
    grids = {"a": torch.randn(2, 5, 3, 4), "b": torch.randn(2, 5, 2, 2)}
    words = torch.randn(2, 8)
    told = net(grids, words)
    assert told.shape == (2, 3, 8)
    for changed in (
        ({**grids, "a": torch.randn(2, 5, 3, 4)}, words),
        ({**grids, "b": torch.randn(2, 5, 2, 2)}, words),
        (grids, torch.randn(2, 8)),
    ):
        assert not torch.allclose(net(*changed), told, atol=1e-4)
    swapped = torch.flip(grids["a"], (-1,))
    assert not torch.allclose(net({**grids, "a": swapped}, words), told, atol=1e-4), "places count"


def test_crops_and_shifts_are_whole_pixels_of_the_picture() -> None:
    picture = torch.randint(0, 256, (3, 2, 3, 10, 12), dtype=torch.uint8)
    uniform = torch.tensor([[0.0, 0.0], [0.999, 0.0], [0.5, 0.5]])
    uniform = torch.cat([uniform, torch.full((3, DRAWS - 2), 0.5)], 1)
    made = augment(picture, uniform, AugmentConfig(crop=4, shift=0))
    assert torch.equal(made[0], to_float(picture[0, ..., :6, :8]))
    assert torch.equal(made[1], to_float(picture[1, ..., 4:10, :8]))
    assert torch.equal(made[2], to_float(centre_crop(picture[2], 4)))
    shifted = augment(picture, uniform, AugmentConfig(crop=0, shift=3))
    assert torch.equal(shifted[0, ..., 3:, 3:], to_float(picture[0, ..., :7, :9]))  # down and to the right
    assert torch.equal(shifted[0, ..., :1, 3:], to_float(picture[0, ..., :1, :9]))  # the edge is repeated
    assert torch.equal(shifted[2], to_float(picture[2]))
    assert np.array_equal(picture.shape, (3, 2, 3, 10, 12))


def test_light_changes_do_nothing_in_the_middle_and_stay_in_range() -> None:
    picture = torch.randint(0, 256, (4, 1, 3, 6, 6), dtype=torch.uint8)
    config = AugmentConfig(shift=0, brightness=0.5, contrast=0.5, saturation=0.5)
    torch.testing.assert_close(augment(picture, torch.full((4, DRAWS), 0.5), config), to_float(picture))
    changed = augment(picture, torch.rand(4, DRAWS), config)
    assert float(changed.abs().max()) <= 1
    assert not torch.allclose(changed, to_float(picture))
    grey = augment(picture, torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0]] * 4), AugmentConfig(shift=0, saturation=0.99))
    assert float((grey[:, :, 0] - grey[:, :, 2]).abs().mean()) < 0.02


def test_the_bottlenecks_divergence_is_that_of_torch() -> None:
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), wanted)
    assert float(gaussian_kl(torch.zeros(1, 3), torch.zeros(1, 3))) == 0


def test_the_chamfer_distance_is_what_it_says() -> None:
    a, b = torch.randn(2, 6, 3), torch.randn(2, 9, 3)
    squared = ((a[:, :, None] - b[:, None]) ** 2).sum(-1)
    wanted = squared.min(2).values.mean(1) + squared.min(1).values.mean(1)
    torch.testing.assert_close(chamfer(a, b), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chamfer(a, a[:, torch.randperm(6)]), torch.zeros(2), atol=1e-5, rtol=0)


def test_decoders_learn_what_was_seen() -> None:
    torch.manual_seed(0)
    features, seen, cloud = torch.randn(4, 16), pictures(4), torch.randn(4, 40, 3)
    for decoder, target in ((PictureDecoder(16, SIZE), seen), (PointDecoder(16), cloud)):
        before = decoder.error(features, target).mean()
        optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = decoder.error(features, target).mean()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.7 * float(before.detach())
