"""One cell of a user's table.

A parsed value, or the reason why there is none. Nothing is guessed or repaired silently.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from tritower.datamodules.bad_value import BadValue, excerpt

Cell: TypeAlias = "str | bytes | Sequence[Cell] | Mapping[str, Cell] | None"
"""One cell as read. Scalars are strings.

Lists, mappings and bytes come from JSONL and Parquet only.
"""

Decimal = Literal["auto", "point", "comma"]
"""The decimal sign of numbers written as text.

`auto` takes those that can be read in one way only.
"""

MAX_PRICE = 1e9
MAX_NUMBER = 1e15

_CODES = (
    "USD EUR GBP INR CNY RMB JPY CHF CAD AUD NZD HKD SGD TWD KRW THB IDR MYR PHP VND RUB UAH PLN "
    "CZK HUF RON BGN SEK "
    "NOK DKK ISK TRY ILS AED SAR EGP ZAR NGN KES BRL MXN ARS CLP COP PEN"
).replace(" ", "|")
_CURRENCY = (
    r"(?:(?:US|CA|AU|NZ|HK|SG|NT|MX|A|C|R)?\$|[£¤¥֏؋৳฿៛\u20a0-\u20c0￥￡]|"
    rf"{_CODES}|Rs\.?|kr\.?|zł|元|円|원)"
)
_PRICE = re.compile(rf"([-+−]?)(?:{_CURRENCY})?\s*([-+−]?)([\d.,][^A-Za-z]*?)\s*(?:{_CURRENCY})?")
_SPACED = re.compile(r"\d{1,3}(?:([ \u00a0\u2009\u202f'’])\d{3})(?:\1\d{3})*(?:[.,]\d+)?")
_ONE_SEPARATOR = re.compile(r"(\d*)([.,])(\d+)")
_EXPONENT = re.compile(r"[-+]?\d+(?:\.\d+)?[eE][-+]?\d+")
_NOT_FINITE = re.compile(r"[-+]?(?:nan|inf|infinity)", re.IGNORECASE)
_GROUPED = {  # decimal sign -> digits in groups, also Indian ones: 1,299.00  1.299.000,5  1,29,999
    "point": re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?:\.\d+)?", re.ASCII),
    "comma": re.compile(r"(?:\d{1,3}(?:\.\d{3})+|\d{1,2}(?:\.\d{2})+\.\d{3})(?:,\d+)?", re.ASCII),
}

_TAG_NAMES = (
    "a|abbr|article|b|big|blockquote|br|button|caption|center|code|dd|del|div|dl|dt|em|figcaption|figure|font|footer|"
    "h[1-6]|header|hr|i|iframe|img|input|ins|label|li|link|main|mark|meta|nav|nobr|ol|p|pre|q|s|script|section|small|"
    "source|span|strike|strong|style|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul|video|wbr"
)
_INLINE = frozenset(
    "a abbr b big code del em font i ins mark nobr q s small span strike strong sub sup tt u "
    "wbr".split()
)
# Bounded repetitions: a hostile cell of a megabyte is still read in linear time.
_TAG = re.compile(
    rf"<(/?)({_TAG_NAMES})((?:\s{{1,50}}[a-z][\w:-]{{0,50}}\s?=\s?(?:\"[^\"<>]{{0,2000}}\"|'[^'<>]{{0,2000}}'|"
    r"[^\s\"'<>]{1,2000})){0,50})\s{0,50}/?>|<!--.{0,500}?-->",
    re.IGNORECASE | re.DOTALL,
)
_HIDDEN_END = re.compile(r"</(script|style)\s*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


class Number(str):
    """A number that the file itself types as one (JSON, Parquet).

    Never ambiguous, its decimal sign is a point.
    """


def parse_number(
    text: str, decimal: Decimal = "auto", role: Literal["number", "price"] = "number"
) -> float:
    """The number in a cell.

    Currency signs, spaces and apostrophes between groups of digits, thousands separators of either
    role and an exponent are understood. With `decimal="auto"` a text with two readings is refused:
    `1,600` may be 1600 or 1.6.

    Args:
        text: the cell, not empty.
        decimal: the decimal sign, where it is known.
        role: a `price` is above 0 and at most 1e9; a `number` is within +-1e15. Also the first word
            of the codes.

    Raises:
        BadValue: {PRICE,NUMBER}_{UNPARSEABLE,AMBIGUOUS,OUT_OF_RANGE}.
    """
    prefix = role.upper()
    if isinstance(text, Number):
        value = float(text)
    else:
        value = _read_number(text.strip(), decimal, prefix)
    if role == "price":
        low = 0.0
        high = MAX_PRICE
    else:
        low = -MAX_NUMBER
        high = MAX_NUMBER
    # Prices are above 0; all numbers have bounds, beyond which they are typing errors.
    if not math.isfinite(value) or value > high or value < low or (role == "price" and value == 0):
        if role == "price":
            bounds = f"above 0 and at most {high:g}"
        else:
            bounds = f"within ±{high:g}"
        raise BadValue(f"{prefix}_OUT_OF_RANGE", f"{excerpt(text)} is not {bounds}")
    return value


def is_number(text: str) -> bool:
    """Whether a cell is a number, perhaps with a currency sign, perhaps an ambiguous one."""
    try:
        parse_number(text)
    except BadValue as error:
        return error.code != "NUMBER_UNPARSEABLE"
    return True


def _read_number(text: str, decimal: Decimal, prefix: str) -> float:
    if _NOT_FINITE.fullmatch(text):
        return math.nan
    if _EXPONENT.fullmatch(text) and text.isascii():
        return float(text)
    match = _PRICE.fullmatch(text)
    if match is None or not text or (match[1] and match[2]):
        raise BadValue(f"{prefix}_UNPARSEABLE", f"{excerpt(text)} is not a number")
    value = _read_digits(match[3], decimal, prefix, text)
    if (match[1] or match[2]) in ("-", "−"):
        return -value
    return value


def _read_digits(digits: str, decimal: Decimal, prefix: str, text: str) -> float:
    """Digits with separators, without sign and currency."""
    spaced = _SPACED.fullmatch(digits) is not None
    if spaced:
        digits = re.sub(r"[^\d.,]", "", digits)
    # Plain digits, digits with one separator, or grouped thousands.
    if digits.isascii() and digits.isdigit():
        return float(digits)
    single = _ONE_SEPARATOR.fullmatch(digits)
    if digits.isascii() and single:
        return _one_separator(single, decimal, prefix, text, spaced)
    for sign in ("point", "comma"):
        if decimal in ("auto", sign) and _GROUPED[sign].fullmatch(digits):
            if sign == "point":
                thousands = ","
                point = "."
            else:
                thousands = "."
                point = ","
            return float(digits.replace(thousands, "").replace(point, "."))
    raise BadValue(f"{prefix}_UNPARSEABLE", f"{excerpt(text)} is not a number" + _with(decimal))


def _one_separator(
    match: re.Match[str], decimal: Decimal, prefix: str, text: str, spaced: bool
) -> float:
    """`12.5`, `1,600`, `,89`: the sign is a decimal sign, or it separates thousands."""
    whole, sign, rest = match.groups()
    # "1,299" is 1299 in one country and 1.299 in another: refused unless the sign is known.
    grouped = 1 <= len(whole) <= 3 and len(rest) == 3 and whole[0] != "0" and not spaced
    if decimal == "auto" and (grouped or not whole):
        raise BadValue(
            f"{prefix}_AMBIGUOUS",
            f"{excerpt(text)} can be read in two ways; set --decimal point or --decimal comma",
        )
    if decimal == "auto" or sign == {"point": ".", "comma": ","}[decimal]:
        return float(f"{whole or 0}.{rest}")
    if grouped:
        return float(whole + rest)
    raise BadValue(f"{prefix}_UNPARSEABLE", f"{excerpt(text)} is not a number" + _with(decimal))


def _with(decimal: Decimal) -> str:
    if decimal == "auto":
        return ""
    return f" with --decimal {decimal}"


def clean_html(text: str) -> str:
    """Text without HTML tags and entities; a lone `<`, `&` or `5 < 6 > 3` stays as it is."""
    cleaned = text
    if "<" in text:
        cleaned = "".join(_without_tags(text))
    if "&" in cleaned:
        cleaned = _ENTITY.sub(lambda match: html.unescape(match[0]), cleaned)
    if cleaned == text:
        return text
    return " ".join(cleaned.split())


def _without_tags(text: str) -> Iterator[str]:
    """The pieces of a text between its tags; what a script or a style sheet holds is left out."""
    end = 0
    skipping = ""
    last_closing = {match[1].lower(): match.start() for match in _HIDDEN_END.finditer(text)}
    # Content of scripts and styles is skipped up to their closing tag, if there is one.
    for match in _TAG.finditer(text):
        closing = match[1]
        name = (match[2] or "").lower()
        if not skipping:
            yield text[end : match.start()]
            yield "" if name in _INLINE else " "
        elif not (closing and name == skipping):
            continue
        end = match.end()
        skipping = ""
        if not closing and last_closing.get(name, -1) >= end:
            skipping = name
    yield text[end:]


def parse_list(cell: Cell, separator: str) -> list[str]:
    """Several values in one cell.

    A JSON list, or a text with separators; empty ones are left out, order is kept.

    Raises:
        BadValue: `NOT_A_LIST`: a mapping, bytes, or a list that holds more than plain values.
    """
    # A JSON list, or text with separators.
    # JSON lists from CSV cells, else texts with separators, else lists from JSONL and Parquet.
    if isinstance(cell, str):
        text = cell.strip()
        if text.startswith("[") and text.endswith("]"):
            listed = _json_list(text)
        else:
            listed = None
        if listed is None:
            parts: Sequence[Cell] = text.split(separator.strip() or separator)
        else:
            parts = listed
    elif isinstance(cell, (bytes, Mapping)):
        raise BadValue("NOT_A_LIST", f"{excerpt(cell)} is not a list of values")
    else:
        parts = cell or ()
    if not all(part is None or isinstance(part, str) for part in parts):
        raise BadValue("NOT_A_LIST", f"{excerpt(cell)} holds more than plain values")
    return [part for part in (str(part).strip() for part in parts if part is not None) if part]


def parse_json(text: str) -> Cell:
    """JSON with its scalars as strings, exactly as they are written; null is None.

    Raises:
        ValueError: not JSON, nested too deep, or a key twice in one object.
    """
    try:
        value: Cell = json.loads(
            text,
            parse_float=Number,
            parse_int=Number,
            parse_constant=Number,
            object_pairs_hook=_once,
        )
        return _booleans_as_text(value)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _once(pairs: list[tuple[str, Cell]]) -> dict[str, Cell]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {excerpt(next(k for k in keys if keys.count(k) > 1))} appears twice")
    return result


def _booleans_as_text(value: Cell) -> Cell:
    if isinstance(value, bool):
        if value:
            return "true"
        return "false"
    if isinstance(value, dict):
        return {key: _booleans_as_text(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_booleans_as_text(part) for part in value]
    return value


def _json_list(text: str) -> Sequence[Cell] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    if isinstance(value, list):
        return value
    return None
