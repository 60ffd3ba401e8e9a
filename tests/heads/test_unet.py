"""The 1-D U-Net: the published one, name by name, so that its checkpoints load."""

from __future__ import annotations

import math

import pytest
import torch

from vla.heads.nets.unet1d import ConditionalUnet1D, SinusoidalPosEmb, check_sizes
from vla.stores.errors import UsageError

LAYERS = {
    "diffusion_step_encoder": ("1", "3"),
    "mid_modules": ("0", "1"),
    "down_modules": ("0.0", "0.1", "1.0", "1.1", "2.0", "2.1"),
    "up_modules": ("0.0", "0.1", "1.0", "1.1"),
}
"""Blocks of the published ConditionalUnet1D of three levels (diffusion_policy, model/diffusion)."""
BLOCK = ("blocks.0.block.0", "blocks.0.block.1", "blocks.1.block.0", "blocks.1.block.1", "cond_encoder.1")


def published_names() -> set[str]:
    layers = {f"diffusion_step_encoder.{layer}" for layer in LAYERS["diffusion_step_encoder"]}
    for part in ("mid_modules", "down_modules", "up_modules"):
        layers |= {f"{part}.{block}.{layer}" for block in LAYERS[part] for layer in BLOCK}
    # Wherever a block changes the number of channels, and wherever a level changes the length.
    layers |= {f"{block}.residual_conv" for block in ("down_modules.0.0", "down_modules.1.0", "down_modules.2.0")}
    layers |= {f"{block}.residual_conv" for block in ("up_modules.0.0", "up_modules.1.0")}
    layers |= {"down_modules.0.2.conv", "down_modules.1.2.conv", "up_modules.0.2.conv", "up_modules.1.2.conv"}
    layers |= {"final_conv.0.block.0", "final_conv.0.block.1", "final_conv.1"}
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def published_size(input_dim: int, global_cond_dim: int) -> int:
    """Parameters of the published defaults, counted layer by layer."""
    dsed, kernel = 256, 5
    cond = dsed + global_cond_dim

    def convolution(inputs: int, outputs: int, width: int) -> int:
        return inputs * outputs * width + outputs

    def block(inputs: int, outputs: int) -> int:
        return (
            convolution(inputs, outputs, kernel)
            + convolution(outputs, outputs, kernel)
            + 2 * 2 * outputs  # two group norms
            + convolution(cond, 2 * outputs, 1)
            + (convolution(inputs, outputs, 1) if inputs != outputs else 0)
        )

    size = convolution(dsed, 4 * dsed, 1) + convolution(4 * dsed, dsed, 1)
    size += sum(block(a, b) for a, b in [(input_dim, 256), (256, 256), (256, 512), (512, 512), (512, 1024)])
    size += 3 * block(1024, 1024)  # the deepest level's second block and two in the middle
    size += block(2048, 512) + block(512, 512) + block(1024, 256) + block(256, 256)
    size += convolution(256, 256, 3) + convolution(512, 512, 3)  # down
    size += convolution(512, 512, 4) + convolution(256, 256, 4)  # up
    return size + convolution(256, 256, kernel) + 2 * 256 + convolution(256, input_dim, 1)


def small(**settings: int) -> ConditionalUnet1D:
    return ConditionalUnet1D(2, 6, diffusion_step_embed_dim=16, down_dims=(16, 32), **settings).eval()


def test_its_modules_have_the_published_names() -> None:
    with torch.device("meta"):
        assert set(ConditionalUnet1D(2, 10).state_dict()) == published_names()


@pytest.mark.parametrize(("input_dim", "global_cond_dim"), [(2, 10), (2, 1028), (10, 274)])
def test_its_defaults_have_the_published_size(input_dim: int, global_cond_dim: int) -> None:
    with torch.device("meta"):
        net = ConditionalUnet1D(input_dim, global_cond_dim)
    assert sum(p.numel() for p in net.parameters()) == published_size(input_dim, global_cond_dim)


def test_the_push_t_network_has_65_million_parameters() -> None:
    """Diffusion Policy's state-based Push-T example: two actions, two observations of five numbers."""
    assert published_size(2, 10) == 65_353_218


def test_shift_alone_halves_the_condition_layers() -> None:
    assert small(cond_predict_scale=False).get_parameter("mid_modules.0.cond_encoder.1.weight").shape == (32, 22)
    assert small(cond_predict_scale=True).get_parameter("mid_modules.0.cond_encoder.1.weight").shape == (64, 22)


@pytest.mark.parametrize("cond_predict_scale", [True, False])
def test_a_residual_block_is_two_convolutions_with_film_between(cond_predict_scale: bool) -> None:
    block = small(cond_predict_scale=cond_predict_scale).down_modules[0][0]  # type: ignore[index]
    x, cond = torch.randn(3, 2, 4), torch.randn(3, 22)
    out = block.blocks[0](x)
    film = block.cond_encoder(cond)
    out = film[:, :16, None] * out + film[:, 16:, None] if cond_predict_scale else out + film[:, :, None]
    torch.testing.assert_close(block(x, cond), block.blocks[1](out) + block.residual_conv(x))


@pytest.mark.parametrize("horizon", [2, 4, 16])
def test_the_prediction_has_the_shape_of_the_sample(horizon: int) -> None:
    assert small()(torch.randn(3, horizon, 2), torch.tensor([0, 5, 99]), torch.randn(3, 6)).shape == (3, horizon, 2)


def test_the_prediction_depends_on_step_and_condition_and_on_no_other_sample() -> None:
    net = small()
    sample, step, cond = torch.randn(2, 4, 2), torch.tensor([3, 70]), torch.randn(2, 6)
    out = net(sample, step, cond)
    for changed in (net(sample, step + 1, cond), net(sample, step, cond + 1)):
        assert (changed - out).abs().amax((1, 2)).min() > 1e-4
    torch.testing.assert_close(net(sample[:1], step[:1], cond[:1]), out[:1], atol=1e-6, rtol=1e-5)


def test_steps_are_embedded_by_sines_then_cosines() -> None:
    """sin(k w_i), cos(k w_i) with w_i = 10000^(-i / (dim / 2 - 1)), as published."""
    k, half = 7.0, 4
    rates = [10_000 ** (-i / (half - 1)) for i in range(half)]
    wanted = [math.sin(k * w) for w in rates] + [math.cos(k * w) for w in rates]
    assert SinusoidalPosEmb(8)(torch.tensor([7]))[0].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("horizon", "down_dims", "kernel_size", "n_groups", "says"),
    [
        (6, (16, 32, 64), 5, 8, "multiple of 4"),
        (15, (16, 32), 5, 8, "multiple of 2"),
        (8, (16, 32), 4, 8, "odd"),
        (8, (16, 20), 5, 8, "multiple of n_groups = 8"),
        (8, (0, 16), 5, 8, "down_dims has 0"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(
    horizon: int, down_dims: tuple[int, ...], kernel_size: int, n_groups: int, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        check_sizes(horizon, down_dims, kernel_size, n_groups)


@pytest.mark.parametrize(("horizon", "down_dims"), [(4, (16, 32, 64)), (3, (16,)), (16, (256, 512, 1024))])
def test_sizes_that_can_be_built_are_accepted(horizon: int, down_dims: tuple[int, ...]) -> None:
    check_sizes(horizon, down_dims, 5, 8)
