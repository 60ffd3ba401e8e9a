"""Diffusion Policy's ReplayBuffer, written here in the layout of its PushT file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.replay_buffer import ReplayBufferSource
from vla.stores.errors import SourceError, VlaError
from vla.stores.store import open_store

ENDS = np.array([7, 12, 20])
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 12, 16, 3)).astype(np.uint8)
ACTION, STATE = RNG.normal(size=(20, 2)).astype("f4"), RNG.normal(size=(20, 5)).astype("f4")
CHUNK = 6


def write(root: Path, arrays: dict[str, NDArray[Any]]) -> Path:
    group = zarr.open_group(root, mode="a", zarr_format=2)
    codec = numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE)
    for name, values in arrays.items():
        chunks = (CHUNK, *values.shape[1:]) if name.startswith("data/") else values.shape
        made = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=codec, overwrite=True
        )
        made[:] = values
    return root


@pytest.fixture
def pusht(tmp_path: Path) -> Path:
    arrays = {"data/img": PIXELS.astype("f4"), "data/action": ACTION, "data/state": STATE}
    arrays |= {"data/keypoint": np.zeros((20, 9, 2), "f4"), "data/n_contacts": np.zeros((20, 1), "f4")}
    return write(tmp_path / "pusht.zarr", arrays | {"meta/episode_ends": ENDS})


def test_pushts_layout_is_recognised(pusht: Path) -> None:
    source = open_source(pusht, fps=10, task="push the T")
    assert isinstance(source, ReplayBufferSource)
    index = source.index()
    assert [(e.id, e.length, e.task) for e in index.episodes] == [
        ("episode_000000", 7, "push the T"),
        ("episode_000001", 5, "push the T"),
        ("episode_000002", 8, "push the T"),
    ]
    assert index.cameras == ("img",)
    assert {name: spec.shape for name, spec in index.steps.items()} == {"action": (2,), "state": (5,)}


def test_float_pictures_come_back_as_the_bytes_they_were(pusht: Path) -> None:
    source = ReplayBufferSource(pusht, fps=10)
    np.testing.assert_array_equal([views[0] for views in source.frames(1, 1, 5)], PIXELS[8:12])
    np.testing.assert_array_equal([views[0] for views in source.frames(2, 0, 8)], PIXELS[12:])
    assert next(source.frames(0, 0, 1))[0].dtype == np.uint8


def test_bytes_and_fractions_give_the_same_pictures(pusht: Path) -> None:
    write(pusht, {"data/img": PIXELS, "data/top": (PIXELS / 255).astype("f4")})
    whole = ReplayBufferSource(pusht, fps=10, cameras=["img"])
    fractions = ReplayBufferSource(pusht, fps=10, cameras=["top"], picture_range=1)
    for source in (whole, fractions):
        np.testing.assert_array_equal([views[0] for views in source.frames(1, 0, 5)], PIXELS[7:12])


def test_columns_split_what_a_robot_knows_from_what_it_does_not(pusht: Path) -> None:
    source = ReplayBufferSource(pusht, fps=10, state=["state[0:2]"], privileged=["state[2:5]"])
    steps = source.steps(1)
    np.testing.assert_array_equal(steps["state"], STATE[7:12, :2])
    np.testing.assert_array_equal(steps["privileged"], STATE[7:12, 2:])
    np.testing.assert_array_equal(steps["action"], ACTION[7:12])
    assert source.index().steps["privileged"].role == "privileged"


def test_featurize_makes_a_store_of_it(pusht: Path, tmp_path: Path) -> None:
    config = FeaturizeConfig.build({"source": str(pusht), "backbone": "toy", "source_options": {"fps": 10}})
    run(prepare(config), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert store.complete
    np.testing.assert_array_equal(store.steps("action"), ACTION)
    assert store.manifest.picture_sizes == {"img": PIXELS.shape[1:3]}


def test_an_episode_with_nan_is_refused_by_row_or_left_out(pusht: Path) -> None:
    bad = ACTION.copy()
    bad[9, 1] = np.nan
    write(pusht, {"data/action": bad})
    with pytest.raises(SourceError, match="action, rows 7 to 11, frame 2 is NaN"):
        ReplayBufferSource(pusht, fps=10).index()
    source = ReplayBufferSource(pusht, fps=10, skip_bad=True)
    assert list(source.index().skipped) == ["episode_000001"]
    np.testing.assert_array_equal(source.steps(1)["action"], ACTION[12:])
    np.testing.assert_array_equal(next(source.frames(1, 0, 1))[0], PIXELS[12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": None}, r"frames a second.*source_options\.fps"),
        ({"cameras": ["imgs"]}, "no pictures 'imgs', did you mean 'img'"),
        ({"action": "actions"}, "no numbers 'actions', did you mean 'action'"),
        ({"state": ["state[3:9]"]}, r"columns 'state\[3:9\]'; expected some of 0:5"),
        ({"state": ["keypoint"]}, "no numbers 'keypoint'"),
        ({"picture_range": 2}, "picture_range 2; expected 1 or 255"),
    ],
)
def test_a_wrong_option_is_refused(pusht: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VlaError, match=message):
        ReplayBufferSource(pusht, **{"fps": 10, **options}).index()


def test_a_missing_and_a_truncated_chunk_are_refused_by_file(pusht: Path) -> None:
    chunk = pusht / "data/img/2.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(SourceError, match=r"img/2\.0\.0\.0 has"):
        ReplayBufferSource(pusht, fps=10).index()
    chunk.unlink()
    with pytest.raises(SourceError, match=r"img/2\.0\.0\.0 is missing"):
        ReplayBufferSource(pusht, fps=10).index()


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (PIXELS * np.float32(1.1), r"row \d+ has pixels from .*expected 0 to 255"),
        (PIXELS / np.float32(255), r"expected 0 to 255. Try: .*picture_range=1"),
        (np.where(PIXELS > 250, np.float32("nan"), PIXELS), "has pixels from nan"),
    ],
    ids=["too bright", "fractions", "nan"],
)
def test_pixels_that_cannot_be_what_was_said_are_refused(pusht: Path, pictures: NDArray[Any], message: str) -> None:
    write(pusht, {"data/img": pictures.astype("f4")})
    with pytest.raises(SourceError, match=message):
        list(ReplayBufferSource(pusht, fps=10).frames(0, 0, 7))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"meta/episode_ends": np.array([7, 7, 20])}, "episode 1 ends at 7"),
        ({"meta/episode_ends": np.array([7, 12, 21])}, "has 20 rows; expected 21"),
        ({"data/img": np.zeros((20, 3, 12, 16), "f4")}, r"has no pictures, only .*expected an array \[N, H, W, 3\]"),
        ({"data/img": PIXELS.astype("i4")}, "dtype int32; expected pictures as uint8 or floats"),
    ],
)
def test_a_layout_that_does_not_hold_is_refused(pusht: Path, arrays: dict[str, NDArray[Any]], message: str) -> None:
    write(pusht, arrays)
    with pytest.raises(SourceError, match=message):
        ReplayBufferSource(pusht, fps=10).index()


def test_an_array_of_pickled_objects_is_never_opened(pusht: Path) -> None:
    meta = pusht / "data/state/.zarray"
    meta.write_text(meta.read_text().replace('"<f4"', '"|O"'))
    with pytest.raises(SourceError, match="objects are pickles"):
        ReplayBufferSource(pusht, fps=10).index()
