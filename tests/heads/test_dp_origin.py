"""Diffusion Policy on cached features: the published settings, and the origin's faults that concern the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vla.heads.batch import Batch, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.columns import episode_dims, task_dims
from vla.heads.data import DataConfig
from vla.heads.dp import DiffusionConfig
from vla.heads.model import HeadModel
from vla.heads.train import HeadTrainConfig, with_head_defaults
from vla.stores.errors import DataError
from vla.stores.tables import EpisodeTable
from vla.stores.windows import WindowIndex
from vla.training.config import TrainConfig
from vla.training.loop import fit

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]


def test_defaults_are_the_published_ones() -> None:
    config = DiffusionConfig()
    assert (config.horizon, config.n_obs, config.n_action) == (16, 2, 8)
    assert (config.down_dims, config.kernel_size, config.n_groups) == ((256, 512, 1024), 5, 8)
    assert (config.diffusion_step_embed_dim, config.train_steps, config.clip_sample) == (256, 100, True)
    assert config.action_norm == "limits"


def test_training_has_a_schedule_an_average_of_weights_a_split_and_a_seed() -> None:
    """The origin has none of the first three."""
    config = with_head_defaults(HeadTrainConfig.build({"head": "dp", "data": {"stores": ["stores/x"]}}))
    train = config.train
    assert (train.schedule, train.ema, train.seed, train.warmup) == ("cosine", True, 42, 200)
    assert (train.lr, train.betas, train.weight_decay) == (1e-4, (0.95, 0.999), 1e-6)
    assert DataConfig(stores=()).validation > 0
    assert TrainConfig(steps=100_000).warmup == 500


def test_observations_end_where_the_actions_to_execute_begin() -> None:
    """The origin's window starts both at one frame, so that it sees n_obs - 1 frames of the future."""
    config = DiffusionConfig(n_obs=3, horizon=8, n_action=4)
    table = EpisodeTable.plan(["a"], [20], ["go"], [{}])
    rows = WindowIndex(table, np.array([0]), config.window).rows(np.array([10]))
    assert rows.obs.tolist() == [[8, 9, 10]]
    assert rows.action.tolist() == [list(range(8, 16))]
    assert rows.action[0, -config.action_offset] == rows.obs[0, -1]


def test_the_unet_takes_actions_as_they_are_and_turns_them_itself(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin transposes them a second time."""
    model: Any = toy_head("dp-unet")
    shapes: list[tuple[int, ...]] = []
    model.net.register_forward_hook(lambda _, given, out: shapes.append((*given[0].shape, *out.shape)))
    model.loss(toy_batch(model))
    assert shapes == [(8, 4, 2, 8, 4, 2)]
    first: Any = model.net.down_modules[0][0].blocks[0].block[0]
    assert (first.in_channels, first.kernel_size) == (2, (5,))  # convolves over time, with a channel a dimension


def test_padded_dimensions_are_zero_after_normalisation_not_before_it(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """A zero in the data's units is no zero in normalised ones: the origin pads, then normalises."""
    model = toy_head("dp-mlp")
    batch = toy_batch(model)
    dims = torch.tensor([[True, False]] * 8)
    labels = model.labels(dataclasses.replace(batch, action_dims=dims))
    assert (labels[..., 1] == 0).all()
    assert model.action(torch.zeros(1, 2))[0, 1].abs() > 0.1
    assert batch.action is not None
    torch.testing.assert_close(labels[..., 0], model.action(batch.action)[..., 0])


def test_a_sampler_keeps_padded_dimensions_at_zero_in_every_step(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("dp-mlp")
    batch = dataclasses.replace(toy_batch(model), action_dims=torch.tensor([[True, False]] * 8))
    seen: list[torch.Tensor] = []
    model.net.register_forward_hook(lambda _, given, out: seen.append(given[0].clone()))
    model.act(batch, torch.Generator().manual_seed(0))
    assert len(seen) == 16
    assert all((x[..., 1] == 0).all() and (x[..., 0] != 0).all() for x in seen)


def test_instructions_may_have_any_characters(toy_io: HeadIO) -> None:
    """Task names are keys of a ModuleDict in the origin, which breaks on dots."""
    io = toy_io.model_copy(update={"tasks": ("beat.block-demo_clean", "stack/two blocks", "")})
    model: Any = build_head("dp", {"net": "mlp", "horizon": 4, "n_action": 2}, io)
    assert model.encoder.task.num_embeddings == 3


@pytest.mark.parametrize("kind", ["attention", "keypoints"])
def test_a_frozen_encoder_keeps_its_readers_and_trains_what_mixes_them(kind: str, toy_head: MakeHead) -> None:
    model: Any = toy_head("dp-mlp", encoder={"kind": kind}, freeze_encoder=True, fitted=False)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rest = {name for name, _ in model.named_parameters()} - trains
    assert rest
    assert all(name.startswith("encoder.readers.") for name in rest)
    assert {"encoder.mix.0.weight", "encoder.task.weight"} <= trains


def test_dimensions_that_change_within_an_episode_are_refused_where_the_episode_is_used() -> None:
    class OneColumn:
        place = "stores/x"
        episodes = EpisodeTable.plan(["a", "b"], [3, 2], ["go", "go"], [{}, {}])

        class manifest:  # noqa: N801
            steps: ClassVar[dict[str, None]] = {"action_dims": None}

        @staticmethod
        def steps(name: str) -> np.ndarray[Any, Any]:
            return np.array([[1, 1], [1, 1], [1, 1], [1, 0], [0, 1]], bool)

    store: Any = OneColumn()
    with pytest.raises(DataError, match="action_dims changes within an episode"):
        episode_dims("action", store, np.array([True, True]))
    found = episode_dims("action", store, np.array([True, False]))
    assert found is not None
    assert found.tolist() == [[True, True], [True, False]]


def test_a_task_of_episodes_that_differ_has_no_one_answer() -> None:
    dims = np.array([[1, 1], [1, 0], [1, 0], [1, 0]], bool)
    assert task_dims(dims, np.array([0, 0, 1, 1]), 3) == ((), (True, False), ())


def test_noise_is_compared_at_fixed_steps_over_real_entries(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("dp-mlp").train()
    batch = toy_batch(model)
    assert batch.action is not None
    assert batch.action_valid is not None
    valid = batch.action_valid.clone()
    valid[:, 3] = False
    valid[0] = False
    batch = dataclasses.replace(batch, action_valid=valid)
    dirty = dataclasses.replace(batch, action=torch.where(valid[..., None], batch.action, torch.nan))
    first, second = (model.measure(given, torch.zeros(8, 4, 2))["eps_mse"] for given in (batch, dirty))
    assert first.shape == (7 * 3 * 2,)  # every valid entry counts alike
    assert torch.equal(first, second)
    assert first.min() > 0
    assert model.training


def test_a_net_that_knows_the_noise_measures_zero(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("dp-mlp")
    batch = toy_batch(model)
    action, abar = model.labels(batch), model._noising.alphas_cumprod

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor, k: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            share = abar[k][:, None, None]
            return (x - share.sqrt() * action) / (1 - share).sqrt()

    model.net = Perfect()
    assert model.measure(batch, action)["eps_mse"].max() < 1e-6


class Trainee(torch.nn.Module):
    """The least that a run can train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def loss(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (self.weight * batch.values).mean(), {}


@dataclasses.dataclass
class Values:
    values: torch.Tensor

    def to(self, device: Any, *, non_blocking: bool = False) -> Values:
        return self


@pytest.mark.filterwarnings("ignore:`log_with=")
def test_a_tracked_run_has_the_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def init_trackers(self: Accelerator, project: str, config: Any, init_kwargs: Any) -> None:
        told.update(project=project, config=config, init_kwargs=init_kwargs)

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(Accelerator, "log", lambda *_, **__: None)
    monkeypatch.setattr("vla.training.devices._check_trackers", lambda names: None)  # wandb need not be installed
    config = TrainConfig(steps=1, device="cpu", trackers=("wandb",), warmup_steps=0)
    fit(
        Trainee(),
        lambda first, stride: iter([Values(torch.ones(1))] * 2),
        config,
        tmp_path / "stage-1",
        artefact={},
    )
    assert told["project"] == "vla"
    assert told["init_kwargs"]["wandb"] == {"name": "stage-1"}
    assert told["config"]["lr"] == 1e-4
