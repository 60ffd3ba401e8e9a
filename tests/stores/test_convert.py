"""One form into another and back: the same bytes as before, or a refusal that says why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from vla import cli
from vla.stores import plain_zarr
from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.errors import CorruptionError, FingerprintError, StoreError, UsageError
from vla.stores.reader import FeatureReader
from vla.stores.store import open_store
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer

EVERY_DTYPE = {
    "grid": ((2, 3, 4), "float16"),
    "pooled": ((1, 5), "float32"),
    "tokens": ((1, 2, 3), "bfloat16"),
    "small": ((2, 6), "int8"),
}
FORMS = [("zarr", "none"), ("zarr", "zstd"), ("h5", "none")]


@pytest.fixture
def made(memory_path: Path, make_store: Callable[..., Any]) -> Any:
    """A store of four features, one of each dtype, with an episode left out across two of its three units."""
    return leaving_out(memory_path / "s", make_store, in_units=(0, 1))


def leaving_out(root: Path, make_store: Callable[..., Any], in_units: tuple[int, ...]) -> Any:
    """Make that store, the records of `in_units` leaving out the episode in rows 5 to 13."""
    made = make_store(root, features=EVERY_DTYPE, units=[])
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            rows = slice(buffer.rows.start, buffer.rows.stop)
            buffer.put(rows.start, {name: array[rows].astype(np.float32) for name, array in made.features.items()})
            for name, array in made.steps.items():
                buffer.steps[name][: len(buffer.rows)] = array[rows]
            if unit in in_units:
                buffer.leave_out("episode-1", range(max(5, rows.start), min(14, rows.stop)), "cannot be decoded")
            writer.commit(buffer)
    return made


def options(form: str, compression: str = "none") -> ConvertOptions:
    return ConvertOptions.build({"format": form, "compression": compression})


@pytest.mark.parametrize("there", FORMS)
@pytest.mark.parametrize("back", FORMS)
def test_there_and_back_again_gives_the_same_files(
    memory_path: Path,
    made: Any,
    files_of: Callable[[Path], dict[str, bytes]],
    there: tuple[str, str],
    back: tuple[str, str],
) -> None:
    convert_store(made.root, memory_path / "direct", options(*back))
    convert_store(made.root, memory_path / "a", options(*there))
    convert_store(memory_path / "a", memory_path / "b", options(*back))
    assert files_of(memory_path / "b") == files_of(memory_path / "direct")
    if back == ("zarr", "none"):
        assert files_of(memory_path / "b") == files_of(made.root)
    assert verify_store(memory_path / "b").findings == []


@pytest.mark.parametrize("there", FORMS)
def test_an_episode_left_out_in_one_of_its_units_alone_keeps_its_other_rows(
    memory_path: Path,
    make_store: Callable[..., Any],
    there: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    files_of: Callable[[Path], dict[str, bytes]],
) -> None:
    root = leaving_out(memory_path / "s", make_store, in_units=(1,)).root
    before, read = open_store(root), Counter[int]()
    assert np.flatnonzero(before.left_out).tolist() == [*range(8, 14)]
    assert not before.usable[1]
    assert convert_store(root, memory_path / "a", options(*there)).rows == 14
    convert_store(memory_path / "a", memory_path / "b", options("zarr"))
    assert files_of(memory_path / "b") == files_of(root)
    reading = FeatureReader.read

    def noted(self: FeatureReader, rows: Any, out: Any) -> None:
        read.update(rows.tolist())
        reading(self, rows, out)

    monkeypatch.setattr(FeatureReader, "read", noted)
    assert verify_store(root).findings == []
    assert sorted(read) == [*range(8), *range(14, 20)]  # every row that is committed is compared with its checksum
    for name, (shape, _) in EVERY_DTYPE.items():
        assert before.statistics(name).count == 14 * math.prod(shape[:-1])


def test_plain_zarr_holds_the_rows_of_an_episode_left_out_elsewhere(
    memory_path: Path, make_store: Callable[..., Any]
) -> None:
    store = open_store(leaving_out(memory_path / "s", make_store, in_units=(1,)).root)
    convert_store(store.root, memory_path / "p", options("plain-zarr"))
    plain: Any = zarr.open_array(memory_path / "p/frames/grid", mode="r")
    np.testing.assert_array_equal(plain[:8], store.read("grid", np.arange(8)))


def test_every_form_holds_the_same_values_and_fingerprint(memory_path: Path, made: Any) -> None:
    convert_store(made.root, memory_path / "h5", options("h5"))
    here, there = open_store(made.root), open_store(memory_path / "h5")
    assert there.manifest.format == "h5"
    assert there.manifest.fingerprint == here.manifest.fingerprint
    assert there.skipped == here.skipped == {"episode-1": "cannot be decoded"}
    rows = np.flatnonzero(~here.left_out)
    assert len(rows) == 11
    for name in EVERY_DTYPE:
        np.testing.assert_array_equal(there.read(name, rows), here.read(name, rows))
        np.testing.assert_array_equal(there.statistics(name).to_array(), here.statistics(name).to_array())
    for name in made.steps:
        np.testing.assert_array_equal(there.steps(name), here.steps(name))


def test_an_interrupted_conversion_is_resumed_to_the_same_bytes(
    memory_path: Path, made: Any, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    convert_store(made.root, memory_path / "whole", options("h5"))
    with pytest.raises(KeyboardInterrupt):
        convert_store(made.root, memory_path / "o", options("h5"), progress=stop)
    with pytest.raises(UsageError, match=r"exists.*--resume"):
        convert_store(made.root, memory_path / "o", options("h5"))
    with pytest.raises(FingerprintError, match="format"):
        convert_store(made.root, memory_path / "o", options("zarr"), resume=True)
    assert convert_store(made.root, memory_path / "o", options("h5"), resume=True).units == 2
    assert files_of(memory_path / "o") == files_of(memory_path / "whole")


def test_damage_is_not_carried_on(memory_path: Path, made: Any) -> None:
    shard = made.root / "frames/grid/c.2.0.0.0"
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(raw)
    for form in ("h5", "zarr", "plain-zarr"):
        with pytest.raises(CorruptionError, match="unit 2"):
            convert_store(made.root, memory_path / form, options(form))
    assert not (memory_path / "plain-zarr").exists()


def test_an_incomplete_store_is_not_converted(memory_path: Path, make_store: Callable[..., Any]) -> None:
    make_store(memory_path / "s", units=[0])
    with pytest.raises(StoreError, match="1 of 3 units"):
        convert_store(memory_path / "s", memory_path / "o", options("h5"))
    assert not (memory_path / "o").exists()


@pytest.mark.parametrize("inside", ["s", "s/frames"])
def test_a_store_is_not_written_into_itself(memory_path: Path, made: Any, inside: str) -> None:
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"/s\b"):
            convert_store(made.root, memory_path / inside, options("h5"), **flags)
    assert verify_store(made.root).findings == []


def test_a_store_is_not_written_over_the_folder_it_lies_in(memory_path: Path, made: Any) -> None:
    convert_store(made.root, memory_path / "o", options("h5"))
    inner = made.root.rename(memory_path / "o" / "s")
    with pytest.raises(UsageError, match=f"--overwrite of {memory_path / 'o'} would delete {inner}, which is read"):
        convert_store(inner, memory_path / "o", options("h5"), overwrite=True)
    assert verify_store(inner).findings == []


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_plain_zarr_holds_every_array_and_no_commit(
    memory_path: Path, made: Any, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_zarr, "CHUNK_BYTES", 200)  # several chunks a unit
    report = convert_store(made.root, memory_path / "p", options("plain-zarr", compression))
    assert (report.units, report.rows) == (3, 11)  # 20, of which 9 were left out
    store, group = open_store(made.root), zarr.open_group(memory_path / "p", mode="r")
    arrays = {path for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    assert arrays == {
        *(f"frames/{name}" for name in EVERY_DTYPE),
        *(f"steps/{name}" for name in made.steps),
        "scales/small",
        "episodes/id",
        "episodes/row_start",
        "episodes/length",
        "episodes/task",
        "tasks/text",
    }
    rows = np.flatnonzero(~store.left_out)
    for name, (_, dtype) in EVERY_DTYPE.items():
        array = group[f"frames/{name}"]
        np.testing.assert_array_equal(array[:][rows], store.read(name, rows))
        assert array.attrs["dtype"] == dtype
        assert array.shards is None
        assert bool(array.compressors) == (compression == "zstd")
    assert np.isnan(group["frames/grid"][:][store.left_out]).all()
    for name in made.steps:
        np.testing.assert_array_equal(group[f"steps/{name}"][:], store.steps(name))
    np.testing.assert_array_equal(group["scales/small"][:], store.scales("small"))
    assert group.attrs["skipped_episodes"] == store.skipped
    assert sorted(path.name for path in memory_path.iterdir()) == ["p", "s"]


def test_plain_zarr_is_refused_resumed_and_replaced_as_said(
    memory_path: Path, made: Any, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    plain = options("plain-zarr")
    with pytest.raises(UsageError, match="cannot be resumed"):
        convert_store(made.root, memory_path / "p", plain, resume=True)
    (memory_path / "p.partial" / "frames").mkdir(parents=True)  # of a run that was killed
    convert_store(made.root, memory_path / "p", plain)
    before = files_of(memory_path / "p")
    with pytest.raises(UsageError, match=r"exists.*--overwrite"):
        convert_store(made.root, memory_path / "p", plain)
    convert_store(made.root, memory_path / "p", plain, overwrite=True)
    assert files_of(memory_path / "p") == before
    assert sorted(path.name for path in memory_path.iterdir()) == ["p", "s"]
    with pytest.raises(StoreError, match="no store of ours"):
        open_store(memory_path / "p")


@pytest.mark.parametrize("kind", ["photos", "store"])
def test_overwriting_with_plain_zarr_replaces_nothing_else(
    memory_path: Path,
    made: Any,
    make_store: Callable[..., Any],
    kind: str,
    files_of: Callable[[Path], dict[str, bytes]],
) -> None:
    target = memory_path / "mine"
    if kind == "store":
        make_store(target)
    else:
        target.mkdir()
        (target / "cat.jpg").write_text("cat")
    before = files_of(target)
    with pytest.raises(StoreError, match="no plain zarr of ours"):
        convert_store(made.root, target, options("plain-zarr"), overwrite=True)
    assert files_of(target) == before


def test_the_command_prints_what_it_wrote(memory_path: Path, made: Any) -> None:
    command = ["convert", str(made.root), str(memory_path / "o"), "--format", "h5", "--json"]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert (facts["format"], facts["units"], facts["rows"]) == ("h5", 3, 11)
    assert facts["bytes"] == sum(path.stat().st_size for path in (memory_path / "o").rglob("*") if path.is_file())
    with pytest.raises(UsageError, match="vla convert: format = 'hdf'"):
        CliRunner().invoke(cli.app, [*command[:4], "hdf"], catch_exceptions=False)
