"""Values that cannot be used: a stable code, and a reason that a person can read."""

from __future__ import annotations


class BadValue(ValueError):
    """A value that cannot be used.

    Attributes:
        code: stable and machine-readable, e.g. `PRICE_AMBIGUOUS`; all are listed in
            docs/catalogue.md.
        reason: for a person, with an excerpt of the value.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def excerpt(value: object, limit: int = 80) -> str:
    """At most `limit` characters of a value, safe to print on one line, in quotes."""
    text = str(value)
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "'" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut) + "'"
