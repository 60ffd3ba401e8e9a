"""Demonstrations as one meets them: damaged, odd, misdescribed. One table, each case through all of `featurize`.

A case damages one data set of three episodes. `one`: episode 1 alone is bad; without --skip-bad the run ends with one
line that names the file, with it the episode is left out, named and counted, and the others are as they would be.
`all`: nothing can be trusted; refused either way. `read`: odd and sound; read as what it shows. Never a traceback, a
partial unit, or a file left behind.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from vla.cli import main
from vla.featurize.backbones.registry import make_backbone
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.stores.errors import VlaError
from vla.stores.store import Store, open_store
from vla.stores.verify import verify_store

LENGTHS = (4, 6, 4)
FRONT = "observation.images.front"
Outcome = Literal["one", "all", "read"]


@dataclass(frozen=True)
class BadSet:
    """A copy of a sound data set, to damage; every episode has files of its own."""

    root: Path
    sets: ModuleType

    @property
    def rows(self) -> Path:
        """The data file of episode 1."""
        return sorted((self.root / "data").rglob("*.parquet"))[1]

    @property
    def video(self) -> Path:
        """The video of episode 1."""
        return sorted(self.root.rglob("*.mp4"))[1]

    def info(self, **values: Any) -> None:
        file = self.root / "meta/info.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    def feature(self, old: str, new: str) -> None:
        features = json.loads((self.root / "meta/info.json").read_text())["features"]
        features[new] = features[old] if old in ("action", FRONT) else features.pop(old)
        self.info(features=features)


Damage = Callable[[BadSet], object]


@dataclass(frozen=True)
class Case:
    """`says`: regular expression of the message; it and the name of the file (`rows`, `video` or a path) must show."""

    damage: Damage
    says: str = ""
    outcome: Outcome = "one"
    file: str = "rows"
    camera: str = "image"
    shows: int | None = None
    """Where a picture is read: its grey."""
    versions: tuple[str, ...] = ("v3.0", "v2.1")


def once(*case: Any, **options: Any) -> Case:
    """Return a case of v3.0 alone: what it shows does not depend on where files lie."""
    return Case(*case, **options, versions=("v3.0",))


# ---- damage ----


def cell(column: str, row: int, value: Any) -> Damage:
    """Change one cell of episode 1."""

    def damage(made: BadSet) -> None:
        table = pq.read_table(made.rows)
        cells = table.column(column).to_pylist()
        cells[row] = value
        kind = table.schema.field(column).type
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(cells, kind)), made.rows)

    return damage


def columns(change: Callable[[pa.Table], pa.Table]) -> Damage:
    return lambda made: pq.write_table(change(pq.read_table(made.rows)), made.rows)


def wide_action(table: pa.Table) -> pa.Table:
    values = pa.array([[0.0, 0.0, 0.0, 0.0]] * len(table), pa.list_(pa.float32(), 4))
    return table.set_column(table.schema.get_field_index("action"), "action", values)


def huge_action(table: pa.Table) -> pa.Table:
    values = pa.array([[1e300, 0.0, 0.0]] * len(table), pa.list_(pa.float64(), 3))
    return table.set_column(table.schema.get_field_index("action"), "action", values)


def cut(which: str, keep: float) -> Damage:
    def damage(made: BadSet) -> None:
        file: Path = getattr(made, which)
        file.write_bytes(file.read_bytes()[: int(keep if keep > 1 else keep * file.stat().st_size)])

    return damage


def content(which: str, data: bytes) -> Damage:
    return lambda made: getattr(made, which).write_bytes(data)


def gone(which: str) -> Damage:
    return lambda made: getattr(made, which).unlink()


def folder_there(which: str) -> Damage:
    def damage(made: BadSet) -> None:
        file: Path = getattr(made, which)
        file.unlink()
        file.mkdir()

    return damage


def outside(which: str) -> Damage:
    """Move a file out of the data set and leave a link."""

    def damage(made: BadSet) -> None:
        file: Path = getattr(made, which)
        file.rename(made.root.parent / "elsewhere")
        file.symlink_to(made.root.parent / "elsewhere")

    return damage


def film(count: int = 6, **options: Any) -> Damage:
    """Write the video of episode 1 anew."""
    return lambda made: made.sets.write_video(made.video, [made.sets.picture(1, f, 0) for f in range(count)], **options)


def small_film(made: BadSet) -> None:
    made.sets.write_video(made.video, [np.zeros((32, 48, 3), np.uint8)] * 6)


def silent_film(made: BadSet) -> None:
    """An MP4 whose one stream is sound."""
    import av

    with av.open(str(made.video), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shot(data: bytes | None, path: str | None = None) -> Damage:
    """Replace the picture of frame 3."""
    return cell(FRONT, 3, None if data is None and path is None else {"bytes": data, "path": path})


def encoded(pixels: Any, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(np.asarray(pixels)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Write a PNG by hand: Pillow writes neither 16-bit colour nor lies."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def upright_by_exif() -> bytes:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    return encoded(GREY, exif=exif.tobytes())


def listed(change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    """Edit the list of episodes."""

    def damage(made: BadSet) -> None:
        file = next((made.root / "meta/episodes").rglob("*.parquet"))
        rows = pq.read_table(file).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows), file)

    return damage


def meta(name: str, data: bytes) -> Damage:
    return lambda made: (made.root / name).write_bytes(data)


def moved_to(name: str) -> Damage:
    """Put the data set into a folder of that name, and a link where it was."""

    def damage(made: BadSet) -> None:
        made.root.rename(made.root.parent / name)
        made.root.symlink_to(made.root.parent / name)

    return damage


GREY = np.full((64, 64, 3), 90, np.uint8)
INFO = "meta/info.json"
VIDEO: dict[str, Any] = {"file": "video", "camera": "video"}
RATE = r"expected one (frame )?every 1/10 s.*-vf fps=10"
ROTATED = r"is to be rotated by -?\d+ degrees.*ffmpeg -display_rotation 0"

CASES: dict[str, Case] = {
    # numbers
    "nan action": Case(cell("action", 4, [0, math.nan, 0]), "column action, frame 4 is NaN or infinite"),
    "infinite action": Case(cell("action", 5, [math.inf, 0, 0]), "column action, frame 5 is NaN or infinite"),
    "action above float32": Case(columns(huge_action), "column action, frame 0 is NaN or infinite"),
    "empty action": Case(cell("action", 3, None), "column action has 1 empty rows"),
    "action of another width": Case(columns(wide_action), "column action has 4 numbers a frame; expected 3"),
    "no action": Case(columns(lambda table: table.drop_columns(["action"])), "action"),
    "nan state": Case(cell("observation.state", 0, [math.nan, 0]), r"column observation\.state, frame 0 is NaN"),
    "ragged state": Case(cell("observation.state", 3, [1, 2, 3]), r"column observation\.state has lists of 2 lengths"),
    "reversed timestamps": Case(cell("timestamp", 5, 0.1), r"timestamp 0\.1\d* at row 5"),
    "duplicate timestamps": Case(cell("timestamp", 5, 0.4), r"timestamp 0\.4\d* at row 5"),
    "nan timestamp": Case(cell("timestamp", 5, math.nan), "timestamp nan at row 5"),
    "jumping timestamps": Case(cell("timestamp", 5, 0.65), r"timestamp 0\.65\d* at row 5 is off", camera="video"),
    "shuffled frames": Case(cell("frame_index", 4, 5), "row 4 has frame_index 5; expected 4"),
    "empty frame number": Case(cell("frame_index", 5, None), "column frame_index has 1 empty values"),
    "last row of another episode": Case(cell("episode_index", 5, 40), "episode_000001 has 5 rows; expected 6"),
    "scattered rows": Case(cell("episode_index", 3, 40), "episode_000001 has 3 rows; expected 6"),
    "rows that end early": Case(columns(lambda table: table.slice(0, 5)), "episode_000001 has 5 rows; expected 6"),
    "no rows": Case(columns(lambda table: table.slice(0, 0)), "episode_000001 has 0 rows; expected 6"),
    # files of rows
    "rows of zero bytes": Case(cut("rows", 0), "cannot be read"),
    "rows cut to ten bytes": Case(cut("rows", 10), "cannot be read"),
    "rows cut in half": Case(cut("rows", 0.5), "cannot be read"),
    "rows cut near the end": Case(cut("rows", 0.98), "cannot be read"),
    "rows that are text": Case(content("rows", b"hello" * 100), "cannot be read"),
    "rows missing": Case(gone("rows"), "is missing"),
    "a folder where rows should be": Case(folder_there("rows"), "is missing"),
    "rows behind a link that leads out": Case(outside("rows"), "leads out of it"),
    # videos
    "video of zero bytes": Case(cut("video", 0), "has 0 bytes", **VIDEO),
    "video cut to a tenth": Case(cut("video", 0.1), "cannot be decoded", **VIDEO),
    "video cut in half": Case(cut("video", 0.5), "", **VIDEO),
    "video cut near the end": Case(cut("video", 0.9), "", **VIDEO),
    "video missing": Case(gone("video"), "is missing", **VIDEO),
    "a folder where a video should be": Case(folder_there("video"), "is missing", **VIDEO),
    "video behind a link that leads out": Case(outside("video"), "leads out of it", **VIDEO),
    "video that is text": Case(content("video", b"hello" * 99), "cannot be decoded", **VIDEO),
    "list of files named mp4": Case(
        content("video", b"ffconcat version 1.0\nfile file-000.mp4\n"), "cannot be decoded", **VIDEO
    ),
    "playlist named mp4": Case(content("video", b"#EXTM3U\nfile:///etc/passwd\n" * 50), "cannot be decoded", **VIDEO),
    "sound without pictures": Case(silent_film, "video", **VIDEO),
    "video of one frame": Case(film(1), "the video ends before frame", **VIDEO),
    "video that ends early": Case(film(5), "the video ends before frame 5", **VIDEO),
    "video without its fourth frame": Case(film(6, times=[0, 1, 2, 4, 5, 6]), "frame 3 is missing", **VIDEO),
    "video of variable frame rate": Case(
        film(6, fps=100, times=[0, 10, 21, 36, 40, 52]), r"a frame near 0\.[34]00 s is -0\.40 frames off", **VIDEO
    ),
    "video of thrice the frame rate": Case(film(18, fps=30), RATE, **VIDEO),
    "video of twice the frame rate": Case(film(12, fps=20), RATE, **VIDEO),
    "video of half the frame rate": Case(film(6, fps=5), RATE, **VIDEO),
    "video rotated by 90": Case(film(rotate=90), ROTATED, **VIDEO),
    "video rotated by 270": Case(film(rotate=270), ROTATED, **VIDEO),
    "video rotated by 180": Case(film(rotate=180), ROTATED, **VIDEO),
    "video of another size": Case(small_film, "has 48 x 32 pixels; expected 64 x 64", **VIDEO),
    # pictures inside parquet
    "picture cut": once(shot(encoded(GREY)[:60]), "cannot be decoded"),
    "picture of text": once(shot(b"hello"), "cannot be decoded"),
    "picture of no bytes": once(shot(b""), "is empty"),
    "picture missing": once(shot(None), "is empty"),
    "picture elsewhere": once(shot(None, "/etc/passwd"), "names '/etc/passwd' and holds no bytes"),
    "picture of 16-bit grey": once(shot(png(64, 64, 16, 0, (b"\0" + bytes(128)) * 64)), "16 bits a channel"),
    "picture of 16-bit colour": once(shot(png(64, 64, 16, 2, (b"\0" + bytes(384)) * 64)), "16 bits a channel"),
    "picture of one pixel": once(shot(encoded(GREY[:1, :1])), "has 1 x 1 pixels; expected 64 x 64"),
    "picture of another size": once(shot(encoded(GREY[:32])), "has 64 x 32 pixels; expected 64 x 64"),
    "picture of 100 megapixels": once(shot(png(10_000, 10_000, 8, 2, b"\0")), "expected at most 64000000"),
    "picture of 81 megapixels": once(shot(png(9000, 9000, 8, 2, b"\0")), "expected at most 64000000"),
    "picture two billion pixels wide": once(shot(png(2**31 - 1, 1, 8, 2, b"\0")), "expected at most 64000000"),
    "TIFF": once(shot(encoded(GREY, "TIFF")), "cannot be decoded"),
    "GIF": once(shot(encoded(GREY, "GIF")), "cannot be decoded"),
    "SVG": once(shot(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot be decoded"),
    "EPS": once(shot(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"), "cannot be decoded"),
    "CMYK": once(shot(encoded(GREY, "JPEG", "CMYK", quality=95)), outcome="read", shows=90),
    "RGBA": once(shot(encoded(GREY, mode="RGBA")), outcome="read", shows=90),
    "grey": once(shot(encoded(GREY, mode="L")), outcome="read", shows=90),
    "palette": once(shot(encoded(GREY, mode="P")), outcome="read", shows=90),
    "WebP": once(shot(encoded(GREY, "WEBP", lossless=True)), outcome="read", shows=90),
    "EXIF orientation": once(shot(upright_by_exif()), outcome="read", shows=90),
    # the list of episodes
    "episode of no frames": once(listed(lambda rows: rows[1].update(length=0)), "has 0 frames", file="episode_000001"),
    "length too large": once(listed(lambda rows: rows[1].update(length=7)), "has 6 rows; expected 7"),
    "length too small": once(listed(lambda rows: rows[1].update(length=5)), "has 6 rows; expected 5"),
    "episode not listed": once(listed(lambda rows: rows.pop(1)), "lists 2 episodes", file="meta/episodes"),
    "episode listed twice": once(
        listed(lambda rows: rows.append(rows[1])), "lists episode 1 twice", "all", "meta/episodes"
    ),
    "video that begins between two frames": once(
        listed(lambda rows: rows[1].update({f"videos/{FRONT}/from_timestamp": 0.05})), "begins at", **VIDEO
    ),
    "video span too short": once(
        listed(lambda rows: rows[1].update({f"videos/{FRONT}/to_timestamp": 0.3})), "spans", **VIDEO
    ),
    # metadata
    "info of zero bytes": once(meta(INFO, b""), "is not JSON", "all", INFO),
    "info that is a list": once(meta(INFO, b"[]"), "holds a list", "all", INFO),
    "info that is no UTF-8": once(meta(INFO, b"\xff\xfe"), "is not JSON", "all", INFO),
    "info without end of depth": once(meta(INFO, b"[" * 100_000), "is not JSON", "all", INFO),
    "fps of zero": once(lambda made: made.info(fps=0), "fps", "all", INFO),
    "fps that is text": once(lambda made: made.info(fps="fast"), "fps", "all", INFO),
    "no features": once(lambda made: made.info(features=None), "features", "all", INFO),
    "episodes missing": once(
        lambda made: shutil.rmtree(made.root / "meta/episodes"), "holds no", "all", "meta/episodes"
    ),
    "another version": once(lambda made: made.info(codebase_version="v1.6"), "codebase_version", "all", INFO),
    # names
    "data above the data set": once(
        lambda made: made.info(data_path="../{chunk_index}/{file_index}.parquet"), "leads out", "all", INFO
    ),
    "data at an absolute path": once(
        lambda made: made.info(data_path="/etc/{chunk_index}/{file_index}.parquet"), "leads out", "all", INFO
    ),
    "camera named like a way out": once(
        lambda made: made.feature(FRONT, "../../secret"), "cannot name an array|leads out", "all", "", "video"
    ),
    "names that differ in case only": once(lambda made: made.feature("action", "Action"), "", "read"),
    "a space and a newline in the folder's name": once(moved_to("my demo\n1"), outcome="read"),
    "a folder's name beyond ASCII": once(moved_to("démo-机器人"), outcome="read"),
}


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory, lerobot_sets: ModuleType
) -> dict[tuple[str, str], tuple[Path, Store]]:
    """Sound data sets by (camera, version), and the stores of them."""
    made = {}
    for camera in ("image", "video"):
        for version in ("v3.0", "v2.1"):
            root = tmp_path_factory.mktemp(f"{camera}-{version}")
            options = {"version": version, "cameras": {FRONT: camera}, "lengths": LENGTHS, "per_file": 1}
            lerobot_sets.write_lerobot(root / "set", **options)
            featurized(root / "set", root / "store")
            made[camera, version] = (root / "set", open_store(root / "store"))
    return made


def featurized(source: Path, store: Path, *, skip_bad: bool = False) -> dict[str, str]:
    """Featurize, three frames a unit; return what was left out."""
    told = {"backbone": "toy", "source": str(source), "skip_bad": skip_bad, "store": {"unit_rows": 3}}
    job = prepare(FeaturizeConfig.build({**told, "options": {"grid": 4, "channels": 4}, "batch_size": 2}))
    report = run(job, store)
    return {**job.plan.skipped, **report.skipped}


def features(store: Store, episode: str) -> np.ndarray[Any, Any]:
    position = store.episodes.ids.index(episode)
    start, length = int(store.episodes.row_start[position]), int(store.episodes.length[position])
    return store.read("grid", np.arange(start, start + length))


def require_untouched(path: Path, sound: Store) -> None:
    """No store, or one whose committed units are whole and right; nothing that belongs to no unit."""
    if not path.exists():
        return
    store = open_store(path, allow_partial=True)
    report = verify_store(path)
    assert not report.damaged
    assert not report.debris
    for position in np.flatnonzero(store.usable):
        name = store.episodes.ids[position]
        np.testing.assert_array_equal(features(store, name), features(sound, name))


CORPUS = [pytest.param(name, version, id=f"{name}-{version}") for name in CASES for version in CASES[name].versions]


@pytest.mark.parametrize(("name", "version"), CORPUS)
def test_a_bad_input_is_refused_by_name_or_left_out_and_counted(
    name: str,
    version: str,
    sound: dict[tuple[str, str], tuple[Path, Store]],
    lerobot_sets: ModuleType,
    memory_path: Path,
) -> None:
    case = CASES[name]
    source, whole = sound[case.camera, version]
    root = memory_path / "set"
    shutil.copytree(source, root)
    bad = BadSet(root, lerobot_sets)
    file = case.file
    if case.file in ("rows", "video"):
        file = str(getattr(bad, case.file).relative_to(root))
    case.damage(bad)
    if case.outcome == "read":
        assert featurized(root, memory_path / "s") == {}
        store = open_store(memory_path / "s")
        assert store.usable.all()
        for episode in ("episode_000000", "episode_000002"):
            np.testing.assert_array_equal(features(store, episode), features(whole, episode))
        if case.shows is not None:
            grey = np.full((64, 64, 3), case.shows, np.uint8)
            toy = make_backbone("toy", grid=4, channels=4)
            wanted = toy.encode(toy.preprocess(grey)[None, None])["grid"][0].numpy()
            np.testing.assert_allclose(features(store, "episode_000001")[3], wanted, atol=0.02)
        return
    for skip_bad in (False, True) if case.outcome == "all" else (False,):
        with pytest.raises(VlaError) as raised:
            featurized(root, memory_path / f"s{skip_bad}", skip_bad=skip_bad)
        message = str(raised.value)
        assert raised.value.exit_code == 3, message
        assert "\n" not in message
        assert re.search(case.says, message), message
        assert file in message
        require_untouched(memory_path / f"s{skip_bad}", whole)
    if case.outcome == "all":
        return
    skipped = featurized(root, memory_path / "s", skip_bad=True)
    assert list(skipped) == ["episode_000001"]
    assert re.search(case.says, skipped["episode_000001"])
    store = open_store(memory_path / "s")
    assert verify_store(memory_path / "s").findings == []
    good = [name for name, usable in zip(store.episodes.ids, store.usable, strict=True) if usable]
    assert good == ["episode_000000", "episode_000002"]
    for name in good:
        np.testing.assert_array_equal(features(store, name), features(whole, name))


@pytest.mark.parametrize("name", ["rows cut in half", "picture cut"])
def test_the_command_says_it_in_one_line_or_logs_and_counts(
    name: str,
    sound: dict[tuple[str, str], tuple[Path, Store]],
    lerobot_sets: ModuleType,
    memory_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One found by indexing, one while frames are read."""
    root = memory_path / "set"
    shutil.copytree(sound["image", "v3.0"][0], root)
    CASES[name].damage(BadSet(root, lerobot_sets))
    monkeypatch.setenv("COLUMNS", "400")

    def vla(*more: str) -> tuple[object, str, str]:
        command = ["featurize", "--backbone", "toy", "--source", str(root), "--out", str(memory_path), *more]
        monkeypatch.setattr(sys, "argv", ["vla", *command])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, *capsys.readouterr())

    code, out, log = vla("--name", "a", "--json")
    assert (code, out) == (3, "")
    assert "Traceback" not in log
    assert log.splitlines()[-1].startswith("vla: ")
    assert "file-001.parquet" in log.splitlines()[-1]
    code, _, log = vla("--name", "b", "--skip-bad")
    assert code == 0
    assert "left out episode_000001: " in log
    code, out, _ = vla("--name", "c", "--skip-bad", "--json")
    assert code == 0
    assert list(json.loads(out)["skipped"]) == ["episode_000001"]
