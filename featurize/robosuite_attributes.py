"""What the attributes of a robosuite, robomimic or LIBERO file say about the environment that made it.

`data` has `env_args` (robomimic: JSON with env_name and env_kwargs), or `env` and `env_info` (robosuite's own
collection script), and in LIBERO `problem_info` with the instruction.
"""

from __future__ import annotations

import math
from typing import Any

import h5py

from vla.featurize.hdf5 import text_attribute
from vla.stores.documents import parse_json

INSTRUCTIONS = {
    "Lift": "lift the cube",
    "PickPlaceCan": "put the can into its bin",
    "NutAssemblySquare": "put the square nut on its peg",
    "ToolHang": "assemble the frame and hang the tool on it",
    "TwoArmTransport": "hand the hammer over and put it into the far bin",
    "TwoArmHandover": "hand the hammer over from one arm to the other",
    "TwoArmLift": "lift the pot with both arms",
    "TwoArmPegInHole": "put the peg into the hole",
    "Wipe": "wipe the table clean",
}
"""robosuite's environments have no instruction; these say what each one's success means."""


def environment_name(file: h5py.File) -> str | None:
    """Return the environment's name, such as "Lift", or None."""
    stated = _arguments(file).get("env_name")
    return stated if isinstance(stated, str) else text_attribute(file["data"], "env")


def control_frequency(file: h5py.File) -> float | None:
    """Return the control frequency in Hz that the environment's arguments state, or None."""
    arguments = _arguments(file)
    inner = arguments.get("env_kwargs")
    stated = inner.get("control_freq") if isinstance(inner, dict) else arguments.get("control_freq")
    return float(stated) if isinstance(stated, (int, float)) and 0 < stated < math.inf else None


def instruction(file: h5py.File) -> str:
    """Return the instruction that the file states, or that its environment means; "" where neither is known."""
    stated = _json(text_attribute(file["data"], "problem_info")).get("language_instruction")
    if isinstance(stated, list):  # LIBERO writes one string or a list with it
        stated = " ".join(map(str, stated))
    return stated if isinstance(stated, str) and stated else INSTRUCTIONS.get(environment_name(file) or "", "")


def _arguments(file: h5py.File) -> dict[str, Any]:
    data = file["data"]
    return _json(text_attribute(data, "env_args")) or _json(text_attribute(data, "env_info"))


def _json(text: str | None) -> dict[str, Any]:
    """Return the object in `text`, {} where there is none: these are optional facts."""
    try:
        found = parse_json(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
