"""A language model inside a head: run frozen, trained whole, or trained through low-rank adapters (LoRA).

Hu et al. 2021, https://arxiv.org/abs/2106.09685; the layers are peft's. Frozen weights stay outside the head's
checkpoint (frozen.py); gradients flow through them to whatever made the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla.heads.frozen import Frozen
from vla.pretrained.language import LanguageSizes, build_language
from vla.stores.errors import MachineError, missing_extra

Tuning = Literal["frozen", "full", "lora"]
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
"""OpenTrackVLA's design names these; so does peft's own guide for decoders."""


class LanguageModel(nn.Module):
    """Embeddings and mask -> last hidden states. `load` returns the pretrained network, its weights final.

    "full": the network is a part of the head and starts at random until `start`. "lora": adapters are parts of the
    head, named as peft names them with "/" for ".", and start as peft's do: the first at random, the second at 0.
    """

    def __init__(self, sizes: LanguageSizes, tuning: Tuning, load: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.sizes, self.tuning, self._load = sizes, tuning, load
        self.model = build_language(sizes) if tuning == "full" else None
        self.frozen = None if tuning == "full" else Frozen(load if tuning == "frozen" else lambda: with_lora(load()))
        self.lora = nn.ParameterDict()
        if tuning == "lora":
            with torch.device("meta"):
                skeleton = with_lora(build_language(sizes))
            for name, place in skeleton.named_buffers():
                if ".lora_" in name:
                    adapter = torch.zeros(place.shape)
                    if ".lora_A." in name:
                        nn.init.kaiming_uniform_(adapter, a=math.sqrt(5))
                    self.lora[name.replace(".", "/")] = nn.Parameter(adapter)

    def start(self) -> None:
        """Take the pretrained weights where the network is trained whole."""
        if self.model is not None:
            self.model.load_state_dict(self._load().state_dict())

    def embed(self, ids: Tensor) -> Tensor:
        """Look token ids [...] up: [..., D]."""
        network: Any = self.model if self.frozen is None else self.frozen.module
        embedded: Tensor = network.get_input_embeddings()(ids)
        return embedded

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states [B, L, D] of embeddings [B, L, D]; mask bool [B, L] is False for padding.

        Positions count real tokens only: however much padding stands before them, they are the same.
        """
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask.long(), "position_ids": positions, "use_cache": False}
        network: Any = self.model if self.frozen is None else self.frozen.module
        if self.tuning == "lora":
            network.train(self.training)  # for the adapters' dropout: Qwen3 has none
            adapters = {name.replace("/", "."): value for name, value in self.lora.items()}
            out: Any = torch.func.functional_call(network, adapters, (), inputs)
        else:
            out = network(**inputs)
        hidden: Tensor = out.last_hidden_state
        return hidden


def with_lora(network: nn.Module) -> nn.Module:
    """Put peft's layers into a network, in place, with empty buffers where the adapters will be.

    The adapters themselves belong to the head: each of its copies, as the moving average is one, has its own. Raises
    `MachineError` where peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MachineError("LoRA needs peft", fix=missing_extra("lora")) from None
    network = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), network)
    for name, module in network.named_modules():
        if ".lora_" in name and isinstance(module, nn.Linear):
            shape = module.weight.shape
            del module.weight
            module.register_buffer("weight", torch.zeros(shape), persistent=False)
    return network.eval()
