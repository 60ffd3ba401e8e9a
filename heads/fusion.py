"""RGB2PC's fusion over cached, unfused vectors: an adapter for each backbone, and learned weights between them.

What `vla distill rgb2pc` trains on grids goes on training here on each backbone's spatial mean (the features
`mean_<name>` of an rgb2pc store made with `means=true`). Adapters are known by their backbone's name, never by
position: in whatever order features are given, each meets its own. The student's context encoder is left out: it mixes
places of a grid, and a mean is one place. A student that stays as it is is exact in the cached `fused` features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vla.heads.batch import FeatureIO
from vla.pretrained.weights import require_fit
from vla.stores.errors import CheckpointError, UsageError
from vla.training.checkpoint import load_checkpoint

MEAN = "mean_"
"""How the backbone rgb2pc names the mean of an input."""

HOW = "--features mean_A,mean_B of an rgb2pc store made with --set options.means=true"


class MeanFusion(nn.Module):
    """{name: [B, N, V, C of its own]} -> [B, N, V, dim], with the modules of the student by its names.

    An adapter is Linear, GELU, Linear, LayerNorm, its hidden width 2 dim; the weights are the softmax of one learned
    number a backbone. Raises `UsageError` where there is no vector among the features, or views differ.
    """

    def __init__(self, features: Mapping[str, FeatureIO], dim: int) -> None:
        super().__init__()
        views = {feature.views for feature in features.values()}
        if len(views) != 1:
            found = "no vector among the features" if not views else f"vectors of {sorted(views)} views"
            raise UsageError(f"encoder kind fusion: {found}", expected="vectors of equal views", fix=HOW)
        # The student's logits are in the order of its names, which have no prefix.
        self.names, self.views = tuple(sorted(features, key=lambda name: name.removeprefix(MEAN))), views.pop()
        self.adapters = nn.ModuleDict(
            {adapter_key(name): _adapter(features[name].channels, dim) for name in self.names}
        )
        self.fusion = _Weights(len(self.names))

    def forward(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Fuse vectors in the units of the store."""
        adapted = [self.adapters[adapter_key(name)](vectors[name].float()) for name in self.names]
        fused: Tensor = self.fusion(torch.stack(adapted, dim=-2))
        return fused

    def load_student(self, run: Path | str) -> None:
        """Take adapters and weights from a run of `vla distill rgb2pc`, or one of its checkpoints.

        Raises `CheckpointError` for another kind of run, `UsageError` where its backbones are not those of the
        features or it fuses by a gate, `DataError` where a size differs.
        """
        run = Path(run)
        found = load_checkpoint(run)
        if found.artefact.get("student") != "rgb2pc":
            raise CheckpointError(f"{found.folder} is no student", expected="a run of `vla distill rgb2pc`")
        if "fusion.logits" not in found.weights:
            raise UsageError(
                f"{found.folder} fuses by a gate", expected="a student distilled with model.fusion=weighted"
            )
        trained: Sequence[str] = sorted(found.artefact["config"]["inputs"])
        ours = sorted(name.removeprefix(MEAN) for name in self.names)
        if ours != list(trained):
            found_names = f"the features are of {', '.join(ours)}, the student of {', '.join(trained)}"
            raise UsageError(found_names, expected="the student's own backbones", fix=HOW)
        weights = {key: value for key, value in found.weights.items() if key.startswith(("adapters.", "fusion."))}
        require_fit(self, weights, found.folder)
        self.load_state_dict(weights)


class _Weights(nn.Module):
    def __init__(self, members: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(members))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors * self.logits.softmax(0)[:, None]).sum(-2)


def adapter_key(feature: str) -> str:
    """Return a feature's backbone as the key that the student's ModuleDict has for it."""
    return "of_" + feature.removeprefix(MEAN).replace("%", "%25").replace(".", "%2E")


def _adapter(inside: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.LayerNorm(dim))
