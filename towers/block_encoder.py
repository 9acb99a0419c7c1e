"""An encoder whose modalities stay apart: a score is the weighted sum of the blocks' cosines.

Each block begins as what needs no training: pretrained features through an isometry, numbers as
waves, words as TF-IDF and BM25. So the model begins at the floor (`tritower.towers.floor`), and a
missing modality is a zero block, which stands in no other's way.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.batch import MODALITIES, Items, Side, TermTensors
from tritower.towers.encoder import (
    Encoded,
    Encoder,
    features_of,
    mean_by_row,
    towers_by_modality,
)
from tritower.towers.image import ImageTower
from tritower.towers.metric import Metric, to_score_space
from tritower.towers.number_waves import NumberWaves
from tritower.towers.query_factors import QueryFactors
from tritower.towers.sparse_terms import SparseTerms, hashed
from tritower.towers.text import TextTower

TERM_DECAY = 1e-3
"""Price of the squares of the terms' log weights."""


EMPTY_LENGTH = 1e-4
"""Length of the embedding of an item of which nothing can be read."""


class HybridVectors(NamedTuple):
    """Dense and sparse vectors of B items; a score is the sum of both inner products.

    Attributes:
        dense: (B, E) float32.
        term: (B, G) int64 dimensions of the sparse vector, 0 = padding.
        weight: (B, G) float32 values there.
    """

    dense: Tensor
    term: Tensor
    weight: Tensor


class BlockEncoder(Encoder):
    """Towers side by side, each with a weight.

    Args:
        block_dim: D, size of a dense block; pretrained features of more dimensions begin as their
            principal components.
        text: tower of titles and typed queries; null leaves texts to the words.
        image: tower of pictures; null leaves pictures out.
        numbers: prices and other numbers; null leaves them to the words.
        terms: words of the whole record; null leaves them out.
        words_dim: dimensions of an embedding that hold the words, hashed. More have fewer
            collisions; 0 leaves words out of embeddings. Held-out queries are compared by the
            exact words in any case.
        keep_similarities: how much of the loss is the mean squared change of the blocks'
            similarities since the start; 0 lets go of the pretrained features.
    """

    def __init__(
        self,
        block_dim: int = 256,
        text: TextTower | None = None,
        image: ImageTower | None = None,
        numbers: NumberWaves | None = None,
        terms: SparseTerms | None = None,
        words_dim: int = 1024,
        keep_similarities: float = 10.0,
    ) -> None:
        nn.Module.__init__(self)
        self.towers = towers_by_modality(text, image, numbers, terms)
        self.dense = [name for name in self.towers if name != "lexical"]
        if numbers is not None and numbers.out_dim != block_dim:
            raise ValueError(
                f"numbers.out_dim={numbers.out_dim} differs from block_dim={block_dim}: a block of "
                "numbers is not projected."
            )
        self.block_dim = block_dim
        if words_dim < 0:
            raise ValueError(f"words_dim={words_dim}: choose at least 0.")
        self.words_dim = words_dim if terms is not None else 0
        self.embed_dim = block_dim * len(self.dense) + self.words_dim
        if not self.embed_dim:
            raise ValueError(
                "BlockEncoder has no embedding: give it text, image or numbers, or terms with "
                "words_dim above 0."
            )
        self.keep_similarities = keep_similarities
        self.feature_dropout = 0.0
        # Projections begin as isometries (`set_start`), whose similarities training is to keep.
        self.projections = nn.ModuleDict()
        for name, tower in self.named_towers.items():
            if name in ("text", "image"):
                layer = nn.Linear(tower.out_dim, block_dim, bias=False)
                nn.init.orthogonal_(layer.weight)
                self.projections[name] = layer
        self.start = copy.deepcopy(self.projections).requires_grad_(False)
        self.absent = nn.Parameter(torch.zeros(len(self.dense), block_dim), requires_grad=False)
        self.log_weights = nn.Parameter(torch.zeros(len(self.towers)))
        self.query_factors = QueryFactors(list(self.towers), self.columns)
        self.train()

    @property
    def weights(self) -> Tensor:
        """(M,) weights of the blocks, squares of which add up to 1."""
        return F.normalize(self.log_weights.exp(), dim=0)

    def forward(self, items: Items) -> Encoded:
        """B items as tensors -> their blocks and embeddings."""
        present = items.present[:, self.columns]  # (B, M)
        blocks = [self._block(name, items) for name in self.dense]
        alone = self._stacked([block for block, _ in blocks], len(present))  # (B, Md, D)
        before = [start for _, start in blocks if start is not None]
        embedding = self.join(alone, present)
        part = embedding
        if items.part is not None:
            part = self.join(alone, items.part[:, self.columns])
        terms = None
        if isinstance(items.lexical, TermTensors):
            terms = self.towers["lexical"](items.lexical)  # (B, F)
        squares = self.weights.square() * present
        shares = squares / squares.sum(1, keepdim=True).clamp(min=1e-9)  # (B, M)
        start = torch.stack(before, 1) if before else None  # (B, Mp, D)
        return Encoded(embedding, shares, part, alone, present, terms, start)

    def join(self, alone: Tensor, present: Tensor) -> Tensor:
        """(B, Md, D) dense blocks, (B, M) bool -> (B, Md * D), weighted, zeros where missing."""
        weighted = self._dense(present) * self._dense(self.weights.expand(len(present), -1))
        return (alone * weighted.unsqueeze(-1)).flatten(1).float()

    def view(self, encoded: Encoded, name: str) -> tuple[Tensor, Tensor]:
        """As `Encoder.view`: (B, D') vectors and (B,) bool.

        `whole` is the dense blocks beside the hashed words.
        """
        if name in self.dense:
            column = list(self.towers).index(name)
            return encoded.alone[:, self.dense.index(name)].float(), encoded.present[:, column]
        dense = encoded.part if name == "part" else encoded.embedding
        terms = encoded.terms
        if "lexical" not in self.towers:
            return dense, encoded.present.any(1)
        if terms is None:
            tower = self.named_towers["lexical"]
            terms = dense.new_zeros(len(dense), tower.out_dim)
        if name == "lexical":
            return terms, encoded.present[:, -1]
        return torch.cat([dense, terms * self.weights[-1]], 1), encoded.present.any(1)

    def vectors(self, items: Items, side: Side) -> HybridVectors:
        """Dense and sparse vectors of B items, as they are searched."""
        blocks = self.blocks(items, side)
        weights = self.weights.expand(len(items.present), -1)  # (B, M)
        if side == "query":
            # Each kind of query has factors of its own, chosen after training.
            weights = weights * self.query_factors(items)
        dense = blocks.dense.view(-1, len(self.dense), self.block_dim)
        weighted = (dense * self._dense(weights).unsqueeze(-1)).flatten(1)
        if "lexical" in self.towers:
            return HybridVectors(weighted, blocks.term, blocks.weight * weights[:, -1:])
        return HybridVectors(weighted, blocks.term, blocks.weight)

    def embed(self, items: Items, side: Side) -> Tensor:
        """(B, E) float32 embeddings: dense blocks beside the hashed words.

        An item of which nothing can be read is a vector of nearly no length: an index refuses
        zeros.
        """
        vectors = self.vectors(items, side)
        embedding = vectors.dense
        if self.words_dim:
            words = hashed(vectors.term, vectors.weight, self.words_dim)
            embedding = torch.cat([embedding, words], 1)
        is_empty = ~embedding.any(1)
        embedding[is_empty, 0] = EMPTY_LENGTH
        return embedding

    def blocks(self, items: Items, side: Side) -> HybridVectors:
        """Dense and sparse vectors of B items without weights of blocks."""
        blocks = [self._block(name, items)[0] for name in self.dense]
        dense = self._stacked(blocks, len(items.present)).flatten(1).float()  # (B, Md * D)
        terms = items.lexical
        if not isinstance(terms, TermTensors):
            term = items.present.new_zeros(len(dense), 1, dtype=torch.int64)
            return HybridVectors(dense, term, term.float())
        tower = self.towers["lexical"]
        assert isinstance(tower, SparseTerms)
        return HybridVectors(dense, terms.term, tower.weights(terms, side))

    @torch.no_grad()
    def set_start(self, name: str, components: Tensor) -> None:
        """Begin a projection as an isometry.

        Args:
            name: `text` or `image`.
            components: (D, F) orthonormal rows.
        """
        for projections in (self.projections, self.start):
            layer = projections[name]
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(components)

    def _block(self, name: str, items: Items) -> tuple[Tensor, Tensor | None]:
        """(B, D) unit vectors of one dense block, and as they were before training.

        Zeros where an item has nothing; None for a block that is not trained.
        """
        inputs = getattr(items, name)
        if inputs is None:
            zeros = self.absent.new_zeros(len(items.present), self.block_dim)
            return zeros, zeros if name in self.projections else None
        features = features_of(self.towers[name], inputs)
        if name not in self.projections:
            return features, None
        if name == "image":
            assert items.image_row is not None
            features = mean_by_row(features, items.image_row, len(items.present))
        column = MODALITIES.index(name)
        features = features * items.present[:, column].unsqueeze(-1)
        now = F.normalize(self.projections[name](features), dim=-1)
        return now, F.normalize(self.start[name](features), dim=-1)

    def _stacked(self, blocks: list[Tensor], count: int) -> Tensor:
        """(B, Md, D) of Md blocks (B, D); there may be none."""
        if not blocks:
            return self.absent.new_zeros(count, 0, self.block_dim)
        return torch.stack(blocks, 1)

    def _dense(self, blocks: Tensor) -> Tensor:
        """(B, M) -> (B, Md): the columns of dense blocks; words come last."""
        return blocks[:, : len(self.dense)]


def change_since_start(
    encoders: tuple[Encoder, Encoder], encoded: tuple[Encoded, Encoded]
) -> Tensor:
    """The () price of what has changed since the start, the mean over both sides.

    The mean squared change of similarities within the batch (relational distillation, Park et al.,
    CVPR 2019), and the squares of the terms' log weights; 0 for encoders without blocks.
    """
    total = encoded[0].embedding.new_zeros(())
    for encoder, items in zip(encoders, encoded, strict=True):
        if isinstance(encoder, BlockEncoder):
            total = total + _change(encoder, items) / len(encoders)
    return total


def _change(encoder: BlockEncoder, encoded: Encoded) -> Tensor:
    total = encoded.embedding.new_zeros(())
    terms = encoder.named_towers.get("lexical")
    if isinstance(terms, SparseTerms):
        total = total + TERM_DECAY * terms.log_weight.square().sum()
    if encoded.start is None:
        return total
    for number, name in enumerate(encoder.projections):
        now = encoded.alone[:, encoder.dense.index(name)]  # (B, D)
        before = encoded.start[:, number]  # (B, D)
        change = (now @ now.T - before @ before.T).square().mean()
        total = total + encoder.keep_similarities * change
    return total


def served_vectors(encoder: Encoder, items: Items, side: Side, metric: Metric) -> Tensor:
    """(B, D) float32 vectors as an index holds them; D is the encoder's `embed_dim`."""
    if isinstance(encoder, BlockEncoder):
        return encoder.embed(items, side)
    return to_score_space(encoder(items).embedding.float(), side, metric)
