"""Every storage dtype and archives read from a bucket as from disk; the h5 form is refused; repair; conversion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.errors import CorruptionError, StoreError, UsageError
from vla.stores.formats.registry import unit_files
from vla.stores.layout import commit_file
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.verify import verify_remote
from vla.stores.repair import repair_store
from vla.stores.store import open_store
from vla.stores.writer import open_writer

URL = "s3://bucket/some/s"


def upload(bucket: Any, root: Path) -> None:
    """Put a local store's files into the bucket, as a copying tool does."""
    for path in root.rglob("*"):
        if path.is_file() and path.name != "writer.lock":
            bucket.objects[f"some/s/{path.relative_to(root).as_posix()}"] = path.read_bytes()


@pytest.mark.parametrize(
    "form",
    [{"compression": "zstd"}, {"dtype": "int8"}, {"dtype": "bfloat16"}, {}],
    ids=["zstd", "int8", "bf16", "fp16"],
)
def test_a_store_that_was_copied_there_reads_as_the_local_one(
    bucket: Any, make_store: Any, memory_path: Path, options: RemoteOptions, form: dict[str, str]
) -> None:
    form = dict(form)
    features = {"grid": ((1, 3, 400), form.pop("dtype", "float16"))}
    made = make_store(memory_path / "s", lengths=(9, 11, 4), features=features, form=form)
    upload(bucket, made.root)
    here, there = made.open(), open_store(URL, remote=options)
    rows = np.random.default_rng(0).permutation(24)
    assert there.read("grid", rows).tobytes() == here.read("grid", rows).tobytes()
    scales = [store.scales("grid") for store in (here, there)]
    assert (scales[0] is None) == (scales[1] is None)
    if scales[0] is not None:
        np.testing.assert_array_equal(*scales)
    assert verify_remote(URL, options, lambda done, total: None).findings == []


def test_damaged_bytes_of_an_archive_are_fetched_again_and_then_refused(
    bucket: Any, make_store: Any, memory_path: Path, options: RemoteOptions
) -> None:
    made = make_store(memory_path / "s", features={"grid": ((1, 3, 400), "float16")}, form={"compression": "zstd"})
    upload(bucket, made.root)
    store = open_store(URL, remote=options)
    struck: list[str] = []

    def once(request: Any) -> str | None:
        struck.append(request.key)
        return "corrupt" if struck.count(request.key) == 1 else None

    bucket.fault = once
    assert store.read("grid", np.arange(8)).tobytes() == made.open().read("grid", np.arange(8)).tobytes()
    bucket.fault = lambda request: "corrupt"
    with pytest.raises(CorruptionError, match=rf"{URL}/frames/grid/c\.1\.0\.0\.0 .*fetched twice"):
        store.read("grid", np.arange(8, 16))


def test_the_h5_form_is_refused_both_ways_naming_the_command(
    bucket: Any, make_store: Any, memory_path: Path, options: RemoteOptions, write_remote: Any
) -> None:
    made = make_store(memory_path / "s", form={"format": "h5"})
    with pytest.raises(StoreError, match=r"form h5.*vla convert STORE OUT --format zarr"):
        write_remote(made, options)
    assert bucket.objects == {}
    upload(bucket, made.root)
    for use in (lambda: open_store(URL, remote=options), lambda: verify_remote(URL, options, lambda done, total: None)):
        with pytest.raises(StoreError, match=r"form h5.*vla convert STORE OUT --format zarr"):
            use()


def test_a_remote_store_converts_into_local_forms(
    remote: str, local: Any, options: RemoteOptions, memory_path: Path, files_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLA_CACHE", str(options.folder))
    convert_store(remote, memory_path / "h5", ConvertOptions(format="h5"))
    convert_store(memory_path / "h5", memory_path / "zarr", ConvertOptions(format="zarr"))
    assert files_of(memory_path / "zarr") == files_of(local.root)


@pytest.mark.parametrize("place", ["s3://bucket/x", "http://127.0.0.1/x", "s3:/bucket/x"])
def test_what_only_works_on_a_disk_refuses_urls(local: Any, place: str) -> None:
    with pytest.raises(UsageError, match=r"://.*is a URL; expected a folder"):
        convert_store(local.root, Path(place), ConvertOptions(format="h5"))
    with (
        pytest.raises(UsageError, match=r"://.*is a URL; expected a folder"),
        open_writer(Path(place), local.manifest, local.episodes),
    ):
        pass


def test_repair_drops_what_is_damaged_and_resuming_makes_the_same_bytes(
    bucket: Any,
    remote: str,
    local: Any,
    options: RemoteOptions,
    write_remote: Any,
    content: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLA_CACHE", str(options.folder))
    whole = content(bucket)
    assert repair_store(remote).dropped == []
    assert content(bucket) == whole
    shard = "some/s/frames/grid/c.1.0.0.0"
    bucket.objects[shard] = bytes(len(bucket.objects[shard]))
    bucket.objects["some/s/commits/unit-000002.json"] = b"{}"
    bucket.objects["some/s/steps/action/c.9.0"] = b"left by nobody"
    report = repair_store(remote)
    assert (report.dropped, report.pending) == ([1, 2], [1, 2])
    assert "steps/action/c.9.0" in report.removed
    gone = {path for unit in (1, 2) for path in (*unit_files(local.manifest, unit), commit_file(unit))}
    assert content(bucket) == {path: data for path, data in whole.items() if path not in gone}
    write_remote(local, options, resume=True)
    assert content(bucket) == whole


def test_repair_leaves_a_store_with_damaged_metadata_alone(bucket: Any, remote: str) -> None:
    bucket.objects["some/s/zarr.json"] = b"{}"
    before = dict(bucket.objects)
    with pytest.raises(CorruptionError, match=f"{URL}.*nothing was dropped"):
        repair_store(remote)
    assert bucket.objects == before


def test_an_object_that_is_gone_is_named(bucket: Any, remote: str, options: RemoteOptions) -> None:
    store = open_store(remote, remote=options)
    del bucket.objects["some/s/frames/grid/c.1.0.0.0"]
    with pytest.raises(StoreError, match=rf"{URL}/frames/grid/c\.1\.0\.0\.0 does not exist"):
        store.read("grid", np.arange(8, 16))
    with pytest.raises(CorruptionError, match=rf"unit 1: {URL}/frames/grid/c\.1\.0\.0\.0 is missing"):
        open_store(remote, remote=options)


def test_a_local_store_is_read_without_the_client_library(local: Any) -> None:
    code = (
        "import sys, numpy; from vla.stores.store import open_store\n"
        f"open_store({str(local.root)!r}).read('grid', numpy.arange(8))\n"
        "loaded = [name for name in sys.modules if name.startswith(('obstore', 'vla.stores.remote.'))]\n"
        "assert loaded == ['vla.stores.remote.options'], loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
