"""FAST: actions to tokens and back, with an error that the quantisation bounds, and never an empty answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.trainers import BpeTrainer

from vla.heads.data import DataConfig, open_data
from vla.heads.fast import FastTokenizer, dct, inverse_dct, read_mapping
from vla.heads.fast_speech import FastSpeaker
from vla.heads.fit_fast import FitFastConfig, fit_fast, fit_normaliser
from vla.stores.errors import DataError, UsageError

H, A = 8, 3


def chunks(count: int = 200, seed: int = 0) -> NDArray[np.float64]:
    """Smooth chunks [count, H, A] in -1..1, as demonstrations are."""
    rng = np.random.default_rng(seed)
    steps = np.linspace(0, 1, H)[:, None]
    return np.clip(rng.uniform(-1, 1, (count, 1, A)) + steps * rng.normal(0, 0.5, (count, 1, A)), -1, 1)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.fit(chunks(), vocab_size=256)


def published(folder: Path, data: NDArray[np.float64], **settings: Any) -> Path:
    """Make a folder as physical-intelligence/fast is: byte-level BPE over characters, and no horizon said.

    Its tokens are merged from the bytes of characters, some of which have two.
    """
    quantised = np.rint(dct(data) * 10).astype(int)
    low = int(quantised.min()) - 200  # the published range begins at -354: most characters have two bytes
    bpe = ByteLevelBPETokenizer()
    alphabet = [chr(i) for i in range(int(quantised.max()) - low + 1)]
    trainer = BpeTrainer(vocab_size=700, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    bpe._tokenizer.train_from_iterator(("".join(map(chr, c.flatten() - low)) for c in quantised), trainer=trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    values = {"scale": 10, "min_token": low, "vocab_size": 700, "time_horizon": None, "action_dim": None, **settings}
    (folder / "processor_config.json").write_text(json.dumps(values))
    (folder / "processing_action_tokenizer.py").write_text("raise RuntimeError('code of a folder never runs')")
    return folder


def test_the_transform_is_the_orthonormal_dct_of_type_two() -> None:
    """Against the definition, summed step by step, and its inverse."""
    x = chunks(2)
    for k in range(H):
        scale = math.sqrt((1 if k == 0 else 2) / H)
        wanted = sum(x[:, n] * math.cos(math.pi * (2 * n + 1) * k / (2 * H)) for n in range(H)) * scale
        np.testing.assert_allclose(dct(x)[:, k], wanted, atol=1e-12)
    np.testing.assert_allclose(inverse_dct(dct(x)), x, atol=1e-12)


@given(arrays.arrays(np.int64, (H, A), elements=st.integers(0, 40)))
def test_quantised_coefficients_come_back_exactly(offsets: NDArray[np.int64]) -> None:
    fast = _shared()
    assert fast.max_token is not None
    coefficients = fast.min_token + offsets % (fast.max_token - fast.min_token + 1)
    assert (fast.decode_coefficients(fast.encode_coefficients(coefficients)) == coefficients).all()


@given(arrays.arrays(np.float64, (1, H, A), elements=st.floats(-1, 1)))
def test_the_error_of_a_round_trip_is_bounded_by_the_quantisation(chunk: NDArray[np.float64]) -> None:
    """Rounding moves each coefficient by 1 / (2 scale) at most; the DCT keeps lengths, so a step by sqrt(H) of that."""
    fast = _shared()
    assert fast.max_token is not None
    rounded = np.rint(dct(chunk) * fast.scale)
    if rounded.min() < fast.min_token or rounded.max() > fast.max_token:
        return  # saturates: another test
    back = fast.decode(fast.encode(chunk)[0])
    assert np.abs(back - chunk[0]).max() <= math.sqrt(H) / (2 * fast.scale) + 1e-6


_SHARED: list[FastTokenizer] = []


def _shared() -> FastTokenizer:
    """One fit for all examples: hypothesis takes no fixtures of function scope."""
    if not _SHARED:
        _SHARED.append(FastTokenizer.fit(chunks(), vocab_size=256))
    return _SHARED[0]


def test_coefficients_outside_of_the_fitted_range_saturate(fast: FastTokenizer) -> None:
    far = np.full((1, H, A), 50.0)
    assert fast.coefficients(far).max() == fast.max_token
    assert fast.decode_coefficients(fast.encode(far)[0]).max() == fast.max_token


def test_encoding_shortens_what_it_was_fitted_to(fast: FastTokenizer) -> None:
    mean = np.mean([len(ids) for ids in fast.encode(chunks())])
    assert mean < 0.6 * H * A


def test_a_saved_folder_gives_the_same_ids(fast: FastTokenizer, tmp_path: Path) -> None:
    fast.save(tmp_path / "fast")
    again = FastTokenizer.load(tmp_path / "fast", H, A)
    assert again.encode(chunks(20, 1)) == fast.encode(chunks(20, 1))
    assert (again.scale, again.min_token, again.max_token) == (fast.scale, fast.min_token, fast.max_token)


def test_a_folder_of_the_published_layout_round_trips(tmp_path: Path) -> None:
    """The ids are those that the tokenizer itself gives for the text, and decoding agrees with its own decoder."""
    data = chunks()
    fast = FastTokenizer.load(published(tmp_path / "fast", data), H, A)
    bpe = Tokenizer.from_file(str(tmp_path / "fast" / "tokenizer.json"))
    for chunk in data[:20]:
        coefficients = np.rint(dct(chunk) * 10).astype(int)
        text = "".join(chr(c - fast.min_token) for c in coefficients.flatten())
        ids = fast.encode(chunk[None])[0]
        assert ids == bpe.encode(text).ids
        assert [ord(c) + fast.min_token for c in bpe.decode(ids)] == fast.decode_coefficients(ids).flatten().tolist()
        assert (fast.decode_coefficients(ids) == coefficients).all()


def test_gap_13_malformed_ids_are_an_error_with_its_reason_never_an_empty_answer(fast: FastTokenizer) -> None:
    ids = fast.encode(chunks(1))[0]
    for wrong, says in (
        ([], "FAST ids of 0 coefficients; expected 8 x 3"),
        (ids[:-1], "coefficients; expected 8 x 3"),
        ([*ids, ids[0]], "coefficients; expected 8 x 3"),
        ([fast.size], f"{fast.size} is no FAST id"),
        ([-1, *ids], "-1 is no FAST id"),
    ):
        with pytest.raises(DataError, match=says):
            fast.decode(wrong)


def test_ids_that_break_a_character_are_an_error(tmp_path: Path) -> None:
    fast = FastTokenizer.load(published(tmp_path / "fast", chunks()), H, A)
    opening = next(i for i, (lead, count, left) in enumerate(fast.spans.tolist()) if (lead, count, left) == (0, 1, 1))
    with pytest.raises(DataError, match="break a coefficient at byte 0"):
        fast.decode([opening, opening])


@pytest.mark.parametrize("layout", ["ours", "published"])
def test_what_is_said_under_the_constraint_always_decodes(layout: str, fast: FastTokenizer, tmp_path: Path) -> None:
    """From random scores, in which almost no free choice would be a chunk."""
    if layout == "published":
        fast = FastTokenizer.load(published(tmp_path / "fast", chunks()), H, A)
    numbers, generator = torch.arange(fast.size) + 5, torch.Generator().manual_seed(0)
    speaker = FastSpeaker(fast, numbers, 1, 4)
    said: list[list[int]] = [[] for _ in range(4)]
    for _ in range(speaker.limit):
        chosen = speaker.choose(torch.randn(4, fast.size + 5, generator=generator)).tolist()
        for row, number in zip(said, chosen, strict=True):
            row.append(number)
        if set(chosen) == {1}:
            break
    for ids in speaker.back([[n for n in row if n != 1] for row in said]):
        assert fast.decode(ids).shape == (H, A)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"scale": None}, DataError, "scale is None"),
        ({"scale": 0}, DataError, "above 0"),
        ({"min_token": 1.5}, DataError, "min_token is 1.5"),
        ({"time_horizon": 50}, UsageError, "is for time_horizon 50; expected 8"),
        ({"action_dim": 7}, UsageError, "is for action_dim 7; expected 3"),
    ],
)
def test_a_folder_that_does_not_hold_is_refused(
    settings: dict[str, Any], error: type[Exception], says: str, fast: FastTokenizer, tmp_path: Path
) -> None:
    fast.save(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(error, match=says):
        FastTokenizer.load(tmp_path, H, A)


@pytest.mark.parametrize(("name", "text"), [("processor_config.json", "["), ("tokenizer.json", "{}")])
def test_a_damaged_folder_is_refused_by_its_file(name: str, text: str, fast: FastTokenizer, tmp_path: Path) -> None:
    fast.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        FastTokenizer.load(tmp_path, H, A)


def test_no_folder_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vla fit-fast"):
        FastTokenizer.load(tmp_path, H, A)


def test_actions_that_are_no_chunk_are_refused(fast: FastTokenizer) -> None:
    with pytest.raises(DataError, match=r"expected \[8, 3\]"):
        fast.encode(np.zeros((1, 7, 3)))
    with pytest.raises(DataError, match="not finite"):
        fast.encode(np.full((1, H, A), np.nan))


def test_a_vocabulary_smaller_than_the_range_of_coefficients_is_refused() -> None:
    with pytest.raises(UsageError, match="a vocabulary of 8 for coefficients"):
        FastTokenizer.fit(chunks(), vocab_size=8)


@pytest.mark.parametrize("form", ["list", "object"])
def test_a_mapping_of_a_domain_transfer_reads_from_json(form: str, tmp_path: Path) -> None:
    ids = list(range(257_152, 257_152 + 16))
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(ids if form == "list" else {str(i): n for i, n in reversed(list(enumerate(ids)))}))
    assert read_mapping(path, 16).tolist() == ids


@pytest.mark.parametrize("found", [[1, 1, 2], [1, 2], {"0": 4, "1": 5, "3": 6}, "x", [1, 2, -3], [1, 2, None]])
def test_a_mapping_that_is_none_is_refused(found: Any, tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="no mapping of the 3 FAST ids"):
        read_mapping(path, 3)


def test_a_folder_knows_the_statistics_that_it_was_fitted_behind(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    """Of episodes whose second dimension is padding they are the real rows' alone, as the head's are."""
    store = make_store(tmp_path / "store")
    data = open_data(DataConfig(stores=(str(store.root),), validation=0.0))
    config = FitFastConfig(data=data.config, horizon=4, vocab_size=128)
    fit_fast(config, tmp_path / "fast")
    fast = FastTokenizer.load(tmp_path / "fast", 4, 2)
    assert fast.statistics is not None
    centre, scale = map(np.array, fast.statistics)
    np.testing.assert_allclose(centre, [9.5, -9.5])
    fast.require_statistics(centre, scale, tmp_path)
    with pytest.raises(UsageError, match=r"scale 9\.31 in dimension 1.*expected 4"):
        fast.require_statistics(centre, np.array([scale[0], 4]), tmp_path)
    real = np.ones((20, 2), bool)
    real[:10, 1] = False
    padded = SimpleNamespace(
        io=data.io, training=data.training, actions=data.actions, action_dims=lambda episodes: real, config=data.config
    )
    centre = fit_normaliser(config, padded).centre  # type: ignore[arg-type]
    np.testing.assert_allclose(centre, [9.5, -14.5])


def test_coefficients_that_no_id_says_are_counted(fast: FastTokenizer) -> None:
    H, A = fast.horizon, fast.action_dim
    assert not fast.saturated(np.zeros((1, H, A))).any()
    assert fast.saturated(np.full((1, H, A), 1e6))[0, 0].all()


def test_fitting_reads_whole_chunks_of_the_training_split_alone(make_store: Callable[..., Any], tmp_path: Path) -> None:
    """Of episodes of 5, 9 and 6 steps: with a horizon of 4, a training split of all has 2 + 6 + 3 chunks."""
    store = make_store(tmp_path / "store")
    data = DataConfig(stores=(str(store.root),), validation=0.0)
    report = fit_fast(FitFastConfig(data=data, horizon=4, vocab_size=128), tmp_path / "fast")
    assert report.chunks == 11
    assert report.max_error <= math.sqrt(4) / 20 * 10  # normalised by half of a range of 19 rows
    assert FastTokenizer.load(tmp_path / "fast", 4, 2).action_norm == "quantile"
    with pytest.raises(UsageError, match="exists"):
        fit_fast(FitFastConfig(data=data, horizon=4), tmp_path / "fast")
    fit_fast(FitFastConfig(data=data, horizon=4, vocab_size=128), tmp_path / "fast", overwrite=True)
    with pytest.raises(UsageError, match="no FAST folder"):
        fit_fast(FitFastConfig(data=data, horizon=4), store.root, overwrite=True)
    with pytest.raises(DataError, match="has 10 steps"):
        fit_fast(FitFastConfig(data=data, horizon=10), tmp_path / "other")
