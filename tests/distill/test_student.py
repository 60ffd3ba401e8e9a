"""The network: places that correspond, backbones by name, a gate that chooses, every part in use."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vla.featurize.distill.fusion import MixtureFusion, WeightedFusion, top_k_softmax
from vla.featurize.distill.student import Student, StudentConfig, pool_grid, sinusoids
from vla.stores.errors import UsageError

INPUTS = {"near": (4, 4, 3), "far": (6, 6, 3)}
"""Of equal channels, so that swapped adapters would fit."""
SMALL = {"teacher_dim": 8, "dim": 16, "heads": 2, "layers": 1, "gate_hidden": 8}
FUSIONS = ["weighted", "moe"]


def student_of(fusion: str = "weighted", inputs: dict[str, tuple[int, int, int]] = INPUTS, **more: object) -> Student:
    torch.manual_seed(0)
    config = StudentConfig.build({"inputs": inputs, "fusion": fusion, **SMALL, **more})
    return Student(config).eval()


def grids_of(inputs: dict[str, tuple[int, int, int]] = INPUTS, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(count, *inputs[name], generator=generator) for name in sorted(inputs)}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bug_2_5_adapters_keyed_by_index_swap_backbones_of_equal_width(fusion: str) -> None:
    grids = grids_of()
    there = student_of(fusion)(grids)
    back = student_of(fusion, dict(reversed(INPUTS.items())))({name: grids[name] for name in reversed(grids)})
    for one, other in zip(there, back, strict=True):
        assert torch.equal(one, other)
    swapped = student_of(fusion, {"near": (4, 4, 3), "far": (4, 4, 3)})
    both = {name: pool_grid(grid, (4, 4)).unflatten(1, (4, 4)) for name, grid in grids.items()}
    assert not torch.allclose(swapped(both)[0], swapped({"near": both["far"], "far": both["near"]})[0], atol=1e-3)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bug_2_5_3_every_adapter_the_fusion_and_the_context_encoder_are_used(fusion: str) -> None:
    """The origin used adapter 0 alone, or left out the context encoder: here each one's gradient is there."""
    student = student_of(fusion).train()
    fused, projected = student(grids_of())
    (fused.square().sum() + (projected * torch.arange(8.0)).sum()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        # The bias of keys moves all logits of a row alike: softmax does not see it.
        gradient = parameter.grad[:16] if name.endswith("in_proj_bias") else parameter.grad
        assert gradient.abs().sum() > 0, name
    assert {name.split(".")[0] for name, _ in student.named_parameters()} == {
        "adapters",
        "fusion",
        "context",
        "projection",
    }


def test_bug_2_5_3_the_context_encoder_runs_over_places_with_relu_as_it_was_trained() -> None:
    student = student_of().eval()
    grids = grids_of(count=3)
    alone = torch.cat([student({name: grid[n : n + 1] for name, grid in grids.items()})[0] for n in range(3)])
    assert torch.allclose(alone, student(grids)[0], atol=1e-6), "frames are no sequence"
    layer = student.context.layers[0]
    assert layer.activation is torch.nn.functional.relu
    moved = {name: grid.flip(1) for name, grid in grids.items()}
    assert not torch.allclose(student(moved)[0], student(grids)[0], atol=1e-4), "places have an order"


def test_bug_2_5_4_token_k_is_the_same_place_in_every_backbone() -> None:
    """A bright quarter of the picture is the same tokens in grids of 4 x 4 and of 6 x 6, and nowhere else."""
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        bright = []
        for y, x, _ in INPUTS.values():
            grid = torch.zeros(1, y, x, 3)
            grid[:, row * y // 2 : (row + 1) * y // 2, column * x // 2 : (column + 1) * x // 2] = 1.0
            bright.append(pool_grid(grid, (4, 4))[0, :, 0])
        assert torch.equal(bright[0], bright[1])
        assert bright[0].sum() == 4
        assert bright[0].reshape(4, 4)[row * 2, column * 2] == 1


def test_bug_2_5_4_places_drawn_in_training_are_shared_by_all_backbones() -> None:
    student = student_of(tokens=5).train()
    seen: list[dict[str, Tensor]] = []
    for name in student.config.names:
        key = next(key for key in student.adapters if key.endswith(name))
        student.adapters[key].register_forward_pre_hook(lambda _, args, name=name: seen.append({name: args[0]}))
    y, x = student.config.common
    place = torch.arange(y * x, dtype=torch.float32).reshape(1, y, x, 1).expand(2, y, x, 3)
    # `far` is larger: each place's number stands in all cells that pool to it.
    wide = torch.nn.functional.interpolate(place.permute(0, 3, 1, 2), (12, 12)).permute(0, 2, 3, 1)
    student({"near": place, "far": wide})
    numbers = {name: tokens[0, :, 0] for part in seen for name, tokens in part.items()}
    assert torch.equal(numbers["near"], numbers["far"])
    assert len(numbers["near"].unique()) == 5
    before = numbers["near"]
    seen.clear()
    student({"near": place, "far": wide})
    assert not torch.equal(next(iter(seen[0].values()))[0, :, 0], before), "another draw in the next step"


def test_without_training_all_places_are_read_and_nothing_is_drawn() -> None:
    drawing, whole = student_of(tokens=5), student_of()
    state = torch.random.get_rng_state()
    assert torch.equal(drawing(grids_of())[0], whole(grids_of())[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_grid_is_pooled_by_the_mean_over_each_cell() -> None:
    grid = np.random.default_rng(0).normal(size=(6, 4, 2)).astype(np.float32)
    wanted = grid.reshape(3, 2, 2, 2, 2).mean(axis=(1, 3)).reshape(6, 2)
    np.testing.assert_allclose(pool_grid(torch.from_numpy(grid), (3, 2)).numpy(), wanted, atol=1e-6)
    many = torch.from_numpy(np.stack([grid, 2 * grid])[None])
    np.testing.assert_allclose(pool_grid(many, (3, 2)).numpy(), np.stack([wanted, 2 * wanted])[None], atol=1e-6)


def test_the_common_grid_is_the_smallest_and_the_width_the_teachers() -> None:
    config = StudentConfig.build({"inputs": {"a": (4, 9, 1), "b": (6, 6, 1)}, "teacher_dim": 8})
    assert config.common == (4, 6)
    assert config.width == 8
    again = StudentConfig.build(config.model_dump(mode="json"))
    assert again == config


def test_sinusoids_are_those_of_the_paper() -> None:
    table = sinusoids(5, 6)
    for position in range(5):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert table[position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_weighted_fusion_starts_as_the_mean_and_follows_its_logits() -> None:
    fusion, tokens = WeightedFusion(3), torch.randn(4, 3, 5)
    assert torch.allclose(fusion(tokens), tokens.mean(dim=1), atol=1e-6)
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([0.0, math.log(2.0), -math.inf]))
    assert torch.allclose(fusion(tokens), tokens[:, 0] / 3 + tokens[:, 1] * 2 / 3, atol=1e-6)


def test_the_gate_keeps_the_two_best_and_shares_the_weight_among_them() -> None:
    weights = top_k_softmax(torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    share = 1 / (1 + math.exp(-1.0))
    wanted = torch.tensor([[0.0, share, 1 - share, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert torch.allclose(weights, wanted)


def test_the_gate_is_noisy_in_training_alone() -> None:
    torch.manual_seed(0)
    fusion, tokens = MixtureFusion(4, 6, 8, 2), torch.randn(50, 4, 6)
    calm = fusion.eval().weights(tokens)
    assert torch.equal(calm, fusion.weights(tokens))
    assert ((calm > 0).sum(dim=-1) == 2).all()
    assert torch.allclose(calm.sum(dim=-1), torch.ones(50))
    noisy = fusion.train().weights(tokens)
    assert not torch.equal(noisy, calm)
    assert not torch.equal(noisy, fusion.weights(tokens))
    assert ((noisy > 0).sum(dim=-1) == 2).all()
    with torch.no_grad():
        fusion.noise_log_std.fill_(-60.0)
    assert torch.allclose(fusion.weights(tokens), calm), "the deviation is exp(noise_log_std)"


def test_names_that_modules_cannot_have_are_names_of_backbones_too() -> None:
    inputs = {"dino.v3": (2, 2, 3), "keys": (2, 2, 3), "dino%2Ev3": (2, 2, 3)}
    student = student_of(inputs=inputs)
    assert len(student.adapters) == 3
    student(grids_of(inputs))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 10, "heads": 4}, "not a multiple of heads"),
        ({"tokens": 17}, "tokens 17 of 16 places"),
        ({"inputs": {}}, "inputs"),
        ({"inputs": {"a": [0, 2, 3]}}, "no places"),
        ({"fuison": "moe"}, "did you mean 'fusion'"),
    ],
)
def test_networks_that_cannot_be_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        StudentConfig.build({"inputs": INPUTS, **SMALL, **change})
