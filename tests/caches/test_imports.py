"""What is imported is what the cache holds, bit for bit; interrupted imports end like uninterrupted ones."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from vla.cli import app
from vla.featurize.caches import job as import_job
from vla.featurize.caches.job import ImportConfig, prepare, run
from vla.featurize.caches.registry import CACHES
from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.registry import open_source
from vla.stores.errors import FingerprintError, MachineError, UsageError
from vla.stores.store import open_store
from vla.stores.verify import verify_store
from vla.terminal.run_app import run_app


def _import(made, root, **changes):
    settings = ImportConfig.build({**made.settings, "store": {"unit_rows": 4}, **changes})
    return run(prepare(settings), root, resume=root.exists())


def _read(store, feature):
    reader = store.reader(feature)
    info = store.manifest.features[feature]
    out = np.empty((store.manifest.rows, *info.shape), info.dtype)
    reader.read(np.arange(store.manifest.rows), out)
    reader.close()
    return out


@pytest.mark.parametrize("kind", CACHES)
def test_a_store_holds_the_bits_of_the_cache(kind, make_cache, memory_path):
    made = make_cache(kind)
    _import(made, memory_path / "store")
    assert not verify_store(memory_path / "store").findings
    store = open_store(memory_path / "store")
    assert store.manifest.features.keys() == made.features.keys()
    for name, values in made.features.items():
        assert np.array_equal(_read(store, name), values)
    wanted = made.action
    if wanted is None:
        source = open_source("synthetic", **made.settings["source_options"])
        wanted = np.concatenate([source.steps(e)["action"] for e in range(3)])
    assert np.array_equal(store.steps("action"), wanted.astype(np.float32))


def test_an_import_wants_room_for_all_of_what_it_overwrites_unless_told_to_go_on(make_cache, memory_path, monkeypatch):
    made = make_cache("arrays")
    _import(made, memory_path / "store")
    job = prepare(ImportConfig.build({**made.settings, "store": {"unit_rows": 4, "dtype": "float32"}}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=-(2**30)))
    with pytest.raises(MachineError, match="without the old store"):
        run(job, memory_path / "store", overwrite=True)
    assert open_store(memory_path / "store").commits
    assert run(job, memory_path / "store", overwrite=True, accept=True).units == job.plan.manifest.units


@pytest.mark.parametrize("kind", CACHES)
def test_a_resumed_import_is_byte_equal_to_an_uninterrupted_one(kind, make_cache, memory_path, files_of, monkeypatch):
    made = make_cache(kind)
    _import(made, memory_path / "whole")
    fill, calls = import_job._fill, []

    def fail_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fill(*arguments)

    monkeypatch.setattr(import_job, "_fill", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        _import(made, memory_path / "resumed")
    monkeypatch.undo()
    report = _import(made, memory_path / "resumed")
    assert report.units == open_store(memory_path / "whole").manifest.units - 2
    assert files_of(memory_path / "resumed") == files_of(memory_path / "whole")


def test_a_changed_cache_is_not_resumed(make_cache, memory_path):
    made = make_cache("arrays")
    _import(made, memory_path / "store")
    path = made.settings["path"] / "episode_8.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FingerprintError, match=r"backbone\.cache"):
        _import(made, memory_path / "store")


def test_a_live_policy_of_imported_features_is_refused(make_cache, memory_path):
    _import(make_cache("arrays"), memory_path / "store")
    manifest = open_store(memory_path / "store").manifest
    with pytest.raises(UsageError, match=r"imported from .*backbone is not known"):
        rebuild_backbone(manifest.provenance["backbone"], manifest.fingerprint["backbone"])


def test_a_plain_npy_folder_takes_its_actions_from_a_source(memory_path):
    source = open_source("synthetic", episodes=2)
    (memory_path / "cache").mkdir()
    for episode in source.index().episodes:
        np.save(memory_path / "cache" / f"{episode.id}.npy", np.ones((episode.length, 7), np.float16))
    settings = {"kind": "arrays", "path": memory_path / "cache"}
    with pytest.raises(UsageError, match=r"no actions.*--source"):
        prepare(ImportConfig.build(settings))
    job = prepare(ImportConfig.build({**settings, "source": "synthetic", "source_options": {"episodes": 2}}))
    assert job.plan.manifest.fingerprint["source"]["digest"] == source.digest()
    assert job.plan.manifest.features["feature"].shape == (1, 7)


def test_the_command_prints_json_and_refuses_an_existing_store(make_cache, memory_path, capsys):
    made, out = make_cache("arrays"), memory_path / "store"
    command = ["import", "arrays", str(made.settings["path"]), "--out", str(out), "--set", "fps=10", "--json"]
    assert run_app(app, command) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 20
    with pytest.raises(UsageError, match="--resume"):
        run_app(app, command)
