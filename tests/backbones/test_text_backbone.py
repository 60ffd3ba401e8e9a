from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vla.featurize.backbones.registry import make_backbone
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.sources.base import Episode
from vla.featurize.sources.synthetic import SyntheticSource
from vla.heads.data import DataConfig, open_data
from vla.stores.errors import DataError, MachineError, SourceError, UsageError
from vla.stores.fingerprint import canonical
from vla.stores.store import open_store

WORDS = ["<pad>", "</s>", "push", "the", "red", "puck", "slowly"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and its tokenizer as the hub serves them."""
    root = tmp_path_factory.mktemp("language_model")
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        transformers.Qwen3Model(config).save_pretrained(root)
    return root


def told(backbone: Any, *texts: str) -> dict[str, torch.Tensor]:
    ready = torch.stack([backbone.preprocess({"instruction": text}) for text in texts])[:, None]
    made: dict[str, torch.Tensor] = backbone.encode(ready)
    return made


def test_ids_are_the_tokenizers_and_embeddings_the_models_own_rows(folder: Path) -> None:
    backbone = make_backbone("text", weights=str(folder), length=6)
    made = told(backbone, "push the puck", "red")
    table = transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight
    assert made["ids"][:, 0].int().tolist() == [[0, 0, 2, 3, 5, 1], [0, 0, 0, 0, 4, 1]]
    assert made["mask"][:, 0].int().tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert torch.equal(made["embedding"][0, 0], table[[0, 0, 2, 3, 5, 1]].float())
    spec = backbone.spec()
    assert spec.parameters == table.numel()
    assert (spec.per, spec.inputs, spec.random_weights) == ("instruction", ("instruction",), False)


def test_padding_goes_where_it_is_told(folder: Path) -> None:
    made = told(make_backbone("text", weights=str(folder), length=4, side="right", special_tokens=False), "red puck")
    assert (made["ids"][0, 0].int().tolist(), made["mask"][0, 0].int().tolist()) == ([4, 5, 0, 0], [1, 1, 0, 0])


def test_an_encoders_states_do_not_depend_on_batch_mates_or_padding(folder: Path) -> None:
    short, long = (make_backbone("text", weights=str(folder), embedding="encoder", length=n) for n in (4, 9))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[4, 5, 1]])).last_hidden_state[0]
    alone, together = told(short, "red puck"), told(long, "push the red puck slowly", "red puck")
    torch.testing.assert_close(alone["embedding"][0, 0, 1:], wanted)
    torch.testing.assert_close(together["embedding"][1, 0, 6:], wanted)
    assert not alone["embedding"][0, 0, 0].any()


def test_a_text_that_is_too_long_is_refused_not_cut(folder: Path) -> None:
    backbone = make_backbone("text", weights=str(folder), length=3)
    with pytest.raises(
        DataError, match=r"'push the red puck' has 5 tokens; expected 1 to 3. Try: --set options.length"
    ):
        backbone.preprocess({"instruction": "push the red puck"})


def test_a_template_says_what_stands_around_the_instruction(folder: Path) -> None:
    backbone = make_backbone("text", weights=str(folder), length=6, template="push {instruction} slowly")
    assert told(backbone, "red")["ids"][0, 0].int().tolist() == [0, 0, 2, 4, 6, 1]
    with pytest.raises(UsageError, match="template"):
        make_backbone("text", weights="random", template="no place for it")


@pytest.mark.parametrize("change", ["length", "side", "template", "special_tokens", "embedding"])
def test_every_option_is_in_the_identity(folder: Path, change: str) -> None:
    value = {
        "length": 7,
        "side": "right",
        "template": "do {instruction}",
        "special_tokens": False,
        "embedding": "encoder",
    }[change]
    one, other = (make_backbone("text", weights=str(folder), **options) for options in ({}, {change: value}))
    assert canonical(one.spec().identity) != canonical(other.spec().identity)


def test_random_weights_are_bytes_and_seeded() -> None:
    one, same, other = (make_backbone("text", weights="random", length=8, seed=seed) for seed in (0, 0, 1))
    assert told(one, "äb")["mask"].sum() == 3
    assert torch.equal(told(one, "abc")["embedding"], told(same, "abc")["embedding"])
    assert one.spec().identity != other.spec().identity
    assert one.spec().random_weights
    assert not make_backbone("text", weights="random", embedding="none").spec().random_weights


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"Qwen/Qwen3-0.6B.*--weights weights/text"):
        make_backbone("text")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(MachineError, match=r"no tokenizer\.json"):
        make_backbone("text", weights=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no sound tokenizer"):
        make_backbone("text", weights=str(tmp_path))


def test_a_store_has_one_row_for_each_distinct_instruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SyntheticSource, "frames", lambda *_: pytest.fail("a picture was asked for"))
    values = {"source": "synthetic:episodes=8", "backbone": "text", "weights": "random"}
    report = run(prepare(FeaturizeConfig.build(values)), tmp_path / "text")
    store = open_store(tmp_path / "text")
    assert (report.frames, store.manifest.rows, store.manifest.steps) == (3, 3, {})
    assert store.episodes.ids == store.episodes.tasks == tuple(f"reach the {c} blob" for c in ("red", "green", "blue"))
    ids, mask = store.read("ids", np.array([1])), store.read("mask", np.array([1]))
    text = b"reach the green blob"
    assert (ids.dtype, mask.dtype, int(mask.sum())) == (np.int32, np.uint8, len(text))
    wanted = make_backbone("text", weights="random").preprocess({"instruction": text.decode()})
    assert ids[0, 0].tolist() == wanted[0].tolist()


def test_sources_that_tell_the_same_share_their_texts(tmp_path: Path) -> None:
    plans = [
        prepare(FeaturizeConfig.build({"source": f"synthetic:episodes={n}", "backbone": "text", "weights": "random"}))
        for n in (3, 8)
    ]
    assert plans[0].plan.manifest.fingerprint == plans[1].plan.manifest.fingerprint


def test_an_episode_without_instruction_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    plain = SyntheticSource.index

    def mute(self: SyntheticSource) -> Any:
        return dataclasses.replace(plain(self), episodes=(Episode("a", 3, "go"), Episode("b", 3, " ")))

    monkeypatch.setattr(SyntheticSource, "index", mute)
    with pytest.raises(SourceError, match="episode 'b' of synthetic has no instruction"):
        prepare(FeaturizeConfig.build({"source": "synthetic", "backbone": "text", "weights": "random"}))


def test_a_head_does_not_take_texts_for_demonstrations(tmp_path: Path) -> None:
    values = {"source": "synthetic", "backbone": "text", "weights": "random", "options": {"embedding": "none"}}
    run(prepare(FeaturizeConfig.build(values)), tmp_path / "text")
    with pytest.raises(UsageError, match="0 stores of demonstrations and 1 of instructions"):
        open_data(DataConfig(stores=(str(tmp_path / "text"),)))
