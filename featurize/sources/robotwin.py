"""RoboTwin demonstrations: HDF5 of both generations, planner paths, pictures in folders; one task or several."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, ExtrasRecord, NoEpisodeError, SourceIndex, StepSpec, no_pictures
from vla.featurize.sources.dimensions import TaskDims
from vla.featurize.sources.padding import DIMS, joint_names, placed, real_columns
from vla.featurize.sources.pictures import decode_picture
from vla.featurize.sources.robotwin_cameras import read_extras, read_pictures
from vla.featurize.sources.robotwin_dims import dims_of
from vla.featurize.sources.robotwin_episode import Checked, RoboTwinOptions, load, plan_of, require_like, task_of
from vla.featurize.sources.robotwin_layout import episodes_of, task_folders, unlisted
from vla.stores.errors import SourceError, UsageError
from vla.stores.filesystem import digest_file
from vla.stores.user_given import UserGiven


@dataclass(frozen=True)
class _Indexed:
    index: SourceIndex
    episodes: tuple[Checked, ...]


class RoboTwinSource:
    """RoboTwin files as a `Source`, with depth, intrinsics and poses as `views` where every episode has them.

    `arms` left, right or fused (left, then right); `include_gripper` True, False, or None: where there is one;
    `cameras` chooses views, in order (None: all, by name, []: numbers alone); `actions` joint (HDF5) or planner
    (`_traj_data`), None: joint where there is HDF5; `alignment` next: the action is the next frame's joints and the
    last frame has none, or same: its own frame's, and there is no state (both only for files without actions of their
    own). `resample` linear stretches planner paths over the frames; `images` is the folder of pictures kept as files;
    `channels` what a JPEG decoder gives of an HDF5 file's pictures; `depth_unit` mm or m; `extrinsics` what newer files
    hold. `instruction` and `instruction_index` choose among an episode's texts (-1: by its number), `task` replaces
    them; `fps` replaces the files' rate. `pad_actions` takes tasks whose arms differ: all columns that any has, 0 where
    an episode has none, and `action_dims` bool [A] says which are real. `skip_bad` leaves out what cannot be read and
    names it in `index().skipped`.
    Steps: `action` and `state` float32 [D] (radians, grippers from 0 closed to 1 open), `timestamp` float64 [] in
    seconds, `frame_index` int64 [].
    """

    def __init__(
        self,
        root: Path | str,
        *,
        arms: Literal["left", "right", "fused"] = "fused",
        include_gripper: bool | None = None,
        cameras: Sequence[str] | None = None,
        actions: Literal["joint", "planner"] | None = None,
        alignment: Literal["next", "same"] = "next",
        resample: Literal["linear"] | None = None,
        images: Annotated[str | None, UserGiven()] = None,
        channels: Literal["bgr", "rgb"] = "bgr",
        depth_unit: Literal["mm", "m"] = "mm",
        extrinsics: Literal["cam2world_gl", "world2cam_cv"] = "cam2world_gl",
        instruction: Literal["seen", "unseen"] = "seen",
        instruction_index: int = 0,
        task: str | None = None,
        fps: float | None = None,
        pad_actions: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self.root = Path(root)
        values = {name: value for name, value in locals().items() if name in RoboTwinOptions.model_fields}
        self.options = RoboTwinOptions.build(values, where="the RoboTwin source")
        self._lock = threading.Lock()
        self._indexed: _Indexed | None = None
        self._digest: str | None = None

    def index(self) -> SourceIndex:
        """See `Source.index`. Every number is checked; no picture is decoded."""
        return self._index().index

    def digest(self) -> str:
        """See `Source.digest`: HDF5 files, paths, instructions, and the pictures in folders of the chosen cameras."""
        indexed = self._index()
        with self._lock:
            if self._digest is None:
                total = hashlib.sha256()
                for name, path in sorted(self._files(indexed)):
                    total.update(f"{name}\0{_size(path)}\0{digest_file(path)}\n".encode(errors="surrogateescape"))
                self._digest = total.hexdigest()
            return self._digest

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        indexed = self._index()
        checked, steps = load(indexed.episodes[episode].files, self.options)
        frames = np.arange(checked.length)
        specs = indexed.index.steps
        made: dict[str, NDArray[np.generic]] = {"action": placed(steps.action, steps.names, specs["action"].names)}
        if steps.state is not None:
            made["state"] = placed(steps.state, steps.state_names, specs["state"].names)
        if DIMS in specs:
            made[DIMS] = np.tile(real_columns(steps.names, specs["action"].names), (checked.length, 1))
        return {**made, "timestamp": frames / indexed.index.fps, "frame_index": frames.astype(np.int64)}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`. Each call opens the files for itself and holds one frame a camera."""
        indexed = self._index()
        checked = self._span(indexed, episode, start, stop)
        if self.options.cameras == ():
            raise no_pictures(f"{checked.files.id} in {self.root}")
        if not indexed.index.pictures:
            raise SourceError(
                f"{checked.files.id} in {self.root} has no pictures", fix="--set source_options.images=DIR"
            )
        views = [self._pictures(checked, camera, start, stop) for camera in indexed.index.cameras]
        return zip(*views, strict=True) if start < stop else iter(())

    def views(
        self, episode: int, start: int, stop: int, names: tuple[str, ...]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], ...]]:
        """See `ViewSource.views`."""
        indexed = self._index()
        checked = self._span(indexed, episode, start, stop)
        unknown = [name for name in names if name not in ("image", *indexed.index.extras)]
        if unknown:
            has = ", ".join(("image", *indexed.index.extras))
            raise UsageError(f"{self.root} has no {', '.join(unknown)} of every frame", expected=f"of {has}")
        cameras = [self._views_of(checked, camera, start, stop, names) for camera in indexed.index.cameras]
        return zip(*cameras, strict=True) if start < stop else iter(())

    def describe(self, names: Sequence[str]) -> ExtrasRecord:
        """See `ViewSource.describe`: all of them lie in the files that the digest covers."""
        del names
        return ExtrasRecord()

    def dimensions(self) -> tuple[TaskDims, ...]:
        """Return the sizes of action and state of each task, whether or not tasks, or paths and frames, fit."""
        return dims_of(self.root, self.options)

    def _span(self, indexed: _Indexed, episode: int, start: int, stop: int) -> Checked:
        checked = indexed.episodes[episode]
        if not 0 <= start <= stop <= checked.length:
            found = f"frames {start} to {stop} of {checked.files.id} in {self.root}"
            raise SourceError(found, expected=f"0 to {checked.length}")
        return checked

    def _pictures(self, checked: Checked, camera: str, start: int, stop: int) -> Iterator[Image]:
        if checked.files.images:
            for path in checked.files.images[camera][start:stop]:
                yield decode_picture(_bytes(path), str(path))
        elif checked.files.data is not None:
            yield from read_pictures(checked.files.data, checked.places[camera], start, stop, self.options.channels)

    def _views_of(
        self, checked: Checked, camera: str, start: int, stop: int, names: tuple[str, ...]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        wanted = [name for name in names if name != "image"]
        pictures = self._pictures(checked, camera, start, stop) if "image" in names else None
        known: Iterator[dict[str, Any]] = iter([{} for _ in range(start, stop)])
        if wanted and checked.files.data is not None:
            metres = 1e-3 if self.options.depth_unit == "mm" else 1.0
            inward = checked.newer and self.options.extrinsics == "world2cam_cv"
            known = read_extras(checked.files.data, checked.places[camera], start, stop, wanted, metres, inward)
        for frame, view in enumerate(known, start):
            made = {"image": next(pictures), **view} if pictures is not None else view
            if "image" in made and "depth" in made and made["depth"].shape != made["image"].shape[:2]:
                raise SourceError(
                    f"{checked.files.data}, camera {camera}, frame {frame}: depth is {made['depth'].shape}",
                    expected=f"{made['image'].shape[:2]} as the picture",
                )
            yield made

    def _index(self) -> _Indexed:
        with self._lock:
            if self._indexed is None:
                self._indexed = self._read_index()
            return self._indexed

    def _read_index(self) -> _Indexed:
        tasks = task_folders(self.root)
        listed = [files for folder in tasks for files in episodes_of(folder, self.options.images)]
        strays = tuple(line for folder in tasks for line in unlisted(folder, self.options.images))
        with_texts = {files.folder.name for files in listed if files.text is not None}
        kept: list[Checked] = []
        episodes: list[Episode] = []
        skipped: dict[str, str] = {}
        cameras: tuple[str, ...] = ()
        for files in listed:
            try:
                checked, _ = load(files, self.options)
                cameras = cameras or (self.options.cameras if self.options.cameras is not None else checked.cameras)
                require_like(checked, kept[0] if kept else checked, cameras, pad=self.options.pad_actions)
                task = task_of(checked, self.options, files.folder.name in with_texts)
            except SourceError as error:
                if not self.options.skip_bad:
                    raise
                skipped[files.id] = str(error)
                continue
            kept.append(replace(checked, texts=()))  # a hundred texts an episode add up
            episodes.append(Episode(files.id, checked.length, task))
        if not kept:
            raise NoEpisodeError(f"every episode of {self.root} is bad", skipped)
        index = replace(self._described(kept, episodes, cameras, skipped), warnings=strays)
        return _Indexed(index, tuple(kept))

    def _described(
        self, kept: list[Checked], episodes: list[Episode], cameras: tuple[str, ...], skipped: dict[str, str]
    ) -> SourceIndex:
        first = kept[0]
        planned = plan_of(first.files, self.options) is not None
        names = joint_names(checked.names for checked in kept)
        steps = {"action": StepSpec((len(names),), "float32", "action", names)}
        if self.options.pad_actions:
            steps[DIMS] = StepSpec((len(names),), "bool", "other", names)
        if first.state_names:
            states = joint_names(checked.state_names for checked in kept)
            steps["state"] = StepSpec((len(states),), "float32", "state", states)
        steps |= {"timestamp": StepSpec((), "float64", "other"), "frame_index": StepSpec((), "int64", "other")}
        return SourceIndex(
            kind=f"robotwin-{'planner' if planned else 'xpolicylab' if first.newer else 'hdf5'}",
            root=str(self.root),
            fps=first.fps,
            cameras=cameras,
            episodes=tuple(episodes),
            steps=steps,
            mapping=self._mapping(),
            skipped=skipped,
            extras=_extras(kept, cameras),
            pictures=bool(cameras),
            assumed={} if first.states_fps else {"fps": f"{first.fps:g}, RoboTwin's default: the files state none"},
        )

    def _mapping(self) -> dict[str, str]:
        """Return every choice that changes an action, a picture or a text: it enters the fingerprint."""
        chosen = self.options.model_dump(mode="json", exclude={"skip_bad", "cameras", "images"}, exclude_defaults=True)
        return {key: str(value) for key, value in chosen.items()}

    def _files(self, indexed: _Indexed) -> Iterator[tuple[str, Path]]:
        """Yield a name that does not depend on where the data lie, and the path, of every file that was used."""
        for checked in indexed.episodes:
            files = checked.files
            plan = plan_of(files, self.options)
            text = files.text if self.options.task is None else None
            for kind, path in (("data", files.data), ("plan", plan), ("text", text)):
                if path is not None:
                    yield f"{files.id}/{kind}", path
            for camera in indexed.index.cameras:
                for path in files.images.get(camera, ()):
                    yield f"{files.id}/images/{camera}/{path.name}", path


def _extras(kept: list[Checked], cameras: tuple[str, ...]) -> tuple[str, ...]:
    """Return what every chosen camera of every episode knows beside its pictures."""
    found = []
    for name in ("depth", "intrinsics", "pose"):
        known = [
            not checked.files.images and camera in checked.places and name in checked.places[camera].extras
            for checked in kept
            for camera in cameras
        ]
        found += [name] if known and all(known) else []
    return tuple(found)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from None
