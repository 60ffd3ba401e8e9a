"""What a frozen network is to the pipeline: its exact preprocessing, its forward pass, and what it makes.

The same two functions, `preprocess` and `encode`, run in `vla featurize` and in the live policy, so that features
seen live equal features cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from vla.stores.errors import DataError, VlaError


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
    `context` is the number of past frames a feature depends on (0: its own time step only). `inputs` names what
    `preprocess` is given of each view; see there. `per` "instruction": the features depend on the instruction alone,
    and the store has one row for each distinct one. `trained_on` {input: what it has to be made with}, for networks
    that were trained on features: another backbone's grid of the same shape would be taken without a word.
    """

    name: str
    features: Mapping[str, FeatureSpec]
    identity: Mapping[str, Any]
    code_licence: str
    weights_licence: str
    random_weights: bool = False
    parameters: int = 0
    context: int = 0
    inputs: tuple[str, ...] = ("image",)
    per: Literal["frame", "instruction"] = "frame"
    trained_on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Backbone(Protocol):
    """A frozen network with its preprocessing. Deterministic; batch mates never change a feature."""

    def spec(self) -> BackboneSpec:
        """Describe features and identity. May read weights (to digest them); never runs the network."""
        ...

    def preprocess(self, view: Any) -> torch.Tensor:
        """Turn one view of one time step into the network's input, [3, h, w] float32. Safe to call from threads.

        `view` is an `Image` where `spec().inputs` is ("image",). Elsewhere it is a mapping of those names: "image",
        "instruction" (a str), and whatever the source's `extras` name, such as "depth" float32 [H, W] in metres or a
        cached feature. Such a backbone may return a tensor of any one shape and dtype, the same for every view.
        """
        ...

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network on `[B, V, 3, h, w]` float32 of B time steps; return `{name: [B, V, *shape]}` float32.

        With `context` C > 0 the input is `[B, C + 1, V, 3, h, w]`: the frames up to each time step, oldest first,
        an episode's first frame repeated where there are none before it. The result lies on the network's device and
        requires no gradient. B is the time step axis: views of one time step may be mixed, time steps never.
        """
        ...

    def to(self, device: torch.device) -> None:
        """Move the network. `encode` moves its input itself."""
        ...


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn a `RuntimeError` of a backbone, such as memory running out, into a one-line `DataError` on `what`."""
    try:
        yield
    except VlaError:
        raise
    except RuntimeError as error:
        said = next(iter(str(error).splitlines()), "no message")
        full = isinstance(error, torch.OutOfMemoryError)
        fix = "a smaller --set batch_size=N, then --resume" if full else ""
        raise DataError(f"{what}: the backbone failed: {type(error).__name__}: {said}", fix=fix) from error
