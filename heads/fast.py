"""FAST: a chunk of actions as a few tokens (Pertsch et al. 2025, https://arxiv.org/abs/2501.09747).

The orthonormal DCT-II over the steps of a normalised chunk [H, A], times `scale`, rounded; the coefficients in the
order (frequency, dimension), each the character of code point `coefficient - min_token`; byte-pair encoding of that
text. On disk in the layout of physical-intelligence/fast: `tokenizer.json` and `processor_config.json` with scale,
min_token, vocab_size, time_horizon and action_dim (null where the caller says them); ours also hold the centre and
scale of the normalisation that they were fitted behind. The published tokenizer works on the text's UTF-8 bytes; those
fitted here on its characters, so that every token is one or more whole coefficients.

Unlike the published processor, decoding never turns a damaged sequence into zeros: it raises, and says why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models
from tokenizers.trainers import BpeTrainer

from vla.stores.documents import read_json_file
from vla.stores.errors import DataError, UsageError
from vla.stores.filesystem import write_atomic

SETTINGS, TOKENIZER = "processor_config.json", "tokenizer.json"
STATISTICS = ("action_centre", "action_scale")
HIGHEST = 0xD7FF
"""Last code point before the surrogates, which are no characters."""

NOTHING = (-1, -1, -1)
SAME = 1e-4
"""Relative: statistics that are nearer were fitted on the same actions."""


@dataclass(frozen=True)
class FastTokenizer:
    """Actions to ids and back. `horizon` and `action_dim` are those of the chunks; `scale` coefficients a unit.

    `max_token`: largest coefficient that was fitted; None: whatever the vocabulary holds. Coefficients outside of
    min_token..max_token saturate. `action_norm`: the normalisation that it was fitted behind, and `statistics` its
    centre and scale [A] each in the data's units; None where nobody said.
    """

    tokenizer: Tokenizer
    scale: float
    min_token: int
    horizon: int
    action_dim: int
    max_token: int | None = None
    action_norm: str | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def size(self) -> int:
        """Ids are 0 to size - 1."""
        return int(self.tokenizer.get_vocab_size())

    @cached_property
    def pieces(self) -> tuple[bytes | None, ...]:
        """What each id stands for, in UTF-8; None for ids that stand for no coefficients (special tokens)."""
        kind = json.loads(self.tokenizer.to_str())
        special = {entry["id"] for entry in kind.get("added_tokens") or ()}
        in_bytes = (kind.get("decoder") or {}).get("type") == "ByteLevel"
        return tuple(
            None if i in special else _bytes(self.tokenizer.id_to_token(i), in_bytes) for i in range(self.size)
        )

    @cached_property
    def spans(self) -> NDArray[np.int64]:
        """[size, 3]: continuation bytes that an id begins with, coefficients that it begins, bytes it leaves open.

        Of tokens that are whole characters the first and the last are 0. `NOTHING` where an id is never to be said.
        """
        return np.array([NOTHING if piece is None else _span(piece) for piece in self.pieces], np.int64)

    def coefficients(self, actions: NDArray[Any]) -> NDArray[np.int64]:
        """Return the quantised DCT [..., H, A] of normalised actions [..., H, A]; what is out of range saturates.

        Raises `DataError` for another shape and for values that are not finite.
        """
        if actions.shape[-2:] != (self.horizon, self.action_dim):
            raise DataError(f"actions of shape {actions.shape}", expected=f"[{self.horizon}, {self.action_dim}] each")
        if not np.isfinite(actions).all():
            raise DataError("actions that are not finite", fix="vla verify on the store")
        rounded = np.rint(dct(actions) * self.scale)
        return np.clip(rounded, self.min_token, self._top).astype(np.int64)

    def saturated(self, actions: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which coefficients [..., H, A] of normalised actions [..., H, A] are out of range."""
        rounded = np.rint(dct(actions) * self.scale)
        beyond: NDArray[np.bool_] = (rounded < self.min_token) | (rounded > self._top)
        return beyond

    @property
    def _top(self) -> int:
        return HIGHEST + self.min_token if self.max_token is None else self.max_token

    def require_statistics(self, centre: NDArray[Any], scale: NDArray[Any], folder: Path) -> None:
        """Raise `UsageError` where a head normalises by another centre and scale [A] than these ids were fitted behind:
        its coefficients would have another range, and saturate."""
        if self.statistics is None:
            return
        for name, ours, theirs in zip(("centre", "scale"), self.statistics, (centre, scale), strict=True):
            wrong = np.flatnonzero(~np.isclose(ours, theirs, rtol=SAME, atol=SAME * float(np.abs(scale).max())))
            if len(wrong):
                d = wrong[0]
                raise UsageError(
                    f"{folder} was fitted behind another normalisation: {name} {ours[d]:g} in dimension {d}",
                    expected=f"{theirs[d]:g}, as the head's",
                    fix="vla fit-fast with the --store, data.*, action_norm and norm_stats of the head",
                )

    def encode(self, actions: NDArray[Any]) -> list[list[int]]:
        """Return the ids of each chunk of normalised actions [N, H, A]. Raises `DataError` as `coefficients` does."""
        return [self.encode_coefficients(chunk) for chunk in self.coefficients(actions)]

    def encode_coefficients(self, coefficients: NDArray[np.int64]) -> list[int]:
        """Return the ids of quantised coefficients [H, A]. Raises `DataError` where the vocabulary lacks some."""
        text = "".join(chr(value) for value in (coefficients.reshape(-1) - self.min_token).tolist())
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        # Byte-pair encoding drops in silence what it has no token for.
        if b"".join(self.pieces[i] or b"" for i in ids) != text.encode():
            raise DataError("the FAST vocabulary lacks a coefficient of this chunk", fix="vla fit-fast on this data")
        return ids

    def decode_coefficients(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the quantised coefficients [H, A] of ids. Raises `DataError` with the reason where there are none."""
        wrong = [i for i in ids if not 0 <= i < self.size or self.pieces[i] is None]
        if wrong:
            raise DataError(f"{wrong[0]} is no FAST id", expected=f"0 to {self.size - 1}, no special token")
        joined = b"".join(self.pieces[i] or b"" for i in ids)
        try:
            text = joined.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"FAST ids break a coefficient at byte {error.start}") from None
        wanted = self.horizon * self.action_dim
        if len(text) != wanted:
            raise DataError(f"FAST ids of {len(text)} coefficients", expected=f"{self.horizon} x {self.action_dim}")
        return np.array([ord(c) for c in text], np.int64).reshape(self.horizon, self.action_dim) + self.min_token

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the normalised actions [H, A] of ids. Raises what `decode_coefficients` raises."""
        return inverse_dct(self.decode_coefficients(ids) / self.scale).astype(np.float32)

    def allowed(self, remaining: int, pending: int) -> NDArray[np.bool_]:
        """Return which ids may come next, bool [size], where `remaining` coefficients have not begun yet and the last
        one that has lacks `pending` bytes. Generation that keeps to them always decodes."""
        lead, count, _ = self.spans.T
        fits: NDArray[np.bool_] = (lead == pending) & (count <= remaining) & (count + lead > 0)
        return fits

    @classmethod
    def fit(
        cls,
        chunks: NDArray[Any],
        *,
        scale: float = 10.0,
        vocab_size: int = 1024,
        action_norm: str | None = None,
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> FastTokenizer:
        """Fit to normalised chunks [N, H, A], N >= 1, finite; the rest is kept. Raises `DataError`, and `UsageError`
        for a vocabulary that is smaller than the range of the coefficients."""
        if chunks.ndim != 3 or not len(chunks) or not np.isfinite(chunks).all():
            raise DataError(f"FAST over chunks of shape {chunks.shape}", expected="finite [N >= 1, H, A]")
        coefficients = np.rint(dct(chunks) * scale).astype(np.int64)
        low, high = int(coefficients.min()), int(coefficients.max())
        alphabet = high - low + 1
        if alphabet > min(vocab_size, HIGHEST + 1):
            raise UsageError(
                f"a vocabulary of {vocab_size} for coefficients from {low} to {high}",
                expected=f"{alphabet} or more, a good deal more to compress anything",
                fix=f"--set vocab_size={2 * alphabet}, or --set scale=X below {scale:g}",
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.Fuse()  # else decoding puts spaces between tokens
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[chr(i) for i in range(alphabet)],
            max_token_length=10_000,  # as published: a still arm is one long run
        )
        texts = ("".join(map(chr, chunk)) for chunk in (coefficients.reshape(len(chunks), -1) - low).tolist())
        tokenizer.train_from_iterator(texts, trainer=trainer, length=len(chunks))
        H, A = chunks.shape[1:]
        return cls(tokenizer, scale, low, H, A, max_token=high, action_norm=action_norm, statistics=statistics)

    def save(self, folder: Path | str) -> None:
        """Write both files into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TOKENIZER, self.tokenizer.to_str(pretty=True).encode())
        settings = {
            "processor_class": "UniversalActionProcessor",
            "scale": self.scale,
            "min_token": self.min_token,
            "vocab_size": self.size,
            "time_horizon": self.horizon,
            "action_dim": self.action_dim,
            "max_token": self.max_token,
            "action_norm": self.action_norm,
        }
        if self.statistics is not None:
            settings |= dict(zip(STATISTICS, self.statistics, strict=True))
        write_atomic(folder / SETTINGS, f"{json.dumps(settings, indent=2)}\n".encode())

    @classmethod
    def load(cls, folder: Path | str, horizon: int, action_dim: int) -> FastTokenizer:
        """Read a folder of `save` or of the published layout, for chunks [horizon, action_dim]; runs none of its code.

        Raises `UsageError` for a folder fitted to other chunks, `DataError` for files that do not hold.
        """
        folder = Path(folder)
        settings = _settings(folder)
        for name, ours in (("time_horizon", horizon), ("action_dim", action_dim)):
            if settings.get(name) not in (None, ours):
                theirs = settings[name]
                other = f", or --set model.horizon={theirs}" if name == "time_horizon" else ""
                fix = f"vla fit-fast for this head{other}"
                raise UsageError(f"{folder} is for {name} {theirs}", expected=str(ours), fix=fix)
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower class
            raise DataError(f"{folder / TOKENIZER} is no tokenizer: {error}") from None
        if tokenizer.get_vocab_size() != len(set(tokenizer.get_vocab().values())):
            raise DataError(f"{folder / TOKENIZER} gives one id to several tokens")
        top = settings.get("max_token")
        norm = settings.get("action_norm")
        statistics = _statistics(settings, folder / SETTINGS, action_dim)
        return cls(tokenizer, settings["scale"], settings["min_token"], horizon, action_dim, top, norm, statistics)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        found = read_json_file(path)
    except (OSError, ValueError) as error:
        fix = "vla fit-fast, or `hf download physical-intelligence/fast`"
        raise DataError(f"{path} does not read ({type(error).__name__})", expected="a FAST folder", fix=fix) from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}", expected="a table")
    numbers = {"scale": (int, float), "min_token": (int,)}
    optional = {"max_token": (int,), "time_horizon": (int,), "action_dim": (int,), "action_norm": (str,)}
    for name, kinds in (numbers | optional).items():
        value = found.get(name)
        if not (value is None and name in optional) and type(value) not in kinds:
            raise DataError(f"{path}: {name} is {value!r}", expected=" or ".join(kind.__name__ for kind in kinds))
    if not 0 < found["scale"] < float("inf"):
        raise DataError(f"{path}: scale is {found['scale']}", expected="above 0")
    return found


def _statistics(
    settings: dict[str, Any], path: Path, action_dim: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return centre and scale [A] each of a folder of `save`; None of one of the published layout."""
    found = [settings.get(name) for name in STATISTICS]
    if found == [None, None]:
        return None
    for name, values in zip(STATISTICS, found, strict=True):
        plain = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not plain or len(values) != action_dim or not np.isfinite(values).all():  # type: ignore[arg-type]
            raise DataError(f"{path}: {name} is {values!r}", expected=f"{action_dim} numbers")
    centre, scale = (tuple(map(float, values or ())) for values in found)
    return centre, scale


def read_mapping(path: Path | str, size: int) -> NDArray[np.int64]:
    """Read which id of a language model stands for each FAST id [size]: a JSON list, or an object {"0": 257024, …}.

    What a domain transfer makes that adds action tokens to a language model's vocabulary (the origin keeps it, as
    `action_to_vlm_mapping`, in a pickle, which would run code). Raises `DataError`.
    """
    path = Path(path)
    try:
        found = read_json_file(path)
    except (OSError, ValueError) as error:
        expected = "JSON: a list, or an object of FAST ids"
        raise DataError(f"{path} does not read ({type(error).__name__})", expected=expected) from None
    if isinstance(found, dict):
        found = [found.get(str(i)) for i in range(size)] if len(found) == size else list(found)
    plain = isinstance(found, list) and all(type(i) is int and i >= 0 for i in found)
    if not plain or len(set(found)) != size or len(found) != size:
        raise DataError(f"{path} is no mapping of the {size} FAST ids", expected=f"{size} distinct ids, none missing")
    return np.array(found, np.int64)


@lru_cache(maxsize=8)
def _basis(count: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II [k, n]: sqrt(2 / N) cos(pi (2n + 1) k / 2N), its first row divided by sqrt(2)."""
    k, n = np.arange(count)[:, None], np.arange(count)
    basis: NDArray[np.float64] = np.sqrt(2 / count) * np.cos(np.pi * (2 * n + 1) * k / (2 * count))
    basis[0] /= np.sqrt(2)
    return basis


def dct(x: NDArray[Any]) -> NDArray[np.float64]:
    """Orthonormal DCT-II of [..., H, A] over H."""
    out: NDArray[np.float64] = _basis(x.shape[-2]) @ x.astype(np.float64)
    return out


def inverse_dct(y: NDArray[Any]) -> NDArray[np.float64]:
    """Invert `dct`."""
    out: NDArray[np.float64] = _basis(y.shape[-2]).T @ y
    return out


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Bytes by the characters that stand for them in byte-level vocabularies (GPT-2's): printable ones are themselves,
    the others follow from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(token: str | None, in_bytes: bool) -> bytes | None:
    """What a token of the vocabulary stands for; None for one of another alphabet."""
    if not token:
        return None
    if not in_bytes:
        return token.encode()
    table = _byte_of()
    return bytes(table[c] for c in token) if all(c in table for c in token) else None


def _span(piece: bytes) -> tuple[int, int, int]:
    """See `FastTokenizer.spans`. A token may open or close a character of two bytes: coefficients of byte-level
    vocabularies reach no further."""
    lead = next((i for i, byte in enumerate(piece) if byte & 0xC0 != 0x80), len(piece))
    rest = piece[lead:]
    pending = int(bool(rest) and 0xC2 <= rest[-1] <= 0xDF)
    try:
        whole = len(rest[: len(rest) - pending].decode())
    except UnicodeDecodeError:
        return NOTHING
    return (lead, whole + pending, pending) if lead <= 1 else NOTHING
