"""Writing LeRobot v3.0: what is on disk is read back with pyarrow and PyAV alone, and compared with what went in."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.rollout import lerobot_writer
from vla.rollout.lerobot_stats import column_stats, image_histogram, image_stats
from vla.rollout.lerobot_writer import LeRobotWriter, Summary, VectorFeature
from vla.rollout.video_writer import VideoFile
from vla.stores.errors import DataError, MachineError, UsageError

SIZE = 16
FPS = 20.0
CAMERAS = ("left", "top")
VECTORS = {
    "action": VectorFeature(("dx", "dy")),
    "observation.environment_state": VectorFeature(("a", "b", "c"), privileged=True),
}
Vectors = dict[str, np.ndarray]
Images = dict[str, list[np.ndarray]]


def make_episode(number: int, length: int) -> tuple[Vectors, Images, str]:
    """Grey frames whose level tells episode, frame and camera apart after lossy compression (steps of 8 levels)."""
    generator = np.random.default_rng(number)
    vectors = {name: generator.normal(size=(length, len(f.names))).astype(np.float32) for name, f in VECTORS.items()}
    images = {
        camera: [np.full((SIZE, SIZE, 3), level_of(number, frame, camera), np.uint8) for frame in range(length)]
        for camera in CAMERAS
    }
    return vectors, images, f"task {number % 2}"


def level_of(number: int, frame: int, camera: str) -> int:
    return 8 * ((7 * number + frame + 13 * CAMERAS.index(camera)) % 32)


LENGTHS = (5, 3, 7, 4)


def write(out: Path, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Summary:
    with open_writer(out, **options) as writer:
        for number, length in enumerate(lengths):
            writer.add_episode(*make_episode(number, length))
        summary = writer.seal()
        writer.publish()
    return summary


def open_writer(out: Path, **options: Any) -> LeRobotWriter:
    defaults: dict[str, Any] = {"vectors": VECTORS, "cameras": CAMERAS, "image_size": SIZE, "fps": FPS}
    return LeRobotWriter(out, **(defaults | {"robot_type": "toy"} | options))


def read_info(root: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((root / "meta" / "info.json").read_text())
    return info


def read_episodes(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def decode(file: Path) -> dict[float, np.ndarray]:
    """Presentation time in seconds to RGB picture."""
    with av.open(str(file)) as container:
        return {frame.time: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lerobot") / "set"
    write(out, info={"license": "MIT"})
    return out


class TestLayout:
    def test_info_says_what_is_there(self, written: Path) -> None:
        info = read_info(written)
        assert (info["codebase_version"], info["robot_type"], info["license"]) == ("v3.0", "toy", "MIT")
        assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 19, 2)
        assert (info["fps"], info["splits"]) == (20, {"train": "0:4"})
        assert (info["chunks_size"], info["data_files_size_in_mb"], info["video_files_size_in_mb"]) == (1000, 100, 200)

    def test_features_are_described_column_by_column(self, written: Path) -> None:
        features = read_info(written)["features"]
        assert features["action"] == {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]}
        assert features["observation.images.top"]["dtype"] == "video"
        assert features["observation.images.top"]["shape"] == [SIZE, SIZE, 3]
        assert features["observation.images.top"]["info"]["video.codec"] == "h264"
        assert {features[name]["dtype"] for name in ("frame_index", "index", "task_index")} == {"int64"}

    def test_only_simulator_truth_is_marked_privileged(self, written: Path) -> None:
        features = read_info(written)["features"]
        assert [name for name in features if features[name].get("privileged")] == ["observation.environment_state"]

    def test_data_columns_have_the_types_of_the_format(self, written: Path) -> None:
        schema = pq.read_schema(written / "data/chunk-000/file-000.parquet")
        assert schema.field("action").type == pa.list_(pa.float32(), 2)
        assert schema.field("observation.environment_state").type == pa.list_(pa.float32(), 3)
        assert schema.field("timestamp").type == pa.float32()
        for name in ("frame_index", "episode_index", "index", "task_index"):
            assert schema.field(name).type == pa.int64()

    def test_tasks_are_the_index_of_their_table(self, written: Path) -> None:
        tasks = pd.read_parquet(written / "meta/tasks.parquet")
        assert list(tasks.index) == ["task 0", "task 1"]
        assert tasks["task_index"].tolist() == [0, 1]
        assert "__index_level_0__" in pq.read_schema(written / "meta/tasks.parquet").names

    def test_every_path_of_an_episode_exists(self, written: Path) -> None:
        info = read_info(written)
        for row in read_episodes(written):
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            assert (written / info["data_path"].format(**place)).is_file()
            for camera in CAMERAS:
                key = f"observation.images.{camera}"
                place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
                assert (written / info["video_path"].format(video_key=key, **place)).is_file()


def check_every_frame_and_row(root: Path, lengths: tuple[int, ...]) -> None:
    """Follow the episode table as a reader does, and compare each number and picture with what went in."""
    info = read_info(root)
    videos: dict[Path, dict[float, np.ndarray]] = {}
    start = 0
    for number, (row, length) in enumerate(zip(read_episodes(root), lengths, strict=True)):
        vectors, images, task = make_episode(number, length)
        assert (row["episode_index"], row["length"], row["tasks"]) == (number, length, [task])
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (start, start + length)
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        table = pq.read_table(root / info["data_path"].format(**place)).to_pandas()
        rows = table[table["episode_index"] == number]
        np.testing.assert_array_equal(np.stack(rows["action"].to_list()), vectors["action"])
        np.testing.assert_allclose(rows["timestamp"], np.arange(length) / FPS, rtol=1e-6)
        assert rows["frame_index"].tolist() == list(range(length))
        assert rows["index"].tolist() == list(range(start, start + length))
        assert set(rows["task_index"]) == {number % 2}
        for camera in CAMERAS:
            key = f"observation.images.{camera}"
            place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            file = root / info["video_path"].format(video_key=key, **place)
            frames = videos.setdefault(file, decode(file))
            first, last = row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"]
            assert last - first == pytest.approx(length / FPS)
            for index, image in enumerate(images[camera]):
                nearest = min(frames, key=lambda t, wanted=first + index / FPS: abs(t - wanted))
                assert abs(nearest - first - index / FPS) < 1e-6, "the timestamp belongs to a frame exactly"
                assert abs(frames[nearest].astype(int) - image).max() <= 3, f"{camera}, episode {number}, {index}"
        start += length


class TestFrames:
    def test_every_row_and_every_frame_is_where_the_episode_table_says(self, written: Path) -> None:
        check_every_frame_and_row(written, LENGTHS)

    def test_full_files_are_followed_by_new_ones(self, tmp_path: Path) -> None:
        lengths = (40,) * 6  # the encoder looks 40 frames ahead before it gives a first byte
        write(tmp_path / "set", lengths, data_files_size_in_mb=0.001, video_files_size_in_mb=0.0003)
        assert len(list((tmp_path / "set/data").rglob("*.parquet"))) > 2
        assert len(list((tmp_path / "set/videos/observation.images.top").rglob("*.mp4"))) > 2
        assert len(list((tmp_path / "set/meta/episodes").rglob("*.parquet"))) == 6
        check_every_frame_and_row(tmp_path / "set", lengths)

    def test_full_chunks_are_followed_by_new_ones(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lerobot_writer, "CHUNKS_SIZE", 2)
        write(tmp_path / "set", (9,) * 5, data_files_size_in_mb=0.0001)
        found = sorted(
            p.relative_to(tmp_path / "set/data").as_posix() for p in (tmp_path / "set/data").rglob("*.parq*")
        )
        assert found == [f"chunk-{n // 2:03d}/file-{n % 2:03d}.parquet" for n in range(5)]
        check_every_frame_and_row(tmp_path / "set", (9,) * 5)

    def test_every_sixtieth_frame_is_a_keyframe_and_none_waits_for_a_later_one(self, tmp_path: Path) -> None:
        video = VideoFile(tmp_path / "still.mp4", fps=Fraction(20), height=SIZE, width=SIZE)
        video.append([np.full((SIZE, SIZE, 3), 99, np.uint8)] * 130)
        video.close()
        with av.open(str(tmp_path / "still.mp4")) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [n % 60 == 0 for n in range(130)]
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]

    def test_equal_episodes_give_equal_bytes(
        self, written: Path, tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
    ) -> None:
        write(tmp_path / "again", info={"license": "MIT"})
        assert files_of(tmp_path / "again") == files_of(written)


class TestStatistics:
    def test_columns_agree_with_numpy(self, written: Path) -> None:
        stats = json.loads((written / "meta/stats.json").read_text())["action"]
        values = np.concatenate([make_episode(n, length)[0]["action"] for n, length in enumerate(LENGTHS)])
        np.testing.assert_allclose(stats["mean"], values.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats["std"], values.std(axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats["q10"], np.quantile(values, 0.1, axis=0), rtol=1e-5)
        assert (stats["min"], stats["count"]) == (values.min(axis=0).tolist(), [19])

    @pytest.mark.parametrize("share", ["q01", "q10", "q50", "q90", "q99"])
    def test_quantiles_of_images_agree_with_numpy_over_all_pixels(self, share: str) -> None:
        images = [np.random.default_rng(n).integers(0, 256, (5, 3, 3), np.uint8) for n in range(4)]
        stats = image_stats(image_histogram(images), 4)
        pixels = np.stack(images).reshape(-1, 3) / 255
        np.testing.assert_allclose(np.ravel(stats[share]), np.quantile(pixels, int(share[1:]) / 100, axis=0))

    def test_other_statistics_of_images_agree_with_numpy_over_all_pixels(self) -> None:
        images = [np.random.default_rng(n).integers(3, 200, (5, 3, 3), np.uint8) for n in range(4)]
        stats = image_stats(image_histogram(images), 4)
        pixels = np.stack(images).reshape(-1, 3) / 255
        for name, reduce in {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}.items():
            assert np.shape(stats[name]) == (3, 1, 1)
            np.testing.assert_allclose(np.ravel(stats[name]), reduce(pixels, axis=0))

    def test_scalars_have_one_component(self) -> None:
        stats = column_stats(np.arange(5))
        assert (stats["min"], stats["max"], stats["q50"], stats["count"]) == ([0.0], [4.0], [2.0], [5])

    def test_episode_rows_carry_their_own_statistics(self, written: Path) -> None:
        row = read_episodes(written)[2]
        values = make_episode(2, LENGTHS[2])[0]["action"]
        np.testing.assert_allclose(row["stats/action/max"], values.max(axis=0))
        assert row["stats/observation.images.left/count"] == [LENGTHS[2]]
        levels = [level_of(2, frame, "left") / 255 for frame in range(LENGTHS[2])]
        np.testing.assert_allclose(row["stats/observation.images.left/mean"], np.full((3, 1, 1), np.mean(levels)))


class TestPublishing:
    def test_nothing_has_the_name_before_it_is_published(self, tmp_path: Path) -> None:
        with open_writer(tmp_path / "set") as writer:
            writer.add_episode(*make_episode(0, 3))
            writer.seal()
            assert not (tmp_path / "set").exists()
            writer.publish()
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    def test_an_error_leaves_nothing_behind(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path / "set")
        writer.add_episode(*make_episode(0, 3))
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_data_set_is_refused_and_left_alone(
        self, tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
    ) -> None:
        write(tmp_path / "set")
        before = files_of(tmp_path)
        with pytest.raises(UsageError, match=r"exists: refuse to replace it.*--overwrite"):
            open_writer(tmp_path / "set")
        assert files_of(tmp_path) == before

    def test_overwrite_replaces_a_data_set_only_when_the_new_one_is_whole(self, tmp_path: Path) -> None:
        write(tmp_path / "set")
        with open_writer(tmp_path / "set", overwrite=True) as writer:
            writer.add_episode(*make_episode(0, 3))
            writer.seal()
            assert read_info(tmp_path / "set")["total_episodes"] == 4
            writer.publish()
        assert read_info(tmp_path / "set")["total_episodes"] == 1
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    def test_overwrite_never_replaces_a_folder_that_is_no_data_set(self, tmp_path: Path) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
        with pytest.raises(UsageError, match="no LeRobot data set"):
            open_writer(tmp_path / "thesis", overwrite=True)
        assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"

    def test_an_empty_folder_may_be_filled(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        write(tmp_path / "set")
        assert read_info(tmp_path / "set")["total_episodes"] == 4

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(pq, "write_table", fail)
        with pytest.raises(MachineError, match="the disk is full"):
            write(tmp_path / "set")
        assert list(tmp_path.iterdir()) == []


class TestRefusals:
    def test_an_odd_image_size_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="image size 15; expected an even number"):
            open_writer(tmp_path / "set", image_size=15)

    def test_a_data_set_without_episodes_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no episode was recorded"), open_writer(tmp_path / "set") as writer:
            writer.seal()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda v, i: v["action"].__setitem__((1, 0), np.nan), "action holds NaN"),
            (lambda v, i: v.update(action=v["action"][:2]), r"observation.environment_state is \[3, 3\]"),
            (lambda v, i: v.update(action=v["action"][:, :1]), r"action is \[3, 1\]; expected \[3, 2\]"),
            (lambda v, i: i["top"].pop(), "camera top has 2 frames; expected 3"),
            (lambda v, i: i["top"].__setitem__(0, np.zeros((8, 8, 3), np.uint8)), "camera top"),
            (lambda v, i: i.pop("top"), "expected action, observation.environment_state, left, top"),
        ],
    )
    def test_an_episode_that_does_not_fit_is_refused_by_name(
        self, tmp_path: Path, spoil: Callable[[Vectors, Images], object], message: str
    ) -> None:
        vectors, images, task = make_episode(0, 3)
        spoil(vectors, images)
        with pytest.raises(DataError, match=message), open_writer(tmp_path / "set") as writer:
            writer.add_episode(vectors, images, task)
