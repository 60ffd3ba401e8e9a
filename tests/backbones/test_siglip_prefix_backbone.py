"""Image tokens of PaliGemma-type checkpoints: every layout, nothing but the vision part read, every way to be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from vla.featurize.backbones.resize import resize_with_pad
from vla.featurize.backbones.siglip_prefix import MODEL_ID, SiglipPrefix, SiglipPrefixSettings
from vla.pretrained import hub, paligemma
from vla.stores.errors import DataError, MachineError

Pictures = list[NDArray[np.uint8]]
Models = dict[str, tuple[Path, Any]]


def build(folder: Path | str | None, **options: Any) -> SiglipPrefix:
    weights = {} if folder is None else {"weights": str(folder)}
    return SiglipPrefix(SiglipPrefixSettings.build({**weights, **options}))


def run(backbone: SiglipPrefix, picture: NDArray[np.uint8]) -> torch.Tensor:
    return backbone.encode(backbone.preprocess(picture)[None, None])["siglip"][0, 0]


@pytest.fixture
def folder(models: Models, tmp_path: Path) -> Path:
    """A PaliGemma to spoil."""
    return Path(shutil.copytree(models["paligemma"][0], tmp_path / "paligemma"))


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rewrite the keys of a weight file; None leaves one out."""
    file = folder / "model.safetensors"
    state = {change(name): values for name, values in load_file(file).items()}
    save_file({name: values for name, values in state.items() if name}, file, {"format": "pt"})


def test_a_black_bar_pads_what_the_longest_side_leaves() -> None:
    wide = resize_with_pad(np.full((60, 80, 3), 200, np.uint8), 224, "bilinear")
    assert (wide.shape, wide.dtype) == ((3, 224, 224), torch.float32)
    assert (wide[:, 28:196] == 200).all()
    assert (wide[:, :28] == 0).all()
    assert (wide[:, 196:] == 0).all()
    tall = resize_with_pad(np.full((200, 100, 3), 9, np.uint8), 50, "bilinear")
    assert (tall[:, :, 12:37] == 9).all()
    assert tall.sum() == 3 * 50 * 25 * 9


def test_a_sliver_keeps_one_pixel_and_an_exact_picture_is_left_alone() -> None:
    assert resize_with_pad(np.full((1, 900, 3), 7, np.uint8), 64, "bilinear").sum() == 3 * 64 * 7
    exact = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert torch.equal(resize_with_pad(exact, 64, "bilinear"), torch.from_numpy(exact).permute(2, 0, 1).float())


def test_pixels_are_normalised_once_to_minus_one_to_one() -> None:
    backbone = build("random")
    picture = np.zeros((224, 224, 3), np.uint8)
    picture[:100] = 255
    made = backbone.preprocess(picture)
    assert (made.min(), made.max()) == (-1, 1)
    seen = []
    backbone.network.vision_tower.embeddings.patch_embedding.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    backbone.encode(made[None, None])
    assert torch.equal(seen[0][0], made), "the network gets what `preprocess` made, not a second normalisation of it"


def test_random_weights_are_the_real_classes_at_the_real_picture_and_token_count() -> None:
    spec = build("random").spec()
    assert spec.features["siglip"].shape == (256, 64)
    assert spec.features["siglip"].dims == ("token", "channel")
    assert spec.features["siglip"].dtype == "float16"
    assert (spec.identity["image_size"], spec.identity["patch_size"]) == (224, 14)
    assert (spec.random_weights, spec.weights_licence) == (True, "none (random)")
    assert 0 < spec.parameters < 1_000_000


def test_the_default_checkpoints_sizes_give_256_tokens_of_width_2048(tmp_path: Path) -> None:
    """As `paligemma_variant: gemma_2b`, which names them, is understood."""
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi0", "paligemma_variant": "gemma_2b"}))
    kind, config = paligemma._describe(tmp_path)
    vision = config.vision_config
    assert (kind, config.projection_dim) == ("pi0", 2048)
    assert {name: getattr(vision, name) for name in paligemma.VISION_FIELDS} == {
        "image_size": 224,
        "patch_size": 14,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


@pytest.mark.parametrize("kind", ["paligemma", "pi0"])
def test_the_licence_of_gemma_is_recorded(kind: str, models: Models) -> None:
    spec = build(models[kind][0]).spec()
    assert spec.weights_licence.startswith("Gemma Terms of Use")
    assert not spec.random_weights


@pytest.mark.parametrize(
    "names",
    [
        ("vision_tower.", "vision_tower.vision_model."),
        ("vision_tower.", "model.vision_tower."),
        ("vision_tower.", "paligemma_with_expert.paligemma.model.vision_tower.vision_model."),
    ],
    ids=["hub", "model", "openpi"],
)
def test_every_known_spelling_of_the_keys_gives_the_same_identity_and_tokens(
    names: tuple[str, str], folder: Path, models: Models, pictures: Pictures
) -> None:
    prefix = names[1].removesuffix("vision_tower.").removesuffix("vision_tower.vision_model.")
    rename(folder, lambda key: key.replace(*names) if key.startswith(names[0]) else prefix + key)
    other, own = build(folder), build(models["paligemma"][0])
    assert other.spec() == own.spec()
    assert torch.equal(run(other, pictures[0]), run(own, pictures[0]))


def test_a_folder_of_openpis_conversion_loads_by_its_variant(
    folder: Path, models: Models, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = transformers.PI0Config(vlm_config=models["pi0"][1].config.vlm_config.to_dict())
    (folder / "config.json").write_text('{"action_dim": 32, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}')
    monkeypatch.setattr(paligemma.transformers, "PI0Config", lambda: small)
    assert torch.equal(run(build(folder), pictures[0]), run(build(models["paligemma"][0]), pictures[0]))
    assert "pi0" in build(folder).spec().weights_licence


def test_sharded_weights_load(models: Models, pictures: Pictures, tmp_path: Path) -> None:
    models["paligemma"][1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole = build(models["paligemma"][0])
    assert build(tmp_path).spec() == whole.spec()
    assert torch.equal(run(build(tmp_path), pictures[0]), run(whole, pictures[0]))


@pytest.mark.parametrize("kind", ["paligemma", "pi0"])
def test_no_tensor_of_the_language_model_or_the_action_expert_is_read(
    kind: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    opened = paligemma.safe_open

    class Spy:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = opened(*args, **options)

        def __enter__(self) -> Spy:
            self.handle = self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return list(self.handle.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.handle.get_tensor(name)

    monkeypatch.setattr(paligemma, "safe_open", Spy)
    build(models[kind][0])
    assert read
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in read)


def test_the_pooling_head_that_some_checkpoints_carry_is_left_out(folder: Path, models: Models) -> None:
    before = build(folder).spec()
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].pop("vision_use_head")
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    state["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 32)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert build(folder).spec() == before


def test_half_precision_on_disk_is_computed_in_float32(folder: Path, models: Models, pictures: Pictures) -> None:
    half = {name: values.bfloat16() for name, values in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    backbone, whole = build(folder), build(models["paligemma"][0])
    assert {p.dtype for p in backbone.network.parameters()} == {torch.float32}
    assert backbone.spec().identity["weights_sha256"] != whole.spec().identity["weights_sha256"]
    assert torch.allclose(run(backbone, pictures[0]), run(whole, pictures[0]), atol=0.05)


def test_the_identity_is_that_of_the_vision_part_alone(folder: Path, models: Models) -> None:
    before = build(folder).spec().identity
    state = load_file(folder / "model.safetensors")
    language = next(name for name in state if "language_model" in name)
    save_file({**state, language: state[language] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert build(folder).spec().identity == before, "a fine-tuned language model changes no image token"
    projector = "multi_modal_projector.linear.bias"
    save_file({**state, projector: state[projector] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert build(folder).spec().identity["weights_sha256"] != before["weights_sha256"]
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    assert build(folder).spec().identity["layer_norm_eps"] == 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: None if key.endswith("layers.1.mlp.fc1.bias") else key, "lacks .*layers.1.mlp.fc1.bias"),
        (lambda key: None if "projector" in key else key, "lacks multi_modal_projector.linear.bias"),
        (lambda key: key.replace("post_layernorm", "post_norm"), "does not fit"),
        (lambda key: key.replace("vision_tower", "eye"), "lacks .* and .* more"),
    ],
    ids=["parameter", "projector", "renamed", "tower"],
)
def test_weights_that_would_leave_parameters_random_or_unused_are_refused(
    change: Callable[[str], str | None], message: str, folder: Path
) -> None:
    rename(folder, change)
    with pytest.raises(DataError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llava"}, "holds a 'llava' model; expected model_type paligemma or pi0"),
        ({"paligemma_variant": "dummy"}, "holds a 'dummy' model"),
        ({"model_type": "paligemma", "vision_config": 3}, "config.json"),
        ({"model_type": "paligemma", "vision_config": {"hidden_size": "wide"}}, "config.json"),
        ({"vision_config": {"image_size": 230}}, "'image_size': 230.*expected .* whole patches"),
        ({"vision_config": {"patch_size": 0}}, "config.json"),
        ({"vision_config": {"num_attention_heads": 5}}, "config.json"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "has a 'clip_vision_model'"),
        ({"projection_dim": 48}, "does not fit: multi_modal_projector"),
    ],
)
def test_a_configuration_of_another_kind_is_one_line(content: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "vision_config" in content and "model_type" not in content:
        config["vision_config"] |= content["vision_config"]
    elif "projection_dim" in content:
        config |= content
    else:
        config = content
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("model.safetensors", None, MachineError),
        ("config.json", None, MachineError),
        ("model.safetensors", b"", DataError),
        ("model.safetensors", b"\xff" * 64, DataError),
        ("config.json", b"{", DataError),
    ],
)
def test_a_damaged_or_incomplete_folder_is_one_line(
    file: str, content: bytes | None, error: type[Exception], folder: Path
) -> None:
    path = folder / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(error, match="paligemma") as caught:
        build(folder)
    assert "\n" not in str(caught.value)


def assert_says_how_to_supply_weights(error: MachineError) -> None:
    text = str(error)
    assert f"hf download {MODEL_ID} --local-dir weights/paligemma" in text
    assert "Gemma" in text
    assert "--weights weights/paligemma" in text
    assert "--weights random" in text
    assert "\n" not in text


def test_without_network_or_cache_the_error_says_how_to_supply_weights() -> None:
    with pytest.raises(MachineError, match=f"no weights of {MODEL_ID}: it is in no cache") as caught:
        build(None)
    assert_says_how_to_supply_weights(caught.value)


def test_a_gated_model_says_that_its_licence_has_to_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *, local_files_only: bool, **options: Any) -> str:
        if local_files_only:
            raise hub.LocalEntryNotFoundError("not cached")
        request = httpx2.Request("GET", "http://127.0.0.1")
        raise GatedRepoError("403\nrestricted", response=httpx2.Response(403, request=request))

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(MachineError, match="it is gated: accept its licence on its model page") as caught:
        build(None)
    assert_says_how_to_supply_weights(caught.value)
