"""Frames of a video by their number: found by timestamp, never by counting packets.

Packets are stored in decoding order, may be fewer than the container says, and start anywhere after a seek. Only the
presentation timestamp (PTS) tells which frame a picture is: number = round((PTS - start) * fps).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from vla.featurize.image import Image
from vla.featurize.sources.pictures import require_size
from vla.stores.errors import SourceError

TOLERANCE = 0.25
"""Of a frame's duration: how far a timestamp may lie off the grid of 1/fps. Milliseconds round by 0.03 at 60 fps."""


@dataclass(frozen=True)
class Clip:
    """An episode's frames in a video: its frame 0 is the file's frame number `first`.

    `size` (height, width) is what the metadata say (None: nothing); `label` names camera and episode in errors.
    """

    path: Path
    first: int
    fps: float
    size: tuple[int, int] | None
    label: str


def read_clip(clip: Clip, start: int, stop: int) -> Iterator[Image]:
    """Yield frames start..stop-1 of a clip, uint8 [H, W, 3] RGB. Opens the file for itself; holds one frame.

    Raises `SourceError` naming file, camera and frame where one is missing or cannot be decoded, where timestamps are
    off the grid of 1/fps (variable or another frame rate), for pictures of another size, deeper than 8 bits without
    colour (depth maps), or to be rotated on display.
    """
    wanted = start
    try:
        with av.open(str(clip.path), format="mp4", options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise SourceError(f"{clip.path} has no video stream", expected=clip.label)
            stream = container.streams.video[0]
            require_size((stream.height, stream.width), clip.size, f"{clip.path}, {clip.label}")
            # An episode is short: starting threads and filling their pipeline costs more than they save.
            stream.codec_context.thread_count = 1
            # Without it a damaged picture is patched from its neighbours and passed on as if it had been seen.
            stream.codec_context.options = {"err_detect": "explode"}
            grid = _Grid.of(stream, clip)
            colour = VideoReformatter()  # one for all frames: each would set up its own conversion, 3 times slower
            for frame in _from_key_frame(container, stream, grid, clip.first + start):
                number = grid.number(frame) - clip.first
                if number < start:
                    continue
                if number != wanted:
                    raise _misplaced(clip, stream, number, wanted)
                _require_plain(frame, clip, number)
                yield cast(Image, colour.reformat(frame, format="rgb24").to_ndarray())
                wanted += 1
                if wanted == stop:
                    return
    except FFmpegError as error:
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

    def number(self, frame: av.VideoFrame) -> int:
        """Return a frame's number in the file. Raises `SourceError` off the grid."""
        if frame.pts is None:
            raise SourceError(f"{self.clip.path} has a frame without timestamp", expected="timestamps")
        exact = (frame.pts - self.origin) / float(self.ticks)
        number = round(exact)
        if abs(exact - number) > TOLERANCE:
            off = f"a frame near {number / self.clip.fps:.3f} s is {exact - number:+.2f} frames off"
            raise SourceError(
                f"{self.clip.path}, {self.clip.label}: {off}",
                expected=f"one every 1/{self.clip.fps:g} s",
                fix=_constant_rate(self.clip),
            )
        return number

    def pts(self, number: int) -> int:
        return self.origin + math.floor(number * self.ticks)


def _from_key_frame(
    container: av.container.InputContainer, stream: av.VideoStream, grid: _Grid, number: int
) -> Iterator[av.VideoFrame]:
    """Yield decoded frames from a key frame at or before `number` on.

    A seek goes by decoding time, which with B-frames is earlier than the time shown: it may land on the key frame
    after the one needed. Then go further back.
    """
    back = 0
    while True:
        target = max(number - back, 0)
        container.seek(grid.pts(target), stream=stream)
        frames = container.decode(stream)
        # Frames before the first key frame shown lack what they refer to (open GOP): never take those.
        frame = next((frame for frame in frames if frame.key_frame), None)
        if frame is not None and (target == 0 or grid.number(frame) <= number):
            yield frame
            yield from frames
            return
        if target == 0:
            return
        back = max(2 * back, math.ceil(grid.clip.fps))


def _require_plain(frame: av.VideoFrame, clip: Clip, number: int) -> None:
    where = f"{clip.path}, {clip.label}, frame {number}"
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
    return f"ffmpeg -i {clip.path.name} -vf fps={clip.fps:g} -c:v libx264 -g 2 -crf 18 constant.mp4"
