"""Text towers: a product's texts, joined by a template, as features."""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tritower.datamodules.batch import Item, Side
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.schema import Schema
from tritower.retrieval.lexical.tokenizer import tokenize
from tritower.towers.tower import Tower

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """How the text fields of an item become one text.

    `"{title}. {description}"`; None joins all fields like that.

    A field that an item lacks takes the characters in front of it with it. A typed query
    (`{"query": ...}`) is taken as it is, without the template.
    """

    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is None:
            return
        try:
            fields = self.fields
        except ValueError as error:
            raise ValueError(f"template={self.template!r} is not a template: {error}.") from None
        if not fields or "" in fields:
            raise ValueError(
                f"template={self.template!r} names no field. Example: '{{title}}. {{description}}'"
            )

    @property
    def fields(self) -> list[str]:
        """The fields that the template names."""
        result = []
        for _, field, _, _ in string.Formatter().parse(self.template or ""):
            if field is not None:
                result.append(field)
        return result

    def check(self, schema: Schema) -> None:
        """Refuse a template that would leave every product without text.

        Raises:
            ValueError: the catalogue has none of the template's fields.
        """
        if self.template is not None and not set(self.fields) & set(schema.text):
            raise ValueError(
                f"template={self.template!r} names no text field of the catalogue, which has "
                f"{', '.join(schema.text) or 'none'}. Name one of those, or leave the template out "
                "to join them all."
            )

    def render(self, item: Item) -> str:
        """The text of an item; empty where it has none of the fields."""
        # A typed query is read as it is.
        if query := item.text.get("query"):
            return query
        if self.template is None:
            return ". ".join(text for text in item.text.values() if text)
        text = ""
        # Text between fields is left out with a field that is missing.
        for literal, field, _, _ in string.Formatter().parse(self.template):
            if field is None:
                if text:
                    return text + literal
                return text
            if value := item.text.get(field):
                text += (literal if text else literal.lstrip(" .,;|-")) + value
        return text


class Tokenizer(Protocol):
    """Texts to token ids."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 token ids, no longer than the longest text needs."""

    def lengths_and_fallbacks(self, text: str) -> tuple[int, int, int]:
        """Numbers of tokens: of the whole text, of those kept, and of unknown ones."""


@dataclass(frozen=True)
class TextPreprocess:
    """Template, prefix of the side, tokenizer."""

    tokenizer: Tokenizer
    template: Template
    query_prefix: str = ""
    product_prefix: str = ""

    def render(self, item: Item, side: Side) -> str:
        """The text of an item with the prefix of its side; empty where it has none."""
        text = self.template.render(item)
        if text:
            return (self.query_prefix if side == "query" else self.product_prefix) + text
        return ""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 token ids."""
        return self.tokenizer(texts)

    def check(self, texts: Sequence[str]) -> dict[str, float]:
        """Shares of texts that are cut and of tokens for unknown text.

        Warns where they are high.
        """
        counts = [self.tokenizer.lengths_and_fallbacks(text) for text in texts]
        # Two signs of a wrong tokenizer: many unknown tokens, and many texts that are cut.
        tokens = max(1, sum(length for length, _, _ in counts))
        cut = sum(length > kept for length, kept, _ in counts) / max(1, len(texts))
        fallback = sum(unknown for _, _, unknown in counts) / tokens
        if fallback > 0.5:
            logger.warning(
                "The tokenizer knows few of these texts: %.0f %% of the tokens of %d texts stand "
                "for single bytes or "
                "unknown words. Take a multilingual text tower, or BiLSTM.",
                100 * fallback,
                len(texts),
            )
        if cut > 0:
            logger.info(
                "%.1f %% of %d texts are longer than the text tower reads and are cut",
                100 * cut,
                len(texts),
            )
        return {"cut": cut, "fallback": fallback}


class TextTower(Tower):
    """Base of the text towers.

    Args:
        preprocess: of this tower.
    """

    def __init__(self, preprocess: TextPreprocess) -> None:
        super().__init__()
        self.preprocess = preprocess

    def set_schema(self, schema: Schema) -> None:
        """Refuse a template that would leave every product without text.

        Raises:
            ValueError: the catalogue has none of the template's fields.
        """
        self.preprocess.template.check(schema)

    def wording(self) -> dict[str, str | None]:
        """The constructor arguments that all text towers share."""
        p = self.preprocess
        return {
            "template": p.template.template,
            "query_prefix": p.query_prefix,
            "product_prefix": p.product_prefix,
        }


def split_words(text: str) -> list[str]:
    """Lower-case words (`tritower.retrieval.lexical.tokenizer`).

    A text without a letter or digit is one word.
    """
    return tokenize(text) or [text.lower()]


def padded(rows: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """(B, L) int64, the rows filled up with 0; at least one column."""
    result = np.zeros((len(rows), max([1, *map(len, rows)])), np.int64)
    for row, values in enumerate(rows):
        result[row, : len(values)] = values
    return torch.from_numpy(result)


@dataclass(frozen=True)
class HashedWords:
    """Words by hash (see `split_words`): needs no vocabulary and reads every language."""

    num_buckets: int = 16_384
    max_length: int = 48

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 token ids, 0 = padding; at least one column."""
        words = (split_words(text)[: self.max_length] for text in texts)
        return padded(
            [[1 + stable_hash(word) % (self.num_buckets - 1) for word in row] for row in words]
        )

    def lengths_and_fallbacks(self, text: str) -> tuple[int, int, int]:
        """No word is unknown."""
        count = len(split_words(text))
        return count, min(count, self.max_length), 0


class BiLSTM(TextTower):
    """A small bidirectional LSTM over hashed words: the baseline, trained from scratch.

    Args:
        template: how text fields are joined, e.g. `"{title}. {description}"`; fields that a product
            lacks are left out. Null joins all fields of the catalogue.
        num_buckets: rows of the word table.
        word_dim: size of a word's embedding.
        hidden_dim: size of the LSTM's state in each direction; features have twice that.
        max_length: words that are read.
        dropout: on word embeddings and features, 0 to 1.
        query_prefix: put in front of queries.
        product_prefix: put in front of products.
    """

    def __init__(
        self,
        template: str | None = None,
        num_buckets: int = 16_384,
        word_dim: int = 128,
        hidden_dim: int = 128,
        max_length: int = 48,
        dropout: float = 0.1,
        query_prefix: str = "",
        product_prefix: str = "",
    ) -> None:
        tokenizer = HashedWords(num_buckets, max_length)
        super().__init__(
            TextPreprocess(tokenizer, Template(template), query_prefix, product_prefix)
        )
        self.word_dim = word_dim
        self.hidden_dim = hidden_dim
        self.out_dim = 2 * hidden_dim
        self.words = nn.Embedding(num_buckets, word_dim, padding_idx=0)
        self.lstm = nn.LSTM(word_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, F): the mean over a text's words of the states of both directions."""
        there = (tokens != 0).unsqueeze(-1)  # (B, L, 1)
        lengths = there.sum(1).flatten().clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.words(tokens)), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=tokens.shape[1]
        )
        return self.dropout((states * there).sum(1) / lengths.unsqueeze(-1))

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        tokenizer = self.preprocess.tokenizer
        assert isinstance(tokenizer, HashedWords)
        return {
            **self.wording(),
            "num_buckets": tokenizer.num_buckets,
            "max_length": tokenizer.max_length,
            "word_dim": self.word_dim,
            "hidden_dim": self.hidden_dim,
            "dropout": self.dropout.p,
        }
