"""Plans of waypoints (x, y, heading): their scale, how far they are from the demonstrated ones, and as velocities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.normalize import Normalizer
from vla.stores.errors import DataError

MIN_ALPHA = 1e-3
"""OpenTrackVLA's: demonstrations that stand still would otherwise be divided by 0."""


def alpha_of(waypoints: NDArray[np.float32]) -> float:
    """Return the 95th percentile of |xy| over valid waypoints [N, 3], in metres. Raises `DataError` for none at all."""
    if not len(waypoints):
        raise DataError("no waypoint of the training episodes is valid", expected="at least one")
    return max(float(np.percentile(np.linalg.norm(waypoints[:, :2].astype(np.float64), axis=1), 95)), MIN_ALPHA)


def measure_plans(batch: Batch, plan: Tensor, scale: Normalizer, *, waypoints: bool) -> dict[str, Tensor]:
    """Return what `summarise_plans` adds up, name -> [B], of plans [B, H, A] in the data's units.

    For each dimension the squared error and the entries it is over: valid steps, real dimensions. `nav` is the squared
    error of all of them in normalised space. Of waypoints: `final`, the distance in metres between planned and
    demonstrated place at the last valid one, NaN where none is; and, where windows look back at all, `first`: whether a
    window is its episode's first.
    """
    assert batch.action is not None
    B, H, A = batch.action.shape
    valid = plan.new_ones(B, H, dtype=torch.bool) if batch.action_valid is None else batch.action_valid
    real = plan.new_ones(B, A, dtype=torch.bool) if batch.action_dims is None else batch.action_dims
    counted = valid[..., None] & real[:, None]
    wanted = torch.where(counted, batch.action, plan)  # what stands in padding may be anything
    squared = (plan - wanted).double() ** 2
    measured = {f"squared.{a}": squared[..., a].sum(1) for a in range(A)}
    measured |= {f"entries.{a}": counted[..., a].sum(1) for a in range(A)}
    measured["nav"] = ((scale(plan) - scale(wanted)).double() ** 2).sum((1, 2))
    measured["valid"] = valid.double().mean(1)
    if waypoints:
        last = torch.where(valid, torch.arange(H, device=valid.device), -1).amax(1)
        apart = (plan - wanted)[..., :2].norm(dim=-1).gather(1, last.clamp(min=0)[:, None])[:, 0]
        measured["final"] = torch.where(last >= 0, apart.double(), torch.nan)
        if batch.obs_valid.shape[1] > 1:
            measured["first"] = ~batch.obs_valid[:, :-1].any(1)
    return measured


def summarise_plans(
    measured: Mapping[str, Tensor], names: Sequence[str], beta: float, near: float, following: float
) -> dict[str, float]:
    """Return OpenTrackVLA's figures over all windows, in order, episode by episode.

    `L_nav`: beta times the mean squared error in normalised space. `mse_total`, `mse_<name>`: mean squared errors in
    the data's units, each over valid entries alone. `mask_cov`: share of valid steps. Of waypoints:
    `final_EPE_mean`, `final_EPE_median` at the last valid one, in metres; `hit_rate`: share of windows where that is at
    most `near`; `episode_follow`: share of the windows of an episode where it is at most `following`, the mean over
    episodes. Windows without any valid waypoint count in none of these.
    """
    squared = [float(measured[f"squared.{a}"].sum()) for a in range(len(names))]
    entries = [float(measured[f"entries.{a}"].sum()) for a in range(len(names))]
    total = max(sum(entries), 1.0)
    figures = {"L_nav": beta * float(measured["nav"].sum()) / total, "mse_total": sum(squared) / total}
    figures |= {f"mse_{name}": s / max(n, 1.0) for name, s, n in zip(names, squared, entries, strict=True)}
    figures["mask_cov"] = float(measured["valid"].mean())
    if "final" in measured and bool(measured["final"].isfinite().any()):
        final = measured["final"]
        counts = final.isfinite()
        figures["final_EPE_mean"] = float(final[counts].mean())
        # numpy's median: torch's is the lower of the two in the middle.
        figures["final_EPE_median"] = float(np.median(final[counts].numpy()))
        figures["hit_rate"] = float((final[counts] <= near).double().mean())
        if "first" in measured:
            episode = measured["first"].long().cumsum(0)[counts]
            followed, frames = torch.zeros(2, int(episode.max()) + 1, dtype=torch.float64).unbind()
            followed.index_add_(0, episode, (final[counts] <= following).double())
            frames.index_add_(0, episode, torch.ones(len(episode), dtype=torch.float64))
            figures["episode_follow"] = float((followed / frames)[frames > 0].mean())
    return figures


def waypoint_velocities(waypoints: NDArray[np.floating], dt: float) -> NDArray[np.float64]:
    """Return the velocities [..., H - 1, 3] (vx, vy, wz: m/s, m/s, rad/s, in the body's frame) between waypoints.

    Waypoints [..., H, 3] (x, y, heading: m, m, rad) start at the origin and are `dt` seconds a step apart, i standing
    for the pose of number round(i * H / (H - 1)); where that leaves a pose out (1.0 between 3 and 5 of 8) the velocity
    is the mean over both steps. Of poses that velocities were integrated to (explicit Euler, as the source `trackvla`
    does) these are the velocities again. The first one is what to execute now; then plan again. Raises `DataError` for
    another shape, and for waypoints that are not finite: a base would be told to drive at NaN.
    """
    waypoints = np.asarray(waypoints, np.float64)
    if waypoints.ndim < 2 or waypoints.shape[-1] != 3 or waypoints.shape[-2] < 2 or not dt > 0:
        raise DataError(f"waypoints {waypoints.shape} every {dt} s", expected="[..., H >= 2, 3] and dt above 0")
    if not np.isfinite(waypoints).all():
        raise DataError("waypoints that are not finite", expected="finite numbers")
    H = waypoints.shape[-2]
    seconds = dt * np.diff(np.round(np.linspace(0, H, H)))[:, None]
    heading, step = waypoints[..., :-1, 2], np.diff(waypoints, axis=-2)
    cos, sin = np.cos(heading), np.sin(heading)
    body = [cos * step[..., 0] + sin * step[..., 1], cos * step[..., 1] - sin * step[..., 0], step[..., 2]]
    return np.stack(body, axis=-1) / seconds
