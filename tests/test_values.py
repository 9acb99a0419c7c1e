"""Prices, lists and HTML.

What can be read in one way only is read, everything else is refused with its code.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritower.datamodules.prepare.values import (
    BadValue,
    Number,
    clean_html,
    excerpt,
    is_number,
    parse_json,
    parse_list,
    parse_number,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,299.00", 1299),
        ("1600", 1600),
        ("$1,600.00", 1600),
        ("1.299,00", 1299),
        ("12,50", 12.5),
        ("59.9", 59.9),
        ("0.125", 0.125),
        ("1234.567", 1234.567),
        ("1,234,567", 1_234_567),
        ("1.234.567", 1_234_567),
        ("1,29,999", 129_999),
        ("1 299,00 €", 1299),
        ("1\u00a0299.50", 1299.5),
        ("1\u202f299", 1299),
        ("1'299.50", 1299.5),
        ("1 600.250", 1600.25),
        ("EUR 12.99", 12.99),
        ("Rs. 499", 499),
        ("¥129", 129),
        ("129元", 129),
        ("US$5", 5),
        ("1E5", 100_000),
        ("  7  ", 7),
    ],
)
def test_prices_with_one_reading(text: str, value: float) -> None:
    assert parse_number(text, role="price") == value
    assert is_number(text)


@pytest.mark.parametrize("text", ["140.000", ",89", ".89", "1,600", "€ 1.600", "999,999", "-1.500"])
def test_two_readings_are_not_guessed_unless_the_decimal_sign_is_known(text: str) -> None:
    with pytest.raises(BadValue, match=r"PRICE_AMBIGUOUS.*--decimal point or --decimal comma"):
        parse_number(text, role="price")
    assert is_number(text)


@pytest.mark.parametrize(
    ("text", "point", "comma"),
    [
        ("140.000", 140.0, 140_000.0),
        ("1,600", 1600.0, 1.6),
        (",89", None, 0.89),
        (".89", 0.89, None),
        ("12,5", None, 12.5),
    ],
)
def test_known_decimal_sign(text: str, point: float | None, comma: float | None) -> None:
    for sign, value in (("point", point), ("comma", comma)):
        if value is None:
            with pytest.raises(BadValue, match="NUMBER_UNPARSEABLE"):
                parse_number(text, sign)
        else:
            assert parse_number(text, sign) == value


@pytest.mark.parametrize("text", ["-5", "0", "1e12", "NaN", "inf", "-$3", "1e400"])
def test_prices_out_of_range(text: str) -> None:
    with pytest.raises(BadValue, match=r"PRICE_OUT_OF_RANGE.*above 0 and at most 1e.09"):
        parse_number(text, role="price")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "free",
        "10-20",
        "12 cm",
        "1,60,0",
        "1,600,00",
        "12.",
        "--5",
        "١٢",
        "1 2",
        "12,99/kg",
        "$",
    ],
)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(BadValue, match="NUMBER_UNPARSEABLE"):
        parse_number(text)
    assert not is_number(text)


def test_numbers_may_be_negative_and_zero() -> None:
    assert parse_number("-5") == -5
    assert parse_number("−5.5") == -5.5
    assert parse_number("0") == 0


def test_number_typed_by_the_file_is_never_ambiguous() -> None:
    assert parse_number(Number("140.000")) == 140
    assert parse_number(Number("1e2")) == 100


@given(st.floats(0.01, 1e8).map(lambda value: round(value, 2)), st.sampled_from(["point", "comma"]))
def test_formatted_prices_come_back(value: float, sign: str) -> None:
    text = f"{value:,.2f}"
    text = text if sign == "point" else text.translate({44: ".", 46: ","})
    assert parse_number(text, "auto", "price") == value
    assert parse_number(text, sign, "price") == value


@given(st.text(max_size=20))
def test_any_text_is_a_finite_number_or_refused(text: str) -> None:
    try:
        assert math.isfinite(parse_number(text))
    except BadValue as error:
        assert error.code.startswith("NUMBER_")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Tom &amp; Jerry&#39;s <b>mug</b>", "Tom & Jerry's mug"),
        ("Tom & Jerry's mug", "Tom & Jerry's mug"),
        ("5 < 6 > 3 & more", "5 < 6 > 3 & more"),
        ("<p>one</p><p>two<br/>three</p>", "one two three"),
        ("a<script>x < 1 <b></script>b", "a b"),
        ("new <style> shoes", "new shoes"),
        ("I <3 you", "I <3 you"),
        ("&frac14; zip", "¼ zip"),
        ("AT&T &copy", "AT&T &copy"),
        ("<a href='x' class=\"y\">link</a>", "link"),
        ("&lt;b&gt;", "<b>"),
        ("x<!-- note -->y", "x y"),
        ("two  spaces\tstay", "two  spaces\tstay"),
        ("<b and c>", "<b and c>"),
    ],
)
def test_html_is_removed_and_nothing_else(text: str, clean: str) -> None:
    assert clean_html(text) == clean


@pytest.mark.parametrize("piece", ["<!--", '<b x="', "<a ", "&#", "<b" + " a=b" * 9])
def test_a_megabyte_of_tags_that_are_never_closed_stays_as_it_is(piece: str) -> None:
    """Were each of them looked for to the end of the text, this would take hours."""
    text = piece * (1_000_000 // len(piece))
    assert clean_html(text) == text


@pytest.mark.parametrize(("piece", "left"), [("<script>", ""), ("<script></script", "</script")])
def test_of_a_megabyte_of_scripts_without_an_end_their_beginnings_are_removed(
    piece: str, left: str
) -> None:
    times = 1_000_000 // len(piece)
    assert clean_html(piece * times).split() == [left] * times * bool(left)


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ("a|b| |c", ["a", "b", "c"]),
        ('["a", "b|c", 7]', ["a", "b|c", "7"]),
        ("[not json]", ["[not json]"]),
        (["a", None, " b "], ["a", "b"]),
        (None, []),
        ("", []),
    ],
)
def test_lists(cell: object, values: list[str]) -> None:
    assert parse_list(cell, "|") == values


@pytest.mark.parametrize("cell", [{"a": "b"}, [["a"]], b"x", '[{"a": 1}]'])
def test_what_is_no_list(cell: object) -> None:
    with pytest.raises(BadValue, match="NOT_A_LIST"):
        parse_list(cell, "|")


def test_json_scalars_stay_as_they_are_written() -> None:
    text = '{"a": 135217135789158401, "b": 1352171357E+5, "c": true, "d": null, "e": [1.50, NaN]}'
    assert parse_json(text) == {
        "a": "135217135789158401",
        "b": "1352171357E+5",
        "c": "true",
        "d": None,
        "e": ["1.50", "NaN"],
    }
    for broken in ('{"a": 1, "a": 2}', "[" * 100_000, "{", '{"id": 007}'):
        with pytest.raises(ValueError, match=r"twice|deep|Expecting"):
            parse_json(broken)


def test_excerpts_are_short_and_safe_to_print() -> None:
    assert excerpt("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert excerpt("x" * 100) == "'" + "x" * 79 + "…'"
