"""How items become texts, and texts features."""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import write_bert, write_open_clip
from tritower.datamodules.batch import Item
from tritower.datamodules.schema import Schema
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.open_clip_models import OpenClipText
from tritower.towers.text import BiLSTM, HashedWords, Template, TextPreprocess, split_words

CHINESE = ["红色跑步鞋 女士透气网面", "不锈钢保温杯 大容量", "纯棉短袖衬衫 夏季新款"]
ENGLISH = [
    "red running shoe with mesh for women",
    "stainless steel vacuum bottle",
    "cotton shirt, short sleeves",
]


# ---------------------------------------------------------------- template


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ({"title": "Mug", "brand": "Acme", "description": "Blue."}, "Mug by Acme. Blue."),
        ({"title": "Mug", "description": "Blue."}, "Mug. Blue."),
        ({"title": "Mug", "brand": "Acme"}, "Mug by Acme"),
        ({"description": "Blue."}, "Blue."),
        ({"title": "", "description": "Blue."}, "Blue."),
        ({"color": "blue"}, ""),
        ({}, ""),
    ],
)
def test_a_missing_field_takes_the_characters_before_it_along(
    text: dict[str, str], rendered: str
) -> None:
    assert Template("{title} by {brand}. {description}").render(Item(text=text)) == rendered


def test_labels_in_a_template_go_with_their_fields() -> None:
    template = Template("Title: {title}. Brand: {brand} (new)")
    assert (
        template.render(Item(text={"title": "Mug", "brand": "Acme"}))
        == "Title: Mug. Brand: Acme (new)"
    )
    assert template.render(Item(text={"brand": "Acme"})) == "Brand: Acme (new)"
    assert template.render(Item()) == ""


def test_without_a_template_all_fields_are_joined() -> None:
    assert Template(None).render(Item(text={"name": "Mug", "info": "Blue"})) == "Mug. Blue"


@pytest.mark.parametrize("template", ["{title}", None])
def test_a_typed_query_stands_for_itself(template: str | None) -> None:
    assert Template(template).render(Item(text={"query": "red {mug}"})) == "red {mug}"


@pytest.mark.parametrize("template", ["no field", "{}", "{title", "title}"])
def test_a_template_without_fields_is_refused(template: str) -> None:
    with pytest.raises(
        ValueError, match=f"template={template!r}".replace("{", r"\{").replace("}", r"\}")
    ):
        Template(template)


def test_a_template_that_would_leave_all_products_without_text_is_refused() -> None:
    tower = BiLSTM(template="{title}. {description}")
    with pytest.raises(
        ValueError, match=r"template='\{title\}. \{description\}' .* which has name, info"
    ):
        tower.set_schema(Schema(("name", "info"), images=False, attributes=()))
    tower.set_schema(Schema(("description",), images=False, attributes=()))


def test_each_side_has_its_prefix_and_an_item_without_text_has_none() -> None:
    preprocess = TextPreprocess(HashedWords(), Template("{title}"), "query: ", "passage: ")
    item = Item(text={"title": "Mug"})
    assert preprocess.render(item, "query") == "query: Mug"
    assert preprocess.render(item, "product") == "passage: Mug"
    assert preprocess.render(Item(), "query") == ""


# ---------------------------------------------------------------- hashed words


def test_words_are_lower_case_and_chinese_is_read_by_character() -> None:
    words = split_words
    assert words("Red SHOE-size_42") == ["red", "shoe", "size", "42"]
    assert words("iPhone手机壳 Pro") == ["iphone", "手", "机", "壳", "pro"]
    assert words("カメラ 가방") == ["カ", "メ", "ラ", "가", "방"]


def test_the_same_text_written_otherwise_has_the_same_words() -> None:
    words = split_words
    assert words("cafe\u0301 ＡＢＣ１２") == words("caf\u00e9 ABC12") == ["café", "abc12"]


def test_a_text_of_signs_alone_is_a_word_and_not_padding() -> None:
    tokens = HashedWords()(["***", "👟", "mug"])
    assert tokens.shape == (3, 1)
    assert tokens.min() > 0
    assert len(set(tokens.flatten().tolist())) == 3


def test_hashed_words_are_cut_and_padded() -> None:
    tokens = HashedWords(num_buckets=64, max_length=4)(["a b c d e f", "a"])
    assert tokens.shape == (2, 4)
    assert tokens[1].tolist() == [tokens[0, 0].item(), 0, 0, 0]
    assert tokens.max() < 64


def test_bilstm_ignores_padding() -> None:
    tower = BiLSTM(word_dim=8, hidden_dim=6, num_buckets=256).eval()
    texts = ["mug", "a red shoe for running in the rain", "", "lamp and chair"]
    together = tower(tower.preprocess(texts))
    alone = torch.cat([tower(tower.preprocess([text])) for text in texts])
    assert together.shape == (4, 12)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_bilstm_reads_the_order_of_words() -> None:
    tower = BiLSTM(word_dim=8, hidden_dim=6, num_buckets=256).eval()
    features = tower(tower.preprocess(["shirt for dog", "dog for shirt"]))
    assert (features[0] - features[1]).abs().max() > 1e-3


# ---------------------------------------------------------------- long and foreign texts with each
# tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def open_clip_text(tmp_path_factory: pytest.TempPathFactory) -> OpenClipText:
    folder = write_open_clip(tmp_path_factory.mktemp("models") / "clip", context_length=77)
    return OpenClipText(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def hugging_face_text(bert: Path) -> HuggingFaceText:
    return HuggingFaceText(str(bert), max_length=24)


@pytest.fixture(params=["open_clip", "hugging_face"])
def tower(request: pytest.FixtureRequest) -> OpenClipText | HuggingFaceText:
    return request.getfixturevalue(f"{request.param}_text")


LONG = ["red shoe " * 333, " ".join(str(7919 * n % 99991) for n in range(44)), "red shoe"]


def test_long_texts_are_cut_and_the_end_token_stays(tower: OpenClipText | HuggingFaceText) -> None:
    tokens = tower.preprocess(LONG)
    is_clip = isinstance(tower, OpenClipText)
    end, length = (
        (49407, 77) if is_clip else (tower.preprocess.tokenizer.tokenizer.sep_token_id, 24)
    )
    assert tokens.shape == (3, length)
    assert tokens[0, -1] == tokens[1, -1] == end
    assert (tokens == end).sum(1).tolist() == [1, 1, 1]
    assert tower.eval()(tokens).isfinite().all()


def test_the_share_of_cut_texts_is_counted(tower: OpenClipText | HuggingFaceText) -> None:
    assert tower.preprocess.check(LONG)["cut"] == pytest.approx(2 / 3)
    assert HashedWords(max_length=48).lengths_and_fallbacks(LONG[0]) == (666, 48, 0)


def test_an_english_tokenizer_warns_of_chinese(
    tower: OpenClipText | HuggingFaceText, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tritower.towers.text"):
        share = tower.preprocess.check(CHINESE)["fallback"]
        assert share > 0.7
        assert f"{100 * share:.0f} % of the tokens of 3 texts" in caplog.text


def test_a_half_chinese_title_warns_too(
    open_clip_text: OpenClipText, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = [
        f"{english[:12]} {chinese[:6]}" for english, chinese in zip(ENGLISH, CHINESE, strict=True)
    ]
    with caplog.at_level(logging.WARNING, logger="tritower.towers.text"):
        open_clip_text.preprocess.check(mixed)
    assert "multilingual" in caplog.text
    assert open_clip_text.eval()(open_clip_text.preprocess(mixed)).isfinite().all()


def test_nothing_warns_of_english(
    tower: OpenClipText | HuggingFaceText, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tritower.towers.text"):
        assert tower.preprocess.check(ENGLISH)["fallback"] == 0
        assert math.isfinite(tower.preprocess.check([])["cut"])
    assert not caplog.records


def test_hashed_words_never_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tritower.towers.text"):
        assert BiLSTM().preprocess.check(CHINESE)["fallback"] == 0
    assert not caplog.records


def test_a_query_embeds_alike_in_any_batch(tower: OpenClipText | HuggingFaceText) -> None:
    tower.eval()
    together = tower(tower.preprocess(["red shoe", *LONG]))[0]
    alone = tower(tower.preprocess(["red shoe"]))[0]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_preprocessing_travels_to_loader_processes(tower: OpenClipText | HuggingFaceText) -> None:
    copy = pickle.loads(pickle.dumps(tower.preprocess))
    assert torch.equal(copy(ENGLISH), tower.preprocess(ENGLISH))
