from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vla.featurize import batch_size
from vla.featurize.batch_size import find_batch_size, largest_batch
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.stores.errors import MachineError, UsageError
from vla.training.config import TrainConfig
from vla.training.torch_device import choose_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SOURCE = "synthetic:episodes=2,length=[5,5],cameras=2,image_size=16"


def memory(limit: int) -> Any:
    def encode(count: int) -> None:
        if count > limit:
            raise torch.OutOfMemoryError("out of memory")

    return encode


@pytest.mark.parametrize(
    ("limit", "size"), [(1, 1), (2, 1), (3, 1), (4, 2), (100, 32), (10**6, batch_size.LARGEST // 2)]
)
def test_half_of_the_largest_power_of_two_that_runs_is_taken(limit: int, size: int) -> None:
    assert largest_batch(memory(limit), CUDA) == size


def test_a_frame_that_never_fits_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(MachineError, match=r"one time step does not fit into the memory of cuda.*device=cpu"):
        largest_batch(memory(0), CUDA)


def test_other_errors_of_a_network_are_not_taken_for_a_full_memory() -> None:
    def broken(count: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        largest_batch(broken, CUDA)


def test_the_first_frame_of_all_views_is_what_is_tried() -> None:
    job = prepare(FeaturizeConfig.build({"source": SOURCE, "backbone": "toy"}))
    seen = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(job.backbone, name)

        def encode(self, images: torch.Tensor) -> Any:
            seen.append(tuple(images.shape))
            memory(4)(len(images))

    assert find_batch_size(Counting(), job.source, job.source.index(), CUDA) == 2  # type: ignore[arg-type]
    assert seen == [(count, 2, 3, 4, 4) for count in (1, 2, 4, 8)]
    assert find_batch_size(job.backbone, job.source, job.source.index(), CPU) == batch_size.ON_CPU


def test_auto_makes_the_same_store_on_a_cpu(tmp_path: Path) -> None:
    files = []
    for size in ("auto", 16):
        config = FeaturizeConfig.build({"source": SOURCE, "backbone": "toy", "batch_size": size, "device": "cpu"})
        run(prepare(config), tmp_path / str(size))
        files.append(
            [path.read_bytes() for path in sorted((tmp_path / str(size) / "frames").rglob("*")) if path.is_file()]
        )
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "meta", "", "CPU", "mps:1x"])
def test_a_device_of_no_known_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=f"^device {name!r}.*; expected auto, cpu, cuda"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "mps", "xpu", "xpu:3"])
def test_a_device_that_torch_has_and_this_machine_lacks_is_named(name: str) -> None:
    if torch.get_device_module(name.partition(":")[0]).device_count() > int(name.partition(":")[2] or 0):
        pytest.skip(f"this machine has {name}")
    with pytest.raises(MachineError, match=rf"'{name}' is not there.*--set device=cpu"):
        choose_device(name)
    with pytest.raises(MachineError, match=rf"'{name}' is not there.*--set train\.device=cpu"):
        choose_device(TrainConfig.build({"device": name}).device, "train.device")


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu").type == "cpu"
