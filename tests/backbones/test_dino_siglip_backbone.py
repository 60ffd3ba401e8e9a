"""DINO + SigLIP: the recipe against transformers' own processors and models, and every way weights can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from vla.featurize.backbones.dino_siglip import DINO_ID, SIGLIP_ID, DinoSiglip, DinoSiglipSettings
from vla.featurize.backbones.towers import make_tower
from vla.pretrained import hub
from vla.stores.errors import DataError, MachineError, UsageError

Pictures = list[NDArray[np.uint8]]
Models = dict[str, tuple[Path, Any]]

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def build(**options: Any) -> DinoSiglip:
    return DinoSiglip(DinoSiglipSettings.build(options))


def from_models(models: Models, dino: str, siglip: str = "siglip_vision_model", **options: Any) -> DinoSiglip:
    folders = {"dino": str(models[dino][0]), "siglip": str(models[siglip][0])}
    grid = 7 if dino == "dinov3_vit" else 8  # 112 px: 7 patches of 16, or 8 of 14
    return build(**{**folders, "size": 112, "grid": grid, "fine": 4, **options})


def run(backbone: DinoSiglip, picture: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    made = backbone.encode(backbone.preprocess(picture)[None, None])
    return {name: values[0, 0] for name, values in made.items()}


@pytest.fixture
def folder(models: Models, tmp_path: Path) -> Path:
    """A folder for `--weights`, with copies to spoil."""
    shutil.copytree(models["dinov2"][0], tmp_path / "weights" / "dino")
    shutil.copytree(models["siglip_vision_model"][0], tmp_path / "weights" / "siglip")
    return tmp_path / "weights"


def from_folder(folder: Path, **options: Any) -> DinoSiglip:
    return build(**{"weights": str(folder), "size": 112, "grid": 8, "fine": 4, **options})


@pytest.mark.parametrize(("dino", "prefix"), [("dinov2", 1), ("dinov2_with_registers", 1 + 4), ("dinov3_vit", 1 + 4)])
@pytest.mark.parametrize("siglip", ["siglip_vision_model", "siglip"])
def test_tokens_equal_the_recipe_run_with_the_processors_and_models_of_transformers(
    dino: str, prefix: int, siglip: str, models: Models, pictures: Pictures
) -> None:
    square = {"height": 112, "width": 112}
    bit = transformers.BitImageProcessorPil(size=square, do_center_crop=False, **IMAGENET)
    sig = transformers.SiglipImageProcessorPil(size=square)
    model = models[siglip][1]
    with torch.no_grad():
        first = models[dino][1](**bit(pictures[0], return_tensors="pt")).last_hidden_state[0, prefix:]
        second = getattr(model, "vision_model", model)(**sig(pictures[0], return_tensors="pt")).last_hidden_state[0]
    side = 7 if dino == "dinov3_vit" else 8
    assert (len(first), len(second)) == (side**2, 64)
    maps = [tokens.T.reshape(-1, int(len(tokens) ** 0.5), int(len(tokens) ** 0.5)) for tokens in (first, second)]
    joined = torch.cat([torch.nn.functional.adaptive_avg_pool2d(part, side) for part in maps])
    made = run(from_models(models, dino, siglip), pictures[0])
    for name, cells in (("fine", 4), ("coarse", 2)):
        wanted = torch.nn.functional.adaptive_avg_pool2d(joined, cells).flatten(1).T
        assert made[name].shape == (cells**2, 48 + 32)
        assert (made[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert torch.nn.functional.cosine_similarity(made[name].flatten(), wanted.flatten(), 0) > 1 - 1e-6


def test_preprocessing_equals_the_processors_of_transformers(models: Models, pictures: Pictures) -> None:
    backbone = from_models(models, "dinov2")
    for picture in pictures:
        ours = backbone.preprocess(picture)
        square = {"height": 112, "width": 112}
        bit = transformers.BitImageProcessorPil(size=square, do_center_crop=False, **IMAGENET)
        sig = transformers.SiglipImageProcessorPil(size=square)
        for processor, tower in zip((bit, sig), backbone.towers, strict=True):
            theirs = processor(picture, return_tensors="pt")["pixel_values"]
            assert ((ours - tower.mean) / tower.std - theirs).abs().max() <= 1e-6


def test_coarse_tokens_are_averages_of_fine_ones_where_the_grids_divide(models: Models, pictures: Pictures) -> None:
    made = run(from_models(models, "dinov2"), pictures[0])
    windows = made["fine"].reshape(2, 2, 2, 2, -1).mean((1, 3)).reshape(4, -1)
    assert torch.allclose(made["coarse"], windows, atol=1e-5)


def test_the_default_networks_at_the_default_size_give_1536_channels_on_24_by_24_cells() -> None:
    dino = {"patch_size": 16, "hidden_size": 384, "num_hidden_layers": 12, "num_register_tokens": 4}
    siglip = {"patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27, "image_size": 384}
    towers = [
        make_tower(kind, SimpleNamespace(config=SimpleNamespace(**config)), 384, {})
        for kind, config in (("dinov3_vit", dino), ("siglip", siglip))
    ]
    assert sum(tower.channels for tower in towers) == 1536
    assert [(tower.side, tower.prefix) for tower in towers] == [(24, 5), (27, 0)]


def test_random_weights_are_tiny_networks_of_the_real_kinds_at_the_real_token_counts() -> None:
    spec = build(weights="random").spec()
    assert {name: feature.shape[0] for name, feature in spec.features.items()} == {"fine": 64, "coarse": 4}
    assert spec.features["fine"].dims == ("token", "channel")
    assert (spec.identity["dino"]["network"], spec.identity["siglip"]["network"]) == ("dinov3_vit", "siglip")
    assert (spec.random_weights, spec.weights_licence) == (True, "none (random)")
    assert 0 < spec.parameters < 1_000_000


def test_a_folder_with_dino_and_siglip_inside_equals_the_two_options(
    folder: Path, models: Models, pictures: Pictures
) -> None:
    one, two = from_folder(folder), from_models(models, "dinov2")
    assert one.spec() == two.spec()
    assert torch.equal(run(one, pictures[0])["fine"], run(two, pictures[0])["fine"])


@pytest.mark.parametrize("tower", ["dino", "siglip"])
def test_one_network_alone_makes_its_share_of_the_channels_and_needs_no_other_weights(
    tower: str, folder: Path, pictures: Pictures
) -> None:
    both = from_folder(folder)
    shutil.rmtree(folder / ("siglip" if tower == "dino" else "dino"))
    alone = from_folder(folder, towers=tower)
    channels = slice(0, 48) if tower == "dino" else slice(48, None)
    for feature, values in run(alone, pictures[0]).items():
        assert torch.allclose(values, run(both, pictures[0])[feature][:, channels], atol=1e-6)
    spec = alone.spec()
    assert spec.identity[tower] == both.spec().identity[tower]
    assert spec.identity.keys() == both.spec().identity.keys() - {"dino", "siglip"} | {tower}
    assert spec.weights_licence == f"Apache-2.0 ({'DINOv2' if tower == 'dino' else 'SigLIP'})"
    assert spec.parameters < both.spec().parameters


def test_one_network_alone_is_the_only_one_that_is_asked_for() -> None:
    with pytest.raises(MachineError, match=f"no weights of {SIGLIP_ID}") as caught:
        build(towers="siglip")
    assert DINO_ID not in str(caught.value)


def test_the_common_grid_is_dinos_own_unless_told(models: Models) -> None:
    assert build(weights="random").spec().identity["pool"] == {"grid": 24, "fine": 8, "coarse": 2}
    assert build(weights="random", towers="siglip").spec().identity["pool"]["grid"] == 27
    assert from_models(models, "dinov2", grid=None).spec() == from_models(models, "dinov2", grid=8).spec()


def test_models_are_saved_here_under_the_names_that_the_hub_uses(models: Models) -> None:
    """So that loading them passes through the same renaming as the published files."""
    hub_names = {
        "dinov2": "encoder.layer.0.attention.attention.query.weight",
        "dinov2_with_registers": "encoder.layer.0.attention.attention.query.weight",
        "dinov3_vit": "layer.0.attention.q_proj.weight",
        "siglip": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    }
    for kind, name in hub_names.items():
        assert name in load_file(models[kind][0] / "model.safetensors")


def test_siglip_2_of_variable_resolution_is_refused_with_one_that_fits(folder: Path) -> None:
    path = folder / "siglip" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "siglip2"}))
    with pytest.raises(DataError, match=r"holds a 'siglip2' model.*Try: .*google/siglip2-so400m-patch14-384"):
        from_folder(folder)


def test_a_relative_folder_is_never_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(MachineError, match=r"no model in .*weights/dino"):
        build(weights="weights")


def test_half_precision_on_disk_is_computed_in_float32(models: Models, folder: Path, pictures: Pictures) -> None:
    half = load_file(folder / "dino" / "model.safetensors")
    save_file({k: v.half() for k, v in half.items()}, folder / "dino" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "dino" / "config.json").read_text())
    (folder / "dino" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    backbone = from_folder(folder)
    assert {p.dtype for p in backbone.towers[0].network.parameters()} == {torch.float32}
    made, wanted = run(backbone, pictures[0])["fine"], run(from_models(models, "dinov2"), pictures[0])["fine"]
    assert made.dtype == torch.float32
    assert not torch.equal(made, wanted)
    assert torch.allclose(made, wanted, atol=0.02)


def test_sharded_weights_load_and_every_shard_is_digested(models: Models, folder: Path, pictures: Pictures) -> None:
    shutil.rmtree(folder / "dino")
    models["dinov2"][1].save_pretrained(folder / "dino", max_shard_size="100KB")
    shards = sorted((folder / "dino").glob("model-*.safetensors"))
    assert len(shards) > 1
    backbone, whole = from_folder(folder), from_models(models, "dinov2")
    assert torch.equal(run(backbone, pictures[0])["fine"], run(whole, pictures[0])["fine"])
    before = backbone.spec().identity["dino"]["weights_sha256"]
    tensors = load_file(shards[-1])
    save_file({name: values + 1 for name, values in tensors.items()}, shards[-1], {"format": "pt"})
    assert from_folder(folder).spec().identity["dino"]["weights_sha256"] != before
    shards[0].unlink()
    with pytest.raises(MachineError, match="no model in"):
        from_folder(folder)


def test_the_identity_sees_the_configuration_but_not_who_saved_it(folder: Path) -> None:
    path = folder / "dino" / "config.json"
    config, before = json.loads(path.read_text()), from_folder(folder).spec().identity
    path.write_text(json.dumps({**config, "transformers_version": "0", "architectures": None, "_name_or_path": "x"}))
    assert from_folder(folder).spec().identity == before
    path.write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    after = from_folder(folder).spec().identity
    assert after["dino"]["config_sha256"] != before["dino"]["config_sha256"]
    assert after["siglip"] == before["siglip"]


@pytest.mark.parametrize(
    ("dino", "licence"),
    [
        ("dinov2", "Apache-2.0 (DINOv2)"),
        ("dinov2_with_registers", "Apache-2.0 (DINOv2)"),
        ("dinov3_vit", "DINOv3 License (gated)"),
    ],
)
def test_licences_of_both_networks_are_recorded(dino: str, licence: str, models: Models) -> None:
    assert from_models(models, dino).spec().weights_licence == f"{licence} + Apache-2.0 (SigLIP)"


@pytest.mark.parametrize(
    ("dino", "size", "drop"), [("dinov2", 120, 8), ("dinov3_vit", 120, 8), ("dinov2_with_registers", 384, 6)]
)
def test_a_size_that_a_network_would_silently_crop_is_refused(dino: str, size: int, drop: int, models: Models) -> None:
    with pytest.raises(UsageError, match=f"size {size} is no multiple of the 1. px patches of {dino}.* drop {drop} px"):
        from_models(models, dino, size=size)


def test_siglip_crops_at_its_own_training_size_only(models: Models, tmp_path: Path) -> None:
    # so400m/14-384 was trained on 27 patches of 14 px; here 7 of them out of 100 px.
    config = transformers.SiglipVisionConfig(**models["siglip_vision_model"][1].config.to_dict() | {"image_size": 100})
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "native")
    backbone = build(weights=None, dino=str(models["dinov2"][0]), siglip=str(tmp_path / "native"), size=112, grid=8)
    assert backbone.towers[1].side == 8
    tower = make_tower("siglip", backbone.towers[1].network, 100, {})
    assert tower.patch_map(torch.zeros(1, 3, 100, 100)).shape == (1, 32, 7, 7)
    with pytest.raises(UsageError, match="size 110 is no multiple of the 14 px patches of siglip"):
        make_tower("siglip", backbone.towers[1].network, 110, {})


def test_a_multiple_of_both_patches_keeps_siglips_own_table_of_positions(
    models: Models, pictures: Pictures, tmp_path: Path
) -> None:
    """378 px: what DINOv2 wants, and 27 patches a side as in SigLIP's training at 384 px. Here 112 for 115."""
    own = models["siglip_vision_model"][1]
    config = transformers.SiglipVisionConfig(**own.config.to_dict() | {"image_size": 115})
    model = transformers.SiglipVisionModel(config)
    model.load_state_dict(own.state_dict())
    model.save_pretrained(tmp_path / "native")
    backbone = from_models(models, "dinov2")
    other = build(dino=str(models["dinov2"][0]), siglip=str(tmp_path / "native"), size=112, grid=8, fine=4)
    assert torch.equal(run(backbone, pictures[0])["fine"], run(other, pictures[0])["fine"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fine": 1}, "fine = 1"),
        ({"grid": 6, "fine": 7}, "fine=7 and coarse=2 cannot exceed grid=6"),
        ({"grid": 25}, "grid=25 exceeds the 24x24 patches of a 384 px picture"),
        ({"towers": "dino", "fine": 25}, "fine=25 and coarse=2 cannot exceed grid=24"),
        ({"dino": "a/b"}, "give either weights, or dino and siglip"),
        (
            {"size": 378},
            "size 378 is no multiple of the 16 px patches of dinov3_vit.*options.size=368.*options.size=384",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(weights="random", **options)


def test_a_network_that_is_not_used_is_not_named() -> None:
    with pytest.raises(UsageError, match="siglip is given, but towers=dino does not use it"):
        build(dino="a/b", siglip="c/d", towers="dino")


def assert_says_how_to_supply_weights(error: MachineError) -> None:
    text = str(error)
    assert f"hf download {DINO_ID} --local-dir weights/dino" in text
    assert f"hf download {SIGLIP_ID} --local-dir weights/siglip" in text
    assert "--weights weights" in text
    assert "--weights random" in text
    assert "\n" not in text


def test_without_network_or_cache_the_error_says_how_to_supply_weights() -> None:
    with pytest.raises(MachineError, match=f"no weights of {DINO_ID}: it is in no cache") as caught:
        build()
    assert_says_how_to_supply_weights(caught.value)


def test_a_hub_that_cannot_be_reached_gives_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    with pytest.raises(MachineError, match=f"no weights of {DINO_ID}: it is in no cache") as caught:
        build()
    assert_says_how_to_supply_weights(caught.value)


def test_a_gated_model_says_that_its_licence_has_to_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *, local_files_only: bool, **options: Any) -> str:
        if local_files_only:
            raise hub.LocalEntryNotFoundError("not cached")
        request = httpx2.Request("GET", "http://127.0.0.1")
        raise GatedRepoError("403\nrestricted", response=httpx2.Response(403, request=request))

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(MachineError, match="it is gated: accept its licence on its model page") as caught:
        build()
    assert_says_how_to_supply_weights(caught.value)


def test_a_proxy_in_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *, local_files_only: bool, **options: Any) -> str:
        raise hub.LocalEntryNotFoundError("not cached") if local_files_only else httpx2.ProxyError("407 first\nsecond")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(MachineError, match=f"no weights of {DINO_ID}: 407 first") as caught:
        build()
    assert_says_how_to_supply_weights(caught.value)


def test_a_cached_model_is_found_by_its_hub_id_without_a_network(
    models: Models, pictures: Pictures, tmp_path: Path
) -> None:
    for name, kind in (("models--tiny--dino", "dinov2"), ("models--tiny--siglip", "siglip_vision_model")):
        entry = tmp_path / "empty-cache" / name
        shutil.copytree(models[kind][0], entry / "snapshots" / ("0" * 40))
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text("0" * 40)
    cached = build(dino="tiny/dino", siglip="tiny/siglip", size=112, grid=8, fine=4)
    assert cached.spec() == from_models(models, "dinov2").spec(), "the identity is the weights', not the address's"


@pytest.mark.parametrize("tower", ["dino", "siglip"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(next(name for name in state if "layer" in name)), "does not fit: it lacks "),
        (lambda state: state.update({"stray.weight": torch.zeros(1)}), "does not fit: it has unexpected stray.weight"),
        (lambda state: state.update({next(iter(state)): torch.zeros(5)}), "does not load: "),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_would_leave_parameters_random_or_unused_are_refused(
    tower: str, change: Any, message: str, folder: Path
) -> None:
    state = load_file(folder / tower / "model.safetensors")
    change(state)
    save_file(state, folder / tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=f"{tower} {message}") as caught:
        from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_kind_is_refused(models: Models) -> None:
    with pytest.raises(DataError, match="holds a 'siglip' model; expected one of dinov2"):
        build(dino=str(models["siglip"][0]), siglip=str(models["siglip"][0]))
    with pytest.raises(DataError, match="holds a 'dinov2' model; expected one of siglip"):
        build(dino=str(models["dinov2"][0]), siglip=str(models["dinov2"][0]))
    # Both are checked before the first is loaded: gigabytes are not read for nothing.


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("model.safetensors", None, MachineError),
        ("config.json", None, MachineError),
        ("model.safetensors", b"", DataError),
        ("model.safetensors", b"\xff" * 64, DataError),
        ("config.json", b"{", DataError),
        ("config.json", b"[]", DataError),
        ("config.json", b'{"model_type": "dinov2", "hidden_size": "wide"}', DataError),
        ("config.json", b'{"model_type": "dinov2", "hidden_size": NaN}', DataError),
    ],
)
def test_a_damaged_or_incomplete_folder_is_one_line(
    file: str, content: bytes | None, error: type[Exception], folder: Path
) -> None:
    path = folder / "dino" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(error, match="dino") as caught:
        from_folder(folder)
    assert "\n" not in str(caught.value)


def test_loading_leaves_the_logging_of_transformers_as_it_was(
    models: Models, capfd: pytest.CaptureFixture[str]
) -> None:
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    before = logging.get_verbosity()
    capfd.readouterr()
    from_models(models, "dinov2", "siglip")
    assert capfd.readouterr() == ("", ""), "no progress bar, no report of the unused text tower"
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, True)
    logging.disable_progress_bar()
