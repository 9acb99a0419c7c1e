"""Contrastive losses against values worked out by hand and by loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from torch import Tensor

from tests.support.loss_batches import keys, make_batch, unit
from tritower.datamodules.batch import NO_KEY, RELATIONS, Batch
from tritower.towers.losses import blocks, info_nce, sigmoid
from tritower.towers.losses.contrastive import ContrastiveLoss
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.sigmoid import SigmoidLoss
from tritower.towers.losses.targets import PairRules, Targets, make_targets

PRODUCT, GROUP, FAMILY = (RELATIONS.index(name) for name in ("product", "group", "family"))


def reference(loss: ContrastiveLoss, query: Tensor, product: Tensor, batch: Batch) -> float:
    """The loss by loops over pairs, in float64."""
    query, product = query.double(), product.double()
    scale = min(math.exp(loss.logit_scale.item()), math.exp(loss.max_logit_scale))
    total_weight = max(batch.weight.double().sum().item(), 1e-9)
    there = {"query": batch.query_present.tolist(), "product": batch.product_present.tolist()}

    said: dict[tuple[int, int], float] = {}  # query and product rows that are judged
    for i, answers in enumerate(
        () if batch.judged_products is None else batch.judged_products.tolist()
    ):
        for product_key, grade in zip(answers, batch.judgement_weights[i].tolist(), strict=True):
            for j in (batch.product_keys[:, PRODUCT] == product_key).nonzero().flatten().tolist():
                said[i, j] = max(said.get((i, j), 0.0), grade if product_key != NO_KEY else 0.0)

    def kind(q: Tensor, p: Tensor, answer: bool, judged: float) -> float | None:
        """Weight of a positive, 0 for a negative, None for a pair that is left out."""
        equal = {name: q[i] == p[i] != NO_KEY for i, name in enumerate(RELATIONS)}
        weight = max(
            [1.0 if answer else 0.0]
            + [w for name, w in loss.rules.positives.items() if equal[name]]
        )
        if judged and "query" in loss.rules.positives:
            return judged * loss.rules.positives["query"]
        return None if not weight and any(equal[name] for name in loss.rules.ignored) else weight

    Side = tuple[Tensor, Tensor, Tensor, list[bool]]

    def direction(rows: int, columns: Side, own: Side) -> float:
        """Of the first rows of their own side (vectors, keys, frequencies, presence), against those
        of the other.
        """
        total = 0.0
        for i in range(rows):
            if not batch.weight[i]:
                continue
            row, row_keys, _, _ = (part[i] for part in own)
            grades = [
                said.get((i, j) if own is queries else (j, i), 0.0) for j in range(len(columns[0]))
            ]
            seen = [
                (*values, i == j, grades[j]) for j, values in enumerate(zip(*columns, strict=True))
            ]
            if loss.same_side:
                seen += [
                    (*values, False, 0.0)
                    for j, values in enumerate(zip(*own, strict=True))
                    if j != i
                ]
            kinds = [
                kind(row_keys, key, answer, judged) if present else None
                for _, key, _, present, answer, judged in seen
            ]
            logits = [
                scale * float(row @ column) - (0 if k else loss.log_q * math.log(often))
                for (column, _, often, *_), k in zip(seen, kinds, strict=True)
            ]
            log_sum = math.log(
                sum(math.exp(x) for x, k in zip(logits, kinds, strict=True) if k is not None)
            )
            attract = sum(k * (x - log_sum) for x, k in zip(logits, kinds, strict=True) if k)
            total -= batch.weight[i].item() * attract / sum(k for k in kinds if k)
        return total / total_weight

    if isinstance(loss, SigmoidLoss):
        total = 0.0
        for i in range(len(query)):
            for j in range(len(product)):
                judged = said.get((i, j), 0.0)
                weight = kind(batch.query_keys[i], batch.product_keys[j], i == j, judged)
                logit = scale * float(query[i] @ product[j]) + loss.bias.item()
                if weight is not None and (there["product"][j] or i == j):
                    of_row = batch.weight[i].item()
                    importance = (
                        of_row
                        if i == j or not weight
                        else weight * (1 if judged and of_row else of_row)
                    )
                    total += importance * math.log1p(math.exp(-logit if weight else logit))
        return total / total_weight
    queries = query, batch.query_keys, torch.ones(len(query)), there["query"]
    products = product, batch.product_keys, batch.frequency, there["product"]
    return (direction(len(query), products, queries) + direction(len(query), queries, products)) / 2


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_zero_embeddings_lose_log_of_the_batch(rows: int) -> None:
    batch = make_batch(keys(rows, product=list(range(rows))))
    zeros = torch.zeros(rows, 4)
    assert InfoNCE()(zeros, zeros, batch).item() == pytest.approx(math.log(rows), abs=1e-6)


def test_two_by_two_by_hand() -> None:
    query, product = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = InfoNCE(temperature=0.5)
    first, second = math.log(1 + math.exp(2 * 0.6 - 2)), math.log(1 + math.exp(0 - 2 * 0.8))
    back_first, back_second = (
        math.log(1 + math.exp(0 - 2)),
        math.log(1 + math.exp(2 * 0.6 - 2 * 0.8)),
    )
    expected = (first + second + back_first + back_second) / 4
    assert loss(query, product, make_batch(keys(2, product=[1, 2]))).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_either_direction_alone_by_hand() -> None:
    query, product = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    batch, matrix = make_batch(keys(2, product=[1, 2])), query @ product.T
    forth, back = (-m.log_softmax(1).diagonal().mean() for m in (matrix, matrix.T))
    for share, expected in ((0.0, forth), (1.0, back), (0.2, 0.8 * forth + 0.2 * back)):
        value = InfoNCE(temperature=1.0, product_share=share)(query, product, batch)
        torch.testing.assert_close(value, expected)


DEFAULTS = [InfoNCE, SigmoidLoss]


@pytest.mark.parametrize("loss", DEFAULTS)
def test_equal_products_groups_and_queries_are_positives_unless_told(
    loss: type[ContrastiveLoss],
) -> None:
    made = loss()
    assert made.rules.positives == {"product": 1.0, "group": 1.0, "query": 1.0}
    assert made.rules.ignored == ["family", "title", "picture"]


@pytest.mark.parametrize(
    ("loss", "pull", "push"),
    [
        # Of seven products that count four are positives: softmax gives 1/7 to each, the target is
        # 1/4 of a positive.
        (InfoNCE(temperature=1.0, product_share=0.0), 1 / 7 - 1 / 4, 1 / 7),
        # Each pair by itself: the chance that it is a positive is 1/2, and all weigh alike.
        (SigmoidLoss(temperature=1.0, bias=0.0), -1 / 2, 1 / 2),
    ],
    ids=["infonce", "sigmoid"],
)
def test_what_default_relations_pull_leave_and_push_by_hand(
    loss: ContrastiveLoss, pull: float, push: float
) -> None:
    """Of a query, its answer that has no key in common.

    And for each relation a product that has that key alone.
    """
    expected = {
        "answer": pull,
        "product": pull,
        "group": pull,
        "family": 0.0,
        "title": 0.0,
        "picture": 0.0,
    }
    expected |= {"model": push, "category": push, "branch": push, "query": pull}
    assert tuple(expected)[1:] == RELATIONS
    product_keys = torch.full((1 + len(RELATIONS), len(RELATIONS)), NO_KEY)
    product_keys[1:].fill_diagonal_(7)
    similarity = torch.zeros(1, len(product_keys), requires_grad=True)
    batch = make_batch(torch.full((1, len(RELATIONS)), 7), product_keys)
    loss(
        similarity, torch.eye(len(product_keys)), batch
    ).backward()  # embeddings whose products are the matrix
    assert dict(zip(expected, similarity.grad[0].tolist(), strict=True)) == pytest.approx(expected)


def test_several_positives_share_the_target_by_hand() -> None:
    """Rows 0 and 1 are of one group, of weight 1/2: the target of row 0 is 2/3, 1/3, 0."""
    similarity = torch.tensor([[0.9, 0.5, -0.2], [0.4, 0.8, 0.0], [0.1, 0.3, 0.7]])
    loss = InfoNCE(temperature=1.0, positives={"product": 1.0, "group": 0.5}, ignored=[])
    batch = make_batch(keys(3, product=[1, 2, 3], group=[7, 7, 8]))
    target = torch.tensor([[2, 1, 0], [1, 2, 0], [0, 0, 3]]) / 3
    forth = -(target * similarity.log_softmax(1)).sum(1).mean()
    back = -(target * similarity.T.log_softmax(1)).sum(1).mean()
    value = loss(
        similarity, torch.eye(3), batch
    )  # embeddings of any length: their products are the matrix
    assert value.item() == pytest.approx(((forth + back) / 2).item(), abs=1e-6)


@st.composite
def batches(
    draw: st.DrawFn,
) -> tuple[int, int, list[list[int]], list[list[int]], list[float], list | None, tuple]:
    rows = draw(st.integers(1, 6))
    extra = draw(st.integers(0, 3))
    width = draw(st.integers(0, 3))
    answer = st.one_of(
        st.just((NO_KEY, 0.0)), st.tuples(st.integers(0, 4), st.sampled_from([0.25, 0.5, 1.0]))
    )
    answers = st.lists(answer, min_size=width, max_size=width)
    key = st.lists(st.integers(-1, 3), min_size=len(RELATIONS), max_size=len(RELATIONS))
    weight = st.sampled_from([0.0, 0.3, 1.0])
    return (
        rows,
        extra,
        draw(st.lists(key, min_size=rows, max_size=rows)),
        draw(st.lists(key, min_size=rows + extra, max_size=rows + extra)),
        [1.0, *draw(st.lists(weight, min_size=rows - 1, max_size=rows - 1))],
        draw(st.lists(answers, min_size=rows, max_size=rows)) if width else None,
        (draw(st.sets(st.integers(0, rows - 1))), draw(st.sets(st.integers(0, rows + extra - 1)))),
    )


RELATED = {
    "positives": {"product": 1.0, "group": 0.4, "query": 1.0},
    "ignored": ["family", "title"],
}
LOSSES = {
    "infonce": lambda: InfoNCE(**RELATED),
    "same side": lambda: InfoNCE(**RELATED, same_side=True),
    "log q": lambda: InfoNCE(**RELATED, log_q=0.7),
    "same side, log q": lambda: InfoNCE(**RELATED, same_side=True, log_q=1.0),
    "sigmoid": lambda: SigmoidLoss(bias=-2.0, **RELATED),
}


@given(drawn=batches(), name=st.sampled_from(list(LOSSES)), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_losses_equal_loops_in_float64(drawn: tuple, name: str, seed: int) -> None:
    rows, extra, query_keys, product_keys, weight, judged, absent = drawn
    torch.manual_seed(seed)
    loss = LOSSES[name]()
    batch = make_batch(torch.tensor(query_keys), torch.tensor(product_keys), weight, judged, absent)
    query, product = unit(rows), unit(rows + extra)
    value = loss(query, product, batch).item()
    assert value == pytest.approx(reference(loss, query, product, batch), abs=1e-5, rel=1e-5)


def test_a_judged_pair_weighs_in_the_sigmoid_loss_what_it_was_judged() -> None:
    """Of one query with two answers of grades 1/2 and 1, each shown once.

    Each pair has its grade in each row.
    """
    query, product = unit(1).expand(2, -1), unit(2)
    judged = [[(0, 0.5), (1, 1.0)]] * 2
    batch = make_batch(
        keys(2, query=[7, 7]), keys(2, product=[0, 1], query=[7, 7]), [0.5, 1.0], judged
    )
    similarity = (query @ product.T).requires_grad_()
    SigmoidLoss(temperature=1.0, bias=0.0)(similarity, torch.eye(2), batch).backward()
    pull = -similarity.grad * 1.5 * (1 + similarity.detach().exp())  # of a logit x: 1 / (1 + e^x)
    torch.testing.assert_close(pull, torch.tensor([[0.5, 1.0], [0.5, 1.0]]))


def test_what_was_not_judged_weighs_in_the_sigmoid_loss_as_its_row() -> None:
    """Its own answer of grade .1, that is not among the listed ones; a mate of it.

    A listed answer of grade 1/2.
    """
    answers = keys(3, product=[0, 1, 2], group=[3, 3, 4], query=[7, NO_KEY, NO_KEY])
    batch = make_batch(keys(1, group=[3], query=[7]), answers, [0.1], [[(2, 0.5)]])
    similarity = torch.zeros(1, 3, requires_grad=True)
    SigmoidLoss(temperature=1.0, bias=0.0)(similarity, torch.eye(3), batch).backward()
    torch.testing.assert_close(-similarity.grad * 0.1 * 2, torch.tensor([[0.1, 0.1, 0.5]]))


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_for_nothing_is_compared_with_nothing(name: str) -> None:
    """The loss and its gradients are those of the batch without it."""
    torch.manual_seed(0)
    query, product, loss = unit(6), unit(8), LOSSES[name]()
    some = torch.randint(-1, 3, (8, len(RELATIONS)))
    weight = [1.0, 0.5, 1.0, 0.3, 1.0, 1.0]
    whole = make_batch(some[:6], some, weight, absent=({1, 4}, {1, 4, 7}))
    left, found = [0, 2, 3, 5], [0, 2, 3, 5, 6]
    fewer = make_batch(some[left], some[found], [weight[i] for i in left])
    fewer = fewer._replace(frequency=whole.frequency[found])
    inputs = query.requires_grad_(), product.requires_grad_()
    values = loss(*inputs, whole), loss(query[left], product[found], fewer)
    torch.testing.assert_close(*values)
    for one, other in zip(*(torch.autograd.grad(value, inputs) for value in values), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.autograd.grad(loss(*inputs, whole), product)[0][7].any()


def test_a_mined_product_that_is_never_trained_on_has_no_correction() -> None:
    torch.manual_seed(0)
    query, product = unit(3), unit(4)
    batch = make_batch(keys(3, product=[0, 1, 2]), keys(4, product=[0, 1, 2, 3]))
    never, average = (
        batch._replace(frequency=torch.tensor([2.0, 1.0, 1.0, f])) for f in (0.0, 1.0)
    )
    loss = InfoNCE(log_q=1.0)
    torch.testing.assert_close(loss(query, product, never), loss(query, product, average))


def test_without_duplicates_the_loss_and_its_gradients_are_those_of_open_clip() -> None:
    torch.manual_seed(0)
    query, product = unit(9).requires_grad_(), unit(9).requires_grad_()
    loss = InfoNCE(temperature=0.05)
    mine = loss(query, product, make_batch(keys(9, product=list(range(9)))))
    theirs = ClipLoss()(query, product, loss.scale)
    torch.testing.assert_close(mine, theirs)
    inputs = [query, product, loss.logit_scale]
    for one, other in zip(
        torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_where_equal_products_are_equal_vectors_open_clips_loss_is_the_same_sum() -> None:
    """What it takes from one of several photos of a product it gives to the others."""
    torch.manual_seed(0)
    which = torch.tensor([0, 0, 1, 2, 0, 1])
    query, product = unit(6).requires_grad_(), unit(3).requires_grad_()
    loss = InfoNCE(temperature=0.05)
    mine = loss(query, product[which], make_batch(keys(6, product=which.tolist())))
    theirs = ClipLoss()(query, product[which], loss.scale)
    torch.testing.assert_close(mine, theirs)
    inputs = [query, product, loss.logit_scale]
    for one, other in zip(
        torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_have_loss_and_gradients_of_the_whole_and_hold_no_more(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, product = unit(17).requires_grad_(), unit(20).requires_grad_()
    keys = torch.randint(-1, 3, (20, len(RELATIONS)))
    judged = [[(int(torch.randint(-1, 3, ())), 0.5), (4, 0.1)] for _ in range(17)]
    batch = make_batch(keys[:17], keys, torch.rand(17).tolist(), judged)
    loss = LOSSES[name]()

    def step() -> list[Tensor]:
        value = loss(query, product, batch)
        return [value, *torch.autograd.grad(value, [query, product, *loss.parameters()])]

    whole, shapes = step(), []
    monkeypatch.setattr(blocks, "MAX_SCORES", 100)

    def counted(*arguments: Tensor, **named: Tensor) -> Targets:
        shapes.append((len(arguments[0]), len(arguments[1])))
        return make_targets(*arguments, **named)

    monkeypatch.setattr(info_nce, "make_targets", counted)
    monkeypatch.setattr(sigmoid, "make_targets", counted)
    for mine, expected in zip(step(), whole, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    assert len(shapes) > 4 and max(rows * columns for rows, columns in shapes) <= 100


def test_swapping_query_and_product_leaves_the_loss() -> None:
    query, product = unit(6), unit(6)
    query_keys, product_keys = torch.randint(-1, 3, (2, 6, len(RELATIONS)))
    weight = [1.0, 0.5, 1.0, 0.2, 1.0, 0.0]
    for loss in (InfoNCE(), SigmoidLoss()):
        one = loss(query, product, make_batch(query_keys, product_keys, weight))
        other = loss(product, query, make_batch(product_keys, query_keys, weight))
        if isinstance(loss, InfoNCE):
            torch.testing.assert_close(one, other)
        else:  # its rows carry the weights, so it is the same with equal ones
            even = [
                loss(a, b, make_batch(c, d))
                for a, b, c, d in (
                    (query, product, query_keys, product_keys),
                    (product, query, product_keys, query_keys),
                )
            ]
            torch.testing.assert_close(*even)


def test_ignored_pairs_do_not_matter() -> None:
    batch = make_batch(keys(3, product=[1, 2, 3], family=[5, 5, 6]))
    query, product = unit(3), unit(3)
    for loss in (InfoNCE(), SigmoidLoss()):
        moved = query.clone().requires_grad_()
        similarity = moved @ product.T
        similarity.retain_grad()
        value = loss(similarity, torch.eye(3), batch)  # similarities themselves as queries
        value.backward()
        assert similarity.grad[0, 1] == similarity.grad[1, 0] == 0
        assert (similarity.grad != 0).sum() == 7


@pytest.mark.parametrize(
    "loss", [InfoNCE(), SigmoidLoss(), InfoNCE(positives={}, ignored=["product"])]
)
def test_the_same_product_twice_in_a_batch_is_never_pushed_apart(loss: ContrastiveLoss) -> None:
    """Eight rows, of which 2 and 5 are one product with one vector."""
    vectors = unit(8)
    vectors[5] = vectors[2]
    batch = make_batch(keys(8, product=[0, 1, 2, 3, 4, 2, 6, 7]))
    similarity = (vectors @ vectors.T).requires_grad_()
    loss(similarity, torch.eye(8), batch).backward()
    assert (
        similarity.grad[2, 5] <= 0 and similarity.grad[5, 2] <= 0
    )  # a step raises the similarity, or leaves it
    assert similarity.grad[2, 3] > 0


def test_without_keys_duplicates_would_be_pushed_apart() -> None:
    vectors = unit(8)
    vectors[5] = vectors[2]
    similarity = (vectors @ vectors.T).requires_grad_()
    InfoNCE()(similarity, torch.eye(8), make_batch(keys(8))).backward()
    assert similarity.grad[2, 5] > 0


def test_weights_are_shares_of_the_rows() -> None:
    query, product, some = unit(4), unit(4), keys(4, product=[0, 1, 2, 3])
    for loss in (InfoNCE(), SigmoidLoss()):
        value = loss(query, product, make_batch(some, weight=[1.0, 0.5, 0.0, 0.0])).item()
        single = [
            loss(query, product, make_batch(some, weight=w)).item()
            for w in ([1.0, 0, 0, 0], [0, 1.0, 0, 0])
        ]
        assert value == pytest.approx((single[0] + 0.5 * single[1]) / 1.5, rel=1e-5)


def test_a_batch_without_weight_loses_nothing() -> None:
    query = unit(3).requires_grad_()
    for loss in (InfoNCE(), SigmoidLoss()):
        value = loss(query, unit(3), make_batch(keys(3, product=[0, 1, 2]), weight=[0.0, 0.0, 0.0]))
        value.backward()
        assert value.item() == 0 and query.grad.abs().max() == 0


def test_a_batch_of_one_is_finite() -> None:
    query = unit(1).requires_grad_()
    for loss in (InfoNCE(), SigmoidLoss()):
        value = loss(query, unit(1), make_batch(keys(1, product=[4])))
        value.backward()
        assert value.isfinite() and query.grad.isfinite().all()
    assert InfoNCE()(unit(1), unit(1), make_batch(keys(1, product=[4]))).item() == 0


def test_mined_negatives_count_against_the_queries_alone() -> None:
    query, product = unit(2), unit(5)
    batch = make_batch(keys(2, product=[0, 1]), keys(5, product=[0, 1, 2, 3, 0]))
    value = InfoNCE()(query, product, batch).item()
    assert value == pytest.approx(reference(InfoNCE(), query, product, batch), rel=1e-5)


def test_half_precision_inputs_are_compared_in_full() -> None:
    query, product, batch = unit(4), unit(4), make_batch(keys(4, product=[0, 1, 2, 3]))
    half = InfoNCE()(query.bfloat16(), product.bfloat16(), batch)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(InfoNCE()(query, product, batch).item(), rel=0.05)


@pytest.mark.parametrize("loss", [InfoNCE(), SigmoidLoss()])
def test_the_temperature_never_falls_below_its_bound(loss: ContrastiveLoss) -> None:
    loss.load_state_dict({**loss.state_dict(), "logit_scale": torch.tensor(math.log(1000))})
    assert loss.scale.item() == pytest.approx(100, rel=1e-5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    batch = make_batch(keys(4, product=[0, 1, 2, 3]))
    for _ in range(50):
        loss.clamp()
        optimizer.zero_grad()
        vectors = unit(4)
        loss(vectors, vectors, batch).backward()  # perfect answers want an ever lower temperature
        optimizer.step()
        assert loss.scale.item() <= 100 * (1 + 1e-5)


def test_a_clamped_temperature_can_rise_again() -> None:
    loss = InfoNCE()
    loss.load_state_dict({"logit_scale": torch.tensor(math.log(1000))})
    loss.clamp()
    query = unit(4)
    loss(query, query.flip(0), make_batch(keys(4, product=[0, 1, 2, 3]))).backward()
    assert loss.logit_scale.grad > 0


def test_targets_prefer_positive_to_ignored_to_negative() -> None:
    query, product = (
        keys(1, product=[1], group=[2], family=[3]),
        keys(4, product=[1, 5, 6, 7], group=[9, 2, 9, 9]),
    )
    product[:, FAMILY] = torch.tensor([3, 3, 3, 4])
    rules = PairRules({"product": 1.0, "group": 0.5}, ["family"])
    found = make_targets(query, product, torch.tensor([3]), rules)
    assert found.positive.tolist() == [[1.0, 0.5, 0.0, 1.0]]
    assert found.included.tolist() == [[True, True, False, True]]


def test_a_product_that_answers_two_queries_is_pushed_away_by_neither() -> None:
    """Query 0 is judged to be answered by products 1 (its row) and 2 (the other row's) with grade
    1/2: 2/3 and 1/3.
    """
    similarity = torch.tensor([[0.9, 0.5], [0.4, 0.8]])
    batch = make_batch(keys(2, query=[5, 6]), keys(2, product=[1, 2], query=[5, 6]))
    batch = batch._replace(
        judged_products=torch.tensor([[2, 1], [2, NO_KEY]]),
        judgement_weights=torch.tensor([[0.5, 1.0], [1.0, 0.0]]),
    )
    forth = -(torch.tensor([[2 / 3, 1 / 3], [0, 1]]) * similarity.log_softmax(1)).sum(1).mean()
    back = -(torch.tensor([[1, 0], [1 / 3, 2 / 3]]) * similarity.T.log_softmax(1)).sum(1).mean()
    value = InfoNCE(temperature=1.0)(
        similarity, torch.eye(2), batch
    )  # products of rows: the matrix
    torch.testing.assert_close(value, (forth + back) / 2)


def test_judged_pairs_are_left_out_where_the_relation_is() -> None:
    asked = keys(1, query=[5]), keys(2, product=[1, 2])
    judged = torch.tensor([[0.0, 0.5]])
    rules = PairRules({"product": 1.0}, ["query"])
    found = make_targets(*asked, torch.tensor([0]), rules, judgement=judged)
    assert found.positive.tolist() == [[1.0, 0.0]] and found.included.tolist() == [[True, False]]


def test_no_key_equals_nothing() -> None:
    rules = PairRules({"product": 1.0}, ["group", "family", "title"])
    found = make_targets(keys(2), keys(2), torch.tensor([0, 1]), rules)
    assert found.positive.tolist() == [[1, 0], [0, 1]]
    assert found.included.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.005}, r"temperature=0\.005 must be at least min_temperature=0\.01"),
        ({"min_temperature": 0.0}, r"min_temperature=0\.0 > 0"),
        ({"positives": {"color": 1.0}}, "'color' is no relation: choose from product, group"),
        ({"ignored": ["style"]}, "'style' is no relation"),
        ({"product_share": 1.5}, r"product_share=1\.5: choose 0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoNCE(**arguments)
