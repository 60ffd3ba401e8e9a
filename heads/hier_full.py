"""`hier`, full: PaliGemma's language model over cached SigLIP tokens, pi0.5's expert over its keys and values.

The expert attends to keys and values of the language model that are detached, both: detaching the embeddings alone, as
the origin does, lets the action loss into the language model through every layer's attention.
"""

from __future__ import annotations

import torch
from torch import nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.hier_config import HierConfig
from vla.heads.hier_parts import Actor, Language
from vla.heads.nets.pi0_expert import Pi05Net
from vla.heads.nets.prefix import PrefixCache, PrefixModel
from vla.heads.nets.speech import Observed, Prompt, prefix_cache
from vla.heads.pi0_weights import load_expert, load_language, network_sizes
from vla.pretrained.pi0 import VARIANTS, gemma_config
from vla.pretrained.weights import RANDOM
from vla.stores.errors import UsageError

TOKENS = "siglip"
SKIPPED = 128
"""PaliGemma's last ids are its segmentation tokens; openpi's FAST ids end before them (`_fast_skip_tokens`)."""


class FullLanguage(Language):
    """The language model of `config.weights`, its sizes now, its weights with `load`. `words`: ids that it has to know.

    Ids beyond those of the checkpoint begin as the mean of its embeddings.
    """

    def __init__(self, config: HierConfig, io: HeadIO, words: int) -> None:
        super().__init__()
        self.weights, self.seed = config.weights, config.seed
        sizes = network_sizes(config.weights).language
        if io.features[TOKENS].channels != sizes.hidden_size:
            raise UsageError(
                f"{TOKENS!r} is {io.features[TOKENS].channels} wide and the language model {sizes.hidden_size}",
                expected="image tokens and language model of one checkpoint",
                fix=f"vla featurize --backbone siglip-prefix --weights {config.weights}",
            )
        sizes.vocab_size = max(words, sizes.vocab_size)
        self.model = PrefixModel(sizes)

    def load(self) -> FullLanguage:
        """Take the checkpoint's weights. Raises what reading them raises."""
        tensors = load_language(self.weights, self.seed).state_dict()
        table, own = tensors["language.embed_tokens.weight"], self.model.config.vocab_size
        grown = table.mean(dim=0).expand(own - len(table), -1)
        self.model.load_state_dict({**tensors, "language.embed_tokens.weight": torch.cat([table, grown])})
        return self

    def observe(self, batch: Batch) -> Observed:
        """See `Language.observe`."""
        tokens = batch.feature(TOKENS)[:, -1]  # [B, V, P, C]
        mask = batch.feature_valid.get(TOKENS)
        valid = torch.ones(tokens.shape[:3], dtype=torch.bool, device=tokens.device) if mask is None else mask[:, -1]
        return tokens.float().flatten(1, 2), valid.flatten(1)


class FullActor(Actor):
    """The expert and the projections of `config.weights` where it is a checkpoint of pi0.5, else new ones."""

    net: Pi05Net

    def __init__(self, config: HierConfig, io: HeadIO) -> None:
        super().__init__()
        self.weights = config.weights
        sizes = network_sizes(config.weights)
        if sizes.adaptive is False:
            raise UsageError(
                f"{config.weights} is a checkpoint of pi0, whose expert has no adaptive norms",
                expected="one of pi0.5 or PaliGemma",
                fix="--set model.weights=lerobot/pi05_base",
            )
        if io.action_dim > sizes.max_action:
            raise UsageError(f"{io.action_dim} actions", expected=f"at most {sizes.max_action}, as pi0.5 has them")
        self.net = Pi05Net(sizes.expert or gemma_config(*VARIANTS["gemma_300m"]), io.action_dim, sizes.max_action)

    def load(self) -> None:
        """Take the checkpoint's expert and projections, where it has them. Raises what reading them raises."""
        load_expert(self.net, self.weights)

    def context(self, language: Language | None, batch: Batch, prompt: Prompt) -> tuple[PrefixCache]:
        """Return the prefix's keys and values, cut off from the language model."""
        assert language is not None
        return (prefix_cache(language.model, language.observe(batch), prompt),)


def fast_ids(weights: str, known: int, count: int) -> torch.Tensor:
    """Return the language model's ids for FAST ids 0 to count - 1, int64 [count]: openpi's of a published model
    (vocabulary - 1 - 128 - id), behind all `known` ids of random weights."""
    # On the CPU by name: a checkpoint's head is first built without memory, on the device "meta".
    if weights == RANDOM:
        return torch.arange(known, known + count, device="cpu")
    vocabulary = int(network_sizes(weights).language.vocab_size)
    return vocabulary - 1 - SKIPPED - torch.arange(count, device="cpu")


def load_full(language: nn.Module | None, actor: nn.Module | None) -> None:
    """Take published weights, before the first step of a run."""
    for part in (language, actor):
        if isinstance(part, FullLanguage | FullActor):
            part.load()
