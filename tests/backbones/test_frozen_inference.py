"""The numerical mode of every frozen network: set inside, and the caller's own put back."""

from __future__ import annotations

import pytest
import torch

from vla.pretrained.inference import count_parameters, freeze, frozen_inference


def flags() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    precision = torch.get_float32_matmul_precision()
    return cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, precision, torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_no_tf32_and_only_deterministic_kernels_inside_and_the_callers_choice_after(fails: bool) -> None:
    before_all = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        before = flags()
        assert before[0], "torch allows TF32 convolutions unless told otherwise"
        try:
            with frozen_inference(torch.device("cpu")):
                assert flags() == (False, True, False, "highest", False)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision(before_all)


def test_freezing_stops_dropout_and_gradients() -> None:
    network = freeze(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.9)))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_shared_parameters_are_counted_once() -> None:
    layer = torch.nn.Linear(3, 4)
    assert count_parameters(layer, torch.nn.Sequential(layer, layer)) == 3 * 4 + 4
