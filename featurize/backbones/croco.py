"""CroCo v2 (arXiv:2211.10408): patch tokens of an encoder that was trained to complete one view from another.

Only the encoder runs, on one picture at a time and with nothing masked. The published file says itself how its network
is sized (`croco_kwargs`), so ViT-B and ViT-L are both read. Code and weights are for non-commercial use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.checkout import Checkout, Repository, open_checkout
from vla.featurize.backbones.resize import resize_exact
from vla.featurize.image import Image
from vla.pretrained.inference import count_parameters, freeze, frozen_inference
from vla.pretrained.weights import (
    DAMAGE,
    RANDOM,
    digest_files,
    digest_tensors,
    find_file,
    load_strictly,
    require_fit,
)
from vla.stores.errors import DataError, MachineError
from vla.stores.pointers import refuse_pointer
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS, UserGiven

REPOSITORY = Repository(
    url="https://github.com/naver/croco",
    package="models",
    entry="models.croco",
    commits=("d7de0705845239092414480bd829228723bf20de", "2f3d5d5d13a147acc946210071d5b79daf84533d"),
    python_sha256="71d3c139638bb49e4296bfc11f000aed9cf4c858e8c8fc3974bcfaffb0850d1e",
    # A compiled rotation of positions, built by hand on some machines: features would depend on which.
    hidden=("models.curope",),
)

LICENCE = "CC BY-NC-SA 4.0 (non-commercial)"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of [0, 1] pixels: the repository's `demo.py`."""

TINY: dict[str, Any] = {
    "enc_embed_dim": 64,
    "enc_depth": 2,
    "enc_num_heads": 4,
    "dec_embed_dim": 48,
    "dec_depth": 1,
    "dec_num_heads": 4,
    "pos_embed": "RoPE100",
}
"""What `--weights random` builds: 224 px in patches of 16 px, as published, narrow and shallow."""

DECODER = ("decoder_embed", "dec_blocks", "dec_norm", "prediction_head", "mask_token")
"""Parts that no feature depends on: deleted once the file was found to be whole."""


MAX_SIZE = 8192
"""Of any number in `croco_kwargs` (the published: at most 1024): a file cannot keep us building layers for ever."""


class CrocoSettings(Settings):
    """`checkout`: folder of the repository. `any_commit`: take a commit that was not tried, or changed files.

    `weights`: the published .pth file, a folder that holds it, or "random" for a tiny network. `pool`: average the
    tokens to pool x pool cells (None: all of them). `seed`: of random weights.
    """

    checkout: Annotated[str | None, UserGiven()] = None
    any_commit: Annotated[bool, UserGiven()] = False
    weights: Annotated[str | None, WEIGHTS] = None
    pool: int | None = Field(None, ge=1, le=64)
    seed: int = Field(0, ge=0)


class Croco:
    """`croco` [y, x, channel]: the encoder's normalised tokens, row by row from the top left."""

    settings_type: ClassVar[type[Settings]] = CrocoSettings

    def __init__(self, settings: CrocoSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self._checkout = open_checkout(REPOSITORY, settings.checkout, any_commit=settings.any_commit)
        if settings.weights == RANDOM:
            self._network, self._weights = _random(self._checkout, settings.seed)
        else:
            self._network, self._weights = _load(self._checkout, settings.weights)
        for name in DECODER:
            delattr(self._network, name)
        patches = self._network.patch_embed
        self._height_width: tuple[int, int] = tuple(patches.img_size)
        self._grid: tuple[int, int] = tuple(patches.grid_size)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self._mean, self._std = mean, std

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        pool, random = self.settings.pool, self.settings.weights == RANDOM
        rows, columns = (pool, pool) if pool else self._grid
        return BackboneSpec(
            name="croco",
            features={"croco": FeatureSpec((rows, columns, self._network.enc_embed_dim), ("y", "x", "channel"))},
            identity={
                "network": "croco v2 encoder",
                "checkout": self._checkout.identity,
                **self._weights,
                "layer": "enc_norm of the last block, nothing masked",
                "pool": pool,
                "preprocess": {
                    "resize": "exact",
                    "resample": "bicubic",
                    "size": list(self._height_width),
                    "scale": "px / 255",
                    "mean_std": [list(MEAN), list(STD)],
                },
            },
            code_licence=LICENCE if self._checkout.was_tried else "CroCo: see the licence in the checkout",
            weights_licence="none (random)" if random else LICENCE,
            random_weights=random,
            parameters=count_parameters(self._network),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, 224, 224] float32, normalised; the size is the weights'."""
        return (resize_exact(image, *self._height_width, "bicubic") / 255 - self._mean) / self._std

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, 224, 224] into {"croco": [B, V, y, x, channel]} float32."""
        with frozen_inference(self.device):
            tokens, _, _ = self._network._encode_image(images.flatten(0, 1).to(self.device), do_mask=False)
            grids: torch.Tensor = tokens.reshape(len(tokens), *self._grid, -1)
            if self.settings.pool is not None:
                maps = grids.permute(0, 3, 1, 2)
                grids = functional.adaptive_avg_pool2d(maps, self.settings.pool).permute(0, 2, 3, 1)
            return {"croco": grids.reshape(*images.shape[:2], *grids.shape[1:]).contiguous()}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self._network.to(device)
        # It remembers positions on the device that first asked for them.
        self._network.patch_embed.position_getter = type(self._network.patch_embed.position_getter)()
        self.device = device


def _random(checkout: Checkout, seed: int) -> tuple[Any, dict[str, Any]]:
    with checkout.importing() as load, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = freeze(load(REPOSITORY.entry).CroCoNet(**TINY))
    return network, {"weights": RANDOM, "seed": seed, "weights_sha256": digest_tensors(network.state_dict())}


def _load(checkout: Checkout, weights: str | None) -> tuple[Any, dict[str, Any]]:
    if weights is None:
        raise MachineError(
            "backbone 'croco' has no weights on any hub",
            expected="CroCo_V2_ViTLarge_BaseDecoder.pth, whose address is in the checkout's README",
            fix="--weights FILE (or --weights random for a trial run)",
        )
    path = find_file(Path(weights).expanduser())
    kwargs, tensors = read_checkpoint(path)
    with checkout.importing() as load:
        network_class = load(REPOSITORY.entry).CroCoNet
        try:  # without memory, so that a file cannot ask for more than its own tensors fill
            with torch.device("meta"):
                network = network_class(**kwargs)
        except DAMAGE as error:
            raise DataError(f"{path} asks for no CroCoNet: {str(error).partition(chr(10))[0]}") from None
    require_fit(network, tensors, path)
    load_strictly(network.to_empty(device="cpu"), tensors, path)
    return freeze(network), {"weights_sha256": digest_files([path])}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read (arguments of `CroCoNet`, its tensors) of a published file, running no code that it may carry.

    Raises `DataError` for anything else.
    """
    try:
        content = torch.load(path, "cpu", weights_only=True)
    except DAMAGE as error:
        refuse_pointer(path)
        raise DataError(f"{path} is not a file of weights: {str(error).partition(chr(10))[0]}") from None
    kwargs, tensors = (content.get(key) if isinstance(content, dict) else None for key in ("croco_kwargs", "model"))
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise DataError(f"{path} has no croco_kwargs", expected="a published CroCo v2 file")
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise DataError(f"{path} has no state dict 'model'", expected="a published CroCo v2 file")
    huge = [f"{name}={value}" for name, value in kwargs.items() if isinstance(value, int | float) and value > MAX_SIZE]
    if huge:
        raise DataError(f"{path}: croco_kwargs {', '.join(huge)}", expected=f"at most {MAX_SIZE}")
    return kwargs, tensors
