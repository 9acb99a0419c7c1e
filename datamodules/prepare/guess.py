"""The role of every column of a table, guessed from its name and values, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tritower.datamodules.prepare.columns import SINGLE, Column, Columns, Override, Role
from tritower.datamodules.prepare.profile import Profile
from tritower.datamodules.prepare.tables import CatalogueError, Table

RARE = 0.01
"""A key of JSON objects that a smaller share of the rows has is left out."""

MANY_ROWS = 20
"""With fewer rows, a column of one value may still vary in the user's next file."""

_NAMES: dict[Role, tuple[str, ...]] = {  # best first
    "id": (
        *(
            "id",
            "product_id",
            "item_id",
            "sku",
            "asin",
            "article_id",
            "listing_id",
            "uniq_id",
            "unique_id",
            "uid",
        ),
        *("pid", "handle"),
    ),
    "group": (
        "group_id",
        "group",
        "cluster_id",
        "cluster",
        "entity_id",
        "label_group",
        "canonical_id",
        "same_as",
    ),
    "family": (
        *(
            "family_id",
            "family",
            "style_id",
            "style_code",
            "parent_id",
            "parent_sku",
            "parent_asin",
            "item_group_id",
        ),
        *("model_id", "variant_group", "master_id"),
    ),
    "split": ("split", "fold", "subset", "partition"),
    "path": (
        *(
            "category",
            "categories",
            "category_path",
            "category_tree",
            "product_category",
            "product_category_tree",
        ),
        *("taxonomy", "breadcrumb", "breadcrumbs", "department", "google_product_category"),
    ),
    "text": (
        "title",
        "name",
        "product_name",
        "product_title",
        "display_name",
        "product_display_name",
        "item_name",
    ),
}
_TEXT = re.compile(
    r"(?:^|_)desc(?:ription)?$|^(?:short|long|product)_desc|bullet|^body|details?$|^summary$|^subtitle$"
)
_IMAGE = re.compile(r"(?:^|_)(?:image|img|photo|picture|pic|thumbnail|foto|bild)s?(?:_|\d|$)")
_PRICE = re.compile(r"(?:^|_)(?:price|cost|msrp|rrp|preis|prix|precio)(?:_|$)")
_CODE = re.compile(r"(?:^|_)(?:code|sku|ean|upc|gtin|isbn|zip|id|no|nr|year)$")

Guess = tuple[Role, str]


def guess_columns(
    table: Table, profiles: Sequence[Profile], rows: int, override: Override | None = None
) -> Columns:
    """The role of every column, with the reason.

    Args:
        table: the user's file.
        profiles: of its columns and of the keys of its JSON objects.
        rows: records of the file.
        override: the user's choices.

    Raises:
        CatalogueError: COLUMN_MISSING: no column for the id, or the override names one that is not
            there.
    """
    override = override or Override({})
    found = {profile.name: profile for profile in profiles}
    # Named columns first.
    missing = [name for name in override.roles if name not in found]
    if missing:
        raise _column_missing(table, f"column {missing}, which --columns names", found)
    roles: dict[str, Guess] = {name: (role, "as given") for name, role in override.roles.items()}
    others = [profile for profile in profiles if profile.name not in roles]
    # Roles that only one column has: by name, and the id by its values.
    for role in SINGLE:
        if role in override.closed:
            best = None
        else:
            best = _single(role, [p for p in others if p.name not in roles], rows)
        if best is not None:
            roles[best[0].name] = (role, best[1])
    if all(role != "id" for role, _ in roles.values()):
        raise _column_missing(
            table,
            "column for the id (id, product_id, sku, or one that differs in every row)",
            found,
        )
    # All other columns by name and values.
    for profile in others:
        if profile.name not in roles:
            role, why = _guess(profile, rows)
            if role in override.closed:
                roles[profile.name] = ("ignore", f"{why}, but not a {role}")
            else:
                roles[profile.name] = (role, why)
    _second_thoughts(roles, found, override)
    columns = [
        Column(p.name, p.column, p.key, *roles[p.name], filled=p.filled, examples=tuple(p.examples))
        for p in profiles
    ]
    columns.sort(key=lambda column: _rank(column, list(override.roles)))
    return Columns(tuple(columns), override.path_separator, override.value_separator)


def _column_missing(table: Table, what: str, found: Iterable[str]) -> CatalogueError:
    return CatalogueError(f"COLUMN_MISSING: {table} has no {what}; its columns are {list(found)}")


def plain_name(name: str) -> str:
    """A name in lower case with underscores.

    `productDisplayName` and `Product display-name` are the same.
    """
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())).lower()


def _single(role: Role, profiles: Sequence[Profile], rows: int) -> tuple[Profile, str] | None:
    """The column that fits a role of which there is one at most."""
    columns = [p for p in profiles if p.key is None and p.filled]
    # The first known name that fits; an id may also be a column without repeats.
    for name in _NAMES[role]:
        for p in columns:
            if plain_name(p.name) == name and _fits(role, p):
                return p, "its name"
    if role == "id":
        for p in columns:
            if (
                p.filled == rows
                and p.distinct == p.seen
                and not p.objects
                and not p.lists
                and p.share(p.words) < 2
            ):
                return p, "differs in every row"
    return None


def _fits(role: Role, p: Profile) -> bool:
    if role == "split":
        # Other names count as test. A column with few such values is a property, like a split hem.
        return p.share(p.splits) > 0.5
    # Thousands of rows with one value are a kind of product, not variants.
    if role in (
        "group",
        "family",
    ):
        return p.distinct > 1 and p.seen / p.distinct <= 50
    return True


def _guess(p: Profile, rows: int) -> Guess:
    """The role of a column that may be one of several."""
    name = plain_name(p.key or p.name)
    return (
        _not_values(p, rows)
        or _picture(p, name)
        or _by_name(p, name)
        or _number(p, name)
        or _by_values(p, name, rows)
        or ("category", _different(p))
    )


def _different(p: Profile) -> str:
    more = " or more" if p.seen < p.filled else ""
    if p.distinct == 1:
        return "always the same value"
    return f"{p.distinct:,} different values{more}"


def _not_values(p: Profile, rows: int) -> Guess | None:
    if not p.filled:
        return "ignore", "empty"
    if plain_name(p.name) in ("language", "lang", "locale"):
        return "ignore", "of the listing, not of the thing"
    if re.fullmatch(r"(?:column|unnamed)_\d+", plain_name(p.name)):
        return "ignore", "has no name"
    if p.objects > 0.5 * p.seen:
        if p.key is None:
            return ("json", "each key is an attribute")
        return ("ignore", "nested")
    if p.key is not None and p.filled < RARE * rows:
        return "ignore", f"in fewer than {RARE:.0%} of the rows"
    return None


def _picture(p: Profile, name: str) -> Guess | None:
    if p.share(p.bytes) > 0.9:
        return "image", "binary"
    if p.share(p.pictures) > 0.8 or (_IMAGE.search(name) and p.pictures + p.addresses > 0):
        return "image", "names of picture files"
    if p.share(p.addresses) > 0.9:
        return ("ignore", "web addresses")
    return None


def _by_name(p: Profile, name: str) -> Guess | None:
    if p.key is None and (name in _NAMES["text"] or _TEXT.search(name)):
        return "text", "its name"
    if name in _NAMES["path"] and not p.bars and not p.numbers:
        return "path", "its name"
    if _PRICE.search(name) and p.share(p.numbers) > 0.5:
        return "price", "its name"
    return None


def _number(p: Profile, name: str) -> Guess | None:
    if p.share(p.numbers) < 0.98:
        return None
    if p.share(p.currencies) > 0.5:
        return "price", "amounts with a currency"
    # Digits may be codes: equal lengths, leading zeros, or a telling name.
    same_length = len(p.lengths) == 1 and min(p.lengths) >= 6 and not p.fractions
    if p.codes or same_length or _CODE.search(name):
        unique = p.seen >= MANY_ROWS and p.distinct > 0.9 * p.seen
        if unique:
            return ("ignore", "a code of its own in every row")
        return ("category", "codes made of digits")
    if p.distinct >= 20 or (p.fractions and p.distinct >= 3):
        return "number", f"{p.distinct:,} different numbers"
    return "category", f"only {p.distinct} different numbers"


def _by_values(p: Profile, name: str, rows: int) -> Guess | None:
    if p.distinct == 1 and rows >= MANY_ROWS and (p.filled == rows or name == "currency"):
        return "ignore", "always the same"
    if p.share(p.dates) > 0.9:
        return "ignore", "dates"
    if p.share(p.arrows) > 0.2:
        return "path", "levels separated by >"
    if p.share(p.lists + p.bars) > 0.3:
        return "set", "several values in a cell"
    # Long and different texts are text; short and different ones are codes.
    unique = p.seen >= MANY_ROWS and p.distinct > 0.9 * p.seen
    words = p.share(p.words)
    if (words >= 4 and p.distinct > 0.6 * p.seen) or (words >= 3 and unique):
        return "text", f"about {words:.0f} words, mostly different"
    if unique and words < 1.5:
        return "ignore", "a code of its own in every row"
    if p.bars or p.lists:
        return ("set", "several values in a cell")
    return None


def _second_thoughts(
    roles: dict[str, Guess], found: dict[str, Profile], override: Override
) -> None:
    """What can be decided only when all columns have a role."""
    pictures = [
        name for name, (role, _) in roles.items() if role == "image" and name not in override.roles
    ]
    # Local pictures win over web addresses, which are not downloaded.
    local = [name for name in pictures if not found[name].addresses]
    for name in pictures:
        if local and found[name].addresses:
            roles[name] = ("ignore", f"web addresses; the pictures of {', '.join(local)} are used")
    if "text" not in override.closed and all(role != "text" for role, _ in roles.values()):
        # A catalogue without text takes the column with the most words.
        words = [
            (found[name].share(found[name].words), -number, name)
            for number, (name, (role, why)) in enumerate(roles.items())
            if (role == "category" or why.startswith("a code"))
            and found[name].key is None
            and name not in override.roles
            and found[name].distinct > 0.6 * found[name].seen
            and found[name].words
        ]
        if words:
            roles[max(words)[2]] = ("text", "the most words of all columns")


def _rank(column: Column, named: Sequence[str]) -> tuple[int, int, int]:
    """Columns that the user names come first, then titles, then the order of the table."""
    if column.name in named:
        place = named.index(column.name)
    else:
        place = len(named)
    title = (
        column.role == "text" and column.key is None and plain_name(column.name) in _NAMES["text"]
    )
    return place, not title, column.key is not None
