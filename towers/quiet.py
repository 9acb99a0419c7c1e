"""Lightning's hints to its own users, kept from ours."""

from __future__ import annotations

import logging
import warnings


def quiet_lightning() -> None:
    """Show each message once, without advertisements and deprecations of libraries."""
    logging.getLogger("lightning.pytorch").propagate = False  # it has a handler of its own
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
