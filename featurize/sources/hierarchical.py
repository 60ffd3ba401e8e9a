"""Runs of tasks that have parts: a high-level task, and the subtask that each run shows.

    A  ROOT/<task>/<subtask>/run_<id>/{actions.npy [T, A], qpos.npy [T, S], <camera>/*.jpg}
    B  ROOT/stage<N>/run_<id>/{actions.npy, qpos.npy, <camera>/*.jpg}

Texts come from `instruction_json` (stage_texts.py); older runs keep their numbers in data.txt (data_txt.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.base import StepSpec
from vla.featurize.sources.camera_files import PictureFolder, picture_names
from vla.featurize.sources.data_txt import read_data_txt
from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.files import digest_files, folders, listing, read_numbers
from vla.featurize.sources.recordings import Found, RecordedSource, Recording, choose_cameras, require_lengths
from vla.featurize.sources.stage_texts import Said, StageTexts
from vla.stores.errors import SourceError
from vla.stores.manifest import Rate
from vla.stores.user_given import UserGiven

_STAGE = re.compile(r"stage(\d{1,6})")
Place = tuple[Path, Callable[[StageTexts], Said]]
"""A run's folder, and how its texts are found."""


class HierarchicalSource(RecordedSource):
    """One run an episode; its id is its path, such as `table/pick cup/run_3`.

    `instruction_json` is the file of texts; layout B needs it, layout A falls back to the folders' names. An episode's
    `task` is its subtask, and `texts` holds `high_level_task`, `subtask` and `text` (the subtask in other words, or
    the subtask). `cameras` chooses views, in order (None: all, []: numbers alone); `fps` [1/s] has to be given. Steps
    are `action` and `state`, float32 [D].
    """

    kind = "hierarchical"

    def __init__(
        self,
        root: Path | str,
        *,
        instruction_json: Annotated[str | None, UserGiven()] = None,
        cameras: Sequence[str] | None = None,
        fps: Rate | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(root, fps=fps, cameras=cameras, skip_bad=skip_bad)
        self._file = Path(instruction_json).resolve() if instruction_json is not None else None

    def find(self) -> Found:
        """See `RecordedSource.find`."""
        texts = StageTexts.read(self._file) if self._file is not None else StageTexts()
        tops = folders(self.root, self.root)
        stages = [top for top in tops if _STAGE.fullmatch(top.name) and self._has_runs(top)]
        if stages and len(stages) < len(tops):
            other = next(top for top in tops if top not in stages)
            raise SourceError(
                f"{self.root} holds {stages[0].name}/run… and {other.name}/",
                expected="stage<N>/run_<id> or <task>/<subtask>/run_<id>, not both",
                fix=f"move {other.name} away",
            )
        places = [place for top in tops for place in (self._stage(top) if stages else self._task(top))]
        if not places:
            raise SourceError(f"{self.root} holds no run", expected="<task>/<subtask>/run_<id> or stage<N>/run_<id>")
        return {
            folder.relative_to(self.root).as_posix(): partial(self._look, folder, said, texts)
            for folder, said in places
        }

    def mapping(self) -> dict[str, str]:
        """See `RecordedSource.mapping`. The texts are the tasks that a backbone may be conditioned on."""
        if self._file is None:
            return {}
        return {"instruction_json": digest_files(self._file.parent, [self._file.name])}

    def _has_runs(self, folder: Path) -> bool:
        return any(run.name.startswith("run") for run in folders(self.root, folder))

    def _stage(self, top: Path) -> list[Place]:
        match = _STAGE.fullmatch(top.name)
        stage = int(match[1]) if match else 0
        return [(run, lambda texts: texts.of_stage(stage)) for run in folders(self.root, top) or [top]]

    def _task(self, top: Path) -> list[Place]:
        return [
            (run, partial(StageTexts.of_folders, task=top.name, subtask=part.name))
            for part in folders(self.root, top) or [top]
            for run in folders(self.root, part) or [part]
        ]

    def _look(self, folder: Path, said: Callable[[StageTexts], Said], texts: StageTexts) -> Recording:
        if not folder.name.startswith("run"):
            raise SourceError(f"{folder} is no run", expected="run_<id>", fix=f"move it away, or {SKIP}")
        files = self._numbers(folder)
        values = _read(files)
        there = {path.name: path for path in folders(self.root, folder) if picture_names(self.root, path)}
        name = folder.relative_to(self.root).as_posix()
        views = {
            camera: PictureFolder.open(self.root, path, f"camera {camera}, {name}")
            for camera, path in choose_cameras(there, self.cameras, str(folder)).items()
        }
        counts = {path.name: len(array) for path, array in zip(files, values.values(), strict=False)}
        length = require_lengths(counts | {camera: view.length for camera, view in views.items()}, str(folder))
        words = said(texts)
        specs = {
            key: StepSpec(array.shape[1:], "float32", "action" if key == "action" else "state")
            for key, array in values.items()
        }
        used = tuple(path.relative_to(self.root).as_posix() for path in files)
        return Recording(words.subtask, length, views, specs, partial(_read, files), used, words.named())

    def _numbers(self, folder: Path) -> tuple[Path, ...]:
        """Return actions.npy and, where it is there, qpos.npy; else data.txt."""
        there = {path.name: path for path in listing(self.root, folder)}
        if "actions.npy" in there:
            return tuple(there[name] for name in ("actions.npy", "qpos.npy") if name in there)
        if "data.txt" in there:
            return (there["data.txt"],)
        raise SourceError(f"{folder / 'actions.npy'} is missing", expected="it, or the older data.txt", fix=SKIP)


def _read(files: Sequence[Path]) -> dict[str, NDArray[np.generic]]:
    if files[0].suffix == ".txt":
        return {**read_data_txt(files[0])}
    return {name: read_numbers(path) for name, path in zip(("action", "state"), files, strict=False)}
