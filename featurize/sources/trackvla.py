"""OpenTrackVLA's demonstrations, as the simulator wrote them, or as make_tracking_data.py prepared them.

SPLIT/seed_X/SCENE/EP_info.json     a list of {base_velocity [3], step?, …}, one a frame
SPLIT/seed_X/SCENE/EP.json          {instruction, success, status, following_rate, collision, …}
SPLIT/seed_X/SCENE/EP.mp4           its frames; or a folder EP of pictures, which may hold info.json itself

frames/seed_X/SCENE/EP/frame_%05d.jpg     and jsonl/seed_X/SCENE/EP.jsonl (trackvla_samples.py), prepared
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.base import StepSpec
from vla.featurize.sources.camera_files import CameraFiles, PictureFolder, WholeVideo, picture_names
from vla.featurize.sources.episode_checks import SKIP, require_finite
from vla.featurize.sources.files import listing, natural, read_json
from vla.featurize.sources.lerobot_info import inside
from vla.featurize.sources.recordings import Found, RecordedSource, Recording, require_lengths
from vla.featurize.sources.trackvla_samples import read_samples
from vla.featurize.sources.waypoints import integrate_waypoints
from vla.stores.errors import SourceError, UsageError

INFO = "info.json"
SUFFIX = f"_{INFO}"
STATUS = ("success", "status", "finish", "following_rate", "collision")
DEPTH = 6
"""sim_data/SPLIT/seed_X/SCENE/EP below the root, and one more; it also ends links that lead in circles."""

STEP = 0.1
"""Seconds a step in OpenTrackVLA's own recordings, whose files do not state it."""

ALIGN = ("refuse", "truncate")


class TrackVLASource(RecordedSource):
    """Episodes of a robot that follows a person; the id is the path, such as `seed_100/SCENE/4`.

    `dt` is seconds a step (None: `STEP`) and `horizon` the number of waypoints (see `integrate_waypoints`); `align`
    says what becomes of an episode whose frames and steps differ in number: refused, or cut to the shorter;
    `only_success` leaves out episodes without success; `task` is the instruction of episodes that name none; `camera`
    names the view.
    Steps are `action` float32 [3] (vx, vy, wz: m/s, m/s, rad/s), `waypoints` float32 [horizon, 3] (x, y, heading: m,
    m, rad), `waypoints_valid` bool [horizon], `timestamp` float64 [] in seconds, `frame_index` int64 [].
    `texts` hold what EP.json says of success.
    """

    kind = "trackvla"

    def __init__(
        self,
        root: Path | str,
        *,
        dt: float | None = None,
        horizon: int = 8,
        align: str = "refuse",
        only_success: bool = False,
        task: str | None = None,
        camera: str = "rgb",
        skip_bad: bool = False,
    ) -> None:
        self._typed = dt is not None
        dt = STEP if dt is None else dt
        if isinstance(dt, bool) or not isinstance(dt, int | float) or not 0 < dt < np.inf:
            raise UsageError(f"dt = {dt!r}", expected="seconds a step, above 0")
        if type(horizon) is not int or not 2 <= horizon <= 1024:
            raise UsageError(f"horizon = {horizon!r}", expected="a count from 2 to 1024")
        if align not in ALIGN:
            raise UsageError(f"align = {align!r}", expected=" or ".join(ALIGN))
        super().__init__(root, fps=1 / dt, cameras=None, skip_bad=skip_bad)
        self._dt, self._horizon, self._align = float(dt), horizon, align
        self._only_success, self._task, self._camera = only_success, task, camera

    def find(self) -> Found:
        """See `RecordedSource.find`."""
        found: Found
        if (self.root / "jsonl").is_dir():
            found = self._prepared()
        else:
            found = {self._name(path): partial(self._look_raw, path) for path in self._infos(self.root, DEPTH)}
            videos = self._below(self.root, ".mp4", DEPTH) if found else iter(())
            numbered = [path for path in videos if path.stem.isdecimal()]
            found = {self._name(path): partial(self._without_steps, path) for path in numbered} | found
        if not found:
            expected = f"jsonl/seed_X/SCENE/EP.jsonl, or seed_X/SCENE/EP{SUFFIX}"
            raise SourceError(f"{self.root} holds no episode", expected=expected)
        return {name: found[name] for name in sorted(found, key=natural)}

    def mapping(self) -> dict[str, str]:
        """See `RecordedSource.mapping`."""
        return {"waypoints": f"{self._horizon} over {self._horizon} steps of {self._dt} s", "align": self._align}

    def assumed(self) -> dict[str, str]:
        """See `RecordedSource.assumed`."""
        return {} if self._typed else {"dt": f"{self._dt:g} s a step, OpenTrackVLA's default"}

    def _prepared(self) -> Found:
        if self._only_success:
            fix = "the raw sim_data, or make_tracking_data.py --only_success"
            raise SourceError(f"{self.root / 'jsonl'} says nothing of success", expected="EP.json", fix=fix)
        frames, jsonl = self.root / "frames", self.root / "jsonl"
        names = {path.relative_to(jsonl).with_suffix("").as_posix() for path in self._below(jsonl, ".jsonl", DEPTH)}
        if frames.is_dir():
            folders = {path.parent for path in self._below(frames, ".jpg", DEPTH)}
            names |= {folder.relative_to(frames).as_posix() for folder in folders}
        return {name: partial(self._look_prepared, name) for name in names}

    def _look_prepared(self, name: str) -> Recording:
        view = PictureFolder.open(self.root, self.root / "frames" / name, f"camera {self._camera}, {name}")
        _require_numbered(view)
        file = self.root / "jsonl" / f"{name}.jsonl"
        inside(self.root, file.relative_to(self.root).as_posix())
        stems = [Path(picture).stem for picture in view.names]
        task, steps = self._prepared_steps(file, name, stems)
        files = (file.relative_to(self.root).as_posix(),)
        again = partial(self._prepared_steps, file, name, stems)
        return Recording(task, len(steps["action"]), {self._camera: view}, self._specs(), lambda: again()[1], files)

    def _prepared_steps(self, file: Path, name: str, stems: list[str]) -> tuple[str, dict[str, NDArray[np.generic]]]:
        """Return (instruction, steps) of a jsonl file."""
        samples = read_samples(file, name, stems, self._horizon, self._dt)
        length = self._length({file.name: len(samples.velocities), f"frames/{name}": len(stems)}, file)
        waypoints, valid = integrate_waypoints(samples.velocities, len(stems), self._horizon, self._dt)
        if samples.waypoints is not None:
            waypoints, valid = samples.waypoints, samples.valid
        return samples.instruction, _cut(samples.velocities, waypoints, valid & samples.valid, length)

    def _look_raw(self, info: Path) -> Recording | str:
        episode = info.parent if info.name == INFO else info.with_name(info.name.removesuffix(SUFFIX))
        status_file = episode.with_name(f"{episode.name}.json")
        for path in (info, status_file):
            inside(self.root, path.relative_to(self.root).as_posix())
        status = self._status(status_file)
        if self._only_success and not _succeeded(status, episode):
            return f"{episode.name}.json says success = {status['success']} (source_options.only_success)"
        task = status.get("instruction") or self._task
        if not isinstance(task, str) or not task.strip() or "\0" in task:
            fix = "--set 'source_options.task=\"...\"' for episodes that name none"
            raise SourceError(f"{episode}.json has no instruction", expected="what the robot was told", fix=fix)
        view = self._view(episode)

        steps = partial(self._raw_steps, info, view)
        names = tuple(path.relative_to(self.root).as_posix() for path in (info, status_file) if path.is_file())
        texts = {key: _said(status[key]) for key in STATUS if isinstance(status.get(key), str | int | float | bool)}
        length = len(steps()["action"])
        return Recording(task.strip(), length, {self._camera: view}, self._specs(), steps, names, texts)

    def _without_steps(self, video: Path) -> Recording:
        info = video.with_name(f"{video.stem}{SUFFIX}")
        raise SourceError(f"{info} is missing", expected=f"the steps of {video.name}", fix=SKIP)

    def _raw_steps(self, info: Path, view: CameraFiles) -> dict[str, NDArray[np.generic]]:
        velocities = _velocities(info)
        length = self._length({info.name: len(velocities), _name_of(view): view.length}, info.parent)
        return _cut(velocities, *integrate_waypoints(velocities, length, self._horizon, self._dt), length)

    def _view(self, episode: Path) -> CameraFiles:
        """Return the video EP.mp4 or the pictures in the folder EP, whichever there is."""
        video, label = episode.with_name(f"{episode.name}.mp4"), f"camera {self._camera}, {self._name(episode)}"
        pictures = episode if episode.is_dir() and picture_names(self.root, episode) else None
        if video.is_file() and pictures is not None:
            raise SourceError(f"{video} and pictures in {episode}/ are both there", expected="one", fix="move one away")
        if pictures is not None:
            view = PictureFolder.open(self.root, episode, label)
            _require_numbered(view)
            return view
        if not video.is_file():
            raise SourceError(f"{video} is missing", expected=f"it, or pictures in {episode}/", fix=SKIP)
        return WholeVideo.open(self.root, video, label)

    def _status(self, file: Path) -> dict[str, Any]:
        """Return EP.json; nothing where it is not there and is not needed."""
        if not file.is_file() and self._task is not None and not self._only_success:
            return {}
        value = read_json(file, "an object with instruction and success")
        if not isinstance(value, dict):
            raise SourceError(f"{file} holds a {type(value).__name__}", expected="an object", fix=SKIP)
        return value

    def _length(self, counts: dict[str, int], where: Path) -> int:
        if self._align == "truncate":
            return min(counts.values())
        return require_lengths(counts, str(where), f"--set source_options.align=truncate, or {SKIP}")

    def _specs(self) -> dict[str, StepSpec]:
        return {
            "action": StepSpec((3,), "float32", "action", ("vx", "vy", "wz")),
            "waypoints": StepSpec((self._horizon, 3), "float32", "other"),
            "waypoints_valid": StepSpec((self._horizon,), "bool", "other"),
        }

    def _infos(self, folder: Path, depth: int) -> Iterator[Path]:
        for path in self._below(folder, INFO, depth):
            if path.name == INFO or path.name.endswith(SUFFIX):
                yield path

    def _below(self, folder: Path, ending: str, depth: int) -> Iterator[Path]:
        """Yield the files below a folder whose names end so."""
        for path in listing(self.root, folder, check_files=False):
            if path.is_dir():
                if depth:
                    yield from self._below(path, ending, depth - 1)
            elif path.name.endswith(ending):
                yield path

    def _name(self, path: Path) -> str:
        relative = path.relative_to(self.root)
        own = relative.name.removesuffix(SUFFIX).removesuffix(".mp4")
        name = relative.parent if path.name == INFO else relative.with_name(own)
        return name.as_posix().removeprefix("sim_data/")


def _velocities(info: Path) -> NDArray[np.float32]:
    """Return [N, 3] base velocities of an info file. Nothing stands for one that is missing."""
    steps = read_json(info, "a list of steps")
    if not isinstance(steps, list) or not steps:
        raise SourceError(
            f"{info} holds no list of steps", expected='[{"base_velocity": [vx, vy, wz], …}, …]', fix=SKIP
        )
    rows = []
    for number, step in enumerate(steps):
        velocity = step.get("base_velocity") if isinstance(step, dict) else None
        numbers = isinstance(velocity, list) and all(type(value) in (int, float) for value in velocity)
        if not isinstance(velocity, list) or not numbers or len(velocity) != 3:
            found = f"{info}, entry {number}: base_velocity is {str(velocity)[:60]}"
            raise SourceError(found, expected="[vx, vy, wz]", fix=SKIP)
        rows.append(velocity)
        named, first = step.get("step"), steps[0].get("step")
        if type(first) is int and named != first + number:
            raise SourceError(f"{info}, entry {number}: step is {named}", expected=f"{first + number}", fix=SKIP)
    with np.errstate(over="ignore"):
        values = np.asarray(rows, np.float64).astype(np.float32)
    require_finite(values, f"{info}, base_velocity")
    return values


def _cut(
    velocities: NDArray[np.float32], waypoints: NDArray[np.float32], valid: NDArray[np.bool_], length: int
) -> dict[str, NDArray[np.generic]]:
    return {"action": velocities[:length], "waypoints": waypoints[:length], "waypoints_valid": valid[:length]}


def _succeeded(status: dict[str, Any], episode: Path) -> bool:
    """Whether `success` says so. (`finish` is true of an episode that ended, however it did.)"""
    success = status.get("success")
    if not isinstance(success, bool | int | float):
        raise SourceError(f"{episode}.json: success is {success!r}", expected="true, false or a number", fix=SKIP)
    return success > 0


def _require_numbered(view: PictureFolder) -> None:
    """Refuse a folder in which a frame between the first and the last is missing."""
    numbers = []
    for name in view.names:
        match = re.search(r"(\d{1,9})$", Path(name).stem)
        if match is None:
            raise SourceError(f"{view.folder / name} has no number", expected="frame_00001.jpg", fix=SKIP)
        numbers.append(int(match[1]))
    for before, number in itertools.pairwise(numbers):
        if number != before + 1:
            raise SourceError(f"{view.folder} has frame {number} after {before}", expected=f"{before + 1}", fix=SKIP)


def _name_of(view: CameraFiles) -> str:
    return Path(view.files[0]).name if isinstance(view, WholeVideo) else Path(view.files[0]).parent.name + "/"


def _said(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
