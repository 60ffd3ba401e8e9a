"""`hier`, light: what is said, what is done, and that neither loss reaches the other's networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.fast import FastTokenizer
from vla.heads.hier import HierHead
from vla.heads.model import HeadModel
from vla.heads.nets.prefix import PrefixModel
from vla.heads.nets.speech import prefix_cache, say, teach
from vla.heads.vocabulary import WordTokenizer
from vla.pretrained.pi0 import gemma_config
from vla.stores.errors import DataError, UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def train(model: HeadModel, batch: Batch, steps: int, lr: float = 3e-3) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()


def told(batch: Batch) -> Batch:
    """What a robot has: no actions, no labels."""
    return dataclasses.replace(batch, action=None, action_valid=None, label=None)


def copies(batch: Batch, count: int) -> Batch:
    """The same windows several times, each trained at another noise and another time."""
    assert batch.state is not None
    assert batch.action is not None
    assert batch.label is not None
    return Batch(
        features={name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in batch.features.items()},
        state=batch.state.repeat(count, 1, 1),
        task=batch.task.repeat(count),
        obs_valid=batch.obs_valid.repeat(count, 1),
        action=batch.action.repeat(count, 1, 1),
        label=batch.label.repeat(count),
    )


def fast_folder(model: HeadModel, batch: Batch, folder: Path) -> str:
    """Fit FAST to a batch behind the statistics of a head."""
    FastTokenizer.fit(model.labels(batch).numpy(), vocab_size=200, action_norm="quantile").save(folder)
    return str(folder)


@pytest.fixture
def tiny() -> PrefixModel:
    """A language model of 20 words, awake."""
    torch.manual_seed(0)
    return PrefixModel(gemma_config(16, 32, 2, 2, 1, 8, vocab_size=20, initializer_range=0.3)).eval()


@pytest.fixture
def row() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Two observed tokens, then [begin, prompt, prompt | answer, answer, end] of three windows."""
    torch.manual_seed(1)
    ids = torch.tensor([[2, 5, 6, 7, 8, 1], [2, 9, 5, 10, 11, 1], [2, 12, 6, 7, 13, 1]])
    answer = torch.tensor([[False, False, False, True, True, True]]).expand(3, 6)
    observed = torch.randn(3, 2, 16), torch.ones(3, 2, dtype=torch.bool)
    return observed, (ids, torch.ones(3, 6, dtype=torch.bool)), answer


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_gap_1_the_text_loss_is_a_mean_over_real_tokens_whatever_the_padding(tiny: PrefixModel, row: Any) -> None:
    observed, (ids, valid), answer = row
    wanted = teach(tiny, observed, (ids, valid), answer)
    assert wanted.counted.sum() == 9
    for more in (1, 7):
        blank = torch.zeros(3, more, dtype=torch.long)
        longer = torch.cat([ids, blank], 1), torch.cat([valid, blank.bool()], 1)
        got = teach(tiny, observed, longer, torch.cat([answer, blank.bool()], 1))
        assert got.mean().item() == pytest.approx(wanted.mean().item(), rel=1e-6)
        torch.testing.assert_close(got.error[:, :5], wanted.error)
        assert (got.error[:, 5:] == 0).all()


def test_gap_1_a_longer_prompt_beside_it_changes_no_windows_errors(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Rows of one batch are padded to its longest; "reach it" is a word shorter than "clear the table"."""
    model: Any = toy_head("hier-joint")
    batch = toy_batch(model)
    assert batch.label is not None
    together = model.outputs(batch).text
    rows = batch.label == 0
    alone = model.outputs(
        dataclasses.replace(
            batch,
            features={name: value[rows] for name, value in batch.features.items()},
            **{
                name: getattr(batch, name)[rows]
                for name in ("state", "task", "obs_valid", "action", "action_valid", "label")
            },
        )
    ).text
    assert alone.error.shape[1] < together.error.shape[1]
    torch.testing.assert_close(alone.error[alone.counted], together.error[rows][together.counted[rows]])


def test_gap_2_and_15_the_answer_stands_in_the_row_and_predicts_its_next_token(tiny: PrefixModel, row: Any) -> None:
    """Each token of the answer is scored by the hidden state before it: the first by the prompt's last."""
    observed, (ids, valid), answer = row
    found = teach(tiny, observed, (ids, valid), answer)
    for place in (3, 4, 5):  # each word in a pass of its own that holds nothing behind it
        given = ids[:, :place], valid[:, :place]
        starts = torch.cat([torch.zeros(3, 2, dtype=torch.bool), answer[:, :place]], 1)
        embeddings = torch.cat([observed[0], tiny.embed(given[0])], 1)
        hidden = tiny(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool), starts).hidden[:, -1]
        wanted = -tiny.logits(hidden).log_softmax(-1).gather(1, ids[:, place, None])[:, 0]
        torch.testing.assert_close(found.error[:, place - 1], wanted)


def test_gap_2_the_end_token_is_taught(tiny: PrefixModel, row: Any) -> None:
    observed, (ids, valid), answer = row
    other = ids.clone()
    other[:, 5] = 3
    changed = teach(tiny, observed, (other, valid), answer).error != teach(tiny, observed, (ids, valid), answer).error
    assert changed[:, 4].all()
    assert not changed[:, :4].any()


def test_gap_2_a_prompt_sees_itself_in_both_directions_and_never_its_answer(tiny: PrefixModel, row: Any) -> None:
    observed, (ids, valid), answer = row
    first = teach(tiny, observed, (ids, valid), answer).error[:, 2]  # what the prompt's last token predicts
    early, late = ids.clone(), ids.clone()
    early[:, 1], late[:, 4] = 15, 15
    assert (teach(tiny, observed, (early, valid), answer).error[:, 2] != first).all()
    assert (teach(tiny, observed, (late, valid), answer).error[:, 2] == first).all()
    cache = prefix_cache(tiny, observed, (ids[:, :3], valid[:, :3]))
    later = ids[:, :3].clone()
    later[:, 2] = 15
    changed = prefix_cache(tiny, observed, (later, valid[:, :3]))
    assert (cache.values[1][:, :, 0] != changed.values[1][:, :, 0]).any()  # the first token saw the last one


def test_gap_3_the_total_is_the_text_loss_and_alpha_times_the_masked_action_loss(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model: Any = awake_head("hier-joint", alpha=7.0)
    batch = toy_batch(model)
    valid = torch.ones(8, 4, dtype=torch.bool)
    valid[:4, 2:] = False
    out = model.outputs(dataclasses.replace(batch, action_valid=valid))
    assert out.action.shape == (8, 4, 2)
    action = out.action[valid].mean()
    text = out.text.error.sum() / out.text.counted.sum()
    assert out.total.item() == pytest.approx((text + 7 * action).item(), rel=1e-5)
    assert out.action[~valid].abs().sum() > 0  # per element, unmasked
    assert {"text_loss", "action_loss", "mask_share"} == out.metrics.keys()


def test_gap_4_the_action_loss_reaches_no_language_model_and_the_text_loss_no_actor(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    for own, other in (("action", "language"), ("text", "actor")):
        model: Any = awake_head("hier-joint")
        out = model.outputs(toy_batch(model))
        backward(out.action.mean() if own == "action" else out.text.mean())
        reached = {"language": "actor", "actor": "language"}[other]
        assert all(p.grad is None for p in getattr(model, other).parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(model, reached).parameters())


# ---- the modes -------------------------------------------------------------------------------------------------------


def test_gap_5_high_level_mode_has_no_action_branch_at_all(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("hier-joint", mode="high-level")
    out = model.outputs(toy_batch(model))
    assert out.action is None
    assert model.actor is None
    assert not [name for name, _ in model.named_parameters() if not name.startswith("language.")]
    assert out.total.item() == out.text.mean().item()
    assert out.metrics.keys() == {"text_loss"}
    assert not model.acts
    with pytest.raises(UsageError, match="makes no actions"):
        model.act(toy_batch(model))
    assert model.defaults({"mode": "high-level"})["best_metric"] == "subtask_perplexity"


def test_expert_mode_needs_no_labels_and_has_no_language_model(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    io = HeadIO(action_dim=2, state_dim=3, features={"grid": FeatureIO(shape=(2, 4, 4, 3), dims=("y", "x", "channel"))},
                tasks=("go there", "go away"))  # fmt: skip
    model: Any = toy_head("hier-expert", io=io)
    out = model.outputs(toy_batch(model))
    assert out.text is None
    assert model.language is None
    assert model.plan(toy_batch(model)) is None
    assert model.plan_interval is None
    assert out.total.item() == pytest.approx(out.action.mean().item())
    with pytest.raises(UsageError, match=r"needs labels.*--set model.mode=expert"):
        build_head("hier", {"mode": "joint"}, io)


def test_fast_mode_learns_and_says_chunks(toy_head: MakeHead, toy_batch: MakeBatch, tmp_path: Path) -> None:
    """CE of the subtask and of the action ids; what is said decodes to the demonstrated chunk, within its rounding."""
    plain = toy_head("hier-joint")
    batch = toy_batch(plain)
    model: Any = toy_head("hier-joint", mode="fast", fast=fast_folder(plain, batch, tmp_path / "fast"))
    out = model.outputs(batch)
    assert out.total.item() == pytest.approx((out.text.mean() + out.fast.mean()).item(), rel=1e-6)
    assert model.actor is None
    untrained = model.act(told(batch))  # the constraint alone makes it a chunk
    assert untrained.shape == (8, 4, 2)
    train(model, batch, 60, 1e-2)
    assert batch.action is not None
    step = model.action.scale.max() * math.sqrt(4) / 20  # half a quantisation step in each of 4 coefficients
    assert (model.act(told(batch)) - batch.action).abs().max() <= step + 1e-4


def test_gap_13_padding_is_no_action_token_and_padded_chunks_have_none(
    toy_head: MakeHead, toy_batch: MakeBatch, tmp_path: Path
) -> None:
    plain = toy_head("hier-joint")
    batch = toy_batch(plain)
    model: Any = toy_head("hier-joint", mode="fast", fast=fast_folder(plain, batch, tmp_path / "fast"))
    valid = torch.ones(8, 4, dtype=torch.bool)
    valid[2, 3] = False
    out = model.outputs(dataclasses.replace(batch, action_valid=valid)).fast
    lengths = torch.tensor([len(ids) + 1 for ids in model.fast.encode(model.labels(batch).numpy())])
    lengths[2] = 0
    assert out.counted.sum(1).tolist() == lengths.tolist()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "fast"}, "vla fit-fast"),
        ({"fast": "somewhere"}, "go together"),
        ({"state_norm": "zscore"}, "bins of the prompt are those of -1..1"),
        ({"width": 30, "heads": 4}, "an even multiple of the heads"),
        ({"alpha": 0}, "alpha"),
        ({"mode": "planar"}, "mode"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str, toy_head: MakeHead) -> None:
    with pytest.raises(UsageError, match=says):
        toy_head("hier-joint", **settings)


def test_fast_of_another_normalisation_is_refused(toy_head: MakeHead, toy_batch: MakeBatch, tmp_path: Path) -> None:
    plain = toy_head("hier-joint")
    folder = fast_folder(plain, toy_batch(plain), tmp_path / "fast")
    with pytest.raises(UsageError, match=r"--set model\.action_norm=quantile"):
        toy_head("hier-joint", mode="fast", fast=folder, action_norm="limits")


def test_the_labels_are_asked_for(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("hier-joint")
    with pytest.raises(DataError, match="no labels"):
        model.loss(dataclasses.replace(toy_batch(model), label=None))


# ---- the prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that are tokenised."""
    texts: list[str] = []
    encode = WordTokenizer.encode

    def listen(self: WordTokenizer, text: str) -> list[int]:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(WordTokenizer, "encode", listen)
    return texts


def test_gap_6_actions_are_trained_on_the_low_level_prompt(
    toy_head: MakeHead, toy_batch: MakeBatch, heard: list[str]
) -> None:
    model: Any = toy_head("hier-joint")
    batch = toy_batch(model)
    model.loss(batch)
    assert batch.label is not None
    for label, bins in zip(batch.label.tolist(), model.texts.bins(batch, model.proprio), strict=True):
        state = " ".join(map(str, bins))
        words = model.io.labels[label]
        assert f"Task: {words['high_level_task']}, State: {state};\nSubtask: " in heard
        assert f"Task: {words['subtask']}, State: {state};\nAction: " in heard


def test_gap_7_the_low_level_prompt_is_rebuilt_from_what_was_said(
    toy_head: MakeHead, toy_batch: MakeBatch, heard: list[str]
) -> None:
    model: Any = toy_head("hier-joint")
    batch = told(toy_batch(model))
    batch = dataclasses.replace(batch, task=batch.task + 2)  # the high-level tasks
    said = model.subtasks(batch)
    heard.clear()
    model.act(batch)
    assert {text.partition(", State")[0] for text in heard if "Action: " in text} == {
        f"Task: {text.strip()}" for text in said
    }


def test_gap_7_speech_with_its_cache_is_speech_without_one(tiny: PrefixModel, row: Any) -> None:
    """Rows of different lengths: positions count real tokens, and what was said is causal."""
    observed, (ids, valid), _ = row
    valid = valid.clone()
    valid[1, 3:] = False
    said = say(tiny, observed, (ids, valid), lambda scores: scores[:, 3:].argmax(1) + 3, 1, 5)
    for number, answer in enumerate(said):
        tokens = ids[number][valid[number]].tolist()
        prompt = len(tokens)
        for _ in range(5):
            row_ids = torch.tensor([tokens])
            starts = torch.tensor([[False] * (2 + prompt) + [True] * (len(tokens) - prompt)])
            embeddings = torch.cat([observed[0][number : number + 1], tiny.embed(row_ids)], 1)
            hidden = tiny(embeddings, torch.ones_like(starts), starts).hidden[0, -1]
            tokens.append(int(tiny.logits(hidden)[3:].argmax()) + 3)
        assert tokens[prompt:] == answer


def test_speech_ends_at_the_end_token_and_at_the_limit(tiny: PrefixModel, row: Any) -> None:
    observed, prompt, _ = row
    steps = iter([[4, 1, 4], [5, 5, 1], [1, 5, 5]])
    said = say(tiny, observed, prompt, lambda scores: torch.tensor(next(steps)), 1, 10)
    assert said == [[4, 5], [], [4]]
    assert [len(ids) for ids in say(tiny, observed, prompt, lambda scores: torch.full((3,), 4), 1, 6)] == [6, 6, 6]


def test_gap_9_only_real_dimensions_of_the_state_become_words(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("hier-joint")
    assert {len(bins) for bins in model.texts.bins(toy_batch(model), model.proprio)} == {3}
    chosen: Any = toy_head("hier-joint", encoder={"state_columns": ["c"]})
    assert [bins[0] for bins in chosen.texts.bins(toy_batch(chosen), chosen.proprio)] == [
        bins[2] for bins in model.texts.bins(toy_batch(model), model.proprio)
    ]


def test_gap_9_bins_are_those_of_the_normalised_present_state(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("hier-joint", n_obs=2)
    batch = toy_batch(model)
    assert batch.state is not None
    low, high = model.proprio.centre - model.proprio.scale, model.proprio.centre + model.proprio.scale
    state = batch.state.clone()
    state[:4, -1], state[4:, -1] = low - 9, high + 9
    state[:, 0] = math.nan  # the past is not told
    bins = model.texts.bins(dataclasses.replace(batch, state=state), model.proprio)
    assert bins == [[0, 0, 0]] * 4 + [[255, 255, 255]] * 4


def test_gap_11_prompts_hold_a_real_line_end(toy_head: MakeHead, toy_batch: MakeBatch, heard: list[str]) -> None:
    model = toy_head("hier-joint")
    model.loss(toy_batch(model))
    prompts = [text for text in heard if text.startswith("Task: ")]
    assert prompts
    assert all(text.count("\n") == 1 and "\\n" not in text for text in prompts)


def test_words_put_together_are_the_text() -> None:
    texts = ["pick up the red cup, slowly", "put_it (there)!"]
    words = WordTokenizer(texts)
    for text in (*texts, "Task: pick up the red cup, State: 0 17 255;\nAction: "):
        assert words.decode(words.encode(text)).replace("_", " ") == text.replace("_", " ") or "_" in text
        assert words.unknown not in words.encode(text) or "_" in text
    assert words.encode("Task: wash") == [*words.encode("Task:"), words.unknown]


# ---- acting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["joint", "expert"])
def test_hier_learns_eight_windows_by_heart_and_says_their_subtasks(
    mode: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """Exactly what was demonstrated is said; the sampled actions come 5 times nearer than the mean action."""
    model: Any = toy_head("hier-joint", mode=mode, layers=2)
    batch = toy_batch(model)
    assert batch.action is not None
    assert batch.label is not None
    train(model, copies(batch, 4), 200, 5e-3)
    high = told(batch) if mode == "expert" else dataclasses.replace(told(batch), task=batch.task + 2)
    sampled = model.act(high, torch.Generator().manual_seed(0), whole=True)
    error = (sampled - batch.action).abs().mean()
    assert error < (batch.action.mean(dim=0) - batch.action).abs().mean() / 5
    if mode == "joint":
        wanted = [model.io.labels[label]["subtask"] for label in batch.label.tolist()]
        assert model.subtasks(high) == wanted
        figures = model.summarise(model.measure(batch, sampled))
        assert figures["subtask_token_accuracy"] == 1
        assert figures["subtask_exact_match"] == 1
        assert 1 <= figures["subtask_perplexity"] < 1.2


def test_the_high_level_task_is_an_instruction_too(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("hier-joint")
    assert model.instructions == ("go there", "go away", "reach it", "clear the table")
    batch = toy_batch(model)
    told_low = model.texts.told(told(batch), "high_level_task")
    assert model.texts.told(dataclasses.replace(told(batch), task=batch.task + 2), "high_level_task") == told_low


def test_a_subtask_that_is_told_is_carried_out(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """It was replaced by its high-level task, of which the head then said a subtask of its own."""
    model: Any = awake_head("hier-joint")
    batch = told(toy_batch(model))
    wanted = [model.instructions[number] for number in batch.task.tolist()]
    assert model.subtasks(batch) == wanted
    mixed = dataclasses.replace(batch, task=batch.task + 2 * (torch.arange(8) % 2))
    said = model.subtasks(dataclasses.replace(batch, task=batch.task + 2))
    assert model.subtasks(mixed) == [said[row] if row % 2 else wanted[row] for row in range(8)]
    assert model.subtasks(toy_batch(model)) == said  # of demonstrations it is measured what the head says


def test_a_plan_that_is_held_decides_the_actions(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Acting under a plan says nothing anew, and acting under another plan acts otherwise."""
    model: Any = awake_head("hier-joint")
    batch = told(toy_batch(model))
    plans = [torch.tensor([model.tokenizer.encode(text)] * 8) for text in ("go there", "go away")]
    chunks = [model.act(dataclasses.replace(batch, plan=plan), torch.Generator().manual_seed(0)) for plan in plans]
    assert ((chunks[0] - chunks[1]).abs().amax((1, 2)) > 1e-3).all()
    held = dataclasses.replace(batch, plan=model.plan(batch))
    model.language = None  # nothing is left that could speak
    torch.testing.assert_close(
        model.act(held, torch.Generator().manual_seed(0)),
        model.act(dataclasses.replace(held, plan=held.plan.clone()), torch.Generator().manual_seed(0)),
    )


def test_hier_samples_by_euler_in_ten_steps(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """A net whose velocity is t gives x(0) = noise - sum of t dt over t = 1, 0.9, …, 0.1."""
    model: Any = toy_head("hier-expert")
    batch = told(toy_batch(model))
    calls: list[float] = []

    def velocity(_: object, given: tuple[Tensor, ...], __: object) -> Tensor:
        calls.append(given[1][0].item())
        return given[1][:, None, None].expand_as(given[0])

    model.net.register_forward_hook(velocity)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))
    wanted = model.action.inverse(noise - sum(1 - k / 10 for k in range(10)) / 10)
    torch.testing.assert_close(model.act(batch, generator), wanted)
    assert calls == pytest.approx([1 - k / 10 for k in range(10)])


def test_perplexity_is_the_exponential_of_the_mean_nats_of_all_batches(toy_head: MakeHead) -> None:
    model: Any = toy_head("hier-joint")
    nats = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert model.summarise({"subtask_perplexity": nats})["subtask_perplexity"] == pytest.approx(math.e**2)


def test_gap_14_the_warm_up_is_used_and_the_full_variant_trains_as_pi05(toy_head: MakeHead) -> None:
    assert HierHead.defaults({})["warmup_steps"] == 100
    full = HierHead.defaults({"variant": "full"})
    assert (full["lr"], full["betas"], full["warmup_steps"]) == (2.5e-5, (0.9, 0.95), 1000)


@pytest.mark.parametrize("part", ["action", "proprio", "actor.frames.encoder.readers.grid.scaler"])
def test_hier_with_one_statistic_missing_neither_trains_nor_acts(
    part: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head("hier-joint")
    empty = toy_head("hier-joint", fitted=False).get_submodule(part).state_dict()
    model.get_submodule(part).load_state_dict(empty)
    for run in (model.act, model.loss):
        with pytest.raises(DataError, match="missing"):
            run(toy_batch(model))


@pytest.mark.long
def test_hier_beats_the_mean_action_five_times_on_windows_it_never_saw(
    toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """And says their subtasks, each of which follows from the instruction alone."""
    model: Any = toy_head("hier-joint", encoder={"queries": 8}, width=64, layers=1)
    data, held_out = toy_batch(model, 2048, 1), toy_batch(model, 256, 2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        rows = torch.randperm(2048)[:32]
        parts: dict[str, Any] = {
            name: getattr(data, name)[rows] for name in ("state", "task", "obs_valid", "action", "label")
        }
        loss, _ = model.loss(Batch(features={name: v[rows] for name, v in data.features.items()}, **parts))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        schedule.step()
    assert data.action is not None
    assert held_out.action is not None
    sampled = model.act(told(held_out), torch.Generator().manual_seed(0), whole=True)
    mean = data.action.mean(dim=(0, 1))
    times = (held_out.action - mean).abs().mean() / (held_out.action - sampled).abs().mean()
    figures = model.summarise(model.measure(held_out, sampled))
    assert figures["subtask_exact_match"] == 1
    assert times > 5
