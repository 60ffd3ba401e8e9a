"""`hier`, light: small networks from scratch over any cached features, a data set's words as the vocabulary.

The language model is a narrow Gemma (nets/prefix.py) behind an observation encoder of its own. The actor reads the
stored features, which have no gradient to give, through another encoder, and the low-level prompt through its own
embeddings: the two share no parameter, so that neither loss can reach the other's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoders import EncoderConfig, ObservationEncoder
from vla.heads.flow import TIME_SCALE
from vla.heads.hier_config import HierConfig
from vla.heads.hier_parts import Actor, Language
from vla.heads.nets.action_expert import ActionExpert, Seen
from vla.heads.nets.prefix import PrefixModel
from vla.heads.nets.speech import Observed, Prompt
from vla.heads.prompts import BINS
from vla.heads.vocabulary import WordTokenizer
from vla.pretrained.pi0 import gemma_config


class Frames(nn.Module):
    """Window -> what was seen, a token of `width` for each observed frame, [B, N, width], and which are real, [B, N].

    A frame's vector mixes all of its heat maps, each with weights of its own. With a token for each heat map the same
    networks learnt push-v3 more slowly, and erred more on episodes held out.
    """

    def __init__(self, config: HierConfig, io: HeadIO) -> None:
        super().__init__()
        # State and instruction are words of the prompt.
        seen = EncoderConfig.build({**config.encoder.model_dump(), "use_state": False, "use_task": False})
        self.encoder = ObservationEncoder(seen, io, config.n_obs)
        self.to_width = nn.Linear(config.encoder.dim, config.width)
        self.age = nn.Parameter(torch.randn(config.n_obs, config.width))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.to_width(self.encoder.frames(batch)) + self.age, batch.obs_valid


class LightLanguage(Language):
    """A Gemma of `words` tokens, `config.width` wide, from scratch."""

    def __init__(self, config: HierConfig, io: HeadIO, words: int) -> None:
        super().__init__()
        self.frames = Frames(config, io)
        width, heads = config.width, config.heads
        # Gemma's own spread of 0.02 is that of a width of 2048: a narrow one would hand on next to nothing.
        sizes = gemma_config(
            width, 4 * width, config.layers, heads, 1, width // heads, vocab_size=words, initializer_range=width**-0.5
        )
        self.model = PrefixModel(sizes)

    def observe(self, batch: Batch) -> Observed:
        """See `Language.observe`."""
        seen: Observed = self.frames(batch)
        return seen


class WordEmbedding(nn.Module):
    """ids int64 [B, L] -> [B, L, D]. Words have vectors of their own, but the numbers 0..255 lie on one line.

    A pretrained model knows that 137 is beside 138. To one from scratch, numbers with a vector each are names by which
    it learns the demonstrations' frames by heart.
    """

    number_of: Tensor
    is_number: Tensor

    def __init__(self, tokenizer: WordTokenizer, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(tokenizer.size, width)
        self.line = nn.Linear(1, width)
        numbers = tokenizer.numbers
        values = [2 * numbers.get(at, 0) / (BINS - 1) - 1 for at in range(tokenizer.size)]
        self.register_buffer("number_of", torch.tensor(values)[:, None], persistent=False)
        known = [at in numbers for at in range(tokenizer.size)]
        self.register_buffer("is_number", torch.tensor(known)[:, None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        return torch.where(self.is_number[ids], self.line(self.number_of[ids]), self.words(ids))


class LightActor(Actor):
    """An `ActionExpert` that reads the features and the low-level prompt by itself."""

    net: ActionExpert

    def __init__(self, config: HierConfig, io: HeadIO, tokenizer: WordTokenizer) -> None:
        super().__init__()
        width = config.width
        self.frames = Frames(config, io)
        self.words = WordEmbedding(tokenizer, width)
        self.places = nn.Parameter(torch.randn(config.max_tokens, width))  # as large as the words
        H, A = config.horizon, io.action_dim
        self.net = ActionExpert(H, A, width, config.layers, config.heads, config.dropout, TIME_SCALE)

    def context(self, language: Language | None, batch: Batch, prompt: Prompt) -> tuple[Seen]:
        """Return features and prompt as the expert reads them. `language` is not asked."""
        ids, valid = prompt
        seen, real = self.frames(batch)
        told = self.words(ids) + self.places[: ids.shape[1]]
        return (self.net.read(torch.cat([seen, told], dim=1), torch.cat([real, valid], dim=1)),)
