"""Text encoders of the transformers library as text towers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tritower.towers.text import Template, TextPreprocess, TextTower
from tritower.towers.tower import loads_weights, without_weights


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of the transformers library."""

    tokenizer: Any
    max_length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 token ids; the end token stays where a text is cut."""
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length
        )
        return torch.tensor(encoded["input_ids"])

    def lengths_and_fallbacks(self, text: str) -> tuple[int, int, int]:
        """Unknown are the unknown token and single bytes."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        special = self.tokenizer.num_special_tokens_to_add()
        unknown = sum(i == self.tokenizer.unk_token_id for i in ids)
        unknown += sum(
            re.fullmatch(r"<0x[0-9A-F]{2}>", t) is not None
            for t in self.tokenizer.convert_ids_to_tokens(ids)
        )
        return len(ids) + special, min(len(ids) + special, self.max_length), unknown


class HuggingFaceText(TextTower):
    """Any text encoder of the transformers library.

    Args:
        pretrained: name on the Hugging Face hub, or a local folder (config.json, weights, tokenizer
            files).
        pooling: `mean` over a text's tokens, or the `cls` token.
        template: how text fields are joined, e.g. `"{title}. {description}"`; fields that a product
            lacks are left out. Null joins all fields of the catalogue.
        query_prefix: put in front of queries, e.g. `"query: "` for E5 models.
        product_prefix: put in front of products, e.g. `"passage: "` for E5 models.
        max_length: tokens that are read, special tokens included.
        freeze: keep the weights as they are; their features can then be cached.
        freeze_lower: share of the blocks, from the input on, whose weights are kept; 0.5 takes
            about half of the time.
    """

    def __init__(
        self,
        pretrained: str,
        pooling: Literal["mean", "cls"] = "mean",
        template: str | None = None,
        query_prefix: str = "",
        product_prefix: str = "",
        max_length: int = 64,
        freeze: bool = False,
        freeze_lower: float = 0.0,
    ) -> None:
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
        except ImportError:
            raise ImportError(
                "HuggingFaceText needs the transformers library: pip install 'tritower[hf]'"
            ) from None
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        words = HuggingFaceTokenizer(tokenizer, max_length)
        super().__init__(TextPreprocess(words, Template(template), query_prefix, product_prefix))
        self.pooling = pooling
        self.pretrained = loads_weights()
        # Pretrained weights, or the architecture alone for a model folder.
        if self.pretrained:
            self.model = AutoModel.from_pretrained(pretrained)
        else:
            self.model = AutoModel.from_config(AutoConfig.from_pretrained(pretrained))
        self.model.pooler = None  # of its output nothing is read
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            raise ValueError(
                f"The tokenizer of {pretrained!r} has no padding token, so texts cannot be batched."
            )
        self.out_dim = self.model.config.hidden_size
        self.freeze_lower(freeze_lower)
        if freeze:
            self.freeze()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, F)."""
        there = tokens != self.pad_id
        # A text without tokens would be a softmax over nothing.
        there[:, 0] = True
        states = self.model(
            input_ids=tokens, attention_mask=there.long()
        ).last_hidden_state  # (B, L, F)
        if self.pooling == "cls":
            return states[:, 0]
        return (states * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        return {
            **self.wording(),
            "pooling": self.pooling,
            "max_length": self.preprocess.tokenizer.max_length,
        }

    def save_assets(self, folder: Path) -> None:
        """The model's configuration and the tokenizer's files."""
        self.model.config.save_pretrained(folder)
        self.preprocess.tokenizer.tokenizer.save_pretrained(folder)

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Path) -> HuggingFaceText:
        """See `Tower.rebuild`."""
        with without_weights():
            return cls(pretrained=str(assets), **architecture)
