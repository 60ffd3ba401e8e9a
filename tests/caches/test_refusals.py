"""Caches that are damaged, hostile or ambiguous end in one line that names the file."""

import json
import pickle

import h5py
import numcodecs
import numpy as np
import pytest
import torch
import zarr
from safetensors.numpy import load_file, save_file

from vla.featurize.caches.job import ImportConfig, prepare, run
from vla.featurize.caches.registry import open_cache
from vla.stores.errors import SourceError, UsageError


def _refused(made, root, match, error=SourceError, **changes):
    with pytest.raises(error, match=match) as caught:
        run(prepare(ImportConfig.build({**made.settings, **changes})), root / "store")
    assert "\n" not in str(caught.value)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def _frame(made, name="frame_00003_vfine.pt"):
    return made.settings["path"] / "vision_cache/frames/seed_100/scene/1" / name


def test_a_pickle_in_place_of_a_tensor_is_never_run(make_cache, memory_path):
    made, ran = make_cache("opentrackvla"), memory_path / "ran"
    torch.save(_Payload(ran), _frame(made))
    _refused(made, memory_path, "scene/1/frame_00003_vfine.pt does not load")
    _frame(made).write_bytes(pickle.dumps(_Payload(ran)))
    _refused(made, memory_path / "again", "scene/1/frame_00003_vfine.pt does not load")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(64, 1535), r"frame_00003_vfine.pt holds \(64, 1535\)"),
        (torch.full((64, 1536), torch.nan), "frame_00003_vfine.pt, frame 2 is NaN"),
        (torch.zeros(64, 1536, dtype=torch.int8), r"frame_00003_vfine.pt holds torch.int8"),
        ({"tensor": torch.zeros(64, 1536)}, "frame_00003_vfine.pt holds dict"),
        (torch.zeros(640, 1536), "frame_00003_vfine.pt has .* bytes"),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_file(tensor, match, make_cache, memory_path):
    made = make_cache("opentrackvla")
    torch.save(tensor, _frame(made))
    _refused(made, memory_path, match)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_tensor_is_refused_or_its_episode_counted(size, make_cache, memory_path):
    made = make_cache("opentrackvla")
    _frame(made).write_bytes(_frame(made).read_bytes()[:size])
    _refused(made, memory_path, "frame_00003_vfine.pt does not load")
    report = run(prepare(ImportConfig.build({**made.settings, "skip_bad": True})), memory_path / "skipping")
    assert list(report.skipped) == ["seed_100/scene/1"]
    assert report.frames == 11


def test_a_frame_without_its_partner_or_number_is_refused(make_cache, memory_path):
    made = make_cache("opentrackvla")
    _frame(made, "frame_00003_vcoarse.pt").unlink()
    _refused(made, memory_path, "frame_00003_vcoarse.pt is missing")
    _frame(made).unlink()
    _refused(made, memory_path, "scene/1 lacks frame 3")


def test_samples_that_state_two_actions_for_one_frame_are_refused(make_cache, memory_path):
    made = make_cache("opentrackvla")
    path = made.settings["path"] / "jsonl/seed_100/scene/1.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["actions"][1][0] += 1
    path.write_text("\n".join(map(json.dumps, lines)))
    _refused(made, memory_path, r"1.jsonl, line 6: other actions|1.jsonl, line 5: other actions")


def test_windows_that_disagree_are_refused_naming_window_and_frame(make_cache, memory_path):
    made = make_cache("rgb2pc-windows")
    array = zarr.open_array(made.settings["path"] / "episode_1.zarr/per_frame_features", mode="r+", zarr_format=2)
    array[3, 2, 0, 0, 0] = np.nextafter(array[3, 2, 0, 0, 0], np.float16(9))
    _refused(made, memory_path, "episode_1.zarr/.*window 3 has another frame 5")


def test_a_missing_chunk_is_not_read_as_zeros(make_cache, memory_path):
    made = make_cache("replay-buffer")
    (made.settings["path"] / "data/img/1.0.0").unlink()
    _refused(made, memory_path, "data/img/1.0.0 is missing")


def test_a_chunk_that_does_not_decode_is_refused(make_cache, memory_path):
    made = make_cache("replay-buffer")
    path = made.settings["path"] / "data/img/1.0.0"
    values = zarr.open_array(path.parent, mode="r", zarr_format=2)[:]
    codec = numcodecs.Zlib()
    array = zarr.create_array(
        path.parent, shape=values.shape, dtype="f4", chunks=(7, 3, 4), compressors=codec, zarr_format=2, overwrite=True
    )
    array[:] = values
    path.write_bytes(path.read_bytes()[:40])
    _refused(made, memory_path, "data/img, rows .* do not decode")


def test_a_truncated_chunk_is_refused(make_cache, memory_path):
    made = make_cache("replay-buffer")
    path = made.settings["path"] / "data/img/1.0.0"
    path.write_bytes(path.read_bytes()[:40])
    _refused(made, memory_path, r"data/img/1.0.0 has 40 bytes")


@pytest.mark.parametrize("change", [{"dtype": "|O"}, {"filters": [{"id": "pickle"}]}, {"compressor": {"id": "pickle"}}])
def test_a_zarr_array_that_pickles_is_refused(change, make_cache, memory_path):
    made = make_cache("replay-buffer")
    path = made.settings["path"] / "data/img/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    _refused(made, memory_path, "data/img/.zarray declares")


def test_episode_ends_that_do_not_fit_the_rows_are_refused(make_cache, memory_path):
    made = make_cache("replay-buffer")
    ends = zarr.open_array(made.settings["path"] / "meta/episode_ends", mode="r+", zarr_format=2)
    ends[:] = [5, 14, 19]
    _refused(made, memory_path, "has 20 rows; expected 19")
    ends[:] = [5, 5, 20]
    _refused(made, memory_path, "episode_ends: episode 1 ends at 5")


def test_features_that_are_not_named_are_asked_for_with_a_list(make_cache, memory_path):
    made = make_cache("replay-buffer")
    _refused(made, memory_path, "action, img", UsageError, options={})


def test_links_out_of_an_hdf5_file_are_refused(make_cache, memory_path):
    made = make_cache("robomimic")
    with h5py.File(memory_path / "secret.h5", "w") as file:
        file["x"] = np.zeros((9, 2, 6), "f4")
    with h5py.File(made.settings["path"], "r+") as file:
        del file["data/demo_9/obs/embedding"]
        file["data/demo_9/obs/embedding"] = h5py.ExternalLink(str(memory_path / "secret.h5"), "x")
    _refused(made, memory_path, "demo_9/obs/embedding is a ExternalLink")


def test_a_virtual_dataset_is_refused(make_cache, memory_path):
    made = make_cache("robomimic")
    layout = h5py.VirtualLayout((9, 2, 6), "f4")
    layout[:] = h5py.VirtualSource(str(memory_path / "secret.h5"), "x", (9, 2, 6))
    with h5py.File(made.settings["path"], "r+") as file:
        del file["data/demo_9/obs/embedding"]
        file.create_virtual_dataset("data/demo_9/obs/embedding", layout)
    _refused(made, memory_path, "demo_9/obs/embedding")


def test_a_truncated_hdf5_file_is_refused(make_cache, memory_path):
    made = make_cache("robomimic")
    path = made.settings["path"]
    path.write_bytes(path.read_bytes()[:3000])
    _refused(made, memory_path, "demo.hdf5 does not read")


def test_a_truncated_safetensors_file_is_refused(make_cache, memory_path):
    made = make_cache("arrays")
    path = made.settings["path"] / "episode_9.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _refused(made, memory_path, "episode_9.safetensors does not load")


@pytest.mark.parametrize("fault", ["objects", "short", "long", "nan"])
def test_a_bad_npy_file_is_refused(fault, memory_path):
    path = memory_path / "cache" / "episode_000000.npy"
    path.parent.mkdir()
    values = np.zeros((9, 4), np.float32)
    values[6, 1] = np.nan if fault == "nan" else 0
    np.save(path, values.astype(object) if fault == "objects" else values, allow_pickle=True)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if fault == "short" else raw + b"x" if fault == "long" else raw)
    source = {"episodes": 1, "length": [9, 9]}
    settings = {"kind": "arrays", "path": path.parent, "source": "synthetic", "source_options": source}
    with pytest.raises(SourceError, match=r"episode_000000\.npy"):
        run(prepare(ImportConfig.build(settings)), memory_path / "store")


def test_a_source_of_other_lengths_is_refused(make_cache, memory_path):
    made = make_cache("rgb2pc-windows")
    other = {"source_options": {"episodes": 3, "length": [3, 3]}}
    _refused(made, memory_path, "'episode_0' of .* has 13 frames; expected 3", **other)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"options": {"features": 5}}, "the robomimic cache: features = 5: Input should be"),
        ({"options": {"features": "feat"}}, "the robomimic cache: features = 'feat': Input should be"),
        ({"options": {"features": {"c": 5}}}, "the robomimic cache: features.c = 5: Input should be"),
        ({"options": {"cameras": 5}}, "the robomimic cache: cameras = 5: Input should be a list of names"),
        ({"options": {"task": 5}}, "the robomimic cache: task = 5: Input should be"),
        ({"fps": float("inf")}, "fps = inf: Input should be a finite number"),
        ({"store": {"unit_mb": float("inf")}}, "unit_mb = inf: Input should be a finite number"),
    ],
)
def test_options_of_another_type_are_refused_in_one_line(changes, match, make_cache, memory_path):
    _refused(make_cache("robomimic"), memory_path, match, UsageError, **changes)


def test_one_camera_may_be_named_alone_and_a_truth_written_as_text(make_cache):
    made = make_cache("robomimic")
    options = made.settings["options"] | {"cameras": "front", "has_views": "False"}
    manifest = prepare(ImportConfig.build({**made.settings, "options": options})).plan.manifest
    assert (manifest.cameras, manifest.features["embedding"].shape) == (("front",), (1, 2, 6))


def _spoil_robomimic(path, number):
    with h5py.File(path, "a") as file:
        length = len(file[f"data/demo_{number}/actions"])
        del file[f"data/demo_{number}/obs/embedding"]
        file[f"data/demo_{number}/obs/embedding"] = np.zeros((length, 2, 7), np.float32)
    return f"demo_{number}"


def _spoil_arrays(path, number):
    file = path / f"episode_{number}.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"tokens": np.zeros((len(tensors["action"]), 5, 9), np.float16)}, file)
    return f"episode_{number}"


@pytest.mark.parametrize("number", [8, 9, 10])
@pytest.mark.parametrize(("kind", "spoil"), [("robomimic", _spoil_robomimic), ("arrays", _spoil_arrays)])
def test_the_shape_of_most_episodes_counts_wherever_the_odd_one_lies(kind, spoil, number, make_cache, memory_path):
    made = make_cache(kind)
    odd = spoil(made.settings["path"], number)
    _refused(made, memory_path, f"{odd}.* has rows .* as most have, such as")
    job = prepare(ImportConfig.build({**made.settings, "skip_bad": True}))
    assert list(job.plan.skipped) == [odd]
    assert len(job.plan.episodes) == 2


def test_the_grid_of_most_windows_counts_though_the_first_is_another(make_cache):
    path = make_cache("rgb2pc-windows").settings["path"]
    group = zarr.open_group(path / "episode_0.zarr", mode="a", zarr_format=2)
    shape = (*group["per_frame_features"].shape[:-1], 5)
    group.create_array("per_frame_features", shape=shape, dtype="f2", chunks=(1, *shape[1:]), overwrite=True)[:] = 1
    with pytest.raises(SourceError, match=r"episode_0\.zarr.* has rows .* as most have, such as episode_1"):
        open_cache("rgb2pc-windows", path).index()
    index = open_cache("rgb2pc-windows", path, skip_bad=True).index()
    assert list(index.skipped) == ["episode_0"]
    assert index.features["grid"].shape == (2, 3, 4)


def test_a_cache_of_states_without_actions_needs_a_source(tmp_path):
    save_file(
        {"tokens": np.zeros((4, 5), np.float16), "state": np.zeros((4, 2), np.float32)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UsageError, match=r"has no actions; .* Try: --source DEMONSTRATIONS"):
        prepare(ImportConfig.build({"kind": "arrays", "path": tmp_path, "fps": 10}))
