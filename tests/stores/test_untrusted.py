"""Claims of files: bounded depth of JSON, sizes that bytes account for."""

from __future__ import annotations

import json

import pytest

from vla.stores.documents import MAX_DEPTH, parse_json
from vla.stores.untrusted import FREE_BYTES, RATIO, is_backed


@pytest.mark.parametrize("depth", [1, MAX_DEPTH])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_json_of_a_bounded_depth_is_read(depth: int, pair: str) -> None:
    text = "[" * depth + "]" * depth if pair == "[]" else '{"a":' * (depth - 1) + "1" + "}" * (depth - 1)
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":[1],"b":'])
def test_json_that_is_nested_deeper_is_refused(depth: int, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    with pytest.raises(ValueError, match="within each other"):
        parse_json(opening * depth + "1" + closing * depth)


def test_a_number_of_5000_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="digits"):
        parse_json("[" + "9" * 5000 + "]")


def test_small_claims_are_free_and_large_ones_need_bytes() -> None:
    assert is_backed(FREE_BYTES, 0)
    assert not is_backed(FREE_BYTES + 1, 0)
    assert is_backed(RATIO * (1 << 30), 1 << 30)
    assert not is_backed(1 << 40, 9000)
