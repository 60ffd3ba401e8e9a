"""Digests of weights, of files as they are now and of every property of a tensor; damaged files."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from vla.pretrained.weights import digest_files, digest_tensors, read_tensors
from vla.stores.errors import DataError


def test_the_digest_of_one_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"weights")
    assert digest_files([file]) == hashlib.sha256(b"weights").hexdigest()


def test_a_replaced_file_is_digested_again_and_an_unchanged_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads = tmp_path / "a.pth", []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: reads.append(1) or real(*args))
    file.write_bytes(b"before")
    first = digest_files([file])
    assert digest_files([file]) == first
    assert len(reads) == 1
    file.write_bytes(b"after!!")
    assert digest_files([file]) != first
    assert len(reads) == 2


def test_the_digest_of_several_files_depends_on_all_and_not_on_their_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
    whole = digest_files(files)
    assert digest_files(reversed(files)) == whole
    assert digest_files(files[:2]) != whole
    files[1].write_text("changed")
    assert digest_files(files) != whole


def test_the_digest_of_tensors_sees_names_dtypes_shapes_and_values() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1)}
    same = {name: tensors[name] for name in ("c", "b", "a")}
    assert digest_tensors(same) == digest_tensors(tensors)
    others = [
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "b": tensors["b"].to(torch.float16)},
        {**tensors, "b": tensors["b"] + 1},
        {"A": tensors["a"], "b": tensors["b"], "c": tensors["c"]},
    ]
    assert len({digest_tensors(other) for other in (tensors, *others)}) == 5


def test_the_memory_layout_of_a_tensor_is_not_part_of_its_digest() -> None:
    values = torch.rand(2, 3, 4, 5)
    assert digest_tensors({"w": values.to(memory_format=torch.channels_last)}) == digest_tensors({"w": values})


def saved(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".pth", saved(zipped=True)),
        (".pth", saved(zipped=False)),
        (".pth", pickle.dumps({"a": [1, 2, "x"]}, protocol=2)),
        (".safetensors", save({"a": torch.ones(3, 4)})),
    ],
    ids=["zip", "legacy", "pickle", "safetensors"],
)
def test_any_damage_to_a_weight_file_is_a_data_error(suffix: str, content: bytes, tmp_path: Path) -> None:
    random, file, refused = np.random.default_rng(0), tmp_path / f"weights{suffix}", 0
    for _ in range(150):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 3):
            damaged[position] = random.integers(0, 256)
        file.write_bytes(damaged[: random.integers(len(content) // 2, 2 * len(content))])
        try:
            read_tensors(file)
        except DataError:
            refused += 1
    assert refused > 50
