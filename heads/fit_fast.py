"""Fit FAST to the action chunks of a store's training split, behind the normalisation that a head will train with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vla.heads.data import DataConfig, HeadData, open_data
from vla.heads.fast import SETTINGS, FastTokenizer
from vla.heads.model import fit_from_file
from vla.heads.normalize import Mode, Normalizer
from vla.stores.errors import DataError, UsageError
from vla.stores.owned import refuse_overlap
from vla.stores.settings import Settings
from vla.stores.windows import WindowIndex, WindowSpec


class FitFastConfig(Settings):
    """What `vla fit-fast` can be told.

    `horizon`: steps of a chunk, the head's. `scale`: quantisation steps a unit of normalised DCT coefficient.
    `vocab_size`: tokens at most. `action_norm` and `norm_stats`: the head's; FAST's paper takes quantiles.
    `max_chunks`: chunks to fit on, drawn by `seed` where there are more.
    """

    data: DataConfig
    horizon: int = Field(50, ge=1)
    scale: float = Field(10.0, gt=0, allow_inf_nan=False)
    vocab_size: int = Field(1024, ge=2)
    action_norm: Mode = "quantile"
    norm_stats: str | None = None
    max_chunks: int = Field(100_000, ge=1)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class FitFastReport:
    """What was fitted: chunks, tokens of the vocabulary, mean tokens a chunk, largest and mean absolute error of a
    round trip in the data's units."""

    chunks: int
    vocabulary: int
    tokens: float
    max_error: float
    mean_error: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return dict(vars(self))


def fit_fast(config: FitFastConfig, out: Path | str, *, overwrite: bool = False) -> FitFastReport:
    """Fit, save into `out`, and measure the round trip.

    Raises `UsageError` where `out` exists and is not to be overwritten, or is something else; what opening the stores
    and fitting raise; `DataError` where no chunk is free of padding.
    """
    out = Path(out)
    if out.exists() and not (overwrite and (out / SETTINGS).is_file()):
        fix = "another --out" if overwrite else "--overwrite to replace it, or another --out"
        raise UsageError(f"{out} exists{' and is no FAST folder' if overwrite else ''}", fix=fix)
    refuse_overlap(out, config.data.stores)
    data = open_data(config.data)
    normaliser = fit_normaliser(config, data)
    actions, dims = training_chunks(data, config.horizon, config.max_chunks, config.seed)
    # 0 in padded dimensions, as the head's labels are.
    real = np.ones((len(actions), 1, 1), bool) if dims is None else dims[:, None]
    chunks = np.where(real, normaliser(torch.from_numpy(actions)).numpy(), np.float32(0))
    fast = FastTokenizer.fit(
        chunks,
        scale=config.scale,
        vocab_size=config.vocab_size,
        action_norm=config.action_norm,
        statistics=(tuple(normaliser.centre.tolist()), tuple(normaliser.scale.tolist())),
    )
    fast.save(out)
    ids = fast.encode(chunks)
    back = normaliser.inverse(torch.from_numpy(np.stack([fast.decode(each) for each in ids]))).numpy()
    error = np.abs(back - actions)[np.broadcast_to(real, actions.shape)]
    return FitFastReport(
        len(chunks), fast.size, float(np.mean([len(each) for each in ids])), float(error.max()), float(error.mean())
    )


def fit_normaliser(config: FitFastConfig, data: HeadData) -> Normalizer:
    """Return what `HeadModel.fit_normalisers` would make of the actions."""
    normaliser = Normalizer(data.io.action_dim)
    if config.norm_stats is None:
        normaliser.fit(data.actions(data.training), config.action_norm, valid=data.action_dims(data.training))
        return normaliser
    fit_from_file(Path(config.norm_stats), {"actions": (normaliser, config.action_norm)})
    return normaliser


def training_chunks(
    data: HeadData, horizon: int, most: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Return chunks of actions of the training split that no episode's end cuts, float32 [N <= most, H, A], and which
    dimensions of each are real, bool [N, A]; None where all are."""
    first = data.stores.first
    values = first.steps(data.config.target).astype(np.float32)
    name = f"{data.config.target}_valid"
    labelled = first.steps(name) if name in first.manifest.steps else None
    if data.io.chunk is not None:
        if horizon != data.io.chunk:
            fix = f"--set horizon={data.io.chunk}"
            raise UsageError(f"a horizon of {horizon} over rows of {data.io.chunk} steps", fix=fix)
        assert labelled is not None  # target_info saw to it
        rows = data.rows(data.training)
        whole = rows[labelled[rows].all(axis=1)][:, None]
    else:
        index = WindowIndex(first.episodes, data.training, WindowSpec(n_obs=1, horizon=horizon))
        window = index.rows(np.arange(len(index)))
        valid = window.action_valid if labelled is None else window.action_valid & labelled[window.action]
        whole = window.action[valid.all(axis=1)]
    if not len(whole):
        longest = int(first.episodes.length[data.training].max())
        fix = "" if longest >= horizon else f"--set horizon=N, N up to {longest}"
        raise DataError(f"no episode of the training split has {horizon} steps", fix=fix)
    if len(whole) > most:
        whole = whole[np.sort(np.random.default_rng(seed).choice(len(whole), most, replace=False))]
    chunks: NDArray[np.float32] = values[whole] if data.io.chunk is None else values[whole[:, 0]]
    name = f"{data.config.target}_dims"
    if data.config.dims is not None:
        return chunks[..., list(data.config.dims)], None
    return chunks, first.steps(name)[whole[:, 0]].astype(bool) if name in first.manifest.steps else None
