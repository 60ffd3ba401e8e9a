"""`skip_bad` leaves out a few bad episodes, not most of a data set, and every later command repeats how many."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vla.cli import app
from vla.featurize.check_source import CheckConfig, check_source
from vla.heads.data import DataConfig, open_data
from vla.stores.errors import SourceError
from vla.stores.store import open_store

Write = Callable[..., Path]


@pytest.fixture
def one_of_four(tmp_path: Path, write_lerobot: Write) -> Path:
    """A data set of four episodes of which the first alone has a video that decodes; each has a file of its own."""
    root = write_lerobot(tmp_path / "set", lengths=(4, 4, 4, 4), per_file=1)
    for video in sorted(root.rglob("*.mp4"))[1:]:
        data = bytearray(video.read_bytes())
        first = data.index(b"mdat") + 4
        last = max(data.find(b"moov") - 4, 0)
        last = last if last > first else len(data)
        data[first:last] = bytes(last - first)  # the index of the frames is whole, the frames are not
        video.write_bytes(data)
    return root


@pytest.fixture
def no_rows(tmp_path: Path, write_lerobot: Write) -> Path:
    """The same with metadata that contradict the rows of all but the first episode: bad before a frame is read."""
    return write_lerobot(tmp_path / "set", lengths=(4, 4, 4, 4), meta_lengths={1: 5, 2: 5, 3: 5})


def featurize(root: Path, *more: str) -> Result:
    command = ["featurize", "--backbone", "pixels", "--source", str(root), "--out", str(root.parent / "stores")]
    return CliRunner().invoke(app, [*command, "--skip-bad", *more])


def test_a_run_that_would_leave_most_episodes_out_is_refused_before_it_begins(no_rows: Path) -> None:
    done = featurize(no_rows)
    assert isinstance(done.exception, SourceError)
    assert "3 of 4" in str(done.exception)
    assert not (no_rows.parent / "stores").exists()
    assert featurize(no_rows, "--set", "max_skipped=0.75").exit_code == 0


def test_a_run_that_left_most_episodes_out_on_the_way_fails_and_so_does_resuming_it(one_of_four: Path) -> None:
    for more in ([], ["--resume"]):
        done = featurize(one_of_four, *more)
        assert isinstance(done.exception, SourceError)
        assert "3 of 4" in str(done.exception)
        assert "3 OF 4 EPISODES LEFT OUT" in done.stderr
    assert open_store(one_of_four.parent / "stores/pixels").complete
    done = featurize(one_of_four, "--resume", "--set", "max_skipped=1", "--json")
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["skipped"]) == 3


def test_opening_a_store_for_training_repeats_how_many_episodes_it_lacks(
    one_of_four: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert featurize(one_of_four, "--set", "max_skipped=1").exit_code == 0
    with caplog.at_level(logging.WARNING):
        open_data(DataConfig(stores=(str(one_of_four.parent / "stores/pixels"),), validation=0))
    assert [record.getMessage().endswith("3 of 4 episodes") for record in caplog.records] == [True]


def test_inspect_lists_every_bad_episode_and_the_statistics_of_their_numbers(
    tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path / "set", lengths=(4, 4, 4, 4))
    for video in root.rglob("*.mp4"):
        video.unlink()
    report = check_source(CheckConfig(source=str(root)))
    assert [finding.found.partition(":")[0] for finding in report.findings] == [f"episode_{n:06d}" for n in range(4)]
    assert {finding.check for finding in report.findings} == {"episode"}
    assert report.facts["episodes"] == 4
    assert len(report.facts["statistics"]["action"]) == 3
    assert "--skip-bad" not in json.dumps(report.to_json())


def test_inspect_advises_no_flag_that_it_does_not_have(no_rows: Path) -> None:
    report = check_source(CheckConfig(source=str(no_rows)))
    assert sum(finding.check == "episode" for finding in report.findings) == 3
    assert "--skip-bad" not in json.dumps(report.to_json())
