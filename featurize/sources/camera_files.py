"""What one camera saw in one episode: a folder of numbered pictures, or a video of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.files import listing, size_of
from vla.featurize.sources.lerobot_info import inside
from vla.featurize.sources.pictures import MAX_PIXELS, decode_picture
from vla.featurize.sources.video import Clip, frame_size, frame_times, read_clip
from vla.stores.errors import SourceError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

MAX_PICTURE_BYTES = 4 * MAX_PIXELS
"""More than any picture that may be decoded takes: a file above is not read into memory."""


class CameraFiles(Protocol):
    """The pictures of one camera in one episode; `size` is (height, width), `files` relative to the root."""

    @property
    def length(self) -> int:
        """How many frames."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every frame."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Paths relative to the root."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Image]:
        """Yield frames start..stop-1. Raises `SourceError` naming file and frame."""
        ...


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of one size in the order of their names; `label` names camera and episode in errors."""

    root: Path
    folder: Path
    names: tuple[str, ...]
    size: tuple[int, int]
    label: str

    @classmethod
    def open(cls, root: Path, folder: Path, label: str) -> PictureFolder:
        """List the pictures and decode the first. Raises `SourceError` where there is none, or a name is there twice.

        Names are in natural order: `2.jpg` comes before `10.jpg`.
        """
        names = picture_names(root, folder)
        if not names:
            raise SourceError(f"{folder} holds no picture", expected=f"the frames of {label}", fix=SKIP)
        stems: dict[str, str] = {}
        for name in names:
            twin = stems.setdefault(Path(name).stem, name)
            if twin != name:
                raise SourceError(f"{folder} holds {twin} and {name}", expected="one picture a frame", fix=SKIP)
        first = decode_picture(_bytes(folder / names[0]), f"{folder / names[0]}, {label}")
        return cls(root, folder, names, (first.shape[0], first.shape[1]), label)

    @property
    def length(self) -> int:
        """See `CameraFiles.length`."""
        return len(self.names)

    @property
    def files(self) -> tuple[str, ...]:
        """See `CameraFiles.files`."""
        folder = self.folder.relative_to(self.root)
        return tuple((folder / name).as_posix() for name in self.names)

    def read(self, start: int, stop: int) -> Iterator[Image]:
        """See `CameraFiles.read`. A picture of another size than the first is refused."""
        for frame in range(start, stop):
            path = self.folder / self.names[frame]
            where = f"{path}, {self.label}, frame {frame}"
            image = decode_picture(_bytes(path), where)
            if image.shape[:2] != self.size:
                raise SourceError(
                    f"{where} has {image.shape[1]} x {image.shape[0]} pixels",
                    expected=f"{self.size[1]} x {self.size[0]} as {self.names[0]}",
                    fix=SKIP,
                )
            yield image


@dataclass(frozen=True)
class WholeVideo:
    """An MP4 file that is one episode, frame by frame from its first to its last, whatever the times between them.

    `times` int64 [length] are their timestamps in ticks.
    """

    root: Path
    path: Path
    times: NDArray[np.int64] = field(compare=False, repr=False)
    size: tuple[int, int]
    label: str

    @classmethod
    def open(cls, root: Path, path: Path, label: str) -> WholeVideo:
        """Read the header and count the frames, without decoding any. Raises `SourceError` where it is no video."""
        path = inside(root, path.relative_to(root).as_posix())
        size_of(path, sys.maxsize, f"the MP4 of {label}")
        times = frame_times(path, label)
        if not len(times):
            raise SourceError(f"{path} has no frames", expected=f"the video of {label}", fix=SKIP)
        return cls(root, path, times, frame_size(path, label), label)

    @property
    def length(self) -> int:
        """See `CameraFiles.length`."""
        return len(self.times)

    @property
    def files(self) -> tuple[str, ...]:
        """See `CameraFiles.files`."""
        return (self.path.relative_to(self.root).as_posix(),)

    def read(self, start: int, stop: int) -> Iterator[Image]:
        """See `CameraFiles.read`."""
        return read_clip(Clip(self.path, 0, 1.0, self.size, self.label, self.times), start, stop)


def picture_names(root: Path, folder: Path) -> tuple[str, ...]:
    """Return the names of the pictures in a folder, in natural order; other files are not looked at."""
    return tuple(path.name for path in listing(root, folder) if path.suffix.lower() in PICTURES and path.is_file())


def _bytes(path: Path) -> bytes:
    size_of(path, MAX_PICTURE_BYTES, "a picture")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}", expected="a picture", fix=SKIP) from None
