"""CroCo against the repository's own network, its published sizes, and the preparation of pictures in its demo.

VLA_CROCO_CHECKOUT names a checkout of the repository.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.featurize.backbones.registry import make_backbone

CHECKOUT = os.environ.get("VLA_CROCO_CHECKOUT", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="VLA_CROCO_CHECKOUT does not name a checkout of CroCo")

SMALL = {"enc_embed_dim": 96, "enc_depth": 3, "enc_num_heads": 6, "dec_embed_dim": 48, "dec_depth": 1}
LARGE = {"enc_embed_dim": 1024, "enc_depth": 24, "enc_num_heads": 16, "dec_embed_dim": 768, "dec_num_heads": 12}
"""Of CroCo_V2_ViTLarge_BaseDecoder, whose decoder is 12 deep."""


@pytest.fixture(scope="module")
def croco_net() -> Iterator[Any]:
    """Their `CroCoNet`, imported by `sys.path` as the repository says."""
    sys.path.insert(0, CHECKOUT)
    precision = torch.get_float32_matmul_precision()
    yield __import__("models.croco", fromlist=["x"]).CroCoNet
    torch.set_float32_matmul_precision(precision)
    sys.path.remove(CHECKOUT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]


@pytest.mark.parametrize("position", ["RoPE100", "cosine"])
def test_tokens_equal_their_encoders_bit_for_bit(position: str, croco_net: Any, tmp_path: Path) -> None:
    kwargs = {**SMALL, "dec_num_heads": 4, "pos_embed": position}
    theirs = croco_net(**kwargs).eval()
    for values in theirs.state_dict().values():
        values.add_(0.05 * torch.randn(values.shape, generator=torch.Generator().manual_seed(values.numel())))
    torch.save({"croco_kwargs": kwargs, "model": theirs.state_dict()}, tmp_path / "small.pth")
    ours = make_backbone("croco", weights=str(tmp_path / "small.pth"), checkout=CHECKOUT)
    images = torch.randn(2, 1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, _, _ = theirs._encode_image(images[:, 0], do_mask=False)
    made = ours.encode(images)["croco"]
    assert made.shape == (2, 1, 14, 14, 96)
    assert made.dtype == wanted.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(made.flatten(), wanted.flatten(), 0) >= 0.9999
    assert torch.equal(made.flatten(1, 3), wanted)


def test_the_published_encoder_has_the_parameters_that_are_listed(croco_net: Any) -> None:
    with torch.device("meta"):
        network = croco_net(**LARGE, dec_depth=12, pos_embed="RoPE100")
    encoder = [p.numel() for name, p in network.named_parameters() if name.startswith(("enc_", "patch_embed"))]
    assert sum(encoder) // 10**6 == 303
    assert sum(p.numel() for p in network.parameters()) // 10**6 == 417


def test_pictures_of_the_networks_size_are_prepared_as_in_the_demo() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    wanted = torch.from_numpy(picture.transpose(2, 0, 1).copy()).div(255).sub(mean).div(std)  # ToTensor, Normalize
    ours = make_backbone("croco", weights="random", checkout=CHECKOUT).preprocess(picture)
    assert torch.equal(ours, wanted)
