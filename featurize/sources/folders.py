"""Plain folders: pictures a camera, numbers in .npy files.

ROOT/EPISODE/CAMERA/*.jpg|png|webp   one picture a frame, in natural order of their names
ROOT/EPISODE/actions.npy             [T, A]
ROOT/EPISODE/state.npy or qpos.npy   [T, S], may be missing
ROOT/EPISODE/instruction.txt         what the robot was told; or one `task` for all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.base import Role, StepSpec
from vla.featurize.sources.camera_files import PictureFolder, picture_names
from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.files import folders, listing, read_numbers, read_text
from vla.featurize.sources.recordings import CLOCK, Found, RecordedSource, Recording, choose_cameras, require_lengths
from vla.stores.errors import SourceError, UsageError
from vla.stores.manifest import Rate

ACTION, STATES = "actions", ("state", "qpos")
ROLES: dict[str, Role] = {"action": "action", "state": "state", "privileged": "privileged"}
INSTRUCTION = "instruction.txt"
TASK = "--set 'source_options.task=\"...\"' for all that have none"


class FoldersSource(RecordedSource):
    """One folder an episode; its name is the episode's id.

    `map` takes our names (`action`, `state`, or a new one) to names of .npy files, such as action=joint_action;
    `cameras` chooses views, in order (None: all, []: numbers alone); `fps` [1/s] has to be given; `task` is the
    instruction of episodes without instruction.txt. Steps are `action`, `state` and mapped ones, float32 [D],
    `timestamp` float64 [] in seconds, `frame_index` int64 [].
    """

    kind = "folders"

    def __init__(
        self,
        root: Path | str,
        *,
        map: Mapping[str, str] | None = None,
        cameras: Sequence[str] | None = None,
        fps: Rate | None = None,
        task: str | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(root, fps=fps, cameras=cameras, skip_bad=skip_bad)
        self._map = {name: theirs.removesuffix(".npy") for name, theirs in (map or {}).items()}
        for name in self._map:
            if not name.isidentifier() or name in CLOCK:
                fix = "--map NAME=FILE, such as action=joint_action"
                raise UsageError(f"--map {name}", expected="a plain name, none of the clock's", fix=fix)
        self._task = task

    def find(self) -> Found:
        """See `RecordedSource.find`."""
        episodes = {folder.name: partial(self._look, folder) for folder in folders(self.root, self.root)}
        if not episodes:
            raise SourceError(f"{self.root} holds no folder", expected="one for each episode")
        return episodes

    def mapping(self) -> dict[str, str]:
        """See `RecordedSource.mapping`."""
        return {name: f"{theirs}.npy" for name, theirs in sorted(self._map.items())}

    def _look(self, folder: Path) -> Recording:
        files = self._numbers(folder)
        values = {name: read_numbers(path) for name, path in files.items()}
        there = {path.name: path for path in folders(self.root, folder) if picture_names(self.root, path)}
        views = {
            camera: PictureFolder.open(self.root, path, f"camera {camera}, {folder.name}")
            for camera, path in choose_cameras(there, self.cameras, str(folder)).items()
        }
        counts = {files[name].name: len(array) for name, array in values.items()}
        length = require_lengths(counts | {name: view.length for name, view in views.items()}, str(folder))
        used = [path.relative_to(self.root).as_posix() for path in files.values()]
        text = next((path for path in listing(self.root, folder) if path.name == INSTRUCTION), None)
        if text is not None:
            used.append(text.relative_to(self.root).as_posix())
        elif self._task is None:
            raise SourceError(f"{folder / INSTRUCTION} is missing", expected="what the robot was told", fix=TASK)
        task = read_text(text) if text is not None else str(self._task)
        specs = {name: StepSpec(array.shape[1:], "float32", ROLES.get(name, "other")) for name, array in values.items()}
        return Recording(task, length, views, specs, partial(_steps, files), tuple(used))

    def _numbers(self, folder: Path) -> dict[str, Path]:
        """Return {our name: .npy file}; `action` always."""
        there = {path.stem: path for path in listing(self.root, folder) if path.suffix == ".npy"}
        states = [name for name in STATES if name in there]
        if len(states) > 1 and "state" not in self._map:
            fix = "--map state=qpos, or --map state=state"
            raise SourceError(f"{folder} holds state.npy and qpos.npy", expected="one of them", fix=fix)
        names = {"action": ACTION, **({"state": states[0]} if states else {}), **self._map}
        for name, theirs in names.items():
            if theirs not in there:
                listed = ", ".join(f"{stem}.npy" for stem in there) or "no .npy"
                raise SourceError(
                    f"{folder / theirs}.npy is missing; the folder holds {listed}",
                    expected=f"the {name} of each frame",
                    fix=f"--map {name}=NAME, or {SKIP}",
                )
        return {name: there[theirs] for name, theirs in names.items()}


def _steps(files: Mapping[str, Path]) -> dict[str, NDArray[np.generic]]:
    return {name: read_numbers(path) for name, path in files.items()}
