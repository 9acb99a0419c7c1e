"""What a tower is: a module that turns one modality of B items into (B, out_dim) features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

from torch import nn

from tritower.datamodules.schema import Schema

NORMS_WITH_RUNNING_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


_loads_weights: ContextVar[bool] = ContextVar("loads_weights", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Towers that are made in this block have the architecture of a model, but random weights.

    A model folder rebuilds its towers so, and then loads their trained weights.
    """
    token = _loads_weights.set(False)
    try:
        yield
    finally:
        _loads_weights.reset(token)


def loads_weights() -> bool:
    """Whether a tower is to load pretrained weights; False within `without_weights`."""
    return _loads_weights.get()


class Tower(nn.Module):
    """Base of the towers of all modalities.

    Batch norms always use their running statistics: with those of the batch, a product's features
    would depend on its neighbors, and chunked encoding would not equal the whole batch.

    Attributes:
        out_dim: F, the size of the features.
        preprocess: turns B inputs of its modality into tensors.
        pretrained: its weights come from an earlier training and deserve the low learning rate.
        frozen: its weights are not trained; features of the same input never change, so they can be
            cached.
    """

    out_dim: int
    preprocess: Any
    pretrained: bool = False
    frozen: bool = False

    def freeze(self) -> None:
        """Stop training this tower's weights, dropout included."""
        self.frozen = True
        self.requires_grad_(False)
        self.train(False)

    def freeze_lower(self, share: float) -> None:
        """Stop training the lower part of a pretrained backbone.

        Its embeddings, stem and first blocks.

        Nothing is kept for their backward pass, which saves most of the memory and time that
        training takes there. The blocks are the children of the largest `nn.Sequential` or
        `nn.ModuleList`.

        Args:
            share: of the blocks, 0 (nothing is frozen) to 1 (all blocks; what comes after them is
                still trained).

        Raises:
            ValueError: share out of range, or a backbone without blocks.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"freeze_lower={share} is a share of the blocks: choose 0 to 1.")
        if share == 0:
            return
        # The blocks are the largest stack of modules.
        stacks = []
        for m in self.modules():
            if isinstance(m, nn.Sequential | nn.ModuleList) and len(m) > 1:
                stacks.append(m)
        if not stacks:
            raise ValueError(
                f"{type(self).__name__} has no stack of blocks: freeze all of it, or nothing."
            )
        blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
        inside = {id(p) for p in blocks.parameters()}
        # Blocks of the upper share stay trainable.
        upper = {
            id(p)
            for block in list(blocks)[round(share * len(blocks)) :]
            for p in block.parameters()
        }
        reached = False
        # Parameters come in the order of their creation, the input's first.
        for (
            name,
            parameter,
        ) in self.named_parameters():
            reached |= id(parameter) in inside
            after = reached and id(parameter) not in inside
            # open_clip creates the last projection first.
            if not (after or id(parameter) in upper or "proj" in name.rsplit(".", 1)[-1]):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen tower and batch norms stay in evaluation mode."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, NORMS_WITH_RUNNING_STATISTICS):
                module.training = False
        return self

    def at(self, progress: float) -> None:
        """Take note of how much of the training is done, 0 to 1.

        For what a tower does in a part of it only.
        """

    def set_schema(self, schema: Schema) -> None:
        """Take what the tower needs to know of the catalogue; most need nothing."""

    def architecture(self) -> dict[str, Any]:
        """Plain constructor arguments that rebuild this tower without its weights.

        See `rebuild`.
        """
        raise NotImplementedError

    def save_assets(self, folder: Path) -> None:
        """Write what `rebuild` needs besides the arguments, e.g.

        tokenizer files, into an existing folder.
        """

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Path) -> Self:
        """A tower of this architecture with random weights; reads nothing but `assets`."""
        return cls(**architecture)
