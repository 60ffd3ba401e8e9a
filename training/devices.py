"""The machine under the loop: device, processes, precision and trackers, all through accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType

from vla.stores.errors import MachineError, UsageError
from vla.stores.settings import nearest
from vla.training.config import TrainConfig
from vla.training.torch_device import choose_device

SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
"""One process, or data-parallel ones. Sharded optimisers (FSDP, DeepSpeed) would need checkpoints of another form."""


@contextmanager
def accelerated(config: TrainConfig, run_dir: Path) -> Iterator[Accelerator]:
    """Yield the Accelerator of one run; end its trackers and its process group afterwards.

    Raises `UsageError` for unknown trackers and settings of the launcher that contradict `config`, `MachineError`
    where a device or a tracker's package is missing.
    """
    _check_trackers(config.trackers)
    device = choose_device(config.device, "train.device")
    if device.index is not None and "LOCAL_RANK" in os.environ:
        raise UsageError(f"train.device {config.device!r} of several processes", expected="auto: one device for each")
    fresh = not AcceleratorState._shared_state
    # Where accelerate has to choose itself (the first GPU, or each process's own) it is left to.
    chosen = config.device not in ("auto", "cpu", "cuda")
    if chosen:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            cpu=device.type == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=str(run_dir),
        )
    except ValueError as error:
        found = str(error).split("\n")[0]
        fix = "--set train.precision=no" if config.precision != "no" else "--set train.device=auto"
        raise MachineError(f"accelerate refuses these settings: {found}", fix=fix) from None
    finally:
        if chosen:
            del os.environ["ACCELERATE_TORCH_DEVICE"]
    try:
        if config.precision != "no" and not accelerator.native_amp:  # accelerate ignores fp16 on a CPU in silence
            found = f"precision {config.precision!r} is not there on device {accelerator.device.type!r}"
            raise MachineError(found, expected="a GPU", fix="--set train.precision=no, or bf16")
        if accelerator.distributed_type not in SUPPORTED:
            raise UsageError(f"launched as {accelerator.distributed_type.value}", expected="one process, or plain DDP")
        if accelerator.gradient_accumulation_steps != config.accumulate:  # the launcher's variable wins over ours
            raise UsageError(
                f"the launcher asks for {accelerator.gradient_accumulation_steps} accumulation steps",
                expected=f"train.accumulate = {config.accumulate}",
                fix="unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            )
        yield accelerator
    finally:
        accelerator.end_training()
        if fresh:  # accelerate keeps device and precision for the whole process; the next run may want others
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _check_trackers(names: tuple[str, ...]) -> None:
    """Refuse what accelerate would drop with no more than a debug message."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise UsageError(
                f"unknown tracker {name!r}{nearest(name, LOGGER_TYPE_TO_CLASS)}", expected=f"one of {known}"
            )
        if name not in available:
            raise MachineError(f"tracker {name!r} is not installed", fix=f"pip install {name}")
