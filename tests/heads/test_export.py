"""The exported head is the live one: the same actions for the same observation and the same noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vla.heads.batch import Batch
from vla.heads.checkpoint import Artefact, StoreRecord, TrainedHead, with_settings
from vla.heads.data import DataConfig
from vla.heads.export import export_head
from vla.heads.exported_inputs import observation_inputs
from vla.heads.model import GivenNoise, HeadModel
from vla.stores.errors import UsageError
from vla.stores.manifest import FeatureInfo

SHORT = {"dp": {"sample_steps": 2}, "fm": {"sample_steps": 3}}


def trained(model: HeadModel, head: str) -> TrainedHead:
    """What `load_head` returns, of a head that was never saved."""
    features = {
        # Places in the room are kept in float32, all else as features usually are.
        name: FeatureInfo(
            shape=io.shape, dims=("view", *io.dims), dtype="float32" if name.endswith("_xyz") else "float16"
        )
        for name, io in model.io.features.items()
    }
    store = StoreRecord(
        path="store", sha256="0", fingerprint={}, recipe={}, features=features, cameras=("top",), random_weights=True
    )
    artefact = Artefact(
        head=head,
        config=model.config.model_dump(mode="json"),
        data=DataConfig(stores=("store",)),
        io=model.io,
        state=("state",),
        stores=(store,),
        training_episodes=1,
        vla_version="0",
    )
    return TrainedHead(model.eval(), artefact, 1, Path("run"))


def by_name(head: TrainedHead, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the inputs of the exported program that are a batch's observation."""
    entries = {"feature": batch.features, "feature_valid": batch.feature_valid}
    inputs = observation_inputs(head, len(batch))
    return {
        given.name: entries[given.of][given.key] if given.of in entries else getattr(batch, given.of)
        for given in inputs
    }


def test_the_exported_head_acts_as_the_live_one_given_the_same_noise(
    every: str, awake_head: Callable[..., HeadModel], toy_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    name = every.partition("-")[0]
    model = awake_head(every, **SHORT.get(name, {}))
    head = trained(model, name)
    if model.not_exported:
        with pytest.raises(UsageError, match="not exported"):
            export_head(head, tmp_path / "head.pt2")
        return
    described = export_head(head, tmp_path / "head.pt2", batch=3)
    program = torch.export.load(tmp_path / "head.pt2").module()
    batch = toy_batch(model, 3, seed=5)
    shapes = {key: entry["shape"] for key, entry in described["inputs"].items() if key.startswith("noise")}
    for seed in (1, 2):
        torch.manual_seed(seed)
        live = model.act(batch, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        noise = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        exported = program(**by_name(head, batch), **noise)
        assert exported.shape == live.shape == tuple(described["output"]["shape"])
        torch.testing.assert_close(exported, live, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "head.json").read_text())
    assert written == described
    assert written["output"]["unit"] == "the data's units: x, y"
    assert bool(shapes) == (name not in ("mlp", "track"))


def test_noise_that_was_drawn_elsewhere_is_given_in_order() -> None:
    drawn = GivenNoise()
    first, second = drawn.take((2,), torch.zeros(1)), drawn.take((3,), torch.zeros(1))
    again = GivenNoise(drawn.noise)
    assert torch.equal(again.take((2,), first), first)
    assert torch.equal(again.take((3,), first), second)


def test_ddpm_is_not_exported_because_it_draws_in_every_step(
    awake_head: Callable[..., HeadModel], tmp_path: Path
) -> None:
    head = trained(awake_head("dp-mlp", sampler="ddpm", train_steps=10), "dp")
    with pytest.raises(UsageError, match=r"draws in every step.*sampler=ddim"):
        export_head(head, tmp_path / "head.pt2")
    described = export_head(with_settings(head, {"sampler": "ddim", "sample_steps": 2}), tmp_path / "head.pt2")
    assert described["config"]["sampler"] == "ddim"


def test_a_head_that_draws_noise_behind_the_back_of_the_export_is_refused(
    awake_head: Callable[..., HeadModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awake_head("mlp")
    plain = type(model).sample

    def noisy(self: Any, batch: Batch, generator: Any) -> torch.Tensor:
        return plain(self, batch, generator) + torch.randn(2)

    monkeypatch.setattr(type(model), "sample", noisy)
    with pytest.raises(UsageError, match="noise_like"):
        export_head(trained(model, "mlp"), tmp_path / "head.pt2")
    assert not list(tmp_path.iterdir())


def test_a_trained_head_takes_another_sampler_and_nothing_else(awake_head: Callable[..., HeadModel]) -> None:
    model = awake_head("fm-mlp", sample_steps=2)
    head = trained(model, "fm")
    other = with_settings(head, {"sampler": "heun", "sample_steps": 5})
    assert (other.config.sampler, other.config.sample_steps) == ("heun", 5)  # type: ignore[attr-defined]
    for name, values in other.model.state_dict().items():
        assert torch.equal(values, model.state_dict()[name])
    with pytest.raises(UsageError, match=r"action_norm.*sample_steps"):
        with_settings(head, {"action_norm": "zscore"})
    with pytest.raises(UsageError, match=r"\.pt2"):
        export_head(head, Path("head.onnx"))
