"""openpi's norm_stats.json goes out of a store and comes back, and wrong files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import DataError, UsageError
from vla.stores.norm_stats import NormStats, norm_stats_of, read_norm_stats, write_norm_stats


def test_statistics_are_those_of_numpy_over_all_rows() -> None:
    values = np.random.default_rng(0).normal(3, 2, (500, 3)).astype(np.float32)
    stats = NormStats.of(values)
    np.testing.assert_array_equal(NormStats.of(np.asfortranarray(values)).mean, stats.mean)
    np.testing.assert_allclose(stats.mean, values.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(stats.std, values.astype(np.float64).std(axis=0))
    np.testing.assert_allclose(stats.q01, np.quantile(values.astype(np.float64), 0.01, axis=0))
    np.testing.assert_allclose(stats.q99, np.quantile(values.astype(np.float64), 0.99, axis=0))


def test_what_is_written_is_openpis_layout_and_reads_back_exactly(tmp_path: Path) -> None:
    stats = {"state": NormStats.of(np.eye(4)), "actions": NormStats.of(np.arange(12.0).reshape(4, 3) / 7)}
    write_norm_stats(tmp_path / "assets" / "norm_stats.json", stats)
    found = json.loads((tmp_path / "assets" / "norm_stats.json").read_text())
    assert {name: list(entry) for name, entry in found["norm_stats"].items()} == {
        "state": ["mean", "std", "q01", "q99"],
        "actions": ["mean", "std", "q01", "q99"],
    }
    back = read_norm_stats(tmp_path / "assets")  # the folder will do
    for name, entry in stats.items():
        for key, value in vars(entry).items():
            np.testing.assert_array_equal(vars(back[name])[key], value)


def test_a_file_of_openpi_without_quantiles_reads(tmp_path: Path) -> None:
    path = tmp_path / "norm_stats.json"
    path.write_text('{"norm_stats": {"actions": {"mean": [0, 1.5], "std": [1, 2], "q01": null, "q99": null}}}')
    stats = read_norm_stats(path)["actions"]
    assert stats.q01 is None
    assert stats.std.tolist() == [1, 2]


def test_a_store_gives_the_statistics_of_its_usable_episodes(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "whole")
    stats = norm_stats_of(made.open())
    np.testing.assert_allclose(stats["actions"].mean, made.steps["action"].astype(np.float64).mean(axis=0))
    partial = make_store(tmp_path / "partial", units=[0])  # rows 0 to 7: only the first episode, of 5 rows, is whole
    np.testing.assert_allclose(
        norm_stats_of(partial.open(allow_partial=True))["actions"].mean,
        partial.steps["action"][:5].astype(np.float64).mean(axis=0),
    )


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "norm_stats.json").write_text("mine")
    with pytest.raises(UsageError, match="refuse to replace"):
        write_norm_stats(tmp_path / "norm_stats.json", {"state": NormStats.of(np.eye(2))})
    assert (tmp_path / "norm_stats.json").read_text() == "mine"


GOOD = {"mean": [0.0, 1.0], "std": [1.0, 1.0], "q01": [-1.0, 0.0], "q99": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not read"),
        ("[1]", "no table norm_stats"),
        (json.dumps({"state": GOOD}), "no table norm_stats"),
        (json.dumps({"norm_stats": {}}), "no table norm_stats"),
        (json.dumps({"norm_stats": {"state": [1]}}), "state is no table"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "std": None}}}), "state lacks std"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "q99": None}}}), "state lacks q99"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "mean": [0.0]}}}), "has lengths"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "mean": [0.0, float("nan")]}}}), "state.mean is .*finite"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "mean": ["0", 1]}}}), "state.mean is .*finite"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "mean": [True, 1]}}}), "state.mean is .*finite"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "std": [1, -1]}}}), "std below 0"),
        (json.dumps({"norm_stats": {"state": {**GOOD, "q01": [2, 0]}}}), "q01 above q99"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "norm_stats.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_norm_stats(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"norm_stats\.json does not read"):
        read_norm_stats(tmp_path)
