"""The losses against closed forms and an independent formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vla.featurize.distill.loss import agreement, embedding_mse, info_nce, similarities


def test_info_nce_of_orthogonal_pairs_has_its_closed_form() -> None:
    """S = I: log(1 + (B - 1) exp(-1 / tau)) in both directions."""
    for count, tau in [(2, 0.3), (5, 0.5)]:
        cosine = similarities(3.0 * torch.eye(count), 0.5 * torch.eye(count))
        wanted = math.log1p((count - 1) * math.exp(-1 / tau))
        assert info_nce(cosine, tau=tau).item() == pytest.approx(wanted, rel=1e-5)


def test_info_nce_equals_the_formula_written_out() -> None:
    rng = np.random.default_rng(0)
    z_s, z_t = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    unit_s, unit_t = (z / np.sqrt((z**2).sum(1, keepdims=True)) for z in (z_s, z_t))
    total = 0.0
    for i in range(6):
        row = [math.exp(unit_s[i] @ unit_t[j] / 0.07) for j in range(6)]
        column = [math.exp(unit_s[j] @ unit_t[i] / 0.07) for j in range(6)]
        total -= 0.5 * (math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))) / 6
    found = info_nce(similarities(torch.from_numpy(z_s), torch.from_numpy(z_t)))
    assert found.item() == pytest.approx(total, rel=1e-4)


def test_a_step_that_a_batch_holds_twice_is_no_negative_of_itself() -> None:
    z_s, z_t = torch.randn(4, 5), torch.randn(4, 5)
    z_s[3], z_t[3] = z_s[1], z_t[1]
    row = torch.tensor([10, 11, 12, 11])
    cosine, same = similarities(z_s, z_t), row[:, None] == row
    logits = cosine / 0.07
    wanted = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or row[j] != row[i]]
        for table in (logits, logits.T):
            wanted -= 0.5 * (table[i, i] - table[i, others].logsumexp(0)).item() / 4
    assert info_nce(cosine, same).item() == pytest.approx(wanted, rel=1e-5)
    assert info_nce(cosine).item() > wanted
    figures = agreement(cosine, same)
    kept = [cosine[i, j].item() for i in range(4) for j in range(4) if row[i] != row[j]]
    assert figures["neg_sim"].item() == pytest.approx(np.mean(kept), abs=1e-6)
    assert figures["pos_sim"].item() == pytest.approx(cosine.diagonal().mean().item(), abs=1e-6)
    assert figures["sim_gap"].item() == pytest.approx((figures["pos_sim"] - figures["neg_sim"]).item(), abs=1e-6)


def test_the_squared_difference_is_of_directions() -> None:
    a, b = torch.randn(7, 4), torch.randn(7, 4)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    assert embedding_mse(5 * a, b).item() == pytest.approx(((2 - 2 * cosine) / 4).mean().item(), rel=1e-5)
