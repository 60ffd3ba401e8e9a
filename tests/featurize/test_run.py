"""`featurize` from decoding to commit: what comes out, what is left out, and what stays when something fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.image import Image
from vla.featurize.plan import Plan, StoreOptions, make_plan
from vla.featurize.run import RunReport, featurize
from vla.featurize.sources.base import Episode, SourceIndex, StepSpec
from vla.stores import writer as writer_module
from vla.stores.errors import DataError, MachineError, SourceError, VlaError
from vla.stores.inspect import describe
from vla.stores.store import Store, open_store
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer

LENGTHS = (5, 9, 6, 4)


@dataclass
class FakeSource:
    """Pictures that tell episode, frame and camera apart. `bad` maps an episode to the frame that cannot be read."""

    bad: Mapping[int, int] = field(default_factory=dict)
    bad_steps: tuple[int, ...] = ()
    short: Mapping[int, int] = field(default_factory=dict)
    columns: tuple[str, ...] = ("action", "state")
    frames_read: list[tuple[int, int]] = field(default_factory=list)

    def index(self) -> SourceIndex:
        episodes = tuple(Episode(f"episode-{n}", length, f"task {n}") for n, length in enumerate(LENGTHS))
        steps = {"action": StepSpec((2,), "float32", "action"), "state": StepSpec((3,), "float64", "state")}
        return SourceIndex("fake", "nowhere", 10.0, ("front", "wrist"), episodes, steps)

    def digest(self) -> str:
        return "ab" * 32

    def steps(self, episode: int) -> dict[str, np.ndarray[Any, Any]]:
        if episode in self.bad_steps:
            raise SourceError(f"steps of episode {episode}: NaN in action, row 1")
        frame = np.arange(LENGTHS[episode])[:, None]
        every = {"action": frame + np.float32([episode, 0.5]), "state": frame * np.float64([1, 2, 3]) + episode}
        return {name: every[name].astype({"action": "f4", "state": "f8"}[name]) for name in self.columns}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        for frame in range(start, min(stop, self.short.get(episode, stop))):
            if self.bad.get(episode) == frame:
                raise SourceError(f"video {episode}.mp4, camera front, frame {frame} cannot be decoded")
            self.frames_read.append((episode, frame))
            yield picture(episode, frame, 0), picture(episode, frame, 1)


def picture(episode: int, frame: int, camera: int) -> Image:
    return np.full((4, 6, 3), (episode * 50 + frame * 5 + camera * 3) % 256, np.uint8)


@dataclass
class FakeBackbone:
    """One token of four numbers a view, computed elementwise: equal bits whatever the batch."""

    broken_at: int = -1
    value: float = 0.0
    calls: int = 0

    def spec(self) -> BackboneSpec:
        features = {
            "token": FeatureSpec((1, 4), ("token", "channel")),
            "mean": FeatureSpec((2,), ("channel",), "float32"),
        }
        return BackboneSpec("fake", features, {"network": "fake", "layer": 3}, "MIT", "none")

    def preprocess(self, image: Image) -> torch.Tensor:
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        corner = images[:, :, 0, 0, 0]
        token = (corner[..., None, None] * torch.tensor([1.0, -2.0, 0.25, 8.0])).clone()
        if self.calls == self.broken_at:
            token[0, 0, 0, 0] = self.value
        return {"token": token, "mean": torch.stack([corner, -corner], dim=-1)}

    def to(self, device: torch.device) -> None:
        del device


def plan_of(source: FakeSource, unit_rows: int = 8, **changes: Any) -> Plan:
    recipe = {"name": "fake", "weights": None, "options": {}}
    spec = replace(FakeBackbone().spec(), **changes)
    return make_plan(source.index(), source.digest(), spec, recipe, StoreOptions(unit_rows=unit_rows))


def run(
    root: Path,
    source: FakeSource | None = None,
    backbone: Any = None,
    *,
    unit_rows: int = 8,
    resume: bool = False,
    **options: Any,
) -> RunReport:
    source = source or FakeSource()
    plan = plan_of(source, unit_rows)
    with open_writer(root, plan.manifest, plan.episodes, resume=resume) as writer:
        return featurize(source, backbone or FakeBackbone(), writer, plan.episodes, **{"batch_size": 3} | options)


def expected_token(episode: int, frame: int) -> np.ndarray[Any, Any]:
    values = [picture(episode, frame, camera)[0, 0, 0] / np.float32(255) for camera in (0, 1)]
    return (np.float32(values)[:, None, None] * np.float32([1, -2, 0.25, 8])).astype(np.float16)


def require_episode(store: Store, episode: int) -> None:
    start = int(store.episodes.row_start[episode])
    rows = np.arange(start, start + LENGTHS[episode])
    np.testing.assert_array_equal(
        store.read("token", rows), [expected_token(episode, frame) for frame in range(LENGTHS[episode])]
    )
    for name, values in FakeSource().steps(episode).items():
        np.testing.assert_array_equal(store.steps(name)[rows], values)


@contextmanager
def no_thread_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vla-")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_dtype_is_in_the_fingerprint_the_form_is_not(dtype: str) -> None:
    def plan(**options: Any) -> Plan:
        source, recipe = FakeSource(), {"name": "fake", "weights": None, "options": {}}
        store = StoreOptions.build({"unit_rows": 8, **options})
        return make_plan(source.index(), source.digest(), FakeBackbone().spec(), recipe, store)

    plain, other, h5 = plan(), plan(dtype=dtype), plan(format="h5")
    assert other.manifest.fingerprint["features"]["token"]["dtype"] == dtype
    assert other.manifest.fingerprint != plain.manifest.fingerprint
    assert h5.manifest.fingerprint == plain.manifest.fingerprint
    assert h5.manifest.sha256() != plain.manifest.sha256()
    assert (h5.manifest.format, h5.files) == ("h5", 3 * 2 + 20)


def test_a_unit_of_int8_is_planned_by_the_memory_that_it_takes() -> None:
    """Its rows wait as float32 until their scales are known."""
    source, recipe = FakeSource(), {"name": "fake", "weights": None, "options": {}}
    index = replace(source.index(), episodes=(Episode("long", 5000, "task"),))
    spec = replace(FakeBackbone().spec(), features={"token": FeatureSpec((8, 64), ("token", "channel"))})
    rows = {}
    for dtype in ("float16", "float32", "int8"):
        options = StoreOptions.build({"unit_mb": 1.0, "dtype": dtype})
        rows[dtype] = make_plan(index, "", spec, recipe, options).manifest.unit_rows
    assert rows == {"float16": 512, "float32": 256, "int8": 256}


def test_each_frame_gets_the_features_of_its_own_pictures(tmp_path: Path) -> None:
    report = run(tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert store.episodes.ids == tuple(f"episode-{n}" for n in range(4))
    for episode in range(4):
        require_episode(store, episode)
    assert verify_store(tmp_path / "s").findings == []
    assert (report.frames, report.units, report.skipped) == (24, 3, {})
    assert {"decode", "preprocess", "encode", "copy", "write"} <= report.busy.keys()
    assert report.to_json()["frames_per_s"] > 0


def test_two_runs_write_equal_bytes(tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("batch_size", [1, 2, 8, 100])
def test_the_batch_size_changes_no_byte(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]], batch_size: int
) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two", batch_size=batch_size)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("unit_rows", [1, 5, 24, 1000])
def test_the_unit_size_changes_no_value(tmp_path: Path, unit_rows: int) -> None:
    run(tmp_path / "s", unit_rows=unit_rows)
    store = open_store(tmp_path / "s")
    for episode in range(4):
        require_episode(store, episode)


def test_progress_counts_frames_up_to_all_of_them(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(tmp_path / "s", progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [24] * len(seen)
    done = [done for done, _ in seen]
    assert done == sorted(set(done))
    assert done[-1] == 24


def test_a_complete_store_is_left_alone(tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]) -> None:
    run(tmp_path / "s")
    before, source = files_of(tmp_path / "s"), FakeSource()
    report = run(tmp_path / "s", source, resume=True)
    assert (report.frames, report.units, source.frames_read) == (0, 0, [])
    assert files_of(tmp_path / "s") == before


def test_resume_reads_only_the_rows_that_are_missing(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    run(tmp_path / "whole")
    with pytest.raises(SourceError):
        run(tmp_path / "s", FakeSource(bad={1: 3}))  # row 8, the first of unit 1
    source = FakeSource()
    report = run(tmp_path / "s", source, resume=True)
    assert report.frames == 16
    assert source.frames_read[:3] == [(1, 3), (0, 0), (1, 4)]  # the source's first frame tells the size of all
    assert len(source.frames_read) == 17
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


# ---- bad episodes ----


def test_without_skip_bad_the_error_surfaces_and_earlier_units_stay(tmp_path: Path) -> None:
    with no_thread_left(), pytest.raises(SourceError, match=r"video 2\.mp4, camera front, frame 4"):
        run(tmp_path / "s", FakeSource(bad={2: 4}))  # row 18, in unit 2
    store = open_store(tmp_path / "s", allow_partial=True)
    assert sorted(store.commits) == [0, 1]
    assert store.usable.tolist() == [True, True, False, False]
    require_episode(store, 0)
    require_episode(store, 1)


@pytest.mark.parametrize("frame", [0, 1, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_with_skip_bad_an_episode_is_left_out_and_named(tmp_path: Path, frame: int, batch_size: int) -> None:
    report = run(tmp_path / "s", FakeSource(bad={1: frame}), skip_bad=True, batch_size=batch_size)
    store = open_store(tmp_path / "s")
    assert store.complete
    assert store.usable.tolist() == [True, False, True, True]
    assert list(store.skipped) == list(report.skipped) == ["episode-1"]
    assert f"frame {frame} cannot be decoded" in store.skipped["episode-1"]
    for episode in (0, 2, 3):
        require_episode(store, episode)
    assert verify_store(tmp_path / "s").findings == []


def test_an_episode_left_out_counts_in_no_statistic_of_its_unit(tmp_path: Path) -> None:
    run(tmp_path / "s", FakeSource(bad={1: 8}), unit_rows=24, skip_bad=True)
    store = open_store(tmp_path / "s")
    rows = np.flatnonzero(~np.isin(np.arange(24), np.arange(5, 14)))
    total = store.statistics("token")
    assert total.count == 15 * 2
    np.testing.assert_allclose(total.mean, store.read("token", rows).astype("f8").mean(axis=(0, 1, 2)), rtol=1e-12)


def test_an_episode_that_breaks_in_its_second_unit_counts_with_its_rows_in_the_first(tmp_path: Path) -> None:
    """Report, statistics and what is committed say the same number; only whole episodes are usable."""
    report = run(tmp_path / "s", FakeSource(bad={1: 5}), skip_bad=True)  # rows 5 to 13, of which row 10 does not read
    store = open_store(tmp_path / "s")
    assert report.frames == np.count_nonzero(~store.left_out) == store.statistics("token").count / 2 == 18
    assert describe(tmp_path / "s")["frames"] == 15
    np.testing.assert_array_equal(
        store.read("token", np.arange(5, 8)), [expected_token(1, frame) for frame in range(3)]
    )
    assert verify_store(tmp_path / "s").findings == []


def test_several_bad_episodes_are_left_out_each_with_its_reason(tmp_path: Path) -> None:
    source = FakeSource(bad={0: 0, 3: 3}, bad_steps=(2,), short={1: 9})
    run(tmp_path / "s", source, skip_bad=True)
    store = open_store(tmp_path / "s")
    assert store.usable.tolist() == [False, True, False, False]
    assert "NaN in action" in store.skipped["episode-2"]
    require_episode(store, 1)


def test_an_episode_with_fewer_frames_than_steps_is_bad(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'episode-1' has no frame 7"):
        run(tmp_path / "one", FakeSource(short={1: 7}))
    run(tmp_path / "two", FakeSource(short={1: 7}), skip_bad=True)
    assert open_store(tmp_path / "two").usable.tolist() == [True, False, True, True]


def test_a_column_that_was_declared_and_does_not_come_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="state"):
        run(tmp_path / "s", FakeSource(columns=("action",)))


def test_nothing_but_bad_episodes_makes_a_complete_store_of_nothing(tmp_path: Path) -> None:
    run(tmp_path / "s", FakeSource(bad=dict.fromkeys(range(4), 0)), skip_bad=True)
    store = open_store(tmp_path / "s")
    assert store.complete
    assert not store.usable.any()
    assert verify_store(tmp_path / "s").findings == []


def test_skipping_and_resuming_gives_the_bytes_of_skipping_at_once(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    run(tmp_path / "whole", FakeSource(bad={1: 2, 3: 1}), skip_bad=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", FakeSource(bad={1: 2, 3: 1}), skip_bad=True, progress=interrupt_after(12))
    run(tmp_path / "s", FakeSource(bad={1: 2, 3: 1}), skip_bad=True, resume=True)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


# ---- failures elsewhere ----


def interrupt_after(frames: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= frames:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_keeps_what_is_committed_and_ends_the_threads(tmp_path: Path) -> None:
    with no_thread_left(), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", progress=interrupt_after(20))
    assert sorted(open_store(tmp_path / "s", allow_partial=True).commits) == [0, 1]


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "'token' is not finite in row 14"), (70000.0, "'token' exceeds float16 in row 14")],
)
def test_features_that_cannot_be_kept_are_refused_naming_the_row(tmp_path: Path, value: float, said: str) -> None:
    with no_thread_left(), pytest.raises(DataError, match=said):
        run(tmp_path / "s", backbone=FakeBackbone(broken_at=6, value=value))  # 3 + 3 + 2, then 3 + 3: rows 14 and 15
    assert sorted(open_store(tmp_path / "s", allow_partial=True).commits) == [0]


def test_an_error_of_the_network_surfaces_and_ends_the_threads(tmp_path: Path) -> None:
    class Broken(FakeBackbone):
        def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.calls == 4:
                raise RuntimeError("out of memory")
            return super().encode(images)

    with no_thread_left(), pytest.raises(DataError, match=r"unit 1: the backbone failed: RuntimeError: out of memory$"):
        run(tmp_path / "s", backbone=Broken())
    assert sorted(open_store(tmp_path / "s", allow_partial=True).commits) == [0]


def test_memory_that_runs_out_on_a_device_names_the_unit_and_what_to_type(tmp_path: Path) -> None:
    """A device says so when its work is waited for, after the next batch has been begun."""

    class Late(torch.Tensor):
        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            raise torch.OutOfMemoryError("out of memory\nand more")

    class Broken(FakeBackbone):
        def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            features = super().encode(images)
            return {name: values.as_subclass(Late) for name, values in features.items()} if self.calls > 3 else features

    said = r"unit 1: the backbone failed: OutOfMemoryError: out of memory\. Try: a smaller --set batch_size=N"
    with no_thread_left(), pytest.raises(DataError, match=said) as raised:
        run(tmp_path / "s", backbone=Broken())
    assert "\n" not in str(raised.value)


def test_an_error_of_preprocessing_names_the_episode(tmp_path: Path) -> None:
    class Broken(FakeBackbone):
        def preprocess(self, image: Image) -> torch.Tensor:
            if image[0, 0, 0] >= picture(2, 0, 0)[0, 0, 0]:
                raise RuntimeError("no such kernel")
            return super().preprocess(image)

    with (
        no_thread_left(),
        pytest.raises(DataError, match=r"episode 'episode-2': the backbone failed: .*no such kernel"),
    ):
        run(tmp_path / "s", backbone=Broken())


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_an_error_of_the_disk_surfaces_whichever_unit_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int
) -> None:
    real = writer_module.write_atomic_parts

    def fail(path: Path, parts: Any) -> str:
        if path.name.startswith(f"c.{unit}.") and path.parent.name == "mean":
            raise MachineError(f"{path}: the disk is full")
        return real(path, parts)

    monkeypatch.setattr(writer_module, "write_atomic_parts", fail)
    with no_thread_left(), pytest.raises(MachineError, match="the disk is full"):
        run(tmp_path / "s")
    assert sorted(open_store(tmp_path / "s", allow_partial=True).commits) == list(range(unit))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_picture_of_another_size_is_refused(tmp_path: Path, batch_size: int) -> None:
    """Episode 2 has larger pictures than those before it."""

    class Growing(FakeBackbone):
        def preprocess(self, image: Image) -> torch.Tensor:
            taller = image[0, 0, 0] >= picture(2, 0, 0)[0, 0, 0]
            return super().preprocess(np.pad(image, ((0, int(taller)), (0, 0), (0, 0)), mode="edge"))

    with no_thread_left(), pytest.raises(VlaError, match="network input"):
        run(tmp_path / "s", backbone=Growing(), batch_size=batch_size)


def test_which_pictures_are_of_another_size_does_not_depend_on_the_unit_that_comes_first(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    """Episode 1, in units 0 and 1, has larger pictures: alone in its unit or not, it is the one that is left out."""

    class Taller(FakeBackbone):
        def preprocess(self, image: Image) -> torch.Tensor:
            taller = 50 <= image[0, 0, 0] < 100
            return super().preprocess(np.pad(image, ((0, int(taller)), (0, 0), (0, 0)), mode="edge"))

    plan, source = plan_of(FakeSource()), FakeSource()
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        root = tmp_path / "".join(map(str, order))
        for unit in order:  # each in a process of its own, as it were
            with open_writer(root, plan.manifest, plan.episodes, resume=root.exists()) as writer:
                featurize(source, Taller(), writer, plan.episodes, units=[unit], batch_size=3, skip_bad=True)
        assert list(open_store(root).skipped) == ["episode-1"]
        assert files_of(root) == files_of(tmp_path / "012")


# ---- the plan's fingerprint ----


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"identity": {"network": "fake", "layer": 4}},
        {"context": 1},
        {"features": {"token": FeatureSpec((1, 4), ("token", "channel"), "float32")}},
    ],
)
def test_what_changes_a_feature_changes_the_fingerprint(change: dict[str, Any]) -> None:
    source = FakeSource()
    assert plan_of(source, **change).manifest.fingerprint != plan_of(source).manifest.fingerprint


def test_how_a_store_is_cut_changes_no_fingerprint() -> None:
    source = FakeSource()
    assert plan_of(source, 4).manifest.fingerprint == plan_of(source, 8).manifest.fingerprint
    licence = {"code_licence": "other", "weights_licence": "other", "parameters": 7}
    assert plan_of(source, **licence).manifest.fingerprint == plan_of(source).manifest.fingerprint
