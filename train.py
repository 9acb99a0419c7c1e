"""Train a two-tower model.

`python train.py fit --config configs/demo.yaml`. docs/training.md is the guide.
"""

import sys

from tritower.towers.cli import main

if __name__ == "__main__":
    sys.exit(main())
