"""`track`: OpenTrackVLA's planner (https://github.com/om-ai-lab/OpenTrackVLA): where to go, as waypoints.

Coarse tokens of past frames, fine tokens of the present one and the instruction become one hidden state, and three
layers turn it into the plan. `llm`: the state is that of an ACT token behind all of them in a language model. `light`:
projected tokens side by side, without a language model, for a CPU; losses, labels and figures are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.model import SMALL_NET, HeadConfig, HeadModel
from vla.heads.needs import Need
from vla.heads.nets.instructions import Instructions
from vla.heads.nets.language import LanguageModel, Tuning
from vla.heads.nets.planner import EMBEDDING_STD, CrossModalityProjector, PlannerHead3L, Tanh, TVIEmbedder
from vla.heads.opentrackvla import PublishedPlanner, read_published
from vla.heads.texts import TextRows
from vla.heads.waypoints import alpha_of, measure_plans, summarise_plans
from vla.pretrained.language import LanguageSizes, language_sizes, load_language
from vla.pretrained.weights import RANDOM
from vla.stores.errors import DataError, UsageError
from vla.stores.ranges import constant_columns
from vla.stores.user_given import WEIGHTS, PlainText, UserGiven

if TYPE_CHECKING:
    from vla.heads.data import HeadData

PUBLISHED = {"lr": 3e-4, "weight_decay": 0.01, "betas": (0.9, 0.999), "grad_clip": 1.0, "batch_size": 12}
PUBLISHED |= {"precision": "bf16", "schedule": "constant", "warmup_steps": 0}
"""OpenTrackVLA's `TrainConfig`; its command line has 2e-5, which the language model gets where it is trained whole."""
FULL_LR = 2e-5
FLOAT16_APART = 1e-2
"""Of the largest embedding: ten times float16's rounding, and far less than two models have in common."""


class TrackConfig(HeadConfig):
    """Settings of the planner. `action_norm` is for labels other than waypoints, which `alpha_xy` scales.

    `variant`: "light" or "llm", see the module. `n_obs`: frames looked at, the present one and n_obs - 1 past ones.
    `waypoints`: whether labels are waypoints (x, y, heading) (None: where each row holds a chunk of 3 numbers a step).
    `beta`: weight of the loss. `alpha_xy`: what x and y are divided by, in metres; None: the 95th percentile of |xy| of
    the training episodes. `tanh`: bound on normalised plans, "off", "all" (OpenTrackVLA's, limits headings to 1 rad) or
    "xy". `hit_threshold`, `episode_threshold`: metres within which a final waypoint is hit or a frame followed.
    `dropout`: on the hidden state. Light: `width` of the hidden state, `token_width` of each projected token.
    Llm: `llm` frozen, full or lora; `llm_weights`, a folder, a hub id or "random"; `llm_sizes` (None: read from them,
    and kept); `planner`, an OpenTrackVLA checkpoint to start from; `angle`, the column of the state that is the heading
    in radians, told by a token of its own before each frame; `max_time` of the time embedding; `max_text`, the longest
    instruction in tokens.
    """

    n_obs: int = Field(32, ge=1)
    variant: Literal["light", "llm"] = "light"
    waypoints: bool | None = None
    beta: float = Field(10.0, gt=0)
    alpha_xy: float | None = Field(None, gt=0)
    tanh: Tanh = "off"
    hit_threshold: float = Field(0.2, ge=0)
    episode_threshold: float = Field(0.2, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    width: int = Field(256, ge=8)
    token_width: int = Field(32, ge=1)
    llm: Tuning = "frozen"
    llm_weights: Annotated[str, WEIGHTS] = "Qwen/Qwen3-0.6B"
    llm_sizes: LanguageSizes | None = None
    planner: Annotated[str | None, UserGiven()] = None
    angle: Annotated[int | str | None, PlainText()] = None
    max_time: int = Field(4096, ge=1)
    max_text: int = Field(128, ge=1)


class TrackHead(HeadModel):
    """See the module. `text` holds the instructions, `planner` gives the normalised plan."""

    Config: ClassVar[type[HeadConfig]] = TrackConfig
    train_defaults: ClassVar[dict[str, Any]] = SMALL_NET
    config: TrackConfig

    def __init__(self, config: TrackConfig, io: HeadIO) -> None:
        if config.variant == "llm" and config.llm_sizes is None:
            sizes = read_published(config.planner).sizes if config.planner else language_sizes(config.llm_weights)
            config = config.model_copy(update={"llm_sizes": sizes})
        super().__init__(config, io)
        self.waypoints = (io.chunk is not None and io.action_dim == 3) if config.waypoints is None else config.waypoints
        self._columns = () if config.angle is None else io.state_columns((config.angle,))
        self._refuse_contradictions()
        assert io.text is not None  # needs saw to it
        self.text = Instructions(len(io.tasks), io.text.length, io.text.width if config.variant == "light" else 0)
        width = self._build_light(io.text.width) if config.variant == "light" else self._build_llm()
        self.dropout = nn.Dropout(config.dropout)
        self.planner = PlannerHead3L(width, config.horizon, io.action_dim, tanh=config.tanh)

    @classmethod
    def defaults(cls, model: Mapping[str, Any]) -> dict[str, Any]:
        """See `HeadModel.defaults`."""
        if model.get("variant") != "llm":
            return cls.train_defaults
        return PUBLISHED | ({"lr": FULL_LR} if model.get("llm") == "full" else {})

    @classmethod
    def needs(cls, config: TrackConfig) -> tuple[Need, ...]:
        """See `HeadModel.needs`."""
        features = ("coarse", "fine") if config.n_obs > 1 else ("fine",)
        text = Need("text", "text", embeddings=config.variant == "light")
        return (*(Need(name, "dino-siglip") for name in features), text)

    @property
    def reads(self) -> dict[str, int]:
        """See `HeadModel.reads`."""
        return {"coarse": self.config.n_obs, "fine": 1} if self.config.n_obs > 1 else {"fine": 1}

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return self._columns

    @property
    def meaning(self) -> dict[str, Any]:
        """See `HeadModel.meaning`."""
        scale = {"alpha_xy": self.config.alpha_xy} if self.waypoints else super().meaning
        angle = next(iter(self._columns), None)
        return {"waypoints": self.waypoints, **scale, "tanh": self.config.tanh, "angle": angle}

    @property
    def net(self) -> nn.Module:
        """The last layers: what they give is the normalised plan [B, H, A]."""
        return self.planner

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Return beta times the squared error in normalised space."""
        return self.config.beta * (self._plan(batch) - action) ** 2

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Return the plan, in one pass; `generator` is not needed."""
        return self._plan(batch)

    def measure(self, batch: Batch, chunk: Tensor) -> dict[str, Tensor]:
        """See `measure_plans`."""
        return measure_plans(batch, chunk, self.action, waypoints=self.waypoints)

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """See `summarise_plans`."""
        config, io = self.config, self.io
        names = ("x", "y", "theta") if self.waypoints else io.action_names or tuple(map(str, range(io.action_dim)))
        return summarise_plans(measured, names, config.beta, config.hit_threshold, config.episode_threshold)

    def prepare(self, data: HeadData) -> None:
        """Fit the scale, look the instructions up, take the published weights."""
        config = self.config
        super().prepare(data)
        assert data.texts is not None
        rows = data.texts.rows(self.io.tasks)
        self.fit_texts(rows)
        if config.variant == "light":
            return
        self.language.start()
        if config.planner is None:
            self._require_its_own_tokens(rows)
            return
        self.take(read_published(config.planner))

    def take(self, published: PublishedPlanner) -> None:
        """Start from a published planner, its scale included. Raises what `PublishedPlanner` raises."""
        published.require_tanh(self.config.tanh)
        parts = {"proj": self.proj, "tvi": self.tvi, "act_token": self.act_token, "planner": self.planner}
        published.load_into(parts, angle=self.config.angle is not None)
        constant = self.action.constant.cpu().numpy()  # what never moves in these demonstrations stays as it is
        held = np.where(constant, self.action.centre.cpu().numpy(), 0.0)
        self.action.set(held, np.where(constant, 1.0, published.alpha.numpy()), constant)

    def fit_texts(self, rows: TextRows) -> None:
        """Keep the instructions, in the order of `io.tasks`. Raises `DataError` for ids that the model lacks."""
        self.text.set(rows)
        if self.config.variant == "llm" and int(self.text.ids.max()) >= self.language.sizes.vocab:
            found = f"token {int(self.text.ids.max())} of an instruction"
            raise DataError(found, expected=f"below {self.language.sizes.vocab}, as {self.config.llm_weights} has them")

    def fit_normalisers(
        self, actions: NDArray[Any], states: NDArray[Any], *, dims: NDArray[np.bool_] | None = None
    ) -> None:
        """Divide x and y of waypoints [N, 3] by alpha, leave headings in radians; see `HeadModel` for other labels."""
        if not self.waypoints:
            super().fit_normalisers(actions, states, dims=dims)
            return
        alpha = self.config.alpha_xy or alpha_of(actions)
        farthest = float(np.abs(actions[:, 2]).max(initial=0.0))
        if self.config.tanh == "all" and self.config.planner is None and farthest > 1:
            found = f"tanh bounds headings to 1 rad, and the training episodes turn by {farthest:.2f}"
            raise DataError(found, expected="plans that can be reached", fix="--set model.tanh=xy, or off")
        constant = constant_columns(actions, dims)
        held = np.where(constant, actions[0], 0.0)
        self.action.set(held, np.where(constant, 1.0, [alpha, alpha, 1.0]), constant)

    def _require_its_own_tokens(self, rows: TextRows) -> None:
        """Raise `DataError` where the text store was made with another model than the one that will read its ids."""
        config, stored = self.config, rows.embedding
        assert config.llm_sizes is not None
        if config.llm_weights == RANDOM or stored.shape[-1] != config.llm_sizes.hidden:
            return
        looked_up = self.language.embed(rows.ids)[rows.mask].float()
        apart = (looked_up - stored[rows.mask]).abs().max() / looked_up.abs().max()
        if apart > FLOAT16_APART:
            found = f"the embeddings of the text store are not those of {config.llm_weights}"
            fix = f"vla featurize --backbone text --weights {config.llm_weights}"
            raise DataError(found, expected="one language model", fix=fix)

    def _plan(self, batch: Batch) -> Tensor:
        plan: Tensor = self.planner(self.dropout(self._hidden(batch)))
        return plan

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the state to plan from, [B, width]."""
        fine = self.proj(batch.feature("fine").float())
        # The present frame is no part of its own history: OpenTrackVLA trains so, and its agent did not drive so.
        past = self.proj(batch.feature("coarse")[:, :-1].float()) if self.config.n_obs > 1 else None
        if self.config.variant == "light":
            tokens = fine.flatten(1) if past is None else torch.cat([past.flatten(1), fine.flatten(1)], dim=1)
            hidden: Tensor = self.mix(tokens) + self.told(self.text.means(batch.task))
            return hidden
        ids, told = self.text.tokens(batch.task)
        yaw = batch.state[..., self.columns[0]] if batch.state is not None and self.columns else None
        history, B = self.config.n_obs - 1, len(batch)
        seen = self.tvi(fine, history, TVIEmbedder.FINE, None if yaw is None else yaw[:, -1:])
        pieces = [self.language.embed(ids), seen, self.act_token.weight.expand(B, 1, -1)]
        if past is not None:
            pieces.insert(1, self.tvi(past, 0, TVIEmbedder.COARSE, None if yaw is None else yaw[:, :-1]))
        row = torch.cat([piece.to(seen.dtype) for piece in pieces], dim=1)
        real = torch.cat([told, told.new_ones(B, row.shape[1] - told.shape[1])], dim=1)
        states: Tensor = self.language(row, real)
        return states[:, -1].float()

    def _build_light(self, text_width: int) -> int:
        config, io = self.config, self.io
        self.proj = CrossModalityProjector(io.features["fine"].channels, config.token_width)
        per_frame = {name: math.prod(io.features[name].shape[:-1]) for name in self.reads}
        tokens = per_frame["fine"] + per_frame.get("coarse", 0) * (config.n_obs - 1)
        self.mix = nn.Linear(tokens * config.token_width, config.width)
        self.told = nn.Linear(text_width, config.width)
        return config.width

    def _build_llm(self) -> int:
        config, fine = self.config, self.io.features["fine"]
        assert config.llm_sizes is not None
        planner, weights, width = config.planner, config.llm_weights, config.llm_sizes.hidden
        self.proj = CrossModalityProjector(fine.channels, width)
        self.tvi = TVIEmbedder(width, config.max_time, fine.views, angle=config.angle is not None)
        self.act_token = nn.Embedding(1, width)
        nn.init.normal_(self.act_token.weight, std=EMBEDDING_STD)

        def load() -> nn.Module:
            return load_language(weights) if planner is None else read_published(planner).build_language()

        self.language = LanguageModel(config.llm_sizes, config.llm, load)
        if self.language.frozen is not None:
            self.frozen["llm"] = self.language.frozen
        return width

    def _refuse_contradictions(self) -> None:
        config, io = self.config, self.io
        if self.waypoints and io.action_dim != 3:
            raise UsageError(f"waypoints of {io.action_dim} numbers", expected="x, y and heading")
        if not self.waypoints and (config.tanh == "xy" or config.alpha_xy is not None or config.planner is not None):
            found = "tanh=xy, alpha_xy and planner over labels that are no waypoints"
            raise UsageError(found, expected="waypoints", fix="--set data.target=waypoints")
        if self.waypoints and config.norm_stats is not None:
            raise UsageError("norm_stats over waypoints", expected="alpha_xy, or neither")
        if config.planner is not None and (config.variant != "llm" or config.alpha_xy is not None):
            found = f"model.planner with variant {config.variant} and alpha_xy {config.alpha_xy}"
            raise UsageError(found, expected="variant llm, and the planner's own alpha")
        if config.angle is not None and config.variant != "llm":
            raise UsageError("model.angle with variant light", expected="variant llm")
        if config.n_obs > config.max_time:
            raise UsageError(f"n_obs {config.n_obs}", expected=f"at most max_time, {config.max_time}")
        shapes = [io.features[name] for name in self.reads]
        if len({(shape.views, shape.channels) for shape in shapes}) > 1:
            found = f"coarse {shapes[0].shape} and fine {shapes[1].shape}"
            raise UsageError(found, expected="as many views and channels in both")
        assert io.text is not None
        if config.variant == "llm" and io.text.length > config.max_text:
            most, length = config.max_text, io.text.length
            fix = f"vla featurize --backbone text --set options.length={most}, or --set model.max_text={length}"
            raise UsageError(f"instructions of {length} tokens", expected=f"at most {most}", fix=fix)
