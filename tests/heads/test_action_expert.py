"""The action expert against attention written out over the whole sequence, and what a sampler need not do again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vla.heads.nets.action_expert import ActionExpert

B, L, H, A, D, HEADS = 3, 5, 4, 2, 16, 4


@pytest.fixture
def expert() -> ActionExpert:
    torch.manual_seed(0)
    net = ActionExpert(H, A, D, layers=3, heads=HEADS, dropout=0.0, time_scale=100.0)
    for parameter in net.parameters():  # also those that begin at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.fixture
def context() -> tuple[Tensor, Tensor]:
    """Tokens, of which the second row has two that are real and the third none."""
    return torch.randn(B, L, D), torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def written_out(net: ActionExpert, sample: Tensor, time: Tensor, context: Tensor, valid: Tensor) -> Tensor:
    """[context | time | actions] in one sequence: pi0's blocks as a mask over it."""
    x = torch.cat([context, net.time(time * net.time_scale)[:, None], net.input(sample) + net.position], dim=1)
    real = torch.cat([valid, valid.new_ones(B, 1 + H)], dim=1)
    may = real[:, None].expand(B, L + 1 + H, L + 1 + H).clone()
    may[:, :L, L:] = False  # the context does not see time or actions
    may |= torch.eye(L + 1 + H, dtype=torch.bool)
    for block in net.blocks:
        normed = F.layer_norm(x, (D,), block.norm.weight, block.norm.bias)
        parts = [part.reshape(B, -1, HEADS, D // HEADS).transpose(1, 2) for part in block.qkv(normed).split(D, dim=-1)]
        scores = parts[0] @ parts[1].transpose(-1, -2) / math.sqrt(D // HEADS)
        weights = scores.masked_fill(~may[:, None], -torch.inf).softmax(-1)
        x = x + block.out((weights @ parts[2]).transpose(1, 2).reshape(B, -1, D))
        x = x + block.mlp(x)
    out: Tensor = net.output(x[:, -H:])
    return out


def test_reading_the_context_once_gives_what_the_whole_sequence_gives(
    expert: ActionExpert, context: tuple[Tensor, Tensor]
) -> None:
    seen = expert.read(*context)
    for time in (0.1, 0.9):  # one reading for every step of a sampler
        sample, when = torch.randn(B, H, A), torch.full((B,), time)
        torch.testing.assert_close(expert(sample, when, seen), written_out(expert, sample, when, *context))


def test_padded_context_changes_nothing_and_gets_no_gradient(
    expert: ActionExpert, context: tuple[Tensor, Tensor]
) -> None:
    tokens, valid = context
    sample, when = torch.randn(B, H, A), torch.rand(B)
    tokens.requires_grad_()
    out = expert(sample, when, expert.read(tokens, valid))
    out.square().sum().backward()
    assert tokens.grad is not None
    assert not tokens.grad[~valid].any()
    assert tokens.grad[valid].any(dim=-1).all()
    other = torch.where(valid[..., None], tokens, 100 * torch.randn_like(tokens))
    torch.testing.assert_close(expert(sample, when, expert.read(other, valid)), out)


def test_every_parameter_of_the_expert_gets_a_gradient(expert: ActionExpert, context: tuple[Tensor, Tensor]) -> None:
    expert(torch.randn(B, H, A), torch.rand(B), expert.read(*context)).square().sum().backward()
    assert [name for name, p in expert.named_parameters() if p.grad is None or not p.grad.any()] == []
