"""A trained head from its checkpoint, with everything that evaluating and serving it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from vla.heads.batch import HeadIO
from vla.heads.data import DataConfig
from vla.heads.model import HeadConfig, HeadModel
from vla.heads.registry import head_class
from vla.stores.errors import CheckpointError, UsageError
from vla.stores.manifest import FeatureInfo
from vla.stores.settings import Settings
from vla.stores.user_given import PlainText, resolve, user_given
from vla.training.checkpoint import load_checkpoint


class StoreRecord(Settings):
    """What a checkpoint keeps of a store that its head was trained on: enough to rebuild the backbone and compare.

    `recipe` is {"name", "weights", "options"} of the backbone; `fingerprint` the store's; `scales` the
    live grid of int8 features, [C] each (training/storage.py). `fps`: time steps a second. `picture_sizes`: (height,
    width) of each camera's pictures. `content`: `Store.content`, which a resumed run compares. Checkpoints and stores
    of earlier versions lack these three.
    """

    path: str
    sha256: str
    fingerprint: dict[str, Any]
    recipe: dict[str, Any]
    features: dict[str, FeatureInfo]
    cameras: tuple[str, ...]
    random_weights: bool
    scales: dict[str, tuple[float, ...]] = {}
    fps: float | None = None
    picture_sizes: dict[str, tuple[int, int]] = {}
    content: str = ""


class Artefact(Settings):
    """What a checkpoint keeps beside the weights: the resolved configuration and the stores' fingerprints.

    `trained_tasks`: of `HeadModel.instructions` those that an episode of the training split has; None where a
    checkpoint was made before they were kept. `frozen`: digests of the networks that the head runs without training
    them, whose weights stay where they were.
    `init_from`: the run that it started from. `online`: how pictures were shown to the backbones in the loop; empty
    where features came from the stores. `action_mean` [A]: the mean of the training actions, the baseline of every
    evaluation; () of checkpoints made before it was kept. `state_range` [S]: the least and greatest value of each state
    column in training, likewise.
    """

    head: str
    config: dict[str, Any]
    data: DataConfig
    io: HeadIO
    state: tuple[str, ...]
    stores: tuple[StoreRecord, ...]
    training_episodes: int
    trained_tasks: tuple[str, ...] | None = None
    frozen: dict[str, str] = {}
    init_from: str | None = None
    online: dict[str, Any] = {}
    action_mean: tuple[float, ...] = ()
    state_range: tuple[tuple[float, float], ...] = ()
    vla_version: str


@dataclass(frozen=True)
class TrainedHead:
    """A head in evaluation mode and what it was trained with. `step` is the checkpoint's."""

    model: HeadModel
    artefact: Artefact
    step: int
    folder: Path

    @property
    def config(self) -> HeadConfig:
        """The head's configuration."""
        return self.model.config

    @property
    def instructions(self) -> tuple[str, ...]:
        """What the head can be told to do. `HeadModel.instructions` has those of held-out episodes too, to evaluate on:
        a row of an embedding that no step has trained."""
        trained = self.artefact.trained_tasks
        return self.model.instructions if trained is None else trained


def build_head(name: str, values: dict[str, Any], io: HeadIO) -> HeadModel:
    """Build an untrained head. Raises `UsageError` for unknown names, keys and values."""
    cls = head_class(name)
    return cls(cls.Config.build(values, where=f"head {name!r}"), io)


class HeadSettings(Settings):
    """What `--set` gives a trained head. `model`: see `load_head`."""

    model: Annotated[dict[str, Any], PlainText()] = {}


def load_head(path: Path | str, *, which: str = "newest", settings: Mapping[str, Any] | None = None) -> TrainedHead:
    """Return the head of a run folder or of one checkpoint.

    `settings`: the user's values of the head's configuration. Those that choose files or addresses, such as the folder
    of a language model that the head runs frozen, come from here and never from the checkpoint (stores/user_given.py);
    the others go to `HeadModel.adjust`. Raises `UsageError` where such a value is lacking and for settings that
    training has decided, `CheckpointError` where weights and configuration do not fit, or where the frozen networks are
    not those of the training. No memory is allocated before the configuration fits the weights.
    """
    found = load_checkpoint(Path(path), which=which)
    artefact = Artefact.build(found.artefact, where=f"{found.folder / 'artefact.json'}")
    artefact, adjusted = _with_user_given(artefact, settings or {}, found.folder)
    wanted = described_head(artefact, found.folder).state_dict()
    wrong = sorted(wanted.keys() ^ found.weights.keys())
    wrong += [name for name in wanted.keys() & found.weights.keys() if wanted[name].shape != found.weights[name].shape]
    if wrong:
        raise CheckpointError(f"{found.folder} does not fit its head: {', '.join(wrong[:3])}")
    model = build_head(artefact.head, artefact.config, artefact.io)
    model.load_state_dict(found.weights)
    for name, frozen in model.frozen.items():
        if frozen.digest != artefact.frozen.get(name):
            raise CheckpointError(
                f"the weights of {name} are not those that {found.folder} was trained with",
                expected=f"SHA-256 {artefact.frozen.get(name)}, found {frozen.digest}",
                fix="the same weights folder",
            )
    model.adjust(adjusted)
    return TrainedHead(model.eval(), artefact, found.step, found.folder)


def _with_user_given(artefact: Artefact, settings: Mapping[str, Any], folder: Path) -> tuple[Artefact, dict[str, Any]]:
    """Return the artefact with the user's choices in its configuration, and the settings that choose nothing."""
    try:
        kind = head_class(artefact.head).Config
    except UsageError as error:  # nobody typed the head's name
        raise CheckpointError(f"{folder / 'artefact.json'}: {error}") from None
    choices = {name.partition(".")[0] for name in user_given(kind)}
    given = {name: value for name, value in settings.items() if name in choices}
    config = resolve(kind, artefact.config, given, artefact=str(folder), prefix="model.")
    rest = {name: value for name, value in settings.items() if name not in choices}
    return artefact.model_copy(update={"config": config}), rest


def described_head(artefact: Artefact, folder: Path) -> HeadModel:
    """Return the head that an artefact describes, its weights without memory: a checkpoint may claim terabytes.

    Raises `CheckpointError` naming `folder` where it describes none.
    """
    try:
        with torch.device("meta"):
            return build_head(artefact.head, artefact.config, artefact.io)
    except UsageError as error:  # nobody typed it
        raise CheckpointError(f"{folder / 'artefact.json'}: {error}") from None
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder / 'artefact.json'} describes no head: {reason}") from None
