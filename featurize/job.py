"""One `vla featurize`: from a configuration to a committed store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from vla.featurize.augment import NO_COPIES, AugmentConfig
from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.registry import load_backbone_class, make_backbone
from vla.featurize.batch_size import ON_CPU, find_batch_size
from vla.featurize.plan import Plan, StoreOptions, make_plan
from vla.featurize.room import require_room
from vla.featurize.run import Progress, RunReport, featurize
from vla.featurize.skipped import MAX_SKIPPED, require_few_skipped
from vla.featurize.sources.base import Source
from vla.featurize.sources.instructions import Instructions
from vla.featurize.sources.registry import common_options, open_source, refuse_overwriting_source, shipped
from vla.featurize.views import with_inputs
from vla.stores.errors import UsageError
from vla.stores.metadata import read_manifest
from vla.stores.remote.options import RemoteOptions, is_url
from vla.stores.remote.publish import open_remote_writer
from vla.stores.settings import Settings, begun_in
from vla.stores.user_given import require_given
from vla.stores.writer import StoreWriter, open_writer
from vla.training.torch_device import choose_device


class FeaturizeConfig(Settings):
    """Everything that `vla featurize` can be told. Resolved, it is kept in the store's provenance.

    `source` is a folder or `synthetic:…`, left out the data set that ships; `map` {our name: their column};
    `backbone` a name of `vla backbones`; `weights` a folder, a hub id or "random" (None: the backbone's own);
    `options` and `source_options` go to the backbone and the source. `pad_actions` takes tasks of different action
    dimensions into one store, of sources that know the names of their components: padded with 0, and the column
    `action_dims` says what is real. `augment` caches augmented copies beside the plain features. `batch_size` counts
    time steps, each augmented copy as one more; "auto" tries what an accelerator holds (another batch may round the
    last bit of a feature differently there). `threads` 0 leaves torch's own choice. `remote`: how a store on an object
    store is reached. `max_skipped`: largest share of the episodes that `skip_bad` may leave out.
    """

    source: str = Field(default_factory=lambda: str(shipped()))
    backbone: str = Field(json_schema_extra={"flag": "--backbone NAME; `vla backbones` lists them"})
    weights: str | None = None
    options: dict[str, Any] = {}
    map: dict[str, str] = {}
    source_options: dict[str, Any] = {}
    skip_bad: bool = False
    max_skipped: float = Field(MAX_SKIPPED, ge=0, le=1)
    pad_actions: bool = False
    store: StoreOptions = StoreOptions()
    augment: AugmentConfig = NO_COPIES
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = ON_CPU
    device: str = "auto"
    threads: int = Field(0, ge=0)
    remote: RemoteOptions = RemoteOptions()

    @classmethod
    def from_saved(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """See `Settings.from_saved`."""
        if "zarr_format" not in values:
            return values
        settings = read_manifest(file.parent).provenance.get(SETTINGS)
        if not isinstance(settings, dict):
            found = f"{file} has no {SETTINGS!r}: an earlier version, or another command, wrote the store"
            raise UsageError(found, fix="the flags that it began with")
        return settings

    @classmethod
    def require_given(cls, saved: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> None:
        """See `Settings.require_given`."""
        backbone = saved.get("backbone")
        if not isinstance(backbone, str) or given.get("backbone", backbone) != backbone:
            return
        kind, artefact = load_backbone_class(backbone).settings_type, str(file)
        require_given(kind, saved.get("options") or {}, given.get("options", {}), artefact=artefact, prefix="options.")
        weights = {} if saved.get("weights") is None else {"weights": saved["weights"]}
        require_given(kind, weights, given, artefact=artefact, prefix="")


SETTINGS = "settings"
"""Of a store's provenance: the configuration that replays or resumes the run, but for what is this machine's."""
OWN = {"device", "threads", "remote"}
"""Settings that are the machine's, not the store's."""


def begun_store(out: str, name: str | None, *, required: bool) -> Path | None:
    """Return the store to resume where OUT, or OUT/NAME, is one already.

    Returns None where a backbone has yet to be named, unless a store is `required`: `UsageError`.
    """
    if is_url(out):
        return None
    file = begun_in(Path(out, name or ""), "zarr.json", required=required)
    return None if file is None else file.parent


@dataclass(frozen=True)
class Job:
    """A planned run: nothing is written yet."""

    config: FeaturizeConfig
    source: Source
    backbone: Backbone
    plan: Plan


def prepare(config: FeaturizeConfig) -> Job:
    """Index the source, load the backbone and lay out the store. Raises what they raise."""
    common = common_options(map=config.map, skip_bad=config.skip_bad, pad_actions=config.pad_actions)
    source = open_source(config.source, **{**common, **config.source_options})
    if "weights" in config.options:
        raise UsageError("options.weights", expected="--weights, which is kept in the store", fix="--weights PLACE")
    backbone = make_backbone(config.backbone, weights=config.weights, **config.options)
    if backbone.spec().per == "instruction":
        source = Instructions(source)
    index, digest = source.index(), source.digest()
    spec, inputs = with_inputs(backbone.spec(), source, index)
    recipe: dict[str, Any] = {"name": config.backbone, "weights": config.weights, "options": config.options}
    if inputs:
        recipe["inputs"] = inputs
    recipe["source"] = {"given": config.source, "map": config.map, "options": config.source_options}
    plan = make_plan(index, digest, spec, recipe, config.store, config.augment)
    provenance = plan.manifest.provenance | {SETTINGS: config.model_dump(mode="json", exclude=OWN)}
    plan = replace(plan, manifest=plan.manifest.model_copy(update={"provenance": provenance}))
    if config.skip_bad:
        require_few_skipped(plan, {}, config.max_skipped)
    return Job(config, source, backbone, plan)


def run(
    job: Job,
    root: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept: bool = False,
    progress: Progress = lambda done, total: None,
) -> RunReport:
    """Make the store at `root`, a folder or a URL.

    Raises `UsageError` where `root` overlaps with what is read, what `require_room` does where the disk is too
    small (not with `accept`), and what `featurize` raises.
    """
    refuse_overwriting_source(root, job.config.source, job.source)
    if not is_url(root):
        root = Path(root)
        refuse_shadowing(root)
        require_room(job.plan, root, overwrite=overwrite, accept=accept)
    device = take_device(job)
    plan = (job.plan.manifest, job.plan.episodes)
    opened: AbstractContextManager[StoreWriter]
    if isinstance(root, str):
        opened = open_remote_writer(root, *plan, job.config.remote, resume=resume, overwrite=overwrite)
    else:
        opened = open_writer(root, *plan, resume=resume, overwrite=overwrite)
    with opened as writer:
        return make_units(job, writer, device, batch_size_on(job, device), progress=progress)


def take_device(job: Job) -> torch.device:
    """Put the backbone where the run is to compute, with the threads that it is to have; return the device."""
    if job.config.threads:
        torch.set_num_threads(job.config.threads)
    device = choose_device(job.config.device)
    job.backbone.to(device)
    return device


def batch_size_on(job: Job, device: torch.device) -> int:
    """Return how many time steps are encoded at once; "auto" is tried."""
    size = job.config.batch_size
    return find_batch_size(job.backbone, job.source, job.source.index(), device) if size == "auto" else size


def make_units(
    job: Job,
    writer: StoreWriter,
    device: torch.device,
    batch_size: int,
    *,
    units: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> RunReport:
    """Compute and commit units of a planned store, on the device that has the backbone. See `featurize`."""
    return featurize(
        job.source,
        job.backbone,
        writer,
        job.plan.episodes,
        batch_size=batch_size,
        skip_bad=job.config.skip_bad,
        pin=device.type == "cuda",
        augment=job.config.augment,
        units=units,
        progress=progress,
    )


def refuse_shadowing(root: Path) -> None:
    """Refuse a store named like a module beside it: `stores/join` would hide `stores/join.py` from imports."""
    if root.with_suffix(".py").exists() or (root / "__init__.py").exists():
        raise UsageError(f"{root} would shadow a Python module of that name", fix="another --name")
