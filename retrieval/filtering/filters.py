r"""Which products may be found: `price<50 and brand in (Acme, Zed) and category under "Shoes"`.

    filter  any   = every { "or" every }
            every = one { "and" one }
            one   = "not" one | "(" any ")" | test
            test  = name ( < | <= | > | >= | = | != ) value
                  | name ["not"] "in" "(" value { "," value } ")"
                  | name ["not"] ( "under" | "has" ) value
                  | name "is" ["not"] ( "missing" | "known" )

Names and values are words or in quotes, '...' or "...", where \\ \" \' \n \t \r are escapes.
A number without quotes is a number. Keywords may be written in capitals; names and values are
compared exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tritower.retrieval.filtering.parser import fail, parse_term
from tritower.retrieval.filtering.terms import Term, matches, tests_of, type_problem
from tritower.retrieval.products.attribute_cells import AttributeType
from tritower.retrieval.products.attribute_table import AttributeTable, Mask

MAX_CHARACTERS = 100_000


@dataclass(frozen=True)
class Filter:
    """A filter, as `parse` gives it; `str` gives its text in one way of writing.

    Attributes:
        term: what it is made of.
        source: the text it was parsed from.
    """

    term: Term
    source: str = field(default="", compare=False)

    def __str__(self) -> str:
        return str(self.term)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the attributes it looks at, each once."""
        return tuple(dict.fromkeys(test.attribute for test in tests_of(self.term)))

    def check(self, attribute_types: Mapping[str, AttributeType]) -> None:
        """Refuse a filter that cannot be asked of such attributes.

        Args:
            attribute_types: attribute -> type.

        Raises:
            ValueError: an unknown attribute, or one that is compared with what it cannot be
                compared with.
        """
        for test in tests_of(self.term):
            if (problem := type_problem(test, attribute_types)) is not None:
                fail(problem, self.source or str(self), test.position)

    def mask(self, table: AttributeTable) -> Mask:
        """(N,) which rows match; the table remembers it.

        Raises:
            ValueError: what `check` refuses.
        """
        self.check(table.attribute_types)
        return table.remembered(str(self), lambda: matches(self.term, table))


def parse(text: str) -> Filter:
    """A filter from its text.

    Raises:
        ValueError: it is none; the message shows where, with a ^ before the place.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"filter: {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail("half of a character", text, error.start)
    return Filter(parse_term(text), text)
