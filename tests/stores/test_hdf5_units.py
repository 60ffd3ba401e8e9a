"""Files of the HDF5 form: what any h5py reads, and what ours refuses to follow, decode or leave the file for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla.stores.errors import CorruptionError, DataError, MachineError
from vla.stores.fingerprint import canonical, digest
from vla.stores.store import open_store
from vla.stores.verify import verify_store

FILE, COMMIT = "units/unit-000001.h5", "commits/unit-000001.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> Any:
    features = {"grid": ((1, 3, 4), "float16"), "tokens": ((2, 5), "int8"), "half": ((1, 3), "bfloat16")}
    return make_store(tmp_path_factory.mktemp("h5") / "s", features=features, form={"format": "h5"})


@pytest.fixture
def root(whole: Any, tmp_path: Path) -> Path:
    shutil.copytree(whole.root, tmp_path / "s")
    return tmp_path / "s"


def resign(root: Path) -> None:
    """Renew the commit record for the file as it is now, as someone who means harm would."""
    record = json.loads((root / COMMIT).read_bytes())
    record.pop("sha256")
    raw = (root / FILE).read_bytes()
    record["files"][FILE] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (root / COMMIT).write_bytes(canonical({**record, "sha256": digest(record)}) + b"\n")


def require_refused(root: Path, match: str) -> None:
    """Reading unit 1 raises one line that names unit and file; `verify` finds it."""
    with pytest.raises(CorruptionError, match=match) as raised:
        open_store(root).read("grid", np.arange(8, 16))
    assert FILE in str(raised.value)
    assert "unit 1" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert any(FILE in line for line in verify_store(root).findings)


def test_h5py_reads_every_value_and_checks_it(whole: Any) -> None:
    rows, store = np.arange(8, 16), open_store(whole.root)
    with h5py.File(whole.root / FILE) as file:
        for name in ("grid", "tokens", "half"):
            np.testing.assert_array_equal(file[f"frames/{name}"][:], store.read(name, rows))
            assert file[f"frames/{name}"].fletcher32
            assert file[f"frames/{name}"].attrs["dimension_names"][:2].tolist() == [b"row", b"view"]
        for name, values in whole.steps.items():
            np.testing.assert_array_equal(file[f"steps/{name}"][:], values[8:16])
        scales = store.scales("tokens")
        assert scales is not None
        np.testing.assert_array_equal(file["scales/tokens"][:], scales[1])
        assert dict(file.attrs)["row_start"] == 8
        assert file["frames/half"].attrs["dtype"] == b"bfloat16"
        assert file.id.get_create_plist().get_version()[0] == 3  # a superblock whose metadata carry checksums


def test_h5py_notices_a_flipped_bit_itself(root: Path, whole: Any) -> None:
    row = open_store(whole.root).read("grid", np.array([9])).tobytes()
    raw = bytearray((root / FILE).read_bytes())
    raw[raw.index(row)] ^= 1
    (root / FILE).write_bytes(raw)
    with h5py.File(root / FILE) as file, pytest.raises(OSError, match=r"filter returned failure|Fletcher32"):
        file["frames/grid"][:]
    require_refused(root, "differs from its commit in row 9")


def test_verify_says_which_arrays_of_a_damaged_file_are_affected(root: Path) -> None:
    with h5py.File(root / FILE, "r+") as file:
        file["steps/action"][3] = 77
    findings = " ".join(verify_store(root).findings)
    assert f"array steps/action, unit 1: {root / FILE}: steps/action differs from its commit" in findings
    assert "array steps/done" not in findings


def _soft(file: h5py.File) -> None:
    del file["frames/grid"]
    file["frames/grid"] = h5py.SoftLink("/elsewhere")
    file["elsewhere"] = np.zeros((8, 1, 3, 4), np.float16)


def _external_link(file: h5py.File) -> None:
    del file["frames/grid"]
    file["frames/grid"] = h5py.ExternalLink("unit-000000.h5", "/frames/grid")


def _external_group(file: h5py.File) -> None:
    del file["frames"]
    file["frames"] = h5py.ExternalLink("unit-000000.h5", "/frames")


def _virtual(file: h5py.File) -> None:
    del file["frames/grid"]
    layout = h5py.VirtualLayout((8, 1, 3, 4), np.float16)
    layout[:] = h5py.VirtualSource("unit-000000.h5", "frames/grid", (8, 1, 3, 4), np.float16)
    file.create_virtual_dataset("frames/grid", layout)


def _replace(file: h5py.File, shape: tuple[int, ...] = (8, 1, 3, 4), dtype: str = "f2", **options: Any) -> None:
    del file["frames/grid"]
    file.create_dataset("frames/grid", shape, dtype, **options)


def _another(file: h5py.File) -> None:
    del file["frames/grid"]
    file["frames/grid"] = file["frames/tokens"]


def _group(file: h5py.File) -> None:
    del file["frames/grid"]
    file.create_group("frames/grid")


ROW = (1, 1, 3, 4)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (_soft, "'grid' is a link to elsewhere"),
        (_external_link, "'grid' is a link to elsewhere"),
        (_external_group, "'frames' is a link to elsewhere"),
        (_virtual, "not stored in chunks with fletcher32"),
        (lambda f: _replace(f, external=[("canary", 0, h5py.h5f.UNLIMITED)]), "not stored in chunks"),
        (lambda f: _replace(f), "not stored in chunks with fletcher32"),
        (lambda f: _replace(f, chunks=ROW), "fletcher32 and no other filter"),
        (lambda f: _replace(f, chunks=ROW, compression="gzip", fletcher32=True), "no other filter"),
        (lambda f: _replace(f, chunks=ROW, shuffle=True, fletcher32=True), "no other filter"),
        (lambda f: _replace(f, chunks=(8, 1, 3, 4), fletcher32=True), "in chunks of"),
        (lambda f: _replace(f, (10**12, 1, 3, 4), chunks=ROW, fletcher32=True), "1000000000000"),
        (lambda f: _replace(f, dtype="f4", chunks=ROW, fletcher32=True), "float32"),
        (lambda f: _replace(f, dtype=">f2", chunks=ROW, fletcher32=True), ">f2"),
        (lambda f: f.pop("frames/grid"), "doesn't exist"),
        (lambda f: f.pop("frames"), "doesn't exist"),
        (_another, "int8"),
        (_group, "is no data set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_laid_out_as_ours_is_refused(
    root: Path, edit: Callable[[h5py.File], Any], match: str
) -> None:
    with h5py.File(root / FILE, "r+", libver=("v110", "v110")) as file:
        edit(file)
    resign(root)
    require_refused(root, match)
    assert not list(root.rglob("canary"))


def test_a_chunk_with_its_filter_switched_off_is_refused(root: Path) -> None:
    with h5py.File(root / FILE, "r+", libver=("v110", "v110")) as file:
        _replace(file, chunks=ROW, fletcher32=True)
        file["frames/grid"].id.write_direct_chunk((0, 0, 0, 0), b"x" * 28, filter_mask=1)
    resign(root)
    require_refused(root, "chunk of row 0 of frames/grid is not one row inside the file")


def test_a_file_behind_a_user_block_is_refused(root: Path) -> None:
    with h5py.File(root / "aside.h5", "w", userblock_size=512) as file:
        file["x"] = 1
    (root / "aside.h5").replace(root / FILE)
    resign(root)
    require_refused(root, "has a user block")


def test_a_chunk_that_points_outside_the_file_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 guards its indices with checksums, so the lie is told where h5py would tell it."""
    from vla.stores.formats import hdf5_units

    class Lying:
        def __init__(self, dataset: Any) -> None:
            self.id = self
            self._dataset = dataset

        def chunk_iter(self, see: Callable[[Any], None]) -> None:
            self._dataset.id.chunk_iter(lambda chunk: see(chunk._replace(byte_offset=chunk.byte_offset + 10**6)))

    real = hdf5_units._dataset

    def lie(file: Any, path: str, *rest: Any, **options: Any) -> Any:
        dataset = real(file, path, *rest, **options)
        return Lying(dataset) if path == "frames/grid" else dataset

    monkeypatch.setattr(hdf5_units, "_dataset", lie)
    with pytest.raises(CorruptionError, match="not one row inside the file"):
        open_store(root).read("grid", np.array([9]))


@pytest.mark.parametrize("part", ["steps/action", "stats/grid", "scales/tokens", "checksums/grid"])
def test_a_small_array_that_differs_from_its_commit_is_refused(root: Path, part: str) -> None:
    with h5py.File(root / FILE, "r+") as file:
        file[part][0] = 3
    resign(root)
    store = open_store(root)
    read = {
        "steps/action": lambda: store.steps("action"),
        "stats/grid": lambda: store.statistics("grid"),
        "scales/tokens": lambda: store.scales("tokens"),
        "checksums/grid": lambda: store.read("grid", np.array([9])),
    }[part]
    with pytest.raises(CorruptionError, match=rf"unit 1: .*{part} differs from its commit"):
        read()


@pytest.mark.parametrize("change", ["missing", "extra", "none", "text"])
def test_a_record_without_the_digest_of_a_small_array_is_refused(root: Path, change: str) -> None:
    record = json.loads((root / COMMIT).read_bytes())
    record.pop("sha256")
    if change == "missing":
        record["parts"].pop("steps/action")
    elif change == "none":
        record.pop("parts")
    elif change == "extra":
        record["parts"]["steps/more"] = "0" * 64
    else:
        record["parts"] = "text"
    (root / COMMIT).write_bytes(canonical({**record, "sha256": digest(record)}) + b"\n")
    with pytest.raises(CorruptionError, match=r"unit-000001\.json does not record the files of unit 1"):
        open_store(root)


def test_an_error_of_the_disk_stays_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(5, "Unable to synchronously open file")

    with monkeypatch.context() as patched:
        patched.setattr(h5py, "File", fail)
        for read in (lambda s: s.read("grid", np.array([9])), lambda s: s.steps("action")):
            with pytest.raises(MachineError, match="input/output error"):
                read(open_store(root))


def test_the_h5_form_is_not_compressed(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="h5 form is not compressed"):
        make_store(tmp_path / "s", form={"format": "h5", "compression": "zstd"})
