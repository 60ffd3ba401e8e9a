"""robosuite's human demonstrations: the simulator's states and its model, without pictures.

`data/demo_N`: `states` float64 [T, 1 + nq + nv] (time in s, positions, velocities as MuJoCo has them), `actions`
[T, A], the attribute `model_file` (MJCF text). State i is the one that action i was chosen in: robosuite's collection
script drops the state after the last action. The wheel robosuite==1.4.0 (MIT) holds two such files that MuJoCo 3
loads; of the package only files are read, it is never imported, so none of what it depends on is needed.
"""

from __future__ import annotations

import importlib.util
import posixpath
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.checks import natural
from vla.featurize.hdf5 import dataset, find, group, opened, read_whole, text_attribute
from vla.featurize.robosuite_attributes import environment_name, instruction
from vla.stores.errors import MachineError, SourceError, UsageError
from vla.stores.settings import nearest

TASKS = {"lift": "lift/demo.hdf5", "handover": "handover/panda_panda/demo.hdf5"}
"""Files of models/assets/demonstrations. The third, wipe, has a model that MuJoCo 3 refuses (pos="[0, 0, 0.005]")."""

INSTALL = "pip install --no-deps robosuite==1.4.0"
ASSETS = "/models/assets/"
"""Where the paths inside a model, which are those of the machine that recorded it, meet ours."""


@dataclass(frozen=True)
class Demonstration:
    """`states` float64 [T, 1 + nq + nv], `actions` float32 [T, A] as recorded, `xml` with paths of this machine."""

    name: str
    xml: str
    states: NDArray[np.float64]
    actions: NDArray[np.float32]


@dataclass(frozen=True)
class DemonstrationFile:
    """`lengths` {demonstration: frames} in natural order; `licence` is "unknown" for files of others."""

    path: Path
    assets: Path
    environment: str
    task: str
    fps: float
    lengths: dict[str, int]
    licence: str

    def read(self, name: str) -> Demonstration:
        """Read one demonstration. Raises `SourceError` naming what does not hold."""
        with opened(self.path) as file:
            states = read_whole(dataset(file, f"data/{name}/states")).astype(np.float64)
            actions = read_whole(dataset(file, f"data/{name}/actions")).astype(np.float32)
            text = text_attribute(find(file, f"data/{name}"), "model_file")
        where = f"{self.path}:data/{name}"
        if states.ndim != 2 or actions.ndim != 2 or len(states) != len(actions):
            found = f"states {states.shape}, actions {actions.shape}"
            raise SourceError(f"{where} has {found}", expected="one state [1 + nq + nv] for each action")
        if not (np.isfinite(states).all() and np.isfinite(actions).all()):
            raise SourceError(f"{where} holds NaN or infinite numbers", expected="finite states and actions")
        off = np.abs(np.diff(states[:, 0]) * self.fps - 1)
        if len(off) and off.max() > 0.01:
            raise SourceError(
                f"{where}: states {int(off.argmax())} and {int(off.argmax()) + 1} are not one step apart",
                expected=f"1/{self.fps:g} s",
            )
        return Demonstration(name, local_model(text or "", self.assets, where), states, actions)


def find_demonstrations(task: str) -> DemonstrationFile:
    """Return the file of a task ("lift", "handover") of the installed robosuite, or the file at a path.

    Raises `MachineError` where robosuite, whose meshes any such file needs, is not installed; `UsageError` for an
    unknown task; `SourceError` for a file that is no such record.
    """
    if task not in TASKS and not Path(task).is_file():
        hint = nearest(task, TASKS)
        raise UsageError(f"no demonstrations {task!r}{hint}", expected=f"{', '.join(TASKS)}, or a demo.hdf5")
    spec = importlib.util.find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise MachineError("the package robosuite, which holds the robots' meshes, is not installed", fix=INSTALL)
    assets = Path(next(iter(spec.submodule_search_locations))) / "models" / "assets"
    path = assets / "demonstrations" / TASKS[task] if task in TASKS else Path(task)
    if not path.is_file():
        raise MachineError(f"the installed robosuite has no {path}: later versions dropped it", fix=INSTALL)
    with opened(path) as file:
        return _describe(file, path, assets, "MIT" if task in TASKS else "unknown")


def _describe(file: h5py.File, path: Path, assets: Path, licence: str) -> DemonstrationFile:
    demos = sorted(group(file, "data", "data/demo_N/states"), key=natural)
    environment, said = environment_name(file), instruction(file)
    if not (demos and environment and said):
        found = f"environment {environment}, instruction {said!r}, {len(demos)} demonstrations"
        raise SourceError(f"{path} has {found}", expected="a record of robosuite, of a task with an instruction")
    lengths = {demo: len(dataset(file, f"data/{demo}/actions")) for demo in demos}
    # The states carry their time; the arguments of the environment leave the frequency out where it is the default.
    steps = np.diff(np.atleast_2d(read_whole(dataset(file, f"data/{demos[0]}/states")))[:, 0])
    if not (len(steps) and np.median(steps) > 0):
        raise SourceError(f"{path}:data/{demos[0]} has no time that runs", expected="states of two steps or more")
    fps = round(1 / float(np.median(steps)), 3)
    return DemonstrationFile(path, assets, environment, said, fps, lengths, licence)


def local_model(xml: str, assets: Path, where: str) -> str:
    """Return a recorded MJCF model with the paths of its meshes and textures turned to `assets`.

    A model comes from a stranger: it may name files below `assets` only, and include none. Raises `SourceError`.
    """
    try:
        if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
            raise ET.ParseError("it declares entities")
        root = ET.fromstring(xml)
    except ET.ParseError as error:
        raise SourceError(f"{where}: the model does not parse: {error}", expected="MJCF text in model_file") from None
    for element in root.iter():
        if element.tag in ("include", "model", "plugin"):
            raise SourceError(f"{where}: the model has <{element.tag}>", expected="one whole model")
        for name in ("meshdir", "texturedir", "assetdir"):
            if element.tag == "compiler":
                element.attrib.pop(name, None)
        for name, value in element.attrib.items():
            if name.startswith("file"):
                element.set(name, str(_local_file(value, assets, where)))
    return ET.tostring(root, encoding="unicode")


def _local_file(recorded: str, assets: Path, where: str) -> Path:
    _, found, rest = recorded.rpartition(ASSETS)
    inside = posixpath.normpath(rest)
    if not found or inside.startswith(("..", "/")):
        raise SourceError(f"{where}: the model names the file {recorded!r}", expected=f"a file of robosuite{ASSETS}")
    path = assets / inside
    if not path.is_file():
        raise MachineError(
            f"the installed robosuite has no {path}", expected="the version of the recording", fix=INSTALL
        )
    return path
