"""`hier`: pi0.5's hierarchy. A language model says what to do next, an expert does it.

What is seen and the high-level prompt -> the subtask, as text (cross-entropy with teacher forcing). What is seen and
the low-level prompt, which holds the subtask -> a chunk of actions (flow matching in pi0's convention, fm.py). The loss
is L_text + alpha L_action, and the gradient of L_action reaches no parameter of the language model.

Two variants with the same losses: "light", small networks from scratch over any cached features (hier_light.py); and
"full", PaliGemma's language model over cached SigLIP tokens with pi0.5's expert (hier_full.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoded import fit_encoders
from vla.heads.fast import FastTokenizer, read_mapping
from vla.heads.fast_speech import FastSpeaker
from vla.heads.flow import flow_errors, flow_sample
from vla.heads.frozen import Frozen
from vla.heads.hier_config import HierConfig
from vla.heads.hier_full import TOKENS, FullActor, FullLanguage, fast_ids, load_full
from vla.heads.hier_light import LightActor, LightLanguage
from vla.heads.hier_parts import Actor, Language, Record
from vla.heads.hier_told import LABELS, Form, HierTexts
from vla.heads.model import SMALL_NET, HeadConfig, HeadModel, masked_mean, real_dims
from vla.heads.needs import Need
from vla.heads.nets.speech import Observed, Prompt, TokenErrors, append, say, teach
from vla.heads.normalize import Normalizer
from vla.heads.pi0_weights import check_backbones
from vla.heads.prompts import ACTION, action_prompt, clean, subtask_prompt
from vla.heads.told import Telling
from vla.heads.vocabulary import WordTokenizer
from vla.pretrained.weights import RANDOM
from vla.stores.errors import DataError, UsageError
from vla.training.processes import Divisors, divisor

if TYPE_CHECKING:
    from vla.heads.data import HeadData

FULL = {"steps": 30_000, "lr": 2.5e-5, "betas": (0.9, 0.95), "weight_decay": 0.01, "warmup_steps": 1000}
"""The optimiser of LeRobot's pi05 (configuration_pi05.py), its schedule but for the floor."""


@dataclass(frozen=True)
class HierOutput:
    """One training pass, element by element. What a mode does not train is None.

    `total`: the scalar loss. `text`, `fast`: errors of the subtask's tokens and of the FAST ids. `action` [B, H, A]:
    squared errors of the velocity, counted where `action_valid` and `action_dims` of the batch say so.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    text: TokenErrors | None = None
    fast: TokenErrors | None = None
    action: Tensor | None = None


class HierHead(HeadModel):
    """See the module. `language`: what reads, speaks and trains, None in mode "expert"; `actor`: what makes the
    velocity [B, H, A], None where no flow is trained."""

    Config: ClassVar[type[HeadConfig]] = HierConfig
    adjustable: ClassVar[frozenset[str]] = frozenset({"n_action", "sample_steps", "subtask_interval"})
    config: HierConfig

    def __init__(self, config: HierConfig, io: HeadIO) -> None:
        super().__init__(config, io)
        self.speaks, self.moves = config.mode != "expert", config.mode in ("joint", "expert")
        lacking = [name for name in LABELS if not io.labels or any(name not in label for label in io.labels)]
        if self.speaks and lacking:
            raise UsageError(
                f"mode {config.mode!r} needs labels, and the episodes have no {lacking[0]}",
                expected="a store of --source hierarchical runs",
                fix="--set model.mode=expert to train the actions alone",
            )
        self._columns = io.state_columns(config.encoder.state_columns)
        self.proprio = Normalizer(io.state_dim) if self._columns else None
        self.texts = HierTexts(config, io, self._columns, speaks=self.speaks)
        self.tokenizer = self.texts.tokenizer
        light = config.variant == "light"
        self.fast: FastTokenizer | None = None
        words = self.tokenizer.size
        if config.fast is not None:
            self._load_fast(Path(config.fast))
            words = max(words, int(self._fast_ids.max()) + 1)
        self.language: Language | None = None
        self.actor: Actor | None = None
        if self.speaks:
            self.language = LightLanguage(config, io, words) if light else FullLanguage(config, io, words)
        elif not light:
            self.frozen["language"] = Frozen(lambda: FullLanguage(config, io, words).load())
        if not light:
            self.frozen["tokenizer"] = Frozen(lambda: Record(self.texts.said()))
        if self.moves:
            known = self.tokenizer
            self.actor = LightActor(config, io, known) if isinstance(known, WordTokenizer) else FullActor(config, io)

    def _load_fast(self, folder: Path) -> None:
        config, io = self.config, self.io
        fast = FastTokenizer.load(folder, config.horizon, io.action_dim)
        if fast.action_norm not in (None, config.action_norm):
            raise UsageError(
                f"{folder} was fitted behind action_norm {fast.action_norm!r}",
                expected=config.action_norm,
                fix=f"--set model.action_norm={fast.action_norm}",
            )
        if config.fast_mapping is not None:
            self._fast_ids = torch.from_numpy(read_mapping(Path(config.fast_mapping), fast.size))
        else:
            weights = RANDOM if config.variant == "light" else config.weights
            self._fast_ids = fast_ids(weights, self.tokenizer.size, fast.size)
        said = [*fast.tokenizer.to_str().encode(), *self._fast_ids.tolist(), fast.min_token, round(fast.scale * 1e6)]
        self.fast, self.frozen["fast"] = fast, Frozen(lambda: Record(said))

    @classmethod
    def needs(cls, config: Any) -> tuple[Need, ...]:
        """See `HeadModel.needs`."""
        return (Need("siglip", "siglip-prefix"),) if config.variant == "full" else ()

    @classmethod
    def defaults(cls, model: Mapping[str, Any]) -> dict[str, Any]:
        """See `HeadModel.defaults`. Without an action branch the best checkpoint is the one that speaks best."""
        best = {"best_metric": "subtask_perplexity"} if model.get("mode") == "high-level" else {}
        return {**(FULL if model.get("variant") == "full" else {**SMALL_NET, "lr": 1e-3}), **best}

    @property
    def acts(self) -> bool:
        """See `HeadModel.acts`."""
        return self.config.mode != "high-level"

    @property
    def not_exported(self) -> str:
        """See `HeadModel.not_exported`."""
        if self.config.mode == "fast":
            return "mode 'fast' says its actions id by id, in a loop whose length no fixed program knows"
        return "" if self.moves else f"mode {self.config.mode!r} has no action branch"

    def telling(self) -> Telling:
        """See `HeadModel.telling`: the low-level prompt. What mode "joint" says, it may say in any words."""
        said = "the subtask that the live head says (HierHead.subtasks): its language model speaks word by word"
        return Telling(
            form=ACTION,
            what=said if self.speaks else "the subtask",
            texts=self.texts.tasks,
            of=self.subtasks,
            tokenizer=self.tokenizer,
            source=self.texts.source,
            max_tokens=self.config.max_tokens,
            state=self.proprio,
            columns=self._columns,
            free=self.speaks,
        )

    @property
    def instructions(self) -> tuple[str, ...]:
        """See `HeadModel.instructions`: the data's own, behind them the high-level tasks."""
        return self.texts.instructions

    @property
    def plan_interval(self) -> int | None:
        """See `HeadModel.plan_interval`."""
        return self.config.subtask_interval if self.speaks else None

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return self._columns

    @property
    def meaning(self) -> dict[str, Any]:
        """See `HeadModel.meaning`."""
        return super().meaning | {"encoder.state_columns": list(self._columns)}

    @property
    def state(self) -> Normalizer | None:
        """See `HeadModel.state`."""
        return self.proprio

    @property
    def reads(self) -> dict[str, int]:
        """See `HeadModel.reads`."""
        if self.config.variant == "full":
            return {TOKENS: 1}
        return dict.fromkeys(self.io.features if self.config.encoder.use_features else (), self.config.n_obs)

    @property
    def net(self) -> nn.Module:
        """What gives the velocity. Raises `UsageError` in a mode that trains no actions."""
        if self.actor is None:
            raise UsageError(f"mode {self.config.mode!r} has no action branch", expected="mode joint or expert")
        return self.actor.net

    def prepare(self, data: HeadData) -> None:
        """Fit normalisers and feature scales; take published weights."""
        super().prepare(data)
        fit_encoders(self, data)
        if self.config.variant == "full":
            check_backbones(data, self.config.weights, None)
        load_full(self.language, self.actor)

    def check_reach(self, data: HeadData) -> None:
        """See `HeadModel.check_reach`: FAST ids say actions in the range that they were fitted to."""
        super().check_reach(data)
        if self.fast is not None:
            centre, scale = self.action.centre.cpu().numpy(), self.action.scale.cpu().numpy()
            self.fast.require_statistics(centre, scale, Path(str(self.config.fast)))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many elements each part of the loss counts: tokens of "text" and "fast", whole chunks, actions."""
        counts: dict[str, Tensor] = {}
        if self.language is not None:
            counts["text"] = self._subtask_row(batch)[2][:, 1:].sum()
            if self.fast is not None:
                counts |= {"fast": self._fast_row(batch)[2][:, 1:].sum(), "chunk": self._whole(batch).sum()}
        return counts | (super().counts(batch) if self.actor is not None else {})

    def loss(self, batch: Batch, divisors: Divisors | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_text + alpha L_action, or what of it the mode trains, and its parts. Raises `DataError` where the
        batch lacks actions or labels that the mode needs."""
        output = self.outputs(batch, divisors)
        return output.total, output.metrics

    def outputs(self, batch: Batch, divisors: Divisors | None = None) -> HierOutput:
        """Return the losses element by element.

        A window without one valid step is padding: nothing of it counts. FAST ids mix the steps of a chunk, so a chunk
        that is partly padding has none that could be counted.
        """
        self.check(batch)
        total, metrics = torch.zeros((), device=batch.task.device), {}
        text = fast = action = None
        if self.language is not None:
            observed = self.language.observe(batch)
            text = self._teach_subtask(batch, observed)
            spoken = text.mean(None if divisors is None else divisors["text"])
            total, metrics["text_loss"] = total + spoken, spoken.detach()
            if self.fast is not None:
                fast = self._teach_fast(batch, observed)
                coded = fast.mean(None if divisors is None else divisors["fast"])
                total, metrics["fast_loss"] = total + coded, coded.detach()
                metrics["fast_saturated"] = self._saturated(batch, divisors)
        if self.actor is not None:
            action = self.errors(batch, self.labels(batch))
            mean, share = masked_mean(action, batch, divisors)
            weight = self.config.alpha if self.speaks else 1.0
            total, metrics = total + weight * mean, metrics | share | {"action_loss": mean.detach()}
        return HierOutput(total, metrics, text, fast, action)

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the velocity, told the subtask that was demonstrated."""
        context = self._context(batch, self._prompt(batch, action_prompt, self._told(batch, "subtask")))
        return flow_errors(lambda x, t: self.net(x, t, *context), batch, action, self.config.time)

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Say the subtask (unless `Batch.plan` holds one, or a prompt is given), then integrate from noise, or say FAST
        ids."""
        if not self.acts:
            raise UsageError(f"mode {self.config.mode!r} makes no actions", expected="mode joint, fast or expert")
        if self.fast is not None:
            return self._say_fast(batch, self.subtasks(batch))
        prompt = batch.prompt
        if prompt is None:
            prompt = self._prompt(batch, action_prompt, self.subtasks(batch))
        context = self._context(batch, prompt)
        shape, like = (len(batch), self.config.horizon, self.io.action_dim), self.action.centre
        steps = self.config.sample_steps
        return flow_sample(
            lambda x, t: self.net(x, t, *context), batch, shape, like, generator, steps=steps, sampler="euler"
        )

    @torch.inference_mode()
    def plan(self, batch: Batch) -> Tensor | None:
        """Say each window's subtask, unless it is what the instruction is: its ids [B, K] int64, -1 behind the end.
        None in mode "expert"."""
        if self.language is None:
            return None
        ordered = self.texts.ordered(batch)
        said = self._say_subtasks(batch) if None in ordered else [[] for _ in ordered]
        said = [
            ids if text is None else self.tokenizer.encode(clean(text)) for ids, text in zip(said, ordered, strict=True)
        ]
        plan = torch.full((len(said), max(1, *map(len, said))), -1)
        for row, ids in zip(plan, said, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return plan.to(batch.task.device)

    def _say_subtasks(self, batch: Batch) -> list[list[int]]:
        assert self.language is not None
        prompt = self._prompt(batch, subtask_prompt, self._told(batch, "high_level_task"))
        ends = {self.tokenizer.pad, self.tokenizer.bos}
        silent = torch.tensor(sorted(ends), device=batch.task.device)
        size = self.tokenizer.size

        def choose(scores: Tensor) -> Tensor:
            words = scores[:, :size].index_fill(1, silent, -torch.inf)
            if self.fast is not None:
                ours = self._fast_ids[self._fast_ids < size].to(scores.device)
                words = words.index_fill(1, ours, -torch.inf)
            return words.argmax(dim=1)

        model, limit = self.language.model, self.config.max_subtask
        return say(model, self.language.observe(batch), prompt, choose, self.tokenizer.eos, limit)

    def subtasks(self, batch: Batch) -> list[str]:
        """Return the subtask of each window as text: that of `Batch.plan`, else the one that the language model says;
        in mode "expert" the one that is told."""
        if not self.speaks:
            return self._told(batch, "subtask")
        plan = self.plan(batch) if batch.plan is None else batch.plan
        assert plan is not None
        return [self.tokenizer.decode([number for number in ids if number >= 0]) for ids in plan.tolist()]

    @torch.no_grad()
    def measure(self, batch: Batch, chunk: Tensor) -> dict[str, Tensor]:
        """Measure speech where there are labels.

        Of each token of the demonstrated subtask, with teacher forcing, whether it was the likeliest, and its nats; of
        each window, whether the subtask that is said is that one.
        """
        if self.language is None or batch.label is None:
            return {}
        errors = self._teach_subtask(batch, self.language.observe(batch))
        wanted = [clean(text) for text in self._told(batch, "subtask")]
        exact = [clean(said) == text for said, text in zip(self.subtasks(batch), wanted, strict=True)]
        return {
            "subtask_token_accuracy": errors.correct[errors.counted].float(),
            "subtask_perplexity": errors.error[errors.counted],
            "subtask_exact_match": torch.tensor(exact, dtype=torch.float32),
        }

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Return means, and of the nats the perplexity: exp of their mean."""
        figures = super().summarise(measured)
        if "subtask_perplexity" in figures:
            figures["subtask_perplexity"] = math.exp(figures["subtask_perplexity"])
        return figures

    def _context(self, batch: Batch, prompt: Prompt) -> tuple[Any, ...]:
        assert self.actor is not None
        language = self.frozen["language"].module if "language" in self.frozen else self.language
        return self.actor.context(language, batch, prompt)

    def _told(self, batch: Batch, name: str) -> list[str]:
        return self.texts.told(batch, name)

    def _prompt(self, batch: Batch, form: Form, texts: Sequence[str]) -> Prompt:
        ids, valid, _ = self.texts.tokens(batch, form, texts, self.proprio)
        return ids, valid

    def _teach_subtask(self, batch: Batch, observed: Observed) -> TokenErrors:
        assert self.language is not None
        ids, valid, answer = self._subtask_row(batch)
        return teach(self.language.model, observed, (ids, valid), answer)

    def _subtask_row(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, valid and answer [B, L] of the high-level prompts with the demonstrated subtasks behind."""
        if batch.label is None:
            raise DataError("the batch has no labels", expected="the subtask of each window")
        answers = [clean(text) for text in self._told(batch, "subtask")]
        tasks = self._told(batch, "high_level_task")
        ids, valid, answer = self.texts.tokens(batch, subtask_prompt, tasks, self.proprio, answers)
        if batch.action_valid is not None:
            answer = answer & batch.action_valid.any(dim=1)[:, None]
        return ids, valid, answer

    def _teach_fast(self, batch: Batch, observed: Observed) -> TokenErrors:
        assert self.language is not None
        ids, valid, answer = self._fast_row(batch)
        return teach(self.language.model, observed, (ids, valid), answer)

    def _fast_row(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, valid and answer [B, L] of the low-level prompts with the FAST ids of the actions behind."""
        assert self.fast is not None
        chunks = self.fast.encode(self.labels(batch).cpu().numpy())
        prompt = self._prompt(batch, action_prompt, self._told(batch, "subtask"))
        answers = [[*self._fast_ids[ids].tolist(), self.tokenizer.eos] for ids in chunks]
        ids, valid, answer = append(prompt, answers, self.tokenizer.pad)
        return ids, valid, answer & self._whole(batch)[:, None]

    def _whole(self, batch: Batch) -> Tensor:
        """Return which chunks have no padded step, bool [B]."""
        whole = torch.ones(len(batch), dtype=torch.bool, device=batch.task.device)
        return whole if batch.action_valid is None else batch.action_valid.all(dim=1)

    def _saturated(self, batch: Batch, divisors: Divisors | None) -> Tensor:
        """Return the share of coefficients that FAST ids cannot say, of chunks that are trained on."""
        assert self.fast is not None
        beyond = torch.from_numpy(self.fast.saturated(self.labels(batch).cpu().numpy())).to(batch.task.device)
        whole = self._whole(batch)
        return beyond[whole].float().sum() / (divisor(divisors, "chunk", whole.sum()) * beyond[0].numel())

    def _say_fast(self, batch: Batch, subtasks: Sequence[str]) -> Tensor:
        assert self.language is not None
        assert self.fast is not None
        speaker = FastSpeaker(self.fast, self._fast_ids.to(batch.task.device), self.tokenizer.eos, len(batch))
        prompt = self._prompt(batch, action_prompt, subtasks)
        observed = self.language.observe(batch)
        said = say(self.language.model, observed, prompt, speaker.choose, self.tokenizer.eos, speaker.limit)
        chunks = np.stack([self.fast.decode(ids) for ids in speaker.back(said)])
        return real_dims(batch, torch.from_numpy(chunks).to(batch.task.device))
