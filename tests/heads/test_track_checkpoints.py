"""OpenTrackVLA's checkpoints in their real layouts: every tensor in its place, what they say of tanh, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from vla.heads.batch import Batch, FeatureIO, HeadIO, TextIO
from vla.heads.checkpoint import build_head
from vla.heads.opentrackvla import read_published
from vla.heads.texts import TextRows
from vla.pretrained.language import LanguageSizes, language_sizes, load_language
from vla.stores.errors import DataError, MachineError, UsageError

WIDTH, CHANNELS = 32, 1536
SIZES = LanguageSizes(hidden=WIDTH, intermediate=48, layers=3, heads=4, kv_heads=2, head_dim=8, vocab=50)
IO = HeadIO(
    action_dim=3,
    chunk=8,
    features={
        name: FeatureIO(shape=(1, count, CHANNELS), dims=("token", "channel"))
        for name, count in (("coarse", 4), ("fine", 64))
    },
    tasks=("follow",),
    text=TextIO(length=4),
)
Tensors = dict[str, torch.Tensor]


def qwen3(sizes: LanguageSizes = SIZES) -> Any:
    config = transformers.Qwen3Config(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
    )
    torch.manual_seed(1)
    return transformers.Qwen3Model(config).eval()


def state() -> Tensors:
    """A model_state as train.py saves it: names and shapes of its OpenTrackVLA, with D = 32 for 1024."""
    D, H = WIDTH, 8
    shapes = {
        "act_token": (1, 1, D),
        "alpha_task": (1, 1, 3),
        "proj.net.0.weight": (CHANNELS,),
        "proj.net.0.bias": (CHANNELS,),
        "proj.net.1.weight": (D, CHANNELS),
        "proj.net.1.bias": (D,),
        "proj.net.3.weight": (D, D),
        "proj.net.3.bias": (D,),
        "tvi.time_emb.weight": (4096, D),
        "tvi.view_emb.weight": (1, D),
        "tvi.kind_emb.weight": (2, D),
        "tvi.angle_proj.weight": (D, 2),
        "tvi.angle_proj.bias": (D,),
        "planner.mlp.0.weight": (D,),
        "planner.mlp.0.bias": (D,),
        "planner.mlp.1.weight": (2 * D, D),
        "planner.mlp.1.bias": (2 * D,),
        "planner.mlp.3.weight": (2 * D, 2 * D),
        "planner.mlp.3.bias": (2 * D,),
        "planner.mlp.5.weight": (3 * H, 2 * D),
        "planner.mlp.5.bias": (3 * H,),
    }
    generator = torch.Generator().manual_seed(2)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["alpha_task"] = torch.tensor([2.5, 2.5, 1.0]).view(1, 1, 3)
    return tensors | {f"llm.{name}": value for name, value in qwen3().state_dict().items()}


def write_pt(folder: Path, tensors: Tensors, **config: Any) -> Path:
    path = folder / "model_epoch00_step000100.pt"
    settings = {"llm_name": "Qwen/Qwen3-0.6B", "n_waypoints": 8, "val_json": None, **config}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    extra = {"optim_state": optimizer.state_dict(), "scaler_state": None, "epoch": 0, "step": 100}
    torch.save({"model_state": tensors, "config": settings, **extra}, path)
    return path


def write_folder(folder: Path, tensors: Tensors, form: str, **config: Any) -> Path:
    named = {f"model.{name}": value.clone() for name, value in tensors.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "navfom", "n_waypoints": 8, **config}))
    if form == "safetensors":
        save_file(named, folder / "model.safetensors")
    else:
        torch.save(named, folder / "pytorch_model.bin")
    return folder


def head_of(path: Path | str, **settings: Any) -> Any:
    head: Any = build_head("track", {"variant": "llm", "planner": str(path), **settings}, IO)
    head.fit_texts(
        TextRows(torch.tensor([[0, 0, 3, 4]]), torch.tensor([[False, False, True, True]]), torch.zeros(1, 4, 0))
    )
    head.take(read_published(str(path)))
    return head.eval()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    features = {
        "coarse": torch.randn(2, 32, 1, 4, CHANNELS, generator=generator),
        "fine": torch.randn(2, 1, 1, 64, CHANNELS, generator=generator),
    }
    return Batch(features, None, torch.zeros(2, dtype=torch.long), torch.ones(2, 32, dtype=torch.bool))


def test_every_tensor_of_a_checkpoint_lands_where_it_belongs(tmp_path: Path) -> None:
    tensors = state()
    head = head_of(write_pt(tmp_path, tensors, no_tanh_actions=True))
    ours = head.state_dict()
    parts = {
        name: v for name, v in tensors.items() if name.startswith(("proj.", "tvi.", "planner.")) and "angle" not in name
    }
    assert all(torch.equal(ours[name], value) for name, value in parts.items())
    assert torch.equal(ours["act_token.weight"], tensors["act_token"][0])
    assert head.action.scale.tolist() == [2.5, 2.5, 1.0]
    network = head.frozen["llm"].module
    assert all(torch.equal(value, tensors[f"llm.{name}"]) for name, value in network.state_dict().items())
    embeds, mask = torch.randn(2, 5, WIDTH), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        wanted = qwen3()(inputs_embeds=embeds).last_hidden_state
        torch.testing.assert_close(head.language(embeds, mask), wanted)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_all_layouts_of_a_planner_give_the_same_plan(form: str, tmp_path: Path) -> None:
    """The file of train.py, of several processes, and the folders that convert_ckpt_to_hf.py makes."""
    tensors = state()
    plan = head_of(write_pt(tmp_path, tensors, no_tanh_actions=True)).act(batch())
    folder = write_folder(tmp_path, tensors, form, use_tanh_actions=False)
    assert torch.equal(head_of(folder).act(batch()), plan)
    (tmp_path / "parallel").mkdir()
    parallel = {f"module.{name}": value for name, value in tensors.items()}
    assert torch.equal(head_of(write_pt(tmp_path / "parallel", parallel, no_tanh_actions=True)).act(batch()), plan)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_planner_goes_on_from_its_own_language_model_however_it_is_tuned(tuning: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path, state(), no_tanh_actions=True)
    head = head_of(path, llm=tuning)
    head.language.start()
    torch.testing.assert_close(head.act(batch()), head_of(path).act(batch()))


@pytest.mark.parametrize(
    ("said", "trained"),
    [
        ({"no_tanh_actions": True}, "off"),
        ({"no_tanh_actions": False}, "all"),
        ({"use_tanh_actions": True}, "all"),
        ({"use_tanh_actions": False}, "off"),
    ],
)
def test_gap_6_tanh_is_what_the_checkpoint_says_or_the_head_is_refused(
    said: dict[str, bool], trained: str, tmp_path: Path
) -> None:
    path = write_pt(tmp_path, state(), **said)
    head_of(path, tanh=trained)
    for other in {"off", "all", "xy"} - {trained}:
        with pytest.raises(UsageError, match=rf"trained with tanh.*--set model\.tanh={trained}"):
            head_of(path, tanh=other)


def test_gap_6_a_checkpoint_that_does_not_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not say whether plans go through tanh"):
        head_of(write_pt(tmp_path, state()))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("planner.mlp.5.bias"), "lacks planner.5.bias|lacks planner.mlp.5.bias"),
        (without("act_token"), "lacks act_token"),
        (without("alpha_task"), "lacks alpha_task"),
        (without("llm.layers.1.mlp.up_proj.weight"), "lacks layers.1.mlp.up_proj.weight"),
        (without("llm.layers.0.self_attn.q_norm.weight"), "no Qwen3"),
        (lambda t: t | {"critic.weight": torch.zeros(1)}, "unexpected critic.weight"),
        (lambda t: t | {"planner.mlp.7.bias": torch.zeros(1)}, "unexpected planner.mlp.7.bias"),
        (
            lambda t: t | {"planner.mlp.5.bias": torch.zeros(9)},
            r"planner.mlp.5.bias is \(9,\), the network's is \(24,\)",
        ),
        (lambda t: t | {"alpha_task": torch.tensor([0.0, 1.0, 1.0])}, "alpha_task is"),
        (lambda t: {name: value for name, value in t.items() if not name.startswith("llm.")}, "no Qwen3"),
    ],
)
def test_gap_5_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change: Callable[[Tensors], Tensors], says: str, tmp_path: Path
) -> None:
    path = write_pt(tmp_path, change(state()), no_tanh_actions=True)
    with pytest.raises(DataError, match=says):
        head_of(path).act(batch())


def test_boxes_are_no_input_and_angles_are_only_with_the_option(tmp_path: Path) -> None:
    """Some versions save a projection of boxes that nothing reads."""
    boxes = {"tvi.bbox_proj.weight": torch.ones(WIDTH, 4), "tvi.bbox_proj.bias": torch.ones(WIDTH)}
    path = write_pt(tmp_path, state() | boxes, no_tanh_actions=True)
    plain = head_of(path)
    assert not any("angle" in name or "bbox" in name for name in plain.state_dict())
    yaw = IO.model_copy(update={"state_dim": 1, "state_names": ("yaw",)})
    head: Any = build_head("track", {"variant": "llm", "planner": str(path), "angle": "yaw"}, yaw)
    head.take(read_published(str(path)))
    assert torch.equal(head.tvi.angle_proj.weight, state()["tvi.angle_proj.weight"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no checkpoint", [1, 2], {"model_state": [1]}, {"config": {}}])
def test_a_damaged_checkpoint_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "model_epoch00_step000100.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(DataError, match=r"model_epoch00_step000100\.pt"):
        read_published(str(path))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model_epoch00_step000100.pt"
    torch.save({"model_state": {}, "config": {}, "hook": Path.cwd}, path)
    with pytest.raises(DataError, match="not a checkpoint"):
        read_published(str(path))


def test_a_planner_that_is_nowhere_is_told_how_to_get(tmp_path: Path) -> None:
    for place in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(MachineError, match="no planner"):
            read_published(str(place))


# The language model by itself.


def write_qwen3(folder: Path, **changes: Any) -> Path:
    qwen3().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_a_folder_gives_sizes_and_weights(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path)
    assert language_sizes(str(folder)) == SIZES
    wanted = qwen3().state_dict()
    got = load_language(str(folder)).state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "a 'llama' model; expected qwen3"),
        ({"attention_bias": True}, "no biases"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        language_sizes(str(write_qwen3(tmp_path, **change)))


def test_random_weights_are_the_same_in_every_process_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two = (load_language("random").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ids_of_another_models_text_store_are_refused(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path)
    io = IO.model_copy(update={"text": TextIO(length=4, width=WIDTH)})
    head: Any = build_head("track", {"variant": "llm", "llm_weights": str(folder)}, io)
    ids, mask = torch.tensor([[0, 0, 3, 4]]), torch.tensor([[False, False, True, True]])
    own = qwen3().embed_tokens(ids).detach().half().float()
    head._require_its_own_tokens(TextRows(ids, mask, own))
    other = torch.from_numpy(np.random.default_rng(0).normal(size=own.shape).astype(np.float32)) * own.std()
    with pytest.raises(DataError, match="the embeddings of the text store are not those of"):
        head._require_its_own_tokens(TextRows(ids, mask, other))
