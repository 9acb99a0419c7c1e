"""What a tower is: a module that turns one modality of B items into (B, out_dim) features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from torch import nn

from datamodules.schema import Schema

NORMS_WITH_RUNNING_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Tower(nn.Module):
    """Base of the towers of all modalities.

    Batch norms always use their running statistics: with those of the batch, a product's features would depend on its
    neighbours, and chunked encoding would not equal the whole batch.

    Attributes:
        out_dim: F, the size of the features.
        pretrained: its weights come from an earlier training and deserve the low learning rate.
        frozen: its weights are not trained; features of the same input never change, so they can be cached.
    """

    out_dim: int
    pretrained: bool = False
    frozen: bool = False

    def freeze(self) -> None:
        """Stop training this tower's weights, dropout included."""
        self.frozen = True
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen tower and batch norms stay in evaluation mode."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, NORMS_WITH_RUNNING_STATISTICS):
                module.training = False
        return self

    def set_schema(self, schema: Schema) -> None:
        """Take what the tower needs to know of the catalogue; most need nothing."""

    def architecture(self) -> dict[str, Any]:
        """Plain constructor arguments that rebuild this tower without its weights; see `rebuild`."""
        raise NotImplementedError

    def save_assets(self, folder: Path) -> None:
        """Write what `rebuild` needs besides the arguments, e.g. tokenizer files, into an existing folder."""

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Path) -> Self:
        """A tower of this architecture with random weights; reads nothing but `assets`."""
        return cls(**architecture)
