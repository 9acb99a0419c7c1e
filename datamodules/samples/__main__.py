"""The command of the sample catalogue."""

import sys

from tritower.datamodules.samples import main

if __name__ == "__main__":
    sys.exit(main())
