"""Options as users type them, checked against the type hints of the class that takes them.

Sources and caches declare their options as keywords with types and defaults; nothing is declared a second time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import BeforeValidator, create_model

from vla.stores.errors import UsageError
from vla.stores.settings import Settings, nearest

NAMES = Sequence[str]


def keywords(target: Any) -> list[str]:
    """Return the keywords of a class, which are its options."""
    return [key for key, p in inspect.signature(target).parameters.items() if p.kind is p.KEYWORD_ONLY]


def checked_options(target: Any, options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return `options` as the class `target` declares them: "False" is false, and one name alone is a list of one.

    `what` is told of, such as "folders source". Raises `UsageError` for an option that the class has not, or a value
    of another type.
    """
    known = keywords(target)
    for key in options:
        if key not in known:
            hint = nearest(key, known)
            raise UsageError(f"a {what} has no option {key!r}{hint}", expected=f"one of {', '.join(known)}")
    hints = get_type_hints(target.__init__, include_extras=True)
    types: Any = {key: (_as_typed(hints[key]), ...) for key in options}
    taken = create_model(target.__name__, __base__=Settings, **types).build(options, where=f"the {what}")
    return {key: getattr(taken, key) for key in options}


def options_model(target: Any) -> type[Settings]:
    """Return the options of a class as a settings class: names, types with their marks, and defaults."""
    hints = get_type_hints(target.__init__, include_extras=True)
    parameters = inspect.signature(target).parameters
    fields: Any = {key: (hints[key], parameters[key].default) for key in keywords(target)}
    return create_model(target.__name__, __base__=Settings, **fields)


def _as_typed(hint: Any) -> Any:
    """Return a type hint that takes what a user may type for it."""
    if NAMES in (hint, *get_args(hint)):
        return Annotated[hint, BeforeValidator(_one_name)]
    return hint if bool in (hint, *get_args(hint)) else Annotated[hint, BeforeValidator(_no_truth)]


def _one_name(value: Any) -> Any:
    """`cameras=front` means the camera "front", not five cameras of one letter."""
    if value is not None and not isinstance(value, Sequence):
        raise ValueError('Input should be a list of names, such as ["front","wrist"]')
    return [value] if isinstance(value, str) else value


def _no_truth(value: Any) -> Any:
    """Refuse `fps=true`, which pydantic would take for 1."""
    if isinstance(value, bool):
        raise ValueError("Input should not be true or false")
    return value
