"""The U-Net against Diffusion Policy's own, with weights from a checkpoint as its workspaces write them.

VLA_DIFFUSION_POLICY_CHECKOUT names a checkout of the repository; its network imports einops.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vla.heads.nets.unet1d import ConditionalUnet1D
from vla.pretrained.diffusion_policy import read_unet
from vla.pretrained.weights import load_strictly

CHECKOUT = os.environ.get("VLA_DIFFUSION_POLICY_CHECKOUT", "")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="VLA_DIFFUSION_POLICY_CHECKOUT does not name a checkout of Diffusion Policy"
)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """Their `ConditionalUnet1D`."""
    sys.path.insert(0, CHECKOUT)
    yield __import__("diffusion_policy.model.diffusion.conditional_unet1d", fromlist=["x"]).ConditionalUnet1D
    sys.path.remove(CHECKOUT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusion_policy"]:
        del sys.modules[name]


@pytest.mark.parametrize("horizon", [4, 16])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("down_dims", [(32, 64), (64, 128, 256)])
def test_a_checkpoint_of_theirs_gives_their_outputs(
    horizon: int, scale: bool, down_dims: tuple[int, ...], theirs: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"down_dims": down_dims, "kernel_size": 5, "n_groups": 8, "cond_predict_scale": scale}
    wanted = theirs(7, global_cond_dim=20, diffusion_step_embed_dim=64, **sizes).eval()
    policy = {f"model.{name}": values for name, values in wanted.state_dict().items()}
    torch.save({"cfg": {}, "state_dicts": {"ema_model": policy}, "pickles": {}}, tmp_path / "latest.ckpt")
    ours = ConditionalUnet1D(7, 20, 64, **sizes).eval()
    load_strictly(ours, read_unet(tmp_path / "latest.ckpt"), tmp_path / "latest.ckpt")
    sample, step, cond = torch.randn(5, horizon, 7), torch.tensor([0, 1, 50, 98, 99]), torch.randn(5, 20)
    with torch.no_grad():
        out, reference = ours(sample, step, cond), wanted(sample, step, global_cond=cond)
    assert reference.abs().max() > 0.1
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=0)


def test_the_published_sizes_are_theirs_name_by_name(theirs: Any) -> None:
    with torch.device("meta"):
        ours, wanted = (
            ConditionalUnet1D(10, 274),
            theirs(10, global_cond_dim=274, cond_predict_scale=True, kernel_size=5),
        )
    shapes = [{name: tuple(v.shape) for name, v in net.state_dict().items()} for net in (ours, wanted)]
    assert shapes[0] == shapes[1]
