"""One MP4 file that many episodes share: H.264, every frame at exactly its number / fps."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av

from vla.featurize.image import Image

CODEC = "h264"
PIXEL_FORMAT = "yuv444p"
# What a policy sees live has no codec's loss, so the demonstrations must have little. Measured on push-v3 (128 px, two
# cameras, 100 episodes): MB, distance of EfficientNet features from those of the uncompressed picture, and successes of
# flow-matching heads in 50 rollouts:
#   crf 23, a keyframe every 2 frames, yuv420p (LeRobot's way)   4.4   0.45   20
#   crf 15, every 20 frames, full colour                         4.9   0.21   42
#   as below                                                     5.9   0.15   48
#   crf 2                                                       13     0.12   49
# Full colour, because a goal is 3 pixels wide; few keyframes and the slowest preset, because pictures hardly change. No
# B frames: presentation and decoding order agree, so that no edit list shifts the first timestamp.
_OPTIONS = {"crf": "10", "g": "60", "bf": "0", "preset": "veryslow"}


class VideoFile:
    """An open MP4 file; frames are appended in order, uint8 [H, W, 3] RGB with even H and W."""

    def __init__(
        self, path: Path | str, *, fps: Fraction, height: int, width: int, pixel_format: str = PIXEL_FORMAT
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.frames = 0
        self._closed = False
        self._encoded_frames = 0
        self._encoded_bytes = 0
        # bitexact leaves the muxer's version out, so that equal frames give equal bytes.
        self._container = av.open(str(path), "w", options={"fflags": "+bitexact"})
        self._stream = self._container.add_stream("libx264", rate=fps, options=_OPTIONS)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, pixel_format
        self._stream.codec_context.time_base = 1 / fps
        # x264's rate control depends on the number of threads; one thread gives the same file on every machine.
        self._stream.codec_context.thread_count = 1

    def append(self, images: Iterable[Image]) -> None:
        """Encode pictures as the next frames."""
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = self.frames
            frame.time_base = self._stream.codec_context.time_base
            self.frames += 1
            self._mux(frame)

    def estimated_bytes(self, more_frames: int) -> float:
        """Return about how large the file is with `more_frames` added, from the mean size of a frame so far."""
        return self._encoded_bytes / max(self._encoded_frames, 1) * (self.frames + more_frames)

    def close(self) -> None:
        """Flush the encoder and finish the file. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._mux(None)
        finally:
            self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._encoded_frames += 1
            self._encoded_bytes += packet.size
            self._container.mux(packet)
