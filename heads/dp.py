"""`dp`: Diffusion Policy (Chi et al. 2023): noise prediction over a chunk of actions, DDPM in training.

Training: eps ~ N(0, I), k uniform, error = (eps_hat(sqrt(abar_k) a + sqrt(1 - abar_k) eps, k, obs) - eps)^2. Sampling
by DDIM in few steps, or by DDPM. The predicted horizon begins with the first observed frame, so the actions from the
present on are those from n_obs - 1. Schedulers are diffusers'.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pydantic import Field
from torch import Tensor

from vla.heads.batch import Batch, HeadIO
from vla.heads.model import HeadConfig, HeadModel, noise_like
from vla.heads.nets.residual_mlp import ResidualMLP
from vla.heads.nets.unet1d import ConditionalUnet1D, check_horizon
from vla.stores.errors import UsageError


class DiffusionConfig(HeadConfig):
    """Diffusion Policy's settings; defaults are the published ones.

    `net`: "unet" (the published 1-D U-Net) or "mlp" (a residual MLP: ten times faster on a CPU). `down_dims`: channels
    of the U-Net's levels; (64, 128, 256) has 4 M parameters instead of 65 M. `hidden`, `layers`, `dropout`: of the MLP.
    `train_steps`: diffusion steps in training. `sampler` and `sample_steps`: DDIM reaches in 16 steps what DDPM needs
    all for.
    """

    n_obs: int = Field(2, ge=1)
    horizon: int = Field(16, ge=1)
    n_action: int = Field(8, ge=1)
    net: Literal["unet", "mlp"] = "unet"
    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = Field(5, ge=1)
    n_groups: int = Field(8, ge=1)
    diffusion_step_embed_dim: int = Field(256, ge=4)
    hidden: int = Field(512, ge=8)
    layers: int = Field(3, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    train_steps: int = Field(100, ge=1)
    sampler: Literal["ddim", "ddpm"] = "ddim"
    sample_steps: int = Field(16, ge=1)

    @property
    def action_offset(self) -> int:
        """See `HeadConfig`."""
        return 1 - self.n_obs


class DiffusionHead(HeadModel):
    """Denoiser over [B, H, A]; see the module."""

    Config: ClassVar[type[HeadConfig]] = DiffusionConfig
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, io: HeadIO) -> None:
        super().__init__(config, io)
        if config.sample_steps > config.train_steps:
            raise UsageError(f"{config.sample_steps} sampling steps", expected=f"at most {config.train_steps}")
        cond = config.n_obs * config.encoder.dim
        if config.net == "unet":
            check_horizon(config.horizon, config.down_dims)
            self.net: torch.nn.Module = ConditionalUnet1D(
                io.action_dim,
                cond,
                config.diffusion_step_embed_dim,
                config.down_dims,
                config.kernel_size,
                config.n_groups,
            )
        else:
            # Steps 0..99 embedded as they are: the sinusoid's fastest rate is 1 radian a step.
            self.net = ResidualMLP(
                config.horizon, io.action_dim, cond, config.hidden, config.layers, config.dropout, time_scale=1.0
            )
        self._noising = _scheduler("ddpm", config.train_steps)

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the predicted noise."""
        eps = torch.randn_like(action)
        k = torch.randint(0, self.config.train_steps, (len(batch),), device=action.device)
        noisy = self._noising.add_noise(action, eps, k)
        predicted: Tensor = self.net(noisy, k, self.encoder.frames(batch).flatten(1))
        return (predicted - eps) ** 2

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Denoise from x_T ~ N(0, I)."""
        cond = self.encoder.frames(batch).flatten(1)
        scheduler = _scheduler(self.config.sampler, self.config.train_steps)
        scheduler.set_timesteps(self.config.sample_steps, device=cond.device)
        x = noise_like((len(batch), self.config.horizon, self.io.action_dim), cond, generator)
        for k in scheduler.timesteps:
            eps = self.net(x, k.expand(len(batch)), cond)
            x = scheduler.step(eps, k, x, generator=generator).prev_sample
        return x


def _scheduler(kind: str, train_steps: int) -> Any:
    """Return a diffusers scheduler with Diffusion Policy's settings (squared cosine, eps-prediction, clipped)."""
    common = {
        "num_train_timesteps": train_steps,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "clip_sample": True,
        "prediction_type": "epsilon",
    }
    if kind == "ddpm":
        return DDPMScheduler(**common, variance_type="fixed_small", timestep_spacing="trailing")
    # Trailing spacing starts at the last training step, pure noise, as x_T is; set_alpha_to_one ends at a clean sample.
    return DDIMScheduler(**common, set_alpha_to_one=True, timestep_spacing="trailing")
