"""robomimic and LIBERO files, written here in their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.robomimic import RobomimicSource
from vla.stores.errors import SourceError, UsageError, VlaError
from vla.stores.store import open_store

LENGTHS = {"demo_2": 5, "demo_10": 4, "demo_1": 3}
ENV = {"env_name": "TwoArmTransport", "type": 1, "env_kwargs": {"control_freq": 20}}


def pixels(demo: str, key: str, length: int) -> NDArray[np.uint8]:
    seed = [int(demo.partition("_")[2]), len(key)]
    return np.random.default_rng(seed).integers(0, 256, (length, 12, 16, 3), np.uint8)


def numbers(demo: str, key: str, length: int, width: int) -> NDArray[np.float64]:
    return np.random.default_rng([int(demo.partition("_")[2]), len(key), width]).normal(size=(length, width))


@pytest.fixture
def demo_file(tmp_path: Path) -> Path:
    """Three demonstrations of two arms, two cameras, and the filters train and valid."""
    path = tmp_path / "image.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(ENV)
        for demo, length in LENGTHS.items():
            file[f"data/{demo}/actions"] = numbers(demo, "actions", length, 14)
            file[f"data/{demo}/states"] = numbers(demo, "states", length, 50)
            for key in ("agentview_image", "robot0_eye_in_hand_image"):
                frames = pixels(demo, key, length)
                file[f"data/{demo}"].create_dataset(
                    f"obs/{key}", data=frames, chunks=(1, 12, 16, 3), compression="gzip"
                )
            for robot in ("robot1", "robot0"):
                for key, width in (("gripper_qpos", 2), ("eef_quat", 4), ("eef_pos", 3), ("joint_pos", 7)):
                    file[f"data/{demo}/obs/{robot}_{key}"] = numbers(demo, robot + key, length, width)
            file[f"data/{demo}/obs/object"] = numbers(demo, "object", length, 10)
        file["mask/train"] = np.array([b"demo_10", b"demo_2"])
        file["mask/lost"] = np.array([b"demo_7"])
    return path


def test_a_file_is_recognised_and_its_episodes_come_in_natural_order(demo_file: Path) -> None:
    source = open_source(demo_file)
    assert isinstance(source, RobomimicSource)
    index = source.index()
    assert [(e.id, e.length) for e in index.episodes] == [("demo_1", 3), ("demo_2", 5), ("demo_10", 4)]
    assert index.cameras == ("agentview", "robot0_eye_in_hand")
    assert (index.fps, index.episodes[0].task) == (20.0, "hand the hammer over and put it into the far bin")
    assert {name: (spec.shape, spec.role) for name, spec in index.steps.items()} == {
        "action": ((14,), "action"),
        "state": ((18,), "state"),
        "privileged": ((10,), "privileged"),
    }


def test_the_state_is_position_quaternion_and_gripper_of_each_robot_in_order(demo_file: Path) -> None:
    steps = RobomimicSource(demo_file).steps(1)
    robots = [
        numbers("demo_2", f"{robot}_{key}".replace("_", "", 1), 5, width)
        for robot in ("robot0", "robot1")
        for key, width in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))
    ]
    np.testing.assert_array_equal(steps["state"], np.concatenate(robots, axis=1).astype(np.float32))
    np.testing.assert_array_equal(steps["action"], numbers("demo_2", "actions", 5, 14).astype(np.float32))


def test_frames_are_the_stored_pixels_from_any_frame_on(demo_file: Path) -> None:
    source = RobomimicSource(demo_file, cameras=["robot0_eye_in_hand", "agentview_image"])
    assert source.index().cameras == ("robot0_eye_in_hand", "agentview")
    views = list(source.frames(1, 2, 5))
    np.testing.assert_array_equal([hand for hand, _ in views], pixels("demo_2", "robot0_eye_in_hand_image", 5)[2:])
    np.testing.assert_array_equal([front for _, front in views], pixels("demo_2", "agentview_image", 5)[2:])


def test_reading_block_by_block_loses_no_frame(demo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [views[0] for views in RobomimicSource(demo_file).frames(1, 0, 5)]
    monkeypatch.setattr("vla.featurize.sources.robomimic.BLOCK", 2)
    np.testing.assert_array_equal([views[0] for views in RobomimicSource(demo_file).frames(1, 0, 5)], whole)


def test_flip_turns_what_libero_stores_upside_down(demo_file: Path) -> None:
    plain, flipped = RobomimicSource(demo_file), RobomimicSource(demo_file, flip=True)
    np.testing.assert_array_equal(next(flipped.frames(0, 0, 1))[0], next(plain.frames(0, 0, 1))[0][::-1])
    assert flipped.index().mapping != plain.index().mapping  # it enters the fingerprint


@pytest.mark.parametrize(("said", "turned"), [("False", False), ("no", False), ("True", True), (False, False)])
def test_a_truth_that_is_written_as_text_means_what_it_says(demo_file: Path, said: Any, turned: bool) -> None:
    index = open_source(demo_file, flip=said).index()
    assert ("flip" in index.mapping) == turned


def test_one_name_alone_is_one_camera_and_one_state(demo_file: Path) -> None:
    index = open_source(demo_file, cameras="agentview", state="robot0_eef_pos").index()
    assert (index.cameras, index.steps["state"].shape) == (("agentview",), (3,))


@pytest.mark.parametrize("option", [{"fps": rate} for rate in ("abc", 0, -1, float("inf"), float("nan"), True)])
def test_a_rate_that_is_none_is_refused_in_one_line(demo_file: Path, option: dict[str, Any]) -> None:
    for kind in ("robomimic", "replay-buffer"):
        with pytest.raises(UsageError, match=f"^the {kind} source: fps = [^\\n]*$"):
            open_source(f"{kind}:{demo_file}", **option)


@pytest.mark.parametrize("option", [{name: 5} for name in ("cameras", "state", "filter", "task", "flip")])
def test_options_of_another_type_are_refused_in_one_line(demo_file: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^the robomimic source: {next(iter(option))} = 5: Input [^\\n]*$"):
        open_source(demo_file, **option)


def test_a_file_whose_rate_is_infinite_does_not_say_its_rate(demo_file: Path) -> None:
    with h5py.File(demo_file, "a") as file:
        file["data"].attrs["env_args"] = '{"env_kwargs": {"control_freq": Infinity}}'
    with pytest.raises(SourceError, match="does not say its control frequency"):
        open_source(demo_file).index()


def test_a_libero_file_gives_its_instruction_and_its_rgb_cameras(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "libero.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Libero_Kitchen", "env_kwargs": {"control_freq": 20}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        file["data/demo_0/actions"] = np.zeros((2, 7))
        file["data/demo_0/obs/agentview_rgb"] = pixels("demo_0", "rgb", 2)
        file["data/demo_0/obs/ee_pos"] = np.zeros((2, 3))
    index = RobomimicSource(tmp_path / "libero.hdf5", state=["ee_pos"]).index()
    assert (index.cameras, index.episodes[0].task) == (("agentview",), "open the drawer")
    assert index.steps["state"].shape == (3,)


def test_a_filter_chooses_demonstrations(demo_file: Path) -> None:
    index = RobomimicSource(demo_file, filter="train").index()
    assert [episode.id for episode in index.episodes] == ["demo_2", "demo_10"]
    with pytest.raises(UsageError, match="no filter 'trian', did you mean 'train'"):
        RobomimicSource(demo_file, filter="trian").index()
    with pytest.raises(SourceError, match="mask/lost lists demo_7"):
        RobomimicSource(demo_file, filter="lost").index()


def test_featurize_makes_a_store_of_it(demo_file: Path, tmp_path: Path) -> None:
    config = FeaturizeConfig.build({"source": str(demo_file), "backbone": "toy"})
    run(prepare(config), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert store.complete
    assert store.manifest.fingerprint["source"]["kind"] == "robomimic"
    np.testing.assert_array_equal(store.steps("action")[3:8], numbers("demo_2", "actions", 5, 14).astype(np.float32))


def _nan(file: h5py.File) -> None:
    file["data/demo_2/actions"][3, 0] = np.nan


def _short(file: h5py.File) -> None:
    del file["data/demo_2/obs/agentview_image"]
    file["data/demo_2/obs/agentview_image"] = pixels("demo_2", "a", 4)


def _narrow(file: h5py.File) -> None:
    del file["data/demo_2/actions"]
    file["data/demo_2/actions"] = np.zeros((5, 7))


def _large(file: h5py.File) -> None:
    del file["data/demo_2/obs/agentview_image"]
    file["data/demo_2/obs/agentview_image"] = np.zeros((5, 12, 17, 3), np.uint8)


def _floats(file: h5py.File) -> None:
    del file["data/demo_2/obs/agentview_image"]
    file["data/demo_2/obs/agentview_image"] = np.zeros((5, 3, 12, 16), np.float32)


def _no_actions(file: h5py.File) -> None:
    del file["data/demo_2/actions"]


def _external(file: h5py.File) -> None:
    del file["data/demo_2/obs/agentview_image"]
    file["data/demo_2/obs/agentview_image"] = h5py.ExternalLink("other.hdf5", "/data/demo_1/obs/agentview_image")


def _soft(file: h5py.File) -> None:
    del file["data/demo_2/obs/agentview_image"]
    file["data/demo_2/obs/agentview_image"] = h5py.SoftLink("/data/demo_1/obs/agentview_image")


def _virtual(file: h5py.File) -> None:
    del file["data/demo_2/actions"]
    layout = h5py.VirtualLayout((5, 14), "f8")
    layout[:] = h5py.VirtualSource("other.hdf5", "/data/demo_1/actions", (5, 14))
    file.create_virtual_dataset("data/demo_2/actions", layout)


def _elsewhere(file: h5py.File) -> None:
    del file["data/demo_2/actions"]
    file.create_dataset("data/demo_2/actions", (5, 14), "f8", external=[("/etc/hostname", 0, 560)])


BAD: list[tuple[Callable[[h5py.File], None], str]] = [
    (_nan, "demo_2/actions, frame 3 is NaN or infinite"),
    (_short, r"demo_2 has shapes .*expected one length"),
    (
        _narrow,
        r"demo_2 has rows of shape \{'action': \(7,\)\}; expected \{'action': \(14,\)\} as most have, such as demo_1",
    ),
    (_large, r"demo_2 has rows of shape \{'obs/agentview_image': \(12, 17, 3\)\}; expected .*\(12, 16, 3\)"),
    (_floats, r"agentview_image is float32 \(5, 3, 12, 16\).*expected uint8 \[T, H, W, 3\]"),
    (_no_actions, "demo_2/actions"),
    (_external, "is a ExternalLink"),
    (_soft, "is a SoftLink"),
    (_virtual, "demo_2/actions"),
    (_elsewhere, "demo_2/actions"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__.strip("_") for spoil, _ in BAD])
def test_a_bad_demonstration_is_refused_by_name_or_left_out(
    demo_file: Path, spoil: Callable[[h5py.File], None], message: str
) -> None:
    with h5py.File(demo_file, "a") as file:
        spoil(file)
    with pytest.raises(SourceError, match=message):
        RobomimicSource(demo_file).index()
    index = RobomimicSource(demo_file, skip_bad=True).index()
    assert [episode.id for episode in index.episodes] == ["demo_1", "demo_10"]
    assert list(index.skipped) == ["demo_2"]


def test_a_truncated_file_is_refused(demo_file: Path) -> None:
    demo_file.write_bytes(demo_file.read_bytes()[:2000])
    with pytest.raises(SourceError, match=r"image\.hdf5 does not read"):
        RobomimicSource(demo_file).index()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ["agentviw"]}, "no pictures 'agentviw', did you mean 'agentview_image'"),
        ({"state": ["robot0_eef_poss"]}, "did you mean 'robot0_eef_pos'"),
        ({"cameras": ["object"]}, "no pictures 'object'"),
    ],
)
def test_a_wrong_name_gets_the_nearest(demo_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VlaError, match=message):
        RobomimicSource(demo_file, **options).index()


def test_a_file_without_pictures_or_frequency_says_what_to_type(demo_file: Path) -> None:
    with h5py.File(demo_file, "a") as file:
        del file["data"].attrs["env_args"]
    with pytest.raises(SourceError, match=r"control frequency.*source_options\.fps"):
        RobomimicSource(demo_file).index()
    assert RobomimicSource(demo_file, fps=15).index().fps == 15
    with h5py.File(demo_file, "a") as file:
        for demo in LENGTHS:
            del file[f"data/{demo}/obs"]
    with pytest.raises(SourceError, match=r"has no observations.*vla record robosuite"):
        RobomimicSource(demo_file).index()


def _another_camera(file: h5py.File, demo: str, length: int) -> None:
    file[f"data/{demo}/obs/overhead_image"] = np.zeros((length, 12, 16, 3), np.uint8)


def _another_size(file: h5py.File, demo: str, length: int) -> None:
    del file[f"data/{demo}/obs/agentview_image"]
    file[f"data/{demo}/obs/agentview_image"] = np.zeros((length, 16, 12, 3), np.uint8)


def _another_width(file: h5py.File, demo: str, length: int) -> None:
    del file[f"data/{demo}/actions"]
    file[f"data/{demo}/actions"] = np.zeros((length, 7))


@pytest.mark.parametrize("spoil", [_another_size, _another_width])
@pytest.mark.parametrize("odd", LENGTHS)
def test_the_shape_of_most_demonstrations_counts_wherever_the_odd_one_lies(
    demo_file: Path, spoil: Callable[[h5py.File, str, int], None], odd: str
) -> None:
    with h5py.File(demo_file, "a") as file:
        spoil(file, odd, LENGTHS[odd])
    with pytest.raises(SourceError, match=f"{odd} has rows of shape"):
        RobomimicSource(demo_file).index()
    index = RobomimicSource(demo_file, skip_bad=True).index()
    assert list(index.skipped) == [odd]
    assert index.steps["action"].shape == (14,)


@pytest.mark.parametrize("odd", LENGTHS)
def test_cameras_are_those_of_most_demonstrations(demo_file: Path, odd: str) -> None:
    wanted = RobomimicSource(demo_file).index().cameras
    with h5py.File(demo_file, "a") as file:
        _another_camera(file, odd, LENGTHS[odd])
    assert RobomimicSource(demo_file).index().cameras == wanted


def test_a_demonstration_of_another_length_than_it_states_is_refused(demo_file: Path) -> None:
    with h5py.File(demo_file, "a") as file:
        file["data/demo_2"].attrs["num_samples"] = 6
    with pytest.raises(SourceError, match="demo_2"):
        RobomimicSource(demo_file).index()
    assert list(RobomimicSource(demo_file, skip_bad=True).index().skipped) == ["demo_2"]


def test_the_total_of_a_file_is_compared_with_its_demonstrations(demo_file: Path) -> None:
    with h5py.File(demo_file, "a") as file:
        file["data"].attrs["total"] = sum(LENGTHS.values())
    assert RobomimicSource(demo_file).index().warnings == ()
    with h5py.File(demo_file, "a") as file:
        file["data"].attrs["total"] = 13
    with pytest.raises(SourceError, match="total = 13"):
        RobomimicSource(demo_file).index()
    index = RobomimicSource(demo_file, skip_bad=True).index()
    assert (len(index.episodes), len(index.warnings)) == (3, 1)


def test_a_filter_that_lists_a_demonstration_twice_is_refused(demo_file: Path) -> None:
    with h5py.File(demo_file, "a") as file:
        file["mask/double"] = np.array([b"demo_1", b"demo_1"])
    with pytest.raises(SourceError, match="demo_1 twice"):
        RobomimicSource(demo_file, filter="double").index()


def test_numbers_left_at_their_fill_value_are_read_and_pictures_that_were_never_written_are_refused(
    demo_file: Path,
) -> None:
    """A small array of zeros needs no bytes in HDF5; a camera without a byte has seen nothing."""
    with h5py.File(demo_file, "r+") as file:
        for demo, length in LENGTHS.items():
            del file[f"data/{demo}/obs/object"]
            file[f"data/{demo}/obs"].create_dataset("object", (length, 10), "f8", chunks=(1, 10))
    steps = RobomimicSource(demo_file).steps(0)
    assert not steps["privileged"].any()
    with h5py.File(demo_file, "r+") as file:
        del file["data/demo_2/obs/agentview_image"]
        file["data/demo_2/obs"].create_dataset("agentview_image", (5, 12, 16, 3), "u1", chunks=(1, 12, 16, 3))
    with pytest.raises(SourceError, match="data/demo_2/obs/agentview_image"):
        RobomimicSource(demo_file).index()
    assert [episode.id for episode in RobomimicSource(demo_file, skip_bad=True).index().episodes] == [
        "demo_1",
        "demo_10",
    ]
