"""`pi05`: pi0.5 (Physical Intelligence 2025, https://arxiv.org/abs/2504.16054), low level, from cached image tokens.

As `pi0`, but the state is told in the prompt, as bins of its normalised numbers (prompts.py), and the time conditions
the norms of the action expert (nets/gemma_expert.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from transformers import GemmaConfig

from vla.heads.batch import Batch
from vla.heads.flow import Velocity
from vla.heads.model import HeadConfig
from vla.heads.nets.pi0_expert import Pi05Net
from vla.heads.normalize import Mode
from vla.heads.pi0 import Pi0Head
from vla.heads.pi0_config import Pi0Config
from vla.heads.prompts import ACTION, action_prompt, discretise
from vla.heads.told import Telling
from vla.stores.user_given import WEIGHTS


class Pi05Config(Pi0Config):
    """Settings of `pi05`, beside those of `pi0`.

    `discrete_state`: tell the state in the prompt; without, the head reads no state (openpi's
    `discrete_state_input`).
    """

    action_norm: Mode = "quantile"
    state_norm: Mode = "quantile"
    weights: Annotated[str, WEIGHTS] = "lerobot/pi05_base"
    max_tokens: int = Field(200, ge=2)
    discrete_state: bool = True


class Pi05Head(Pi0Head):
    """See the module."""

    Config: ClassVar[type[HeadConfig]] = Pi05Config
    kind: ClassVar[Literal["pi0", "pi05"]] = "pi05"
    config: Pi05Config

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return super().columns if self.config.discrete_state else ()

    def make_net(self, expert: GemmaConfig, action_dim: int) -> nn.Module:
        """See `Pi0Head.make_net`."""
        return Pi05Net(expert, action_dim, self.sizes.max_action)

    def prompts(self, batch: Batch) -> list[str]:
        """See `Pi0Head.prompts`."""
        if not self.columns:
            return super().prompts(batch)
        bins = discretise(self.present_state(batch)).tolist()
        return [action_prompt(text, row) for text, row in zip(self._tasks(batch), bins, strict=True)]

    def telling(self) -> Telling:
        """See `HeadModel.telling`."""
        plain = super().telling()
        return replace(plain, form=ACTION, state=self.state, columns=self.columns) if self.columns else plain

    def velocity(self, batch: Batch) -> Velocity:
        """See `Pi0Head.velocity`."""
        prefix = self.prefix(batch)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            v: Tensor = self.net(x_t, t, prefix)
            return v

        return velocity
