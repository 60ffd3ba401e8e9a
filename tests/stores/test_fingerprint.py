"""A store never mixes two fingerprints, and the refusal names the field."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vla.stores.errors import FingerprintError
from vla.stores.fingerprint import canonical, differences, digest
from vla.stores.manifest import SCHEMA_VERSION, FeatureInfo, Manifest, StepInfo
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

FINGERPRINT = {
    "schema_version": SCHEMA_VERSION,
    "backbone": {
        "name": "toy",
        "weights_sha256": "ab" * 32,
        "layer": -2,
        "pooling": "mean",
        "preprocess": {"resize": 224, "crop": "center", "mean": [0.5, 0.5, 0.5], "antialias": True},
    },
    "features": {"grid": {"shape": [1, 3, 4], "dtype": "float16"}},
    "context": 0,
    "source": {"kind": "synthetic", "digest": "cd" * 32, "mapping": {"action": "act"}, "cameras": ["front"]},
}
PLAN = {"rows", "unit_rows", "fps", "cameras", "features", "steps"}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path


def manifest(**changes: Any) -> Manifest:
    values = {
        "rows": 12,
        "unit_rows": 8,
        "fps": 10.0,
        "cameras": ("front",),
        "features": {"grid": FeatureInfo(shape=(1, 3, 4), dims=("view", "p", "channel"), dtype="float16")},
        "steps": {"action": StepInfo(shape=(2,), dtype="float32", role="action", names=("x", "y"))},
        "fingerprint": FINGERPRINT,
        "tables": {},
        "provenance": {"source_licence": "MIT"},
    }
    return Manifest(**{**values, **changes})


def episodes(ids: tuple[str, ...] = ("a", "b"), lengths: tuple[int, ...] = (5, 7)) -> EpisodeTable:
    return EpisodeTable.plan(ids, lengths, ["push"] * len(ids))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fingerprint") / "s"
    with open_writer(path, manifest(), episodes()):
        pass
    return path


def resume(root: Path, wanted: Manifest, table: EpisodeTable | None = None) -> None:
    with open_writer(root, wanted, table or episodes(), resume=True):
        pass


@pytest.mark.parametrize("path", list(leaves(FINGERPRINT)), ids=".".join)
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_each_field_of_the_fingerprint_is_compared_and_named(root: Path, path: tuple[str, ...], change: str) -> None:
    changed = copy.deepcopy(FINGERPRINT)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    if change == "removed":
        del at[path[-1]]
    else:
        at[path[-1]] = "something else"
    with pytest.raises(FingerprintError, match=rf"{'.'.join(path)}: .* here, .* wanted.*--overwrite"):
        resume(root, manifest(fingerprint=changed))


def test_a_field_that_the_store_does_not_know_is_named(root: Path) -> None:
    changed = copy.deepcopy(FINGERPRINT)
    changed["backbone"]["new"] = 1  # type: ignore[index]
    with pytest.raises(FingerprintError, match=r"backbone\.new: <absent> here, 1 wanted"):
        resume(root, manifest(fingerprint=changed))


def test_a_value_inside_a_list_is_compared(root: Path) -> None:
    changed = copy.deepcopy(FINGERPRINT)
    changed["backbone"]["preprocess"]["mean"] = [0.5, 0.5, 0.25]  # type: ignore[index]
    with pytest.raises(FingerprintError, match=r"backbone\.preprocess\.mean"):
        resume(root, manifest(fingerprint=changed))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unit_rows", 4),
        ("fps", 20.0),
        ("cameras", ("wrist",)),
        ("features", {"grid": FeatureInfo(shape=(1, 3, 4), dims=("view", "p", "channel"), dtype="float32")}),
        ("features", {"grid": FeatureInfo(shape=(1, 3, 5), dims=("view", "p", "channel"), dtype="float16")}),
        ("steps", {"action": StepInfo(shape=(3,), dtype="float32", role="action")}),
        ("steps", {}),
    ],
)
def test_each_field_of_the_plan_is_compared_and_named(root: Path, field: str, value: Any) -> None:
    assert field in PLAN
    with pytest.raises(FingerprintError, match=rf"the plan of .*{field}"):
        resume(root, manifest(**{field: value}))


@pytest.mark.parametrize(
    ("ids", "lengths", "named"),
    [(("a", "c"), (5, 7), "episodes/id"), (("b", "a"), (5, 7), "episodes/id"), (("a", "b"), (6, 6), "episodes/length")],
)
def test_other_episodes_are_refused(root: Path, ids: tuple[str, ...], lengths: tuple[int, ...], named: str) -> None:
    with pytest.raises(FingerprintError, match=rf"tables\.{named}"):
        resume(root, manifest(), episodes(ids, lengths))


def test_what_changes_no_feature_changes_no_fingerprint(root: Path) -> None:
    resume(root, manifest(provenance={"source_licence": "another", "workers": 8, "batch_size": 64}))


def test_the_order_of_keys_is_neutral_and_everything_else_is_not() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"b": [2, 1]}) != digest({"b": [1, 2]})
    assert digest({"x": "1"}) != digest({"x": 1})
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_names_of_files_that_are_no_unicode_can_be_recorded() -> None:
    assert canonical({"reason": "bad file caf\udce9.mp4"}) == b'{"reason":"bad file caf\\udce9.mp4"}'


def test_a_long_list_of_differences_is_cut_short() -> None:
    lines = differences({str(n): 0 for n in range(9)}, {str(n): 1 for n in range(9)})
    assert len(lines) == 9
