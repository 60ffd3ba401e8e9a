"""The backbone of a store, built again for live use: `vla rollout` and `vla train-head --online`.

The recipe comes from a store or a checkpoint, and so perhaps from a stranger. Nothing of it chooses code, files or
addresses: those options come from the user (stores/user_given.py), and the identity of the built backbone is compared
with the recorded one afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.registry import load_backbone_class, make_backbone
from vla.featurize.chain import Chain
from vla.stores.errors import DataError, UsageError
from vla.stores.fingerprint import require_equal
from vla.stores.manifest import FeatureInfo
from vla.stores.settings import Settings, nearest
from vla.stores.user_given import PlainText, resolve

BackboneSettings = Annotated[dict[str, dict[str, Any]], PlainText()]
"""{name of a backbone, or of a feature that it makes: {option: the user's value}}, as `--set backbones.NAME.OPTION`."""


_Kind = TypeVar("_Kind", bound=Settings)


class _Input(Settings):
    """How a feature that another backbone reads was made. `scales`: the coarsest int8 grid [C]; None: not int8."""

    backbone: Recipe
    scales: tuple[float, ...] | None


class _InputIdentity(Settings):
    """What the fingerprint says of such a feature; see `Chain.spec`."""

    backbone: dict[str, Any]
    context: int
    feature: FeatureInfo


class _Identity(Settings):
    """Of a backbone's fingerprint, what rebuilding needs."""

    model_config = ConfigDict(extra="ignore")

    inputs: dict[str, _InputIdentity] = {}


class Recipe(Settings):
    """What a store's provenance says about its backbone; keys for other purposes are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: str
    weights: str | None = None
    options: dict[str, Any] = {}
    inputs: dict[str, _Input] = {}
    imported: bool = False
    root: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The backbone's recorded settings, weights included."""
        return self.options if self.weights is None else {**self.options, "weights": self.weights}

    def names(self, features: Iterable[str] = ()) -> set[str]:
        """Return the names that `BackboneSettings` may use for this backbone and for those that it reads."""
        return {self.name, *features}.union(*(made.backbone.names([name]) for name, made in self.inputs.items()))


def _read(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """Validate what an artefact records. Raises `DataError` for another shape."""
    try:
        return kind.build(values, where="the recorded backbone")
    except UsageError as error:  # an artefact's mistake, not the user's
        raise DataError(str(error)) from None


def rebuild_backbone(
    recipe: Mapping[str, Any],
    identity: Mapping[str, Any],
    given: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    features: Sequence[str] = (),
) -> Backbone:
    """Build the backbone that made a store.

    `recipe` is the store's provenance {"name", "weights", "options"}, `identity` its fingerprint's `backbone`, `given`
    the user's `BackboneSettings`, `features` the names of the store's features. Raises `UsageError` where the recipe
    has a value that only the user may give, `DataError` for a recipe of another shape, and `FingerprintError` naming
    the field where what is on this machine (weights, package, settings) would make other features than the cached ones.
    """
    return _rebuild(_read(Recipe, recipe), identity, given or {}, features)


def require_known(given: Mapping[str, Any], recipes: Iterable[tuple[Mapping[str, Any], Iterable[str]]]) -> None:
    """Raise `UsageError` for settings of a backbone that is none of (recipe, features), such as a misspelt one."""
    known = set[str]().union(*(_read(Recipe, recipe).names(features) for recipe, features in recipes))
    unknown = sorted(given.keys() - known)
    if unknown:
        hint = nearest(unknown[0], known)
        raise UsageError(
            f"backbones.{unknown[0]}: no such backbone{hint}", expected=f"one of {', '.join(sorted(known))}"
        )


def _rebuild(
    recipe: Recipe, identity: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]], features: Sequence[str]
) -> Backbone:
    if recipe.imported:
        raise UsageError(
            f"the features were imported from {recipe.root} ({recipe.name}): their backbone is not known here",
            expected="a store of `vla featurize` for a live policy; `vla evaluate` works",
        )
    chosen = dict(given.get(recipe.name, {}))
    for feature in features:  # two backbones of one name: the feature tells which is meant
        chosen |= given.get(feature, {})
    options = resolve(
        load_backbone_class(recipe.name).settings_type,
        recipe.settings,
        chosen,
        artefact=f"the recorded backbone {recipe.name!r}",
        prefix=f"backbones.{recipe.name}.",
    )
    backbone = make_backbone(recipe.name, **options)
    if recipe.inputs:
        inputs = _read(_Identity, identity).inputs
        if inputs.keys() != recipe.inputs.keys():
            found = f"the fingerprint of {recipe.name!r} has the inputs {', '.join(inputs) or 'none'}"
            raise DataError(found, expected=f"{', '.join(recipe.inputs)}, as its recipe")
        made_by = {
            name: _rebuild(made.backbone, inputs[name].backbone, given, [name]) for name, made in recipe.inputs.items()
        }
        scales = {name: made.scales for name, made in recipe.inputs.items()}
        backbone = Chain(backbone, made_by, identity["inputs"], scales)
    spec = backbone.spec()
    fix = "the weights and the package versions that the store was made with"
    require_equal({"name": spec.name, **spec.identity}, identity, what=f"the live backbone {spec.name!r}", fix=fix)
    return backbone
