"""A configuration from anywhere costs seconds at most, and reads one folder: size, depth, numbers, kinds of file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vla.featurize.sources.registry import open_source
from vla.pretrained.hub import read_json, weight_files
from vla.stores.config_files import MAX_CHAIN, read_config
from vla.stores.documents import MAX_DEPTH
from vla.stores.errors import CheckpointError, DataError, UsageError
from vla.stores.settings import set_dotted
from vla.training.checkpoint import read_object

pytestmark = pytest.mark.timeout(60)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("laughs.yaml", LAUGHS),
        ("merges.yaml", MERGES),
        ("ring.yaml", "a: &a [*a]\n"),
        ("ring.yaml", "a: &a {b: *a}\n"),
        ("deep.yaml", "a: " + "[" * 900 + "]" * 900),
        ("deep.json", '{"a": ' + "[" * 900 + "]" * 900 + "}"),
        ("deep.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        ("deep.json", '{"a": ' * 100 + "1" + "}" * 100),
        ("deep.toml", "a = " + "[" * 900 + "]" * 900),
        ("dots.toml", "a." * 900 + "a = 1"),
        ("dots.toml", "a." * 60_000 + "a = 1"),
        ("dots.toml", "[" + "a." * 60_000 + "a]"),
        ("digits.toml", "a = " + "1" * 5000),
        ("digits.json", '{"a": ' + "1" * 5000 + "}"),
        ("digits.yaml", "a: " + "1" * 5000),
        ("number.json", '{"a": 99999999999999999999}'),
        ("number.yaml", "a: [0x" + "f" * 40 + "]"),
        ("large.toml", "# " + "x" * (1 << 20)),
        ("large.yaml", "# " + "x" * (1 << 20)),
        ("large.json", '{"a": "' + "x" * (17 << 20) + '"}'),
        ("nul.toml", 'extends = "a\\u0000b"'),
        ("nul.json", '{"extends": "a\\u0000b"}'),
    ],
    ids=lambda value: value if len(value) < 20 else "",
)
def test_a_document_beyond_the_limits_is_refused_by_name(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        read_config(tmp_path / name)


def test_anchors_within_the_limits_stay(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {lr: 0.1}\ntrain: {<<: *base, steps: 2}\nagain: *base\n")
    assert read_config(tmp_path / "a.yaml")["train"] == {"lr": 0.1, "steps": 2}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("extended", [False, True])
def test_only_regular_files_are_configurations(kind: str, extended: bool, tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    if extended:
        (tmp_path / "top.toml").write_text('extends = "odd.toml"')
    with pytest.raises(UsageError):
        read_config(tmp_path / ("top.toml" if extended else "odd.toml"))


@pytest.mark.parametrize(
    "name", ["../outside.toml", "{root}/outside.toml", "link.toml", "linked/outside.toml", "/dev/zero"]
)
def test_a_configuration_extends_nothing_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.toml").write_text("steps = 1\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.toml").symlink_to(tmp_path / "outside.toml")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "a.json").write_text(json.dumps({"extends": name.format(root=tmp_path)}))
    with pytest.raises(UsageError, match="extends"):
        read_config(folder / "a.json")


def test_a_file_below_extends_one_beside_the_file_that_the_user_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "top.toml").write_text('extends = "sub/mid.toml"')
    (tmp_path / "sub" / "mid.toml").write_text('extends = "../base.toml"\nb = 2\n')
    (tmp_path / "base.toml").write_text("a = 1\n")
    assert read_config(str(tmp_path / "top.toml")) == {"a": 1, "b": 2}


def test_a_chain_of_many_files_is_refused(tmp_path: Path) -> None:
    for number in range(MAX_CHAIN + 1):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"')
    (tmp_path / f"{MAX_CHAIN + 1}.toml").write_text("a = 1")
    with pytest.raises(UsageError, match="extends"):
        read_config(tmp_path / "0.toml")


@pytest.mark.parametrize(
    "text",
    [
        "a=" + "1" * 5000,
        "a=[" + "1" * 5000 + "]",
        "a=" + "[" * 900 + "]" * 900,
        "a=" + "[" * 100_000 + "]" * 100_000,
        "a=99999999999999999999",
        "a." * 900 + "a=1",
        "a=" + "x" * (1 << 20),
    ],
    ids=lambda text: text[:6],
)
def test_a_setting_beyond_the_limits_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        set_dotted({}, text)


def test_the_largest_seed_and_a_long_text_stay_settings() -> None:
    values: dict[str, object] = {}
    set_dotted(values, f"seed={2**64 - 1}")
    set_dotted(values, "text=" + "9" * 30 + "x")
    assert values == {"seed": 2**64 - 1, "text": "9" * 30 + "x"}


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"a": ' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)])
def test_the_json_of_artefacts_has_a_depth_too(text: str, tmp_path: Path) -> None:
    (tmp_path / "artefact.json").write_text('{"config": ' + text + "}")
    with pytest.raises(CheckpointError, match=r"artefact\.json"):
        read_object(tmp_path / "artefact.json")
    with pytest.raises(DataError, match=r"artefact\.json"):
        read_json(tmp_path / "artefact.json")


def test_the_json_of_a_checkpoint_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "best.json")
    with pytest.raises(CheckpointError, match=r"best\.json"):
        read_object(tmp_path / "best.json")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", "", ".", "a/b", 3, None])
def test_an_index_of_weights_names_files_of_its_own_folder(file: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(DataError, match=r"index\.json"):
        weight_files(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"length": [1, 1_000_000_000]},
        {"length": [1_000_000_000, 1_000_000_000], "episodes": 1},
        {"length": [1, 10**18]},
        {"episodes": 1_000_000, "length": [1, 1_000_000]},
        {"action_dim": 10**9},
    ],
)
def test_a_made_up_source_of_no_sane_size_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        open_source("synthetic", **options).index()


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 900 + "]" * 900])
def test_an_option_in_the_name_of_a_source_has_the_same_limits(value: str) -> None:
    with pytest.raises(UsageError):
        open_source(f"synthetic:seed={value}")
