"""Exported heads that read text: told by token ids made outside of the program, they act as the live ones do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import TrainedHead
from vla.heads.export import export_head
from vla.heads.exported_prompt import ExportedPrompt, PromptForm, describe_prompt
from vla.heads.fast import FastTokenizer
from vla.heads.model import HeadModel
from vla.heads.prompts import load_tokenizer
from vla.heads.told import Telling
from vla.stores.errors import DataError, UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
Exported = Callable[..., Any]
FULL = HeadIO(
    action_dim=2,
    state_dim=3,
    state_names=("a", "b", "c"),
    features={"siglip": FeatureIO(shape=(2, 4, 64), dims=("token", "channel"))},
    tasks=("go there", "go to the other side"),
    labels=(
        {"high_level_task": "reach it", "subtask": "go there"},
        {"high_level_task": "clear the table", "subtask": "go to the other side"},
    ),
)


def telling_of(model: HeadModel) -> Telling:
    telling = model.telling()
    assert telling is not None
    return telling


def prompt_of(model: HeadModel) -> ExportedPrompt:
    """What makes the head's prompts outside of it, from what a description on disk says."""
    said = describe_prompt(telling_of(model), model.io.state_names).model_dump(mode="json")
    return ExportedPrompt(PromptForm.build(json.loads(json.dumps(said))))


def longer(io: HeadIO) -> HeadIO:
    """The same with a second instruction that is four times as long as the first, and underscored."""
    return io.model_copy(update={"tasks": ("go there", "go_away and come back again by noon")})


def between(model: HeadModel, count: int, toy_batch: MakeBatch) -> Batch:
    """Observations without labels whose states have one, two and three digits, and of both tasks."""
    batch = toy_batch(model, count, seed=3)
    state = model.state
    assert batch.state is not None
    told = batch.state
    if state is not None:
        spread = torch.tensor([[-0.99, -0.5, 0.9], [-0.97, -0.98, -0.99], [0.5, 0.6, 2.0], [-3.0, 0.0, 0.1]])[:count]
        told = (state.centre + state.scale * spread)[:, None].expand_as(batch.state).contiguous()
    return dataclasses.replace(batch, label=None, task=torch.arange(count) % 2, state=told)


@pytest.fixture
def exported(as_trained: Callable[..., TrainedHead], tmp_path: Path) -> Exported:
    """`exported(model, head, rows)`: the program for as many rows and its description, which is in tmp_path too."""

    def make(model: HeadModel, head: str, rows: int) -> tuple[Any, dict[str, Any]]:
        described = export_head(as_trained(model, head), tmp_path / "head.pt2", batch=rows)
        return torch.export.load(tmp_path / "head.pt2").module(), described

    return make


def inputs_of(batch: Batch, described: dict[str, Any], noise: torch.Tensor, **told: torch.Tensor) -> dict[str, Any]:
    """All that a program takes: what it does not take is left out."""
    given = {f"feature_{name}": values for name, values in batch.features.items()}
    given |= {"state": batch.state, "task": batch.task, "obs_valid": batch.obs_valid, "noise": noise, **told}
    return {name: given[name] for name in described["inputs"]}


def drawn(model: HeadModel, rows: int) -> torch.Tensor:
    return torch.randn(rows, model.config.horizon, 2, generator=torch.Generator().manual_seed(7))


def live(model: HeadModel, batch: Batch) -> torch.Tensor:
    return model.act(batch, torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("name", "settings"), [("pi0-rays", {}), ("pi05-rays", {"discrete_state": False})])
def test_a_prompt_that_depends_on_the_task_alone_is_looked_up_by_the_task(
    name: str, settings: Any, awake_head: MakeHead, toy_batch: MakeBatch, exported: Exported, tmp_path: Path
) -> None:
    """As every other head it takes `task`; instructions of different lengths stand in one batch."""
    plain = awake_head(name, sample_steps=1, **settings)
    model = awake_head(name, io=longer(plain.io), sample_steps=1, **settings)
    batch = between(model, 4, toy_batch)
    program, described = exported(model, name.partition("-")[0], 4)
    assert {"task", "noise"} <= described["inputs"].keys()
    assert "prompt_ids" not in described["inputs"]
    torch.testing.assert_close(
        program(**inputs_of(batch, described, drawn(model, 4))), live(model, batch), rtol=1e-4, atol=1e-4
    )
    other = dataclasses.replace(batch, task=1 - batch.task)
    apart = program(**inputs_of(other, described, drawn(model, 4))) - live(model, batch)
    assert (apart.abs().amax(dim=(1, 2)) > 1e-4).all()
    assert [example["text"] for example in described["prompt"]["examples"]] == [
        "go there\n",
        "go away and come back again by noon\n",
    ]
    with pytest.raises(UsageError, match="holds its prompts; expected its input `task`"):
        ExportedPrompt.read(tmp_path / "head.json")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pi05-rays", {}),
        ("hier-joint", {}),
        ("hier-expert", {"variant": "full", "weights": "random", "max_tokens": 80}),
        ("hier-joint", {"variant": "full", "weights": "random", "max_tokens": 80}),
    ],
    ids=["pi05", "hier light joint", "hier full expert", "hier full joint"],
)
def test_a_prompt_that_tells_the_state_is_an_input(
    name: str, settings: Any, awake_head: MakeHead, toy_batch: MakeBatch, exported: Exported, tmp_path: Path
) -> None:
    """Prompts of different lengths in one batch, made from texts and states by what the description says."""
    io = FULL if "variant" in settings else longer(awake_head(name).io)
    model = awake_head(name, io=io, sample_steps=1, **settings)
    batch = between(model, 4, toy_batch)
    program, described = exported(model, name.partition("-")[0], 4)
    assert not {"task", "state"} & described["inputs"].keys()
    telling = telling_of(model)
    if model.plan_interval is not None:  # it speaks: here what a policy holds on to, of different lengths
        said = [torch.tensor(telling.tokenizer.encode(telling.texts[task])) for task in batch.task]
        batch = dataclasses.replace(batch, plan=pad_sequence(said, batch_first=True, padding_value=-1))
    tell = ExportedPrompt.read(tmp_path / "head.json")
    assert batch.state is not None
    told = tell(telling.of(batch), batch.state[:, -1])
    assert len(set(told["prompt_valid"].sum(dim=1).tolist())) > 1
    noise = drawn(model, 4)
    chunk = program(**inputs_of(batch, described, noise, **told))
    torch.testing.assert_close(chunk, live(model, batch), rtol=1e-4, atol=1e-4)
    swapped = {key: values.flip(0) for key, values in told.items()}
    assert not torch.allclose(program(**inputs_of(batch, described, noise, **swapped)), chunk, atol=1e-3)
    rubbish = told | {"prompt_ids": torch.where(told["prompt_valid"], told["prompt_ids"], 5)}
    torch.testing.assert_close(program(**inputs_of(batch, described, noise, **rubbish)), chunk, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pi0-rays", "pi05-rays", "hier-expert", "hier-joint"])
def test_a_prompt_that_is_given_stands_for_task_and_state(
    name: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """And gives the same to the bit: what the description says is what the live head does."""
    model = awake_head(name, io=longer(awake_head(name).io), sample_steps=2)
    telling, batch = telling_of(model), between(model, 4, toy_batch)
    assert batch.state is not None
    if telling.fixed:
        ids, valid = (rows[batch.task] for rows in telling.table())
        told = dataclasses.replace(batch, task=1 - batch.task, prompt=(ids, valid))
    else:
        made = prompt_of(model)(telling.of(batch), batch.state[:, -1])
        most = int(made["prompt_valid"].sum(dim=1).max())  # as the live head pads: to the longest of the batch
        prompt = (made["prompt_ids"][:, :most], made["prompt_valid"][:, :most])
        told = dataclasses.replace(batch, task=1 - batch.task, state=batch.state + 9, prompt=prompt)
    assert torch.equal(live(model, told.to("cpu")), live(model, batch))


def test_the_program_s_prompt_is_as_long_as_the_longest_that_the_head_can_be_told(awake_head: MakeHead) -> None:
    """Bytes as tokens: three digits for each number; in any words it is what `max_tokens` allows."""
    tell = prompt_of(awake_head("pi05-rays"))
    states = 99 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    lengths = [tell(["go there"], state[None])["prompt_valid"].sum() for state in states]
    assert max(map(int, lengths)) == tell.form.length == 1 + len("Task: go there, State: 255 255 255;\nAction: ")
    assert prompt_of(awake_head("pi05-rays", max_tokens=30)).form.length == 30
    assert prompt_of(awake_head("hier-joint", max_tokens=30)).form.length == 30


def test_numbers_may_have_any_number_of_tokens(awake_head: MakeHead, tmp_path: Path) -> None:
    """A tokenizer whose 7 is four tokens and every other number one."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "x"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" 7", " x x x x")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    plain = awake_head("pi05-rays").telling()
    assert plain is not None
    telling = dataclasses.replace(plain, tokenizer=load_tokenizer(str(tmp_path)), source=str(tmp_path))
    form = describe_prompt(telling, ())
    assert form.length == 1 + len(["Task:", "go", "there,", "State:", *11 * ["x"], "x;", "Action:"])


def test_what_a_prompt_cannot_tell_is_refused(awake_head: MakeHead) -> None:
    tell = prompt_of(awake_head("pi05-rays"))
    state = torch.zeros(1, 3)
    assert tell(["go there"], [[0.0, 0.0, 0.0]])["prompt_ids"].shape == (1, tell.form.length)
    with pytest.raises(UsageError, match=r"not trained on 'go their', did you mean 'go there'\?"):
        tell(["go their"], state)
    with pytest.raises(UsageError, match=r"no state; expected \(1, 3\)"):
        tell(["go there"])
    with pytest.raises(UsageError, match=r"a state of shape \(3,\); expected \(1, 3\)"):
        tell(["go there"], state[0])
    with pytest.raises(DataError, match="not finite"):
        tell(["go there"], state * torch.nan)
    free = prompt_of(awake_head("hier-joint", max_tokens=12))
    with pytest.raises(DataError, match="expected at most 12"):
        free(["go there and come back and go there again"], state)


def test_another_tokenizer_than_the_head_s_is_refused(awake_head: MakeHead, tmp_path: Path) -> None:
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    form = prompt_of(awake_head("pi05-rays")).form
    with pytest.raises(DataError, match="has other ids for 'Task: go there, State: 64 128 192"):
        ExportedPrompt(form, str(tmp_path))


def test_a_description_without_a_prompt_says_so(tmp_path: Path) -> None:
    (tmp_path / "mlp.json").write_text(json.dumps({"head": "mlp", "prompt": None}))
    with pytest.raises(UsageError, match="says of no prompt"):
        ExportedPrompt.read(tmp_path / "mlp.json")


def test_a_mode_of_hier_without_a_fixed_number_of_steps_is_not_exported(
    toy_head: MakeHead, toy_batch: MakeBatch, as_trained: Callable[..., TrainedHead], tmp_path: Path
) -> None:
    silent = toy_head("hier-joint", mode="high-level")
    with pytest.raises(UsageError, match="'hier' is not exported: mode 'high-level' has no action branch"):
        export_head(as_trained(silent, "hier"), tmp_path / "head.pt2")
    plain = toy_head("hier-joint")
    FastTokenizer.fit(plain.labels(toy_batch(plain)).numpy(), vocab_size=200).save(tmp_path / "fast")
    fast = toy_head("hier-joint", mode="fast", fast=str(tmp_path / "fast"))
    with pytest.raises(UsageError, match="mode 'fast' says its actions id by id"):
        export_head(as_trained(fast, "hier"), tmp_path / "head.pt2")
    assert not list(tmp_path.glob("head.*"))


def test_a_description_chooses_no_folder_and_no_hub_id_of_a_tokenizer(awake_head: MakeHead, tmp_path: Path) -> None:
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    form = prompt_of(awake_head("pi05-rays")).form.model_copy(update={"tokenizer": str(tmp_path)})
    (tmp_path / "head.json").write_text(json.dumps({"prompt": form.model_dump(mode="json")}))
    with pytest.raises(UsageError, match="tokenizer"):
        ExportedPrompt.read(tmp_path / "head.json")
    with pytest.raises(DataError, match="other ids"):
        ExportedPrompt.read(str(tmp_path / "head.json"), str(tmp_path))
