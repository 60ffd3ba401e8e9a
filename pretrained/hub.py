"""Models in the layout of the model hub: a folder with `config.json` and `model.safetensors`, here or in the cache.

transformers renames parameters between releases and fills those that it does not find with random numbers, so models
are loaded through its own `from_pretrained`, which knows the old names, and every key is accounted for afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever client the hub uses
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import nn
from transformers.utils import logging

from vla.pretrained.inference import freeze
from vla.pretrained.weights import DAMAGE, require_finite, require_keys
from vla.stores.documents import read_json_file
from vla.stores.errors import DataError, MachineError
from vla.stores.fingerprint import digest
from vla.stores.pointers import refuse_pointer

FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of `config.json` that no feature depends on: weights are cast to float32 whatever their dtype on disk."""


def find_model(name: str, fix: str, also: Sequence[str] = ()) -> Path:
    """Return the folder of a model, given the folder or a hub id.

    The hub's cache is asked first, so a run never follows an update by itself; then the network, unless
    HF_HUB_OFFLINE is set. `also` are patterns of further files wanted from there. Raises `MachineError` ending in
    `fix` where the model is in neither.
    """
    folder = Path(name).expanduser()
    if not is_hub_id(name):
        if not weight_files(folder):
            raise MachineError(f"no model in {name}", expected="config.json and model.safetensors", fix=fix)
        return folder
    reason = "it is in no cache and the hub was not reached"
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*FILES, *also], local_files_only=local_only))
        except LocalEntryNotFoundError:
            continue
        except GatedRepoError:
            reason = "it is gated: accept its licence on its model page, then `hf auth login`"
            continue
        except (OSError, HTTPError, HFValidationError) as error:
            reason = str(error).strip().partition("\n")[0]
            continue
        if weight_files(folder):
            return folder
        reason = "the hub's copy has no model.safetensors"
    raise MachineError(f"no weights of {name}: {reason}", fix=fix)


def is_hub_id(name: str) -> bool:
    """Tell whether a name means `owner/model` on the hub; a folder of that name here comes first."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def weight_files(folder: Path) -> list[Path]:
    """List the files whose bytes make the model, or nothing where the folder does not hold a whole one.

    Raises `PointerError` where one is a Git-LFS pointer.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return []
    if single.is_file():
        refuse_pointer(single)
        return [single]
    if not index.is_file():
        return []
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(_is_name(file) for file in named.values()):
        raise DataError(f"{index} names no files of {folder}", expected='{"weight_map": {parameter: file}}')
    files = [folder / file for file in sorted(set(named.values()))]
    if not all(file.is_file() for file in files):
        return []
    for file in files:
        refuse_pointer(file)
    return files


def _is_name(file: object) -> bool:
    """Return whether a value names a file of the folder itself: an index never leads out of it."""
    return isinstance(file, str) and file not in ("", ".", "..") and not {"/", "\\", "\0"} & set(file)


def read_model_config(folder: Path) -> tuple[str, str]:
    """Return (model type, SHA-256 of what `config.json` says of the vision model)."""
    values = read_json(folder / "config.json")
    vision = values.get("vision_config", values)
    return str(values.get("model_type")), digest({k: v for k, v in vision.items() if k not in INCIDENTAL})


def load_model(model_class: Any, folder: Path, *, unused: tuple[str, ...] = ()) -> nn.Module:
    """Load a transformers model in float32, frozen. `unused`: prefixes of keys that belong to other parts of a file.

    Raises `DataError` where the file does not hold exactly the parameters of the model.
    """
    source = {"pretrained_model_name_or_path": folder, "local_files_only": True, "use_safetensors": True}
    return _load(model_class, folder, unused, source)


def fill_model(model_class: Any, config: Any, tensors: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """Make a transformers model from tensors that were read from `path`, as `load_model` does, without copying them."""
    source = {"pretrained_model_name_or_path": None, "config": config, "state_dict": dict(tensors)}
    return _load(model_class, path, (), source)


def _load(model_class: Any, path: Path, unused: tuple[str, ...], source: Mapping[str, Any]) -> nn.Module:
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                **source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
    except (*DAMAGE, StrictDataclassError) as error:
        raise DataError(f"{path} does not load: {str(error).strip().partition(chr(10))[0]}") from None
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(unused))
    require_keys(sorted(info["missing_keys"]), unexpected, path)
    require_finite(model.state_dict(), path)
    return freeze(model)


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a file such as `config.json`. Raises `DataError` where it holds no table."""
    try:
        values = read_json_file(path, finite=True)
    except (OSError, ValueError) as error:
        refuse_pointer(path)
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}", expected="a table")
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its report of keys, which `require_keys` turns into errors."""
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
