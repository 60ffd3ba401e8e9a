"""OpenTrackVLA's published planners: which tensors are whose, and what the files say of how they were trained.

train.py saves `model_epochXX_stepXXXXXX.pt`: {model_state, config, epoch, step, optim_state, scaler_state}.
convert_ckpt_to_hf.py makes a folder of config.json and model.safetensors (or pytorch_model.bin), its keys below
`model.`. Either way the parts are (D width, 1536 channels, H waypoints):

    llm.*                          Qwen3 without its output layer
    proj.net.{0,1,3}.*             LayerNorm [1536], Linear [D, 1536], Linear [D, D]
    tvi.{time,view,kind}_emb.weight    [4096, D], [1, D], [2, D]
    tvi.angle_proj.*               Linear [D, 2]; read only with angle tokens
    tvi.bbox_proj.*                of some versions; nothing ever reads it
    act_token                      [1, 1, D]
    planner.mlp.{0,1,3,5}.*        LayerNorm [D], Linear [2D, D], [2D, 2D], [3H, 2D]
    alpha_task                     [1, 1, 3], the scale of x, y and heading
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.pretrained.hub import find_model, is_hub_id, read_json, weight_files
from vla.pretrained.language import LanguageSizes, fill_language, sizes_of
from vla.pretrained.weights import DAMAGE, load_strictly, read_tensors, require_keys
from vla.stores.errors import DataError, MachineError, UsageError
from vla.stores.pointers import refuse_pointer

PARTS = ("proj.", "tvi.", "act_token", "planner.")
UNUSED = ("tvi.bbox_proj.",)
ANGLE = "tvi.angle_proj."


@dataclass(frozen=True)
class PublishedPlanner:
    """`language` and `parts` are tensors by name; `alpha` [3]; `tanh` whether plans went through tanh in training."""

    path: Path
    language: dict[str, Tensor]
    parts: dict[str, Tensor]
    alpha: Tensor
    tanh: bool

    @property
    def sizes(self) -> LanguageSizes:
        """Sizes of its language model. Raises `DataError` where it holds none."""
        return sizes_of(self.language, self.path)

    def build_language(self) -> nn.Module:
        """Return its language model, frozen, in float32."""
        return fill_language(self.sizes, self.language, self.path)

    def load_into(self, parts: Mapping[str, nn.Module], *, angle: bool) -> None:
        """Copy projector, embeddings, ACT token and planner. Raises `DataError` unless each tensor has its place."""
        unused = UNUSED if angle else (*UNUSED, ANGLE)
        tensors = {name: value.float() for name, value in self.parts.items() if not name.startswith(unused)}
        if "act_token" in tensors:
            tensors["act_token.weight"] = tensors.pop("act_token").flatten(0, 1)
        load_strictly(nn.ModuleDict(parts), tensors, self.path)

    def require_tanh(self, tanh: str) -> None:
        """Raise `UsageError` where a head's `tanh` is not what the planner was trained with."""
        trained = "all" if self.tanh else "off"
        if tanh != trained:
            found = f"model.tanh={tanh}, and {self.path} was trained with tanh {'on' if self.tanh else 'off'}"
            raise UsageError(found, expected=trained, fix=f"--set model.tanh={trained}")


def read_published(name: str) -> PublishedPlanner:
    """Read a planner: a .pt file, a folder in the hub's layout, or a hub id.

    Raises `MachineError` where there is none, and `DataError` for damaged files, for tensors that are no part of a
    planner, and where nothing says whether plans went through tanh.
    """
    fix = f"`hf download {name} --local-dir weights/track`, then --set model.planner=weights/track"
    path = find_model(name, fix) if is_hub_id(name) else Path(name).expanduser()
    if not path.exists():
        raise MachineError(f"no planner at {path}", expected="model_epochXX_stepXXXXXX.pt, or a folder", fix=fix)
    tensors, config = _read_file(path) if path.suffix == ".pt" else _read_folder(path)
    # Distributed training leaves "module." before every name, the folder's class "model.".
    for prefix in ("module.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    alpha = tensors.pop("alpha_task", None)
    language = {name.removeprefix("llm."): value for name, value in tensors.items() if name.startswith("llm.")}
    parts = {name: value for name, value in tensors.items() if name.startswith(PARTS)}
    others = tensors.keys() - parts.keys() - {f"llm.{name}" for name in language}
    missing = [] if alpha is not None else ["alpha_task"]
    require_keys(missing, sorted(others), path)
    assert alpha is not None
    if alpha.numel() != 3 or not bool((alpha.isfinite() & (alpha > 0)).all()):
        raise DataError(f"{path}: alpha_task is {alpha.flatten().tolist()}", expected="3 numbers above 0")
    return PublishedPlanner(path, language, parts, alpha.flatten().float(), _tanh(config, path))


def _read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        found = torch.load(path, "cpu", weights_only=True, mmap=True)
    except DAMAGE as error:
        refuse_pointer(path)
        raise DataError(f"{path} is not a checkpoint: {str(error).partition(chr(10))[0]}") from None
    keys = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
    state, config = (found.get("model_state"), found.get("config")) if isinstance(found, dict) else (None, None)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds {keys}", expected="model_state, tensors by name")
    if not isinstance(config, dict):
        raise DataError(f"{path} holds {keys}", expected="its config beside model_state")
    return dict(state), config


def _read_folder(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    files = weight_files(path) or [path / "pytorch_model.bin"]
    if not files[0].is_file():
        raise MachineError(f"no planner in {path}", expected="config.json and model.safetensors or pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return tensors, read_json(path / "config.json")


def _tanh(config: Mapping[str, Any], path: Path) -> bool:
    """Say what the files say: the published code has defaults both ways, and guessing bounds plans that were not."""
    for key, on in (("no_tanh_actions", False), ("use_tanh_actions", True)):
        if isinstance(config.get(key), bool):
            return bool(config[key]) == on
    raise DataError(f"{path} does not say whether plans go through tanh", expected="no_tanh_actions in its config")
