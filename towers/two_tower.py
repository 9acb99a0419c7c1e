"""The model: a product encoder and a query encoder, trained so that a query lies next to what answers it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tritower.datamodules.batch import Batch, Item, Items, NumberedItems, Side
from tritower.datamodules.preprocess import Preprocess
from tritower.datamodules.schema import Schema
from tritower.retrieval.ranking.metrics import hit_at_k, mrr, ndcg_at_k, recall_at_k
from tritower.towers.encoder import Encoded, Encoder
from tritower.towers.feature_cache import cached
from tritower.towers.losses.gather import num_processes
from tritower.towers.losses.loss import ContrastiveLoss, InfoNCE, Loss
from tritower.towers.metric import Metric, compared
from tritower.towers.text import TextTower
from tritower.towers.tower import Tower

logger = logging.getLogger(__name__)


View = Literal["whole", "part", "text", "image", "attribute", "words"]
"""Which embeddings of items:

of all their modalities, of a part of them drawn at random, of a single one.
"""


@dataclass(frozen=True)
class Comparison:
    """What the loss compares. A pair of which one side lacks the modality has no part in it.

    Attributes:
        query: which embeddings of the queries.
        product: which embeddings of the products.
        weight: of this comparison in the sum of all.
        loss: null takes the model's loss, with a temperature of its own.
    """

    query: View = "whole"
    product: View = "whole"
    weight: float = 1.0
    loss: Loss | None = None

    def __str__(self) -> str:
        return f"{self.query}-{self.product}" + (
            "" if self.loss is None else f"-{type(self.loss).__name__}"
        )


class TwoTower(L.LightningModule):
    """A product encoder and a query encoder with a contrastive loss.

    Args:
        product: encoder of products.
        query: encoder of queries; null shares the product encoder's weights.
        loss: null takes InfoNCE.
        compare: what the loss is the sum of; null compares whole queries with whole products. With
            parts, an embedding learns to do with any of its modalities and loses nothing where all
            are there.
        lr: learning rate of new parts (projections, fusion, towers trained from scratch).
        pretrained_lr: learning rate of pretrained towers.
        weight_decay: of AdamW; norms, biases and the temperature have none.
        warmup: share of all steps in which the learning rate rises, 0 to 1; then it falls as a
            cosine to zero.
        chunk_size: items that are encoded at once; null encodes the whole batch. Smaller needs less
            memory and more time: each chunk's forward pass runs again in the backward pass (as
            GradCache, arXiv:2101.06983).
        feature_cache: folder where features of frozen towers are kept; null runs frozen towers
            every time.
        compile_backend: of torch.compile, for all towers that are trained, e.g. `inductor`; null
            does not compile them.
        seed: of dropout; with it every step follows from its number, also after resuming.
        metric: what embeddings are compared by, here and in an index. `kl` suits contrastive losses
            alone.
    """

    def __init__(
        self,
        product: Encoder,
        query: Encoder | None = None,
        loss: ContrastiveLoss | None = None,
        compare: list[Comparison] | None = None,
        lr: float = 1e-3,
        pretrained_lr: float = 1e-5,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        chunk_size: int | None = None,
        feature_cache: Path | None = None,
        compile_backend: str | None = None,
        seed: int = 0,
        metric: Metric = "cosine",
    ) -> None:
        super().__init__()
        if query is not None and query.embed_dim != product.embed_dim:
            raise ValueError(
                f"The query encoder's embed_dim={query.embed_dim} differs from the product encoder's "
                f"embed_dim={product.embed_dim}: their embeddings could not be compared."
            )
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is a share of all steps: choose 0 <= warmup < 1.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(
                f"chunk_size={chunk_size}: choose at least 1, or null for the whole batch."
            )
        self.product = product
        self.own_query = query
        self.compare = compare if compare is not None else [Comparison()]
        if not self.compare:
            raise ValueError(
                "compare=[] leaves nothing to learn from: leave it out to compare whole with whole."
            )
        given, own = loss if loss is not None else InfoNCE(), list[Loss]()
        for comparison in self.compare:
            own.append(comparison.loss or (copy.deepcopy(given) if given in own else given))
        self.loss = next((one for one in own if isinstance(one, ContrastiveLoss)), own[0])
        self.losses = nn.ModuleList(own)
        for one in own:
            one.set_dim(product.embed_dim)
            if metric == "kl" and (
                not isinstance(one, ContrastiveLoss) or getattr(one, "same_side", False)
            ):
                raise ValueError(
                    f"metric=kl compares queries with products; {type(one).__name__} asks for the cosine of a pair or "
                    "compares within a side: choose metric=cosine, or InfoNCE or SigmoidLoss without same_side."
                )
        self.metric = metric
        for name in (name for c in self.compare for name in (c.query, c.product)):
            if name not in ("whole", "part") and not all(
                name in e.towers for e in (product, query or product)
            ):
                raise ValueError(
                    f"compare names {name!r}, but an encoder has no such tower: leave it out."
                )
        self.lr, self.pretrained_lr, self.weight_decay, self.warmup = (
            lr,
            pretrained_lr,
            weight_decay,
            warmup,
        )
        if compile_backend not in (None, *(known := torch.compiler.list_backends(exclude_tags=()))):
            raise ValueError(
                f"compile_backend={compile_backend!r}: choose one of {', '.join(known)}."
            )
        self.chunk_size, self.feature_cache, self.compile_backend = (
            chunk_size,
            feature_cache,
            compile_backend,
        )
        self.seed = seed
        self.schema: Schema | None = None
        self.planned_steps: int | None = None
        self.replan = False  # a resumed run may have another number of steps
        self._told: set[str] = set()  # splits of which queries cannot be read

    # ------------------------------------------------------------------ encoding

    @property
    def query(self) -> Encoder:
        """The encoder of queries."""
        return self.product if self.own_query is None else self.own_query

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.product.embed_dim

    @property
    def preprocess(self) -> Preprocess:
        """The towers' own preprocessing of both sides."""
        return Preprocess(self.query.preprocess("query"), self.product.preprocess("product"))

    def set_schema(self, schema: Schema) -> None:
        """Tell both encoders what the catalogue holds; makes the attribute towers' parameters."""
        self.schema = schema
        for encoder in {id(e): e for e in (self.product, self.query)}.values():
            encoder.set_schema(schema)

    def encode_chunks(self, encoder: Encoder, items: Items) -> Encoded:
        """As `encoder(items)`, chunk by chunk; in training with a memory of one chunk's activations."""
        count = len(items.present)
        if self.chunk_size is None or count <= self.chunk_size:
            return encoder(items)
        chunks = [
            items.rows(start, min(start + self.chunk_size, count))
            for start in range(0, count, self.chunk_size)
        ]
        if torch.is_grad_enabled():
            parts = [checkpoint(encoder, chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [encoder(chunk) for chunk in chunks]
        return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], side: Side = "query") -> np.ndarray:
        """Embeddings of raw items.

        Args:
            items: B products or queries.
            side: `query` or `product`.

        Returns:
            (B, D) float32, rows of unit length; under kl probabilities of queries,
            log-probabilities of products (`tritower.towers.metric.compared`).

        Raises:
            ValueError: an item of which this model knows no modality.
        """
        self.eval()
        encoder = self.query if side == "query" else self.product
        tensors = encoder.preprocess(side)(items)
        if nothing := (~tensors.present.any(1)).nonzero().flatten().tolist():
            raise ValueError(
                f"Item {nothing[0]} of {len(items)} has nothing that this model reads "
                f"({', '.join(encoder.towers)}): {_outline(items[nothing[0]])}."
            )
        embedding = encoder(to_device(tensors, self.device)).embedding.float()
        return compared(embedding, side, self.metric).cpu().numpy()

    # ------------------------------------------------------------------ training

    def configure_model(self) -> None:
        """The parameters that need the catalogue's schema; callbacks that copy the model call this before `setup`."""
        if self.schema is None:
            torch.manual_seed(
                torch.initial_seed() + 1
            )  # several processes have drawn other numbers so far than one
            self.set_schema(self.trainer.datamodule.schema)

    def setup(self, stage: str) -> None:
        """The one exchange with the data: its schema comes in, the preprocessing goes out."""
        data = self.trainer.datamodule
        self.configure_model()
        if self.schema != data.schema:
            raise ValueError(
                f"This model was made for another catalogue than {data.catalogue}: their schemas differ."
            )
        data.preprocess = self.preprocess
        if stage == "fit":
            self._check_texts(data)
        if self.feature_cache is not None:
            data.preprocess = self._cached_preprocess(data)

    def _check_texts(self, data: Any) -> None:
        tower = self.product.towers["text"] if "text" in self.product.towers else None
        if isinstance(tower, TextTower):
            items = (item for item, _ in zip(data.all_items(), range(1000), strict=False))
            tower.preprocess.check(
                [text for item in items if (text := tower.preprocess.render(item, "product"))]
            )

    def _cached_preprocess(self, data: Any) -> Preprocess:
        assert self.feature_cache is not None
        trainer, encoders = self.trainer, (self.preprocess, self.product, self.query)
        make = {"every_view": data.views.field_dropout > 0, "device": trainer.strategy.root_device}

        def own_items() -> Iterator[Item]:
            return islice(data.all_items(), trainer.global_rank, None, trainer.world_size)

        cached(
            *encoders, own_items, self.feature_cache, **make
        )  # each process makes some of the features
        trainer.strategy.barrier()
        return cached(
            *encoders, data.all_items, self.feature_cache, write=False, **make
        )  # and reads all

    def on_fit_start(self) -> None:
        """Compile what is trained; weights and their names stay as they are."""
        self._check_monitors()
        if self.compile_backend is not None:
            for tower in self._towers():
                if not tower.frozen:
                    tower.compile(backend=self.compile_backend)

    def _check_monitors(self) -> None:
        """Kinds of queries have figures of their own only where there are both."""
        data, trainer = self.trainer.datamodule, self.trainer
        products = data.held_out[data.val_split].own >= 0
        for callback in (*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks):
            monitor = str(getattr(callback, "monitor", None))
            if "_queries/" in monitor and (products.all() or not products.any()):
                raise ValueError(
                    f"monitor={monitor}: all {data.val_split} queries are of one kind here, and have no figures beside "
                    f"those of all: monitor val/{monitor.rpartition('/')[2]}."
                )

    def _towers(self) -> list[Tower]:
        return [
            tower
            for encoder in dict.fromkeys((self.product, self.query))
            for tower in encoder.towers.values()
        ]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What a batch does follows from its number and the weights, so a resumed run equals one that never stopped."""
        for loss in self.losses:
            loss.clamp()
        for tower in self._towers():
            tower.at(self.global_step / max(1, self.planned_steps or 1))
        number = (
            self.trainer.fit_loop.epoch_loop.total_batch_idx
        )  # several batches make a step where gradients add up
        torch.manual_seed((self.seed * 1_000_003 + number) * 1_000 + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        query = self.encode_chunks(self.query, batch.query)
        product = self.encode_chunks(self.product, batch.product)
        with torch.autocast(self.device.type, enabled=False):
            losses = [
                self._compared(*pair, query, product, batch)
                for pair in zip(self.compare, self.losses, strict=True)
            ]
            loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            raise self._not_finite(f"The loss is {loss.item()}", batch)
        if num_processes() > 1:
            loss = loss + self._idle(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.weight), sync_dist=True)
        if len(losses) > 1:
            for comparison, value in zip(self.compare, losses, strict=True):
                self.log(
                    f"train/loss_{comparison}", value, batch_size=len(batch.weight), sync_dist=True
                )
        if isinstance(self.loss, ContrastiveLoss):
            self.log("train/temperature", 1 / self.loss.scale, batch_size=len(batch.weight))
        for side, encoder, encoded in (
            ("query", self.query, query),
            ("product", self.product, product),
        ):
            for name, share in zip(encoder.towers, encoded.shares.detach().mean(0), strict=True):
                self.log(f"train/{side}_share_{name}", share, batch_size=len(batch.weight))
        return loss

    def _compared(
        self,
        comparison: Comparison,
        loss: nn.Module,
        query: Encoded,
        product: Encoded,
        batch: Batch,
    ) -> Tensor:
        """The weighted loss of one comparison."""
        asked, asks = self.query.view(query, comparison.query)
        found, answers = self.product.view(product, comparison.product)
        both = asks & answers[: len(batch.weight)]
        batch = batch._replace(
            weight=batch.weight * both,
            label=None if batch.label is None else batch.label.masked_fill(~both, torch.nan),
            query_present=asks,
            product_present=answers,
        )
        vectors = compared(asked, "query", self.metric), compared(found, "product", self.metric)
        value: Tensor = comparison.weight * loss(*vectors, batch)
        return value

    def _idle(self, batch: Batch) -> Tensor:
        """Zero, with a gradient for the weights that this batch has no use for.

        Other processes wait for theirs.
        """
        return sum(
            (
                0.0 * parameter.sum()
                for encoder, items in ((self.query, batch.query), (self.product, batch.product))
                for name in encoder.towers
                if getattr(items, name) is None
                for module in (encoder.towers[name], encoder.projections[name])
                for parameter in module.parameters()
                if parameter.requires_grad
            ),
            start=torch.zeros((), device=self.device),
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step along gradients that are not finite would spoil the weights; the scaler of fp16 skips it instead."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        norm = nn.utils.get_total_norm(p.grad for p in self.parameters() if p.grad is not None)
        if not torch.isfinite(norm):
            raise self._not_finite(f"The norm of the gradient is {norm.item()}")

    def _not_finite(self, what: str, batch: Batch | None = None) -> FloatingPointError:
        products = (
            "" if batch is None else ", ".join(self.trainer.datamodule.product_ids(batch)[:8])
        )
        temperature = (
            (1 / self.loss.scale).item() if isinstance(self.loss, ContrastiveLoss) else math.nan
        )
        return FloatingPointError(
            f"{what} at step {self.global_step} (temperature {temperature:.4f}"
            + (f", products {products}" if products else "")
            + "). Lower model.lr, or train with trainer.precision=bf16-mixed or 32. Checkpoints so far are untouched."
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with one learning rate for new parts and one for pretrained towers; warm-up, then a cosine."""
        optimizer = torch.optim.AdamW(self.parameter_groups())
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError(
                "The learning rate falls over a known number of steps, and trainer.max_epochs=-1 has no end: name "
                "trainer.max_epochs or trainer.max_steps (trainer.max_time may stop a run earlier)."
            )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        if self.planned_steps not in (None, steps) and not self.replan:
            raise ValueError(
                f"This run was planned for {self.planned_steps} steps and would now have {steps}, so its learning rate "
                "would jump. Resume it with the settings it began with, or say --replan true."
            )
        self.planned_steps = steps
        warmup = max(1, round(self.warmup * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (
                1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by learning rate and decay.

        Matrices decay; vectors and scalars do not.
        """
        pretrained = {
            id(parameter)
            for encoder in (self.product, self.query)
            for tower in encoder.towers.values()
            if tower.pretrained
            for parameter in tower.parameters()
        }
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                lr = self.pretrained_lr if id(parameter) in pretrained else self.lr
                decay = (
                    self.weight_decay if parameter.ndim > 1 and not name.endswith("bias") else 0.0
                )
                groups.setdefault((lr, decay), []).append(parameter)
        return [
            {"params": params, "lr": lr, "weight_decay": decay}
            for (lr, decay), params in groups.items()
        ]

    # ------------------------------------------------------------------ held-out queries

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self.held_out: tuple[list[Any], list[Any]] = ([], [])

    def validation_step(
        self, batch: NumberedItems, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Encode held-out queries (loader 0) and the products they are searched among (loader 1)."""
        side: Side = "query" if dataloader_idx == 0 else "product"
        encoded = self.encode_chunks(self.query if side == "query" else self.product, batch.items)
        vectors = compared(encoded.embedding.float(), side, self.metric)
        vectors = vectors * encoded.present.any(1, keepdim=True)  # of nothing: no embedding
        self.held_out[dataloader_idx].append((batch.row.cpu().numpy(), vectors.cpu().numpy()))

    def on_validation_epoch_end(self) -> None:
        """Exact search of the held-out queries."""
        figures = self._held_out_metrics("val", self.trainer.datamodule.val_split)
        for name, value in figures.items():
            self.log(name, value, prog_bar=name == "val/ndcg@10")

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: NumberedItems, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self.log_dict(self._held_out_metrics("test", self.trainer.datamodule.test_split))

    def _held_out_metrics(self, name: str, split: str) -> dict[str, float]:
        asked = self.trainer.datamodule.held_out[split]
        query, searched = self._all_rows(self.held_out[0], len(asked))
        product, _ = self._all_rows(self.held_out[1], len(asked.gallery))
        if not (np.isfinite(query).all() and np.isfinite(product).all()):
            raise self._not_finite("Embeddings of held-out queries or products are not numbers")
        unread = ~query[searched].any(1)  # a sanity check encodes the first batches alone
        if unread.all() and searched.all():
            raise ValueError(
                f"None of the {len(asked)} {split} queries ({asked.asked}) has anything that this model reads "
                f"({', '.join(self.query.towers)}), so no model could be chosen by them: give it a tower for "
                "them, or the catalogue judged queries, groups or families."
            )
        if unread.any() and self.trainer.is_global_zero and split not in self._told:
            self._told.add(split)
            logger.warning(
                "%d of %d %s queries have nothing that this model reads (%s) and find nothing.",
                unread.sum(),
                len(unread),
                split,
                ", ".join(self.query.towers),
            )
        retrieved = exact_search(query[searched], product, asked.own[searched], k=10)
        retrieved[unread] = -1
        relevant, judged, grade = (
            asked.relevant[searched],
            asked.judged[searched],
            asked.grade[searched],
        )
        asks_product = asked.own[searched] >= 0
        parts = {name: np.full(len(retrieved), True)}
        if asks_product.any() and not asks_product.all():
            parts |= {
                f"{name}/product_queries": asks_product,
                f"{name}/other_queries": ~asks_product,
            }
        figures: dict[str, float] = {}
        for part, of in parts.items():
            figures |= ranking_figures(part, retrieved[of], relevant[of], judged[of], grade[of])
        return figures

    def _all_rows(self, parts: list[Any], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(num_rows, D) of all processes, zeros where a row is of nothing; (num_rows,) bool, which were encoded."""
        gathered: list[Any] = [parts]
        if num_processes() > 1:
            gathered = [None] * num_processes()
            torch.distributed.all_gather_object(gathered, parts)
        result, encoded = np.zeros((num_rows, self.embed_dim), np.float32), np.zeros(num_rows, bool)
        for process in gathered:
            for rows, embeddings in process:
                result[rows], encoded[rows] = embeddings, True
        return result, encoded

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain data only, so that checkpoints load in torch's safe mode."""
        assert self.schema is not None
        checkpoint["schema"] = asdict(self.schema)
        checkpoint["planned_steps"] = self.planned_steps

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As Module's; weights of another model are a ValueError."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            about = "; ".join(line.strip()[:120] for line in str(error).splitlines()[1:3])
            raise ValueError(
                f"The checkpoint is of another model than this configuration makes ({about}). A run keeps the "
                "configuration that it was trained with as logs/version_0/config.yaml: name that one with --config."
            ) from None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Parameters of attributes must exist before their weights come."""
        self.planned_steps = checkpoint.get("planned_steps")
        schema = Schema.from_dict(checkpoint["schema"])
        if self.schema is None:
            self.set_schema(schema)
        elif self.schema != schema:
            raise ValueError(
                "The checkpoint was trained on another catalogue: its schema differs from this one's."
            )


def ranking_figures(
    name: str, retrieved: np.ndarray, relevant: np.ndarray, judged: np.ndarray, grade: np.ndarray
) -> dict[str, float]:
    """hit@1, hit@10, recall@10, MRR and nDCG of the first 10 results, by name; arguments as in `tritower.retrieval.ranking.metrics`."""
    return {
        f"{name}/hit@1": hit_at_k(retrieved, relevant, 1),
        f"{name}/hit@10": hit_at_k(retrieved, relevant, 10),
        f"{name}/recall@10": recall_at_k(retrieved, relevant, 10),
        f"{name}/mrr@10": mrr(retrieved, relevant),
        f"{name}/ndcg@10": ndcg_at_k(retrieved, judged, grade, 10),
    }


def exact_search(
    query: np.ndarray, product: np.ndarray, own: np.ndarray, k: int, block: int = 1024
) -> np.ndarray:
    """The k products with the highest inner product, best first, never the query's own product.

    Args:
        query: (Q, D) float32.
        product: (G, D) float32.
        own: (Q,) int64 position of the product that is asked; -1 = none.
        k: results.
        block: queries at a time.

    Returns:
        (Q, k) int64 positions, -1 where the gallery has fewer. Zero vectors are no products.
    """
    result = np.full((len(query), k), -1, np.int64)
    products, nothing = torch.from_numpy(product), torch.from_numpy(~product.any(1))
    for start in range(0, len(query), block):
        scores = torch.from_numpy(query[start : start + block]) @ products.T
        mine = torch.from_numpy(own[start : start + block])
        asked = (mine >= 0).nonzero().flatten()
        scores[asked, mine[asked]] = float("-inf")
        scores[:, nothing] = float("-inf")
        best = scores.topk(min(k, scores.shape[1]), 1)
        found = torch.where(best.values > float("-inf"), best.indices, -1).numpy()
        result[start : start + block, : found.shape[1]] = found
    return result


def to_device(items: Items, device: torch.device) -> Items:
    """As Lightning does it for batches."""
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(items, device)


def _outline(item: Item) -> str:
    return (
        f"text {list(item.text)}, {len(item.images)} pictures, attributes {list(item.attributes)}"
    )
