"""Windows as they come from the reader, as batches of torch tensors on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vla.heads.batch import Batch, HeadIO
from vla.stores.batches import WindowBatch, WindowBatches
from vla.stores.dtypes import DtypeName
from vla.training.storage import as_tensor


@dataclass(frozen=True)
class TensorBatches:
    """`WindowBatches` as torch batches. Features share memory with the ring: a batch is valid until the next one."""

    batches: WindowBatches
    state: tuple[str, ...]
    dtypes: dict[str, DtypeName]
    target: str
    io: HeadIO
    dims: tuple[int, ...] | None = None
    """The dimensions of the label that are kept; None: all."""

    def shuffled(self, seed: int, start: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Yield batches start, start + stride, … for ever; batch k is a function of (seed, k)."""
        return map(self._to_torch, self.batches.shuffled(seed, start, stride=stride))

    def observed(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the rows [B, n_obs] of the first store that batch `number` of the shuffled stream observes."""
        return self.batches.index.rows(self.batches.windows_of_batch(seed, number)).obs

    def in_order(self) -> Iterator[Batch]:
        """Yield every window once."""
        return map(self._to_torch, self.batches.in_order())

    def _to_torch(self, batch: WindowBatch) -> Batch:
        B, N = batch.obs_valid.shape
        state = [batch.obs_steps[name].reshape(B, N, -1).astype(np.float32) for name in self.state]
        masked = {name: f"{name}_mask" for name, io in self.io.features.items() if io.masked}
        values = {name: as_tensor(read, self.dtypes[name]) for name, read in batch.features.items()}
        steps = batch.action_steps
        action, valid, dims = steps[self.target], batch.action_valid, steps.get(f"{self.target}_dims")
        if self.dims is not None:
            action, dims = action[..., list(self.dims)], None
        labelled = steps.get(f"{self.target}_valid")
        if self.io.chunk is not None:
            assert labelled is not None  # label_columns saw to it
            action, valid = action[:, 0], labelled[:, 0]
        elif labelled is not None:
            valid = valid & labelled
        return Batch(
            features={name: tensor for name, tensor in values.items() if name not in masked.values()},
            state=torch.from_numpy(np.concatenate(state, axis=2)) if state else None,
            task=torch.from_numpy(batch.task),
            obs_valid=torch.from_numpy(batch.obs_valid),
            action=torch.from_numpy(action.astype(np.float32)),
            action_valid=torch.from_numpy(valid),
            label=torch.from_numpy(batch.label) if self.io.labels else None,
            action_dims=None if dims is None else torch.from_numpy(dims[:, 0]),
            feature_valid={name: values[mask].bool() for name, mask in masked.items() if mask in values},
            scales={name: torch.from_numpy(values) for name, values in batch.scales.items()},
        )
