"""The prefix of a language model and the expert behind it: transformers' own numbers, and nothing from padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig

from vla.heads.nets.gemma_expert import ConditionalRMSNorm, GemmaExpert
from vla.heads.nets.prefix import PrefixModel, block_mask
from vla.heads.pi0_weights import load_language, network_sizes


@pytest.fixture(scope="module")
def language() -> PrefixModel:
    """The tiny language model, frozen."""
    return load_language("random").requires_grad_(False).eval()


@pytest.fixture
def expert() -> Callable[..., GemmaExpert]:
    """`expert(cond)`: the tiny expert, every weight drawn at random."""

    def make(cond: int | None = None) -> GemmaExpert:
        config = network_sizes("random").expert
        assert config is not None
        module = GemmaExpert(config, cond)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return module.eval()

    return make


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_words_are_embedded_times_the_root_of_the_width(language: PrefixModel) -> None:
    ids = torch.tensor([[5, 9]])
    close(language.embed(ids), language.language.embed_tokens.weight[ids] * 8)


def test_who_sees_whom_follows_the_starts_of_blocks() -> None:
    valid = torch.tensor([[True, True, True, False]])
    T, F = True, False
    assert block_mask(valid, None)[0].tolist() == [[T, T, T, F]] * 3 + [[F, F, F, T]]
    causal = block_mask(valid, torch.tensor([[0, 1, 1, 0]]))[0].tolist()
    assert causal == [[T, F, F, F], [T, T, F, F], [T, T, T, F], [F, F, F, T]]
    answer = block_mask(valid, torch.tensor([[0, 0, 1, 0]]))[0].tolist()
    assert answer == [[T, T, F, F], [T, T, F, F], [T, T, T, F], [F, F, F, T]]


@pytest.mark.parametrize("gap", [0, 2])
def test_padding_anywhere_changes_no_key_of_a_real_token(language: PrefixModel, gap: int) -> None:
    """Positions count real tokens alone: three tokens mean the same with padding before or behind them."""
    real = torch.randn(1, 3, 64)
    noise = 50 * torch.randn(1, 4, 64)
    padded = torch.cat([noise[:, :gap], real, noise[:, gap:]], dim=1)
    valid = torch.zeros(1, 7, dtype=torch.bool)
    valid[:, gap : gap + 3] = True
    short = language(real, torch.ones(1, 3, dtype=torch.bool))
    long = language(padded, valid)
    for a, b in zip(short.keys + short.values, long.keys + long.values, strict=True):
        close(b[:, :, gap : gap + 3], a)
    close(long.hidden[:, gap : gap + 3], short.hidden)


def test_going_on_behind_a_prefix_gives_what_one_pass_gives(language: PrefixModel) -> None:
    """Prompt first, then a spoken answer token by token, or all at once with the answer causal."""
    embeddings = torch.randn(2, 7, 64)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 3] = False  # the first prompt is shorter
    starts = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]).expand(2, -1)
    whole = language(embeddings, valid, starts)
    cache = language(embeddings[:, :4], valid[:, :4])
    before = [key.clone() for key in cache.keys]
    hidden = []
    for token in range(4, 7):
        cache = language(embeddings[:, token : token + 1], valid[:, token : token + 1], None, cache)
        hidden.append(cache.hidden)
    close(torch.cat(hidden, dim=1), whole.hidden[:, 4:])
    for ours, theirs in zip(cache.keys, whole.keys, strict=True):
        close(ours[1], theirs[1])
    assert all(torch.equal(key[:, :, :4], old) for key, old in zip(cache.keys, before, strict=True))
    assert cache.counts.tolist() == [6, 7]
    assert language.logits(cache.hidden).shape == (2, 1, 259)


def test_a_detached_prefix_lets_no_gradient_back() -> None:
    language = load_language("random")
    embeddings = torch.randn(1, 3, 64, requires_grad=True)
    cache = language(embeddings, torch.ones(1, 3, dtype=torch.bool))
    assert cache.keys[-1].requires_grad
    cut = cache.detach()
    assert not any(t.requires_grad for t in (*cut.keys, *cut.values, cut.hidden))


@pytest.mark.parametrize("cond", [None, 24])
def test_the_expert_reads_the_prefix_once_for_all_its_calls(
    cond: int | None, language: PrefixModel, expert: Callable[..., GemmaExpert]
) -> None:
    net = expert(cond)
    prefix = language(torch.randn(2, 5, 64), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    tokens, starts = torch.randn(2, 4, 32), torch.tensor([1, 1, 0, 0])
    condition = None if cond is None else torch.randn(2, cond)
    first = net(tokens, prefix, starts, condition)
    assert torch.equal(net(tokens, prefix, starts, condition), first)
    other = language(torch.randn(2, 5, 64), prefix.valid)
    assert (net(tokens, other, starts, condition) - first).abs().max() > 1e-3


def test_tokens_of_the_expert_do_not_see_later_blocks(
    language: PrefixModel, expert: Callable[..., GemmaExpert]
) -> None:
    """pi0's state sees no action; an action sees the state and every action."""
    net, prefix = expert(), language(torch.randn(1, 2, 64), torch.ones(1, 2, dtype=torch.bool))
    tokens, starts = torch.randn(1, 4, 32), torch.tensor([1, 1, 0, 0])
    changed = tokens.clone()
    changed[:, 3] += 1
    difference = (net(changed, prefix, starts) - net(tokens, prefix, starts)).abs().amax(dim=(0, 2))
    assert difference[0] == 0
    assert (difference[1:] > 1e-4).all()


def test_prefix_and_expert_together_are_one_gemma_of_both(
    language: PrefixModel, expert: Callable[..., GemmaExpert]
) -> None:
    """With the expert's layers those of the language model itself, behind its prefix it says what the model says."""
    config: GemmaConfig = language.config
    net = GemmaExpert(config).eval()
    weights = {k.removeprefix("language."): v for k, v in language.state_dict().items() if "embed_tokens" not in k}
    net.load_state_dict(weights)
    embeddings, valid = torch.randn(2, 6, 64), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2] = False
    prefix = language(embeddings[:, :3], valid[:, :3])
    whole = language(embeddings, valid, torch.tensor([[0, 0, 0, 1, 0, 0]]).expand(2, -1))
    close(net(embeddings[:, 3:], prefix, torch.tensor([1, 0, 0])), whole.hidden[:, 3:])


def test_an_adaptive_norm_scales_shifts_and_gates_by_its_condition() -> None:
    norm = ConditionalRMSNorm(3, 1e-6, 2)
    torch.nn.init.normal_(norm.dense.weight)
    x, condition = torch.randn(2, 4, 3), torch.randn(2, 2)
    normed, gate = norm(x, condition)
    scale, shift, wanted = (norm.dense(condition)[:, None, part] for part in (slice(3), slice(3, 6), slice(6, 9)))
    rms = (x**2).mean(dim=-1, keepdim=True).sqrt()
    close(normed, x / rms * (1 + scale) + shift)
    assert gate is not None
    assert torch.equal(gate, wanted)


def test_an_adaptive_expert_begins_as_the_identity_behind_its_norm(language: PrefixModel) -> None:
    config: Any = network_sizes("random").expert
    net = GemmaExpert(config, 24)
    tokens = torch.randn(1, 2, 32)
    prefix = language(torch.randn(1, 2, 64), torch.ones(1, 2, dtype=torch.bool))
    rms = (tokens**2).mean(dim=-1, keepdim=True).sqrt()
    close(net(tokens, prefix, torch.tensor([1, 0]), torch.randn(1, 24)), tokens / rms)


def test_random_networks_are_those_of_their_seed_and_leave_the_random_state() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (load_language("random", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), wanted)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
