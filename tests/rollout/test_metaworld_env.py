"""Meta-World as an environment. Each trap of the simulator has a test of its own name."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.rollout.envs.base import Observation
from vla.rollout.envs.metaworld import PRIVILEGED_NAMES, MetaWorldEnv
from vla.rollout.envs.metaworld_tasks import INSTRUCTIONS, instruction
from vla.rollout.envs.registry import ENVS, FIRST_EVALUATION_SEED, demonstration_seed, evaluation_seed, make_env
from vla.stores.errors import MachineError, UsageError, missing_extra

STILL = np.zeros(4, np.float32)


@pytest.fixture(scope="module")
def push() -> Iterator[MetaWorldEnv]:
    """The task without pictures, which need no OpenGL and most of the time."""
    env = MetaWorldEnv("push-v3", cameras=())
    yield env
    env.close()


@pytest.fixture(scope="module")
def seen() -> Iterator[MetaWorldEnv]:
    env = MetaWorldEnv("push-v3", cameras=("corner", "corner2", "corner3", "corner4", "topview"))
    yield env
    env.close()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process in which nothing was imported or chosen yet."""
    drawing = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    environment = {name: value for name, value in os.environ.items() if name not in drawing}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)


def play_expert(env: MetaWorldEnv, seed: int) -> bool:
    observation = env.reset(seed)
    for _ in range(env.spec.max_steps):
        result = env.step(env.expert_action(observation))
        if result.success:
            return True
        observation = result.observation
    return False


def find_colour(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean row and column of the pixels near `colour`."""
    near = np.abs(image.astype(int) - colour).max(axis=-1) < 60
    assert near.any(), f"no pixel near {colour}"
    rows, columns = np.nonzero(near)
    return float(rows.mean()), float(columns.mean())


@pytest.mark.sim
class TestTraps:
    def test_the_seed_really_seeds(self, push: MetaWorldEnv) -> None:
        first = push.reset(1).privileged
        for _ in range(3):
            push.step(np.ones(4, np.float32))
        other = push.reset(2).privileged
        np.testing.assert_array_equal(push.reset(1).privileged, first)
        assert np.abs(other - first).max() > 0.01
        np.testing.assert_array_equal(MetaWorldEnv("push-v3", cameras=()).reset(1).privileged, first)

    def test_numpys_global_generator_is_neither_read_nor_moved(self, push: MetaWorldEnv) -> None:
        np.random.seed(0)  # noqa: NPY002 - the legacy generator is what the simulator would draw from
        first = push.reset(5).privileged
        draw = np.random.uniform()  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
        assert np.random.uniform() == draw  # noqa: NPY002
        np.testing.assert_array_equal(push.reset(5).privileged, first)

    def test_the_stale_sawyer_observation_space_cache_does_not_hide_the_goal(self, push: MetaWorldEnv) -> None:
        goal = push.reset(3).privileged[36:39]
        assert goal[1] > 0.5, "the goal of push-v3 is between y = 0.8 and 0.9 m"
        np.testing.assert_array_equal(push.step(STILL).observation.privileged[36:39], goal)

    def test_set_task_called_is_not_needed_and_max_path_length_is_not_the_limit(self) -> None:
        env = MetaWorldEnv("push-v3", cameras=(), max_steps=130)  # 520 simulator steps; Meta-World raises at 500
        env.reset(0)
        done = [env.step(STILL).done for _ in range(130)]
        assert done == [False] * 129 + [True]
        with pytest.raises(UsageError, match=r"outside an episode; expected reset\(seed\)"):
            env.step(STILL)
        env.reset(1)
        assert not env.step(STILL).done

    def test_stale_goal_markers_are_not_on_the_first_frame(self, seen: MetaWorldEnv) -> None:
        green = (0, 240, 0)
        for seed in (0, 1):
            before = find_colour(seen.reset(seed).images["topview"], green)
            after = find_colour(seen.step(STILL).observation.images["topview"], green)
            np.testing.assert_allclose(before, after, atol=0.5)

    def test_stale_object_positions_are_not_in_the_first_observation(self) -> None:
        env = MetaWorldEnv("drawer-open-v3", cameras=())
        first = env.reset(0).privileged
        np.testing.assert_allclose(first[4:7], env.step(STILL).observation.privileged[4:7], atol=0.002)
        np.testing.assert_array_equal(first[18:36], first[:18])

    def test_the_shadow_flag_is_off(self, seen: MetaWorldEnv) -> None:
        plain = seen.reset(0).images["corner3"]
        shadow = seen._mujoco.mjtRndFlag.mjRND_SHADOW
        assert seen._renderer.scene.flags[shadow] == 0
        seen._renderer.scene.flags[shadow] = 1
        try:
            shadowed = seen._render("corner3")
        finally:
            seen._renderer.scene.flags[shadow] = 0
        assert np.abs(plain.astype(int) - shadowed).mean() > 1, "the flag is what draws the shadows"

    def test_upside_down_corner_cameras_are_rotated_so_that_up_is_up(self, seen: MetaWorldEnv) -> None:
        cyan_finger = (0, 210, 210)
        low = dict(seen.reset(0).images)
        for _ in range(4):
            high = dict(seen.step(np.array([0, 0, 1, 0], np.float32)).observation.images)
        for camera in ("corner", "corner2", "corner3", "corner4"):
            rise = find_colour(low[camera], cyan_finger)[0] - find_colour(high[camera], cyan_finger)[0]
            assert rise > 2, f"{camera}: the hand rose by {rise:.1f} pixels"

    def test_a_camera_that_is_upright_stays_as_it_is(self, seen: MetaWorldEnv) -> None:
        image = seen.reset(0).images["topview"]
        seen._renderer.update_scene(seen._sim.data, camera="topview")
        np.testing.assert_array_equal(image, seen._renderer.render())


@pytest.mark.sim
class TestEpisode:
    def test_the_state_is_the_first_four_numbers_and_nothing_of_the_objects(self, push: MetaWorldEnv) -> None:
        observation = push.reset(0)
        np.testing.assert_array_equal(observation.state, observation.privileged[:4])
        assert observation.state.dtype == observation.privileged.dtype == np.float32
        assert push.spec.state_names == ("hand_x", "hand_y", "hand_z", "gripper")
        assert len(PRIVILEGED_NAMES) == len(set(PRIVILEGED_NAMES)) == len(observation.privileged) == 39

    def test_pictures_come_in_the_order_of_the_cameras(self, seen: MetaWorldEnv) -> None:
        images = seen.reset(0).images
        assert tuple(images) == seen.spec.cameras
        assert {image.shape for image in images.values()} == {(128, 128, 3)}
        assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image in images.values())

    def test_the_default_cameras_are_two_of_128_pixels(self) -> None:
        env = MetaWorldEnv("push-v3")
        assert (env.spec.cameras, env.spec.image_size) == (("corner3", "topview"), 128)
        env.close()
        with pytest.raises(UsageError, match="closed"):
            env.reset(0)

    def test_one_step_is_a_twentieth_of_a_second(self, push: MetaWorldEnv) -> None:
        push.reset(0)
        began = push._sim.data.time
        push.step(STILL)
        assert push._sim.data.time - began == pytest.approx(0.05)
        assert (push.spec.fps, push.spec.max_steps) == (20.0, 125)

    def test_the_expert_pushes_the_puck_to_the_goal(self, push: MetaWorldEnv) -> None:
        assert [play_expert(push, seed) for seed in range(5)] == [True] * 5

    def test_expert_actions_are_clipped_float32(self, push: MetaWorldEnv) -> None:
        action = push.expert_action(push.reset(0))
        assert (action.shape, action.dtype) == ((4,), np.float32)
        assert np.abs(action).max() <= 1.0

    def test_the_expert_reads_the_observation_that_it_is_given(self, push: MetaWorldEnv) -> None:
        observation = push.reset(0)
        moved = observation.privileged.copy()
        moved[4] -= 0.1
        elsewhere = Observation({}, observation.state, moved)
        assert not np.array_equal(push.expert_action(observation), push.expert_action(elsewhere))

    def test_every_episode_gets_a_new_expert(self, push: MetaWorldEnv) -> None:
        push.expert_action(push.reset(0))
        first = push._expert
        push.expert_action(push.reset(1))
        assert push._expert is not first

    def test_success_stays_after_the_puck_has_left_the_goal(self, push: MetaWorldEnv) -> None:
        assert play_expert(push, 0)
        push._sim._set_obj_xyz(np.array([-0.3, 0.5, 0.02]))
        assert push.step(STILL).success
        assert not push.step(STILL).done
        push.reset(0)
        assert not push.step(STILL).success

    @pytest.mark.parametrize("action", [np.zeros(3), np.array([0, 0, np.nan, 0])])
    def test_an_action_of_another_shape_or_nan_is_refused(self, push: MetaWorldEnv, action: np.ndarray) -> None:
        push.reset(0)
        with pytest.raises(UsageError, match="4 finite numbers"):
            push.step(action)

    def test_every_task_has_an_instruction_and_an_expert(self, push: MetaWorldEnv) -> None:
        from metaworld.env_dict import ENV_CLS_MAP

        assert set(INSTRUCTIONS) == set(ENV_CLS_MAP) == set(push._experts)
        assert push.spec.task == "push the puck to the goal"


class TestNames:
    def test_an_unknown_task_gets_the_nearest_match(self) -> None:
        with pytest.raises(UsageError, match="'puhs-v3', did you mean 'push-v3'"):
            make_env("metaworld:puhs-v3")

    def test_an_unknown_simulator_gets_the_nearest_match(self) -> None:
        with pytest.raises(UsageError, match="'metawrold', did you mean 'metaworld'"):
            make_env("metawrold:push-v3")

    @pytest.mark.parametrize("name", ["metaworld", "metaworld:"])
    def test_a_name_without_a_task_is_refused(self, name: str) -> None:
        with pytest.raises(UsageError, match="names no task; expected PREFIX:TASK"):
            make_env(name)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cameras": ("corner9",)}, "did you mean 'corner"),
            ({"cameras": ("corner", "corner")}, "each camera once"),
            ({"image_size": 0}, "at least 1 pixel"),
            ({"fps": 30.0}, "a divisor of 80"),
            ({"max_steps": 0}, "time limit of 0"),
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            make_env("metaworld:push-v3", **options)

    def test_the_instruction_of_an_unlisted_task_is_read_from_its_name(self) -> None:
        assert instruction("cup-lift-v3") == "cup lift"
        assert instruction("cup-lift") == "cup lift"
        assert instruction("push-v3") == "push the puck to the goal"

    @given(st.integers(0, 1000), st.integers(0, 1000), st.data())
    def test_no_demonstration_of_any_run_uses_a_seed_of_an_evaluation(
        self, run: int, other: int, data: st.DataObject
    ) -> None:
        numbers = st.integers(0, FIRST_EVALUATION_SEED - 1)
        assert demonstration_seed(run, data.draw(numbers)) != evaluation_seed(other, data.draw(numbers))

    def test_numbers_past_the_half_are_refused(self) -> None:
        with pytest.raises(UsageError, match="500000"):
            demonstration_seed(0, FIRST_EVALUATION_SEED)


class TestMachine:
    def test_importing_the_registry_or_the_class_imports_no_simulator(self) -> None:
        code = (
            "import sys, vla.rollout.envs.registry, vla.rollout.envs.metaworld\n"
            "print([n for n in ('metaworld', 'mujoco', 'gymnasium', 'OpenGL', 'torch') if n in sys.modules])"
        )
        assert run_python(code).stdout.strip() == "[]"
        assert ENVS["metaworld"].startswith("vla.rollout.envs.metaworld:")

    def test_a_missing_simulator_names_the_extra_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MachineError, match=re.escape(missing_extra("sim"))):
            make_env("metaworld:push-v3")

    @pytest.mark.sim
    def test_a_missing_off_screen_library_names_the_package_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MUJOCO_GL", "osmesa")
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
        with pytest.raises(MachineError, match="apt-get install -y --no-install-recommends libosmesa6"):
            make_env("metaworld:push-v3")
        make_env("metaworld:push-v3", cameras=()).close()

    @pytest.mark.sim
    def test_an_environment_without_cameras_may_come_before_one_with_them(self) -> None:
        code = (
            "from vla.rollout.envs.registry import make_env\n"
            "make_env('metaworld:push-v3', cameras=()).reset(0)\n"
            "env = make_env('metaworld:push-v3', cameras=('topview',), image_size=16)\n"
            "print(env.reset(0).images['topview'].shape)\n"
            "env.close()"
        )
        assert run_python(code).stdout.strip() == "(16, 16, 3)"

    @pytest.mark.sim
    def test_a_mujoco_that_was_imported_before_it_could_be_told_how_to_draw_is_an_error_with_a_remedy(self) -> None:
        code = (
            "import mujoco\n"
            "from vla.rollout.envs.registry import make_env\n"
            "from vla.stores.errors import MachineError\n"
            "try:\n    make_env('metaworld:push-v3')\nexcept MachineError as error:\n    print(error)"
        )
        assert "export MUJOCO_GL=osmesa" in run_python(code).stdout
