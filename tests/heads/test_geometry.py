"""Geometry tokens: one row of a batch stays one row however many views it has, and nothing is skipped in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vla.heads.nets.geometry import GeometryTokenAdapter
from vla.stores.errors import DataError


def cells(adapter: GeometryTokenAdapter, ray: Tensor) -> Tensor:
    """The formula, view by view and cell by cell."""
    views = []
    for view in ray.float().unbind(dim=1):
        grid = torch.nn.functional.interpolate(view.movedim(-1, 1), adapter.target_hw, mode="bilinear")
        views += [adapter.alpha * adapter.project(cell) for row in grid.unbind(dim=2) for cell in row.unbind(dim=2)]
    return torch.stack(views, dim=1)


@pytest.mark.parametrize("views", [1, 3])
def test_tokens_of_all_views_of_a_row_stand_in_that_row(views: int) -> None:
    """The origin's adapter gave [B * S, Ht * Wt, D], which fits no prefix of B rows (its first bug)."""
    adapter = GeometryTokenAdapter(6, (3, 5), 8, init_alpha=0.3)
    ray = torch.randn(2, views, 6, 10, 6)
    tokens, pad_masks, att_masks = adapter(ray)
    assert tokens.shape == (2, views * 15, 8)
    torch.testing.assert_close(tokens, cells(adapter, ray))
    assert pad_masks.dtype == att_masks.dtype == torch.bool
    assert pad_masks.shape == att_masks.shape == (2, views * 15)
    assert pad_masks.all()
    assert not att_masks.any()


def test_a_row_does_not_depend_on_batch_mates() -> None:
    adapter, ray = GeometryTokenAdapter(6, (2, 2), 8), torch.randn(3, 2, 4, 4, 6)
    torch.testing.assert_close(adapter(ray[1:2])[0], adapter(ray)[0][1:2])


def test_rays_that_have_the_grid_already_are_not_interpolated() -> None:
    adapter = GeometryTokenAdapter(6, (14, 14), 8)
    ray = torch.randn(2, 1, 14, 14, 6)
    torch.testing.assert_close(adapter(ray)[0], adapter.project(ray.flatten(1, 3)) * adapter.alpha)
    assert adapter(ray.half())[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 1, 6, 4, 4), (2, 1, 4, 4, 7)])
def test_rays_are_channel_last_and_six(shape: tuple[int, ...]) -> None:
    """The origin's comment says [B, S, C, H, W] and its docstring 7 channels; DA3 gives neither."""
    with pytest.raises(DataError, match=r"rays of shape .*expected \[B, S, h, w, 6\], channels last"):
        GeometryTokenAdapter(6, (2, 2), 8)(torch.randn(shape))


def test_alpha_is_learnt_from_the_value_that_was_asked_for() -> None:
    adapter = GeometryTokenAdapter(6, (2, 2), 8)
    assert adapter.alpha.item() == pytest.approx(0.1)
    adapter(torch.randn(1, 1, 2, 2, 6))[0].square().sum().backward()
    assert adapter.alpha.grad is not None
    assert adapter.alpha.grad != 0


def test_the_ramp_rises_from_zero_over_optimiser_steps_and_goes_on_after_a_checkpoint() -> None:
    adapter, ray = GeometryTokenAdapter(6, (2, 2), 8, init_alpha=1.0, warmup=4), torch.randn(1, 1, 2, 2, 6)
    whole = adapter.project(ray.flatten(1, 3)).abs().sum()

    def after_a_step(each: GeometryTokenAdapter) -> float:
        share = (each(ray)[0].abs().sum() / whole).item()
        each.advance()
        return share

    seen = [after_a_step(adapter) for _ in range(3)]
    adapter.eval()
    assert (adapter(ray)[0].abs().sum() / whole).item() == pytest.approx(0.75)  # acting does not count
    resumed = GeometryTokenAdapter(6, (2, 2), 8, warmup=4)
    resumed.load_state_dict(adapter.state_dict())
    seen += [after_a_step(resumed) for _ in range(3)]
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-6)


def test_a_modality_vector_begins_at_zero_and_is_added_to_every_token() -> None:
    adapter = GeometryTokenAdapter(6, (2, 2), 8, modality=True)
    ray = torch.randn(1, 2, 2, 2, 6)
    torch.testing.assert_close(adapter(ray)[0], cells(adapter, ray))
    torch.nn.init.ones_(adapter.modality)
    torch.testing.assert_close(adapter(ray)[0], cells(adapter, ray) + 1)
