"""Writers that share a store: who may make which unit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.featurize.backbones.toy import Toy
from vla.featurize.job import FeaturizeConfig, Job, prepare, run
from vla.featurize.spread import run_share
from vla.featurize.units import UnitMaker, open_unit_maker, share_of
from vla.stores import shared_writer
from vla.stores import writer as writer_module
from vla.stores.errors import FingerprintError, MachineError, StoreError, UsageError
from vla.stores.filesystem import explaining
from vla.stores.shared_writer import SharedWriter, open_shared_writer
from vla.stores.store import open_store
from vla.stores.writer import open_writer

SETTINGS = {"source": "synthetic:episodes=4,length=[8,8]", "backbone": "toy", "store": {"unit_rows": 8}}


@pytest.fixture(scope="module")
def job() -> Job:
    return prepare(FeaturizeConfig.build(SETTINGS))


class Rival:
    """A second process, and how to speak to it (see rival.py)."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("rival.py")), str(root), json.dumps(SETTINGS)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._answer() == "open"

    def do(self, order: str, unit: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order} {unit}\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def rival(memory_path: Path) -> Iterator[Callable[[], Rival]]:
    begun: list[Rival] = []

    def begin() -> Rival:
        begun.append(Rival(memory_path / "s"))
        return begun[-1]

    yield begin
    for other in begun:
        other.process.kill()
        other.process.communicate()


@pytest.fixture
def writer(job: Job, memory_path: Path) -> Iterator[SharedWriter]:
    with open_shared_writer(memory_path / "s", job.plan.manifest, job.plan.episodes) as writer:
        yield writer


@pytest.mark.slow
def test_a_unit_has_one_claimant_until_it_dies(writer: SharedWriter, rival: Callable[[], Rival]) -> None:
    other = rival()
    assert other.do("claim", 1)
    assert not writer.claim(1)
    assert writer.claim(2)
    assert not other.do("claim", 2)
    writer.release()
    assert other.do("claim", 2)
    other.process.kill()
    other.process.wait()
    assert writer.claim(1)  # the kernel gave it back


@pytest.mark.slow
def test_what_another_commits_is_seen_and_never_made_again(
    job: Job, writer: SharedWriter, rival: Callable[[], Rival], memory_path: Path
) -> None:
    other = rival()
    record = memory_path / "s/commits/unit-000000.json"
    assert other.do("make", 0) == 1
    written = record.stat().st_mtime_ns
    assert writer.pending() == [1, 2, 3]
    assert not writer.claim(0)
    assert UnitMaker(job, writer).make([0, 1]).run.units == 1
    assert record.stat().st_mtime_ns == written
    assert other.do("make", 1) == 0


def test_making_units_gives_back_no_other_claim(job: Job, writer: SharedWriter) -> None:
    assert writer.claim(3)
    assert UnitMaker(job, writer).make([0, 1]).run.units == 2
    writer.begin(3)  # still claimed


def test_a_unit_that_was_not_claimed_cannot_be_begun(writer: SharedWriter) -> None:
    with pytest.raises(StoreError, match="not claimed"):
        writer.begin(0)
    assert writer.claim(0)
    buffer = writer.begin(0)
    writer.release()
    with pytest.raises(StoreError, match="not claimed"):
        writer.commit(buffer)


def test_one_who_does_not_share_is_kept_out_and_keeps_out(job: Job, memory_path: Path) -> None:
    plan, root = (job.plan.manifest, job.plan.episodes), memory_path / "s"
    with open_shared_writer(root, *plan), pytest.raises(StoreError, match="another process"):  # noqa: SIM117
        with open_writer(root, *plan, resume=True):
            pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vla.stores.shared_writer.PATIENCE", 0.1)
        with open_writer(root, *plan, resume=True), pytest.raises(StoreError, match="another process"):  # noqa: SIM117
            with open_shared_writer(root, *plan):
                pass


@pytest.mark.parametrize("moment", ["begin_store", "mkdir", "writer_lock", "fwalk"])
def test_a_store_that_another_makes_at_any_moment_is_joined(
    job: Job, memory_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    plan, root = (job.plan.manifest, job.plan.episodes), memory_path / "s"
    if moment == "fwalk":
        (memory_path / "s.partial").mkdir()  # of one that died
    place: Any = {"begin_store": shared_writer, "writer_lock": writer_module, "fwalk": os}.get(moment, Path)
    real = getattr(place, moment)

    def late(*given: Any, **how: Any) -> Any:
        if given[0] == (root if moment == "begin_store" else memory_path / "s.partial"):
            monkeypatch.setattr(place, moment, real)
            with open_shared_writer(root, *plan):
                pass
        return real(*given, **how)

    monkeypatch.setattr(place, moment, late)
    with open_shared_writer(root, *plan) as writer:
        assert writer.pending() == [0, 1, 2, 3]
    assert getattr(place, moment) is real
    assert [path.name for path in memory_path.iterdir()] == ["s"]


def test_what_died_half_written_is_swept_when_nobody_is_at_work(job: Job, memory_path: Path) -> None:
    plan, root = (job.plan.manifest, job.plan.episodes), memory_path / "s"
    debris = root / "commits/unit-000000.json.partial"
    with open_shared_writer(root, *plan):
        debris.write_bytes(b"half")
        with open_shared_writer(root, *plan):
            assert debris.exists()  # it might be somebody's work
    with open_shared_writer(root, *plan):
        assert not debris.exists()


def test_a_store_of_other_settings_is_not_joined(job: Job, memory_path: Path) -> None:
    other = prepare(FeaturizeConfig.build({**SETTINGS, "source": "synthetic:episodes=4,length=[8,8],seed=1"}))
    with open_shared_writer(memory_path / "s", job.plan.manifest, job.plan.episodes):
        pass
    with pytest.raises(FingerprintError, match=r"source\.digest"):  # noqa: SIM117
        with open_shared_writer(memory_path / "s", other.plan.manifest, other.plan.episodes):
            pass


def test_shares_are_neighbours_and_make_up_the_whole() -> None:
    for count in (0, 1, 5, 16, 17):
        for shares in (1, 2, 7, 16):
            parts = [share_of(range(count), f"{i}/{shares}") for i in range(shares)]
            assert [unit for part in parts for unit in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("1", "2/2", "-1/2", "a/b", "1/0", "/"):
        with pytest.raises(UsageError, match="i/n"):
            share_of(range(4), wrong)


def test_shares_one_after_another_give_the_bytes_of_one_run(
    job: Job, memory_path: Path, committed: Callable[[str], dict[str, bytes]]
) -> None:
    run(job, memory_path / "one")
    for share in ("2/3", "0/3", "1/3"):
        with open_unit_maker(job, memory_path / "shares") as maker:
            maker.make(share_of(range(job.plan.manifest.units), share))
    assert committed("shares") == committed("one")


def test_a_unit_that_fails_is_tried_again_and_set_aside_while_the_others_are_made(
    job: Job, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    begin = SharedWriter.begin

    def fail(writer: SharedWriter, unit: int) -> Any:
        if unit == 2:
            tried.append(unit)
            raise StoreError("unit 2 is cursed")
        return begin(writer, unit)

    monkeypatch.setattr(SharedWriter, "begin", fail)
    frames = []
    with open_unit_maker(job, memory_path / "s") as maker:
        report = maker.make([0, 1, 2, 3], lambda done, total: frames.append((done, total)))
        assert maker.writer.pending() == [2]
        assert maker.writer.claim(2)  # nothing of it is held
    assert report.failed == {2: "unit 2 is cursed"}
    assert tried == [2, 2, 2, 2]  # once with the others, three times alone
    assert (report.run.units, report.run.frames) == (3, 24)
    assert frames[-1] == (24, 32)
    assert np.all(np.diff([done for done, _ in frames][-3:]) >= 0)


def test_a_unit_over_which_the_network_fails_fails_alone(
    job: Job, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, asked = Toy.encode, []

    def fail(backbone: Toy, images: Any) -> Any:
        asked.append(len(images))
        if len(asked) > 2:  # two units are made; the third fails, with the others and alone
            raise torch.OutOfMemoryError("out of memory")
        return encode(backbone, images)

    monkeypatch.setattr(Toy, "encode", fail)
    with open_unit_maker(job, memory_path / "s") as maker:
        report = maker.make([0, 1, 2])
    assert report.run.units == 2
    assert list(report.failed) == [2]
    assert "unit 2: the backbone failed: OutOfMemoryError: out of memory" in report.failed[2]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES"])
def test_a_disk_that_takes_nothing_more_ends_the_run_at_once(
    job: Job, memory_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    tried = []

    def full(path: Path, parts: Any) -> str:
        tried.append(path)
        with explaining(path):
            raise OSError(getattr(errno, code), code, str(path))

    monkeypatch.setattr(writer_module, "write_atomic_parts", full)
    with pytest.raises(MachineError, match="/s/") as raised:
        run_share(job, memory_path / "s", "0/1")
    assert raised.value.exit_code == 4
    assert len(tried) == 1


def test_a_share_counts_the_frames_that_it_committed(
    job: Job, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = SharedWriter.begin

    def leave_out(writer: SharedWriter, unit: int) -> Any:
        buffer = begin(writer, unit)
        if unit == 1:  # one episode
            buffer.leave_out(job.plan.episodes.ids[1], buffer.rows, "bad")
        return buffer

    monkeypatch.setattr(SharedWriter, "begin", leave_out)
    with open_unit_maker(job, memory_path / "s") as maker:
        report = maker.make([0, 1, 2, 3])
    assert (report.run.frames, report.run.units) == (24, 4)
    assert np.flatnonzero(open_store(memory_path / "s").left_out).tolist() == list(range(8, 16))


def test_a_unit_that_fails_once_is_made(job: Job, memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, begin = [], SharedWriter.begin

    def hiccup(writer: SharedWriter, unit: int) -> Any:
        calls.append(unit)
        if calls.count(1) == 1 and unit == 1:
            raise StoreError("a hiccup")
        return begin(writer, unit)

    monkeypatch.setattr(SharedWriter, "begin", hiccup)
    with open_unit_maker(job, memory_path / "s") as maker:
        report = maker.make([0, 1, 2, 3])
    assert (report.failed, report.run.units, report.elsewhere) == ({}, 4, [])
