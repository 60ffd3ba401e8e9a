"""Backbones in a row, live: pictures through the backbones whose cached features another backbone was given.

What was rounded on its way through a store is rounded alike here, so that features seen live equal features cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vla.featurize.backbones.base import Backbone, BackboneSpec
from vla.featurize.image import Image
from vla.stores.errors import UsageError
from vla.stores.manifest import FeatureInfo
from vla.training.storage import round_trip_dtype


class Chain:
    """A `Backbone` from pictures to what `last` makes of the features of others.

    `made_by` {feature: the backbone that makes it}; `inputs` {feature: its part of the fingerprint}, of which
    "feature" says how it was stored; `scales` {feature: the live int8 grid, float32 [C], or None}.
    """

    def __init__(
        self,
        last: Backbone,
        made_by: Mapping[str, Backbone],
        inputs: Mapping[str, Any],
        scales: Mapping[str, Sequence[float] | None],
    ) -> None:
        spec = last.spec()
        if spec.context:
            raise UsageError(f"backbone {spec.name!r} looks back on features of other backbones, live", expected="none")
        self._last, self._made_by, self._scales = last, dict(made_by), scales
        self._infos = {name: FeatureInfo.build(inputs[name]["feature"]) for name in made_by}
        self._shapes: dict[str, torch.Size] = {}

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`: that of the last backbone, with those before it as its inputs."""
        last, before = self._last.spec(), {name: backbone.spec() for name, backbone in self._made_by.items()}
        inputs = {
            name: {
                "backbone": {"name": spec.name, **spec.identity},
                "context": spec.context,
                "feature": self._infos[name].model_dump(mode="json"),
            }
            for name, spec in before.items()
        }
        return replace(
            last,
            identity={**last.identity, "inputs": inputs},
            inputs=("image",),
            trained_on={},
            context=max(spec.context for spec in before.values()),
            parameters=last.parameters + sum(spec.parameters for spec in before.values()),
            random_weights=last.random_weights or any(spec.random_weights for spec in before.values()),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Return what all backbones take of a picture, end to end, float32 [N]."""
        ready = {name: backbone.preprocess(image) for name, backbone in self._made_by.items()}
        self._shapes = {name: tensor.shape for name, tensor in ready.items()}
        return torch.cat([tensor.flatten() for tensor in ready.values()])

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, N], or [B, C + 1, V, N] where a backbone looks back, into {name: [B, V, *shape]} float32."""
        parts = torch.split(images, [shape.numel() for shape in self._shapes.values()], dim=-1)
        features = {}
        for (name, shape), part in zip(self._shapes.items(), parts, strict=True):
            backbone, pictures = self._made_by[name], part.reshape(*part.shape[:-1], *shape)
            if images.ndim == 4:
                context = backbone.spec().context
                pictures = pictures[:, -context - 1 :] if context else pictures[:, -1]
            values = round_trip_dtype(backbone.encode(pictures)[name], self._infos[name].dtype, self._scales[name])
            # numpy has no bfloat16: as from a store, such features come as float32.
            values = values.float() if values.dtype == torch.bfloat16 else values
            features[name] = values.cpu().numpy()
        batch, views = next(iter(features.values())).shape[:2]
        ready = [
            [self._last.preprocess({name: of[frame, view] for name, of in features.items()}) for view in range(views)]
            for frame in range(batch)
        ]
        return self._last.encode(torch.stack([torch.stack(row) for row in ready]))

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        for backbone in (self._last, *self._made_by.values()):
            backbone.to(device)
