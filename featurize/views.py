"""What a backbone is given of each frame: pictures alone, or pictures with instruction, depth, cached features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vla.featurize.backbones.base import BackboneSpec
from vla.featurize.image import Image
from vla.featurize.sources.base import NUMBERS, Source, SourceIndex, ViewSource
from vla.stores.errors import UsageError
from vla.stores.fingerprint import require_equal

IMAGE, INSTRUCTION = "image", "instruction"


def with_inputs(spec: BackboneSpec, source: Source, index: SourceIndex) -> tuple[BackboneSpec, dict[str, Any]]:
    """Return `spec` with what its inputs depend on, and how a live policy makes them: {name: recipe}.

    Raises `UsageError` naming the inputs of a backbone that a source does not have, `FingerprintError` where they were
    made with something else than those that the backbone was trained on.
    """
    has = ((IMAGE,) if index.pictures else ()) + (INSTRUCTION, *index.extras)
    missing = [name for name in spec.inputs if name not in has]
    if missing:
        raise UsageError(
            f"backbone {spec.name!r} needs {', '.join(missing)} of each frame, and {index.root} has {', '.join(has)}",
            expected="a source that has them",
            fix="" if index.cameras else NUMBERS,
        )
    if not index.cameras:
        raise UsageError(f"{index.root} was opened without cameras", expected="one or more", fix=NUMBERS)
    extras = [name for name in spec.inputs if name not in (IMAGE, INSTRUCTION)]
    if not extras or not isinstance(source, ViewSource):
        return spec, {}
    record = source.describe(extras)
    for name, wanted in spec.trained_on.items():
        found = {key: record.identity.get(name, {}).get(key) for key in wanted}
        fix = "the features that it was trained on"
        require_equal(found, wanted, what=f"input {name!r} of backbone {spec.name!r}", fix=fix)
    if record.identity:
        random = spec.random_weights or record.random_weights
        spec = replace(spec, identity={**spec.identity, "inputs": record.identity}, random_weights=random)
    return spec, dict(record.recipes)


def live_view(spec: BackboneSpec, image: Image, task: str) -> Any:
    """Return what `Backbone.preprocess` takes of a picture seen live. Raises `UsageError` where more is needed."""
    if spec.inputs == (IMAGE,):
        return image
    known = {IMAGE: image, INSTRUCTION: task}
    missing = [name for name in spec.inputs if name not in known]
    if missing:
        raise UsageError(
            f"backbone {spec.name!r} needs {', '.join(missing)} of each frame, and a live policy has only pictures",
            expected="a backbone that makes its features from pictures",
        )
    return {name: known[name] for name in spec.inputs}


def read_views(
    source: Source, spec: BackboneSpec, episode: int, task: str, start: int, stop: int
) -> Iterator[tuple[Any, ...]]:
    """Yield what `Backbone.preprocess` takes, for each of the V views of frames `start..stop-1` of an episode."""
    if spec.inputs == (IMAGE,):
        yield from source.frames(episode, start, stop)
        return
    of_source = tuple(name for name in spec.inputs if name != INSTRUCTION)
    said = {INSTRUCTION: task} if INSTRUCTION in spec.inputs else {}
    if of_source == (IMAGE,):
        for images in source.frames(episode, start, stop):
            yield tuple({IMAGE: image, **said} for image in images)
    elif of_source:
        if not isinstance(source, ViewSource):
            raise UsageError(f"the source has no {', '.join(of_source)}")
        for views in source.views(episode, start, stop, of_source):
            yield tuple({**view, **said} for view in views)
    else:
        cameras = len(source.index().cameras)
        for _ in range(start, stop):
            yield (said,) * cameras
