"""`dp`: Diffusion Policy (Chi et al. 2023): noise prediction over a chunk of actions, DDPM in training.

Training: eps ~ N(0, I), k uniform, error = (eps_hat(sqrt(abar_k) a + sqrt(1 - abar_k) eps, k, obs) - eps)^2. Sampling
by DDIM in few steps, or by DDPM. The predicted horizon begins with the first observed frame, so the actions from the
present on are those from n_obs - 1. The noise schedule is diffusers'. The steps are ours: diffusers' DDIM takes the
step before k to be k - train_steps // sample_steps, which is wrong unless the one divides the other (16 of 100 steps
shift a Gaussian's mean by 1 %), and its DDPM draws noise by itself, which an exported head has to be given
(tests/heads/test_dp.py: ours is bit-equal).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler
from pydantic import Field
from torch import Tensor

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoded import EncodedConfig, EncodedHead
from vla.heads.model import MAX_LAYERS, HeadConfig, masked_elements, noise_like, real_dims
from vla.heads.nets.residual_mlp import ResidualMLP
from vla.heads.nets.unet1d import ConditionalUnet1D, check_sizes
from vla.pretrained.diffusion_policy import read_unet
from vla.pretrained.weights import load_strictly
from vla.stores.errors import UsageError
from vla.stores.user_given import UserGiven

if TYPE_CHECKING:
    from vla.heads.data import HeadData

DDIM_STEPS = 16
"""Default of DDIM. The paper's robots take 10; 16 cost little more with these nets."""

MIN_VARIANCE = 1e-20
"""Least variance of a DDPM step that draws (diffusers, `_get_variance`)."""

CLIP_ROUNDING = 1e-3
"""Beyond 1 by less than this is float32's rounding of the limits, not an action that is cut."""

EPS_STEPS = 5
"""Diffusion steps, evenly spaced, at which validation compares noise: the same ones for every checkpoint."""


class DiffusionConfig(EncodedConfig):
    """Diffusion Policy's settings; defaults are the published ones.

    `net`: "unet" (the published 1-D U-Net) or "mlp" (a residual MLP: ten times faster on a CPU). `down_dims`: channels
    of the U-Net's levels; (64, 128, 256) has 9 M parameters instead of 80 M. `kernel_size`, `n_groups`: of its
    convolutions and their group normalisation. `diffusion_step_embed_dim`: width of the embedded diffusion step.
    `cond_predict_scale`: FiLM with scale and shift rather than shift alone. `hidden`, `layers`, `dropout`: of the MLP.
    `train_steps`: diffusion steps in training. `sampler`: "ddim" needs few steps, "ddpm" all of them. `sample_steps`:
    steps that it takes (None: 16, or as many as `train_steps`). `clip_sample`: keep each step's estimate of the
    action in [-1, 1], where `action_norm` "limits" alone puts every action. `weights`: start the U-Net from a published
    checkpoint of Diffusion Policy, a workspace's .ckpt or a state dict (pretrained/diffusion_policy.py); what it is
    conditioned on has to be as wide: `n_obs` times `encoder.dim`.
    """

    n_obs: int = Field(2, ge=1)
    horizon: int = Field(16, ge=1)
    n_action: int = Field(8, ge=1)
    net: Literal["unet", "mlp"] = "unet"
    down_dims: tuple[int, ...] = Field((256, 512, 1024), min_length=1, max_length=16)
    kernel_size: int = Field(5, ge=1)
    n_groups: int = Field(8, ge=1)
    diffusion_step_embed_dim: int = Field(256, ge=4, multiple_of=2)
    cond_predict_scale: bool = True
    hidden: int = Field(512, ge=8)
    layers: int = Field(3, ge=1, le=MAX_LAYERS)
    dropout: float = Field(0.0, ge=0, lt=1)
    train_steps: int = Field(100, ge=1, le=100_000)
    sampler: Literal["ddim", "ddpm"] = "ddim"
    sample_steps: int | None = Field(None, ge=1)
    clip_sample: bool = True
    weights: Annotated[str | None, UserGiven(training_only=True)] = None

    @property
    def action_offset(self) -> int:
        """See `HeadConfig`."""
        return 1 - self.n_obs

    @property
    def steps(self) -> int:
        """Steps that the sampler takes."""
        default = min(DDIM_STEPS, self.train_steps) if self.sampler == "ddim" else self.train_steps
        return self.sample_steps or default


class DiffusionHead(EncodedHead):
    """Denoiser over [B, H, A]; see the module. Raises `UsageError` for settings that contradict each other."""

    Config: ClassVar[type[HeadConfig]] = DiffusionConfig
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, io: HeadIO) -> None:
        super().__init__(config, io)
        _require_steps(config)
        if config.clip_sample and config.action_norm != "limits":
            raise UsageError(
                f"clip_sample with action_norm {config.action_norm!r} would cut actions off at 1",
                expected="actions in [-1, 1]",
                fix="--set model.clip_sample=false"
                + (", or model.action_norm=limits" if config.norm_stats is None else ""),
            )
        if config.weights is not None and config.net != "unet":
            raise UsageError(
                f"weights for net {config.net!r}", expected="the published U-Net", fix="--set model.net=unet"
            )
        cond = config.n_obs * config.encoder.dim
        if config.net == "unet":
            check_sizes(config.horizon, config.down_dims, config.kernel_size, config.n_groups)
            self.net: torch.nn.Module = ConditionalUnet1D(
                io.action_dim,
                cond,
                config.diffusion_step_embed_dim,
                config.down_dims,
                config.kernel_size,
                config.n_groups,
                config.cond_predict_scale,
            )
        else:
            # Steps 0..99 embedded as they are: the sinusoid's fastest rate is 1 radian a step.
            self.net = ResidualMLP(
                config.horizon, io.action_dim, cond, config.hidden, config.layers, config.dropout, time_scale=1.0
            )
        self._noising = noise_schedule(config.train_steps, clip_sample=config.clip_sample)

    def prepare(self, data: HeadData) -> None:
        """See `EncodedHead.prepare`; and load published weights. Raises `DataError` where they do not fit."""
        super().prepare(data)
        if self.config.weights is not None:
            load_strictly(self.net, read_unet(Path(self.config.weights)), Path(self.config.weights))

    def check_reach(self, data: HeadData) -> None:
        """See `HeadModel.check_reach`: limits that came from another run may be narrower than these actions."""
        super().check_reach(data)
        if not self.config.clip_sample:
            return
        actions, dims = data.actions(data.training), data.action_dims(data.training)
        beyond = (self.action(torch.from_numpy(actions)).abs() > 1 + CLIP_ROUNDING).numpy()
        share = beyond.mean(where=True if dims is None else dims)
        if share:
            raise UsageError(
                f"clip_sample would cut {share:.2%} of the actions off: they exceed the limits of the run's statistics",
                expected="actions in [-1, 1]",
                fix="--set model.clip_sample=false",
            )

    @property
    def meaning(self) -> dict[str, Any]:
        """See `HeadModel.meaning`."""
        return super().meaning | {"train_steps": self.config.train_steps}

    def adjust(self, values: Mapping[str, Any]) -> None:
        """See `HeadModel.adjust`."""
        super().adjust(values)
        _require_steps(self.config)

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the predicted noise."""
        eps = real_dims(batch, torch.randn_like(action))
        k = torch.randint(0, self.config.train_steps, (len(batch),), device=action.device)
        noisy = self._noising.add_noise(action, eps, k)
        predicted: Tensor = self.net(noisy, k, self.encoder.frames(batch).flatten(1))
        return (predicted - eps) ** 2

    @torch.no_grad()
    def measure(self, batch: Batch, chunk: Tensor) -> dict[str, Tensor]:
        """Return `eps_mse` [n]: the squared error of the predicted noise, the mean over fixed steps, at fixed noise."""
        training, action = self.training, self.labels(batch)
        steps = sampling_steps(self.config.train_steps, min(EPS_STEPS, self.config.train_steps))
        generator = torch.Generator().manual_seed(0)
        errors = []
        try:
            self.eval()
            cond = self.encoder.frames(batch).flatten(1)
            for step in steps:
                eps = real_dims(batch, torch.randn(action.shape, generator=generator).to(action))
                k = torch.full((len(batch),), step, device=action.device)
                predicted = self.net(self._noising.add_noise(action, eps, k), k, cond)
                errors.append(masked_elements((predicted - eps) ** 2, batch))
        finally:
            self.train(training)
        return {"eps_mse": torch.stack(errors).mean(0)}

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Denoise from x_T ~ N(0, I)."""
        config, cond = self.config, self.encoder.frames(batch).flatten(1)
        steps = sampling_steps(config.train_steps, config.steps)
        abar, clip = signal_shares(config.train_steps), config.clip_sample
        x = real_dims(batch, noise_like((len(batch), config.horizon, self.io.action_dim), cond, generator))
        for k, previous in zip(steps, [*steps[1:], None], strict=True):
            eps = self.net(x, torch.full((len(batch),), k, device=x.device), cond)
            following = 1.0 if previous is None else abar[previous]
            if config.sampler == "ddpm":
                # Where steps are left out the last one is not k = 0: as in diffusers it draws too, next to nothing.
                noise = noise_like(tuple(eps.shape), eps, generator) if k > 0 else None
                x = ddpm_step(eps, x, abar[k], following, noise, clip=clip)
            else:
                x = ddim_step(eps, x, abar[k], following, clip=clip)
            x = real_dims(batch, x)
        return x


def _require_steps(config: DiffusionConfig) -> None:
    if config.steps > config.train_steps:
        raise UsageError(f"{config.steps} sampling steps", expected=f"at most train_steps = {config.train_steps}")


def noise_schedule(train_steps: int, *, clip_sample: bool = True) -> Any:
    """Return diffusers' DDPM scheduler with Diffusion Policy's settings (squared cosine, eps-prediction)."""
    return DDPMScheduler(
        num_train_timesteps=train_steps,
        beta_schedule="squaredcos_cap_v2",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="fixed_small",
        clip_sample=clip_sample,
        prediction_type="epsilon",
    )


@functools.cache
def signal_shares(train_steps: int) -> tuple[float, ...]:
    """Return abar_k of the schedule: the share of the variance of x_k that is the action's."""
    return tuple(noise_schedule(train_steps).alphas_cumprod.tolist())


def sampling_steps(train_steps: int, count: int) -> list[int]:
    """Return `count` training steps, descending from the last, which is pure noise as x_T is ("trailing" spacing)."""
    spaced = train_steps - np.arange(count) * (train_steps / count)
    return [int(step) - 1 for step in spaced.round()]


def ddim_step(eps: Tensor, x: Tensor, abar: float, abar_previous: float, *, clip: bool) -> Tensor:
    """Equation 12 of Song et al. 2021 (https://arxiv.org/abs/2010.02502) with sigma = 0; `abar_previous` 1 at the end.

    `clip` keeps the predicted clean sample in [-1, 1].
    """
    clean = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    if clip:
        clean = clean.clamp(-1, 1)
    stepped: Tensor = abar_previous**0.5 * clean + (1 - abar_previous) ** 0.5 * eps
    return stepped


def ddpm_step(eps: Tensor, x: Tensor, abar: float, abar_previous: float, noise: Tensor | None, *, clip: bool) -> Tensor:
    """Equations 6, 7 and 15 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239), beta = 1 - abar / abar_previous.

    `noise`: standard normal, of the variance (1 - abar_previous) / (1 - abar) beta; None: none. `clip` as in
    `ddim_step`. In float32 and in the order of diffusers' `DDPMScheduler.step`, so that both give the same bits.
    """
    a, a_previous = torch.tensor([abar, abar_previous], dtype=torch.float32)
    alpha = a / a_previous
    beta = 1 - alpha
    clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
    if clip:
        clean = clean.clamp(-1, 1)
    mean = (a_previous**0.5 * beta) / (1 - a) * clean + alpha**0.5 * (1 - a_previous) / (1 - a) * x
    variance = ((1 - a_previous) / (1 - a) * beta).clamp(min=MIN_VARIANCE)
    stepped: Tensor = mean if noise is None else mean + variance**0.5 * noise
    return stepped
