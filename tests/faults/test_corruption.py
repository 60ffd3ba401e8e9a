"""Damage of every kind to every kind of file: reading raises, `verify_store` names array, unit and file. Never silent.

`VLA_FAULT_FLIPS` sets the number of bit flips a file (12; 300 in the nightly run).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import CorruptionError, StoreError
from vla.stores.fingerprint import canonical, digest
from vla.stores.store import open_store
from vla.stores.verify import verify_store

FLIPS = int(os.environ.get("VLA_FAULT_FLIPS", "12"))
FEATURES = {"grid": ((1, 3, 4), "float16"), "pooled": ((2, 8), "float32")}
UNIT_FILES = (
    "frames/grid/c.1.0.0.0",
    "frames/pooled/c.1.0.0",
    "checksums/grid/c.1",
    "stats/pooled/c.1.0.0",
    "steps/action/c.1.0",
    "steps/done/c.1",
    "steps/clock/c.1.0",
)
TABLE_FILES = (
    "episodes/id/c.0.0",
    "episodes/row_start/c.0",
    "episodes/length/c.0",
    "episodes/task/c.0",
    "tasks/text/c.0.0",
)
GROUP_FILES = tuple(
    f"{group}zarr.json" for group in ("", "frames/", "steps/", "checksums/", "stats/", "episodes/", "tasks/")
)
ARRAY_FILES = tuple(
    f"{array}/zarr.json"
    for array in (
        "frames/grid",
        "frames/pooled",
        "checksums/grid",
        "stats/pooled",
        "steps/action",
        "steps/done",
        "episodes/id",
        "episodes/length",
        "tasks/text",
    )
)
COMMIT = "commits/unit-000001.json"
EVERY_KIND = (*UNIT_FILES, *TABLE_FILES, *GROUP_FILES, *ARRAY_FILES, COMMIT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> Path:
    made = make_store(tmp_path_factory.mktemp("corruption") / "s", lengths=(9, 11, 4), features=FEATURES)
    read_everything(made.root)
    assert verify_store(made.root).findings == []
    return Path(made.root)


@pytest.fixture
def root(whole: Path, memory_path: Path) -> Path:
    shutil.copytree(whole, memory_path / "s")
    return memory_path / "s"


def read_everything(root: Path) -> dict[str, bytes]:
    store = open_store(root)
    values: dict[str, bytes] = {"episodes": repr(store.episodes).encode()}
    for name in store.manifest.features:
        values[f"frames/{name}"] = store.read(name, np.arange(store.manifest.rows)).tobytes()
        values[f"stats/{name}"] = store.statistics(name).to_array().tobytes()
    for name in store.manifest.steps:
        values[f"steps/{name}"] = store.steps(name).tobytes()
    return values


def require_noticed(root: Path, path: str, what: str) -> None:
    """Reading raises an error that names the file; so does a finding of `verify_store`, with array and unit."""
    with pytest.raises(StoreError) as raised:
        read_everything(root)
    message = str(raised.value)
    assert path in message, f"{what}: {message!r} does not name {path}"
    assert "\n" not in message
    findings = verify_store(root).findings
    named = [line for line in findings if path in line]
    assert named, f"{what}: {findings} do not name {path}"
    if path in UNIT_FILES:
        array = "/".join(path.split("/")[:2])
        assert any(f"array {array}, unit 1" in line for line in named), f"{what}: {named}"


def test_the_list_of_kinds_is_complete(whole: Path) -> None:
    kinds = {path.relative_to(whole).parent.as_posix() for path in whole.rglob("*") if path.is_file()}
    tested = {Path(path).parent.as_posix() for path in EVERY_KIND}
    alike = {"checksums/pooled", "stats/grid", "episodes/row_start", "episodes/task", "steps/clock"}
    assert kinds == tested | alike


@pytest.mark.parametrize("path", EVERY_KIND)
def test_no_flipped_bit_is_silent(root: Path, path: str) -> None:
    file, before = root / path, read_everything(root)
    good = file.read_bytes()
    rng = np.random.default_rng(len(path))
    for bit in rng.choice(len(good) * 8, size=min(FLIPS, len(good) * 8), replace=False).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        if path.startswith("frames/") and in_checksum_of_row(path, bit // 8):
            # The reader compares rows with the commit, not with the copy of the checksum beside them.
            assert read_everything(root) == before
            assert any(path in line for line in verify_store(root).findings)
        else:
            require_noticed(root, path, f"bit {bit} of {path}")
    file.write_bytes(good)
    assert read_everything(root) == before


def in_checksum_of_row(path: str, byte: int) -> bool:
    row = {"frames/grid/c.1.0.0.0": 24, "frames/pooled/c.1.0.0": 64}.get(path, 0)
    return row > 0 and byte < 8 * (row + 4) and byte % (row + 4) >= row


@pytest.mark.parametrize("path", EVERY_KIND)
def test_no_truncation_is_silent(root: Path, path: str) -> None:
    size = (root / path).stat().st_size
    for length in sorted({size - 1, size - 4, size // 2, 1, 0}, reverse=True):
        os.truncate(root / path, length)
        require_noticed(root, path, f"{path} cut to {length} of {size} bytes")


@pytest.mark.parametrize("path", EVERY_KIND)
def test_no_appended_byte_is_silent(root: Path, path: str) -> None:
    with (root / path).open("ab") as file:
        file.write(b"\0")
    require_noticed(root, path, f"{path} grown")


@pytest.mark.parametrize("path", [path for path in EVERY_KIND if path not in (COMMIT, "zarr.json")])
def test_no_missing_file_is_silent(root: Path, path: str) -> None:
    (root / path).unlink()
    require_noticed(root, path, f"{path} removed")


def test_a_store_without_its_root_metadata_is_no_store(root: Path) -> None:
    (root / "zarr.json").unlink()
    for read in (read_everything, verify_store):
        with pytest.raises(StoreError, match="is no store"):
            read(root)


def test_a_missing_commit_record_means_an_absent_unit(root: Path) -> None:
    (root / COMMIT).unlink()
    with pytest.raises(StoreError, match="has 2 of 3 units"):
        read_everything(root)
    assert any(line.startswith("units 1 of") for line in verify_store(root).findings)


def test_a_missing_folder_of_commits_is_said(root: Path) -> None:
    shutil.rmtree(root / "commits")
    with pytest.raises(StoreError, match="commits"):
        read_everything(root)
    assert any("commits" in line for line in verify_store(root).findings)


def unit_twin(path: str, unit: int) -> str:
    return path.replace("c.1", f"c.{unit}", 1)


@pytest.mark.parametrize("path", UNIT_FILES)
def test_two_files_of_one_array_swapped_are_noticed(root: Path, path: str) -> None:
    one, two = root / path, root / unit_twin(path, 0)
    assert one.stat().st_size == two.stat().st_size
    one.rename(root / "aside")
    two.rename(one)
    (root / "aside").rename(two)
    if one.read_bytes() != two.read_bytes():
        with pytest.raises(CorruptionError):
            read_everything(root)
        findings = " ".join(verify_store(root).findings)
        assert path in findings
        assert unit_twin(path, 0) in findings


def test_two_commit_records_swapped_are_noticed(root: Path) -> None:
    one, two = root / COMMIT, root / "commits" / "unit-000000.json"
    one.rename(root / "aside")
    two.rename(one)
    (root / "aside").rename(two)
    with pytest.raises(CorruptionError, match=r"unit-00000\d\.json is the record of unit"):
        read_everything(root)
    assert any("is the record of unit" in line for line in verify_store(root).findings)


@pytest.mark.parametrize("path", [path for path in UNIT_FILES if not path.startswith("steps")])
def test_a_stale_file_of_an_older_run_is_noticed(
    root: Path, path: str, make_store: Callable[..., Any], tmp_path: Path
) -> None:
    """Same manifest, same sizes, valid checksums inside: only the commit knows that it is not this run's."""
    older = make_store(tmp_path / "older", lengths=(9, 11, 4), features=FEATURES, seed=1)
    shutil.copy(older.root / path, root / path)
    require_noticed(root, path, f"stale {path}")


def test_a_stale_shard_with_its_stale_checksums_is_noticed(
    root: Path, make_store: Callable[..., Any], tmp_path: Path
) -> None:
    older = make_store(tmp_path / "older", lengths=(9, 11, 4), features=FEATURES, seed=1)
    for path in ("frames/grid/c.1.0.0.0", "checksums/grid/c.1"):
        shutil.copy(older.root / path, root / path)
    require_noticed(root, "checksums/grid/c.1", "stale shard and checksums")


def test_a_record_copied_from_another_store_is_refused(
    root: Path, make_store: Callable[..., Any], tmp_path: Path
) -> None:
    other = make_store(
        tmp_path / "other", lengths=(9, 11, 4), features=FEATURES, fingerprint={"backbone": {"layer": -1}}
    )
    for path in (*UNIT_FILES, COMMIT):
        shutil.copy(other.root / path, root / path)
    with pytest.raises(CorruptionError, match=r"unit-000001\.json belongs to another store"):
        read_everything(root)


def test_a_record_that_is_a_number_too_far_is_refused(root: Path) -> None:
    shutil.copy(root / COMMIT, root / "commits" / "unit-000003.json")
    with pytest.raises(CorruptionError, match=r"unit-000003\.json"):
        read_everything(root)


def edit_metadata(file: Path, *path: str, value: Any) -> None:
    document = at = json.loads(file.read_text())
    for key in path[:-1]:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(path[-1]) if isinstance(at, list) else path[-1]] = value
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shape", "0"), 23),
        (("shape", "0"), 10**12),
        (("shape",), []),
        (("data_type",), "float32"),
        (("data_type",), "bfloat16"),
        (("chunk_grid", "configuration", "chunk_shape", "0"), 4),
        (("chunk_grid",), None),
        (("chunk_grid", "name"), "irregular"),
        (("chunk_key_encoding", "configuration", "separator"), "/"),
        (("chunk_key_encoding", "name"), "v2"),
        (("codecs",), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        (("codecs",), [{"name": "pickle"}]),
        (("codecs", "0", "configuration", "index_location"), "start"),
        (("codecs", "0", "configuration", "codecs", "0", "configuration", "endian"), "big"),
        (("fill_value",), 0.0),
        (("dimension_names",), ["view", "row", "p", "c"]),
        (("zarr_format",), 2),
        (("node_type",), "group"),
        (("storage_transformers",), [{"name": "theirs"}]),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else str(value)[:16],
)
def test_edited_metadata_of_an_array_is_refused(root: Path, path: tuple[str, ...], value: Any) -> None:
    edit_metadata(root / "frames/grid/zarr.json", *path, value=value)
    require_noticed(root, "frames/grid/zarr.json", ".".join(path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("attributes", "vla", "rows"), 10**12),
        (("attributes", "vla", "unit_rows"), 4),
        (("attributes", "vla", "fingerprint", "source", "digest"), "source-b"),
        (("attributes", "vla", "provenance", "random_weights"), False),
        (("attributes", "vla_sha256"), "0" * 64),
        (("attributes", "vla", "fps"), float("nan")),
        (("attributes", "vla", "schema_version"), 2),
        (("attributes", "vla", "schema_version"), None),
        (("attributes", "vla"), "text"),
        (("attributes",), [1]),
        (("zarr_format",), 2),
        (("node_type",), "array"),
    ],
)
def test_an_edited_manifest_is_refused(root: Path, path: tuple[str, ...], value: Any) -> None:
    edit_metadata(root / "zarr.json", *path, value=value)
    require_noticed(root, "zarr.json", ".".join(path))


@pytest.mark.parametrize("path", ["zarr.json", "frames/grid/zarr.json", "frames/zarr.json", COMMIT])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"a": NaN}',
        b'{"attributes": {"vla": {"schema_version": 1, "x": NaN}}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"attributes": {"vla": {"schema_version": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}}}",
        b'{"sha256": "x", "unit": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"sha256": "\\ud800", "unit": "\\ud800"}',
    ],
    ids=lambda value: repr(value[:12]) + str(len(value)) if isinstance(value, bytes) else value,
)
def test_json_that_is_no_record_is_refused(root: Path, path: str, content: bytes) -> None:
    (root / path).write_bytes(content)
    require_noticed(root, path, repr(content[:20]))


@pytest.mark.parametrize("path", ["zarr.json", "steps/action/zarr.json", COMMIT])
def test_a_file_of_gigabytes_where_metadata_should_be_is_not_read(root: Path, path: str) -> None:
    os.truncate(root / path, 8 << 30)  # sparse: costs nothing on disk, everything in memory
    require_noticed(root, path, "8 GiB")


@pytest.mark.parametrize("path", [*TABLE_FILES[:2], *UNIT_FILES])
def test_a_file_of_gigabytes_where_data_should_be_is_not_read(root: Path, path: str) -> None:
    os.truncate(root / path, 8 << 30)
    require_noticed(root, path, "8 GiB")


def resign(root: Path, **changes: Any) -> None:
    """Edit the manifest and renew its digest, as someone who means harm would."""
    file = root / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["vla"].update(changes)
    document["attributes"]["vla_sha256"] = digest(document["attributes"]["vla"])
    file.write_text(json.dumps(document))


FEATURE = {"shape": [1, 4], "dims": ["view", "channel"], "dtype": "float16"}
STEP = {"shape": [2], "dtype": "float32", "role": "action", "names": []}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**12},
        {"rows": 2**63},
        {"rows": 0},
        {"rows": "many"},
        {"unit_rows": 1, "rows": 10**12},
        {"unit_rows": 2**40},
        {"features": {"grid": FEATURE | {"shape": [2**32, 2**32]}}},
        {"features": {"grid": FEATURE | {"shape": [2**31, 4]}}},
        {"features": {"grid": FEATURE | {"shape": [-1, 4]}}},
        {"features": {"grid": FEATURE | {"shape": []}}},
        {"features": {"grid": FEATURE | {"dims": ["view"]}}},
        {"features": {"grid": FEATURE | {"dtype": "object"}}},
        {"features": {"../../elsewhere": FEATURE}},
        {"features": {"/etc": FEATURE}},
        {"steps": {"../elsewhere": STEP}},
        {"steps": {"action": STEP | {"shape": [-1]}}},
        {"steps": {"action": STEP | {"shape": [2**40]}}},
        {"tables": {}},
        {"unknown": 1},
    ],
    ids=lambda changes: canonical(changes).decode()[:60],
)
def test_a_manifest_that_lies_with_a_valid_digest_is_refused(root: Path, changes: dict[str, Any]) -> None:
    resign(root, **changes)
    with pytest.raises(StoreError) as raised:
        open_store(root, allow_partial=True)
    assert str(root) in str(raised.value)
    assert verify_store(root).findings


def test_a_hostile_store_of_a_trillion_rows_is_refused_before_memory_is_taken(
    root: Path, make_store: Callable[..., Any]
) -> None:
    """Everything consistent, every digest valid, one episode of 10**12 rows: still no allocation by declared size."""
    import zarr

    from vla.stores.manifest import Manifest
    from vla.stores.metadata import table_digests

    lengths = np.array([10**12], np.int64)
    arrays = {
        "episodes/id": np.frombuffer(b"x", np.uint8)[None],
        "episodes/row_start": np.zeros(1, np.int64),
        "episodes/length": lengths,
        "episodes/task": np.zeros(1, np.int64),
        "tasks/text": np.frombuffer(b"t", np.uint8)[None],
    }
    shutil.rmtree(root)
    made = make_store(root, lengths=(2,), ids=("x",), unit_rows=1)
    for path, values in arrays.items():
        file = root / path / ("c" + ".0" * values.ndim)
        file.write_bytes(_with_crc(values))
        edit_metadata(root / path / "zarr.json", "shape", value=list(values.shape))
        edit_metadata(root / path / "zarr.json", "chunk_grid", "configuration", "chunk_shape", value=list(values.shape))
    resign(root, rows=10**12, tables=table_digests(arrays))
    for name in ("frames/grid", "checksums/grid", "stats/grid", "steps/action", "steps/done", "steps/clock"):
        edit_metadata(root / name / "zarr.json", "shape", "0", value=10**12)
    assert made.manifest.unit_rows == 1
    assert Manifest is not None
    assert zarr is not None
    with pytest.raises(StoreError, match="1000000000000"):
        open_store(root, allow_partial=True)
    assert verify_store(root).findings


def _with_crc(values: np.ndarray[Any, Any]) -> bytes:
    import google_crc32c

    raw = values.tobytes()
    return raw + int(google_crc32c.value(raw)).to_bytes(4, "little")


def test_a_table_of_other_episodes_with_valid_checksums_is_refused(root: Path) -> None:
    values = np.array([9, 10, 5], np.int64)
    (root / "episodes/length/c.0").write_bytes(_with_crc(values))
    require_noticed(root, "episodes/length", "another table")


@pytest.mark.parametrize(
    ("path", "shape", "dtype"),
    [
        ("episodes/length", [10**30], "int64"),
        ("episodes/length", [-1, -3], "int64"),
        ("episodes/length", [True, 3], "int64"),
        ("episodes/length", [3], "float64"),
        ("episodes/length", "3", "int64"),
        ("episodes/id", [24], "uint8"),
        ("episodes/id", [1e3], "uint8"),
    ],
)
def test_a_table_that_declares_a_wrong_shape_is_refused(root: Path, path: str, shape: Any, dtype: str) -> None:
    edit_metadata(root / path / "zarr.json", "shape", value=shape)
    edit_metadata(root / path / "zarr.json", "data_type", value=dtype)
    require_noticed(root, path, f"{dtype} {shape}")


def resign_record(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((root / COMMIT).read_bytes())
    record.pop("sha256")
    change(record)
    (root / COMMIT).write_bytes(canonical({**record, "sha256": digest(record)}) + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("files"),
        lambda record: record.pop("unit"),
        lambda record: record.pop("manifest_sha256"),
        lambda record: record.pop("skipped"),
        lambda record: record["files"].clear(),
        lambda record: record["files"].pop("checksums/grid/c.1"),
        lambda record: record["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0"}}),
        lambda record: record["files"].update({"checksums/grid/c.1": "text"}),
        lambda record: record["files"]["checksums/grid/c.1"].update(size="large"),
        lambda record: record["files"]["checksums/grid/c.1"].pop("sha256"),
        lambda record: record.update(files=[1]),
        lambda record: record.update(skipped=7),
        lambda record: record.update(unit="1"),
    ],
)
def test_a_record_that_lies_with_a_valid_digest_is_refused(
    root: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    resign_record(root, change)
    require_noticed(root, COMMIT, "record")


@pytest.mark.parametrize("path", ["checksums/grid/c.1", "stats/grid/c.1.0.0", "steps/action/c.1.0"])
def test_a_record_that_declares_another_size_is_refused(root: Path, path: str) -> None:
    """The file is as large as the record says: neither is what the manifest promises."""
    os.truncate(root / path, 2)
    short = (root / path).read_bytes()
    import hashlib

    entry = {"size": 2, "sha256": hashlib.sha256(short).hexdigest()}
    resign_record(root, lambda record: record["files"].update({path: entry}))
    with pytest.raises(CorruptionError, match="unit 1"):
        read_everything(root)


def test_a_shard_index_that_points_elsewhere_with_a_valid_checksum_is_noticed(root: Path) -> None:
    import google_crc32c

    shard = root / "frames/grid/c.1.0.0.0"
    good = shard.read_bytes()
    tail = 8 * 16 + 4
    index = np.frombuffer(good[-tail:-4], "<u8").reshape(8, 2).copy()
    for offset, length in ((28, 28), (len(good), 28), (2**63, 28), (0, 2**40), (0, 24)):
        lying = index.copy()
        lying[2] = offset, length
        body = lying.tobytes()
        crc = int(google_crc32c.value(body)).to_bytes(4, "little")
        shard.write_bytes(good[:-tail] + body + crc)
        require_noticed(root, "frames/grid/c.1.0.0.0", f"slot 2 at {offset}, {length} bytes")
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptionError, match="the shard index does not match its checksum"):
        read_everything(root)


def test_verify_counts_what_it_read_and_names_every_damage(root: Path) -> None:
    report = verify_store(root)
    assert (report.units, report.committed, report.to_json()["ok"]) == (3, 3, True)
    assert report.files == 3 * (2 * 3 + 3)
    assert report.bytes == sum(f.stat().st_size for f in root.rglob("c.*") if "s/id" not in str(f)) - sum(
        (root / path).stat().st_size for path in TABLE_FILES if "s/id" not in path
    )
    for path in ("frames/grid/c.0.0.0.0", "steps/action/c.2.0"):
        (root / path).unlink()
    findings = verify_store(root).findings
    assert len(findings) == 2
    assert "array frames/grid, unit 0" in findings[0]
    assert "array steps/action, unit 2" in findings[1]


def test_files_that_belong_to_no_commit_are_named(root: Path) -> None:
    shutil.copy(root / "frames/grid/c.1.0.0.0", root / "frames/grid/c.7.0.0.0")
    (root / "commits/unit-000002.json.partial").touch()
    findings = verify_store(root).findings
    assert any("c.7.0.0.0 belongs to no committed unit" in line for line in findings)
    assert any("unit-000002.json.partial" in line for line in findings)


def test_an_error_of_the_disk_while_verifying_is_a_finding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vla.stores import verify

    def fail(path: Path) -> str:
        raise OSError(5, os.strerror(5), str(path))

    monkeypatch.setattr(verify, "digest_file", fail)
    findings = verify_store(root).findings
    assert any("frames/grid/c.1.0.0.0" in line and "input/output error" in line for line in findings)
