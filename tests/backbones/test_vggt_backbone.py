"""VGGT's tokens: scenes, contexts, layers and weights; on a stand-in of its code, and on a checkout where there is one.

VLA_VGGT_CHECKOUT names a checkout of the repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.checkout import open_checkout
from vla.featurize.backbones.registry import BACKBONES, load_backbone_class, make_backbone, missing
from vla.featurize.backbones.vggt import SCENE_PIXELS
from vla.featurize.backbones.vggt_network import REPOSITORY, TINY, Architecture, build
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.errors import DataError, FingerprintError, MachineError, UsageError
from vla.stores.fingerprint import canonical
from vla.stores.join import join_stores
from vla.stores.store import open_store

STAND_IN = {
    "vggt/layers/attention.py": "class MemEffAttention: pass\n",
    "vggt/layers/block.py": "class NestedTensorBlock: pass\n",
    "vggt/layers/vision_transformer.py": """
from torch import nn

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)

class DinoVisionTransformer(nn.Module):
    def __init__(self, embed_dim, patch_size, depth, num_heads, **fixed):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(Block(embed_dim) for _ in range(depth))

    def forward(self, images):
        tokens = self.proj(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block.norm1(tokens)
        return {"x_norm_patchtokens": tokens}
""",
    "vggt/models/aggregator.py": """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.q_norm = nn.LayerNorm(dim // heads)

class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn, self.fc = Attention(dim, heads), nn.Linear(dim, dim)

class Positions:
    def __init__(self):
        self.cache = {}

class Aggregator(nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_register_tokens, patch_embed):
        super().__init__()
        self.first, self.depth, self.aa_block_num = 1 + num_register_tokens, depth, depth
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth)) for _ in range(2)
        )
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, embed_dim))
        self.position_getter = Positions()
        self.register_buffer("mean", torch.full((1, 1, 3, 1, 1), 0.5), persistent=False)

    def forward(self, images):
        B, S, _, H, W = images.shape
        tokens = self.patch_embed((images - self.mean).view(B * S, 3, H, W))["x_norm_patchtokens"]
        tokens = tokens.unflatten(0, (B, S))
        camera = torch.cat([self.camera_token[:, :1], self.camera_token[:, 1:].expand(-1, S - 1, -1, -1)], 1)
        tokens = torch.cat([camera.expand(B, -1, self.first, -1), tokens], 2)
        layers = []
        for index in range(self.aa_block_num):
            within = tokens + torch.tanh(self.frame_blocks[index].fc(tokens))
            tokens = within + torch.tanh(self.global_blocks[index].fc(within.mean(dim=(1, 2), keepdim=True)))
            layers.append(torch.cat([within, tokens], -1))
        return layers, self.first
""",
}

SIZE = [28, 42]
GRID = (2, 3)
CHANNELS = 2 * TINY.width

Pictures = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Code:
    """A checkout, and a file of weights in the layout of VGGT-1B whose every parameter matters."""

    options: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    file: Path

    def make(self, **options: Any) -> Backbone:
        return make_backbone("vggt", **{**self.options, "size": SIZE, "weights": str(self.file), **options})

    def network(self) -> Any:
        """The whole network as the checkout makes it, loaded by torch alone."""
        network = build(open_checkout(REPOSITORY, self.options["checkout"], any_commit=True), TINY)
        network.load_state_dict({k[len("aggregator.") :]: v for k, v in self.tensors.items() if "aggregator" in k})
        return network


@pytest.fixture(scope="module", params=["stand-in", "checkout"])
def code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Code:
    options: dict[str, Any] = {"checkout": os.environ.get("VLA_VGGT_CHECKOUT")}
    if request.param == "stand-in":
        folder = tmp_path_factory.mktemp("vggt")
        for name, text in STAND_IN.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        options = {"checkout": str(folder), "any_commit": True}
    elif options["checkout"] is None:
        pytest.skip("VLA_VGGT_CHECKOUT does not name a checkout of VGGT")
    network = build(open_checkout(REPOSITORY, options["checkout"], any_commit=True), TINY)
    generator = torch.Generator().manual_seed(0)
    tensors = {"camera_head.token": torch.ones(1), "depth_head.x.weight": torch.ones(2, 2)}
    for name, values in network.state_dict().items():
        scale = 1.0 if values.ndim == 1 and name.endswith(("weight", "gamma")) else 0.0
        tensors[f"aggregator.{name}"] = scale + 0.1 * torch.randn(values.shape, generator=generator)
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(tensors, file)
    return Code(options, tensors, file)


def scenes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 3, *SIZE, generator=torch.Generator().manual_seed(sum(shape)))


def encode(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    return backbone.encode(images)["vggt"]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max().item() <= 1e-5 * wanted.abs().max().item()


def assert_differs(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max().item() > 1e-3 * wanted.abs().max().item()


def test_the_grid_is_that_of_the_patches_and_named_after_the_backbone(code: Code) -> None:
    whole = code.make(size=518).spec()
    assert {name: (spec.shape, spec.dims) for name, spec in whole.features.items()} == {
        "vggt": ((37, 37, CHANNELS), ("y", "x", "channel"))
    }
    assert whole.name == "vggt"
    assert dict(re.findall(r"(\w+) \[([^\]]*)\]", BACKBONES["vggt"].features)) == {"vggt": "37, 37, 2048"}
    made = encode(code.make(), scenes(2, 3))
    assert made.shape == (2, 3, *GRID, CHANNELS) == (2, 3, *code.make().spec().features["vggt"].shape)
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert torch.isfinite(made).all()


@pytest.mark.parametrize(("context", "views"), [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_a_feature_does_not_depend_on_its_batch_mates(context: int, views: int, code: Code) -> None:
    backbone = code.make(context=context, views=views)
    images = scenes(3, context + 1, 2) if context else scenes(3, 2)
    together = encode(backbone, images)
    for index in range(3):
        assert_close(encode(backbone, images[index : index + 1])[0], together[index])


@pytest.mark.parametrize("context", [0, 2])
def test_cameras_are_scenes_of_their_own_by_default_and_keep_their_order(context: int, code: Code) -> None:
    backbone = code.make(context=context)
    images = scenes(2, context + 1, 3) if context else scenes(2, 3)
    together = encode(backbone, images)
    for view in range(3):
        alone = encode(backbone, images[..., view : view + 1, :, :, :])
        assert_close(alone[:, 0], together[:, view])


def test_cameras_of_one_scene_see_each_other(code: Code) -> None:
    joint, images = code.make(views=2), scenes(2, 2)
    changed = images.clone()
    changed[:, 1] = 1 - changed[:, 1]
    assert_differs(encode(joint, changed)[:, 0], encode(joint, images)[:, 0])
    alone = code.make()
    assert_close(encode(alone, changed)[:, 0], encode(alone, images)[:, 0])
    with pytest.raises(UsageError, match="a scene of 2 views of 3 cameras"):
        encode(joint, scenes(1, 3))


@pytest.mark.parametrize("views", [1, 2])
def test_a_context_ends_at_its_frame_and_the_network_sees_it_oldest_first(views: int, code: Code) -> None:
    """Against the network called by hand: frame by frame, the cameras of a frame together."""
    windows = scenes(2, 3, 2)
    made = encode(code.make(context=2, views=views), windows)
    network = code.network()
    for step in range(2):
        for camera in range(2):
            pictures = windows[step] if views == 2 else windows[step, :, camera : camera + 1]
            with torch.no_grad():
                layers, first = network(pictures.flatten(0, 1)[None])
            place = camera - 2 if views == 2 else -1
            assert_close(made[step, camera].flatten(0, 1), layers[-1][0, place, first:])


def test_scenes_are_encoded_a_few_at_a_time_to_the_same_features(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = code.make(context=1)
    windows, sizes = scenes(3, 2, 2), []
    together = encode(backbone, windows)
    plain = backbone._grids
    monkeypatch.setattr(backbone, "_grids", lambda part: sizes.append(len(part)) or plain(part))
    monkeypatch.setitem(SCENE_PIXELS, "cpu", 9 * SIZE[0] * SIZE[1])
    assert_close(encode(backbone, windows), together)
    assert sizes == [4, 2], "9 pictures hold 4 scenes of 2"


def test_the_past_matters_and_no_more_of_it_than_was_asked_for(code: Code) -> None:
    backbone, windows = code.make(context=1), scenes(1, 2, 1)
    changed = windows.clone()
    changed[:, 0] = 1 - changed[:, 0]
    assert_differs(encode(backbone, changed), encode(backbone, windows))
    assert code.make(context=1).spec().context == 1
    assert code.make().spec().context == 0


def test_a_layer_is_the_networks_own_with_what_follows_it_left_out(code: Code) -> None:
    images = scenes(1, 2)
    with torch.no_grad():
        layers, first = code.network()(images.flatten(0, 1)[:, None])
    parameters = []
    for layer in range(TINY.depth):
        backbone = code.make(layer=layer)
        assert_close(encode(backbone, images)[0].flatten(1, 2), layers[layer][:, 0, first:])
        assert backbone.spec() == code.make(layer=layer - TINY.depth).spec(), "counted from the end"
        parameters.append(backbone.spec().parameters)
    assert parameters == sorted(set(parameters))
    for layer in (TINY.depth, -TINY.depth - 1):
        with pytest.raises(UsageError, match=f"layer {layer}; expected one of 0 to 2, or -3 to -1"):
            code.make(layer=layer)


def test_a_pool_averages_cells(code: Code) -> None:
    images = scenes(2, 2)
    whole, pooled = encode(code.make(), images), encode(code.make(pool=1), images)
    assert pooled.shape == (2, 2, 1, 1, CHANNELS)
    assert_close(pooled[:, :, 0, 0], whole.mean(dim=(2, 3)))


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"weights": "random"},
    "layer": {"layer": 1},
    "size": {"size": 42},
    "pool": {"pool": 2},
    "views": {"views": 2},
    "context": {"context": 1},
    "seed": {"weights": "random", "seed": 1},
}


def test_each_option_that_changes_features_changes_what_they_depend_on(code: Code) -> None:
    def told(**options: Any) -> bytes:
        spec = code.make(**options).spec()
        return canonical({"context": spec.context, **spec.identity})

    seen = {told(), *(told(**options) for options in CHANGES.values())}
    assert len(seen) == 1 + len(CHANGES)
    assert load_backbone_class("vggt").settings_type.model_fields.keys() == CHANGES.keys() | {"checkout", "any_commit"}
    assert code.make(any_commit=True).spec() == code.make().spec()
    assert {"layer", "preprocess", "checkout"} <= code.make().spec().identity.keys()


def test_a_rebuilt_backbone_is_the_same_and_leaves_random_state_and_gradients_alone(code: Code) -> None:
    before, images = torch.random.get_rng_state(), scenes(1, 1)
    made = [encode(code.make(weights="random", seed=5), images) for _ in range(2)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        under = encode(code.make(weights="random", seed=5), images.clone().requires_grad_())
    assert torch.equal(under, made[0])
    assert not under.requires_grad


def test_random_weights_are_marked(code: Code) -> None:
    spec = code.make(weights="random").spec()
    assert spec.random_weights
    assert spec.weights_licence == "none (random)"
    assert not code.make().spec().random_weights


def test_moving_keeps_the_identity_and_forgets_positions_of_the_old_device(code: Code) -> None:
    backbone: Any = code.make()
    before, remembered = backbone.spec(), backbone._network.position_getter
    encode(backbone, scenes(1, 1))
    backbone.to(torch.device("meta"))
    assert backbone.spec() == before
    assert backbone._network.position_getter is not remembered


def test_pictures_become_the_size_asked_for_in_zero_to_one(code: Code, pictures: Pictures) -> None:
    images = code.make(size=[42, 56]).preprocess(pictures[0])
    assert images.shape == (3, 42, 56)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert 0.5 < images.max() <= 1
    with pytest.raises(DataError, match=r"expected \[H, W, 3\] uint8"):
        code.make().preprocess(np.zeros((8, 8, 3), np.float32))


@pytest.mark.parametrize("size", [519, 14, 0, [28, 40], [2030, 28]])
def test_a_size_that_patches_do_not_fill_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match="a side is a multiple of 14 from 28 to 2016 px, such as"):
        make_backbone("vggt", size=size)


def test_a_published_file_loads_as_pt_or_safetensors_and_from_its_folder(code: Code, tmp_path: Path) -> None:
    save_file(code.tensors, tmp_path / "model.safetensors")
    images = scenes(1, 1)
    wanted = encode(code.make(), images)
    for weights in (tmp_path / "model.safetensors", tmp_path, code.file.parent):
        assert torch.equal(encode(code.make(weights=str(weights)), images), wanted)
    assert "non-commercial" in code.make().spec().weights_licence


def test_the_sizes_of_the_network_are_read_from_the_file(code: Code, tmp_path: Path) -> None:
    wide = Architecture(width=128, depth=2, heads=8, vision_depth=2)
    network = build(open_checkout(REPOSITORY, code.options["checkout"], any_commit=True), wide)
    save_file(
        {f"aggregator.{name}": values for name, values in network.state_dict().items()}, tmp_path / "m.safetensors"
    )
    spec = code.make(weights=str(tmp_path / "m.safetensors")).spec()
    assert spec.features["vggt"].shape == (*GRID, 256)
    assert spec.identity["network"] == {"name": "vggt", **wide._asdict()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("aggregator.camera_token"), "does not fit: it lacks aggregator.camera_token"),
        (lambda t: t.pop("aggregator.global_blocks.1.attn.q_norm.weight"), "it lacks global_blocks.1.attn.q_norm"),
        (lambda t: t.update({"aggregator.frame_blocks.7.x": torch.ones(1)}), "does not fit: it lacks frame_blocks.3"),
        (lambda t: t.update({"aggregator.stray": torch.ones(1)}), "does not fit: it has unexpected stray"),
        (lambda t: t.update({"other_head.x": torch.ones(1)}), "does not fit: it has unexpected other_head.x"),
        (lambda t: t.update({"aggregator.camera_token": torch.ones(1, 3, 1, 64)}), r"camera_token is \(1, 3, 1, 64\)"),
        (lambda t: t.update({"aggregator.camera_token": torch.ones(1, 2, 1, 60)}), "tokens of 60 channels"),
        (lambda t: t.update({"aggregator.camera_token": torch.tensor(1.0)}), "tokens of 1 channels"),
    ],
    ids=["root", "missing", "gap", "unexpected", "foreign", "shape", "width", "scalar"],
)
def test_weights_that_do_not_fit_are_refused_naming_the_key(
    change: Any, message: str, code: Code, tmp_path: Path
) -> None:
    tensors = dict(code.tensors)
    change(tensors)
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(DataError, match=message) as caught:
        code.make(weights=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_weights_the_error_says_how_to_supply_them(code: Code) -> None:
    with pytest.raises(MachineError, match=r"no weights of facebook/VGGT-1B: .*hf download facebook/VGGT-1B"):
        make_backbone("vggt", **code.options)


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("facebook/VGGT-1B", "VGGT-1B: non-commercial"),
        ("facebook/VGGT-1B-Commercial", "VGGT-1B-Commercial: commercial use allowed, gated"),
    ],
)
def test_a_cached_model_is_found_by_its_hub_id_and_its_licence_recorded(model: str, licence: str, code: Code) -> None:
    entry = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    (entry / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    save_file(code.tensors, entry / "snapshots" / ("0" * 40) / "model.safetensors")
    assert code.make(weights=model).spec().weights_licence == licence


def store(code: Code, root: Path, backbone: str = "vggt", **values: Any) -> Path:
    source = "synthetic:episodes=2,length=[5,5],cameras=2,image_size=32"
    options = {**code.options, "size": 28} if backbone == "vggt" else {}
    config = {"source": source, "backbone": backbone, "batch_size": 3, **values}
    run(prepare(FeaturizeConfig.build({**config, "options": {**options, **values.get("options", {})}})), root)
    return root


@pytest.fixture
def cached(code: Code, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **options: Any) -> Path:
        cut = {"unit_rows": 4, "dtype": "float32"}
        return store(code, tmp_path / name, weights=str(code.file), store=cut, options=options)

    return make


@pytest.mark.parametrize("views", [1, 2])
def test_features_live_equal_those_cached_with_the_past_of_their_own_episode(
    views: int, code: Code, cached: Callable[..., Path]
) -> None:
    opened = open_store(cached("a", context=2, views=views))
    manifest = opened.manifest
    live = rebuild_backbone(
        manifest.provenance["backbone"],
        manifest.fingerprint["backbone"],
        {"vggt": {**code.options, "weights": str(code.file)}},
    )
    source = SyntheticSource(episodes=2, length=(5, 5), cameras=2, image_size=32)
    frames = [torch.stack([live.preprocess(view) for view in views]) for views in source.frames(1, 0, 5)]
    for frame in range(5):  # units of 4 rows cut the episodes; episode 1 begins at row 5
        window = torch.stack([frames[max(frame - past, 0)] for past in (2, 1, 0)])[None]
        assert_close(torch.from_numpy(opened.read("vggt", np.array([5 + frame]))[0]), encode(live, window)[0])


def test_stores_of_vggt_join_with_others_and_tell_their_context(
    code: Code, cached: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [cached("a", context=1, pool=1), store(code, tmp_path / "b", "pixels")]
    assert set(join_stores([open_store(path) for path in paths]).owner) == {"vggt", "grid"}
    assert open_store(paths[0]).manifest.fingerprint["context"] == 1


def test_a_live_policy_refuses_other_code_than_the_store_was_made_with(
    code: Code, cached: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_store(cached("a")).manifest
    identity = {**manifest.fingerprint["backbone"]}
    identity["checkout"] = {**identity["checkout"], "commit": "f" * 40}
    with pytest.raises(FingerprintError, match=r"the live backbone 'vggt' has another fingerprint: checkout\.commit"):
        rebuild_backbone(
            manifest.provenance["backbone"], identity, {"vggt": {**code.options, "weights": str(code.file)}}
        )


def test_a_checkout_is_needed_and_listed_as_missing() -> None:
    with pytest.raises(MachineError, match=r"no checkout of facebookresearch/vggt is given. Try: git clone https://"):
        make_backbone("vggt", weights="random")
    assert missing("vggt")[0].startswith(f"git clone {REPOSITORY.url}")
    assert BACKBONES["vggt"].checkout == REPOSITORY.url
