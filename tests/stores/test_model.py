"""A store is a dict of arrays: a random history of writing, dying, damage, repair and conversion against that model.

75 histories of 5 steps, the same on every day; 500 of 100 in the long run. Every form and dtype; after each step the
store on disk is opened and compared with the model in full. What is too slow or too rare for this is in tests/faults.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vla.stores.batches import WindowBatches
from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.dtypes import FILL
from vla.stores.errors import FingerprintError, StoreError
from vla.stores.join import join_stores
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.repair import repair_store
from vla.stores.store import Store, open_store
from vla.stores.tables import TABLES, EpisodeTable
from vla.stores.verify import verify_store
from vla.stores.windows import WindowIndex, WindowSpec
from vla.stores.writer import StoreWriter, open_writer

FORMS: dict[str, dict[str, str]] = {"zarr": {}, "h5": {"format": "h5"}, "zstd": {"compression": "zstd"}}
DTYPES = ("float16", "float32", "bfloat16", "int8")
LAYOUTS = [  # lengths of the episodes, rows of a unit
    ((4, 4), 4),  # units end where episodes do
    ((3, 5, 2), 4),  # they do not
    ((7,), 2),  # an episode over four units
    ((1, 1, 1, 1), 3),  # episodes shorter than any window
    ((2, 3), 1),  # a unit a row
    ((2, 4), 9),  # one unit larger than the store
]
SHAPES = {"grid": (2, 3, 2), "pooled": (1, 3)}


class Death(BaseException):
    """The process ends here: nothing in the code may catch it."""


@dataclass(frozen=True)
class Plan:
    """What a history starts from. `bad` are the episodes that cannot be decoded."""

    form: str
    dtypes: tuple[str, ...]
    layout: tuple[tuple[int, ...], int]
    bad: frozenset[int]
    seed: int

    @property
    def episodes(self) -> EpisodeTable:
        names = [f"e{at}" for at in range(len(self.layout[0]))]
        return EpisodeTable.plan(names, self.layout[0], [f"task {at % 2}" for at in range(len(names))])

    @property
    def manifest(self) -> Manifest:
        features = {
            name: FeatureInfo(shape=shape, dims=tuple(f"{name}_{axis}" for axis in range(len(shape))), dtype=dtype)
            for (name, shape), dtype in zip(SHAPES.items(), self.dtypes, strict=False)
        }
        steps = {
            "action": StepInfo(shape=(2,), dtype="float32", role="action"),
        }
        plan: dict[str, Any] = {"rows": sum(self.layout[0]), "unit_rows": self.layout[1], "fps": 10.0}
        return Manifest(
            **plan,
            cameras=("front",),
            features=features,
            steps=steps,
            fingerprint={"source": {"digest": "s"}},
            tables={},
            provenance={},
            **FORMS[self.form],
        )


class Model:
    """The dict of arrays: values by row, which rows are left out, and what each dtype makes of them."""

    def __init__(self, plan: Plan) -> None:
        manifest, rng = plan.manifest, np.random.default_rng(plan.seed)
        self.rows, self.unit_rows = manifest.rows, manifest.unit_rows
        self.episode = np.repeat(np.arange(len(plan.layout[0])), plan.layout[0])
        self.left_out = np.isin(self.episode, list(plan.bad))
        self.features = {name: self._draw(rng, info) for name, info in manifest.features.items()}
        self.steps = {
            "action": rng.normal(size=(self.rows, 2)).astype(np.float32),
        }
        self.dtypes = {name: info.dtype for name, info in manifest.features.items()}
        self.committed: set[int] = set()

    def _draw(self, rng: np.random.Generator, info: FeatureInfo) -> np.ndarray[Any, Any]:
        values = rng.normal(size=(self.rows, *info.shape)).astype(np.float32)
        values[rng.random(values.shape) < 0.2] = 0.0
        if info.dtype == "float16":
            return values.astype(np.float16).astype(np.float32)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if info.dtype == "bfloat16" else values

    @property
    def units(self) -> int:
        return -(-self.rows // self.unit_rows)

    def of_unit(self, unit: int) -> range:
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.rows))

    def pending(self) -> list[int]:
        return [unit for unit in range(self.units) if unit not in self.committed]

    def readable(self) -> np.ndarray[Any, Any]:
        return np.isin(np.arange(self.rows) // self.unit_rows, list(self.committed)) & ~self.left_out

    def scales(self, name: str) -> np.ndarray[Any, Any]:
        """The step of the int8 grid by unit: a 127th of the largest magnitude among the rows that are there."""
        values, there = np.abs(self.features[name]), self.readable()
        scales = np.zeros((self.units, values.shape[-1]), np.float32)
        for unit in self.committed:
            kept = [row for row in self.of_unit(unit) if there[row]]
            if kept:
                scales[unit] = values[kept].reshape(-1, values.shape[-1]).max(axis=0) / np.float32(127)
        return scales

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        """Every row as its dtype keeps it; rows that are not readable mean nothing."""
        values, dtype = self.features[name], self.dtypes[name]
        if dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        if dtype != "int8":
            return values.astype(dtype)
        step = self.scales(name)[np.arange(self.rows) // self.unit_rows]
        step = step.reshape(self.rows, *(1,) * (values.ndim - 2), -1)
        return np.rint(np.divide(values, step, out=np.zeros_like(values), where=step > 0)).clip(-127, 127).astype("i1")

    def meant(self, name: str) -> np.ndarray[Any, Any]:
        """The numbers that the stored rows stand for."""
        stored = self.stored(name)
        if self.dtypes[name] != "int8":
            return self.features[name]
        step = self.scales(name)[np.arange(self.rows) // self.unit_rows]
        return stored.astype(np.float32) * step.reshape(self.rows, *(1,) * (stored.ndim - 2), -1)


plans = st.builds(
    Plan,
    form=st.sampled_from(sorted(FORMS)),
    dtypes=st.sampled_from([*((dtype,) for dtype in DTYPES), ("int8", "float16"), ("bfloat16", "int8")]),
    layout=st.sampled_from(LAYOUTS),
    bad=st.frozensets(st.just(0), max_size=1),
    seed=st.integers(0, 3),
)


class StoreMachine(RuleBasedStateMachine):
    """One history. `folder` is emptied at its beginning."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.templates = folder / "history", folder / "templates"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.root = self.folder / "s"
        self.whole: dict[str, dict[str, bytes]] = {}
        self.converted = 0
        self.changed = True  # by the last step, so that there is something to compare

    @initialize(plan=plans)
    def create(self, plan: Plan) -> None:
        """Begin a store. The second history with the same plan begins with a copy of the first one's empty store."""
        self.plan, self.model = plan, Model(plan)
        self.looks_at_plain = plan.seed == 0
        template = self.templates / f"{plan.form}{plan.dtypes}{plan.layout}"
        if not template.exists():
            with self.writer(root=template):
                pass
        shutil.copytree(template, self.root)

    def writer(self, *, root: Path | None = None, **options: bool) -> Any:
        self.changed = True
        return open_writer(root or self.root, self.plan.manifest, self.plan.episodes, **options)

    def fill(self, writer: StoreWriter, unit: int, *, stop: int | None = None, piece: int = 2) -> Any:
        """Put the rows of a unit, those before `stop`, a few at a time; then leave the bad episodes out."""
        model, buffer = self.model, writer.begin(unit)
        rows = model.of_unit(unit)
        for start in range(rows.start, rows.stop if stop is None else min(stop, rows.stop), piece):
            part = slice(start, min(start + piece, rows.stop))
            buffer.put(start, {name: values[part] for name, values in model.features.items()})
        for name, values in model.steps.items():
            buffer.steps[name][: len(rows)] = values[rows.start : rows.stop]
        table = self.plan.episodes
        for bad in self.plan.bad:
            start, end = int(table.row_start[bad]), int(table.row_start[bad] + table.length[bad])
            inside = range(max(start, rows.start), min(end, rows.stop))
            if inside:
                buffer.leave_out(table.ids[bad], inside, "cannot be decoded")
        return buffer

    # ---- what may happen ----

    @precondition(lambda self: self.model.pending())
    @rule(data=st.data(), piece=st.integers(1, 4))
    def write(self, data: st.DataObject, piece: int) -> None:
        """Go on with the store for some units, in any order. Nobody else can meanwhile, nor with other settings."""
        other = self.plan.manifest.model_copy(update={"fingerprint": {"source": {"digest": "t"}}})
        with (
            pytest.raises(FingerprintError, match=r"source\.digest"),
            open_writer(self.root, other, self.plan.episodes, resume=True),
        ):
            pass
        with pytest.raises(StoreError, match="units"):
            open_store(self.root)
        units = data.draw(st.permutations(self.model.pending()))[: data.draw(st.integers(1, 3))]
        with self.writer(resume=True) as writer:
            assert writer.pending() == self.model.pending()
            for unit in units:
                buffer = self.fill(writer, unit, piece=piece)
                with pytest.raises(StoreError, match="being written"), self.writer(resume=True):
                    pass
                writer.commit(buffer)
                self.model.committed.add(unit)

    @precondition(lambda self: self.model.pending())
    @rule()
    def finish(self) -> None:
        """Write all that is missing: the store is sound, whatever was before."""
        with self.writer(resume=True) as writer:
            for unit in writer.pending():
                writer.commit(self.fill(writer, unit, piece=64))
                self.model.committed.add(unit)
        assert verify_store(self.root).findings == []

    @precondition(lambda self: self.model.pending())
    @rule(data=st.data(), rename=st.integers(0, 12), after=st.booleans())
    def die_while_committing(self, data: st.DataObject, rename: int, after: bool) -> None:
        """Die just before or after a file gets its name. The unit is there if its record got its name."""
        unit = data.draw(st.sampled_from(self.model.pending()))
        with dying(rename, after) as named, suppress(Death), self.writer(resume=True) as writer:
            writer.commit(self.fill(writer, unit))
        if f"unit-{unit:06d}.json" in named:
            self.model.committed.add(unit)

    @precondition(lambda self: self.model.pending())
    @rule(data=st.data(), keep=st.integers(0, 5))
    def die_before_committing(self, data: st.DataObject, keep: int) -> None:
        """Die with a unit half computed, leaving what other deaths leave: files and folders with temporary names."""
        unit = data.draw(st.sampled_from(self.model.pending()))
        with suppress(Death), self.writer(resume=True) as writer:
            self.fill(writer, unit, stop=self.model.of_unit(unit).start + keep)
            raise Death
        (self.root / "commits" / f"unit-{unit:06d}.json.partial").write_bytes(b'{"unit": ')
        table = self.root / f"{TABLES[0]}.partial"
        table.mkdir(exist_ok=True)
        (table / "c.0").touch()

    @precondition(lambda self: self.model.committed)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "grow", "remove", "empty"]))
    def damage_and_repair(self, data: st.DataObject, how: str) -> None:
        """Damage one file of a unit: reading never returns it, `verify` names it, `repair` drops that unit alone."""
        self.changed = True
        unit = data.draw(st.sampled_from(sorted(self.model.committed)))
        record = f"commits/unit-{unit:06d}.json"
        files = sorted([*open_store(self.root, allow_partial=True).commits[unit].files, record])
        path = self.root / data.draw(st.sampled_from(files))
        good = path.read_bytes()
        bad = bytearray(good)
        bit = data.draw(st.integers(0, 8 * len(good) - 1))
        bad[bit // 8] ^= 1 << bit % 8
        cut = data.draw(st.integers(0, len(good) - 1))
        path.write_bytes({"flip": bytes(bad), "cut": good[:cut], "grow": good + b"\0"}.get(how, b""))
        if how == "remove":
            path.unlink()
        with suppress(StoreError):
            self.compare(open_store(self.root, allow_partial=True), absent=unit)
        absent = path.name == Path(record).name and how == "remove"
        report = verify_store(self.root)
        assert (report.damaged, unit in report.missing) == ([] if absent else [unit], absent)
        assert absent or any(str(path) in line for line in report.findings)
        repaired = repair_store(self.root)
        self.model.committed.remove(unit)
        assert (repaired.dropped, repaired.pending) == (report.damaged, self.model.pending())
        assert verify_store(self.root).debris == []

    @precondition(lambda self: not self.model.pending())
    @rule(form=st.sampled_from(sorted(FORMS)), dies=st.one_of(st.none(), st.integers(0, 30)))
    def convert(self, form: str, dies: int | None) -> None:
        """Turn the store into another form, perhaps in two goes, and go on with that one."""
        self.changed = True
        self.converted += 1
        out = self.folder / f"s{self.converted}"
        options = ConvertOptions.build({"compression": "none", "format": "zarr"} | FORMS[form])
        if dies is not None:
            with dying(dies, after=False), suppress(Death):
                convert_store(self.root, out, options)
        convert_store(self.root, out, options, resume=True)
        shutil.rmtree(self.root)
        self.root, self.plan = out, Plan(**{**self.plan.__dict__, "form": form})

    @precondition(lambda self: self.looks_at_plain and not self.model.pending())
    @rule(compression=st.sampled_from(["none", "zstd"]))
    def convert_to_plain_zarr(self, compression: str) -> None:
        """What plain zarr-python reads from the plain form is what was written. Once a history: it is slow."""
        self.looks_at_plain = self.changed = False
        out = self.folder / "plain"
        options = ConvertOptions.build({"format": "plain-zarr", "compression": compression})
        convert_store(self.root, out, options)
        group, there = zarr.open_group(out, mode="r"), self.model.readable()
        for name, dtype in self.model.dtypes.items():
            read = np.asarray(group[f"frames/{name}"])
            np.testing.assert_array_equal(read[there], self.model.stored(name)[there])
            filled = read[~there].astype(np.float64)
            np.testing.assert_array_equal(filled, np.full_like(filled, FILL[dtype]))  # type: ignore[index]

    @precondition(lambda self: self.model.committed)
    @rule(seed=st.integers(0, 3))
    def overwrite(self, seed: int) -> None:
        """Replace the store by an empty one of the same plan with other values."""
        self.plan = Plan(**{**self.plan.__dict__, "seed": seed})
        self.model, self.whole = Model(self.plan), {}
        with self.writer(overwrite=True) as writer:
            assert writer.pending() == self.model.pending()

    @precondition(lambda self: self.model.readable().any())
    @rule(n_obs=st.integers(1, 4), horizon=st.integers(1, 6), offset=st.integers(-3, 0), seed=st.integers(0, 9))
    def read_windows(self, n_obs: int, horizon: int, offset: int, seed: int) -> None:
        """Windows through the reader of the training loop: values, masks and tasks, shuffled or in order."""
        self.changed = False
        store, model = open_store(self.root, allow_partial=True), self.model
        whole = [e for e in range(len(store.episodes)) if model.readable()[model.episode == e].all()]
        assert np.flatnonzero(store.usable).tolist() == whole
        if not whole:
            return
        index = WindowIndex(
            store.episodes, np.array(whole), WindowSpec(n_obs=n_obs, horizon=horizon, action_offset=offset)
        )
        names = tuple(model.features)
        batches = WindowBatches(
            join_stores([store]), index, features=names, obs_steps=("action",), action_steps=("action",), batch_size=3
        )
        rows = np.flatnonzero(np.isin(model.episode, whole))
        for at, batch in enumerate(batches.in_order() if seed % 2 else batches.shuffled(seed, stop=2)):
            windows = np.arange(len(rows))[3 * at : 3 * at + 3] if seed % 2 else batches.windows_of_batch(seed, at)
            for k, row in enumerate(rows[windows].tolist()):
                self.compare_window(batch, k, row, n_obs, horizon, offset)

    def compare_window(self, batch: Any, k: int, row: int, n_obs: int, horizon: int, offset: int) -> None:
        model = self.model
        own = np.flatnonzero(model.episode == model.episode[row]).tolist()
        obs = [row - n_obs + 1 + i for i in range(n_obs)]
        action = [row + offset + i for i in range(horizon)]
        assert batch.obs_valid[k].tolist() == [r in own for r in obs]
        assert batch.action_valid[k].tolist() == [r in own for r in action]
        near_obs, near_action = ([min(max(r, own[0]), own[-1]) for r in wanted] for wanted in (obs, action))
        assert batch.task[k] == model.episode[row] % 2
        np.testing.assert_array_equal(batch.obs_steps["action"][k], model.steps["action"][near_obs])
        np.testing.assert_array_equal(batch.action_steps["action"][k], model.steps["action"][near_action])
        for name in model.features:
            np.testing.assert_array_equal(batch.features[name][k], model.stored(name)[near_obs])
            if model.dtypes[name] == "int8":
                units = np.array(near_obs) // model.unit_rows
                np.testing.assert_array_equal(batch.scales[name][k], model.scales(name)[units])

    # ---- what holds after each step ----

    @invariant()
    def the_store_equals_the_model(self) -> None:
        """Open it anew and compare everything."""
        if not hasattr(self, "model") or not self.changed:
            return
        store = open_store(self.root, allow_partial=True)
        assert set(store.commits) == self.model.committed
        self.compare(store)
        if not self.model.pending():
            self.compare_files()

    def compare(self, store: Store, absent: int | None = None) -> None:
        """Compare what can be read; `absent` is a damaged unit, which may raise but not lie."""
        model = self.model
        there = model.readable()
        assert store.episodes.ids == self.plan.episodes.ids
        seen = {
            f"e{bad}"
            for bad in self.plan.bad
            if model.committed & {*np.flatnonzero(model.episode == bad) // model.unit_rows}
        }
        assert absent is not None or set(store.skipped) == seen
        rows = np.flatnonzero(there)
        if absent is not None and absent not in store.commits:
            rows = rows[rows // model.unit_rows != absent]
        for name, info in store.manifest.features.items():
            np.testing.assert_array_equal(store.read(name, rows[::-1]), model.stored(name)[rows[::-1]])
            scales, moments = store.scales(name), store.statistics(name)
            if absent is None:
                if scales is not None:
                    np.testing.assert_array_equal(scales, model.scales(name))
                values = model.meant(name)[rows].astype(np.float64).reshape(-1, info.shape[-1])
                assert moments.count == len(values)
                if len(values):
                    np.testing.assert_array_equal(moments.max, values.max(axis=0))
                    np.testing.assert_array_equal(moments.min, values.min(axis=0))
                    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-9, atol=1e-12)
                    np.testing.assert_allclose(moments.std, values.std(axis=0), rtol=1e-9, atol=1e-12)
        for name, values in model.steps.items():
            read = store.steps(name)
            np.testing.assert_array_equal(read[rows], values[rows])
            if absent is None:
                np.testing.assert_array_equal(read[~there], np.full_like(read[~there], np.nan))

    def compare_files(self) -> None:
        """Whatever the history, a complete store of one form always has the same files."""
        if not any(self.root.rglob("*.partial")):
            files = {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}
            known = self.whole.setdefault(self.plan.form, files)
            assert files == known


@contextmanager
def dying(at: int, after: bool) -> Iterator[list[str]]:
    """Raise `Death` before or after the given call of `os.replace`, counted from 0; yield the names given so far."""
    named: list[str] = []
    replace = os.replace

    def fatal(source: Any, target: Any, **options: Any) -> None:
        if len(named) == at and not after:
            raise Death
        replace(source, target, **options)
        named.append(Path(target).name)
        if len(named) == at + 1 and after:
            raise Death

    with mock.patch.object(os, "replace", fatal):
        yield named


@pytest.mark.slow
@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        pytest.param(75, 5, id="", marks=pytest.mark.timeout(300)),
        pytest.param(500, 100, id="long", marks=[pytest.mark.long, pytest.mark.timeout(7200)]),
    ],
)
def test_a_store_is_a_dict_of_arrays_whatever_happens_to_it(memory_path: Path, examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    how = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(functools.partial(StoreMachine, memory_path), settings=how)
