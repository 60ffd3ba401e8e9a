"""Drawing with MuJoCo where there is no display."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import sys
from typing import Any

from vla.stores.errors import MachineError, missing_extra


def make_renderer(mujoco: Any, model: Any, size: int) -> Any:
    """Return a `mujoco.Renderer` of square pictures of `size` pixels, shadows and reflections off."""
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
    model.vis.global_.offheight = max(model.vis.global_.offheight, size)
    renderer = mujoco.Renderer(model, height=size, width=size)
    # Trap: in a software renderer the 4096 x 4096 shadow map takes nine tenths of a frame, and a second pass for
    # reflections half of the rest (measured at 128 px: 135, 51 and 26 ms) for a difference nobody sees.
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    return renderer


def choose_offscreen_library(*, required: bool) -> None:
    """Have MuJoCo draw without a display. A value of MUJOCO_GL that the user has set stays.

    MuJoCo reads the variable once, when it is imported: so even an environment without cameras chooses, for the next
    one of this process may have some. Without the library it leaves the variable alone unless drawing is `required`.
    """
    if platform.system() != "Linux" or os.environ.get("MUJOCO_GL", "osmesa") != "osmesa":
        return
    missing = _missing_offscreen_library()
    if missing is None:
        os.environ["MUJOCO_GL"] = "osmesa"
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
    elif required:
        raise missing


def _missing_offscreen_library() -> MachineError | None:
    """Return what keeps MuJoCo from drawing through OSMesa, or None."""
    if importlib.util.find_spec("OpenGL") is None:
        return MachineError("the package PyOpenGL is not installed", fix=missing_extra("sim"))
    if ctypes.util.find_library("OSMesa") is None:
        return MachineError(
            "the library OSMesa, which renders off screen, is not installed",
            fix="apt-get install -y --no-install-recommends libosmesa6",
        )
    if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ:
        return MachineError(
            "mujoco was imported before it could be told to draw off screen", fix="export MUJOCO_GL=osmesa"
        )
    return None
