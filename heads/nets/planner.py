"""The parts of OpenTrackVLA's planner: what projects tokens, what says when and where they were seen, what plans.

Letters: B batch, T frames, V views, P tokens of a frame and view, C channels, D width, H horizon, A action dim.
Parameters are named as in its checkpoints (heads/opentrackvla.py).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Tanh = Literal["off", "xy", "all"]
EMBEDDING_STD = 0.02
"""Of the ACT token (OpenTrackVLA's) and of the time, view and kind embeddings."""


class CrossModalityProjector(nn.Module):
    """Tokens [..., C] -> [..., D]: LayerNorm, Linear, GELU, Linear. One for coarse and fine tokens alike."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.net(tokens)
        return projected


class TVIEmbedder(nn.Module):
    """Time-view-index tokens: one before the tokens of each frame and view, and an angle token after it if wanted.

    Kinds are 0 (coarse, past) and 1 (fine, present). With `angle`, the heading of each frame is told as
    Linear([sin, cos]) + view + kind.
    """

    COARSE, FINE = 0, 1

    def __init__(self, width: int, max_time: int, views: int, *, angle: bool) -> None:
        super().__init__()
        self.time_emb = nn.Embedding(max_time, width)
        self.view_emb = nn.Embedding(views, width)
        self.kind_emb = nn.Embedding(2, width)
        for table in (self.time_emb, self.view_emb, self.kind_emb):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
        # Only where it is used: data-parallel training refuses parameters that get no gradient.
        self.angle_proj = nn.Linear(2, width) if angle else None

    def forward(self, tokens: Tensor, start: int, kind: int, yaw: Tensor | None = None) -> Tensor:
        """Put tokens [B, T, V, P, D] of the times start, start + 1, … in a row with theirs: [B, T * V * (P + 1), D].

        With `angle` it is P + 2; `yaw` [B, T] is the heading in radians.
        """
        B, T, V, _, D = tokens.shape
        place = self.view_emb.weight + self.kind_emb.weight[kind]  # [V, D]
        time = self.time_emb.weight[start : start + T, None] + place  # [T, V, D]
        blocks = [time[:, :, None].expand(B, T, V, 1, D)]
        if self.angle_proj is not None:
            assert yaw is not None
            angle = self.angle_proj(torch.stack([yaw.sin(), yaw.cos()], dim=-1))  # [B, T, D]
            blocks.append(angle[:, :, None, None] + place[:, None])
        return torch.cat([*blocks, tokens], dim=3).flatten(1, 3)


class PlannerHead3L(nn.Module):
    """Hidden state [B, D] -> normalised plan [B, H, A] in three layers, in float32 whatever the autocast.

    `tanh`: "off"; "all" bounds every number to (-1, 1), as OpenTrackVLA does where it is on; "xy" bounds the first two
    dimensions only, so that the heading is not limited to 1 rad.
    """

    def __init__(self, width: int, horizon: int, action_dim: int, *, tanh: Tanh) -> None:
        super().__init__()
        self.horizon, self.action_dim, self.tanh = horizon, action_dim, tanh
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, horizon * action_dim),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            plan: Tensor = self.mlp(hidden.float()).unflatten(1, (self.horizon, self.action_dim))
        if self.tanh == "all":
            return plan.tanh()
        return plan if self.tanh == "off" else torch.cat([plan[..., :2].tanh(), plan[..., 2:]], dim=-1)
