"""Encoder: towers -> projections -> fusion -> one unit-length embedding per item."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.batch import MODALITIES, Items, Side
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.datamodules.schema import Schema
from tritower.towers.attribute import AttributeTower
from tritower.towers.fusion import FUSIONS, FusionName
from tritower.towers.image import ImageTower
from tritower.towers.lexical import HashedNgrams
from tritower.towers.text import TextTower
from tritower.towers.tower import Tower


class Encoded(NamedTuple):
    """B items, encoded.

    Attributes:
        embedding: (B, D), rows of unit length.
        shares: (B, M) share of each of the encoder's modalities in the embedding; a row adds up to
            1.
        part: (B, D), rows of unit length: the embeddings of `Items.part`, the same towers' features
            fused again; equal to `embedding` where no parts were drawn.
        alone: (B, M, D), unit vectors of each modality by itself; the absent token where it is not
            there.
        present: (B, M) bool.
        terms: (B, F) hashed words of the record, of unit length, of `BlockEncoder`; else None.
        start: (B, Mp, D) projected blocks as they were before training, of `BlockEncoder`; else
            None.
    """

    embedding: Tensor
    shares: Tensor
    part: Tensor
    alone: Tensor
    present: Tensor
    terms: Tensor | None = None
    start: Tensor | None = None


def towers_by_modality(
    text: Tower | None, image: Tower | None, attribute: Tower | None, lexical: Tower | None
) -> nn.ModuleDict:
    """The towers that are not None, in the order of modalities.

    Raises:
        ValueError: there is none.
    """
    towers = dict(zip(MODALITIES, (text, image, attribute, lexical), strict=True))
    if all(tower is None for tower in towers.values()):
        raise ValueError("An encoder needs at least one tower: text, image, attribute or lexical.")
    return nn.ModuleDict({name: tower for name, tower in towers.items() if tower is not None})


class Encoder(nn.Module):
    """One side of a two-tower model.

    Args:
        embed_dim: D, the size of an embedding; chosen here and nowhere else.
        text: tower of titles, descriptions and typed queries; null leaves text out.
        image: tower of pictures; null leaves pictures out.
        attribute: tower of brand, category, price and the like; null leaves attributes out.
        lexical: tower of texts by their exact words, beside or in place of `text`: words that set
            one product apart are blurred by a text tower. Null leaves it out.
        fusion: `gated` (default), `mean`, or `transformer` (one layer).
        feature_dropout: chance, 0 to 1, that training leaves out a feature of a tower; where there
            are few products, their features are soon known by heart.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        text: TextTower | None = None,
        image: ImageTower | None = None,
        attribute: AttributeTower | None = None,
        lexical: HashedNgrams | None = None,
        fusion: FusionName = "gated",
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.towers = towers_by_modality(text, image, attribute, lexical)
        if embed_dim < 1:
            raise ValueError(f"embed_dim={embed_dim}: choose at least 1.")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r}: choose one of {', '.join(FUSIONS)}.")
        if not 0 <= feature_dropout < 1:
            raise ValueError(f"feature_dropout={feature_dropout} is a chance: choose 0 to below 1.")
        self.embed_dim = embed_dim
        self.fusion_name = fusion
        self.feature_dropout = feature_dropout
        self.projections = nn.ModuleDict(
            {
                name: projection(tower.out_dim, embed_dim)
                for name, tower in self.named_towers.items()
            }
        )
        self.absent = nn.Parameter(torch.randn(len(self.towers), embed_dim) * embed_dim**-0.5)
        self.fusion = FUSIONS[fusion](len(self.towers), embed_dim)
        # Sets the towers' batch norms to evaluation; Lightning never calls it.
        self.train()

    @property
    def columns(self) -> list[int]:
        """The towers' places on the modality axis."""
        return [MODALITIES.index(name) for name in self.towers]

    @property
    def named_towers(self) -> dict[str, Tower]:
        """Modality -> tower."""
        return cast(dict[str, Tower], dict(self.towers.items()))

    def set_schema(self, schema: Schema) -> None:
        """Tell the towers what the catalogue holds."""
        for tower in self.named_towers.values():
            tower.set_schema(schema)

    def preprocess(self, side: Side) -> ItemPreprocess:
        """The towers' own preprocessing, for queries or for products."""
        inputs: dict[str, Any] = {}
        for name, tower in self.named_towers.items():
            inputs[name] = tower.preprocess
        return ItemPreprocess(side, **inputs)

    def forward(self, items: Items) -> Encoded:
        """B items as tensors -> their embeddings."""
        present = items.present[:, self.columns]  # (B, M)
        alone = torch.stack([self.project(name, items) for name in self.towers], 1)  # (B, M, D)
        alone = torch.where(present.unsqueeze(-1), alone, self.absent.to(alone.dtype))
        embedding, shares = self.fuse(alone, present)  # (B, D), (B, M)
        part = embedding
        if items.part is not None:
            part = self.fuse(alone, items.part[:, self.columns])[0]
        return Encoded(embedding, shares, part, alone, present)

    def fuse(self, alone: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D) vectors of modalities, (B, M) bool -> (B, D) unit vectors, (B, M) shares."""
        # A missing modality is the learned absent token, whatever its features would be.
        filled = torch.where(present.unsqueeze(-1), alone, self.absent.to(alone.dtype))
        fused, shares = self.fusion(filled, present)
        return F.normalize(fused.float(), dim=-1), shares.float()

    def view(self, encoded: Encoded, name: str) -> tuple[Tensor, Tensor]:
        """(B, D) embeddings: `whole`, `part`, or those of one modality.

        And (B,) bool: which items have any of it.
        """
        if name == "whole":
            return encoded.embedding, encoded.present.any(1)
        if name == "part":
            return encoded.part, encoded.present.any(1)
        column = list(self.towers).index(name)
        return encoded.alone[:, column].float(), encoded.present[:, column]

    def project(self, name: str, items: Items) -> Tensor:
        """(B, D) unit vectors of one modality.

        Those of items without it are arbitrary but finite.
        """
        inputs = getattr(items, name)
        if inputs is None:
            return self.absent.new_zeros(len(items.present), self.embed_dim)
        features = features_of(self.towers[name], inputs)
        if name == "image":
            assert items.image_row is not None
            features = mean_by_row(features, items.image_row, len(items.present))
        features = F.dropout(features, self.feature_dropout, self.training)
        return F.normalize(self.projections[name](features), dim=-1)


def features_of(tower: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(n, F) features; a float matrix is features already (cached ones of a frozen tower)."""
    if isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.is_floating_point():
        return inputs
    return tower(inputs)


def mean_by_row(features: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """(N, F), (N,) -> (num_rows, F).

    The mean over the pictures of each item, zeros where it has none.
    """
    total = features.new_zeros(num_rows, features.shape[1]).index_add_(0, row, features)
    count = features.new_zeros(num_rows).index_add_(
        0, row, torch.ones_like(row, dtype=features.dtype)
    )
    return total / count.clamp(min=1).unsqueeze(-1)


def projection(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer that changes nothing at first where sizes agree.

    So two sides of one CLIP model start as aligned as they were trained.
    """
    layer = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(layer.bias)
    if in_dim == out_dim:
        nn.init.eye_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight)
    return layer
