"""The one tokenizer of the project.

Text to lower-case words. Training, evaluation and hybrid search all use it.
"""

from __future__ import annotations

import re
import sys
import unicodedata

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002fa1f"
"""Chinese, Japanese and Korean characters, as a range of a regular expression."""

_WORD = rf"[^\W_{CJK}]+"
_DECIMAL = rf"\d+(?:[.,]\d+)+[^\W\d_{CJK}]*(?![^\W_])"
_TOKEN = re.compile(rf"[{CJK}]|{_DECIMAL}|{_WORD}(?:[-./'’]{_WORD})*")
_DECIMAL_NUMBER = re.compile(_DECIMAL)
_PARTS = re.compile(_WORD)
_CJK_CHARACTER = re.compile(f"[{CJK}]")


def tokenize(text: str) -> list[str]:
    """Lower-case words in order.

    * Chinese, Japanese and Korean text is split into characters.
    * Decimal numbers stay whole, with a unit that follows: "3.5" and "3,5" are both "3.5", "2.4ghz"
      is one word.
    * Model codes stay whole beside their parts: "WH-1000XM4" gives "wh", "1000xm4", "wh1000xm4".
    * The possessive is dropped: "women's" gives "women".
    """
    # Compatibility forms, such as full-width letters, become plain ones.
    found = _TOKEN.findall(
        (text if text.isascii() else unicodedata.normalize("NFKC", text)).lower()
    )
    tokens: list[str] = []
    for token in found:
        if token.isalnum():
            tokens.append(token)
        elif _DECIMAL_NUMBER.fullmatch(token):
            tokens.append(token.replace(",", "."))
        else:
            tokens += _split_compound(token)
    # A catalogue repeats its words: one copy of each is kept.
    return list(map(sys.intern, tokens))


def is_cjk(token: str) -> bool:
    """Whether a token is a Chinese, Japanese or Korean character."""
    return not token.isascii() and _CJK_CHARACTER.match(token) is not None


def _split_compound(token: str) -> list[str]:
    """The parts of words joined by punctuation; of a model code also the whole."""
    parts = _PARTS.findall(token)
    if parts[-1] == "s" and token[-2] in "'’":
        parts = parts[:-1]
    whole = "".join(parts)
    is_code = not whole.isalpha() and not whole.isdigit() and not set(token) & set("'’")
    if is_code and len(parts) > 1:
        return [*parts, whole]
    return parts
