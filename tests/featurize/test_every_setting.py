"""Every setting of `vla featurize`, one at a time: does a resumed store refuse it by name, or does it change nothing?

The tables are complete by a test: a new setting, backbone or source without a row fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers

from vla.featurize.backbones.registry import BACKBONES, load_backbone_class
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.plan import StoreOptions
from vla.featurize.sources.lerobot import LeRobotSource
from vla.featurize.sources.registry import SOURCES
from vla.featurize.sources.synthetic import SyntheticSettings
from vla.stores.errors import FingerprintError
from vla.stores.settings import set_dotted
from vla.stores.store import open_store
from vla.stores.writer import open_writer

Kind = Literal["features", "plan", "neutral"]
"""`features`: other features, so another fingerprint. `plan`: the same features, cut or kept otherwise. Both are
refused on resume, naming what differs. `neutral`: neither; the run goes on and gives the same bytes."""


@dataclass(frozen=True)
class Row:
    """`told` differs from `base` in one setting; `named` is what the refusal has to say of it."""

    kind: Kind
    told: tuple[str, ...]
    named: str = ""
    base: tuple[str, ...] = ()


TOY = ("backbone=toy", "source=synthetic:episodes=3,length=[4,6],cameras=1,image_size=16")
EFFICIENT = ("backbone=efficientnet", "options.size=64")
RANDOM = (*EFFICIENT, "weights=random")
TINY = ("backbone=dino-siglip", "weights=random", *(f"options.{text}" for text in ("size=112", "grid=6", "fine=4")))
FOLDERS = ("backbone=dino-siglip", "weights=null", *TINY[2:], "options.dino=DINO", "options.siglip=SIGLIP")
LEROBOT = ("source=LEROBOT",)

CONFIG: dict[str, Row] = {
    "source": Row("features", ("source=synthetic:episodes=3,length=[4,6],cameras=1,image_size=20",), "source.digest"),
    "backbone": Row("features", ("backbone=pixels",), "backbone.name"),
    "weights": Row("features", ("weights=random",), "backbone.weights", EFFICIENT),
    "options": Row("features", ('options={"seed": 1}',), "backbone.seed"),
    "map": Row("features", ('map={"prize": "reward"}',), "source.mapping.prize", LEROBOT),
    "source_options": Row("features", ('source_options={"seed": 1}',), "source.digest"),
    "skip_bad": Row("neutral", ("skip_bad=true",), base=LEROBOT),
    "max_skipped": Row("neutral", ("max_skipped=0.1",), base=LEROBOT),
    "store": Row("features", ('store={"dtype": "float32"}',), "features.grid.dtype"),
    "batch_size": Row("neutral", ("batch_size=3",)),
    "device": Row("neutral", ("device=cpu",)),
    "remote": Row("neutral", ("remote.threads=2",)),
    "augment": Row("features", ("augment.copies=1",), "augment"),
    "threads": Row("neutral", ("threads=1",)),
}
STORE: dict[str, Row] = {
    "unit_mb": Row("plan", ("store.unit_mb=0.004",), "unit_rows", ("source_options.length=[20,20]",)),
    "unit_rows": Row("plan", ("store.unit_rows=4",), "unit_rows"),
    "dtype": Row("features", ("store.dtype=bfloat16",), "features.grid.dtype"),
    "format": Row("plan", ("store.format=h5",), "format"),
    "compression": Row("plan", ("store.compression=zstd",), "compression"),
}
BACKBONE: dict[str, dict[str, Row]] = {
    "toy": {
        "grid": Row("features", ("options.grid=3",), "features.grid.shape"),
        "channels": Row("features", ("options.channels=7",), "backbone.channels"),
        "seed": Row("features", ("options.seed=1",), "backbone.seed"),
        "delay_ms": Row("neutral", ("options.delay_ms=0.5",)),
    },
    "pixels": {"size": Row("features", ("options.size=8",), "backbone.preprocess.size", ("backbone=pixels",))},
    "efficientnet": {
        "block": Row("features", ("options.block=9",), "backbone.layer", RANDOM),
        "size": Row("features", ("options.size=96",), "backbone.preprocess.size", RANDOM),
        "resample": Row("features", ("options.resample=bilinear",), "backbone.preprocess.resample", RANDOM),
        "pool": Row("features", ("options.pool=2",), "backbone.pool", RANDOM),
        "weights": Row("features", ("weights=random",), "backbone.weights", EFFICIENT),
        "seed": Row("features", ("options.seed=1",), "backbone.seed", RANDOM),
    },
    "dino-siglip": {
        "weights": Row("features", ("weights=BOTH",), "backbone.dino", TINY),
        "dino": Row("features", ("options.dino=OTHER_DINO",), "backbone.dino.weights_sha256", FOLDERS),
        "siglip": Row("features", ("options.siglip=OTHER_SIGLIP",), "backbone.siglip.weights_sha256", FOLDERS),
        "size": Row("features", ("options.size=224",), "backbone.preprocess.size", TINY),
        "grid": Row("features", ("options.grid=5",), "backbone.pool.grid", TINY),
        "fine": Row("features", ("options.fine=3",), "backbone.pool.fine", TINY),
        "coarse": Row("features", ("options.coarse=3",), "backbone.pool.coarse", TINY),
        "towers": Row("features", ("options.towers=dino",), "backbone", TINY),
        "seed": Row("features", ("options.seed=1",), "backbone.dino.seed", TINY),
    },
}
SOURCE: dict[str, dict[str, Row]] = {
    "synthetic": {
        "episodes": Row("features", ("source_options.episodes=4",), "source.digest"),
        "length": Row("features", ("source_options.length=[4,7]",), "source.digest"),
        "cameras": Row("features", ("source_options.cameras=2",), "source.cameras"),
        "image_size": Row("features", ("source_options.image_size=17",), "source.digest"),
        "action_dim": Row("features", ("source_options.action_dim=5",), "source.digest"),
        "state_dim": Row("features", ("source_options.state_dim=5",), "source.digest"),
        "seed": Row("features", ("source_options.seed=1",), "source.digest"),
        "depth": Row("features", ("source_options.depth=true",), "source.digest"),
    },
    "lerobot": {
        "map": Row("features", ("map.prize=reward",), "source.mapping.prize", LEROBOT),
        "cameras": Row("features", ('source_options.cameras=["wrist"]',), "source.cameras", LEROBOT),
        "annotation": Row("features", ("source_options.annotation=task_index",), "source.mapping.annotation", LEROBOT),
        "align": Row("features", ("source_options.align=index",), "source.mapping.align", LEROBOT),
        "skip_bad": Row("neutral", ("skip_bad=true",), base=LEROBOT),
    },
}
CONFORMING = {"da3", "siglip-prefix"}
"""Each option of these is changed alone in backbones/test_backbone_conformance.py, as are those of the ones above."""

OWN_BACKBONES = {
    "croco": "backbones/test_croco_backbone.py",
    "rgb2pc": "backbones/test_rgb2pc_backbone.py",
    "spatial": "backbones/test_spatial_backbone.py",
    "text": "backbones/test_text_backbone.py",
    "vggt": "backbones/test_vggt_backbone.py",
}
"""What does not look at pictures is tabled where it is tested."""

OWN_SOURCES = {
    "store": "featurize/test_chained_backbones.py",
    "trackvla": "sources/recorded/test_trackvla.py",
    "hierarchical": "sources/recorded/test_hierarchical.py",
    "folders": "sources/recorded/test_folders.py",
    "robotwin": "sources/robotwin/test_robotwin_hdf5.py",
    "replay-buffer": "sources/test_replay_buffer.py",
    "robomimic": "sources/test_robomimic.py",
}
"""Options of sources that change what is read change digest, mapping or cameras there."""

MORE: dict[str, Row] = {
    "the order of cameras": Row(
        "features",
        ('source_options.cameras=["wrist","front"]',),
        "source.cameras",
        (*LEROBOT, 'source_options.cameras=["front","wrist"]'),
    ),
    "seed of weights that are not random": Row("neutral", ("options.seed=1",), base=EFFICIENT),
    "the backbone's own dtype by name": Row("neutral", ("store.dtype=float16",)),
    "where a data set lies": Row("neutral", ("source=LEROBOT_COPY",), base=LEROBOT),
    "where weights lie": Row("neutral", ("weights=BOTH_COPY",), base=("weights=BOTH", *TINY[:1], *TINY[2:])),
}
ROWS = {
    **{f"config.{name}": row for name, row in CONFIG.items()},
    **{f"store.{name}": row for name, row in STORE.items()},
    **{f"{kind}.{name}": row for kind, rows in {**BACKBONE, **SOURCE}.items() for name, row in rows.items()},
    **MORE,
}


@pytest.fixture(autouse=True)
def _as_many_threads_after_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, write_lerobot: Callable[..., Path]) -> dict[str, str]:
    """Folders that the tables name: data sets, and networks as the hub would serve them."""
    root = tmp_path_factory.mktemp("places")
    cameras = {"observation.images.front": "image", "observation.images.wrist": "image"}
    reward = {"reward": ({"dtype": "float32", "shape": [1], "names": None}, lambda episode, frame: 0.0)}
    for name in ("LEROBOT", "LEROBOT_COPY"):
        write_lerobot(root / name, lengths=(4, 5), cameras=cameras, extra=reward)
    narrow = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("DINO", "OTHER_DINO"):
            config = transformers.DINOv3ViTConfig(**narrow, num_register_tokens=4)
            transformers.DINOv3ViTModel(config).save_pretrained(root / name)
        for name in ("SIGLIP", "OTHER_SIGLIP"):
            config = transformers.SiglipVisionConfig(**narrow, image_size=112, patch_size=14)
            transformers.SiglipVisionModel(config).save_pretrained(root / name)
    transformers.utils.logging.enable_progress_bar()
    for name in ("BOTH", "BOTH_COPY"):
        (root / name).mkdir()
        for part in ("dino", "siglip"):
            (root / name / part).symlink_to(root / part.upper())
    return {path.name: str(path) for path in root.iterdir()}


def config_of(places: Mapping[str, str], *told: str) -> FeaturizeConfig:
    """Apply settings to the toy's, as `--set` does; the last of one key counts."""
    values: dict[str, Any] = {}
    for text in (*TOY, *told):
        key, _, value = text.partition("=")
        set_dotted(values, f"{key}={places.get(value, value)}")
    if values["source"] in places.values():
        values["source_options"] = {"cameras": ["front"], **values.get("source_options", {})}
    return FeaturizeConfig.build(values)


@pytest.mark.parametrize("name", ROWS)
def test_a_setting_is_refused_by_name_or_changes_nothing(name: str, places: dict[str, str], tmp_path: Path) -> None:
    row = ROWS[name]
    config, changed = config_of(places, *row.base), config_of(places, *row.base, *row.told)
    assert config != changed, "the row changes nothing"
    base, other = prepare(config), prepare(changed)
    with open_writer(tmp_path / "s", base.plan.manifest, base.plan.episodes):
        pass
    same = base.plan.manifest.fingerprint == other.plan.manifest.fingerprint
    assert same == (row.kind != "features")
    if row.kind == "neutral":
        with open_writer(tmp_path / "s", other.plan.manifest, other.plan.episodes, resume=True) as writer:
            assert len(writer.pending()) == base.plan.manifest.units
        return
    with (
        pytest.raises(FingerprintError, match=rf"[ (]{row.named}(\.\w+|\[\d+\])*: .* here, .* wanted.*--overwrite"),
        open_writer(tmp_path / "s", other.plan.manifest, other.plan.episodes, resume=True),
    ):
        pass


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.kind == "neutral"])
def test_a_neutral_setting_gives_the_same_features(name: str, places: dict[str, str], tmp_path: Path) -> None:
    row = ROWS[name]
    for folder, told in (("one", ()), ("two", row.told)):
        run(prepare(config_of(places, *row.base, *told)), tmp_path / folder)
    one, two = open_store(tmp_path / "one"), open_store(tmp_path / "two")
    for feature in one.manifest.features:
        rows = np.arange(one.manifest.rows)
        np.testing.assert_array_equal(one.read(feature, rows), two.read(feature, rows))


def test_every_setting_has_a_row() -> None:
    assert CONFIG.keys() | {"pad_actions"} == FeaturizeConfig.model_fields.keys()  # sources/robotwin tries that one
    assert STORE.keys() == StoreOptions.model_fields.keys()
    assert BACKBONE.keys() | CONFORMING | {*OWN_BACKBONES} == BACKBONES.keys()
    for name, rows in BACKBONE.items():
        assert rows.keys() == load_backbone_class(name).settings_type.model_fields.keys(), name
    assert SOURCE.keys() | {*OWN_SOURCES} == SOURCES.keys()
    for file in (*OWN_BACKBONES.values(), *OWN_SOURCES.values()):
        assert (Path(__file__).parents[1] / file).is_file()
    parameters = inspect.signature(LeRobotSource).parameters.values()
    assert SOURCE["lerobot"].keys() == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert SOURCE["synthetic"].keys() == SyntheticSettings.model_fields.keys()
