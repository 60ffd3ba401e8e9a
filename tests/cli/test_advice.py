"""What pages, help and errors advise can be typed: commands, flags, settings and their values exist.

Nothing runs here: each command is parsed, and each `--set` is looked up in the configuration of its command.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import typer
from pydantic import TypeAdapter, ValidationError

from vla.cli import app
from vla.featurize.action_dims import DimsConfig
from vla.featurize.backbones.registry import BACKBONES, load_backbone_class
from vla.featurize.caches.job import ImportConfig
from vla.featurize.caches.registry import CACHES
from vla.featurize.check_source import CheckConfig
from vla.featurize.distill.student import StudentConfig
from vla.featurize.distill.train import DistillConfig
from vla.featurize.job import FeaturizeConfig
from vla.featurize.options import keywords
from vla.featurize.sources.registry import SOURCES
from vla.heads.checkpoint import HeadSettings
from vla.heads.evaluate import EvaluateSettings
from vla.heads.fit_fast import FitFastConfig
from vla.heads.registry import HEADS, head_class
from vla.rollout.online import OnlineTrainConfig
from vla.rollout.policy import RolloutSettings
from vla.stores.settings import Settings

ROOT = Path(__file__).parents[2]
ROOMS = ("stores", "training", "pretrained", "featurize", "heads", "rollout", "terminal")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [ROOT / "cli.py", *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))]

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TRAINED: dict[str, type[Settings]] = {
    "evaluate": EvaluateSettings,
    "export": HeadSettings,
    "rollout": RolloutSettings,
}
"""Commands of a trained head; the settings of `model` are those of the head's training."""
CONFIGS: dict[str, type[Settings]] = {
    "featurize": FeaturizeConfig,
    "import": ImportConfig,
    "inspect": CheckConfig,
    "train-head": OnlineTrainConfig,
    "fit-fast": FitFastConfig,
    "distill": DistillConfig,
    "action-dims": DimsConfig,
}
OTHER_PROGRAMS = re.compile(r"\b(pip|apt-get|git|hf|accelerate|dask worker|sbatch|coverage|SLURM)\b")
"""Programs whose flags are not ours."""
OTHER_FLAGS = {"--no-deps", "--multi_gpu", "--cpu", "--num_processes", "--only_success"}
"""Flags of pip, accelerate and OpenTrackVLA's scripts, where a text names them alone."""
PLACEHOLDER = re.compile(r"…|\.\.\.|^[A-Z_]{1,}$|^[a-z|]+\|[a-z|]+$|\{\}|\$")
"""A value that a reader replaces: VALUE, …, h5|zarr, and what the code fills in."""
BARE_SETTING = re.compile(r"(?<!--set )(?<!--set ')(?<![\w.:\[\"'{])[a-z_]+[a-z]=")
A_SETTING = re.compile(r"(?:data|train|model|store|options|source_options|online|augment|loss)\.[a-z_.]*[a-z_]=\S*")


@cache
def option_owners(field: str) -> dict[str, Any]:
    """{name: class} of what takes the free options of a field such as `options`."""
    if field == "model":
        return {**{name: head_class(name).Config for name in HEADS}, "rgb2pc": StudentConfig}
    if field == "options":
        targets = {name: load_backbone_class(name).settings_type for name in BACKBONES}
        return {**targets, **{name: _load(target) for name, target in CACHES.items()}}
    return {name: _load(entry.target) for name, entry in SOURCES.items()}


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def field_types(config: Any, key: list[str], named: str = "") -> list[Any]:
    """Return the type of a setting, in each class that has the setting; `named` is the backbone, head or cache."""
    if not (isinstance(config, type) and issubclass(config, Settings)):  # the keywords of a source or a cache
        return [Any] if key[0] in keywords(config) else []
    field = config.model_fields.get(key[0])
    if field is None:
        return []
    if len(key) == 1:
        return [Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation]
    kinds = [field.annotation]
    if get_origin(field.annotation) in (Union, UnionType):
        kinds = list(get_args(field.annotation))
    inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
    if inner:
        return [found for kind in inner for found in field_types(kind, key[1:])]
    if any(get_origin(kind) is dict for kind in kinds):
        if key[0] not in ("options", "source_options", "model"):
            return [Any]
        owners = option_owners(key[0])
        chosen = [owners[named]] if named in owners else list(owners.values())
        return [found for owner in chosen for found in field_types(owner, key[1:])]
    return []


def wrong_setting(text: str, command: str = "", named: str = "") -> str:
    """Return what is wrong with KEY=VALUE of a command (of any, where none is named), or an empty string."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if "KEY" in parts or "NAME" in parts or PLACEHOLDER.search(key) or key == "a.b":
        return ""  # of the form alone
    if not equals:
        return f"--set {text} has no ="
    known = CONFIGS | TRAINED
    configs = [known[command]] if command in known else list(known.values())
    if command in TRAINED and parts[0] == "model":
        configs = [OnlineTrainConfig]
    kinds = [kind for config in configs for kind in field_types(config, parts, named)]
    if not kinds:
        return f"no setting {key} of {command or 'any command'} {named}".rstrip()
    if not value or PLACEHOLDER.search(value):
        return ""
    return "" if any(_takes(kind, value) for kind in kinds) else f"{key} does not take {value}"


def _takes(kind: Any, text: str) -> bool:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for given in (value, [value]):  # a bare value of a list is its one element
        try:
            TypeAdapter(kind).validate_python(given)
        except ValidationError:
            continue
        return True
    return False


def wrong_command(text: str) -> list[str]:
    """Return what is wrong with a command line that begins with `vla`; required parts may be left out."""
    try:
        words = shlex.split(text, comments=True)[1:]
    except ValueError as error:
        return [f"{text}: {error}"]
    if not words or words[0].startswith("-"):
        return []
    if words[0] not in COMMANDS:
        return [f"{text}: no command {words[0]}"]
    command = COMMANDS[words[0]]
    context = typer.Context(command, info_name=words[0])
    usage: Any = typer.BadParameter.__base__
    values, rest = {}, []
    takes = {name for option in command.params for name in option.opts if name.startswith("-") and not option.is_flag}
    # An ellipsis is a value behind a flag that takes one, and what may be added elsewhere.
    words = [word for before, word in pairwise(["", *words]) if word not in ("…", "...") or before in takes]
    if words[-1] in takes:  # a flag in the middle of a sentence has no value
        words.append("…")
    try:
        values, rest, _ = command.make_parser(context).parse_args(words[1:])
    except usage as error:
        return [f"{text}: {error.format_message()}"]
    wrong = [f"{text}: one argument too many, {rest}"] if rest else []
    if values.get("resume") and values.get("overwrite"):
        wrong.append(f"{text}: --resume and --overwrite")
    named = values.get("backbone") or values.get("head") or values.get("kind") or values.get("student") or ""
    for name, known in (("backbone", BACKBONES), ("head", HEADS), ("kind", CACHES)):
        given = values.get(name)
        if given and given not in known and not PLACEHOLDER.search(given):
            wrong.append(f"{text}: no {name} {given}")
    if words[0] == "featurize":
        short = {"store.dtype": values.get("dtype"), "store.format": values.get("format_")}
        wrong += [wrong_setting(f"{key}={value}", words[0]) for key, value in short.items() if value]
    wrong += [wrong_setting(each, words[0], named) for each in values.get("set_") or () if each != "…"]
    return [each if each.startswith(text) else f"{text}: {each}" for each in wrong if each]


def advised(page: str) -> Iterator[str]:
    """Yield the lines of code blocks and the pieces of inline code of a page; a continued line is one."""
    for block, inline in re.findall(r"```[^\n]*\n(.*?)```|`([^`]+)`", page, re.S):
        if inline:
            yield " ".join(inline.split())
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_setting_of_a_page_can_be_typed(page: Path) -> None:
    wrong = []
    for text in advised(page.read_text(encoding="utf-8")):
        bare = text.split("#")[0].strip()
        found = re.search(r"(?:^|(?<=['\" )]))vla [a-z][^'`|>]*(?:'[^']*'[^'`|>]*)*", bare)
        if found:
            wrong += wrong_command(found[0])
        elif not OTHER_PROGRAMS.search(bare) and not bare.startswith(("make ", "python ")):
            wrong += unknown_flags(bare)
            settings = re.findall(r"--set '?(\S+?)'?(?=\s|$)", bare) or A_SETTING.findall(bare)
            wrong += [found for each in settings for found in [wrong_setting(each)] if found and "=" in each]
    assert not wrong, "\n".join(wrong)


@cache
def all_flags() -> set[str]:
    """Return every long flag of every command, and of the scripts that the pages name."""
    ours = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    scripts = (*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests/parity").glob("*.py"), ROOT / "docs/tables.py")
    texts = "".join(script.read_text(encoding="utf-8") for script in scripts)
    quoted = re.findall(r"[\"'](--[a-z][\w-]+)[\"']", texts)
    named = re.findall(r"(\w+)=", " ".join(re.findall(r"arguments\(__doc__([^)]*)\)", texts)))
    return {*ours, *quoted, *(f"--{name}" for name in named), *OTHER_FLAGS, "--help", "--version"}


def unknown_flags(text: str) -> list[str]:
    """Return what is wrong with the long flags that a text names."""
    flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    return [f"{text}: no flag {flag}" for flag in flags if flag not in all_flags()]


def strings(module: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and the text of each string of a module, and whether an error gives the text as its `fix`.

    What the code fills in is {}.
    """
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    fixes = {
        id(inner)
        for node in nodes
        if (isinstance(node, ast.keyword) and node.arg == "fix")
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "fix")
        for inner in ast.walk(node)
    }
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            pieces = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(pieces), id(node) in fixes
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value, id(node) in fixes


def wrong_advice(text: str, *, is_fix: bool) -> list[str]:
    """Return what is wrong with the commands, flags and settings that a string of the code names."""
    flat = " ".join(text.split())
    commands = re.findall(r"(?<!of )\bvla ([a-z][a-z-]+)\b(?! 1 )", flat)
    wrong = [f"no command {name}" for name in commands if name not in COMMANDS]
    wrong += [] if OTHER_PROGRAMS.search(flat) else unknown_flags(flat)
    wrong += [wrong_setting(setting.rstrip(",;.)")) for setting in re.findall(r"--set '?([^\s'`]+)", flat)]
    for command in re.findall(r"`(vla [a-z][^`]*)`", flat):
        wrong += wrong_command(command.replace("{}", "X"))
    # What a user types is `--set options.size=112`; "size=112" is found in no help.
    if is_fix and re.search(BARE_SETTING, re.sub(r"--map.*", "", flat)):
        wrong.append("a setting without --set")
    return [each for each in wrong if each]


@pytest.mark.parametrize("room", ["cli.py", *ROOMS])
def test_every_command_flag_and_setting_that_the_code_names_exists(room: str) -> None:
    wrong = []
    for module in MODULES:
        if module.relative_to(ROOT).parts[0] == room:
            for line, text, is_fix in strings(module):
                found = wrong_advice(text, is_fix=is_fix)
                wrong += [f"{module.relative_to(ROOT)}:{line}: {text[:100]!r}: {each}" for each in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "vla featurise --backbone toy",
        "vla featurize --backbone toyy",
        "vla featurize --backend toy",
        "vla featurize --backbone toy --dtype fp16",
        "vla featurize --backbone da3 --set options.model=DA3-HUGE",
        "vla featurize --backbone da3 --set options.tower=a",
        "vla featurize --backbone toy --set source_options.camra=front",
        "vla train-head mlp --store a --set train.learning_rate=1",
        "vla train-head mlp --store a --set model.encoder.noise=loud",
        "vla train-head mlp fm --store a",
        "vla evaluate runs/a --set train.lr=1",
        "vla verify --repair store other",
        "vla featurize --format hdf5",
        "vla train-head --resume --overwrite",
    ],
)
def test_a_wrong_command_is_found_out(text: str) -> None:
    assert len(wrong_command(text)) == 1


@pytest.mark.parametrize("text", ["--set horizon, a smaller one", "views=2", "--repare", "run vla repair on the store"])
def test_wrong_advice_is_found_out(text: str) -> None:
    assert len(wrong_advice(text, is_fix=True)) == 1
