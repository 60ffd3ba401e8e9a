"""What every head promises: masks, samplers, learning, batch mates, layouts, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.dp import ddim_step, noise_schedule, sampling_steps
from vla.heads.fm import integrate
from vla.heads.model import HeadModel
from vla.heads.nets.unet1d import ConditionalUnet1D
from vla.heads.normalize import Normalizer
from vla.heads.projection import WhiteningProjection
from vla.heads.registry import head_class
from vla.stores.errors import CheckpointError, DataError, UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]


def test_padded_steps_and_dimensions_change_neither_loss_nor_gradient(
    every: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head(every)
    batch = toy_batch(model)
    assert batch.action is not None
    valid = torch.ones_like(batch.action_valid)  # type: ignore[arg-type]
    valid[:, -1] = False
    dims = torch.tensor([[True, False]]).expand(8, 2)
    results = []
    for filler in (0.0, 1e6):
        action = batch.action.clone()
        action[:, -1] = filler
        action[:, :, 1] = filler
        model.zero_grad()
        torch.manual_seed(5)
        loss, _ = model.loss(dataclasses.replace(batch, action=action, action_valid=valid, action_dims=dims))
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_error_of_a_padded_step_has_exactly_zero_gradient(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("mlp")
    batch = toy_batch(model)
    valid = torch.ones_like(batch.action_valid)  # type: ignore[arg-type]
    valid[:, 2:] = False
    seen: list[torch.Tensor] = []
    original = model.errors

    def errors(batch: Batch, action: torch.Tensor) -> torch.Tensor:
        out = original(batch, action)
        out.retain_grad()
        seen.append(out)
        return out

    model.errors = errors  # type: ignore[method-assign]
    model.loss(dataclasses.replace(batch, action_valid=valid))[0].backward()  # type: ignore[no-untyped-call]
    gradient = seen[0].grad
    assert gradient is not None
    assert (gradient[:, 2:] == 0).all()
    assert (gradient[:, :2] != 0).all()


@pytest.mark.parametrize(
    ("name", "copies", "steps", "times"), [("mlp", 1, 300, 10), ("fm-mlp", 16, 400, 5), ("dp-mlp", 16, 400, 5)]
)
def test_a_head_overfits_eight_windows(
    name: str, copies: int, steps: int, times: int, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """Its sampled actions come `times` nearer than always predicting the mean; copies see other noise, t and k."""
    model = toy_head(name)
    batch = toy_batch(model)
    assert batch.action is not None
    assert batch.state is not None
    assert batch.action_valid is not None
    many = Batch(
        features={key: value.repeat(copies, 1, 1, 1, 1, 1) for key, value in batch.features.items()},
        state=batch.state.repeat(copies, 1, 1),
        task=batch.task.repeat(copies),
        obs_valid=batch.obs_valid.repeat(copies, 1),
        action=batch.action.repeat(copies, 1, 1),
        action_valid=batch.action_valid.repeat(copies, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss, _ = model.loss(many)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    predicted = model.act(batch, torch.Generator().manual_seed(0), whole=True)
    error = (predicted - batch.action).abs().mean()
    baseline = (batch.action.mean(dim=(0, 1)) - batch.action).abs().mean()
    assert error < baseline / times


def test_one_step_of_training_reaches_every_weight(every: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head(every)
    for _, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # last layers start at zero and would hide the ones before
    model.loss(toy_batch(model))[0].backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_an_action_does_not_depend_on_batch_mates(every: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head(every)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = toy_batch(model)
    one = dataclasses.replace(
        batch,
        features={name: value[:1] for name, value in batch.features.items()},
        state=batch.state[:1] if batch.state is not None else None,
        task=batch.task[:1],
        obs_valid=batch.obs_valid[:1],
        action=None,
        action_valid=None,
    )
    # The noise of the first sample is the first that a generator draws, whatever the batch size.
    alone = model.act(one, torch.Generator().manual_seed(3))
    noise = torch.randn(1, *model.act(one, whole=True).shape[1:], generator=torch.Generator().manual_seed(3))
    rest = torch.randn(7, *noise.shape[1:])
    import vla.heads.dp
    import vla.heads.fm

    modules: list[Any] = [vla.heads.dp, vla.heads.fm]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(
                module, "noise_like", lambda shape, reference, generator: torch.cat([noise, rest])[: shape[0]]
            )
        together = model.act(batch)
    torch.testing.assert_close(together[:1], alone, atol=2e-5, rtol=1e-4)


def test_sampling_repeats_with_its_generator(every: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head(every)
    batch = toy_batch(model)
    first, second = (model.act(batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_integration_converges_with_its_order_to_the_closed_form(sampler: str, order: int) -> None:
    """dx/dt = x t from t = 1 to 0 has x(0) = x(1) exp(-1/2)."""
    exact = float(np.exp(-0.5))
    errors = [
        abs(integrate(lambda x, t: x * t, torch.ones(1, 1, 1, dtype=torch.float64), n, sampler).item() - exact)
        for n in (20, 40)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_flow_sampling_with_the_true_velocity_recovers_the_action() -> None:
    action, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    torch.testing.assert_close(integrate(lambda x, t: noise - action, noise, 10, "euler"), action, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1), ("ddim", 16), ("ddim", 100), ("ddpm", 100)])
def test_diffusion_sampling_with_the_true_noise_recovers_the_action(
    sampler: str, steps: int, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head("dp-mlp", sampler=sampler, sample_steps=steps)
    batch = toy_batch(model)
    target = torch.rand(8, 4, 2) * 1.8 - 0.9
    abar = noise_schedule(100).alphas_cumprod

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor, k: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            a = abar[k.long()][:, None, None]
            return (x - a.sqrt() * target) / (1 - a).sqrt()

    model.net = Perfect()
    sampled = model.sample(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, target, atol=2e-3, rtol=0)


def test_a_ddim_step_equals_diffusers() -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    ours = sampling_steps(100, 10)
    assert ours == scheduler.timesteps.tolist()
    x, abar = torch.randn(2, 4, 3), noise_schedule(100).alphas_cumprod.tolist()
    for k, previous in zip(ours, [*ours[1:], None], strict=True):
        eps = torch.randn(2, 4, 3)
        mine = ddim_step(eps, x, abar[k], 1.0 if previous is None else abar[previous], clip=True)
        # diffusers recomputes eps after clipping only on request; equation 12 without clipping is the common ground.
        free = ddim_step(eps, x, abar[k], 1.0 if previous is None else abar[previous], clip=False)
        scheduler.config.clip_sample = False
        theirs = scheduler.step(eps, k, x).prev_sample
        torch.testing.assert_close(free, theirs, atol=1e-5, rtol=1e-5)
        x = mine


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("dp", {"sample_steps": 101}, "100"),
        ("dp", {"horizon": 6, "n_obs": 1, "n_action": 2, "down_dims": [16, 32, 64]}, "multiple of 4"),
        ("mlp", {"horizon": 2, "n_action": 3}, "at most 2"),
        ("fm", {"hidden": 3}, "unknown key 'hidden'"),
        ("mlp", {"encoder": {"kind": "keypoint"}}, "encoder.kind"),
        ("mlp", {"encoder": {"use_features": False, "use_state": False}}, "no input"),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, settings: dict[str, Any], says: str, toy_io: HeadIO) -> None:
    with pytest.raises(UsageError, match=says):
        build_head(name, settings, toy_io)


def test_an_unknown_head_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'mlp'"):
        head_class("mpl")


@pytest.mark.parametrize("kind", ["keypoints", "attention", "projection"])
def test_an_encoder_knows_where_things_are(kind: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("mlp", encoder={"kind": kind})
    batch = toy_batch(model)
    mirrored = {"grid": batch.features["grid"].flip(dims=(3,))}
    moved = dataclasses.replace(batch, features=mirrored)
    assert not torch.allclose(model.encoder.frames(batch), model.encoder.frames(moved), atol=1e-3)


def test_keypoints_refuse_tokens(toy_io: HeadIO) -> None:
    io = toy_io.model_copy(update={"features": {"fine": FeatureIO(shape=(1, 64, 8), dims=("token", "channel"))}})
    with pytest.raises(UsageError, match="attention"):
        build_head("mlp", {"encoder": {"kind": "keypoints"}}, io)


def test_the_projection_whitens_what_it_was_fitted_on() -> None:
    frames = torch.randn(200, 6, 4) @ torch.randn(4, 4) + torch.arange(6.0)[:, None]
    projection = WhiteningProjection(6, 4, 4, 12)
    with pytest.raises(CheckpointError, match="never fitted"):
        projection(frames)
    projection.fit([frames])
    out = projection(frames)
    covariance = out.T @ out / len(out)
    torch.testing.assert_close(covariance, torch.eye(12), atol=2e-2, rtol=0)


def test_a_head_never_fitted_refuses_to_act(every: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head(every, fitted=False)
    with pytest.raises(CheckpointError, match=r"missing|never fitted"):
        model.act(toy_batch(model))


def test_weights_through_safetensors_give_the_same_actions(
    every: str, toy_head: MakeHead, toy_batch: MakeBatch, tmp_path: Path
) -> None:
    model, other = toy_head(every), toy_head(every, fitted=False)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    batch = toy_batch(model)
    wanted = model.act(batch, torch.Generator().manual_seed(0))
    assert torch.equal(other.act(batch, torch.Generator().manual_seed(0)), wanted)


def test_a_batch_of_other_shapes_is_refused(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("mlp")
    batch = toy_batch(model)
    with pytest.raises(DataError, match="feature 'grid' has shape"):
        model.loss(dataclasses.replace(batch, features={"grid": batch.features["grid"][:, :, :1]}))


def test_the_unet_has_the_published_names_and_size() -> None:
    net = ConditionalUnet1D(input_dim=4, global_cond_dim=512)
    names = set(net.state_dict())
    for name in (
        "diffusion_step_encoder.1.weight",
        "down_modules.0.0.blocks.0.block.0.weight",
        "down_modules.0.2.conv.weight",
        "mid_modules.1.cond_encoder.1.weight",
        "up_modules.1.2.conv.weight",
        "up_modules.0.0.residual_conv.weight",
        "final_conv.0.block.1.bias",
        "final_conv.1.bias",
    ):
        assert name in names
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(65e6, rel=0.2)
    assert net(torch.randn(2, 16, 4), torch.tensor([0, 99]), torch.randn(2, 512)).shape == (2, 16, 4)


NAN, BIG = float("nan"), 1e30


@pytest.mark.parametrize("mode", ["limits", "zscore", "quantile", "none"])
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(3, 2, (50, 2)),
        np.full((5, 2), 7.0),
        np.array([[1.0, 2.0]]),
        np.arange(10, dtype=np.int64).reshape(5, 2),
        np.array([[BIG, -BIG], [-BIG, BIG], [0.0, 0.0]]),
        np.array([[1e-12, 0.0], [0.0, 1e-12]]),
    ],
    ids=["normal", "constant", "one row", "integers", "huge", "tiny"],
)
def test_normalising_is_finite_and_comes_back(mode: Any, values: Any) -> None:
    normalizer = Normalizer(2)
    normalizer.fit(values, mode)
    x = torch.as_tensor(values).float()
    y = normalizer(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(normalizer.inverse(y), x, rtol=1e-5, atol=1e-5 * float(x.abs().max()) + 1e-6)


@pytest.mark.parametrize("values", [[[NAN, 1.0]], [[np.inf, 1.0]], [[1.0, 2.0, 3.0]], np.empty((0, 2)), [1.0, 2.0]])
def test_numbers_that_cannot_be_normalised_are_refused(values: Any) -> None:
    with pytest.raises(DataError):
        Normalizer(2).fit(np.asarray(values), "limits")
