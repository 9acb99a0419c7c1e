"""The model: a product encoder and a query encoder, trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritower.datamodules.batch import Batch, Item, Items, Side
from tritower.datamodules.preprocess import Preprocess
from tritower.datamodules.schema import Schema
from tritower.towers import guards
from tritower.towers.block_encoder import change_since_start, served_vectors
from tritower.towers.block_start import count_terms, start_blocks
from tritower.towers.embedded import Embedded, embed_items
from tritower.towers.encoder import Encoded, Encoder
from tritower.towers.encoding import (
    EncodingOptions,
    all_towers,
    check_items,
    compile_towers,
    encode_in_chunks,
    exchange_with_data,
    to_device,
)
from tritower.towers.loss_terms import LossTerm, LossTerms
from tritower.towers.losses.contrastive import ContrastiveLoss, Loss
from tritower.towers.losses.gather import num_processes
from tritower.towers.metric import Metric
from tritower.towers.optimizer import (
    OptimizerOptions,
    make_optimizer,
    parameter_groups,
    plan_steps,
)
from tritower.towers.step_log import log_step
from tritower.towers.validation import HeldOutSearch

DEFAULT_OPTIMIZER = OptimizerOptions()
DEFAULT_ENCODING = EncodingOptions()


class TwoTower(HeldOutSearch):
    """A product encoder and a query encoder with a contrastive loss.

    Args:
        product: encoder of products.
        query: encoder of queries; null shares the product encoder's weights.
        loss: of all terms that name none; null takes InfoNCE.
        loss_terms: terms that are summed into the loss; null compares whole queries with whole
            products. Terms of parts make embeddings work with any of their modalities.
        optimizer: learning rates, decay and warm-up.
        encoding: chunks, cached features and compilation.
        seed: of dropout; every step follows from it and the step's number, also after resuming.
        metric: measure that embeddings are compared by; `kl` suits contrastive losses only,
            `inner_product` is that of `BlockEncoder`.
    """

    def __init__(
        self,
        product: Encoder,
        query: Encoder | None = None,
        loss: ContrastiveLoss | None = None,
        loss_terms: list[LossTerm] | None = None,
        optimizer: OptimizerOptions = DEFAULT_OPTIMIZER,
        encoding: EncodingOptions = DEFAULT_ENCODING,
        seed: int = 0,
        metric: Metric = "cosine",
    ) -> None:
        super().__init__()
        self.product = product
        self.own_query = query
        guards.check_same_dim(*self.encoders)
        guards.check_blocks(self.encoders, metric)
        terms = [LossTerm()] if loss_terms is None else loss_terms
        self.loss_terms = LossTerms(terms, loss, self.encoders, metric)
        self.optimizer_options = optimizer
        self.encoding = encoding
        self.seed = seed
        self.metric = metric
        self.start_state: dict[str, Tensor] = {}
        self.schema: Schema | None = None
        self.planned_steps: int | None = None
        self.replan = False

    @property
    def query(self) -> Encoder:
        """The encoder of queries."""
        if self.own_query is None:
            return self.product
        return self.own_query

    @property
    def encoders(self) -> tuple[Encoder, Encoder]:
        """The encoders of queries and of products; one and the same where weights are shared."""
        return self.query, self.product

    @property
    def loss(self) -> Loss:
        """The loss whose temperature is shown."""
        return self.loss_terms.main

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.product.embed_dim

    @property
    def preprocess(self) -> Preprocess:
        """The towers' own preprocessing of both sides."""
        return Preprocess(self.query.preprocess("query"), self.product.preprocess("product"))

    def set_schema(self, schema: Schema) -> None:
        """Receive the catalogue's schema, and create the parameters that depend on it."""
        self.schema = schema
        for encoder in dict.fromkeys(self.encoders):
            encoder.set_schema(schema)

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], side: Side = "query") -> np.ndarray:
        """Embeddings of raw items.

        Args:
            items: B products or queries.
            side: `query` or `product`.

        Returns:
            (B, D) float32, rows of unit length; under kl probabilities of queries,
            log-probabilities of products (`tritower.towers.metric.to_score_space`).

        Raises:
            ValueError: an item has no modality that this model reads.
        """
        self.eval()
        encoder = self.query if side == "query" else self.product
        tensors = encoder.preprocess(side)(items)
        check_items(items, tensors, encoder)
        tensors = to_device(tensors, self.device)
        return served_vectors(encoder, tensors, side, self.metric).cpu().numpy()

    def encode_batch(self, encoder: Encoder, items: Items) -> Encoded:
        """Items as tensors, encoded in chunks."""
        return encode_in_chunks(encoder, items, self.encoding.chunk_size)

    def embed_batch(self, items: Items, side: Side) -> Embedded:
        """Vectors whose inner product is the score; zeros where nothing can be read."""
        encoder = self.query if side == "query" else self.product
        return embed_items(encoder, items, side, self.metric, self.encoding.chunk_size)

    def query_towers(self) -> list[str]:
        """Names of the query encoder's towers."""
        return list(self.query.towers)

    def configure_model(self) -> None:
        """Create the parameters that depend on the schema, before callbacks copy the model."""
        if self.schema is None:
            # Several processes have drawn other random numbers so far than one process has.
            torch.manual_seed(torch.initial_seed() + 1)
            self.set_schema(self.data.schema)

    def setup(self, stage: str) -> None:
        """The one exchange with the data: its schema comes in, the preprocessing goes out."""
        self.configure_model()
        count_terms(self.encoders, self.data)
        exchange_with_data(self, self.data, check_texts=stage == "fit")

    def on_fit_start(self) -> None:
        """Check the monitored figures, and compile the towers that are trained."""
        held_out = self.data.held_out[self.data.val_split]
        guards.check_monitors(self.trainer, held_out.own >= 0, self.data.val_split)
        compile_towers(all_towers(self.encoders), self.encoding.compile_backend)
        if self.trainer.ckpt_path is None:
            self.start_state = start_blocks(self, self.data)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the batch by its number, so that a resumed run equals one that never stopped."""
        self.loss_terms.clamp()
        for tower in all_towers(self.encoders):
            tower.at(self.global_step / max(1, self.planned_steps or 1))
        # Several batches make a step where gradients accumulate, so batches are counted.
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + number) * 1_000 + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The () loss of one batch."""
        query = self.encode_batch(self.query, batch.query)
        product = self.encode_batch(self.product, batch.product)
        with torch.autocast(self.device.type, enabled=False):
            terms = self.loss_terms(self.encoders, query, product, batch)
            loss = torch.stack(terms).sum()
            loss = loss + change_since_start(self.encoders, (query, product))
        if not torch.isfinite(loss):
            raise self.not_finite(f"The loss is {loss.item()}", self.data.product_ids(batch))
        if num_processes() > 1:
            loss = loss + guards.zero_loss_of_unused_towers(self.encoders, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.weight), sync_dist=True)
        log_step(self, terms, (query, product), len(batch.weight))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a gradient that is not finite; fp16's scaler skips such steps by itself."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        norm = guards.gradient_norm(self.parameters())
        if not torch.isfinite(norm):
            raise self.not_finite(f"The norm of the gradient is {norm.item()}")

    def not_finite(self, problem: str, product_ids: Sequence[str] = ()) -> FloatingPointError:
        """The error of a loss, gradient or embedding that is not a number."""
        return guards.not_finite(problem, self.global_step, self.loss, product_ids)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and a cosine schedule over the planned steps."""
        estimated = self.trainer.estimated_stepping_batches
        self.planned_steps = plan_steps(estimated, self.planned_steps, replan=self.replan)
        groups = parameter_groups(self, self.encoders, self.optimizer_options)
        return make_optimizer(groups, self.optimizer_options, self.planned_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add plain data only, so that checkpoints load in torch's safe mode."""
        assert self.schema is not None
        checkpoint["schema"] = asdict(self.schema)
        checkpoint["planned_steps"] = self.planned_steps
        checkpoint["start_state"] = self.start_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Create the parameters that depend on the schema before their weights are loaded."""
        self.planned_steps = checkpoint.get("planned_steps")
        self.start_state = checkpoint.get("start_state", {})
        schema = Schema.from_dict(checkpoint["schema"])
        if self.schema is None:
            self.set_schema(schema)
        guards.check_same_catalogue(self.schema, schema)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`; weights of another model are a ValueError."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise guards.other_model(error) from None
