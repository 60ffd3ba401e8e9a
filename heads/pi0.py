"""`pi0`: pi0 (Black et al. 2024, https://arxiv.org/abs/2410.24164) from cached image tokens, with DA3's geometry.

PaliGemma's language model reads image tokens from the store, the instruction and, where wanted, geometry tokens; a
Gemma of its own width, the action expert, attends to its keys and values and gives the velocity of a flow (flow.py).
The vision tower is never loaded: what it makes is in the store. Only the expert with its projections and the geometry
adapter train, unless told otherwise; the language model stays where its weights are (frozen.py).
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GemmaConfig

from vla.heads.batch import Batch, HeadIO
from vla.heads.checkpoint import TrainedHead
from vla.heads.flow import Velocity, flow_errors, flow_sample
from vla.heads.frozen import Frozen
from vla.heads.model import HeadConfig, HeadModel
from vla.heads.needs import Need
from vla.heads.nets.geometry import GeometryTokenAdapter
from vla.heads.nets.pi0_expert import Pi0Net
from vla.heads.nets.prefix import PrefixCache, PrefixModel
from vla.heads.normalize import Normalizer
from vla.heads.pi0_config import IMAGES, RAY_CHANNELS, RAYS, Pi0Config, check_fit
from vla.heads.pi0_weights import check_backbones, load_expert, load_language, network_sizes
from vla.heads.prompts import PLAIN, PromptTokenizer, load_tokenizer, plain_prompt, tokenise
from vla.heads.registry import head_name
from vla.heads.told import Telling
from vla.stores.errors import UsageError

if TYPE_CHECKING:
    from vla.heads.data import HeadData

_tokenizer = functools.lru_cache(maxsize=4)(load_tokenizer)


class Pi0Head(HeadModel):
    """See the module. `net` is the velocity net, `geometry` the adapter (None without)."""

    Config: ClassVar[type[HeadConfig]] = Pi0Config
    train_defaults: ClassVar[dict[str, Any]] = {
        # As openpi and LeRobot fine-tune pi0.5, but that the rate falls to zero and not to 2.5e-6.
        "steps": 30_000,
        "batch_size": 32,
        "lr": 2.5e-5,
        "betas": (0.9, 0.95),
        "weight_decay": 0.01,
        "warmup_steps": 1000,
    }
    adjustable: ClassVar[frozenset[str]] = HeadModel.adjustable | {"use_geom_prefix"}
    kind: ClassVar[Literal["pi0", "pi05"]] = "pi0"
    config: Pi0Config

    def __init__(self, config: Pi0Config, io: HeadIO) -> None:
        super().__init__(config, io)
        self.sizes = network_sizes(config.weights)
        check_fit(self.kind, config, self.sizes, io, len(self.columns))
        self._state = Normalizer(len(self.columns)) if self.columns else None
        self.net = self.make_net(self._expert_config(), io.action_dim)
        self.geometry: GeometryTokenAdapter | None = None
        width = self.sizes.language.hidden_size
        if config.use_geom_prefix:
            self.geometry = GeometryTokenAdapter(
                RAY_CHANNELS,
                config.geom_target_hw,
                width,
                config.geom_init_alpha,
                config.geom_alpha_warmup,
                modality=config.geom_modality_embedding,
            )
        self.language: PrefixModel | None = None
        if config.freeze_language_model:
            self.frozen["language"] = Frozen(lambda: load_language(config.weights, config.seed))
        else:
            self.language = PrefixModel(self.sizes.language).train_for_its_cache()

    @classmethod
    def needs(cls, config: Pi0Config) -> tuple[Need, ...]:
        """See `HeadModel.needs`."""
        images = Need(IMAGES, "siglip-prefix")
        return (images, Need(RAYS, "da3", ("y", "x"))) if config.use_geom_prefix else (images,)

    @property
    def reads(self) -> dict[str, int]:
        """See `HeadModel.reads`: the present frame alone."""
        return {IMAGES: 1, RAYS: 1} if self.config.use_geom_prefix else {IMAGES: 1}

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return tuple(range(self.io.state_dim))

    @property
    def state(self) -> Normalizer | None:
        """See `HeadModel.state`."""
        return self._state

    def make_net(self, expert: GemmaConfig, action_dim: int) -> nn.Module:
        """Return the velocity net around an expert of these sizes."""
        return Pi0Net(expert, action_dim, self.sizes.max_action, self.sizes.max_state)

    def prompts(self, batch: Batch) -> list[str]:
        """Return what each row is told."""
        return [plain_prompt(text) for text in self._tasks(batch)]

    @property
    def tokenizer(self) -> PromptTokenizer:
        """What prompts are made into tokens with."""
        return _tokenizer(self.config.tokenizer or self.config.weights)

    def telling(self) -> Telling:
        """See `HeadModel.telling`."""
        return Telling(
            form=PLAIN,
            what="the instruction",
            texts=self.io.tasks,
            of=self._tasks,
            tokenizer=self.tokenizer,
            source=self.config.tokenizer or self.config.weights,
            max_tokens=self.config.max_tokens,
        )

    def _tasks(self, batch: Batch) -> list[str]:
        return [self.io.tasks[task] for task in batch.task.tolist()]

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the velocity."""
        return flow_errors(self.velocity(batch), batch, action, self.config.time)

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Integrate from noise; the prefix is computed once."""
        config = self.config
        shape = (len(batch), config.horizon, self.io.action_dim)
        return flow_sample(
            self.velocity(batch),
            batch,
            shape,
            self.action.centre,
            generator,
            steps=config.sample_steps,
            sampler=config.sampler,
        )

    def velocity(self, batch: Batch) -> Velocity:
        """Return the velocity for the observations of a batch; what depends on those alone is computed here."""
        prefix = self.prefix(batch)
        state = self.present_state(batch)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            v: Tensor = self.net(x_t, t, prefix, state)
            return v

        return velocity

    def present_state(self, batch: Batch) -> Tensor:
        """Return the normalised state of the present frame, [B, S]; S is 0 where none is read."""
        if self.state is None or batch.state is None:
            return self.action.centre.new_zeros(len(batch), 0)
        return self.state(batch.state[:, -1])  # type: ignore[no-any-return]

    def prefix(self, batch: Batch) -> PrefixCache:
        """Run the language model over images, prompt and geometry, in this order."""
        language: PrefixModel = self.language or self.frozen["language"].module
        device = self.action.centre.device
        if batch.prompt is None:
            most = self.config.max_tokens
            ids, words, _ = tokenise(self.prompts(batch), self.tokenizer, max_length=most, device=device)
        else:
            ids, words = batch.prompt
        images = batch.feature(IMAGES)[:, -1].flatten(1, 2).float()
        real = batch.feature_valid[IMAGES][:, -1].flatten(1) if IMAGES in batch.feature_valid else None
        parts = [(images, torch.ones_like(images[..., 0], dtype=torch.bool) if real is None else real)]
        # Without a gradient to hand on, nothing of a frozen network's inside has to be remembered.
        learns = self.config.use_geom_prefix or self.language is not None
        with nullcontext() if learns else torch.no_grad():
            parts.append((language.embed(ids), words))
            if self.config.use_geom_prefix:
                parts.append(self.geometry_tokens(batch)[:2])
            embeddings, valid = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
            cache: PrefixCache = language(embeddings, valid)
            return cache

    def geometry_tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (tokens [B, P, D], pad_masks bool [B, P], att_masks bool [B, P]) of DA3's rays.

        Raises `UsageError` where the head has no geometry prefix, or it is switched off.
        """
        if self.geometry is None or not self.config.use_geom_prefix:
            raise UsageError("this head has no geometry prefix", fix="--set model.use_geom_prefix=true in training")
        rays = batch.feature(RAYS)[:, -1]
        views = self.config.geom_views
        tokens: tuple[Tensor, Tensor, Tensor] = self.geometry(rays if views is None else rays[:, list(views)])
        return tokens

    def stepped(self) -> None:
        """See `HeadModel.stepped`: the ramp of the geometry."""
        if self.geometry is not None and self.config.use_geom_prefix:
            self.geometry.advance()

    def prepare(self, data: HeadData) -> None:
        """Fit normalisers, compare the stores' backbones with the networks, and load what is trained from `weights`."""
        super().prepare(data)
        config = self.config
        check_backbones(data, config.weights, config.geom_model_id if config.use_geom_prefix else None)
        load_expert(self.net, config.weights)
        if self.language is not None:
            self.language.load_state_dict(load_language(config.weights, config.seed).state_dict())

    def adjust(self, values: Any) -> None:
        """See `HeadModel.adjust`. A geometry prefix can be switched off, never on."""
        if values.get("use_geom_prefix") and self.geometry is None:
            raise UsageError("this head was trained without a geometry prefix", expected="model.use_geom_prefix=false")
        super().adjust(values)

    def _expert_config(self) -> GemmaConfig:
        """Return the sizes of the checkpoint's expert, or of a fresh one that fits its language model."""
        if self.sizes.expert is not None:
            return self.sizes.expert
        text, values = self.sizes.language, self.config
        kept = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
        own = {"hidden_size": values.expert_width, "intermediate_size": values.expert_mlp}
        return GemmaConfig(**{name: getattr(text, name) for name in kept}, **own)


def export_prefix(head: TrainedHead | Pi0Head, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an outside pi0.5 takes as `extra_prefix_embs`, `extra_pad_masks` and `extra_att_masks`.

    [B, P, D] float32, bool [B, P] all True and bool [B, P] all False: P = cameras * rows * columns tokens of the
    language model's width D, to stand behind images and prompt. Neither ramp nor gradient: the head as it acts.
    Raises `UsageError` for a head without a geometry prefix.
    """
    model = head.model if isinstance(head, TrainedHead) else head
    if not isinstance(model, Pi0Head):
        found = f"head {head_name(type(model))!r} has no prefix to export"
        raise UsageError(found, expected="a pi0 or pi05 head")
    with torch.no_grad():
        return model.geometry_tokens(batch)
