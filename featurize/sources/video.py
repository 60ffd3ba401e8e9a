"""Frames of a video by their number: found by timestamp, never by counting packets.

Packets are stored in decoding order, may be fewer than the container says, and start anywhere after a seek. Only the
presentation timestamp (PTS) tells which frame a picture is: number = round((PTS - start) * fps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.pictures import MAX_PIXELS, require_size
from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer

TOLERANCE = 0.25
"""Of a frame's duration: how far a timestamp may lie off the grid of 1/fps. Milliseconds round by 0.03 at 60 fps."""

ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
"""PyAV 15 and 16 convert colours in one thread and have no such argument."""

LOCAL = {"protocol_whitelist": "file"}


@dataclass(frozen=True)
class Clip:
    """An episode's frames in a video: its frame 0 is the file's frame number `first`.

    `size` (height, width) is what the metadata say (None: nothing); `label` names camera and episode in errors.
    `times` int64 [N] are the timestamps of all frames of the file, in ticks, where frames are found by their order
    (None: by the grid of 1/fps).
    """

    path: Path
    first: int
    fps: float
    size: tuple[int, int] | None
    label: str
    times: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)


def count_frames(path: Path, label: str) -> int:
    """Return the number of frames that a video's header states; 0 where it states none. Decodes nothing.

    Raises `SourceError` naming `label` where the file is no video.
    """
    with _opened(path, label) as stream:
        return int(stream.frames)


def frame_times(path: Path, label: str) -> NDArray[np.int64]:
    """Return when each frame of a video is shown, int64 [N], in ticks, increasing. Reads every packet, decodes none."""
    with _opened(path, label) as stream:
        container = cast(av.container.InputContainer, stream.container)
        # Packets that an edit list cuts off are marked; the last one of a stream is empty and has no time.
        shown = {packet.pts for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard}
        return np.asarray(sorted(shown), np.int64)


def frame_size(path: Path, label: str) -> tuple[int, int]:
    """Return (height, width) that a video's header states. Decodes nothing."""
    with _opened(path, label) as stream:
        return stream.height, stream.width


def require_rate(path: Path, label: str, fps: float) -> None:
    """Raise `SourceError` where a video states another frame rate than `fps`."""
    with _opened(path, label) as stream:
        rate = float(stream.average_rate) if stream.average_rate else fps
    if abs(rate - fps) > TOLERANCE * fps:
        found = f"{path}, {label}: the video's rate is {rate:g} frames/s"
        fix = _constant_rate(Clip(path, 0, fps, None, label))
        raise SourceError(found, expected=f"one every 1/{fps:g} s", fix=fix)


@contextmanager
def _opened(path: Path, label: str) -> Iterator[av.VideoStream]:
    """Open a video's first stream. What FFmpeg raises becomes a `SourceError`."""
    try:
        with av.open(str(path), format="mp4", options=LOCAL, metadata_errors="replace") as container:
            if not container.streams.video:
                raise SourceError(f"{path} has no video stream", expected=label)
            yield container.streams.video[0]
    except FFmpegError as error:
        refuse_pointer(path)
        reason = error.strerror or type(error).__name__
        fix = "--skip-bad leaves the episode out"
        raise SourceError(f"{path}, {label} cannot be decoded: {reason}", expected="a whole MP4", fix=fix) from None


def read_clip(clip: Clip, start: int, stop: int) -> Iterator[Image]:
    """Yield frames start..stop-1 of a clip, uint8 [H, W, 3] RGB. Opens the file for itself; holds one frame.

    Raises `SourceError` naming file, camera and frame where one is missing or cannot be decoded, where timestamps are
    off the grid of 1/fps (variable or another frame rate), for pictures of another size, deeper than 8 bits without
    colour (depth maps), or to be rotated on display.
    """
    wanted = start
    try:
        # One demuxer, local files only: a playlist named .mp4 could otherwise name any file or address.
        with av.open(str(clip.path), format="mp4", options=LOCAL, metadata_errors="replace") as container:
            if not container.streams.video:
                raise SourceError(f"{clip.path} has no video stream", expected=clip.label)
            stream = container.streams.video[0]
            if getattr(stream, "codec_context", None) is None:  # PyAV leaves it out for a codec it does not know
                raise SourceError(f"{clip.path}, {clip.label} has an unknown codec", expected="H.264 or AV1")
            require_size((stream.height, stream.width), clip.size, f"{clip.path}, {clip.label}")
            # An episode is short: starting threads and filling their pipeline costs more than they save.
            stream.codec_context.thread_count = 1
            # A stream may claim another size than the container: the decoder refuses it before it allocates a picture.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            grid = _Grid.of(stream, clip) if clip.times is None else _Listed(clip.times, clip)
            # One for all frames, without threads: each frame would set up its own conversion, 3 times slower.
            colour = VideoReformatter()
            for packet in _from_key_frame(container, stream, grid, clip.first + start):
                for frame in packet.decode():
                    number = grid.number(frame.pts) - clip.first
                    if number < start:
                        continue
                    grid.require_on(frame.pts)
                    if number != wanted:
                        raise _misplaced(clip, stream, number, wanted)
                    _require_plain(frame, clip, number)
                    yield cast(Image, colour.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray())
                    wanted += 1
                    if wanted == stop:
                        return
    except FFmpegError as error:
        refuse_pointer(clip.path)
        fix = "--skip-bad leaves the episode out"
        reason = error.strerror or type(error).__name__
        raise SourceError(
            f"{clip.path}, {clip.label}, frame {wanted} cannot be decoded: {reason}", expected="a whole MP4", fix=fix
        ) from None
    raise SourceError(
        f"{clip.path}, {clip.label}: the video ends before frame {wanted}",
        expected=f"frames up to {stop - 1}",
        fix="--skip-bad leaves the episode out",
    )


@dataclass(frozen=True)
class _Grid:
    """Where frames lie in time: frame n at `origin` + n / (fps * time_base) ticks."""

    origin: int
    ticks: Fraction
    clip: Clip

    @classmethod
    def of(cls, stream: av.VideoStream, clip: Clip) -> _Grid:
        if stream.time_base is None:
            raise SourceError(f"{clip.path} has no time base", expected="an MP4 video")
        return cls(stream.start_time or 0, 1 / (Fraction(clip.fps).limit_denominator(100_000) * stream.time_base), clip)

    def exact(self, pts: int | None) -> float:
        """Return a timestamp in frames since the first one."""
        if pts is None:
            raise SourceError(f"{self.clip.path} has a frame without timestamp", expected="timestamps")
        return (pts - self.origin) / float(self.ticks)

    def number(self, pts: int | None) -> int:
        """Return the number in the file of the frame shown at `pts`."""
        return round(self.exact(pts))

    def pts(self, number: int) -> int:
        """Return where frame `number` lies, in ticks."""
        return self.origin + math.floor(number * self.ticks)

    def require_on(self, pts: int | None) -> None:
        """Raise `SourceError` for a timestamp between two frames of the grid."""
        number = self.number(pts)
        off = self.exact(pts) - number
        if abs(off) > TOLERANCE:
            found = f"a frame near {number / self.clip.fps:.3f} s is {off:+.2f} frames off"
            raise SourceError(
                f"{self.clip.path}, {self.clip.label}: {found}",
                expected=f"one every 1/{self.clip.fps:g} s",
                fix=_constant_rate(self.clip),
            )


@dataclass(frozen=True)
class _Listed:
    """Frames by their order: frame n is shown at `times[n]`, whatever the time between two."""

    times: NDArray[np.int64]
    clip: Clip

    def number(self, pts: int | None) -> int:
        """Return the number in the file of the frame shown at `pts`."""
        if pts is None:
            raise SourceError(f"{self.clip.path} has a frame without timestamp", expected="timestamps")
        return int(np.searchsorted(self.times, pts))

    def pts(self, number: int) -> int:
        """Return when frame `number` is shown, in ticks."""
        return int(self.times[number])

    def require_on(self, pts: int | None) -> None:
        """Accept every timestamp: the order alone counts."""


def _from_key_frame(
    container: av.container.InputContainer, stream: av.VideoStream, grid: _Grid | _Listed, number: int
) -> Iterator[av.Packet[av.VideoStream]]:
    """Yield packets from a key frame shown at or before frame `number` on.

    Pictures shown before that key frame may decode wrongly (open GOP); all of them are before `number`.
    A seek goes by decoding time, which with B-frames is earlier than the time shown: it may land on the key frame
    after the one needed. Then go further back.
    """
    back = 0
    while True:
        target = max(number - back, 0)
        container.seek(grid.pts(target), stream=stream)
        packets = container.demux(stream)
        key = next((packet for packet in packets if packet.is_keyframe), None)
        if key is None or target == 0 or grid.number(key.pts) <= number:
            break
        back = max(2 * back, math.ceil(grid.clip.fps))
    if key is None or key.pts is None:
        return
    yield key
    yield from packets


def _require_plain(frame: av.VideoFrame, clip: Clip, number: int) -> None:
    where = f"{clip.path}, {clip.label}, frame {number}"
    # A damaged picture is patched from its neighbours and passed on. This flag tells of 70 % of single bits flipped in
    # H.264 (gop 2), 50 % in AV1 (measured); the codecs have no checksum to tell of the others. The digest does.
    if frame.is_corrupt:
        raise SourceError(f"{where} is damaged", expected="a whole MP4", fix="--skip-bad leaves the episode out")
    if frame.rotation:
        fix = f"ffmpeg -display_rotation 0 -i {clip.path.name} -c copy upright.mp4"
        raise SourceError(f"{where} is to be rotated by {frame.rotation} degrees", expected="upright pixels", fix=fix)
    if len(frame.format.components) == 1 and frame.format.components[0].bits > 8:
        raise SourceError(f"{where} has {frame.format.name} pixels", expected="colour; depth maps are no pictures")
    require_size((frame.height, frame.width), clip.size, where)


def _misplaced(clip: Clip, stream: av.VideoStream, number: int, wanted: int) -> SourceError:
    rate = f"{float(stream.average_rate):g}" if stream.average_rate else "unknown"
    what = f"frame {wanted} is missing" if number > wanted else f"frame {number} is there twice"
    found = f"{clip.path}, {clip.label}: {what} (the video's rate is {rate} frames/s)"
    return SourceError(found, expected=f"one frame every 1/{clip.fps:g} s", fix=_constant_rate(clip))


def _constant_rate(clip: Clip) -> str:
    convert = f"ffmpeg -i {clip.path.name} -vf fps={clip.fps:g} -c:v libx264 -g 2 -crf 18 constant.mp4"
    return f"--set source_options.align=index where row i saw frame i, or {convert}"
