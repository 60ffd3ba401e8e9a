"""Recorded robosuite states become pictures; the records and a tiny robosuite package are written here."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow

from vla.featurize.sources.lerobot import LeRobotSource
from vla.rollout import replay
from vla.rollout.replay import record_replay
from vla.rollout.robosuite_demos import find_demonstrations, local_model
from vla.stores.errors import MachineError, SourceError, UsageError, VlaError

MODEL = """<mujoco model="base">
  <compiler angle="radian" meshdir="meshes/"/>
  <asset><texture type="2d" name="wall" file="/home/other/robosuite/models/assets/arenas/../textures/wall.png"/>
    <material name="wall" texture="wall"/></asset>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="agentview" pos="0 0 2"/>
    <geom type="plane" size="2 2 .1" material="wall" group="1"/>
    <body name="robot0_right_hand" pos="0 0 0.3">
      <joint name="robot0_joint1" type="slide" axis="1 0 0"/><joint name="gripper0_finger_joint1" axis="0 0 1"/>
      <geom size=".2" rgba="1 0 0 1" group="1" mass="1"/><geom size=".6" rgba="0 1 0 1" group="0" mass="1"/>
      <site name="gripper0_grip_site" pos="0 0 .1" size=".5" rgba="0 1 0 1"/>
      <camera name="robot0_eye_in_hand" pos="0 0 1"/>
    </body>
    <body name="cube" pos="0 .5 .1"><freejoint name="cube_joint0"/><geom size=".05" mass="1" group="1"/></body>
  </worldbody>
</mujoco>"""
NQ, NV = 9, 8


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A robosuite package of one texture, found before any that is installed."""
    folder = tmp_path / "site" / "robosuite" / "models" / "assets"
    (folder / "textures").mkdir(parents=True)
    (tmp_path / "site" / "robosuite" / "__init__.py").write_text("raise ImportError('never imported')\n")
    Pillow.new("RGB", (8, 8), (10, 20, 200)).save(folder / "textures" / "wall.png")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.fixture
def record(tmp_path: Path, assets: Path) -> Path:
    """Two demonstrations whose red ball moves to the right, by what the action says."""
    path = tmp_path / "demo.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env"], data.attrs["env_info"] = "Lift", json.dumps({"env_name": "Lift"})
        for number, length in ((2, 4), (10, 3)):
            states = np.zeros((length, 1 + NQ + NV))
            states[:, 0] = np.arange(length) * 0.05
            states[:, 1] = np.arange(length) * 0.1 - 0.2
            states[:, 2] = 0.3
            states[:, 3:7] = (0, 0.5, 0.1, 1)
            file[f"data/demo_{number}/states"] = states
            file[f"data/demo_{number}/actions"] = np.full((length, 7), number, np.float64)
            file[f"data/demo_{number}"].attrs["model_file"] = MODEL
    return path


@pytest.mark.sim
def test_a_record_becomes_a_lerobot_data_set(record: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = record_replay(str(record), tmp_path / "out", image_size=64, progress=lambda *done: seen.append(done))
    assert (report.episodes, report.frames, report.demonstrations) == (2, 7, ("demo_2", "demo_10"))
    assert seen[-1] == (7, 7)
    source = LeRobotSource(tmp_path / "out")
    index = source.index()
    assert (index.fps, index.cameras, index.episodes[0].task) == (
        20,
        ("agentview", "robot0_eye_in_hand"),
        "lift the cube",
    )
    assert index.steps["action"].names[:3] == ("robot0_dx", "robot0_dy", "robot0_dz")
    assert index.steps["privileged"].role == "privileged"
    steps = source.steps(0)
    np.testing.assert_allclose(steps["state"][:, 0], [-0.2, -0.1, 0, 0.1], atol=1e-6)
    # Joint angle, gripper, position of the hand's site, and a rotation of 0.3 rad about z as xyzw.
    turn = [0, 0, np.sin(0.15), np.cos(0.15)]
    np.testing.assert_allclose(steps["state"][3], [0.1, 0.3, 0.1, 0, 0.4, *turn], atol=1e-6)
    np.testing.assert_array_equal(steps["action"], np.full((4, 7), 2, np.float32))


@pytest.mark.sim
def test_the_pictures_show_the_states_and_neither_collision_shapes_nor_marks(record: Path, tmp_path: Path) -> None:
    record_replay(str(record), tmp_path / "out", image_size=64, cameras=["agentview"], episodes=1)
    images = [views[0].astype(int) for views in LeRobotSource(tmp_path / "out").frames(0, 0, 4)]
    red = [image[..., 0] - image[..., 1] > 40 for image in images]
    middles = [np.flatnonzero(mask.any(axis=0)).mean() for mask in red]
    assert np.all(np.diff(middles) > 1)
    greens = [(image[..., 1] - image[..., 0] > 40).sum() for image in images]
    assert greens == [0, 0, 0, 0]


@pytest.mark.sim
def test_wrong_names_are_refused_before_anything_is_written(record: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown camera 'agentviw', did you mean 'agentview'"):
        record_replay(str(record), tmp_path / "out", cameras=["agentviw"])
    with pytest.raises(UsageError, match="0 episodes"):
        record_replay(str(record), tmp_path / "out", episodes=0)
    assert not (tmp_path / "out").exists()
    record_replay(str(record), tmp_path / "out", image_size=32, episodes=1, cameras=["agentview"])
    with pytest.raises(UsageError, match="--overwrite"):
        record_replay(str(record), tmp_path / "out", image_size=32, episodes=1, cameras=["agentview"])


@pytest.mark.sim
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("states", np.zeros((3, 5)), "are not one step apart"),
        ("states", np.arange(15.0).reshape(3, 5) / 100, "states of 5 numbers; expected 18"),
        ("states", np.full((3, 18), np.nan), "NaN"),
        ("actions", np.zeros((4, 7)), r"states \(3, 18\), actions \(4, 7\)"),
    ],
    ids=["no time", "narrow", "nan", "lengths"],
)
def test_a_record_that_does_not_hold_is_refused(
    record: Path, tmp_path: Path, name: str, value: NDArray[np.float64], message: str
) -> None:
    with h5py.File(record, "a") as file:
        del file[f"data/demo_10/{name}"]
        file[f"data/demo_10/{name}"] = value
    with pytest.raises(SourceError, match=message):
        record_replay(str(record), tmp_path / "out", image_size=32, cameras=["agentview"])
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "/home/other/robosuite/models/assets/arenas/../textures/wall.png",
            "/etc/passwd",
            "names the file '/etc/passwd'",
        ),
        ("arenas/../textures/wall.png", "../../../../demo.hdf5", "names the file"),
        ("<light", '<include file="/robosuite/models/assets/textures/wall.png"/><light', "has <include>"),
        ("<mujoco", '<!DOCTYPE m [<!ENTITY a "b">]><mujoco', "declares entities"),
        ("</mujoco>", "", "does not parse"),
    ],
    ids=["absolute", "climbing", "include", "entities", "cut"],
)
def test_a_model_reads_no_file_outside_the_assets(assets: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        local_model(MODEL.replace(old, new), assets, "demo.hdf5:data/demo_2")


def test_a_missing_mesh_names_the_version_to_install(assets: Path) -> None:
    (assets / "textures" / "wall.png").unlink()
    with pytest.raises(MachineError, match=r"no .*wall\.png.*pip install --no-deps robosuite==1\.4\.0"):
        local_model(MODEL, assets, "demo.hdf5")


def test_without_robosuite_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"robosuite.* not installed.*pip install --no-deps robosuite==1\.4\.0"):
        find_demonstrations("lift")
    with pytest.raises(UsageError, match="no demonstrations 'handovr', did you mean 'handover'"):
        find_demonstrations("handovr")


def test_a_later_robosuite_without_the_demonstrations_is_named(assets: Path) -> None:
    with pytest.raises(MachineError, match=r"has no .*lift/demo\.hdf5.*robosuite==1\.4\.0"):
        find_demonstrations("lift")


def test_a_record_of_an_unknown_environment_is_refused(record: Path) -> None:
    with h5py.File(record, "a") as file:
        file["data"].attrs["env_info"] = json.dumps({"env_name": "Juggle"})
    with pytest.raises(SourceError, match="environment Juggle, instruction ''"):
        find_demonstrations(str(record))


@pytest.mark.sim
@pytest.mark.long
def test_the_human_handover_is_a_14_dimensional_bimanual_set(tmp_path: Path) -> None:
    try:
        found = find_demonstrations("handover")
    except VlaError as error:
        pytest.skip(str(error))
    assert (len(found.lengths), sum(found.lengths.values()), found.fps) == (7, 2775, 20.0)
    demonstration = found.read("demo_0")
    scene = replay.Scene(demonstration, "handover", 64)
    try:
        assert demonstration.actions.shape == (641, 14)
        assert len(scene.state_names) == 32
        scene.show(demonstration.states[0])
        before = scene.proprioception()
        assert scene.picture("agentview").shape == (64, 64, 3)
        scene.show(demonstration.states[100])
        assert not np.allclose(before, scene.proprioception())
    finally:
        scene.close()
