"""Hard negatives: products that the model wrongly ranks as matches, found by an index."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from tritower.datamodules.batch import NO_KEY, RELATIONS, Relation
from tritower.datamodules.catalogue import product_keys
from tritower.datamodules.held_out_rows import CandidateRows, RowBatches
from tritower.datamodules.negatives import Negatives
from tritower.towers.encoding import to_device
from tritower.towers.two_tower import TwoTower

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]

BLOCK = 16_384
SHARD = 131_072


class HardNegatives(L.Callback):
    """Every few epochs, index the training products and give each one its hard negatives.

    What is as near as a positive may be an unmarked positive. So candidates begin at a rank, end
    at another, and have to be less similar to the product than its own group is (as NV-Retriever,
    arXiv:2407.15831); whatever has an equal key is none. At the first times a part of the negatives
    is still drawn at random (as Etsy, arXiv:2306.04833).

    Args:
        every_n_epochs: 0 mines nothing.
        per_example: extra negatives per example of a batch.
        first_rank: of the candidates among a product's neighbors, from 1.
        last_rank: likewise; as many neighbors are searched.
        max_similarity: candidates more similar than this share of the similarity to the least
            similar mate (to itself: 1, where it has none) are suspected positives, and left
            out.
        related: products with an equal key of these relations are no candidates.
        ramp: times of mining until the mined ones make up all extra negatives: 3 takes a third
            after the first, two thirds after the second.
    """

    def __init__(
        self,
        every_n_epochs: int = 0,
        per_example: int = 1,
        first_rank: int = 3,
        last_rank: int = 50,
        max_similarity: float = 0.95,
        related: list[Relation] | None = None,
        ramp: int = 3,
    ) -> None:
        if every_n_epochs < 0 or per_example < 1 or ramp < 0:
            raise ValueError(
                f"every_n_epochs={every_n_epochs}, per_example={per_example}, ramp={ramp}: none "
                "may be "
                "negative, and per_example is at least 1."
            )
        if not 1 <= first_rank <= last_rank:
            raise ValueError(
                f"first_rank={first_rank}, last_rank={last_rank}: choose 1 <= first_rank <= "
                "last_rank."
            )
        self.every_n_epochs = every_n_epochs
        self.per_example = per_example
        self.ramp = ramp
        self.first_rank = first_rank
        self.last_rank = last_rank
        self.max_similarity = max_similarity
        # Products of these relations may be the same product, so they are never negatives.
        if related is not None:
            self.related: list[Relation] = related
        else:
            self.related = ["product", "group", "family", "title", "picture"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a model whose embeddings are not those that its loss compares."""
        assert isinstance(pl_module, TwoTower)
        if self.every_n_epochs and pl_module.metric == "inner_product":
            raise ValueError(
                f"hard_negatives.every_n_epochs={self.every_n_epochs}: negatives cannot be mined "
                "for BlockEncoder: leave it out"
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the last step of an epoch, mine for the next one.

        Before any checkpoint that the run may resume from.
        """
        epoch = trainer.current_epoch + 1
        if not self.every_n_epochs or batch_idx + 1 < trainer.num_training_batches:
            return
        if epoch % self.every_n_epochs or epoch == trainer.max_epochs:
            return
        assert isinstance(pl_module, TwoTower)
        # Embed, search and write the negatives; then all processes use them from the next epoch on.
        file = Path(trainer.default_root_dir) / "negatives" / f"epoch-{epoch:05d}.npy"
        work = file.parent / "work"
        _embed(trainer, pl_module, work / "embeddings")
        if trainer.is_global_zero:
            suspected = self._mine(trainer.datamodule, work, file)
            pl_module.log("train/suspected_false_negatives", suspected, rank_zero_only=True)
        trainer.strategy.barrier()
        # The share of mined negatives rises with each time of mining.
        share = min(1.0, epoch / max(1, self.ramp * self.every_n_epochs))
        trainer.datamodule.negatives = Negatives(file, self.per_example, share)

    def _mine(self, data: Any, work: Path, file: Path) -> float:
        """Write the candidates of every embedded product.

        Returns the share of suspected positives among them.
        """
        from tritower.retrieval.building.build import build_index
        from tritower.retrieval.index import ProductIndex
        from tritower.retrieval.vectors.embeddings import EmbeddingReader

        rows: Rows = data.training.split
        build_index(EmbeddingReader(work / "embeddings"), work / "index")
        index = ProductIndex.open(work / "index")
        # Relations that make two products no negatives of each other.
        keys = np.array([product_keys(data.products.row(int(row))) for row in rows])
        keys = keys[:, [RELATIONS.index(relation) for relation in self.related]]
        table = np.lib.format.open_memmap(
            file, "w+", np.int32, (len(data.products), self.last_rank)
        )
        table[:] = -1
        searched = suspected = first = 0
        # Search for the neighbors of every product, and choose among them.
        for batch in EmbeddingReader(work / "embeddings").batches(BLOCK):
            hits = index.search(batch.vectors, min(self.last_rank + 1, len(rows)))
            own = np.arange(first, first + len(batch.ids))
            chosen, is_suspected = self.choose(own, hits.rows, hits.scores, keys)
            table[rows[own], : chosen.shape[1]] = np.where(chosen >= 0, rows[chosen], -1)
            searched += int((chosen >= 0).sum()) + is_suspected
            suspected += is_suspected
            first += len(own)
        table.flush()
        shutil.rmtree(work)
        share = suspected / max(1, searched)
        logger.info(
            "mined %s: %.1f %% of the candidates may be answers and were left out",
            file.name,
            100 * share,
        )
        return share

    def choose(
        self, own: Rows, neighbors: Rows, scores: NDArray[np.float32], keys: Rows
    ) -> tuple[Rows, int]:
        """The hard negatives among the neighbors of some products.

        Args:
            own: (B,) the products.
            neighbors: (B, K) their neighbors, best first, -1 where there are fewer.
            scores: (B, K) their similarity.
            keys: (N, R) of all products.

        Returns:
            (B, K - 1) rows, nearest first, -1 where there are fewer; how many were left out as too
            similar.
        """
        is_other = (neighbors >= 0) & (neighbors != own[:, None])
        own_keys = keys[own][:, None, :]
        neighbor_keys = keys[neighbors]
        related = ((own_keys == neighbor_keys) & (own_keys != NO_KEY)).any(-1) & is_other
        same_group_score = np.where(related, scores, np.inf).min(axis=1)
        limit = self.max_similarity * np.where(np.isfinite(same_group_score), same_group_score, 1.0)
        rank = np.cumsum(is_other & ~related, axis=1)
        is_candidate = is_other & ~related & (rank >= self.first_rank) & (rank <= self.last_rank)
        is_suspected = is_candidate & (scores > limit[:, None])
        is_chosen = is_candidate & ~is_suspected
        order = np.argsort(~is_chosen, axis=1, kind="stable")[:, : neighbors.shape[1] - 1]
        return np.take_along_axis(np.where(is_chosen, neighbors, -1), order, axis=1), int(
            is_suspected.sum()
        )


@torch.inference_mode()
def _embed(trainer: L.Trainer, model: TwoTower, folder: Path) -> None:
    """Write the embeddings of the products that are trained on, each process some of the shards."""
    from tritower.retrieval.vectors.embeddings import EmbeddingWriter

    data = trainer.datamodule
    rows = trainer.datamodule.training.split
    if trainer.is_global_zero:
        shutil.rmtree(folder.parent, ignore_errors=True)
        EmbeddingWriter(folder, dim=model.embed_dim)  # begins it
    trainer.strategy.barrier()
    writer = EmbeddingWriter(folder, dim=model.embed_dim)
    was_training = model.training
    # Every process embeds some of the shards.
    shards = np.array_split(rows, max(-(-len(rows) // SHARD), min(trainer.world_size, len(rows))))
    names = [f"shard-{number:05d}" for number in range(len(shards))]
    model.eval()
    for number in range(trainer.global_rank, len(shards), trainer.world_size):
        products = CandidateRows(data.products, shards[number], data.preprocess.product)
        parts = []
        for batch in data.make_loader(
            products, RowBatches(len(products.candidates), data.batch_size)
        ):
            encoded = model.encode_batch(model.product, to_device(batch.items, model.device))
            parts.append(encoded.embedding.float().cpu().numpy())
        writer.write(names[number], [str(row) for row in shards[number]], np.concatenate(parts))
    model.train(was_training)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        writer.finish(names)
