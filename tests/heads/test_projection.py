"""The whitening projection against a singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from vla.heads.projection import WhiteningProjection
from vla.stores.errors import CheckpointError, DataError


def fitted(frames: torch.Tensor, channels: int, components: int) -> WhiteningProjection:
    projection = WhiteningProjection(frames.shape[1], frames.shape[2], channels, components)
    projection.fit([frames[:30], frames[30:]])
    return projection


def test_codes_of_the_fitted_frames_are_uncorrelated_with_unit_variance() -> None:
    frames = torch.randn(80, 6, 5) * torch.linspace(0.5, 3, 5)
    codes = fitted(frames, 5, 8)(frames)
    torch.testing.assert_close(codes.T @ codes / 80, torch.eye(8), atol=2e-3, rtol=0)
    torch.testing.assert_close(codes.mean(0), torch.zeros(8), atol=2e-3, rtol=0)


def test_components_are_the_principal_ones() -> None:
    frames = (torch.randn(60, 6, 4) * torch.linspace(0.5, 4, 24).view(6, 4)).half().float()
    codes = fitted(frames, 4, 3)(frames)
    left = torch.linalg.svd((frames - frames.mean(0)).flatten(1), full_matrices=False).U[:, :3] * 60**0.5
    torch.testing.assert_close((codes * left).mean(0).abs(), torch.ones(3), atol=2e-3, rtol=0)


def test_cells_keep_their_places() -> None:
    frames = torch.randn(60, 6, 4)
    projection = fitted(frames, 4, 8)
    assert (projection(frames.roll(1, dims=1)) - projection(frames)).abs().mean() > 0.1


def test_components_beyond_the_rank_stay_zero() -> None:
    frames = torch.randn(60, 1, 4) @ torch.eye(4)[:, :1] * torch.ones(1, 6, 4)
    codes = fitted(frames, 4, 5)(frames)
    assert codes[:, 0].std() > 0.9
    assert codes[:, 1:].abs().max() == 0


def test_fitting_twice_gives_the_same_signs() -> None:
    frames = torch.randn(60, 6, 4)
    assert torch.equal(fitted(frames, 3, 6).basis, fitted(frames.clone(), 3, 6).basis)


def test_the_projection_is_the_same_however_its_frames_are_cut() -> None:
    frames = torch.randn(200, 6, 4) @ torch.randn(4, 4)
    whole, parts = WhiteningProjection(6, 4, 4, 12), WhiteningProjection(6, 4, 4, 12)
    whole.fit([frames])
    parts.fit(iter(frames.split(33)))
    torch.testing.assert_close(parts(frames), whole(frames), atol=1e-3, rtol=1e-3)


def test_frames_that_never_vary_project_to_zero() -> None:
    projection = WhiteningProjection(6, 4, 4, 12)
    projection.fit([torch.zeros(10, 6, 4)])
    assert (projection(torch.zeros(2, 6, 4)) == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_frames_to_fit_a_projection_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} frames"):
        WhiteningProjection(6, 4, 4, 12).fit([torch.zeros(count, 6, 4)])


def test_an_unfitted_projection_refuses_to_work() -> None:
    projection, other = WhiteningProjection(6, 4, 4, 12), WhiteningProjection(6, 4, 4, 12)
    with pytest.raises(CheckpointError, match="never fitted"):
        projection(torch.zeros(2, 6, 4))
    projection.fit([torch.randn(200, 6, 4) @ torch.randn(4, 4)])
    projection(torch.zeros(2, 6, 4))
    projection.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="never fitted"):
        projection(torch.zeros(2, 6, 4))
