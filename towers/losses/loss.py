"""Contrastive losses: a query and the product that answers it attract, all others in the batch repel.

Which other pairs of a batch are positives too, or are left out, follows from equal keys (see
`tritower.datamodules.batch.RELATIONS`): the same product twice in a batch is never pushed apart.

Rows are compared in blocks, so that no more than a few million of the B x P similarities are held
  at a time: what a
large batch costs here is time and never memory.

Under several processes each one holds its own rows; queries and products of all are gathered with
gradient, and each process returns its share of the loss times the number of processes. Distributed
training averages gradients, so they are exactly those of one process with the whole batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.batch import NO_KEY, RELATIONS, Batch, Relation
from tritower.towers.losses.gather import gather_rows, num_processes

BLOCK = 1 << 22
"""Similarities that are held at a time; each takes about 40 bytes while its gradient is made."""


class Targets(NamedTuple):
    """What each pair of a query and a product is.

    Attributes:
        positive: (B, P) float32 weight of a positive, 0 for all other pairs.
        counts: (B, P) bool, False = the pair is left out.
    """

    positive: Tensor
    counts: Tensor


def targets(
    query_keys: Tensor,
    product_keys: Tensor,
    answer: Tensor,
    positives: dict[Relation, float],
    ignored: list[Relation],
    itself: Tensor | None = None,
    judged: Tensor | None = None,
    present: tuple[Tensor, Tensor] | None = None,
) -> Targets:
    """Pairs by their keys: the largest weight of the relations that hold; else left out; else negative.

    What was said of a very pair counts before what its keys suggest.

    Args:
        query_keys: (B, R) int64.
        product_keys: (P, R) int64.
        answer: (B,) int64 column of the product that answers each query: always a positive of
            weight 1.
        positives: weight of each relation that makes a positive.
        ignored: relations that leave a pair out which is no positive.
        itself: (B,) int64 column that is the row itself, and is left out; None where there is none.
        judged: (B, P) float32 weight of each pair's judgement, 0 where there is none; they are of
            the relation `query`.
        present: (B,) and (P,) bool, the rows and columns that stand for something. Others are no
            answers and no negatives, but a row always keeps the answer of its own, so that it is
            never without a positive.
    """
    shape = (len(query_keys), len(product_keys))
    positive = torch.zeros(shape, device=query_keys.device)
    counts = torch.ones(shape, dtype=torch.bool, device=query_keys.device)
    for relation in ignored:
        counts &= ~same(query_keys, product_keys, relation)
    for relation, weight in sorted(
        positives.items(), key=lambda pair: pair[1]
    ):  # the largest weight has the last word
        positive.masked_fill_(same(query_keys, product_keys, relation), weight)
    row = torch.arange(len(answer), device=answer.device)
    if present is not None:
        counts &= present[1]
        counts &= present[0][:, None]
    positive[row, answer] = 1.0
    if judged is not None:
        weight = positives.get("query", 0.0)
        positive = torch.where(judged * weight > 0, judged * weight, positive)
        if "query" in ignored:
            counts &= judged == 0
    if itself is not None:
        positive[row, itself], counts[row, itself] = 0.0, False
    if present is not None:
        own = positive[row, answer]
        positive.mul_(present[1])
        positive[row, answer] = own
    return Targets(positive, counts | (positive > 0))


def same(query_keys: Tensor, product_keys: Tensor, relation: Relation) -> Tensor:
    """(B, P) bool: both have a key of this relation, and it is the same."""
    column = RELATIONS.index(relation)
    keys = query_keys[:, column]
    keys = torch.where(
        keys == NO_KEY, NO_KEY - 1, keys
    )  # equals no product's, not even that of one without
    return keys.unsqueeze(1) == product_keys[:, column]


def multi_positive_info_nce(logits: Tensor, target: Targets) -> Tensor:
    """(B, P) logits -> (B,).

    Cross-entropy against the row's positives (SupCon's L_out, arXiv:2004.11362).

    With one positive it is InfoNCE (arXiv:1807.03748). Of zero embeddings it is the log of the
    number of products.
    """
    attract = (logits * target.positive).sum(1) / target.positive.sum(1)
    return logits.masked_fill(~target.counts, float("-inf")).logsumexp(1) - attract


def in_blocks(
    losses: Callable[..., Tensor], num_columns: int, shared: Sequence[Tensor], *rows: Tensor
) -> Tensor:
    """(B,) losses of B rows, of as many at a time as have `BLOCK` similarities; the backward pass makes those again.

    Args:
        losses: (*shared, *(b, ...) of each of `rows`) -> (b,).
        num_columns: P, similarities of one row.
        shared: tensors that all blocks need as a whole.
        rows: tensors of B rows.
    """
    size = max(1, BLOCK // max(1, num_columns))
    if len(rows[0]) <= size:
        return losses(*shared, *rows)
    found: Tensor = _InBlocks.apply(losses, size, len(shared), *shared, *rows)
    return found


class _InBlocks(torch.autograd.Function):
    """See `in_blocks`.

    Results go to one place that is made at first: small tensors that stay, one per block, would
      keep the C library from
    using again what lies between them; checkpoints of the blocks took tens of gigabytes so.
    """

    @staticmethod
    def forward(
        ctx: Any, losses: Callable[..., Tensor], size: int, num_shared: int, *tensors: Tensor
    ) -> Tensor:
        ctx.losses, ctx.size, ctx.num_shared = losses, size, num_shared
        ctx.save_for_backward(*tensors)
        shared, rows = tensors[:num_shared], tensors[num_shared:]
        result = rows[0].new_empty(len(rows[0]))
        for start in range(0, len(result), size):
            part = slice(start, start + size)
            result[part] = losses(*shared, *(tensor[part] for tensor in rows))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        gradients = [
            torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)
        ]
        for start in range(0, len(gradient), ctx.size):
            part = slice(start, start + ctx.size)
            with torch.enable_grad():
                seen = [
                    t.detach() if i < ctx.num_shared else t[part].detach()
                    for i, t in enumerate(tensors)
                ]
                inputs = [t.requires_grad_() for t, need in zip(seen, needed, strict=True) if need]
                found = iter(torch.autograd.grad(ctx.losses(*seen), inputs, gradient[part]))
            for i, total in enumerate(gradients):
                if total is not None:
                    (total if i < ctx.num_shared else total[part]).add_(next(found))
        return (None, None, None, *gradients)


class Rows(NamedTuple):
    """The embeddings of one side, and what is known of them.

    Attributes:
        vectors: (n, D) unit vectors.
        keys: (n, R) int64.
        offset: (n,) float32, added to similarities with them.
        present: (n,) bool, False = stands for nothing, and is compared with nothing.
        judged: (n, J) int64 `product` keys of what answers them; of products, J = 0.
        grades: (n, J) float32.
    """

    vectors: Tensor
    keys: Tensor
    offset: Tensor
    present: Tensor
    judged: Tensor
    grades: Tensor

    def gathered(self) -> Rows:
        """Those of all processes, in float32."""
        judged, grades = (
            gather_rows(t) if t.shape[1] else t.new_empty(num_processes() * len(t), 0)
            for t in self[4:]
        )
        vectors, keys, offset, present = map(gather_rows, self[:4])
        return Rows(vectors.float(), keys, offset, present, judged, grades)

    def first(self, count: int) -> Rows:
        """The first rows."""
        return Rows(*(tensor[:count] for tensor in self))


def judged_pairs(rows: Rows, columns: Rows) -> Tensor | None:
    """(n, m) float32 weight of the judgement of each pair of a query and a product, 0 where there is none.

    Either side may be the queries; None where no judgements are known.
    """
    if columns.judged.shape[1]:
        said = judged_pairs(columns, rows)
        return None if said is None else said.T
    if not rows.judged.shape[1]:
        return None
    products, number = columns.keys[:, RELATIONS.index("product")].unique(return_inverse=True)
    place = torch.searchsorted(products, rows.judged).clamp(max=len(products) - 1)
    weight = torch.where(
        (products[place] == rows.judged) & (rows.judged != NO_KEY), rows.grades, 0.0
    )
    table = weight.new_zeros(len(weight), len(products)).scatter_reduce_(1, place, weight, "amax")
    return table[:, number]


def both_sides(
    query: Tensor, product: Tensor, batch: Batch, offset: Tensor | None = None
) -> tuple[Rows, Rows]:
    """Queries and products of this process; `offset` is (P,) of the products."""
    nothing = product.new_zeros(len(product), dtype=torch.float32)
    judged, grades = batch.judged, batch.grades
    asks, found = batch.query_present, batch.product_present
    if judged is None or grades is None:
        judged, grades = batch.query_keys[:, :0], nothing[: len(query), None][:, :0]
    products = Rows(
        product,
        batch.product_keys,
        nothing if offset is None else offset,
        nothing == 0 if found is None else found,
        batch.product_keys[:, :0],
        nothing[:, None][:, :0],
    )
    none = nothing[: len(query)]
    return Rows(
        query, batch.query_keys, none, none == 0 if asks is None else asks, judged, grades
    ), products


class Loss(nn.Module, ABC):
    """Base of all losses: what a batch says about the embeddings of its queries and products."""

    def set_dim(self, dim: int) -> None:
        """Learn D, the size of embeddings; called once, before anything else."""

    def clamp(self) -> None:
        """Keep learned parameters within their bounds; called before every step."""

    @abstractmethod
    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The loss of this process's rows.

        Args:
            query: (B, D) unit vectors.
            product: (P, D) unit vectors; row i < B answers query i.
            batch: keys, weights and labels.
        """


class ContrastiveLoss(Loss):
    """Base of the losses that compare every query with every product: keys, temperature, processes.

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
        positives: relation -> weight of pairs that are positives beside the product that answers;
            null takes `product`, `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        positives: dict[Relation, float] | None = None,
        ignored: list[Relation] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < min_temperature <= temperature:
            raise ValueError(
                f"temperature={temperature} must be at least min_temperature={min_temperature} > 0."
            )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_logit_scale = math.log(1 / min_temperature)
        self.positives: dict[Relation, float] = (
            positives if positives is not None else {"product": 1.0, "group": 1.0, "query": 1.0}
        )
        self.ignored: list[Relation] = (
            ignored if ignored is not None else ["family", "title", "picture"]
        )
        for relation in (*self.positives, *self.ignored):
            if relation not in RELATIONS:
                raise ValueError(
                    f"{relation!r} is no relation: choose from {', '.join(RELATIONS)}."
                )

    @property
    def scale(self) -> Tensor:
        """1 / temperature, clamped."""
        return self.logit_scale.clamp(max=self.max_logit_scale).exp()

    def clamp(self) -> None:
        """Keep the learned scale where its gradient is alive; called before every step."""
        with (
            torch.no_grad()
        ):  # float32 rounds the bound itself to above it, where it could never rise again
            self.logit_scale.clamp_(max=self.max_logit_scale - 1e-6)


class InfoNCE(ContrastiveLoss):
    """Multi-positive InfoNCE in both directions (or one), rows weighted by graded relevance (GCL, arXiv:2404.08535).

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
        positives: relation -> weight of pairs that are positives beside the product that answers;
            null takes `product`, `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.
        same_side: compare queries with queries and products with products too (SupCon,
            arXiv:2004.11362).
        log_q: 0 to 1, how much of the logarithm of a product's frequency is taken off its
            similarity where it is no answer: popular products stand in more batches than others,
            and would be pushed away more often. The answer's own is left as it is
            (arXiv:2507.09331).
        product_share: 0 to 1, how much of the loss is of products that look for their queries; the
            rest is of queries that look for their products. 0 suits answers that go one way, such
            as accessories.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        positives: dict[Relation, float] | None = None,
        ignored: list[Relation] | None = None,
        same_side: bool = False,
        log_q: float = 0.0,
        product_share: float = 0.5,
    ) -> None:
        super().__init__(temperature, min_temperature, positives, ignored)
        if not 0 <= log_q <= 1:
            raise ValueError(f"log_q={log_q}: choose 0 (none) to 1 (all of it).")
        if not 0 <= product_share <= 1:
            raise ValueError(
                f"product_share={product_share}: choose 0 (queries alone) to 1 (products alone)."
            )
        self.same_side, self.log_q, self.product_share = same_side, log_q, product_share

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `ContrastiveLoss.forward`."""
        answers, weight, offset = len(query), batch.weight.float(), None
        if self.log_q and batch.frequency is not None:
            often = torch.where(
                batch.frequency > 0, batch.frequency, 1.0
            )  # 0: a mined one, which no frequency drew
            offset = -self.log_q * often.log()
        asked, found = both_sides(query, product, batch, offset)
        queries, products = (
            self.known("query", asked.gathered()),
            self.known("product", found.gathered()),
        )
        row = torch.arange(answers, device=query.device)
        query_row, product_row = rank_offset(answers) + row, rank_offset(len(product)) + row
        losses = torch.zeros_like(weight)
        asked, found = (
            asked._replace(present=weight > 0),
            found.first(answers)._replace(present=weight > 0),
        )
        if self.product_share < 1:
            forth = self.direction(asked, query_row, products, product_row, queries)
            losses = losses + (1 - self.product_share) * self.over_batches(
                "query", forth, asked.keys
            )
        if self.product_share > 0:
            back = self.direction(found, product_row, queries, query_row, products)
            losses = losses + self.product_share * self.over_batches("product", back, found.keys)
        return num_processes() * (weight * losses).sum() / gather_rows(weight).sum().clamp(min=1e-9)

    def direction(
        self, rows: Rows, itself: Tensor, columns: Rows, answer: Tensor, own_side: Rows
    ) -> Tensor:
        """(B,) `of_logits` of one direction.

        Args:
            rows: B of this process; those that weigh nothing are present to none.
            itself: (B,) int64, where they stand in `own_side`.
            columns: of all processes, what is asked for.
            answer: (B,) int64, the column that answers each row.
            own_side: of all processes, the side that the rows are of.
        """
        vectors, all_keys, offset, present = columns[:4]
        if self.same_side:
            both = zip(columns[:4], own_side[:4], strict=True)
            vectors, all_keys, offset, present = (torch.cat(pair) for pair in both)

        def of_rows(scale: Tensor, vectors: Tensor, *own: Tensor) -> Tensor:
            some, (answer, itself) = Rows(*own[:-2]), own[-2:]
            said = judged_pairs(some, columns)
            if said is not None:  # nothing is said of two of one side
                said = F.pad(said, (0, len(vectors) - said.shape[1]))
            target = targets(
                some.keys,
                all_keys,
                answer,
                self.positives,
                self.ignored,
                itself if self.same_side else None,
                said,
                (some.present, present),
            )
            logits = scale * (some.vectors @ vectors.T)
            if self.log_q:
                logits = logits + torch.where(target.positive > 0, 0.0, offset)
            return self.of_logits(logits, target)

        shared = self.scale.float(), vectors
        own = *rows._replace(vectors=rows.vectors.float()), answer, itself + len(columns.vectors)
        return in_blocks(of_rows, len(all_keys), shared, *own)

    def known(self, side: str, rows: Rows) -> Rows:
        """The rows of all processes, and what others of this side there are to be compared with."""
        return rows

    def of_logits(self, logits: Tensor, target: Targets) -> Tensor:
        """(B, P) logits -> (B,): what is made of a row's similarities."""
        return multi_positive_info_nce(logits, target)

    def over_batches(self, side: str, losses: Tensor, keys: Tensor) -> Tensor:
        """(B,) `of_logits` and (B, R) keys of `query` or `product` rows -> (B,) losses."""
        return losses


class SigmoidLoss(ContrastiveLoss):
    """A yes-or-no question for every pair (SigLIP, arXiv:2303.15343), summed over a query's products.

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
        bias: added to all logits at the start; it is learned.
        positives: relation -> weight of pairs that are positives beside the product that answers;
            null takes `product`, `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        min_temperature: float = 0.01,
        bias: float = -10.0,
        positives: dict[Relation, float] | None = None,
        ignored: list[Relation] | None = None,
    ) -> None:
        super().__init__(temperature, min_temperature, positives, ignored)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `ContrastiveLoss.forward`."""
        asked, found = both_sides(query, product, batch)
        products = found.gathered()

        def of_rows(scale: Tensor, bias: Tensor, vectors: Tensor, *own: Tensor) -> Tensor:
            some, (answer, weight) = Rows(*own[:-2]), own[-2:]
            said = judged_pairs(some, products)
            known = some.present, products.present
            target = targets(
                some.keys,
                products.keys,
                answer,
                self.positives,
                self.ignored,
                judged=said,
                present=known,
            )
            logits = scale * (some.vectors @ vectors.T) + bias
            is_positive = target.positive > 0
            sign = torch.where(is_positive, 1.0, -1.0)
            importance = torch.where(is_positive, target.positive, target.counts.float())
            if said is not None and self.positives.get("query"):
                judged = is_positive & (
                    said > 0
                )  # weighs what was said of it, whatever its row weighs
                importance = torch.where(
                    judged, importance / weight[:, None].clamp(min=1e-9), importance
                )
            importance[torch.arange(len(answer), device=answer.device), answer] = 1.0
            return -(importance * F.logsigmoid(sign * logits)).sum(1)

        answer = rank_offset(len(product)) + torch.arange(len(query), device=query.device)
        shared = self.scale.float(), self.bias, products.vectors
        weight = batch.weight.float()
        own = *asked._replace(vectors=query.float()), answer, weight
        losses = in_blocks(of_rows, len(products.keys), shared, *own)
        return num_processes() * (weight * losses).sum() / gather_rows(weight).sum().clamp(min=1e-9)


def rank_offset(rows: int) -> int:
    """Where this process's rows start among the gathered ones."""
    return rows * torch.distributed.get_rank() if num_processes() > 1 else 0
