"""Frames of a video by their number: found by timestamp, never by counting packets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
from av.error import FFmpegError

from vla.featurize.image import Image
from vla.stores.errors import SourceError

TOLERANCE = 0.1
"""Of a frame's duration: how far a timestamp may lie off the grid of 1/fps. Time bases of 1/90000 round by less."""


def read_clip(path: Path, clip_start: float, fps: float, start: int, stop: int) -> Iterator[Image]:
    """Yield frames start..stop-1 of the clip that begins `clip_start` seconds into a video, uint8 [H, W, 3] RGB.

    Frame i of the clip is the one shown at clip_start + i / fps. Raises `SourceError` naming file and frame where one
    is missing, off the grid (variable frame rate), or cannot be decoded, and for videos to be rotated on display.
    """
    if not path.is_file():
        raise SourceError(f"{path} is missing", expected="the video that the metadata name")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SourceError(f"{path} has no video stream", expected="a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.time_base is None:
                raise SourceError(f"{path} has no time base", expected="a video")
            target = clip_start + start / fps
            # Half a frame early: a seek to the exact timestamp may land behind it after rounding.
            container.seek(max(int((target - 0.5 / fps) / stream.time_base), 0), stream=stream)
            yield from _numbered(container.decode(stream), path, clip_start, fps, start, stop)
    except FFmpegError as error:
        raise SourceError(f"{path} cannot be decoded: {error.strerror}", expected="a whole video") from None


def _numbered(
    frames: Iterator[av.VideoFrame], path: Path, clip_start: float, fps: float, start: int, stop: int
) -> Iterator[Image]:
    wanted = start
    for frame in frames:
        if frame.time is None:
            raise SourceError(f"{path} has a frame without timestamp", expected="a video with timestamps")
        exact = (frame.time - clip_start) * fps
        number = round(exact)
        if number < wanted:
            continue
        if abs(exact - number) > TOLERANCE:
            raise SourceError(
                f"{path}: a frame at {frame.time:.4f} s is off the grid", expected=f"{fps:g} frames a second"
            )
        if number > wanted:
            break
        if frame.rotation:
            raise SourceError(f"{path} is to be rotated by {frame.rotation} degrees", expected="upright pixels")
        yield cast(Image, frame.to_ndarray(format="rgb24"))
        wanted += 1
        if wanted == stop:
            return
    raise SourceError(
        f"{path} has no frame {wanted} ({clip_start + wanted / fps:.3f} s)", expected=f"frames to {stop - 1}"
    )
