"""Embed, build, search, evaluate, update.

`python index.py COMMAND --help`. docs/indexes.md is the guide.
"""

import sys

from tritower.commands.index import main

if __name__ == "__main__":
    sys.exit(main())
