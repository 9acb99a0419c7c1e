"""Encoder: towers, projections, fusion, one unit vector per item."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.support.encoders import ATTRIBUTES, ITEMS, PICTURES, TEXT, make_encoder
from tritower.datamodules.batch import Item
from tritower.towers.encoder import Encoder, features_of, mean_by_row, projection
from tritower.towers.fusion import FUSIONS
from tritower.towers.image import TimmImage
from tritower.towers.text import BiLSTM


@pytest.fixture(params=list(FUSIONS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return make_encoder(request.param)


def embed(encoder: Encoder, items: list[Item]) -> torch.Tensor:
    with torch.inference_mode():
        return encoder(encoder.preprocess("product")(items)).embedding


def test_embeddings_have_unit_length(encoder: Encoder) -> None:
    embedding = embed(encoder, ITEMS)
    assert embedding.shape == (5, 16)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(5))


def test_neighbors_in_the_batch_do_not_matter(encoder: Encoder) -> None:
    alone = torch.cat([embed(encoder, [item]) for item in ITEMS])
    torch.testing.assert_close(embed(encoder, ITEMS), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(embed(encoder, ITEMS[::-1]), alone.flip(0), atol=1e-5, rtol=0)


def test_a_product_without_image_ignores_its_pixels(encoder: Encoder) -> None:
    """Whatever stands in the place of an absent modality has no influence and no gradient."""
    items = encoder.preprocess("product")(ITEMS)
    no_image = items.present.clone()
    no_image[0, 1] = False
    with_pixels = items._replace(present=no_image, image=items.image.float())
    blank = with_pixels.image.clone()
    blank[items.image_row == 0] = 0
    one, other = encoder(with_pixels), encoder(with_pixels._replace(image=blank))
    torch.testing.assert_close(one.embedding[0], other.embedding[0])
    without = embed(encoder, [Item(TEXT, (), ATTRIBUTES)])
    torch.testing.assert_close(one.embedding[0].detach(), without[0], atol=1e-5, rtol=0)


def test_no_absent_modality_matters(encoder: Encoder) -> None:
    items = encoder.preprocess("product")([ITEMS[0]] * 3)
    for name, row in (("text", 0), ("attribute", 2)):
        present = items.present.clone()
        present[0, row] = False
        changed = (
            items.text.flip(1)
            if name == "text"
            else type(items.attribute)(*(t + 1 for t in items.attribute))
        )
        one, other = (
            encoder(items._replace(present=present)),
            encoder(items._replace(present=present, **{name: changed})),
        )
        torch.testing.assert_close(one.embedding[0], other.embedding[0])
        assert not torch.allclose(one.embedding[1], other.embedding[1], atol=1e-4)


def test_the_order_of_pictures_does_not_matter(encoder: Encoder) -> None:
    one, other = embed(encoder, [Item(images=PICTURES), Item(images=PICTURES[::-1])])
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_an_item_of_nothing_is_finite(encoder: Encoder) -> None:
    embedding = embed(encoder, [Item(), ITEMS[0]])
    assert embedding.isfinite().all()
    torch.testing.assert_close(embed(encoder, [Item()])[0], embedding[0], atol=1e-6, rtol=0)


def test_gradients_are_finite_whatever_is_missing(encoder: Encoder) -> None:
    encoder.train()
    signs = [Item({"title": "***"}), Item()]  # no words, nothing at all
    embedding = encoder(encoder.preprocess("product")([*ITEMS, *signs])).embedding
    (embedding * torch.randn_like(embedding)).sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) < 1e4


def test_a_tower_that_no_item_needs_does_not_run(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimmImage, "forward", lambda *_: pytest.fail("the image tower ran"))
    embed(encoder, [ITEMS[1], ITEMS[3]])


def test_features_in_place_of_inputs_give_the_same_embeddings(encoder: Encoder) -> None:
    items = encoder.preprocess("product")(ITEMS)
    with torch.inference_mode():
        features = {
            name: features_of(encoder.towers[name], getattr(items, name))
            for name in ("text", "image")
        }
        cached = encoder(items._replace(**features)).embedding
    torch.testing.assert_close(cached, embed(encoder, ITEMS))


def test_one_tower_alone_is_an_encoder() -> None:
    encoder = Encoder(8, text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4)).eval()
    assert encoder.columns == [0]
    encoded = encoder(encoder.preprocess("query")(ITEMS))
    assert encoded.shares.tolist() == [[1.0]] * 5


def test_pictures_are_averaged_by_item() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    mean = mean_by_row(features, torch.tensor([0, 0, 2]), 4)
    assert mean.tolist() == [[2.0, 1.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]


def test_a_projection_between_equal_sizes_changes_nothing_at_first() -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(projection(8, 8)(x), x)
    assert projection(8, 4)(x).shape == (3, 4)


def test_features_are_left_out_in_training_alone() -> None:
    torch.manual_seed(0)
    encoder = Encoder(8, text=BiLSTM(), feature_dropout=0.5)
    seen: list[torch.Tensor] = []
    encoder.projections["text"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    items = encoder.preprocess("query")([Item({"title": f"red shoe {n}"}) for n in range(40)])
    encoder.eval()(items)
    encoder.train().towers.eval()  # which drop things of their own
    encoder(items)
    whole, some = seen
    left = some != 0
    assert (whole != 0).all() and 0.4 < left.float().mean() < 0.6
    torch.testing.assert_close(some[left], 2 * whole[left], atol=1e-5, rtol=1e-4)


def test_a_dropout_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"feature_dropout=1\.0 is a chance: choose 0 to below 1"):
        Encoder(8, text=BiLSTM(), feature_dropout=1.0)


def test_an_encoder_without_towers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tower"):
        Encoder(8)


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match="fusion='sum': choose one of gated, mean, transformer"):
        Encoder(8, text=BiLSTM(), fusion="sum")


def test_padding_of_longer_neighbors_does_not_reach_the_attributes() -> None:
    encoder = make_encoder()
    few, many = Item(attributes={"tags": ["a"]}), Item(attributes={"tags": list("abcdefgh")})
    torch.testing.assert_close(
        embed(encoder, [few, many])[0], embed(encoder, [few])[0], atol=1e-6, rtol=0
    )
    assert F.cosine_similarity(*embed(encoder, [few, many]), dim=0) < 0.9999
