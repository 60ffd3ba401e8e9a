"""What a frozen network is to the pipeline: its exact preprocessing, its forward pass, and what it makes.

The same two functions, `preprocess` and `encode`, run in `vla featurize` and in the live policy, so that features
seen live equal features cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vla.featurize.image import Image


@dataclass(frozen=True)
class FeatureSpec:
    """One named tensor per frame and view.

    `shape` excludes frames and views; `dims` names its axes, e.g. ("y", "x", "channel") for a grid and
    ("token", "channel") for tokens; the channel axis is last. `dtype` is what the store keeps.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str = "float16"


@dataclass(frozen=True)
class BackboneSpec:
    """What a configured backbone makes, and all that its features depend on.

    `identity` is JSON-able and enters the fingerprint: network, digest of weights, layer, pooling, the resolved
    preprocessing. Changing anything that changes a feature must change it; batch size and device must not.
    `context` is the number of past frames a feature depends on (0: its own time step only).
    """

    name: str
    features: Mapping[str, FeatureSpec]
    identity: Mapping[str, Any]
    code_licence: str
    weights_licence: str
    random_weights: bool = False
    parameters: int = 0
    context: int = 0


class Backbone(Protocol):
    """A frozen network with its preprocessing. Deterministic; batch mates never change a feature."""

    def spec(self) -> BackboneSpec:
        """Describe features and identity. May read weights (to digest them); never runs the network."""
        ...

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn one image [H, W, 3] uint8 into the network's input [3, h, w] float32. Safe to call from threads."""
        ...

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network on `[B, V, 3, h, w]` float32 of B time steps; return `{name: [B, V, *shape]}` float32.

        The result lies on the network's device and requires no gradient. B is the time step axis: views of one time
        step may be mixed, time steps never.
        """
        ...

    def to(self, device: torch.device) -> None:
        """Move the network. `encode` moves its input itself."""
        ...
