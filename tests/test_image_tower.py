"""Pictures as square pixels, and pixels as features."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.support.tiny_models import TIMM, TIMM_ARGS, write_timm, write_timm_hub
from tritower.datamodules.batch import Item
from tritower.datamodules.images import decode
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.towers.encoder import Encoder
from tritower.towers.image import PictureOptions, PicturePreprocess, TimmImage

RED, GREEN, BLUE, WHITE = (250, 10, 10), (10, 250, 10), (10, 10, 250), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def striped(width: int = 60, height: int = 20) -> bytes:
    """Three vertical stripes, red, green and blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for stripe, color in enumerate((RED, GREEN, BLUE)):
        pixels[:, stripe * width // 3 : (stripe + 1) * width // 3] = color
    return encoded(Image.fromarray(pixels))


def near(pixel: torch.Tensor, color: tuple[int, int, int]) -> bool:
    return (pixel.int() - torch.tensor(color)).abs().max().item() <= 2


def test_pad_keeps_the_whole_picture_on_white() -> None:
    [pixels] = PicturePreprocess(30, "pad")([striped()])
    assert pixels.shape == (3, 30, 30) and pixels.dtype == torch.uint8
    assert near(pixels[:, 2, 15], WHITE) and near(pixels[:, 27, 15], WHITE)
    assert [near(pixels[:, 15, x], c) for x, c in ((4, RED), (15, GREEN), (26, BLUE))] == [True] * 3


def test_crop_takes_the_middle() -> None:
    [pixels] = PicturePreprocess(20, "crop")([striped()])
    assert all(near(pixels[:, y, x], GREEN) for y in (1, 18) for x in (2, 10, 17))


def test_squash_changes_the_aspect_ratio() -> None:
    [pixels] = PicturePreprocess(30, "squash")([striped()])
    assert [
        near(pixels[:, y, x], c) for y in (1, 28) for x, c in ((4, RED), (15, GREEN), (26, BLUE))
    ] == [True] * 6


@pytest.mark.parametrize("resize", ["pad", "crop", "squash"])
@pytest.mark.parametrize("shape", [(20, 20), (7, 7), (3, 200), (200, 3), (2, 2)])
def test_any_shape_becomes_a_square(resize: str, shape: tuple[int, int]) -> None:
    assert PicturePreprocess(20, resize)([striped(*shape)]).shape == (1, 3, 20, 20)


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    [result] = PicturePreprocess(20)([encoded(Image.fromarray(pixels))])
    assert np.array_equal(result.permute(1, 2, 0).numpy(), pixels)


def test_transparent_is_white() -> None:
    shoe = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    shoe.paste((*RED, 255), (5, 5, 15, 15))
    flat = Image.new("RGB", (20, 20), WHITE)
    flat.paste(RED, (5, 5, 15, 15))
    preprocess = PicturePreprocess(20)
    assert torch.equal(preprocess([encoded(shoe)]), preprocess([encoded(flat)]))


def test_pictures_are_varied_in_training_only_and_by_their_own_randomness() -> None:
    preprocess = PicturePreprocess(20, augment=True)
    [plain] = preprocess([striped()])
    varied, again = (
        preprocess([striped()] * 8, [np.random.default_rng(i) for i in range(8)]) for _ in range(2)
    )
    assert torch.equal(varied, again)
    assert not any(torch.equal(pixels, plain) for pixels in varied)
    mirrored = sum(pixels[0, 10, 2] < pixels[2, 10, 2] for pixels in varied)  # blue on the left
    assert 0 < mirrored < 8
    assert torch.equal(PicturePreprocess(20)([striped()], [np.random.default_rng(0)])[0], plain)


# ---------------------------------------------------------------- towers


@pytest.fixture
def tower() -> TimmImage:
    tower = TimmImage(TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(image_size=32))
    for parameter in tower.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return tower.eval()


def pictures(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [
        encoded(Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)))
        for _ in range(count)
    ]


def test_neighbors_in_the_batch_do_not_matter(tower: TimmImage) -> None:
    pixels = tower.preprocess(pictures(5))
    together, alone = tower(pixels), torch.cat([tower(picture) for picture in pixels.split(1)])
    assert together.shape == (5, tower.out_dim)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_several_pictures_of_a_product_are_averaged(tower: TimmImage) -> None:
    encoder = Encoder(8, image=tower).eval()
    one, two, three = pictures(3)
    items = ItemPreprocess("product", image=tower.preprocess)(
        [Item(images=(one, two)), Item(images=(three,))]
    )
    mean = tower(tower.preprocess([one, two])).mean(0, keepdim=True)
    expected = encoder.projections["image"](torch.cat([mean, tower(tower.preprocess([three]))]))
    torch.testing.assert_close(
        encoder(items).embedding, nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=0
    )


def test_batch_norms_never_use_the_statistics_of_a_batch() -> None:
    tower = TimmImage("resnet10t", pictures=PictureOptions(image_size=32))
    tower.train()
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    pixels = tower.preprocess(pictures(3))
    before = [norm.running_mean.clone() for norm in norms]
    together, alone = tower(pixels), torch.cat([tower(picture) for picture in pixels.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(before, norms, strict=True))


def test_a_frozen_tower_stays_as_it_is() -> None:
    tower = TimmImage(
        TIMM,
        model_args={**TIMM_ARGS, "drop_path_rate": 0.5},
        freeze=True,
        pictures=PictureOptions(image_size=32),
    )
    tower.train()
    assert tower.frozen and not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("kind", [".safetensors", ".pth"])
def test_a_local_weights_file_with_its_classifier_gives_the_features_of_its_source(
    tmp_path: Path, kind: str
) -> None:
    source = write_timm(tmp_path / f"weights{kind}")
    tower = TimmImage(
        TIMM,
        pretrained=tmp_path / f"weights{kind}",
        model_args=TIMM_ARGS,
        pictures=PictureOptions(image_size=32),
    ).eval()
    pixels = tower.preprocess(pictures(2))
    expected = source.forward_head(
        source.forward_features(tower.normalize(pixels)), pre_logits=True
    )
    torch.testing.assert_close(tower(pixels), expected)
    assert tower.pretrained and not tower.frozen


def test_a_model_of_the_hub_is_rebuilt_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_timm_hub(tmp_path / "hub", "me/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tower = TimmImage("hf-hub:me/tiny", pretrained=True).eval()
    assert (tower.preprocess.size, tower.preprocess.interpolation) == (32, "bilinear")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "gone"))
    again = TimmImage.rebuild(tower.architecture(), tmp_path).eval()
    again.load_state_dict(tower.state_dict())
    assert again.preprocess == tower.preprocess
    torch.testing.assert_close(
        again(again.preprocess(pictures(2))), tower(tower.preprocess(pictures(2)))
    )


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match="interpolation='cubic': choose one of nearest, bilinear"):
        TimmImage(TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(interpolation="cubic"))


def test_pixels_are_normalized_with_the_models_own_mean(tower: TimmImage) -> None:
    own = timm.data.resolve_model_data_config(tower.model)
    black = tower.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(black, -torch.tensor(own["mean"]) / torch.tensor(own["std"]))
    gray = TimmImage(
        TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(mean=[0.0] * 3, std=[0.5] * 3)
    )
    assert gray.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).unique().tolist() == [
        2.0
    ]


def test_a_weights_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrained=.*none\.pth: no such weights file"):
        TimmImage(TIMM, pretrained=tmp_path / "none.pth", model_args=TIMM_ARGS)


def test_the_real_weights_see_colors(weights_dir: Path) -> None:
    tower = TimmImage(
        "tf_efficientnet_lite0", pretrained=weights_dir / "tf_efficientnet_lite0.safetensors"
    ).eval()
    rng = np.random.default_rng(0)
    shades = [
        np.clip(np.array(c) + rng.normal(0, 12, (224, 224, 3)), 0, 255)
        for c in (RED, (220, 30, 30), BLUE)
    ]
    with torch.inference_mode():
        features = tower(
            tower.preprocess([encoded(Image.fromarray(s.astype(np.uint8))) for s in shades])
        )
    red, crimson, blue = nn.functional.normalize(features, dim=1)
    assert red @ crimson > red @ blue + 0.05


def photo(width: int, height: int) -> Image.Image:
    """Smooth in the large, with some grain."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(
        (pixels + generator.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("size", [30, 90])
def test_pictures_are_resized_as_pillow_does_it(interpolation: str, size: int) -> None:
    picture = photo(64, 48)
    [found] = PicturePreprocess(size, "squash", interpolation)([encoded(picture)])
    expected = np.asarray(
        picture.resize((size, size), getattr(Image.Resampling, interpolation.upper()))
    ).astype(int)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_large_jpeg_is_decoded_no_larger_than_needed() -> None:
    picture = photo(640, 480)
    data = encoded(picture, "JPEG")
    assert decode(data, draft=100).size == (160, 120) and decode(data).size == (640, 480)
    assert decode(encoded(picture), draft=100).size == (640, 480)  # other formats cannot
    [found] = PicturePreprocess(64, "squash")([data])
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 2
