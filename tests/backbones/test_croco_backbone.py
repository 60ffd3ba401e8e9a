"""CroCo's tokens and weights; on a stand-in of its code, and on a checkout where there is one.

VLA_CROCO_CHECKOUT names a checkout of the repository.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.checkout import open_checkout
from vla.featurize.backbones.croco import LICENCE, REPOSITORY, TINY
from vla.featurize.backbones.registry import BACKBONES, load_backbone_class, make_backbone, missing
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.errors import DataError, MachineError
from vla.stores.fingerprint import canonical
from vla.stores.store import open_store

STAND_IN = {
    "models/rope.py": """
try:
    from models.curope import cuRoPE2D as Rope
except ImportError:
    print("Warning, cannot find the compiled version")
    class Rope: pass
""",
    "models/curope/__init__.py": "raise SystemExit('the compiled rotation was looked for')\n",
    "models/croco.py": """
import torch
from torch import nn
from models.rope import Rope
torch.backends.cuda.matmul.allow_tf32 = True

class Positions:
    pass

class PatchEmbed(nn.Module):
    def __init__(self, img_size, dim):
        super().__init__()
        self.img_size, self.grid_size = (img_size, img_size), (img_size // 16, img_size // 16)
        self.proj, self.position_getter = nn.Conv2d(3, dim, 16, 16), Positions()

class CroCoNet(nn.Module):
    def __init__(self, img_size=224, enc_embed_dim=768, enc_depth=12, enc_num_heads=12, dec_embed_dim=512,
                 dec_depth=8, dec_num_heads=16, pos_embed="cosine"):
        super().__init__()
        if not pos_embed.startswith("RoPE"):
            raise NotImplementedError("Unknown pos_embed " + pos_embed)
        self.enc_embed_dim, self.patch_embed = enc_embed_dim, PatchEmbed(img_size, enc_embed_dim)
        self.enc_blocks = nn.ModuleList(nn.Linear(enc_embed_dim, enc_embed_dim) for _ in range(enc_depth))
        self.enc_norm = nn.LayerNorm(enc_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim))
        self.decoder_embed = nn.Linear(enc_embed_dim, dec_embed_dim)
        self.dec_blocks = nn.ModuleList(nn.Linear(dec_embed_dim, dec_embed_dim) for _ in range(dec_depth))
        self.dec_norm, self.prediction_head = nn.LayerNorm(dec_embed_dim), nn.Linear(dec_embed_dim, 768)

    def _encode_image(self, image, do_mask=False):
        assert image.shape[-2:] == self.patch_embed.img_size and not do_mask
        tokens = self.patch_embed.proj(image).flatten(2).transpose(1, 2)
        for block in self.enc_blocks:
            tokens = tokens + torch.tanh(block(tokens))
        return self.enc_norm(tokens), None, None
""",
}

Pictures = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Code:
    """A checkout, and a file of weights in the published layout whose every parameter matters."""

    options: dict[str, Any]
    content: dict[str, Any]
    file: Path

    def make(self, **options: Any) -> Backbone:
        return make_backbone("croco", **{**self.options, "weights": str(self.file), **options})


@pytest.fixture(scope="module", params=["stand-in", "checkout"])
def code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Code:
    options: dict[str, Any] = {"checkout": os.environ.get("VLA_CROCO_CHECKOUT")}
    if request.param == "stand-in":
        folder = tmp_path_factory.mktemp("croco")
        for name, text in STAND_IN.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        options = {"checkout": str(folder), "any_commit": True}
    elif options["checkout"] is None:
        pytest.skip("VLA_CROCO_CHECKOUT does not name a checkout of CroCo")
    kwargs = {**TINY, "img_size": 32}  # 2x2 patches: quick
    with open_checkout(REPOSITORY, options["checkout"], any_commit=True).importing() as load:
        network = load("models.croco").CroCoNet(**kwargs)
    generator = torch.Generator().manual_seed(0)
    tensors = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in network.state_dict().items()}
    content = {"croco_kwargs": kwargs, "model": tensors}
    file = tmp_path_factory.mktemp("weights") / "CroCo_V2_Tiny.pth"
    torch.save(content, file)
    return Code(options, content, file)


def encode(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    return backbone.encode(images)["croco"]


def pictures_in(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max().item() <= 1e-5 * wanted.abs().max().item()


def test_random_weights_make_the_published_grid_of_a_tiny_network(code: Code) -> None:
    backbone = code.make(weights="random")
    spec = backbone.spec()
    assert {name: (feature.shape, feature.dims) for name, feature in spec.features.items()} == {
        "croco": ((14, 14, 64), ("y", "x", "channel"))
    }
    assert dict(re.findall(r"(\w+) \[([^\]]*)\]", BACKBONES["croco"].features)) == {"croco": "14, 14, 1024"}
    assert (spec.name, spec.random_weights, spec.weights_licence) == ("croco", True, "none (random)")
    made = encode(backbone, torch.randn(1, 2, 3, 224, 224))
    assert made.shape == (1, 2, 14, 14, 64)
    assert made.dtype == torch.float32
    assert made.is_contiguous()


def test_a_feature_depends_on_its_own_picture_alone(code: Code) -> None:
    backbone, images = code.make(), pictures_in(2, 2)
    together = encode(backbone, images)
    assert together.shape == (2, 2, 2, 2, 64)
    for step in range(2):
        for view in range(2):
            alone = encode(backbone, images[step : step + 1, view : view + 1])
            assert_close(alone[0, 0], together[step, view])
    assert (together[0, 0] - together[0, 1]).abs().max() > 0.1
    assert backbone.spec().context == 0


def test_cells_lie_as_in_the_picture(code: Code) -> None:
    backbone, images = code.make(), pictures_in(1, 1)
    changed = images.clone()
    changed[..., :16, 16:] += 5
    moved = (encode(backbone, changed) - encode(backbone, images))[0, 0].norm(dim=-1)
    assert moved.argmax().item() == 1, "row 0, column 1"


def test_a_pool_averages_cells(code: Code) -> None:
    images = pictures_in(1, 2)
    pooled = encode(code.make(pool=1), images)
    assert pooled.shape == (1, 2, 1, 1, 64)
    assert_close(pooled[:, :, 0, 0], encode(code.make(), images).mean(dim=(2, 3)))


def test_each_option_that_changes_features_changes_the_identity(code: Code) -> None:
    changes = {"weights": {"weights": "random"}, "pool": {"pool": 1}, "seed": {"weights": "random", "seed": 1}}
    specs = [code.make(), *(code.make(**options) for options in changes.values())]
    assert len({canonical(made.spec().identity) for made in specs}) == len(specs)
    assert load_backbone_class("croco").settings_type.model_fields.keys() == changes.keys() | {"checkout", "any_commit"}
    assert code.make(any_commit=True).spec() == code.make().spec()
    assert {"layer", "preprocess", "checkout"} <= code.make().spec().identity.keys()


def test_building_and_encoding_leave_the_process_as_it_was(code: Code, capsys: pytest.CaptureFixture[str]) -> None:
    before, images = torch.random.get_rng_state(), pictures_in(1, 1)
    made = [encode(code.make(), images) for _ in range(2)]
    assert torch.equal(made[0], made[1])
    code.make(weights="random")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.backends.cuda.matmul.allow_tf32, "the repository switches it on"
    assert capsys.readouterr().out == "", "stdout may be JSON"
    assert not any(name.partition(".")[0] == "models" for name in sys.modules)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        under = encode(code.make(), images.clone().requires_grad_())
    assert torch.equal(under, made[0])
    assert not under.requires_grad


def test_moving_keeps_the_identity_and_forgets_positions_of_the_old_device(code: Code) -> None:
    backbone: Any = code.make()
    before, remembered = backbone.spec(), backbone._network.patch_embed.position_getter
    encode(backbone, pictures_in(1, 1))
    backbone.to(torch.device("meta"))
    assert backbone.spec() == before
    assert backbone._network.patch_embed.position_getter is not remembered


def test_pictures_are_squeezed_to_the_networks_size_and_normalised_as_imagenet(code: Code, pictures: Pictures) -> None:
    images = code.make().preprocess(pictures[0])
    assert images.shape == (3, 32, 32)
    assert images.dtype == torch.float32
    grey = code.make().preprocess(np.full((10, 20, 3), 128, np.uint8))
    wanted = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(grey.mean(dim=(1, 2)).numpy(), wanted, rtol=1e-5)
    with pytest.raises(DataError, match=r"expected \[H, W, 3\] uint8"):
        code.make().preprocess(np.zeros((8, 8, 3), np.float32))


def test_only_the_encoder_is_kept_and_both_licences_are_recorded(code: Code) -> None:
    spec = code.make().spec()
    encoder = [values for name, values in code.content["model"].items() if name.startswith(("enc_", "patch_embed"))]
    assert spec.parameters == sum(values.numel() for values in encoder)
    assert spec.weights_licence == LICENCE
    known = "any_commit" not in code.options
    assert spec.code_licence == (LICENCE if known else "CroCo: see the licence in the checkout")
    assert (BACKBONES["croco"].code_licence, BACKBONES["croco"].weights_licence) == (LICENCE, LICENCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop("enc_norm.weight"), "does not fit: it lacks enc_norm.weight"),
        (lambda c: c["model"].update({"stray": torch.ones(1)}), "does not fit: it has unexpected stray"),
        (lambda c: c["model"].update({"enc_norm.bias": torch.ones(3)}), r"enc_norm.bias is \(3,\), the network's"),
        (lambda c: c["croco_kwargs"].update({"enc_depth": 3}), "does not fit: it lacks enc_blocks.2"),
        (lambda c: c["croco_kwargs"].update({"enc_embed_dim": 4096}), "does not fit: .* is "),
        (lambda c: c["croco_kwargs"].update({"width": 3}), "asks for no CroCoNet: .*unexpected keyword argument"),
        (lambda c: c["croco_kwargs"].update({"pos_embed": "none"}), "asks for no CroCoNet: Unknown pos_embed none"),
        (lambda c: c["croco_kwargs"].update({"enc_depth": 10**9}), "croco_kwargs enc_depth=1000000000"),
        (lambda c: c.pop("croco_kwargs"), "has no croco_kwargs; expected a published CroCo v2 file"),
        (lambda c: c.update({"model": [1]}), "has no state dict 'model'"),
        (lambda c: c.update({"args": argparse.Namespace(x=1)}), "is not a file of weights"),
    ],
    ids=["lacks", "stray", "shape", "depth", "width", "kwarg", "choice", "huge", "kwargs", "model", "pickle"],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(change: Any, message: str, code: Code, tmp_path: Path) -> None:
    content = {name: dict(values) for name, values in code.content.items()}
    change(content)
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=message) as caught:
        code.make(weights=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_weights_or_checkout_the_errors_say_how_to_supply_them(code: Code) -> None:
    with pytest.raises(MachineError, match=r"CroCo_V2_ViTLarge_BaseDecoder.pth.*Try: --weights FILE"):
        make_backbone("croco", **code.options)
    with pytest.raises(MachineError, match=r"no checkout of naver/croco is given. Try: git clone https://"):
        make_backbone("croco", weights="random")
    assert missing("croco") == [f"git clone {REPOSITORY.url} DIR, then --set options.checkout=DIR"]


def test_features_live_equal_those_cached(code: Code, tmp_path: Path) -> None:
    config = {
        "source": "synthetic:episodes=1,length=[3,3],cameras=2,image_size=24",
        "backbone": "croco",
        "weights": str(code.file),
        "options": code.options,
        "store": {"dtype": "float32"},
        "batch_size": 2,
    }
    job = prepare(FeaturizeConfig.build(config))
    assert job.plan.to_json()["weights_licence"] == LICENCE, "printed with the plan"
    run(job, tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert store.manifest.provenance["weights_licence"] == LICENCE
    live = rebuild_backbone(
        store.manifest.provenance["backbone"],
        store.manifest.fingerprint["backbone"],
        {"croco": {**code.options, "weights": str(code.file)}},
    )
    frames = SyntheticSource(episodes=1, length=(3, 3), cameras=2, image_size=24).frames(0, 0, 3)
    for row, views in enumerate(frames):
        seen = encode(live, torch.stack([live.preprocess(view) for view in views])[None])[0]
        assert_close(torch.from_numpy(store.read("croco", np.array([row]))[0]), seen)
