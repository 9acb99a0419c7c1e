"""Both sides of open_clip's models as towers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.support.tiny_models import write_bert, write_open_clip
from tritower.datamodules.batch import Item
from tritower.towers.encoder import Encoder
from tritower.towers.open_clip_models import OpenClipImage, OpenClipText
from tritower.towers.tower import without_weights
from tritower.towers.two_tower import TwoTower

TEXTS = ["red shoe", "a blue coffee mug, no 7", ""]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open_clip(tmp_path_factory.mktemp("models") / "clip")


def picture(seed: int = 0, shape: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_text_tower_gives_the_features_of_the_whole_model(clip: Path) -> None:
    whole = open_clip.create_model(f"local-dir:{clip}").eval()
    tower = OpenClipText(f"local-dir:{clip}").eval()
    tokens = tower.preprocess(TEXTS)
    assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{clip}")(TEXTS))
    torch.testing.assert_close(tower(tokens), whole.encode_text(tokens))
    assert tower.pretrained and tower(tokens).shape == (3, tower.out_dim) == (3, 12)


def test_the_image_tower_gives_the_features_of_the_whole_model(clip: Path) -> None:
    whole, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    tower = OpenClipImage(f"local-dir:{clip}").eval()
    photo = picture(shape=(32, 32))
    expected = whole.eval().encode_image(preprocess(Image.open(io.BytesIO(photo))).unsqueeze(0))
    torch.testing.assert_close(tower(tower.preprocess([photo])), expected, atol=1e-4, rtol=0)
    assert (tower.preprocess.resize, tower.preprocess.interpolation) == ("squash", "bilinear")
    assert tower.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_two_sides_of_one_model_start_as_aligned_as_they_were_trained(clip: Path) -> None:
    encoder = Encoder(
        12, text=OpenClipText(f"local-dir:{clip}"), image=OpenClipImage(f"local-dir:{clip}")
    )
    model = TwoTower(encoder)
    whole = open_clip.create_model(f"local-dir:{clip}").eval()
    text = model.encode([Item(text={"query": "red shoe"})])
    tokens = encoder.towers["text"].preprocess(["red shoe"])
    expected = torch.nn.functional.normalize(whole.encode_text(tokens), dim=1).detach()
    np.testing.assert_allclose(text, expected.numpy(), atol=1e-5)


def test_untrained_models_are_not_pretrained(clip: Path) -> None:
    torch.manual_seed(1)
    with without_weights():
        tower = OpenClipText(f"local-dir:{clip}")
    assert not tower.pretrained
    assert not torch.equal(
        tower.model.positional_embedding,
        OpenClipText(f"local-dir:{clip}").model.positional_embedding,
    )


def test_an_unknown_name_is_refused_with_some_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"open_clip has no model 'ViT-Z-99'. Its names: coca_base"
    ):
        OpenClipText("ViT-Z-99")


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_rebuilt_text_tower_needs_its_own_files_alone(
    tmp_path: Path, own_tokenizer: bool
) -> None:
    tokenizer = None if own_tokenizer else write_bert(tmp_path / "bert")
    folder = write_open_clip(tmp_path / "clip", tokenizer=tokenizer)
    tower = OpenClipText(
        f"local-dir:{folder}", template="{title}", query_prefix="q: ", freeze=True
    ).eval()
    (tmp_path / "assets").mkdir()
    tower.save_assets(tmp_path / "assets")
    folder.rename(tmp_path / "moved")
    again = OpenClipText.rebuild(tower.architecture(), tmp_path / "assets").eval()
    again.load_state_dict(tower.state_dict())
    assert again.architecture() == tower.architecture()
    assert torch.equal(again.preprocess(TEXTS), tower.preprocess(TEXTS))
    torch.testing.assert_close(again(again.preprocess(TEXTS)), tower(tower.preprocess(TEXTS)))


def test_a_rebuilt_image_tower_needs_its_own_files_alone(clip: Path, tmp_path: Path) -> None:
    tower = OpenClipImage(f"local-dir:{clip}", augment=True).eval()
    tower.save_assets(tmp_path)
    again = OpenClipImage.rebuild(tower.architecture(), tmp_path).eval()
    again.load_state_dict(tower.state_dict())
    assert again.preprocess == tower.preprocess
    photos = [picture(seed) for seed in range(3)]
    torch.testing.assert_close(again(again.preprocess(photos)), tower(tower.preprocess(photos)))
    assert torch.equal(again.std, tower.std)


def test_a_built_in_model_says_how_pictures_are_made_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a built-in name the model itself knows its preprocessing.

    ViT-B-16 would be slow to make here.
    """
    small = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 16,
            "head_width": 8,
            "layers": 1,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-test", small)
    image, text = OpenClipImage("ViT-tiny-test"), OpenClipText("ViT-tiny-test")
    assert (image.preprocess.size, image.preprocess.resize) == (32, "crop")
    assert text(text.preprocess(["red shoe"])).shape == (1, 8)
    assert not image.pretrained and not text.pretrained
    json.dumps(image.config), json.dumps(text.config)
