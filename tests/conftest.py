"""What all tests share: fixed seeds, no network, and skips that say what is missing."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Before any library reads them: a test that would download fails at once instead of waiting for a
# network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of calls inside Lightning
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # models here are tiny: threads only wait for each other


# How long an example takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, numpy and torch before every test.

    Torch only where the test has imported it already.
    """
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    return 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where torch sees none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


def _folder(variable: str, what: str) -> Path:
    """The folder that an environment variable names.

    Skips when it is unset, fails when it is wrong.
    """
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set; it names the folder with {what}")
    if not Path(value).is_dir():
        pytest.fail(f"{variable}={value} is not a folder; it should hold {what}")
    return Path(value)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real catalogues, from TRITOWER_DATA."""
    return _folder("TRITOWER_DATA", "the real catalogues (docs/data.md)")


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder of pretrained weights, from TRITOWER_WEIGHTS."""
    return _folder("TRITOWER_WEIGHTS", "the pretrained weights (docs/data.md)")


@pytest.fixture(scope="session")
def tiny_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared catalogue of 120 products with queries; read it, never change it."""
    from tests.support.catalogues import write_catalogue

    return write_catalogue(tmp_path_factory.mktemp("catalogue") / "tiny")


@pytest.fixture(scope="session")
def cut_catalogue(tiny_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny catalogue with splits drawn at random.

    They cut through groups, families, facets and judgements.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = shutil.copytree(tiny_catalogue, tmp_path_factory.mktemp("cut") / "catalogue")
    rng = np.random.default_rng(0)
    for file in [
        *sorted((folder / "products").glob("*.parquet")),
        *(folder / "queries").glob("*.parquet"),
    ]:
        table = pq.read_table(file)
        splits = pa.array(rng.choice(["train", "val", "test"], len(table)))
        table = table.set_column(table.column_names.index("split"), "split", splits)
        pq.write_table(table, file, row_group_size=16)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of configs/tiny.yaml; read it, never change it."""
    from tests.support.training import fit

    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert fit(tiny_catalogue, run, "--trainer.log_every_n_steps=1") == 0
    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    from tests.support.wheel import build_wheel

    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and nothing else of the project."""
    from tests.support.wheel import install_wheel

    return install_wheel(wheel, tmp_path_factory.mktemp("environment") / "venv")
