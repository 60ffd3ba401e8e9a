"""Weights on disk: found, digested, read without running code, and loaded with every key accounted for."""

from __future__ import annotations

import functools
import hashlib
import math
import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import get_total_norm

from vla.stores.errors import DataError, MachineError
from vla.stores.pointers import refuse_pointer

RANDOM = "random"
"""The value of `--weights` that asks for random weights by name; nothing falls back to them."""

SUFFIXES = (".safetensors", ".pth", ".pt")

DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What reading a damaged file raised in 6000 random mutations: torch's restricted unpickler checks little."""


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of weight files: of the bytes of one, or of the sorted digests of several. Cached per process."""
    digests = []
    for path in paths:
        status = path.stat()
        digests.append(_digest_file(path.resolve(), status.st_size, status.st_mtime_ns))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _digest_file(path: Path, size: int, mtime_ns: int) -> str:
    """Stream a file through SHA-256; size and time are in the key so that a replaced file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of tensors in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def find_file(path: Path) -> Path:
    """Return a weight file, given itself or the folder that holds exactly one.

    Raises `MachineError` where there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise MachineError(f"no weights at {path}", expected=f"a file ({', '.join(SUFFIXES)}) or a folder with one")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:3]) or "none"
        raise MachineError(f"{path} holds {len(files)} weight files ({names})", expected="one", fix="--weights FILE")
    return files[0]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running any code that the file may carry. Raises `DataError` where it cannot."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except DAMAGE as error:
        refuse_pointer(path)
        raise DataError(f"{path} is not a file of weights: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise DataError(f"{path} holds no state dict", expected="{name: tensor}")
    return tensors


def load_strictly(network: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into a network. Raises what `require_fit` and `require_finite` raise."""
    require_fit(network, tensors, path)
    require_finite(tensors, path)
    network.load_state_dict(tensors)


def require_fit(network: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `DataError` for any missing, unexpected or misshapen tensor."""
    wanted = network.state_dict()
    require_keys(sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys()), path)
    for name, values in tensors.items():
        if values.shape != wanted[name].shape:
            shapes = f"{tuple(values.shape)}, the network's is {tuple(wanted[name].shape)}"
            raise DataError(f"{path} does not fit: {name} is {shapes}")


def require_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `DataError` naming the first tensor of `path` that holds NaN or an infinity."""
    wrong = first_not_finite(tensors)
    if wrong is not None:
        raise DataError(
            f"{path}: {wrong} holds numbers that are not finite", expected="weights without NaN or infinity"
        )


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity; None where every number is finite.

    Costs one pass over memory: 12 ms for 240 MB on one core (`isfinite().all()`: 146 ms), a twelfth of the SHA-256 that
    a checkpoint takes anyway; on a GPU one fused maximum of all tensors and one transfer.
    """
    numbers = {name: values for name, values in tensors.items() if values.is_floating_point() and values.numel()}
    if _all_finite([values.detach() for values in numbers.values()]):
        return None
    return next(name for name, values in numbers.items() if not bool(values.isfinite().all()))


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    # Both reductions pass NaN on, and neither overflows, as a sum would.
    on_gpu = [values for values in tensors if values.is_cuda]
    if on_gpu and not math.isfinite(get_total_norm(on_gpu, math.inf, foreach=True)):
        return False
    return all(math.isfinite(end) for values in tensors if not values.is_cuda for end in torch.aminmax(values))


def require_keys(missing: Sequence[str], unexpected: Sequence[str], path: Path) -> None:
    """Raise `DataError` where a checkpoint lacks parameters (they would stay random) or holds others."""
    for what, keys in (("lacks", missing), ("has unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise DataError(f"{path} does not fit: it {what} {', '.join(keys[:3])}{more}")
