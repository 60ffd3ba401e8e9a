"""Writing to a bucket: the same bytes as on disk, whatever happens on the way."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import CorruptionError, FingerprintError, MachineError, StoreError, UsageError, missing_extra
from vla.stores.remote.bucket import Bucket
from vla.stores.remote.lease import LEASE, Lease
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.verify import verify_remote
from vla.stores.store import open_store

URL = "s3://bucket/some/s"


def expected(local: Any, files_of: Callable[[Path], dict[str, bytes]]) -> dict[str, bytes]:
    return {path: data for path, data in files_of(local.root).items() if not path.endswith("writer.lock")}


def test_a_remote_store_holds_the_bytes_of_the_local_one(
    bucket: Any, local: Any, remote: str, content: Any, files_of: Any, options: RemoteOptions
) -> None:
    assert content(bucket) == expected(local, files_of)
    assert not [path for path in options.folder.rglob("c.*") if path.is_file()]  # nothing stays in the staging folder


def test_writing_through_failing_requests_gives_the_same_bytes(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any, content: Any, files_of: Any
) -> None:
    rng = random.Random(0)
    faults = ["500", "503", "reset"]
    bucket.fault = lambda request: rng.choice(faults) if rng.random() < 0.25 else None
    write_remote(local, options.model_copy(update={"attempts": 12}))
    bucket.fault = lambda request: None
    assert content(bucket) == expected(local, files_of)


def test_an_answer_that_got_lost_after_a_record_was_made_is_no_second_writer(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any, content: Any, files_of: Any
) -> None:
    lost: set[str] = set()

    def fault(request: Any) -> str | None:
        record = request.method == "PUT" and request.key.endswith(".json") and "commits/" in request.key
        if record and request.key not in lost:
            lost.add(request.key)
            return "truncate-answer"
        return None

    bucket.fault = fault
    write_remote(local, options)
    assert len(lost) == local.manifest.units
    assert content(bucket) == expected(local, files_of)


def test_large_files_go_up_in_parts(
    bucket: Any, make_store: Any, memory_path: Path, options: RemoteOptions, write_remote: Any, content: Any
) -> None:
    big = make_store(memory_path / "big", lengths=(4,), unit_rows=4, features={"map": ((1, 900_000), "float16")})
    write_remote(big, options)
    assert any("partNumber" in request.query for request in bucket.requests)
    shard = "frames/map/c.0.0.0"
    assert content(bucket)[shard] == (big.root / shard).read_bytes()
    assert bucket.uploads == {}


def test_resuming_makes_what_is_missing_and_leaves_commits_alone(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any, content: Any, files_of: Any
) -> None:
    write_remote(local, options, units=1)
    with pytest.raises(StoreError, match="1 of 3 units"):
        open_store(URL, remote=options)
    with pytest.raises(UsageError, match=r"s3://bucket/some/s exists. Try: --resume"):
        write_remote(local, options)
    bucket.requests.clear()
    write_remote(local, options, resume=True)
    assert content(bucket) == expected(local, files_of)
    assert not [r for r in bucket.requests if r.method == "PUT" and "c.0" in r.key.rpartition("/")[2][:3]]


def test_resuming_with_other_settings_is_refused_and_names_the_url(
    bucket: Any, remote: str, local: Any, make_store: Any, memory_path: Path, options: RemoteOptions, write_remote: Any
) -> None:
    other = make_store(memory_path / "other", lengths=(9, 11, 4), source="source-b")
    with pytest.raises(FingerprintError, match=URL) as raised:
        write_remote(other, options, resume=True)
    assert str(options.folder) not in str(raised.value)


def test_overwriting_replaces_the_store(
    bucket: Any,
    remote: str,
    make_store: Any,
    memory_path: Path,
    options: RemoteOptions,
    write_remote: Any,
    content: Any,
    files_of: Any,
) -> None:
    other = make_store(memory_path / "other", lengths=(5,), source="source-b")
    write_remote(other, options, overwrite=True)
    assert content(bucket) == expected(other, files_of)


def test_a_store_with_labels_whose_making_was_cut_short_is_made_again(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any, content: Any
) -> None:
    ids = local.episodes.ids
    episodes = replace(local.episodes, label=np.arange(len(ids)), labels=tuple({"whole": name} for name in ids))
    labelled = replace(local, episodes=episodes)
    write_remote(labelled, options)
    whole = content(bucket)
    for path in whole:  # all but the metadata below the root
        if path == "zarr.json" or path.startswith("commits/"):
            del bucket.objects[f"some/s/{path}"]
    write_remote(labelled, options)
    assert content(bucket) == whole


def test_a_folder_that_is_no_store_is_left_alone(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any
) -> None:
    bucket.objects["some/s/holiday.jpg"] = b"picture"
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(StoreError, match=r"no store and holds holiday\.jpg"):
            write_remote(local, options, **flags)
    assert list(bucket.objects) == ["some/s/holiday.jpg"]


def test_a_second_writer_is_refused_while_the_first_lives(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any, tmp_path: Path
) -> None:
    elsewhere = options.model_copy(update={"cache": str(tmp_path / "elsewhere")})

    def second(unit: int) -> None:
        if unit == 1:
            with pytest.raises(StoreError, match=r"s3://bucket/some/s is being written by another process"):
                write_remote(local, options, resume=True)
            with pytest.raises(StoreError, match=rf"is being written by .*, process {os.getpid()}"):
                write_remote(local, elsewhere, resume=True)

    write_remote(local, options, pace=second)
    assert f"some/s/{LEASE}" not in bucket.objects
    assert verify_remote(URL, options, lambda done, total: None).findings == []


def test_a_writer_whose_claim_was_taken_over_commits_nothing_more(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any
) -> None:
    short = options.model_copy(update={"lease_s": 0.3})

    def usurp(unit: int) -> None:
        if unit == 1:
            bucket.objects[f"some/s/{LEASE}"] = b'{"id": "another", "until": 9e12}'
            time.sleep(0.4)

    with pytest.raises(StoreError, match="was taken over by another writer"):
        write_remote(local, short, pace=usurp)
    assert "some/s/commits/unit-000000.json" in bucket.objects
    assert "some/s/commits/unit-000001.json" not in bucket.objects
    assert b"another" in bucket.objects[f"some/s/{LEASE}"]  # and the other's claim stands


def test_a_claim_is_renewed_while_its_writer_lives(bucket: Any, options: RemoteOptions) -> None:
    lease = Lease(Bucket(URL, options.model_copy(update={"lease_s": 0.3})))
    lease.acquire()
    time.sleep(0.7)
    lease.require()
    lease.release()
    assert bucket.objects == {}


def test_a_claim_that_has_ended_is_taken_over(bucket: Any, options: RemoteOptions) -> None:
    bucket.objects[f"some/s/{LEASE}"] = b'{"id": "x", "host": "elsewhere", "pid": 1, "until": 1}'
    lease = Lease(Bucket(URL, options))
    lease.acquire()
    lease.require()
    lease.release()


def test_a_record_of_another_writer_is_never_replaced(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any
) -> None:
    def intrude(unit: int) -> None:
        if unit == 1:
            bucket.objects["some/s/commits/unit-000001.json"] = b"another writer's"

    with pytest.raises(StoreError, match=r"unit-000001\.json exists and differs"):
        write_remote(local, options, pace=intrude)
    assert bucket.objects["some/s/commits/unit-000001.json"] == b"another writer's"


def test_a_server_without_conditional_puts_is_looked_at_first(
    bucket: Any,
    local: Any,
    options: RemoteOptions,
    write_remote: Any,
    content: Any,
    files_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    write_remote(local, options)
    assert content(bucket) == expected(local, files_of)


@pytest.mark.parametrize("fault", ["500", "reset", "stall"])
def test_a_failure_that_lasts_is_one_line_naming_the_url(
    bucket: Any, local: Any, options: RemoteOptions, write_remote: Any, fault: str
) -> None:
    bucket.stall_s = 0.4
    bucket.fault = lambda request: fault
    with pytest.raises(MachineError, match=r"s3://bucket/some/s.*\(2 attempts\)") as raised:
        write_remote(local, options.model_copy(update={"attempts": 2, "timeout_s": 0.1}))
    assert "\n" not in str(raised.value)


def test_a_request_that_is_wrong_is_not_tried_again(bucket: Any, options: RemoteOptions) -> None:
    bucket.fault = lambda request: "400"
    with pytest.raises(MachineError, match="400"):
        Bucket(URL, options).objects()
    assert len(bucket.requests) == 1


def test_missing_credentials_say_what_to_set(
    bucket: Any, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # no cloud machine with a role of its own
    with pytest.raises(MachineError, match=r"s3://bucket.*Try: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store(URL, remote=options.model_copy(update={"attempts": 1}))


def test_a_missing_client_library_names_the_extra(options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(MachineError, match=re.escape(missing_extra("remote"))):
        open_store(URL, remote=options)


def test_verifying_finds_a_flipped_byte_and_a_missing_object(
    bucket: Any, remote: str, local: Any, options: RemoteOptions
) -> None:
    quiet = lambda done, total: None  # noqa: E731
    report = verify_remote(remote, options, quiet)
    assert report.findings == []
    assert report.files == len(local.open().commits) * (3 * 2 + 3)
    for path in ("frames/grid/c.1.0.0.0", "steps/action/c.1.0", "checksums/pooled/c.1"):
        key, array = f"some/s/{path}", "/".join(path.split("/")[:2])
        whole = bucket.objects[key]
        bucket.objects[key] = whole[:5] + bytes([whole[5] ^ 1]) + whole[6:]
        (finding,) = verify_remote(remote, options, quiet).findings
        assert finding == f"array {array}, unit 1: {remote}/{path} differs from its commit"
        del bucket.objects[key]
        (finding,) = verify_remote(remote, options, quiet).findings
        assert finding == f"array {array}, unit 1: {remote}/{path} is missing"
        bucket.objects[key] = whole
    record = bucket.objects["some/s/commits/unit-000002.json"]
    bucket.objects["some/s/commits/unit-000002.json"] = record.replace(b"9", b"8", 1)
    (finding,) = verify_remote(remote, options, quiet).findings
    assert "unit-000002.json does not match its digest" in finding
    with pytest.raises(CorruptionError, match=URL):
        open_store(remote, remote=options)


def test_overwriting_refuses_a_store_beside_which_there_are_objects_of_somebody_else(
    bucket: Any, remote: str, local: Any, options: RemoteOptions, write_remote: Any
) -> None:
    bucket.objects["some/s/notes/plan.txt"] = b"mine"
    before = dict(bucket.objects)
    with pytest.raises(UsageError, match=r"notes/plan\.txt"):
        write_remote(local, options, overwrite=True)
    assert bucket.objects == before
