"""The RGB2PC student as a backbone: one vector a view, fused from the cached grids of other backbones.

Made by `vla distill rgb2pc`; its inputs are features of stores, by the names that its checkpoint knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.distill.checkpoint import load_student
from vla.featurize.distill.student import Student, StudentConfig, pool_grid
from vla.pretrained.inference import count_parameters, freeze, frozen_inference
from vla.pretrained.weights import RANDOM, digest_tensors
from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS, PlainText


class Rgb2pcSettings(Settings):
    """Which student, and what is kept of it.

    `weights`: a run of `vla distill rgb2pc` (its newest checkpoint), one checkpoint, or "random", which takes the
    network from `student` (fields of `StudentConfig`) and `seed`. `projected`: also keep what the teacher was met in.
    `means`: also keep each input's own spatial mean, unfused, for heads that go on training the adapters.
    """

    weights: Annotated[str | None, WEIGHTS] = None
    student: Annotated[dict[str, Any], PlainText()] = {}
    seed: int = Field(0, ge=0)
    projected: bool = False
    means: bool = False


class Rgb2pc:
    """`fused` [D]; by choice `projected` [E] and, for each input, `mean_<name>` [C]."""

    settings_type: ClassVar[type[Settings]] = Rgb2pcSettings

    def __init__(self, settings: Rgb2pcSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self._trained_on: dict[str, Any] = {}
        if settings.weights is None:
            raise UsageError("backbone 'rgb2pc' has no weights of its own", fix="--weights RUN of `vla distill rgb2pc`")
        if settings.weights == RANDOM and not settings.student:
            example = '--set \'options.student={"inputs":{"grid":[14,14,112]},"teacher_dim":512}\''
            raise UsageError("random weights of no network: options.student is not given", fix=example)
        if settings.weights == RANDOM:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                student = Student(
                    StudentConfig.build(settings.student, where="options.student", under="options.student.")
                )
            self._random_weights = True
        elif settings.student:
            raise UsageError("options.student is for random weights", expected="the checkpoint's own network")
        else:
            trained = load_student(Path(settings.weights))
            student, self._random_weights = trained.model, trained.artefact.random_weights
            self._trained_on = {
                name: made for name, made in trained.artefact.inputs.items() if not _is_imported(made["backbone"])
            }
        freeze(student)
        self._student, self._config = student, student.config
        self._widths = [shape[2] for shape in self._config.inputs.values()]
        self._identity = {"weights_sha256": digest_tensors(student.state_dict())}

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        config, settings = self._config, self.settings
        features = {"fused": FeatureSpec((config.width,), ("channel",))}
        if settings.projected:
            features["projected"] = FeatureSpec((config.teacher_dim,), ("channel",))
        if settings.means:
            names = zip(config.names, self._widths, strict=True)
            features |= {f"mean_{name}": FeatureSpec((width,), ("channel",)) for name, width in names}
        network = config.model_dump(mode="json", exclude={"tokens", "dropout"})  # neither is there without training
        return BackboneSpec(
            name="rgb2pc",
            features=features,
            identity={
                "network": {"student": "rgb2pc", **network},
                **self._identity,
                "layer": "context mean",
                "preprocess": {"pool": "adaptive average", "grid": list(config.common)},
            },
            code_licence="MIT",
            weights_licence="none (random)" if settings.weights == RANDOM else "your own; its inputs' and teacher's",
            random_weights=self._random_weights,
            parameters=count_parameters(self._student),
            inputs=config.names,
            trained_on=self._trained_on,
        )

    def preprocess(self, view: Mapping[str, Any]) -> Tensor:
        """Turn {name: [y, x, C]} into tokens of the common grid side by side, and each input's mean: [K + 1, sum of C].

        Raises `DataError` for a grid of another shape than the student was made for.
        """
        rows = []
        for name, shape in self._config.inputs.items():
            grid = torch.as_tensor(view[name]).float()
            if grid.shape != shape:
                raise DataError(f"{name!r} is {list(grid.shape)} a view", expected=f"{list(shape)}, as in training")
            rows.append(torch.cat([pool_grid(grid, self._config.common), grid.mean(dim=(0, 1))[None]]))
        return torch.cat(rows, dim=1)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Turn [B, V, K + 1, sum of C] into {"fused": [B, V, D], ...} float32."""
        flat = images.detach().to(self.device).flatten(0, 1)
        parts = dict(zip(self._config.names, torch.split(flat, self._widths, dim=-1), strict=True))
        with frozen_inference(self.device):
            fused = self._student.fuse({name: part[:, :-1] for name, part in parts.items()})
            made = {"fused": fused}
            if self.settings.projected:
                made["projected"] = self._student.project(fused)
        if self.settings.means:
            made |= {f"mean_{name}": part[:, -1].contiguous() for name, part in parts.items()}
        return {name: values.reshape(*images.shape[:2], -1) for name, values in made.items()}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self._student.to(device)
        self.device = device


def _is_imported(backbone: Mapping[str, Any]) -> bool:
    # Of a cache that others made, the identity is the cache's digest: two caches of one network cannot be compared.
    return str(backbone.get("name", "")).startswith("import:")
