"""TrackVLA's planner: what it reads, what bounds it, what its figures mean. `gap_N`: the gaps of the published code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla.featurize.sources.waypoints import integrate_waypoints
from vla.heads.batch import Batch, FeatureIO, HeadIO, TextIO
from vla.heads.checkpoint import build_head
from vla.heads.nets.planner import PlannerHead3L, TVIEmbedder
from vla.heads.texts import TextRows
from vla.heads.track import TrackHead
from vla.heads.train import HeadTrainConfig, with_head_defaults
from vla.heads.waypoints import alpha_of, waypoint_velocities
from vla.stores.errors import DataError, MachineError, UsageError

MakeHead = Callable[..., Any]
MakeBatch = Callable[..., Batch]

TOKENS = {
    "coarse": FeatureIO(shape=(1, 4, 8), dims=("token", "channel")),
    "fine": FeatureIO(shape=(1, 16, 8), dims=("token", "channel")),
}
IO = HeadIO(
    action_dim=3,
    chunk=8,
    state_dim=1,
    state_names=("yaw",),
    features=TOKENS,
    tasks=("follow the red one", "follow"),
    text=TextIO(length=6, width=16),
)
TINY = {"light": {}, "llm": {"variant": "llm", "llm_weights": "random"}}


def plans(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    """Waypoints [B, 8, 3] and their masks: the first plan whole, the second without its end, the third with nothing."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(count, 8, dtype=torch.bool)
    valid[1, 5:] = False
    valid[2] = False
    return torch.randn(count, 8, 3, generator=generator), valid


@pytest.fixture
def planner(toy_head: MakeHead) -> MakeHead:
    """`planner("light" or "llm", **settings)`: a head over waypoints that looks at 4 frames, every weight at random."""

    def make(variant: str, *, awake: bool = True, io: HeadIO = IO, **settings: Any) -> Any:
        values = {"n_obs": 4, "horizon": 8, "alpha_xy": 2.0, "beta": 10.0, "max_time": 64, **settings}
        model = toy_head(f"track-{variant}", io=io, fitted=False, **values).eval()
        model.fit_normalisers(0.1 * plans(0)[0].flatten(0, 1).numpy(), np.zeros((1, 1)))
        model.fit_texts(rows(io))
        for parameter in model.parameters() if awake else ():
            torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


def rows(io: HeadIO, side: str | None = None) -> TextRows:
    """The same 4 and 1 tokens however long the store's rows are and wherever it pads them."""
    assert io.text is not None
    L, tokens = io.text.length, ([5, 6, 7, 8], [5])
    ids, mask = torch.zeros(2, L, dtype=torch.long), torch.zeros(2, L, dtype=torch.bool)
    embedding = torch.randn(2, L, io.text.width, generator=torch.Generator().manual_seed(L))  # in padding too
    known = torch.randn(9, io.text.width, generator=torch.Generator().manual_seed(1))
    for row, text in enumerate(tokens):
        place = slice(0, len(text)) if (side or io.text.side) == "right" else slice(L - len(text), L)
        ids[row, place], mask[row, place], embedding[row, place] = torch.tensor(text), True, known[text]
    return TextRows(ids, mask, embedding)


def windows(model: Any, count: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    action, valid = plans(seed + 1, count)
    return Batch(
        features={
            name: torch.randn(count, frames, *model.io.features[name].shape, generator=generator)
            for name, frames in model.reads.items()
        },
        state=torch.randn(count, model.config.n_obs, 1, generator=generator),
        task=torch.arange(count) % 2,
        obs_valid=torch.ones(count, model.config.n_obs, dtype=torch.bool),
        action=action,
        action_valid=valid,
    )


def figures(model: Any, *batches: tuple[Batch, Tensor]) -> dict[str, float]:
    """What evaluation makes of some batches and the plans for them."""
    measured = [model.measure(batch, plan) for batch, plan in batches]
    return model.summarise({name: torch.cat([one[name] for one in measured]) for name in measured[0]})  # type: ignore[no-any-return]


both = pytest.mark.parametrize("variant", ["light", "llm"])


# Figures.


@both
def test_gap_1_alpha_is_applied_exactly_once(variant: str, planner: MakeHead) -> None:
    """In the plan, in its label and in every figure: doubled alphas are doubled plans, of the same net."""
    model, wide = (planner(variant, alpha_xy=alpha) for alpha in (2.0, 4.0))
    wide.load_state_dict({name: v for name, v in model.state_dict().items() if name != "action.scale"}, strict=False)
    batch = windows(model)
    net: Tensor = model.sample(batch, None)
    plan = model.act(batch)
    torch.testing.assert_close(plan, net * torch.tensor([2.0, 2.0, 1.0]))
    torch.testing.assert_close(wide.act(batch), plan * torch.tensor([2.0, 2.0, 1.0]))
    assert batch.action is not None
    assert batch.action_valid is not None
    whole = dataclasses.replace(batch, action_valid=None)
    wanted = ((plan - batch.action) ** 2).double().mean((0, 1))
    got = figures(model, (whole, plan))
    assert [got[f"mse_{name}"] for name in ("x", "y", "theta")] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert got["mse_total"] == pytest.approx(wanted.mean().item(), rel=1e-5)


@both
def test_l_nav_is_the_loss_and_the_loss_is_ten_times_the_masked_error(variant: str, planner: MakeHead) -> None:
    model = planner(variant)
    batch = windows(model)
    assert batch.action is not None
    assert batch.action_valid is not None
    loss, _ = model.loss(batch)
    net = model.sample(batch, None)
    error = (net - batch.action / torch.tensor([2.0, 2.0, 1.0])) ** 2
    assert loss.item() == pytest.approx(10 * error[batch.action_valid].mean().item(), rel=1e-4)
    assert figures(model, (batch, model.act(batch)))["L_nav"] == pytest.approx(loss.item(), rel=1e-4)


def test_gap_2_the_final_error_is_at_the_last_valid_waypoint(planner: MakeHead) -> None:
    """Rows 0 and 1 end at waypoints 7 and 4; row 2 has none and counts nowhere; the others are met exactly."""
    model = planner("light")
    batch = windows(model)
    assert batch.action is not None
    plan = batch.action.clone()
    plan[0, 7, :2] += torch.tensor([0.3, 0.4])
    plan[1, 4, :2] += torch.tensor([0.0, 0.1])
    plan[1, 5:] += 100.0
    plan[2] += 100.0
    got = figures(model, (batch, plan))
    assert got["final_EPE_mean"] == pytest.approx((0.5 + 0.1) / 5, rel=1e-4)
    assert got["final_EPE_median"] == pytest.approx(0.0, abs=1e-6)
    assert got["hit_rate"] == pytest.approx(4 / 5)
    assert figures(planner("light", hit_threshold=0.05), (batch, plan))["hit_rate"] == pytest.approx(3 / 5)
    assert got["mse_total"] == pytest.approx((0.25 + 0.01) / (3 * (8 * 4 + 5)), rel=1e-4)


def test_the_median_of_an_even_number_is_between_the_two_in_the_middle(planner: MakeHead) -> None:
    model = planner("light")
    batch = windows(model, 4)
    assert batch.action is not None
    plan = batch.action + torch.tensor([0.0, 0.2, 9.0, 0.4])[:, None, None] * torch.tensor([1.0, 0.0, 0.0])
    batch = dataclasses.replace(batch, action_valid=None)
    assert figures(model, (batch, plan))["final_EPE_median"] == pytest.approx(0.3, rel=1e-4)


def test_gap_3_the_share_of_valid_waypoints_is_told(planner: MakeHead) -> None:
    model = planner("light")
    batch = windows(model)
    assert figures(model, (batch, model.act(batch)))["mask_cov"] == pytest.approx((8 * 4 + 5) / (6 * 8))


def test_an_episode_is_followed_by_the_share_of_its_own_frames(planner: MakeHead) -> None:
    """3 frames of which 2 are followed, then 1 of which none is, over two batches: the mean of 2/3 and 0."""
    model = planner("light")
    first = torch.tensor([True, False, False, True])
    parts = []
    for window in (slice(0, 2), slice(2, 4)):
        batch = windows(model, 4)
        assert batch.action is not None
        seen = torch.ones(4, 4, dtype=torch.bool)
        seen[first, :-1] = False
        plan = batch.action.clone()
        plan[1:3:2, :, 0] += 9.0
        plan[3, :, 0] += 9.0
        rows = {"features": {}, "state": None, "task": batch.task[window], "obs_valid": seen[window]}
        parts.append((Batch(**rows, action=batch.action[window]), plan[window]))
    assert figures(model, *parts)["episode_follow"] == pytest.approx((2 / 3 + 0) / 2)


def test_labels_other_than_waypoints_have_no_places_in_their_figures(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("track-light")
    batch = toy_batch(model)
    got = figures(model, (batch, model.act(batch)))
    assert got.keys() == {"L_nav", "mse_total", "mse_x", "mse_y", "mask_cov"}


# The scale and its bounds.


def test_alpha_is_the_95th_percentile_of_the_distance_unless_it_is_given(planner: MakeHead) -> None:
    radius = np.linspace(0, 10, 201)
    angle = np.linspace(0, 7, 201)
    walked = np.stack([radius * np.cos(angle), radius * np.sin(angle), angle], axis=1)
    model = planner("light", alpha_xy=None)
    model.fit_normalisers(walked, np.zeros((1, 1)))
    assert model.action.scale.tolist() == pytest.approx([9.5, 9.5, 1.0])
    assert model.action.centre.tolist() == [0, 0, 0]
    assert planner("light", alpha_xy=3.0).action.scale.tolist() == [3, 3, 1]
    assert alpha_of(np.zeros((5, 3), np.float32)) == 1e-3
    with pytest.raises(DataError, match="no waypoint"):
        alpha_of(np.zeros((0, 3), np.float32))


@both
def test_gap_7_tanh_need_not_bound_headings_to_one_radian(variant: str, planner: MakeHead) -> None:
    """Of a net that gives 5 everywhere: "all" is the published bound, "xy" leaves the heading alone."""
    batch = windows(planner(variant))
    ends = {}
    for tanh in ("off", "xy", "all"):
        model = planner(variant, tanh=tanh, alpha_xy=2.0, awake=False)
        torch.nn.init.zeros_(model.planner.mlp[5].weight)
        torch.nn.init.constant_(model.planner.mlp[5].bias, 5.0)
        ends[tanh] = model.act(batch)[0, 0].tolist()
    bound = math.tanh(5)
    assert ends["off"] == pytest.approx([10, 10, 5])
    assert ends["xy"] == pytest.approx([2 * bound, 2 * bound, 5])
    assert ends["all"] == pytest.approx([2 * bound, 2 * bound, bound])


def test_gap_7_a_bound_below_the_demonstrated_headings_is_refused(planner: MakeHead) -> None:
    turned = np.array([[1.0, 0.0, -1.2], [2.0, 0.0, 0.3]])
    model = planner("light", tanh="all", awake=False, alpha_xy=None)
    for tanh in ("off", "xy"):
        planner("light", tanh=tanh).fit_normalisers(turned, np.zeros((1, 1)))
    with pytest.raises(DataError, match=r"bounds headings to 1 rad.*1\.20.*model\.tanh=xy"):
        model.fit_normalisers(turned, np.zeros((1, 1)))


def test_gap_8_velocities_of_waypoints_are_those_that_they_were_integrated_from() -> None:
    """At the data's own dt, which has no default; over the pose left out, for a straight line, their mean."""
    velocities = np.random.default_rng(2).normal(size=(9, 3)).astype(np.float32)
    velocities[3:5, 2] = 0.0
    waypoints, _ = integrate_waypoints(velocities, 1, 8, 0.1)
    got = waypoint_velocities(waypoints[0], 0.1)
    whole = np.array([0, 1, 2, 4, 5, 6])
    np.testing.assert_allclose(got[whole], velocities[[0, 1, 2, 5, 6, 7]], atol=1e-4)
    np.testing.assert_allclose(got[3], velocities[3:5].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(waypoint_velocities(waypoints[0], 0.2), got / 2)
    for wrong in (waypoints[0, :, :2], waypoints[0, :1]):
        with pytest.raises(DataError, match="waypoints"):
            waypoint_velocities(wrong, 0.1)
    with pytest.raises(DataError, match="dt above 0"):
        waypoint_velocities(waypoints[0], 0.0)


def test_a_base_is_never_told_to_drive_at_nan() -> None:
    waypoints = np.zeros((8, 3))
    waypoints[4, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        waypoint_velocities(waypoints, 0.1)


# What it reads.


@both
def test_gap_9_the_present_frame_is_no_part_of_its_history_and_each_past_one_is(
    variant: str, planner: MakeHead
) -> None:
    model = planner(variant)
    batch = windows(model)
    plan = model.act(batch)
    for frame in range(4):
        coarse = batch.features["coarse"].clone()
        coarse[:, frame] += torch.randn(coarse[:, frame].shape)
        changed = model.act(dataclasses.replace(batch, features={**batch.features, "coarse": coarse}))
        moved = (changed - plan).abs().amax((1, 2))
        assert (moved > 1e-4).all() if frame < 3 else torch.equal(changed, plan)


@both
def test_one_frame_alone_needs_no_history(variant: str, planner: MakeHead) -> None:
    model = planner(variant, n_obs=1)
    assert model.reads == {"fine": 1}
    assert model.act(windows(model)).shape == (6, 8, 3)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_gap_10_neither_batch_mates_nor_padding_of_text_change_a_plan(tuning: str, planner: MakeHead) -> None:
    """Alone, among others, with longer rows in the store and with padding on either side: the same plan."""
    model = planner("llm", llm=tuning, awake=False)
    batch = windows(model)
    together = model.act(batch)
    for row in range(3):
        part = slice(row, row + 1)
        alone = Batch({k: v[part] for k, v in batch.features.items()}, None, batch.task[part], batch.obs_valid[part])
        torch.testing.assert_close(model.act(alone), together[part], atol=1e-5, rtol=1e-5)
    for length, side in ((6, "right"), (12, "left"), (12, "right")):
        stored = IO.model_copy(update={"text": TextIO(length=length, width=16, side=side)})
        other = planner("llm", llm=tuning, awake=False, io=stored)
        assert other.text.ids.shape == (2, length)
        torch.testing.assert_close(other.act(batch), together, atol=1e-5, rtol=1e-5)


def test_gap_10_an_instruction_alone_gives_the_plan_that_it_gives_beside_a_longer_one(planner: MakeHead) -> None:
    """With a second instruction, the first one's row is padded; alone it is not."""
    model, only = planner("llm", awake=False), planner("llm", awake=False)
    batch = dataclasses.replace(windows(model), task=torch.ones(6, dtype=torch.long))
    short = rows(IO)
    only.fit_texts(TextRows(short.ids[[1, 1]], short.mask[[1, 1]], short.embedding[[1, 1]]))
    assert only.text.tokens(batch.task)[0].shape == (6, 1)
    assert model.text.tokens(batch.task)[0].shape == (6, 4)
    torch.testing.assert_close(only.act(batch), model.act(batch), atol=1e-5, rtol=1e-5)


def test_gap_10_positions_count_real_tokens(planner: MakeHead) -> None:
    """Rotary positions are relative, so that a shift is seen in rounding alone; other models' are not."""
    model = planner("llm")
    seen: list[Any] = []
    model.frozen["llm"].module.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    batch = windows(model)
    model.act(batch)
    positions = seen[0]["position_ids"]
    for row, padding in enumerate((0, 3) * 3):
        assert positions[row, padding:].tolist() == list(range(positions.shape[1] - padding))


def test_the_light_variant_reads_real_tokens_of_the_text_alone(planner: MakeHead) -> None:
    model = planner("light")
    batch = windows(model)
    longer = IO.model_copy(update={"text": TextIO(length=12, width=16, side="right")})
    torch.testing.assert_close(planner("light", io=longer, awake=False).text.mean, model.text.mean)
    swapped = model.act(dataclasses.replace(batch, task=1 - batch.task))
    assert ((swapped - model.act(batch)).abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize(("angle", "each"), [(None, 1), ("yaw", 2)])
def test_gap_14_time_tokens_stand_before_each_frame_inside_the_sequence(
    angle: str | None, each: int, planner: MakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[text] + 3 x (1 + 4) + (1 + 16) + [ACT], with the ACT token last, and one more a frame with angles."""
    model = planner("llm", angle=angle)
    batch = windows(model)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = model.language.forward
    monkeypatch.setattr(model.language, "forward", lambda row, real: (seen.append((row, real)), forward(row, real))[1])
    model.act(batch)
    ((row, real),) = seen
    assert row.shape == (6, 4 + 3 * (each + 4) + (each + 16) + 1, 32)
    assert real.sum(1).tolist() == [row.shape[1] - padding for padding in (0, 3) * 3]
    assert not real[1, :3].any()
    torch.testing.assert_close(row[:, -1], model.act_token.weight.expand(6, -1))
    tvi = model.tvi
    for frame in range(4):
        kind = TVIEmbedder.FINE if frame == 3 else TVIEmbedder.COARSE
        wanted = tvi.time_emb.weight[frame] + tvi.view_emb.weight[0] + tvi.kind_emb.weight[kind]
        torch.testing.assert_close(row[:, 4 + frame * (each + 4)], wanted.expand(6, -1))


def test_the_heading_is_told_as_sine_and_cosine(planner: MakeHead) -> None:
    """A whole turn is no turn; the plan depends on each frame's heading, and needs none without the option."""
    model = planner("llm", angle="yaw")
    batch = windows(model)
    assert batch.state is not None
    plan = model.act(batch)
    turned = dataclasses.replace(batch, state=batch.state + 2 * torch.pi)
    torch.testing.assert_close(model.act(turned), plan, atol=1e-4, rtol=1e-4)
    for frame in range(4):
        state = batch.state.clone()
        state[:, frame] += 1.0
        assert ((model.act(dataclasses.replace(batch, state=state)) - plan).abs().amax((1, 2)) > 1e-5).all()
    plain = planner("llm")
    assert plain.columns == ()
    assert plain.tvi.angle_proj is None
    assert plain.act(dataclasses.replace(batch, state=None)).shape == (6, 8, 3)


def test_views_are_told_apart(planner: MakeHead) -> None:
    two = {name: io.model_copy(update={"shape": (2, *io.shape[1:])}) for name, io in TOKENS.items()}
    model = planner("llm", io=IO.model_copy(update={"features": two}))
    batch = windows(model)
    swapped = {name: value.flip(2) for name, value in batch.features.items()}
    apart = (model.act(dataclasses.replace(batch, features=swapped)) - model.act(batch)).abs().amax((1, 2))
    assert (apart > 1e-4).all()


# The language model.


def test_gradients_flow_through_a_frozen_language_model_and_leave_it_alone(planner: MakeHead) -> None:
    model = planner("llm", awake=False)
    model.act(windows(model))  # inference first: what is loaded there has to be trainable through
    network = model.frozen["llm"].module
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.loss(windows(model))[0].backward()
    for part in (model.proj, model.tvi, model.act_token, model.planner):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(name.startswith("language") for name in model.state_dict())


def test_adapters_train_and_belong_to_each_copy_of_the_head(planner: MakeHead) -> None:
    """q, k, v and o of both layers, rank 16; they start as the plain model, and the average has its own."""
    import copy

    model, plain = planner("llm", llm="lora", awake=False), planner("llm", awake=False)
    shared = {name: value for name, value in plain.state_dict().items() if not name.startswith("language")}
    assert set(model.load_state_dict(shared, strict=False).missing_keys) == {
        name for name in model.state_dict() if name.startswith("language.lora.")
    }
    batch = windows(model)
    assert torch.equal(model.act(batch), plain.act(batch))
    assert model.parameter_counts()["language"] == (2 * 16 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32),) * 2
    assert model.parameter_counts()["llm"] == (plain.parameter_counts()["llm"][0], 0)
    average = copy.deepcopy(model)
    for parameter in model.language.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(average.act(batch), plain.act(batch))
    assert not torch.equal(model.act(batch), plain.act(batch))
    model.loss(batch)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.language.parameters())


def test_adapters_have_dropout_in_training_alone(planner: MakeHead) -> None:
    model = planner("llm", llm="lora")
    batch = windows(model)
    assert torch.equal(model.sample(batch, None), model.sample(batch, None))
    model.train()
    assert not torch.equal(model.sample(batch, None), model.sample(batch, None))
    acted = model.act(batch)
    assert torch.equal(model.act(batch), acted)
    assert torch.equal(model.eval().act(batch), acted)


def test_lora_without_peft_names_the_extra(planner: MakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MachineError, match=r"needs peft.*lora"):
        planner("llm", llm="lora")


def test_a_language_model_trained_whole_starts_from_its_weights_and_stays_in_the_checkpoint(planner: MakeHead) -> None:
    model, plain = planner("llm", llm="full", awake=False), planner("llm", awake=False)
    shared = {name: value for name, value in plain.state_dict().items() if not name.startswith("language")}
    model.load_state_dict(shared, strict=False)
    model.language.start()
    batch = windows(model)
    assert torch.equal(model.act(batch), plain.act(batch))
    assert model.frozen == {}
    model.loss(batch)[0].backward()
    trained = dict(model.language.named_parameters())
    assert all(p.grad is not None for name, p in trained.items())
    assert sum(p.numel() for p in trained.values()) == plain.parameter_counts()["llm"][0]


def test_parameters_are_counted_by_part(planner: MakeHead) -> None:
    counts = planner("llm").parameter_counts()
    assert counts.keys() == {"proj", "tvi", "act_token", "planner", "llm"}
    assert counts["act_token"] == (32, 32)
    assert counts["tvi"] == ((64 + 1 + 2) * 32,) * 2
    assert counts["llm"][0] > 0
    assert counts["llm"][1] == 0


def test_tokens_that_the_language_model_lacks_are_refused(planner: MakeHead) -> None:
    model = planner("llm")
    told = rows(IO)
    with pytest.raises(DataError, match="token 257 of an instruction; expected below 257"):
        model.fit_texts(dataclasses.replace(told, ids=torch.where(told.mask, 257, 0)))


# The plan.


@both
def test_a_plan_is_one_pass_through_every_part(variant: str, planner: MakeHead) -> None:
    """Item 84: one forward pass, whatever generator is given."""
    model = planner(variant)
    passes: list[object] = []
    model.planner.register_forward_hook(lambda *_: passes.append(1))
    model.act(windows(model), torch.Generator().manual_seed(0))
    assert len(passes) == 1


def test_the_head_plans_in_float32_under_autocast() -> None:
    head = PlannerHead3L(16, 8, 3, tanh="off")
    hidden = torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        plan = head(hidden.bfloat16())
    assert plan.dtype == torch.float32
    assert torch.equal(plan, head(hidden.bfloat16().float()))


# Settings.


@pytest.mark.parametrize("values", [{}, {"variant": "llm"}, {"variant": "llm", "llm": "full"}])
def test_gap_6_there_is_one_default_for_everything(values: dict[str, Any]) -> None:
    """Of the head's settings and of how it is trained; the published code has three."""
    config: Any = TrackHead.Config.build(values)
    assert (config.n_obs, config.horizon, config.beta, config.tanh) == (32, 8, 10.0, "off")
    assert config.alpha_xy is None
    assert TrackHead.Config.build({}).llm == "frozen"  # type: ignore[attr-defined]
    whole = {"head": "track", "data": {"stores": ["x"]}, "model": values}
    train = with_head_defaults(HeadTrainConfig.build(whole)).train
    if "variant" in values:
        assert (train.weight_decay, train.grad_clip, train.precision) == (0.01, 1.0, "bf16")
        assert train.lr == (2e-5 if values.get("llm") == "full" else 3e-4)
    else:
        assert (train.lr, train.precision) == (2e-3, "no")


@pytest.mark.parametrize(
    ("io", "values", "says"),
    [
        ({"text": None}, {}, "head 'track' needs a text store.*vla featurize --backbone text"),
        ({"text": TextIO(length=6)}, {}, "ids without embeddings"),
        (
            {"features": {"fine": TOKENS["fine"]}},
            {},
            "needs the feature 'coarse'.*vla featurize --backbone dino-siglip",
        ),
        ({"chunk": None}, {"tanh": "xy"}, r"no waypoints.*data\.target=waypoints"),
        ({"chunk": None}, {"alpha_xy": 2.0}, "no waypoints"),
        ({"action_dim": 2}, {"waypoints": True}, "waypoints of 2 numbers"),
        ({}, {"norm_stats": "x.json"}, "norm_stats over waypoints"),
        ({}, {"planner": "x.pt"}, "model.planner with variant light"),
        ({}, {"angle": "yaw"}, "angle with variant light"),
        ({}, {**TINY["llm"], "max_time": 16}, "n_obs 32; expected at most max_time, 16"),
        ({}, {**TINY["llm"], "max_text": 5}, "instructions of 6 tokens; expected at most 5"),
        ({}, {**TINY["llm"], "angle": "yow"}, "no state column 'yow', did you mean 'yaw'"),
        (
            {"features": {**TOKENS, "coarse": TOKENS["coarse"].model_copy(update={"shape": (2, 4, 8)})}},
            {},
            "as many views",
        ),
        ({}, {"variant": "lm"}, "variant = 'lm'"),
    ],
)
def test_gap_12_what_does_not_fit_is_refused_and_nothing_stands_in_for_it(
    io: dict[str, Any], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        build_head("track", values, IO.model_copy(update=io))


def test_gap_13_the_mask_is_one_number_a_waypoint_and_its_shape_is_checked(planner: MakeHead) -> None:
    model = planner("light")
    batch = windows(model)
    assert batch.action_valid is not None
    with pytest.raises(DataError, match="action_valid has shape"):
        model.loss(dataclasses.replace(batch, action_valid=batch.action_valid[..., None]))
