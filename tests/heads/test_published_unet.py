"""Published checkpoints of Diffusion Policy: read without running them, and loaded to the last key."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vla.heads.model import HeadModel
from vla.heads.nets.unet1d import ConditionalUnet1D
from vla.pretrained.diffusion_policy import read_unet
from vla.stores.errors import DataError, UsageError

MakeHead = Callable[..., HeadModel]

SIZES: dict[str, Any] = {"diffusion_step_embed_dim": 32, "down_dims": (16, 32)}


class Nothing:
    """A data set of which nothing is asked: `prepare` fits normalisers in other tests."""


def net(cond: int = 128) -> ConditionalUnet1D:
    torch.manual_seed(3)
    return ConditionalUnet1D(2, cond, **SIZES)


def policy_of(unet: ConditionalUnet1D) -> dict[str, torch.Tensor]:
    """A policy's state dict: the U-Net below `model.`, beside it what a policy has more."""
    more = {"normalizer.params_dict.action.scale": torch.ones(2), "mask_generator._dummy_variable": torch.zeros(0)}
    return {f"model.{name}": values for name, values in unet.state_dict().items()} | more


@pytest.fixture
def config_classes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`config_classes()`: an object as omegaconf's are pickled, of a module that is gone when it is read."""
    module = types.ModuleType("omegaconf_like")

    class DictConfig:
        def __init__(self) -> None:
            self.__dict__["_content"] = {"lr": 1e-4, "nested": [1, 2]}

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf_like", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]

    def write(path: Path, payload: dict[str, Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "omegaconf_like", module)
            torch.save({"cfg": DictConfig(), **payload}, path)

    return write


def test_a_workspaces_checkpoint_gives_its_averaged_unet(tmp_path: Path, config_classes: Callable[..., Any]) -> None:
    unet = net()
    other = {name: values + 1 for name, values in policy_of(unet).items()}
    states = {"model": other, "ema_model": policy_of(unet), "optimizer": {"state": {}, "param_groups": []}}
    config_classes(tmp_path / "latest.ckpt", {"state_dicts": states, "pickles": {"epoch": pickle.dumps(7)}})
    found = read_unet(tmp_path / "latest.ckpt")
    assert found.keys() == unet.state_dict().keys()
    assert all(torch.equal(values, found[name]) for name, values in unet.state_dict().items())


def test_without_an_average_the_model_itself_is_read(tmp_path: Path, config_classes: Callable[..., Any]) -> None:
    unet = net()
    config_classes(tmp_path / "a.ckpt", {"state_dicts": {"model": policy_of(unet)}})
    assert torch.equal(read_unet(tmp_path / "a.ckpt")["final_conv.1.bias"], unet.state_dict()["final_conv.1.bias"])


class Evil:
    """What a hostile file would carry: a call, made on unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (shutil.copyfile, (__file__, str(self.path)))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_nothing_that_a_checkpoint_carries_is_run(suffix: str, tmp_path: Path) -> None:
    payload = {"cfg": Evil(tmp_path / "ran"), "state_dicts": {"model": policy_of(net())}}
    file = tmp_path / f"evil{suffix}"
    torch.save(payload, file)
    if suffix == ".ckpt":
        assert read_unet(file)
    else:
        with pytest.raises(DataError, match="not a file of weights"):
            read_unet(file)
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # the file would have run it
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["policy.pt", "unet.pt", "policy.safetensors", "unet.safetensors"])
def test_state_dicts_of_policies_and_of_unets_are_read(form: str, tmp_path: Path) -> None:
    unet = net()
    tensors = policy_of(unet) if form.startswith("policy") else unet.state_dict()
    (save_file if form.endswith("safetensors") else torch.save)(tensors, tmp_path / form)
    assert read_unet(tmp_path / form).keys() == unet.state_dict().keys()


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"state_dicts": {"optimizer": {}}}, "has optimizer; expected state dicts"),
        ({"weights": 3}, "has no state_dicts"),
        ({"state_dicts": {"model": {"net.weight": torch.zeros(2)}}}, "expected the parameters of a ConditionalUnet1D"),
    ],
)
def test_other_checkpoints_are_refused(payload: dict[str, Any], says: str, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match=says):
        read_unet(tmp_path / "other.ckpt")


def test_what_torch_will_not_read_even_as_a_stand_in_is_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    """`os` and `sys` are on torch's own list of modules that no file may name."""

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"cfg": Command(), "state_dicts": {"model": policy_of(net())}}, tmp_path / "evil.ckpt")
    with pytest.raises(DataError, match="not a checkpoint") as refused:
        read_unet(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dicts": {"model": policy_of(net())}}, tmp_path / "whole.ckpt")
    data = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a checkpoint"):
        read_unet(tmp_path / "half.ckpt")


def prepared(model: HeadModel, monkeypatch: pytest.MonkeyPatch) -> HeadModel:
    """`model.prepare` without a store: what fits statistics is tested with one."""
    monkeypatch.setattr("vla.heads.encoded.EncodedHead.prepare", lambda self, data: None)
    model.prepare(Nothing())  # type: ignore[arg-type]
    return model


def test_the_setting_weights_starts_the_unet_from_a_file(
    tmp_path: Path, toy_head: MakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two observations of a 64-wide encoder condition it by 128 numbers."""
    torch.save(policy_of(net(128)), tmp_path / "policy.pt")
    model = prepared(toy_head("dp-unet", weights=str(tmp_path / "policy.pt"), fitted=False), monkeypatch)
    unet: Any = model.net
    assert all(torch.equal(values, unet.state_dict()[name]) for name, values in net(128).state_dict().items())


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.final_conv.1.bias"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.local_cond_encoder.0.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("cond", "change", "says"),
    [
        (127, lambda tensors: None, "cond_encoder.1.weight is"),
        (128, _drop, "lacks final_conv.1.bias"),
        (128, _add, "has unexpected local_cond_encoder.0.weight"),
    ],
)
def test_weights_that_do_not_fit_to_the_last_key_are_refused(
    cond: int, change: Any, says: str, tmp_path: Path, toy_head: MakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = policy_of(net(cond))
    change(tensors)
    torch.save(tensors, tmp_path / "policy.pt")
    with pytest.raises(DataError, match=says):
        prepared(toy_head("dp-unet", weights=str(tmp_path / "policy.pt"), fitted=False), monkeypatch)


def test_published_weights_are_for_the_unet(toy_head: MakeHead) -> None:
    with pytest.raises(UsageError, match="weights for net 'mlp'"):
        toy_head("dp-mlp", weights="policy.pt", fitted=False)
