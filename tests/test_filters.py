from __future__ import annotations

import inspect
import operator
import sys
import threading
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.attribute_rows import table_of
from tritower.retrieval.filtering.filters import MAX_CHARACTERS, Filter, parse
from tritower.retrieval.filtering.parser import MAX_DEPTH
from tritower.retrieval.filtering.terms import Not, Test, and_of, negated, or_of
from tritower.retrieval.products.attribute_table import CACHED_MASKS

ATTRIBUTE_TYPES = {
    "price": "number",
    "size in cm": "number",
    "brand": "category",
    "group": "category",
    "category": "path",
    "tags": "set",
}
ROWS = [
    {
        "id": "0",
        "price": 10.0,
        "brand": "Acme",
        "category": ["Shoes", "Boots"],
        "tags": ["wool", "red"],
        "group": "g1",
    },
    {
        "id": "1",
        "price": 50.0,
        "brand": "Zed",
        "category": ["Shoes"],
        "tags": ["wool blend"],
        "group": "g1",
    },
    {
        "id": "2",
        "price": 59.9,
        "brand": "acme",
        "category": ["Shoestrings"],
        "tags": [],
        "group": "g2",
    },
    {
        "id": "3",
        "price": -5.0,
        "brand": "H&M",
        "category": ["Home", "Shoes"],
        "tags": None,
        "group": None,
    },
    {
        "id": "4",
        "price": None,
        "brand": None,
        "category": None,
        "tags": ["red"],
        "size in cm": 42.0,
    },
    {
        "id": "5",
        "price": float("inf"),
        "brand": 'Müller\'s "A\\B"',
        "category": ["鞋", "靴子"],
        "tags": ["羊毛"],
    },
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return table_of(tmp_path_factory.mktemp("table") / "attributes.arrow", ROWS, ATTRIBUTE_TYPES)


def matching(text, table):
    """Ids of matching rows, joined."""
    return "".join(str(row) for row in np.flatnonzero(parse(text).mask(table)))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("price<50", "03"),
        ("price <= 50", "013"),
        ("price > 50", "25"),
        ("price>=50", "125"),
        ("price = 59.9", "2"),
        ("price == 5.99e1", "2"),
        ("price != 50", "0235"),
        ("price=-5", "3"),
        ("price < +1E1", "3"),
        ("price in (10, 50, 70)", "01"),
        ("price not in (10, 50)", "235"),
        ("price in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)", "0"),
        ("price not in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)", "1235"),
        ("price is missing", "4"),
        ("price is not missing", "01235"),
        ("price is known", "01235"),
        ("price is not known", "4"),
        ("brand = Acme", "0"),
        ("brand != Acme", "1235"),
        ("brand in (Acme, Zed)", "01"),
        ("brand not in (Acme, 'Zed')", "235"),
        ("brand = H&M", "3"),
        ("brand = nobody", ""),
        ("brand != nobody", "01235"),
        (r'''brand = "Müller's \"A\\B\""''', "5"),
        (r"""brand = 'Müller\'s "A\\B"'""", "5"),
        ('category under "Shoes"', "01"),
        ("category under 'Shoes > Boots'", "0"),
        ("category under 'Shoes>Boots'", "0"),
        ("category under Boots", ""),
        ("category not under Shoes", "235"),
        ("category = Shoes", "1"),
        ("category != 'Shoes > Boots'", "1235"),
        ("category in (Shoestrings, 'Home > Shoes')", "23"),
        ("category has Shoes", "013"),
        ("category has '靴子'", "5"),
        ("category not has Shoes", "25"),
        ("tags has wool", "0"),
        ("tags has 'wool blend'", "1"),
        ("not tags has red", "15"),
        ("tags is missing", "23"),
        ("tags has 羊毛", "5"),
        ("group = g1", "01"),
        ('"size in cm" = 42', "4"),
        ('"size in cm" is missing', "01235"),
        ("not price < 50", "125"),
        ("not not price < 50", "03"),
        ("not (price < 50 or brand = Zed)", "25"),
        ("not (price < 50 and brand = Acme)", "1235"),
        ("price < 50 and brand = Acme or category under Shoestrings", "02"),
        ("price < 50 and (brand = Acme or category under Shoestrings)", "0"),
        ("price < 50 AND NOT brand In (Acme) Or tags HAS red", "034"),
        # Unknown or true is true, unknown and false is false: SQL's three values.
        ("price < 50 or tags has red", "034"),
        ("not (price < 50 and tags has red)", "125"),
        ("not (price < 50 and tags has wool)", "1245"),
        ('price<50 and brand in (Acme, Zed) and category under "Shoes"', "0"),
    ],
)
def test_rows_that_match(text, rows, table):
    assert matching(text, table) == rows


# --- Against an interpreter that looks at one row at a time, in three values.


def naive(term, row):
    """True, False, or None for unknown."""
    if isinstance(term, Not):
        value = naive(term.term, row)
        return None if value is None else not value
    if not isinstance(term, Test):
        values = [naive(inner, row) for inner in term.terms]
        stops = type(term).__name__ == "Or"
        return stops if stops in values else None if None in values else not stops
    attribute_type, value = ATTRIBUTE_TYPES[term.attribute], row.get(term.attribute)
    if isinstance(value, list):
        value = [part for part in value if part] or None
    if isinstance(value, str):
        value = value if value.strip() else None
    if term.operator == "known":
        return value is not None
    if value is None:
        return None
    if attribute_type == "set":
        return term.values[0] in value
    if attribute_type == "path":
        asked = [tuple(part.strip() for part in text.split(">")) for text in term.values]
        levels = tuple(value)
        match term.operator:
            case "under":
                return levels[: len(asked[0])] == asked[0]
            case "has":
                size = len(asked[0])
                return any(
                    levels[position : position + size] == asked[0]
                    for position in range(len(levels))
                )
        return levels in asked
    compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
    if term.operator in compare:
        return compare[term.operator](value, term.values[0])
    return value in term.values


WORDS = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "a b",
        "A",
        "7",
        "x > y",
        "not",
        "é",
        '"',
        "\\",
        "and\n",
        "\ud7ff",
        "  c",
        "5-3",
    ]
)
LEVELS = st.sampled_from(["a", "b", "ab", "a b", "鞋"])
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e300, 59.9, 2.0**53, 1e-7]) | st.floats(
    -3, 3
).map(lambda x: round(x, 1))


def one_test(draw):
    name = draw(st.sampled_from(list(ATTRIBUTE_TYPES)))
    attribute_type = ATTRIBUTE_TYPES[name]
    value = {
        "number": NUMBERS,
        "category": WORDS,
        "path": st.lists(LEVELS, min_size=1, max_size=3).map(" > ".join),
        "set": WORDS,
    }[attribute_type]
    operators = {
        "number": ["<", "<=", ">", ">=", "=", "in", "known"],
        "category": ["=", "in", "known"],
        "path": ["=", "in", "under", "has", "known"],
        "set": ["has", "known"],
    }[attribute_type]
    sign = draw(st.sampled_from(operators))
    size = {"known": 0, "in": draw(st.integers(1, 12))}.get(sign, 1)
    return Test(name, sign, tuple(draw(value) for _ in range(size)))


@st.composite
def terms(draw, depth=3):
    attribute_type = (
        draw(st.sampled_from(["test", "test", "not", "all", "some"])) if depth else "test"
    )
    if attribute_type == "test":
        return one_test(draw)
    if attribute_type == "not":
        return negated(draw(terms(depth - 1)))
    parts = [draw(terms(depth - 1)) for _ in range(draw(st.integers(2, 3)))]
    return (and_of if attribute_type == "all" else or_of)(parts)


@st.composite
def rows(draw):
    values = {
        "number": NUMBERS,
        "category": WORDS,
        "path": st.lists(LEVELS, max_size=4),
        "set": st.lists(WORDS, max_size=3),
    }
    count = draw(st.integers(0, 20))
    return [
        {"id": str(row)}
        | {
            name: draw(st.none() | values[attribute_type])
            for name, attribute_type in ATTRIBUTE_TYPES.items()
        }
        for row in range(count)
    ]


@given(terms(), rows())
@settings(max_examples=300, deadline=None)
def test_filters_match_what_an_interpreter_of_single_rows_matches(tmp_path_factory, term, rows):
    table = table_of(tmp_path_factory.mktemp("t") / "a.arrow", rows, ATTRIBUTE_TYPES)
    expected = [naive(term, row) is True for row in rows]
    assert Filter(term).mask(table).tolist() == expected
    assert parse(str(Filter(term))).mask(table).tolist() == expected


@given(terms())
def test_the_text_of_a_filter_parses_to_the_filter(term):
    text = str(Filter(term))
    again = parse(text)
    assert again == Filter(term)
    assert str(again) == text
    assert hash(again) == hash(Filter(term))


ALPHABET = st.sampled_from(
    [
        *"pri ce<>=!()'\"\\,.5-+e\n\t\0≤“鞋",
        " and ",
        " or ",
        "not ",
        " in ",
        " is missing",
        "price",
        "\ud800",
        "\x1f",
    ]
)


@given(st.lists(ALPHABET, max_size=30).map("".join) | st.text())
@example("(" * 5000)
@example("not " * 5000)
@example("price<5 and " * 5000)
@example("price in (" + "1," * 40_000)
@settings(max_examples=500)
def test_any_text_is_a_filter_or_a_value_error_in_one_line(table, text):
    try:
        parsed = parse(text)
        assert parse(str(parsed)) == parsed
        parsed.mask(table)
    except ValueError as error:
        assert str(error).startswith("filter: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected the name of an attribute, found the end, at character 1: \^$"),
        ("price", r"expected <, .* or is, found the end, at character 6: price\^$"),
        ("price <", r"expected a value, found the end, at character 8: price <\^$"),
        (
            "price < 50 rubbish",
            r"expected and, or or the end, found rubbish, at character 12: price < 50 \^rubbish$",
        ),
        ("price < 50 annd brand = x", r"found annd, at character 12: price < 50 \^annd brand = x$"),
        ("price < 50)", r"found \), at character 11"),
        ("(price < 50", r"expected and, or or \), found the end, at character 12"),
        ("price < 50; drop", r"; must stand in quotes, at character 11: price < 50\^; drop$"),
        ('brand = "Acme', r'a quote that is never closed, at character 9: brand = \^"Acme$'),
        ("brand = “Acme”", r'“ stands for nothing; write ", at character 9'),
        ("price ≤ 5", r"≤ stands for nothing; write <=, at character 7"),
        ("brand = not", r"expected a value, found not; put it in quotes, at character 9"),
        (
            "in = 5",
            r"expected the name of an attribute, found in; put it in quotes, at character 1",
        ),
        (
            "50 > price",
            r"expected the name of an attribute, found 50, at character 1: \^50 > price$",
        ),
        ("brand in Acme", r"expected \(, found Acme, at character 10"),
        ("brand in ()", r"expected a value, found \), at character 11"),
        ("brand in (Acme Zed)", r"expected , or \), found Zed, at character 16"),
        ("price not < 5", r"expected in, under or has, found <, at character 11"),
        ("price is cheap", r"expected missing or known, found cheap, at character 10"),
        (r'brand = "a\q"', r"unknown escape \\q: write \\\\ for \\, at character 11"),
        ("price < 1e999", r"1e999 is too large a number, at character 9"),
        ("brand = \ud800", r"half of a character, at character 9"),
        ("prize < 50", r"no attribute 'prize'; there are price, .*, at character 1: \^prize < 50$"),
        (
            "price < 50 and (color = red)",
            r"no attribute 'color'; .*, at character 17: price < 50 and \(\^color = red\)$",
        ),
        ("price < cheap", r"price is a number, 'cheap' is text, at character 1: \^price < cheap$"),
        ('price < "50"', r"price is a number, '50' is text"),
        ("price<50and", r"price is a number, '50and' is text"),
        (
            "brand = 42",
            r"brand is a category, 42 is a number: put it in quotes for the text, at character 1",
        ),
        ("brand in (Acme, 42)", r"brand is a category, 42 is a number"),
        ("brand < Acme", r"brand is a category, which is one text without order: use =, != or in"),
        ("brand under Acme", r"brand is a category"),
        ("price has 5", r"price is a number: compare it with"),
        ("category > Shoes", r'category is a path without order: use under "A > B"'),
        ("tags = wool", r"tags is a set: use has, one for each value"),
        ("tags in (wool, silk)", r"tags is a set"),
        ('brand = " "', r"brand: a blank text is stored as unknown: write brand is missing"),
        (
            "price < 5 " + "or price < 5 " * 20 + "or bad = 1 " + "or price < 5 " * 20,
            r": \.\.\..{30}\^bad = 1 .*\.\.\.$",
        ),
        ("brand = 'a\nb' x", r"found x, at character 15: brand = 'a b' \^x$"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, message, table):
    with pytest.raises(ValueError, match=message) as caught:
        parse(text).mask(table)
    assert "\n" not in str(caught.value)


def test_nesting_has_a_limit():
    depth = MAX_DEPTH - 1
    assert parse("(" * depth + "a = b" + ")" * depth) == parse("a = b")
    for text in ("(" * (depth + 1) + "a = b" + ")" * (depth + 1), "not " * (depth + 1) + "a = b"):
        with pytest.raises(
            ValueError,
            match=rf"more than {MAX_DEPTH} parentheses and not within each other, at char",
        ):
            parse(text)


def test_nesting_needs_no_deep_stack():
    limit = sys.getrecursionlimit()
    depth = MAX_DEPTH - 1
    text = "(a = b and not (" * (depth // 3) + "a = b" + " or c = d))" * (depth // 3)
    sys.setrecursionlimit(max(400, len(inspect.stack()) + 250))
    try:
        assert parse(str(parse(text))) == parse(text)
    finally:
        sys.setrecursionlimit(limit)


def test_length_has_a_limit():
    with pytest.raises(ValueError, match=r"100,006 characters; at most 100,000"):
        parse("a = b " + " " * MAX_CHARACTERS)


def test_a_table_without_attributes_says_so(tmp_path):
    with pytest.raises(ValueError, match="no attributes, at character 1"):
        parse("price < 5").mask(table_of(tmp_path / "a.arrow", [{"id": "0"}], {}))


def test_many_attributes_are_not_all_listed(tmp_path):
    table = table_of(
        tmp_path / "a.arrow", [{"id": "0"}], {f"field {n}": "number" for n in range(30)}
    )
    with pytest.raises(ValueError, match=r"there are field 7, .* and 18 more, at"):
        parse('"field  7" < 5').mask(table)


def test_columns_are_those_it_looks_at():
    assert parse('price < 5 and (brand = x or not price > 1) and "a b" is known').columns == (
        "price",
        "brand",
        "a b",
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("price<5.0 AND brand!=Acme", "price < 5 and brand != Acme"),
        ("not(brand = x)", "brand != x"),
        ("not brand in('x',\"y z\")", 'brand not in (x, "y z")'),
        ("not a is missing", "a is known"),
        ("(a=x or b=y) and (c=z)", "(a = x or b = y) and c = z"),
        ("not (a=x or b=y)", "not (a = x or b = y)"),
        ("a = '42'", 'a = "42"'),
        ("a = 'and'", 'a = "and"'),
        ("a under 'x > y'", 'a under "x > y"'),
        ("a = 1e16", "a = 1e+16"),
        ("a = '\t\"\\\\'", r'a = "\t\"\\"'),
    ],
)
def test_text_in_one_way_of_writing(text, canonical):
    assert str(parse(text)) == canonical


def test_masks_are_remembered_by_what_they_mean(table, monkeypatch):
    first = parse("price<50  and brand=Acme").mask(table)
    monkeypatch.setattr(
        "tritower.retrieval.filtering.filters.matches", lambda *_: pytest.fail("computed again")
    )
    again = parse("price < 5e1 and brand = 'Acme'").mask(table)
    assert again.tolist() == first.tolist()
    again[:] = True  # a caller's copy
    assert parse("price<50 and brand=Acme").mask(table).tolist() == first.tolist()


def test_remembered_masks_are_few(table):
    for number in range(3 * CACHED_MASKS):
        parse(f"price < {number}").mask(table)
    assert len(table._masks) == CACHED_MASKS


def test_threads_get_the_masks_of_their_own_filters(tmp_path):
    rows = [{"id": str(n), "price": float(n)} for n in range(200)]
    table = table_of(tmp_path / "a.arrow", rows, {"price": "number"})
    wrong = []

    def ask(offset):
        for step in range(200):
            limit = (offset * 7 + step) % 50
            if parse(f"price < {limit}").mask(table).sum() != limit:
                wrong.append(limit)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_parts_of_a_filter_combine_as_in_three_valued_logic(tmp_path):
    """Every combination of true, false and unknown, by hand."""
    number = {True: 1.0, False: 0.0, None: None}
    rows = [
        {"id": str(position), "a": number[a], "b": number[b]}
        for position, (a, b) in enumerate(product((True, False, None), repeat=2))
    ]
    table = table_of(tmp_path / "a.arrow", rows, {"a": "number", "b": "number"})
    #                                                     a: T T T F F F U U U
    #                                                     b: T F U T F U T F U
    assert parse("a = 1 and b = 1").mask(table).tolist() == [
        *map(bool, [1, 0, 0, 0, 0, 0, 0, 0, 0])
    ]
    assert parse("a = 1 or b = 1").mask(table).tolist() == [*map(bool, [1, 1, 1, 1, 0, 0, 1, 0, 0])]
    assert parse("not (a = 1 and b = 1)").mask(table).tolist() == [
        *map(bool, [0, 1, 0, 1, 1, 1, 0, 1, 0])
    ]
    assert parse("not (a = 1 or b = 1)").mask(table).tolist() == [
        *map(bool, [0, 0, 0, 0, 1, 0, 0, 0, 0])
    ]
    assert parse("not a = 1").mask(table).tolist() == [*map(bool, [0, 0, 0, 1, 1, 1, 0, 0, 0])]
