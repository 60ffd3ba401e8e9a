"""Instructions as token ids and embeddings, once for each distinct text.

The tokenizer is the model's own, through transformers; `embedding` is what a language model looks its ids up in (a
pure lookup, before any layer: what a head that runs the language model itself starts from), or the last hidden states
of a text encoder. Heads find the row of an instruction by its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import transformers
from pydantic import Field
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.pretrained.hub import TOKENIZER_FILES, find_model, load_model, read_model_config, weight_files
from vla.pretrained.inference import count_parameters, frozen_inference
from vla.pretrained.weights import RANDOM, digest_files, digest_tensors
from vla.stores.errors import DataError, MachineError, UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS, PlainText

DEFAULT_ID = "Qwen/Qwen3-0.6B"
"""The language model of OpenTrackVLA's planner; Apache-2.0."""

TABLES = ("embed_tokens.weight", "wte.weight", "shared.weight", "token_embedding.weight", "word_embeddings.weight")
"""How the tables of input embeddings end in checkpoints: Llama, Gemma and Qwen; GPT-2; T5; CLIP and SigLIP; BERT."""

TINY_WIDTH, PAD = 32, "<pad>"


class TextSettings(Settings):
    """Which tokenizer and model, and what is kept.

    `weights`: a folder in the hub's layout with tokenizer.json, a hub id, "random" (bytes as tokens, a tiny random
    table), or None for the published default. `embedding`: "table" (input embeddings), "encoder" (last hidden states of
    the whole model), or "none" (ids alone). `length`: tokens kept for each text; a longer text is refused, never cut.
    `side`: where padding goes; left keeps the last token in its place whatever the batch. `template`: what is told,
    with `{instruction}` in it. `special_tokens`: add those of the tokenizer, such as one for the beginning. `seed`: of
    random weights.
    """

    weights: Annotated[str | None, WEIGHTS] = None
    embedding: Literal["table", "encoder", "none"] = "table"
    length: int = Field(64, ge=1, le=4096)
    side: Literal["left", "right"] = "left"
    template: Annotated[str, PlainText()] = Field("{instruction}", pattern=r"\{instruction\}")
    special_tokens: bool = True
    seed: int = Field(0, ge=0)


class Text:
    """`ids` int32 [L], `mask` uint8 [L] (1 where there is a token), and `embedding` [L, D], padded to L = `length`."""

    settings_type: ClassVar[type[Settings]] = TextSettings

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self._table: torch.Tensor | None = None
        self._encoder: torch.nn.Module | None = None
        if settings.weights == RANDOM:
            self._random()
        else:
            self._load(settings.weights or DEFAULT_ID)
        pad = self._tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else self._tokenizer.eos_token_id or 0)

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, length = self.settings, self.settings.length
        features = {
            "ids": FeatureSpec((length,), ("token",), "int32"),
            "mask": FeatureSpec((length,), ("token",), "uint8"),
        }
        if self._width:
            features["embedding"] = FeatureSpec((length, self._width), ("token", "channel"))
        kept = ("embedding", "length", "side", "template", "special_tokens")
        return BackboneSpec(
            name="text",
            features=features,
            identity={**self._identity, **{name: getattr(settings, name) for name in kept}, "pad": self._pad},
            code_licence="Apache-2.0 (transformers)",
            weights_licence="none (random)" if settings.weights == RANDOM else "the model's own; see its card",
            random_weights=settings.weights == RANDOM and bool(self._width),
            parameters=self._parameters,
            inputs=("instruction",),
            per="instruction",
        )

    def preprocess(self, view: Mapping[str, Any]) -> torch.Tensor:
        """Turn {"instruction": str} into ids and mask, int64 [2, L]. Raises `DataError` for a text that is too long."""
        settings = self.settings
        text = settings.template.replace("{instruction}", view["instruction"])
        ids = self._tokenizer(text, add_special_tokens=settings.special_tokens)["input_ids"]
        missing = settings.length - len(ids)
        if missing < 0 or not ids:
            found = f"{view['instruction']!r} has {len(ids)} tokens"
            raise DataError(found, expected=f"1 to {settings.length}", fix="--set options.length=N")
        padding, ones = [self._pad] * missing, [1] * len(ids)
        rows = (
            (padding + ids, [0] * missing + ones) if settings.side == "left" else (ids + padding, ones + [0] * missing)
        )
        return torch.tensor(rows)

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn ids and masks [B, 1, 2, L] into {"ids", "mask": [B, 1, L], "embedding": [B, 1, L, D]}, float32."""
        ids, mask = images.to(self.device, non_blocking=True).unbind(dim=2)
        features = {"ids": ids.double(), "mask": mask.float()}
        with frozen_inference(self.device):
            if self._table is not None:
                features["embedding"] = self._table[ids].float()
            elif self._encoder is not None:
                # One text at a time: what a text means never depends on the others of its batch.
                states = [self._encode_one(*pair) for pair in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True)]
                features["embedding"] = torch.stack(states).reshape(*ids.shape, self._width)
        return features

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self._table = self._table if self._table is None else self._table.to(device)
        self._encoder = self._encoder if self._encoder is None else self._encoder.to(device)
        self.device = device

    def _encode_one(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert self._encoder is not None
        real = mask.bool()
        states = self._encoder(input_ids=ids[real][None]).last_hidden_state[0]
        out = torch.zeros(len(ids), self._width, device=ids.device)
        out[real] = states.float()
        return out

    def _random(self) -> None:
        if self.settings.embedding == "encoder":
            raise UsageError("random weights have no text encoder", expected='embedding "table" or "none"')
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([PAD, *alphabet])}, merges=[]))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        plain.decoder = decoders.ByteLevel()
        self._tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=PAD)
        if self.settings.embedding == "table":
            generator = torch.Generator().manual_seed(self.settings.seed)
            self._table = torch.randn(len(alphabet) + 1, TINY_WIDTH, generator=generator)
        self._width = TINY_WIDTH if self._table is not None else 0
        self._parameters = 0 if self._table is None else self._table.numel()
        weights = {"weights_sha256": digest_tensors({"table": self._table})} if self._table is not None else {}
        self._identity = {"network": "byte tokens", "weights": RANDOM, "seed": self.settings.seed, **weights}

    def _load(self, name: str) -> None:
        fix = f"`hf download {name} --local-dir weights/text` where there is a network, then --weights weights/text"
        folder = find_model(name, fix, TOKENIZER_FILES)
        if not (folder / "tokenizer.json").is_file():
            raise MachineError(f"no tokenizer.json in {folder}", expected="a fast tokenizer", fix=fix)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} has no sound tokenizer: {str(error).partition(chr(10))[0]}") from None
        kind, config_sha256 = read_model_config(folder)
        identity: dict[str, Any] = {"network": kind, "config_sha256": config_sha256}
        identity["tokenizer_sha256"] = digest_files([folder / "tokenizer.json"])
        self._width = self._parameters = 0
        if self.settings.embedding == "encoder":
            encoder: Any = load_model(transformers.AutoModel, folder)
            self._encoder = encoder
            self._width, self._parameters = int(encoder.config.hidden_size), count_parameters(encoder)
        elif self.settings.embedding == "table":
            self._table = read_table(folder)
            self._width, self._parameters = self._table.shape[1], self._table.numel()
            if len(self._tokenizer) > len(self._table):
                found = f"{folder} has {len(self._tokenizer)} tokens and embeddings of {len(self._table)}"
                raise DataError(found, expected="tokenizer and weights of one model")
        if self._width:
            identity["weights_sha256"] = digest_files(weight_files(folder))
        self._identity = identity


def read_table(folder: Path) -> torch.Tensor:
    """Return the input embeddings [tokens, D] of a model in its own dtype, reading nothing else of its files.

    Raises `DataError` where there is no one table of a known name.
    """
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(TABLES)]  # noqa: SIM118 - no mapping
            found |= {name: tensors.get_tensor(name) for name in names if "vision" not in name}
    if len(found) != 1:
        listing = ", ".join(sorted(found)) or "none"
        raise DataError(f"{folder} has {len(found)} tables of input embeddings ({listing})", expected="one")
    return next(iter(found.values()))
