"""Which embedding belongs to which row of the stores: same episode, same frame, and never another one instead.

Episodes are the same where their ids are; `episode_12`, `episode12`, `episode-12` and `episode_000012` are one id, with
whatever folder stands before. Frames are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla.featurize.distill.teacher import Teacher
from vla.stores.errors import DataError
from vla.stores.settings import Settings
from vla.stores.tables import EpisodeTable


class PairingReport(Settings):
    """`paired` and `unpaired` steps of the stores; `surplus` embeddings beyond the frames of an episode that is paired;
    `unused` episodes of the teacher that the stores do not have."""

    paired: int
    unpaired: int
    surplus: int
    unused: int


@dataclass(frozen=True)
class PairedTeacher:
    """Embeddings by row of the (first) store, in memory: 100 000 steps of 1280 numbers are 512 MB.

    `values` float32 [paired, V or 1, E]; `place` int64 [rows] into it, -1 where a row has none.
    """

    values: NDArray[np.float32]
    place: NDArray[np.int64]
    report: PairingReport

    @property
    def paired(self) -> NDArray[np.bool_]:
        """Which rows have an embedding, bool [rows]."""
        return self.place >= 0

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of paired rows [B] as [B, V or 1, E]."""
        return self.values[self.place[rows]]


def episode_key(name: str) -> str:
    """Return what two spellings of one episode id have in common."""
    found = re.fullmatch(r"((?:.*/)?)episode[_-]?([0-9]+)", name)
    return f"{found[1]}episode_{int(found[2])}" if found else name


def pair(
    teacher: Teacher, table: EpisodeTable, usable: NDArray[np.bool_], *, skip_unpaired: bool = False
) -> PairedTeacher:
    """Pair every step of the usable episodes, bool [episodes], with its embedding.

    Raises `DataError` naming episode and frame of the first step without an embedding and of the first embedding
    without a step; with `skip_unpaired` both are left out and counted. Raises it in any case where two episodes have
    one id, where embeddings differ in shape, and where no step is paired.
    """
    theirs = _by_key(teacher.episodes(), "the teacher")
    ours = _by_key([table.ids[at] for at in np.flatnonzero(usable)], "the stores")
    parts: list[NDArray[np.float32]] = []
    place = np.full(table.rows, -1, np.int64)
    held = unpaired = surplus = 0
    for at in np.flatnonzero(usable).tolist():
        name, start, length = table.ids[at], int(table.row_start[at]), int(table.length[at])
        key = episode_key(name)
        if key not in theirs:
            _refuse(skip_unpaired, f"frame 0 of episode {name!r} has no embedding: the teacher has no such episode")
            unpaired += length
            continue
        found = teacher.load(theirs[key])
        if parts and found.values.shape[1:] != parts[0].shape[1:]:
            shapes = f"{found.values.shape[1:]} a step, the episodes before {parts[0].shape[1:]}"
            raise DataError(f"the teacher's episode {theirs[key]!r} has {shapes}", expected="one shape")
        inside = found.frames < length
        missing = np.setdiff1d(np.arange(length), found.frames)
        if len(missing):
            _refuse(skip_unpaired, f"frame {missing[0]} of episode {name!r} has no embedding")
        if not inside.all():
            beyond = found.frames[~inside].min()
            _refuse(skip_unpaired, f"the teacher has frame {beyond} of episode {name!r}, whose last is {length - 1}")
        place[start + found.frames[inside]] = held + np.arange(int(inside.sum()))
        parts.append(found.values[inside])
        held += int(inside.sum())
        unpaired, surplus = unpaired + len(missing), surplus + int((~inside).sum())
    if not held:
        raise DataError("no step has an embedding", expected="a teacher of the same episodes, by id")
    report = PairingReport(paired=held, unpaired=unpaired, surplus=surplus, unused=len(theirs.keys() - ours.keys()))
    return PairedTeacher(np.concatenate(parts), place, report)


def _by_key(names: Iterable[str], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(episode_key(name), name)
        if other != name:
            raise DataError(f"{other!r} and {name!r} of {where} are one episode", expected="one entry an episode")
    return found


def _refuse(skip_unpaired: bool, found: str) -> None:
    if not skip_unpaired:
        raise DataError(found, expected="an embedding for every step, and no other", fix="--skip-unpaired")
