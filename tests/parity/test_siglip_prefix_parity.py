"""Image tokens against transformers' own PaliGemma and PI0, and pictures against openpi's rules, written anew.

openpi fits a uint8 picture into 224 x 224 with Pillow's bilinear filter, sides worked out as int(side / ratio), centred
on black, and maps 0..255 to -1..1 as value / 255 * 2 - 1. It takes the projector's output as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image as Picture

from vla.featurize.backbones.siglip_prefix import SiglipPrefix, SiglipPrefixSettings
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.stores.store import open_store

EYE = {
    "model_type": "siglip_vision_model",
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vision_use_head": False,
}
GEMMA = {
    "model_type": "gemma",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
}
IMAGE_TOKEN = 299


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """`{model type: (folder, the model in memory)}`; weights are wide enough for tokens to differ clearly."""
    vlm = {
        "vision_config": dict(EYE),
        "text_config": dict(GEMMA),
        "projection_dim": 64,
        "hidden_size": 64,
        "image_token_index": IMAGE_TOKEN,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = {
            "paligemma": transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**vlm)),
            "pi0": transformers.PI0ForConditionalGeneration(
                transformers.PI0Config(vlm_config={**vlm, "model_type": "paligemma"}, dit_config=dict(GEMMA))
            ),
        }
    root = tmp_path_factory.mktemp("vlm")
    transformers.utils.logging.disable_progress_bar()
    for kind, model in made.items():
        with torch.no_grad():
            for name, values in model.named_parameters():
                if "vision_tower" in name or "projector" in name:
                    values.mul_(2)
        model.eval().save_pretrained(root / kind)
    transformers.utils.logging.enable_progress_bar()
    return {kind: (root / kind, model) for kind, model in made.items()}


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    """Wide, tall, odd, small and exact ones; 288 x 100 comes out at 223 px for want of a rounding."""
    random = np.random.default_rng(1)
    sizes = [(480, 640), (320, 180), (101, 77), (30, 40), (224, 224), (288, 100), (720, 1280)]
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def openpi_pixels(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return [3, 224, 224] float32 in -1..1."""
    height, width = picture.shape[:2]
    ratio = max(width / 224, height / 224)
    inner_height, inner_width = int(height / ratio), int(width / ratio)
    if (height, width) != (224, 224):
        picture = np.asarray(
            Picture.fromarray(picture).resize((inner_width, inner_height), Picture.Resampling.BILINEAR)
        )
    top, left = (224 - inner_height) // 2, (224 - inner_width) // 2
    bars = ((top, 224 - inner_height - top), (left, 224 - inner_width - left), (0, 0))
    values = np.pad(picture, bars).astype(np.float32)
    return (values / np.float32(255) * np.float32(2) - np.float32(1)).transpose(2, 0, 1)


def assert_same_tokens(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() >= 0.9999
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), "scale included: nothing is divided"


def test_pixels_equal_openpis_bit_for_bit(pictures: list[NDArray[np.uint8]]) -> None:
    backbone = SiglipPrefix(SiglipPrefixSettings(weights="random"))
    for picture in pictures:
        np.testing.assert_array_equal(backbone.preprocess(picture).numpy(), openpi_pixels(picture))


def test_an_exact_picture_is_normalised_as_paligemmas_own_processor_does(pictures: list[NDArray[np.uint8]]) -> None:
    backbone = SiglipPrefix(SiglipPrefixSettings(weights="random"))
    theirs = transformers.SiglipImageProcessorPil()(pictures[4], return_tensors="pt")["pixel_values"][0]
    assert (backbone.preprocess(pictures[4]) - theirs).abs().max() <= 1e-6


def test_tokens_equal_paligemmas_image_features(
    saved: dict[str, tuple[Path, Any]], pictures: list[NDArray[np.uint8]]
) -> None:
    folder, model = saved["paligemma"]
    backbone = SiglipPrefix(SiglipPrefixSettings(weights=str(folder)))
    pixels = torch.from_numpy(np.stack([openpi_pixels(picture) for picture in pictures]))
    with torch.no_grad():
        theirs = model.model.get_image_features(pixels).pooler_output
    ours = backbone.encode(torch.stack([backbone.preprocess(picture) for picture in pictures])[:, None])["siglip"]
    assert ours.shape == (7, 1, 256, 64)
    assert_same_tokens(ours[:, 0], theirs)


def test_tokens_of_two_cameras_equal_the_image_part_of_pi0s_own_prefix(
    saved: dict[str, tuple[Path, Any]], pictures: list[NDArray[np.uint8]]
) -> None:
    folder, model = saved["pi0"]
    backbone = SiglipPrefix(SiglipPrefixSettings(weights=str(folder)))
    pixels = torch.from_numpy(np.stack([openpi_pixels(picture) for picture in pictures[:4]])).reshape(2, 2, 3, 224, 224)
    text = torch.tensor([[2, 7, 9], [2, 5, 6]])
    ids = torch.cat([torch.full((2, 512), IMAGE_TOKEN), text], dim=1)
    with torch.no_grad():
        prefix = model.model.embed_prefix(ids, pixels, torch.ones(2, 2, dtype=torch.bool))
    images = torch.stack([backbone.preprocess(picture) for picture in pictures[:4]]).reshape(2, 2, 3, 224, 224)
    ours = backbone.encode(images)["siglip"]
    assert_same_tokens(ours.flatten(1, 2), prefix[:, :512])
    words = model.model.get_input_embeddings().weight[text] * 64**0.5
    assert torch.allclose(prefix[:, 512:], words), "the words carry Gemma's factor, so the image tokens need none"


def test_a_store_holds_the_tokens_in_float16(saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, model = saved["pi0"]
    source = "synthetic:episodes=1,length=[3,3],cameras=2"
    job = prepare(FeaturizeConfig(source=source, backbone="siglip-prefix", weights=str(folder)))
    run(job, tmp_path / "store")
    cached = open_store(tmp_path / "store").read("siglip", np.arange(3))
    assert (cached.shape, cached.dtype) == ((3, 2, 256, 64), np.float16)
    for row, views in enumerate(job.source.frames(0, 0, 3)):
        pixels = torch.from_numpy(np.stack([openpi_pixels(picture) for picture in views]))
        with torch.no_grad():
            theirs = model.model.vlm.get_image_features(pixels).pooler_output
        assert np.abs(cached[row] - theirs.numpy()).max() <= 1e-3 * theirs.abs().max()
