"""What the loss compares: whole items, parts of them, single modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.catalogues import SCHEMA
from tests.support.encoders import ITEMS, make_encoder
from tests.support.loss_batches import keys
from tritower.datamodules.batch import Batch, Item, Items
from tritower.towers.encoder import Encoder
from tritower.towers.encoding import EncodingOptions
from tritower.towers.fusion import FUSIONS
from tritower.towers.loss_terms import LossTerm
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.pairs import CoSENT, PairLoss
from tritower.towers.text import BiLSTM
from tritower.towers.two_tower import TwoTower

PART = torch.tensor(
    [
        [True, False, True, False],
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
        [False, True, False, False],
    ]
)
"""Of each of ITEMS, in the order of MODALITIES.

The first has a description, which the tower of words reads.
"""


def stripped(item: Item, part: list[bool]) -> Item:
    text, image, attribute, words = part
    texts = {
        field: value
        for field, value in item.text.items()
        if (words if field == "description" else text)
    }
    return Item(texts, item.images if image else (), item.attributes if attribute else {})


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_part_is_embedded_as_an_item_that_has_no_more(fusion: str) -> None:
    encoder = make_encoder(fusion)
    items = encoder.preprocess("product")(ITEMS)
    fewer = encoder.preprocess("product")(
        [stripped(i, p) for i, p in zip(ITEMS, PART.tolist(), strict=True)]
    )
    with torch.no_grad():
        whole, parts, alone = encoder(items), encoder(items._replace(part=PART)), encoder(fewer)
    torch.testing.assert_close(parts.part, alone.embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.embedding, whole.embedding)
    torch.testing.assert_close(whole.part, whole.embedding)
    assert not torch.allclose(parts.part[0], whole.embedding[0])


def test_parts_are_drawn_in_training_alone() -> None:
    encoder = make_encoder()
    preprocess = encoder.preprocess("product")
    assert preprocess(ITEMS).part is None
    drawn = preprocess(ITEMS, [np.random.default_rng(i) for i in range(len(ITEMS))])
    assert (drawn.part <= drawn.present).all() and drawn.part.any(1).all()
    assert (drawn.part.sum(1) < drawn.present.sum(1)).tolist() == (
        drawn.present.sum(1) > 1
    ).tolist()
    assert torch.equal(drawn.rows(1, 3).part, drawn.part[1:3])


def make_model(terms: list[LossTerm] | None, **settings: object) -> TwoTower:
    model = TwoTower(make_encoder(), loss_terms=terms, **settings)
    model.set_schema(SCHEMA)
    model.log = lambda *_, **__: None
    return model


def make_batch(encoder: Encoder) -> Batch:
    def side(name: str) -> Items:
        return encoder.preprocess(name)(ITEMS)._replace(part=PART)

    label = torch.tensor([1.0, 0.0, torch.nan, torch.nan, torch.nan])
    own = keys(5, product=[1, 2, 3, 4, 5])
    return Batch(
        side("query"), side("product"), own, own, torch.tensor([1.0, 0.5, 1.0, 1.0, 0.3]), label
    )


def test_a_step_sums_up_what_is_compared_by_hand() -> None:
    terms = [
        LossTerm(),
        LossTerm("part", "whole", 0.5),
        LossTerm("text", "image", 0.2),
        LossTerm(weight=0.1, loss=CoSENT()),
    ]
    model = make_model(terms).eval()
    batch = make_batch(model.product)
    query, product = model.query(batch.query), model.product(batch.product)
    plain = InfoNCE()
    texts, images = batch.query.present[:, 0], batch.product.present[:, 1]
    both = (texts & images).float()
    there = batch._replace(weight=batch.weight * both, query_present=texts, product_present=images)
    expected = (
        plain(query.embedding, product.embedding, batch)
        + 0.5 * plain(query.part, product.embedding, batch)
        + 0.2 * plain(query.alone[:, 0], product.alone[:, 1], there)
        + 0.1 * CoSENT()(query.embedding, product.embedding, batch)
    )
    torch.testing.assert_close(model.training_step(batch, 0), expected)
    assert both.tolist() == [1, 0, 0, 0, 1]


def test_chunks_have_the_loss_and_gradients_of_the_whole_with_parts() -> None:
    terms = [LossTerm(), LossTerm("part", "whole"), LossTerm("image", "image")]
    model = make_model(terms)
    model.eval()
    batch = make_batch(model.product)
    found = []
    for chunk_size in (None, 2):
        model.encoding = EncodingOptions(chunk_size)
        model.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        found.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_label_says_nothing_of_a_picture_that_is_not_there() -> None:
    """Of the two labeled pairs one has no picture.

    There is no order, and the one that is left is compared.
    """
    batch = make_batch(make_encoder())
    there = batch.query.present[:, 1] & batch.product.present[:, 1]
    assert there.tolist()[:2] == [True, False] and not batch.label[:2].isnan().any()
    ordered, alone = (
        make_model([LossTerm("image", "image", loss=loss)]).eval()
        for loss in (CoSENT(), PairLoss())
    )
    assert ordered.training_step(batch, 0).item() == 0.0
    alone.training_step(batch, 0).backward()
    assert not alone.product.absent.grad.any()


def test_each_comparison_has_a_temperature_of_its_own() -> None:
    model = make_model([LossTerm(), LossTerm("part", "whole")], loss=InfoNCE(temperature=0.1))
    scales = [loss.logit_scale for loss in model.loss_terms.losses]
    assert scales[0] is model.loss.logit_scale and scales[1] is not scales[0]
    torch.testing.assert_close(scales[0], scales[1])
    assert {id(scale) for scale in scales} <= {id(parameter) for parameter in model.parameters()}


def test_a_modality_that_an_encoder_lacks_is_refused() -> None:
    encoder = Encoder(8, text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4))
    with pytest.raises(
        ValueError, match="loss_terms names 'image', but an encoder has no such tower"
    ):
        TwoTower(encoder, loss_terms=[LossTerm("image", "whole")])
