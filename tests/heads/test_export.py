"""The exported head is the live one: the same actions for the same observation and the same noise."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vla.heads.batch import Batch, HeadIO
from vla.heads.checkpoint import TrainedHead
from vla.heads.export import export_head
from vla.heads.exported_inputs import observation_inputs
from vla.heads.exported_prompt import ExportedPrompt
from vla.heads.model import GivenNoise, HeadModel
from vla.stores.errors import UsageError

AsTrained = Callable[..., TrainedHead]


def by_name(head: TrainedHead, batch: Batch, description: Path) -> dict[str, torch.Tensor]:
    """Return the inputs of the exported program that are a batch's observation."""
    entries = {"feature": batch.features, "feature_valid": batch.feature_valid}
    inputs = observation_inputs(head, len(batch))
    tensors = {
        given.name: entries[given.of][given.key] if given.of in entries else getattr(batch, given.of)
        for given in inputs
    }
    described = json.loads(description.read_text())
    if "prompt_ids" in described["inputs"]:
        telling = head.model.telling()
        assert telling is not None
        assert batch.state is not None
        tensors |= ExportedPrompt.read(description)(telling.of(batch), batch.state[:, -1])
    return {name: values for name, values in tensors.items() if name in described["inputs"]}


def noise_of(described: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return the noise that a live sampler draws with this seed, as the program takes it."""
    if "noise" not in described["inputs"]:
        return {}
    generator = torch.Generator().manual_seed(seed)
    *draws, B, H, A = described["inputs"]["noise"]["shape"]
    noise = [torch.randn(B, H, A, generator=generator) for _ in range(draws[0] if draws else 1)]
    return {"noise": torch.stack(noise) if draws else noise[0]}


def exported_equals_live(head: TrainedHead, batch: Batch, out: Path) -> dict[str, Any]:
    """Export a head and compare it with the live one on a batch; return the description."""
    described = export_head(head, out, batch=len(batch))
    program = torch.export.load(out).module()
    for seed in (1, 2):
        live = head.model.act(batch, torch.Generator().manual_seed(seed))
        exported = program(**by_name(head, batch, out.with_suffix(".json")), **noise_of(described, seed))
        assert exported.shape == live.shape == tuple(described["output"]["shape"])
        torch.testing.assert_close(exported, live, rtol=1e-4, atol=1e-4)
    return described


def test_the_exported_head_acts_as_the_live_one_given_the_same_noise(
    every: str,
    awake_head: Callable[..., HeadModel],
    as_trained: AsTrained,
    toy_batch: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    name = every.partition("-")[0]
    # torch.export unrolls the sampler: a second step is traced for the heads whose steps are cheap.
    steps = {} if name in ("mlp", "track") else {"sample_steps": 2 if name in ("fm", "dp") else 1}
    model = awake_head(every, **steps)
    described = exported_equals_live(as_trained(model, name), toy_batch(model, 3, seed=5), tmp_path / "head.pt2")
    written = json.loads((tmp_path / "head.json").read_text())
    assert written == described
    assert written["output"]["unit"] == "the data's units: x, y"
    assert ("noise" in written["inputs"]) == bool(steps)


def test_noise_that_was_drawn_elsewhere_is_given_in_order() -> None:
    drawn = GivenNoise()
    first, second = drawn.take((2,), torch.zeros(1)), drawn.take((3,), torch.zeros(1))
    again = GivenNoise(drawn.noise)
    assert torch.equal(again.take((2,), first), first)
    assert torch.equal(again.take((3,), first), second)


def test_ddpm_is_given_the_noise_of_every_step(
    awake_head: Callable[..., HeadModel], as_trained: AsTrained, toy_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    model = awake_head("dp-mlp", sampler="ddpm", train_steps=4)
    described = exported_equals_live(as_trained(model, "dp"), toy_batch(model, 3), tmp_path / "head.pt2")
    assert described["inputs"]["noise"]["shape"] == [4, 3, 4, 2]  # the first x, and all steps but the last
    model.adjust({"sampler": "ddim", "sample_steps": 2})
    described = export_head(as_trained(model, "dp"), tmp_path / "ddim.pt2")
    assert described["config"]["sampler"] == "ddim"


def test_the_actions_that_a_task_lacks_are_told_and_stay_zero(
    awake_head: Callable[..., HeadModel],
    as_trained: AsTrained,
    toy_batch: Callable[..., Batch],
    toy_io: HeadIO,
    tmp_path: Path,
) -> None:
    """One head for tasks of different dimensions: a live policy tells which are padding in every batch."""
    io = toy_io.model_copy(update={"task_dims": ((True, False), (True, True))})
    model = awake_head("fm-mlp", io=io, sample_steps=2)
    batch = toy_batch(model, 4)
    batch = dataclasses.replace(batch, action_dims=torch.tensor(io.task_dims)[batch.task])
    described = exported_equals_live(as_trained(model, "fm"), batch, tmp_path / "head.pt2")
    assert described["task_dims"] == [[True, False], [True, True]]
    exported = torch.export.load(tmp_path / "head.pt2").module()(
        **by_name(as_trained(model, "fm"), batch, tmp_path / "head.json"), **noise_of(described, 1)
    )
    assert torch.equal(exported[..., 1].abs().amax(dim=1) == 0, batch.task == 0)


def test_a_head_that_draws_noise_behind_the_back_of_the_export_is_refused(
    awake_head: Callable[..., HeadModel], as_trained: AsTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awake_head("mlp")
    plain = type(model).sample

    def noisy(self: Any, batch: Batch, generator: Any) -> torch.Tensor:
        return plain(self, batch, generator) + torch.randn(2)

    monkeypatch.setattr(type(model), "sample", noisy)
    with pytest.raises(UsageError, match="noise_like"):
        export_head(as_trained(model, "mlp"), tmp_path / "head.pt2")
    assert not list(tmp_path.iterdir())


def test_neither_file_of_an_export_is_replaced_unasked(
    awake_head: Callable[..., HeadModel], as_trained: AsTrained, tmp_path: Path
) -> None:
    head, out, beside = as_trained(awake_head("mlp"), "mlp"), tmp_path / "head.pt2", tmp_path / "head.json"
    for taken in (out, beside):
        taken.write_text("mine")
        with pytest.raises(UsageError, match=rf"{re.escape(taken.name)} exists\. Try: --overwrite"):
            export_head(head, out)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        taken.unlink()
    beside.write_text("mine")
    export_head(head, out, overwrite=True)
    assert json.loads(beside.read_text())["head"] == "mlp"


def test_a_trained_head_takes_another_sampler_and_nothing_else(
    awake_head: Callable[..., HeadModel], as_trained: AsTrained
) -> None:
    model = awake_head("fm-mlp", sample_steps=2)
    head = as_trained(model, "fm")
    before = {name: values.clone() for name, values in model.state_dict().items()}
    model.adjust({"sampler": "heun", "sample_steps": 5})
    assert (head.config.sampler, head.config.sample_steps) == ("heun", 5)  # type: ignore[attr-defined]
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    with pytest.raises(UsageError, match=r"action_norm.*sample_steps"):
        model.adjust({"action_norm": "zscore"})
    with pytest.raises(UsageError, match=r"\.pt2"):
        export_head(head, Path("head.onnx"))
