"""Files of an index that are damaged.

Noticed before anything is searched, and the version before is used instead.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import FACTORY, FULL, ROOT, answers, build, describe, embed, unit_vectors

from tritower.artefacts import storage, versions
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.index import ProductIndex

FACTORIES = [FACTORY, "Flat"]
FILES = {
    FACTORY: [
        "attributes.arrow",
        "ids.arrow",
        "index.faiss",
        "lists.bin",
        "lists.npy",
        "settings.json",
        "vectors.faiss",
    ],
    "Flat": ["attributes.arrow", "ids.arrow", "index.faiss", "settings.json"],
}
CASES = [(factory, name) for factory in FACTORIES for name in [*FILES[factory], "manifest.json"]]
EXPECTED_AND_FOUND = {
    "manifest.json": r"manifest\.json is damaged: its content does not match its own digest",
    "size": r"{name} is damaged: expected \d+ bytes, found \d+",
    "digest": r"{name} is damaged: expected sha256 [0-9a-f]{{64}}, found [0-9a-f]{{64}}",
}


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """Factory -> an index of one version."""
    folder = tmp_path_factory.mktemp("one")
    embeddings = embed(folder / "e", 200)
    attributes = describe(embeddings)
    return {
        factory: build(embeddings, folder / factory, factory, attributes=attributes)
        for factory in FACTORIES
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Factory -> an index of two versions, of other products each.

    And what the older one answers.
    """
    folder = tmp_path_factory.mktemp("two")
    embeddings = [embed(folder / f"e{seed}", 200, seed=seed) for seed in (5, 0)]
    attributes = [describe(each) for each in embeddings]
    roots = {
        factory: build(embeddings[0], folder / factory, factory, attributes=attributes[0])
        for factory in FACTORIES
    }
    before = {factory: answers(root) for factory, root in roots.items()}
    for factory, root in roots.items():
        build(embeddings[1], root, factory, attributes=attributes[1])
    return {factory: (roots[factory], before[factory]) for factory in FACTORIES}


@pytest.fixture
def copy(tmp_path):
    """Copies an index; returns it and the folder of its newest version."""

    def make(root):
        shutil.copytree(root, tmp_path / "index")
        return tmp_path / "index", versions.current(tmp_path / "index")

    return make


def refused(root, what, name):
    expected = EXPECTED_AND_FOUND.get(name, EXPECTED_AND_FOUND[what].format(name=re.escape(name)))
    with pytest.raises(ArtefactError, match=expected):
        ProductIndex.open(root)


def offsets(size):
    """Every byte of a small file where the whole tier runs, else some.

    Always the first and the last.
    """
    wanted = size if FULL and size <= 64 << 10 else 200 if FULL else 12
    chosen = np.linspace(0, size - 1, min(size, wanted)).astype(int)
    return sorted({*chosen.tolist()})


@pytest.mark.parametrize("factory", FACTORIES)
def test_these_are_all_files_of_an_index(indexes, factory):
    folder = versions.current(indexes[factory])
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES[factory], "manifest.json"]
    )


@pytest.mark.parametrize(("factory", "name"), CASES)
def test_every_flipped_bit_is_noticed(indexes, copy, factory, name, figures):
    root, folder = copy(indexes[factory])
    good, random = (folder / name).read_bytes(), np.random.default_rng(0)
    for offset in offsets(len(good)):
        bad = bytearray(good)
        bad[offset] ^= 1 << int(random.integers(8))
        (folder / name).write_bytes(bad)
        refused(root, "digest", name)
        figures["T4 flipped bits noticed"] += 1
    (folder / name).write_bytes(good)
    assert answers(root) == answers(indexes[factory])


@pytest.mark.parametrize(("factory", "name"), CASES)
def test_every_cut_grown_emptied_or_missing_file_is_noticed(indexes, copy, factory, name, figures):
    root, folder = copy(indexes[factory])
    good = (folder / name).read_bytes()
    for cut in (0, 1, len(good) // 2, len(good) - 1):
        (folder / name).write_bytes(good[:cut])
        refused(root, "size", name)
    for grown in (b"\0", b"x", good):
        (folder / name).write_bytes(good + grown)
        refused(root, "size", name)
    (folder / name).write_bytes(bytes(len(good)))
    refused(root, "digest", name)
    (folder / name).unlink()
    with pytest.raises(
        ArtefactError,
        match=rf"{name} is missing; the manifest lists it|000001, which has no {name}",
    ):
        ProductIndex.open(root)
    figures["T4 cut, grown, emptied, missing and exchanged files noticed"] += 9


@pytest.mark.parametrize(("factory", "name"), CASES)
def test_a_file_of_another_version_is_noticed(pairs, copy, factory, name, figures):
    root, folder = copy(pairs[factory][0])
    older = versions.versions(root)[0]
    if (older / name).read_bytes() == (folder / name).read_bytes():
        pytest.skip(f"{name} is the same in both versions")
    shutil.copy(older / name, folder / name)
    with pytest.raises(ArtefactError, match=f"{'|'.join(FILES[factory])} is damaged: expected"):
        ProductIndex.open(root, fall_back=False)
    figures["T4 cut, grown, emptied, missing and exchanged files noticed"] += 1


@pytest.mark.parametrize(
    "damage",
    [b"", b"0", b"000002", b"000009\n", b"000001\n\n", b"../x\n", bytes(7), None],
    ids=repr,
)
def test_a_damaged_pointer_is_noticed(indexes, copy, damage, figures):
    root, _ = copy(indexes["Flat"])
    if damage is None:
        (root / "CURRENT").unlink()
    else:
        (root / "CURRENT").write_bytes(damage)
    with pytest.raises(ArtefactError, match="CURRENT"):
        ProductIndex.open(root, fall_back=False)
    index = ProductIndex.open(root)
    assert "CURRENT" in index.note and answers(root) == answers(indexes["Flat"])
    figures["T4 cut, grown, emptied, missing and exchanged files noticed"] += 1


def damage(file, way):
    data = file.read_bytes()
    if way == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif way == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()


@pytest.mark.parametrize("way", ["flipped", "cut", "missing"])
@pytest.mark.parametrize(("factory", "name"), CASES)
def test_with_two_versions_the_good_one_answers(pairs, copy, factory, name, way, caplog, figures):
    root, folder = copy(pairs[factory][0])
    if (name, way) == ("manifest.json", "missing"):
        pytest.skip(
            "a folder without manifest is no version: CURRENT is what is wrong then, and tested so"
        )
    damage(folder / name, way)
    index = ProductIndex.open(root)
    assert index.version.name == "000001" and name in index.note and index.note in caplog.text
    assert answers(root) == pairs[factory][1]
    figures["T4 damaged versions whose older version answered"] += 1


def command(*arguments):
    return subprocess.run(
        [sys.executable, "index.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["lists.bin", "ids.arrow", "manifest.json"])
def test_verify_says_what_is_damaged_and_its_exit_code_too(pairs, copy, name):
    root, folder = copy(pairs[FACTORY][0])
    good = command("verify", "--index", root)
    assert (
        good.returncode == 0
        and good.stdout.count(": good") == 2
        and "in use: 000002" in good.stdout
    )
    damage(folder / name, "flipped")
    bad = command("verify", "--index", root)
    assert bad.returncode == 1 and f"error: {folder / name} is damaged" in bad.stderr
    assert bad.stdout.count(": good") == 1 and "Traceback" not in bad.stderr


def test_an_index_that_is_good_is_never_refused(pairs, indexes, copy, figures):
    roots = [*indexes.values(), *(root for root, _ in pairs.values())]
    alarms = []
    for number in range(1_000 if FULL else 50):
        try:
            index = ProductIndex.open(roots[number % len(roots)])
            storage.verify(index.version)
            alarms += [index.note] if index.note else []
        except ArtefactError as error:
            alarms.append(str(error))
        figures["T4 good indexes opened"] += 1
    figures["T4 false alarms"] += len(alarms)
    assert alarms == []


def test_a_service_starts_on_the_version_before_every_time(pairs, copy, tmp_path, figures):
    root, folder = copy(pairs[FACTORY][0])
    damage(folder / "vectors.faiss", "flipped")
    query = unit_vectors(1, seed=99)
    np.save(tmp_path / "query.npy", query)
    state = sorted(path.name for path in root.rglob("*"))
    for _ in range(5):
        done = command("search", "--index", root, "--vector", tmp_path / "query.npy", "--json")
        assert done.returncode == 0, done.stderr
        assert f"version 000001 is used, since {folder / 'vectors.faiss'} is damaged" in done.stderr
        assert [hit["product_id"] for hit in json.loads(done.stdout)["hits"]] == pairs[FACTORY][1][
            0
        ][0]
        figures["T6 starts on the version before"] += 1
    assert sorted(path.name for path in root.rglob("*")) == state


ARTEFACTS = ROOT / "tests" / "artefacts"


@pytest.mark.parametrize("name", ["flat", "ivf"])
def test_a_stored_index_gives_the_same_answers(name, figures):
    expected = json.loads((ARTEFACTS / "hits.json").read_text(encoding="utf-8"))[name]
    index = ProductIndex.open(ARTEFACTS / name)
    hits = index.search(np.load(ARTEFACTS / "queries.npy"), 10)
    assert index.ids(hits.rows).tolist() == expected["ids"]
    np.testing.assert_allclose(hits.scores, expected["scores"], atol=2e-6)
    figures["T8 queries of old indexes with the same answers"] += len(expected["ids"])


def test_stored_embeddings_still_build(tmp_path):
    expected = json.loads((ARTEFACTS / "hits.json").read_text(encoding="utf-8"))["flat"]
    index = ProductIndex.open(build(ARTEFACTS / "embeddings", tmp_path / "index", "Flat"))
    hits = index.search(np.load(ARTEFACTS / "queries.npy"), 10)
    assert index.ids(hits.rows).tolist() == expected["ids"]


@pytest.mark.parametrize("name", ["flat", "ivf"])
def test_a_damaged_stored_index_is_refused(tmp_path, name, figures):
    for file in sorted(os.listdir(ARTEFACTS / name)):
        root = shutil.copytree(ARTEFACTS / name, tmp_path / file)
        damage(root / file, "flipped")
        with pytest.raises(ArtefactError, match=rf"{file} is damaged"):
            ProductIndex.open(root)
        figures["T4 flipped bits noticed"] += 1


@pytest.mark.skipif(not __debug__, reason="this is that run")
def test_nothing_of_this_depends_on_assertions():
    """The tests of damage and of ids once more, in a Python that skips `assert` in the code that is
    tested.
    """
    here = Path(__file__).parent
    run = [
        sys.executable,
        "-O",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-k",
        "not starts_on",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITOWER_RELIABILITY"
    }
    files = [str(here / name) for name in ("test_damage.py", "test_ids.py")]
    done = subprocess.run([*run, *files], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
