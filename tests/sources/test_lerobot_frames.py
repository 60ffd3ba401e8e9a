"""Every picture shows its own episode and frame number: what `frames` yields is compared with what it says it is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.stores.errors import SourceError

LONG_GOP = {"g": "250", "bf": "3", "b_strategy": "0", "sc_threshold": "0", "crf": "20", "preset": "veryfast"}
CODECS = {
    "h264-gop2": ("libx264", {"g": "2", "crf": "20", "preset": "ultrafast"}),
    "h264-long-gop-b-frames": ("libx264", LONG_GOP),
    "h264-gop8-b-frames": ("libx264", {**LONG_GOP, "g": "8", "keyint_min": "8"}),
    "h264-open-gop": (
        "libx264",
        {**LONG_GOP, "g": "6", "keyint_min": "6", "flags": "-cgop", "x264-params": "open_gop=1"},
    ),
    "av1": ("libsvtav1", {"g": "2", "crf": "20", "preset": "8"}),
    "av1-long-gop": ("libsvtav1", {"g": "64", "crf": "20", "preset": "8"}),
}
TWO_CAMERAS = {"observation.images.front": "video", "observation.images.wrist": "video"}

Write = Callable[..., Path]
Read = Callable[[Any], tuple[int, int, int]]


def numbers(source: LeRobotSource, episode: int, start: int, stop: int, read: Read) -> list[list[tuple[int, int, int]]]:
    return [[read(image) for image in images] for images in source.frames(episode, start, stop)]


def expected(index: int, start: int, stop: int, cameras: int = 1) -> list[list[tuple[int, int, int]]]:
    return [[(index, frame, camera) for camera in range(cameras)] for frame in range(start, stop)]


@pytest.mark.parametrize("codec", CODECS)
def test_every_read_of_a_shared_video_yields_the_frames_it_asked_for(
    codec: str, version: str, tmp_path: Path, write_lerobot: Write, number_of: Read
) -> None:
    name, options = CODECS[codec]
    lengths = (9, 11, 1, 17)
    root = write_lerobot(tmp_path, version=version, lengths=lengths, per_file=4, codec=name, options=options)
    source = LeRobotSource(root)
    for episode, length in enumerate(lengths):
        assert numbers(source, episode, 0, length, number_of) == expected(episode, 0, length)
        for start in range(length):
            stop = min(start + 3, length)
            assert numbers(source, episode, start, stop, number_of) == expected(episode, start, stop)


def test_the_long_gop_of_these_tests_has_b_frames_and_one_key_frame(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, lengths=(17, 23, 30), per_file=3, options=LONG_GOP)
    with av.open(str(next(root.rglob("*.mp4")))) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert av.video.frame.PictureType.B in kinds
    assert kinds.count(av.video.frame.PictureType.I) == 1


def test_chunks_of_an_episode_join_without_gap_or_overlap(
    tmp_path: Path, write_lerobot: Write, number_of: Read
) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, lengths=(11, 50), options=LONG_GOP))
    chunks = [numbers(source, 1, start, min(start + 8, 50), number_of) for start in range(0, 50, 8)]
    assert [frame for chunk in chunks for frame in chunk] == expected(1, 0, 50)


def test_views_come_in_the_order_of_the_cameras_and_show_the_same_frame(
    version: str, tmp_path: Path, write_lerobot: Write, number_of: Read
) -> None:
    root = write_lerobot(tmp_path, version=version, cameras=TWO_CAMERAS)
    assert LeRobotSource(root).index().cameras == ("front", "wrist")
    assert numbers(LeRobotSource(root), 1, 2, 9, number_of) == expected(1, 2, 9, cameras=2)
    turned = LeRobotSource(root, cameras=["wrist", "front"])
    assert numbers(turned, 1, 2, 9, number_of) == [views[::-1] for views in expected(1, 2, 9, cameras=2)]


def test_pictures_are_rgb_bytes_of_the_declared_size(tmp_path: Path, write_lerobot: Write) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, cameras=TWO_CAMERAS))
    image = next(source.frames(0, 0, 1))[0]
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    assert source.index().sizes == {"front": (64, 64), "wrist": (64, 64)}


def test_the_shipped_demonstrations_read() -> None:
    source = LeRobotSource(Path(__file__).parents[2] / "examples/push")
    index = source.index()
    assert (index.kind, len(index.episodes), sum(e.length for e in index.episodes)) == ("lerobot-v3.0", 100, 1995)
    assert index.cameras == ("corner3", "topview")
    assert index.steps["privileged"].role == "privileged"
    for episode in (0, 57, 99):
        frames = list(source.frames(episode, 0, index.episodes[episode].length))
        assert len(frames) == index.episodes[episode].length
        assert {image.shape for images in frames for image in images} == {(128, 128, 3)}
        assert np.abs(frames[0][0].astype(int) - frames[0][1]).mean() > 1  # two views of it, not one twice


def test_red_is_the_first_channel_of_a_video(tmp_path: Path, write_lerobot: Write, write_video: Any) -> None:
    root = write_lerobot(tmp_path, lengths=(2,))
    red = np.zeros((64, 64, 3), np.uint8)
    red[:, :, 0] = 255
    write_video(next(root.rglob("*.mp4")), [red, red])
    assert next(LeRobotSource(root).frames(0, 0, 1))[0].mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=8)


@pytest.mark.parametrize("one_row_group", [False, True])
def test_pictures_inside_parquet_are_read_from_any_row(
    one_row_group: bool, version: str, tmp_path: Path, write_lerobot: Write, number_of: Read
) -> None:
    kinds = {"observation.images.front": "image", "observation.images.wrist": "video"}
    root = write_lerobot(
        tmp_path, version=version, lengths=(6, 9, 7), cameras=kinds, per_file=3, one_row_group=one_row_group
    )
    source = LeRobotSource(root)
    for episode, length in ((2, 7), (0, 6), (1, 9)):
        assert numbers(source, episode, 0, length, number_of) == expected(episode, 0, length, cameras=2)
        assert numbers(source, episode, 3, 5, number_of) == expected(episode, 3, 5, cameras=2)


def test_threads_read_different_episodes_at_once(tmp_path: Path, write_lerobot: Write, number_of: Read) -> None:
    kinds = {"observation.images.front": "video", "observation.images.wrist": "image"}
    lengths = (12, 20, 9, 15)
    source = LeRobotSource(write_lerobot(tmp_path, lengths=lengths, cameras=kinds, options=LONG_GOP))

    def check(job: int) -> bool:
        episode = job % len(lengths)
        start = job % 5
        found = numbers(source, episode, start, lengths[episode], number_of)
        actions = source.steps(episode)["action"]
        return found == expected(episode, start, lengths[episode], 2) and len(actions) == lengths[episode]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(40)))


def test_two_readers_of_one_source_do_not_disturb_each_other(
    tmp_path: Path, write_lerobot: Write, number_of: Read
) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, lengths=(20, 20)))
    pairs = zip(source.frames(0, 0, 20), source.frames(1, 0, 20), strict=True)
    found = [(number_of(a[0]), number_of(b[0])) for a, b in pairs]
    assert found == [((0, frame, 0), (1, frame, 0)) for frame in range(20)]


def test_timestamps_that_start_late_are_looked_up_where_they_say(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any, number_of: Read
) -> None:
    """An episode cut from the front keeps its video: row 0 then shows frame 3."""
    import pyarrow as pa

    def late(episode: int, table: dict[str, Any]) -> None:
        table["timestamp"] = pa.array([(frame + 3) / 10 for frame in range(6)], pa.float32())

    root = write_lerobot(tmp_path, version="v2.1", lengths=(6,), tables=late)
    write_video(next(root.rglob("*.mp4")), [picture(0, frame, 0) for frame in range(9)])
    assert numbers(LeRobotSource(root), 0, 0, 6, number_of) == expected(0, 3, 9)


def test_a_video_whose_clock_starts_late_still_begins_with_frame_zero(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any, number_of: Read
) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(6,))
    times = range(5, 11)
    write_video(next(root.rglob("*.mp4")), [picture(0, frame, 0) for frame in range(6)], times=list(times))
    assert numbers(LeRobotSource(root), 0, 2, 6, number_of) == expected(0, 2, 6)


def test_frame_rates_that_are_no_whole_number_stay_aligned(
    tmp_path: Path, write_lerobot: Write, number_of: Read
) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, lengths=(60, 50), fps=29.97, options=LONG_GOP))
    assert numbers(source, 1, 0, 50, number_of) == expected(1, 0, 50)


def test_a_missing_frame_in_the_middle_is_named_before_any_is_read(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any
) -> None:
    root = write_lerobot(tmp_path, lengths=(8,))
    write_video(next(root.rglob("*.mp4")), [picture(0, f, 0) for f in range(7)], times=[0, 1, 2, 4, 5, 6, 7])
    with pytest.raises(SourceError, match="the video ends before frame 7"):
        LeRobotSource(root).index()


def test_a_video_of_another_size_is_refused_before_decoding(
    tmp_path: Path, write_lerobot: Write, write_video: Any
) -> None:
    root = write_lerobot(tmp_path, lengths=(4,))
    video = next(root.rglob("*.mp4"))
    write_video(video, [np.zeros((32, 48, 3), np.uint8)] * 4)
    data = video.read_bytes()
    start = data.index(b"mdat") + 4
    stop = data.index(b"moov", start) - 4
    video.write_bytes(data[:start] + bytes(stop - start) + data[stop:])  # nothing left to decode
    with pytest.raises(SourceError, match=r"front.* has 48 x 32 pixels; expected 64 x 64"):
        list(LeRobotSource(root).frames(0, 0, 4))


def test_ten_bit_video_is_read_as_eight_bit_colour(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any, number_of: Read
) -> None:
    root = write_lerobot(tmp_path, lengths=(4,))
    shots = [picture(0, f, 0) for f in range(4)]
    write_video(next(root.rglob("*.mp4")), shots, codec="libsvtav1", options={"preset": "8"}, pix_fmt="yuv420p10le")
    assert numbers(LeRobotSource(root), 0, 0, 4, number_of) == expected(0, 0, 4)


def test_a_list_of_other_files_named_mp4_is_not_followed(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, lengths=(5,))
    video = next(root.rglob("*.mp4"))
    video.rename(video.with_name("other.mp4"))
    video.write_text("ffconcat version 1.0\nfile other.mp4\n")
    with av.open(str(video)) as container:
        assert len(list(container.decode(video=0))) == 5  # what an open demuxer would do
    with pytest.raises(SourceError, match="cannot be decoded"):
        list(LeRobotSource(root).frames(0, 0, 5))


def test_a_damaged_picture_patched_by_the_decoder_is_refused(
    tmp_path: Path, write_lerobot: Write, write_video: Any
) -> None:
    """FFmpeg hides what it cannot decode behind parts of other pictures, and returns as many as it should."""
    root = write_lerobot(tmp_path, lengths=(12,))
    video = next(root.rglob("*.mp4"))
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3)).astype(np.uint8)
    write_video(video, list(noise))
    whole = video.read_bytes()
    start = whole.index(b"mdat") + 2000
    for position in range(start, start + 40_000, 1000):
        video.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            with av.open(str(video)) as container:
                hidden = len(list(container.decode(video=0))) == 12
            list(LeRobotSource(root).frames(0, 0, 12))
        except SourceError as error:
            if hidden and "is damaged; expected a whole MP4" in str(error):
                return
    pytest.fail("no damage was hidden by the decoder and told by the source")


def test_changed_bytes_in_a_video_never_end_in_anything_but_frames_or_a_source_error(
    tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, lengths=(12,))
    video = next(root.rglob("*.mp4"))
    whole = video.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(30):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 8):
            damaged[position] ^= int(generator.integers(1, 256))
        video.write_bytes(damaged)
        try:
            outcomes.add(len(list(LeRobotSource(root).frames(0, 0, 12))))
        except SourceError:
            outcomes.add(-1)
    assert outcomes == {12, -1}


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (4, 3)])
def test_frames_outside_the_episode_are_refused_at_the_call(
    start: int, stop: int, tmp_path: Path, write_lerobot: Write
) -> None:
    source = LeRobotSource(write_lerobot(tmp_path))
    with pytest.raises(SourceError, match="expected 0 to 6"):
        source.frames(0, start, stop)


def test_no_frames_asked_for_yields_none(tmp_path: Path, write_lerobot: Write) -> None:
    assert list(LeRobotSource(write_lerobot(tmp_path)).frames(0, 3, 3)) == []


def test_a_reader_left_half_way_closes_its_video(tmp_path: Path, write_lerobot: Write) -> None:
    source = LeRobotSource(write_lerobot(tmp_path))

    def open_videos() -> int:
        return sum(".mp4" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    reader = source.frames(0, 0, 6)
    next(reader)
    assert open_videos() == 1
    reader.close()  # type: ignore[attr-defined]
    assert open_videos() == 0
