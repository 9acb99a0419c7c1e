"""What `pip install` brings: the wheel's content, declared dependencies, pins and their reasons."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import tritower
from tests.support.source_code import FOLDERS, ROOT, imports, module_name, shipped_files, tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# timm and open_clip import torchvision, and it has to fit torch, so its bound belongs to ours.
NEVER_IMPORTED = {"torchvision"}

OURS = {
    *FOLDERS,
    "benchmarks",
    "tests",
    *(path.stem for path in (ROOT / "tests").rglob("*.py")),
}
PROVIDERS = packages_distributions()


def requirements(*extras: str) -> dict[str, Requirement]:
    """Canonical name -> requirement of the base distribution and of some extras."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def pins() -> dict[str, str]:
    """Canonical name -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def distributions_of(module: str) -> set[str]:
    """The installed distributions that provide a module.

    An empty set for the standard library and for our own modules.
    """
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top in OURS:
        return set()
    assert top in PROVIDERS, f"{module} is imported but no installed distribution provides it"
    return {canonicalize_name(name) for name in PROVIDERS[top]}


def test_wheel_holds_every_file_of_every_package(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in FOLDERS
        for path in (ROOT / name).rglob("*.*")
        if "__pycache__" not in path.parts
    }
    expected = {f"tritower/{name.removeprefix('tritower/')}" for name in expected}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_wheel_names_licence_python_and_commands(wheel):
    files = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in files.namelist() if ".dist-info/" in name}
    metadata = message_from_bytes(files.read(f"{info}/METADATA"))
    assert metadata["Name"] == "tritower"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"hf", "dev", "bench"} <= set(metadata.get_all("Provides-Extra"))
    assert b"Apache License" in files.read(f"{info}/licenses/LICENSE")
    commands = files.read(f"{info}/entry_points.txt").decode()
    assert {line.split(" = ")[0] for line in commands.splitlines()[1:] if line} == set(
        PROJECT["scripts"]
    )


def test_wheel_brings_one_name_to_site_packages(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"tritower"}


@pytest.mark.parametrize("program", PROJECT["scripts"])
def test_installed_programs_explain_themselves(
    installed: Path, tmp_path: Path, program: str
) -> None:
    command = [installed / program, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_installed_package_lies_in_its_environment(installed: Path, tmp_path: Path) -> None:
    code = "import tritower, tritower.configs as c; print(tritower.__file__, c.__file__)"
    command = [installed / "python", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert all(Path(path).is_relative_to(installed.parent) for path in done.stdout.split())


def test_public_names_are_imported_when_they_are_used(installed: Path, tmp_path: Path) -> None:
    code = """
import sys, tritower
assert not {"torch", "faiss", "numpy", "lightning"} & set(sys.modules)
assert tritower.__version__ == sys.argv[1], tritower.__version__
assert set(tritower.__all__) <= set(dir(tritower))
tritower.ProductIndex, tritower.Item, tritower.prepare, tritower.build_index, tritower.evaluate
assert "torch" not in sys.modules
for name in tritower.__all__:
    getattr(tritower, name)
"""
    command = [installed / "python", "-c", code, PROJECT["version"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ProductIndexx'"):
        tritower.ProductIndexx  # noqa: B018


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_console_script_names_a_function_that_exists(target):
    module, function = target.split(":")
    (path,) = (p for p in shipped_files() if module_name(p) == module)
    body = tree(path).body
    assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_shipped_code_imports_only_declared_distributions():
    base, optional = requirements(), requirements("hf")
    for path in shipped_files():
        for module, line, lazy in imports(path):
            allowed = (
                optional if lazy else base
            )  # an extra may be absent, so importing the file must not need it
            found = distributions_of(module)
            assert not found or found & allowed.keys(), (
                f"{path}:{line}: {module} comes from {found}, not declared"
            )


@pytest.mark.parametrize(
    ("folder", "extras"), [("tests", ("hf", "dev")), ("benchmarks", ("hf", "bench"))]
)
def test_tests_and_benchmarks_import_only_what_their_extras_declare(folder, extras):
    allowed = requirements(*extras)
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module, line, _ in imports(path):
            found = distributions_of(module)
            assert not found or found & allowed.keys(), (
                f"{path}:{line}: {module} comes from {found}, not declared"
            )


def test_every_dependency_is_imported_somewhere():
    used = {
        name
        for path in shipped_files()
        for i in imports(path)
        for name in distributions_of(i.module)
    }
    other_platform = {
        name for name, r in requirements().items() if r.marker and not r.marker.evaluate()
    }
    assert requirements("hf").keys() - used - other_platform == NEVER_IMPORTED


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_lightning_releases_are_excluded(version):
    assert not requirements()["lightning"].specifier.contains(version)
    assert requirements()["lightning"].specifier.contains("2.6.6")


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("linux", "x86_64", "faiss-gpu"),
        ("linux", "aarch64", "faiss-cpu"),
        ("darwin", "arm64", "faiss-cpu"),
    ],
)
def test_one_faiss_on_each_platform(system, machine, name):
    environment = {"sys_platform": system, "platform_machine": machine}
    faiss = [r for n, r in requirements().items() if n.startswith("faiss")]
    assert [r.name for r in faiss if r.marker.evaluate(environment)] == [name]


def test_every_lower_bound_says_why():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    bare = []
    for before, line in itertools.pairwise(lines):
        if (
            re.match(r'\s*"[\w\[\]-]+[<>=!~]', line)
            and "#" not in line
            and not before.strip().startswith("#")
        ):
            bare.append(line.strip())
    assert bare == []


def test_every_requirement_has_a_lower_bound_that_the_pin_satisfies():
    for name, requirement in requirements(*EXTRAS).items():
        assert any(s.operator == ">=" for s in requirement.specifier), requirement
        assert requirement.specifier.contains(pins()[name]), (
            f"{requirement} against {name}=={pins()[name]}"
        )


def test_constraints_pin_everything_that_gets_installed():
    seen: set[str] = set()
    todo = [
        r for r in requirements("hf", "dev").values() if r.marker is None or r.marker.evaluate()
    ]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        assert name in pins(), f"constraints.txt pins no {name}"
        for text in distribution(name).requires or ():
            child = Requirement(text)
            if child.marker is None or any(
                child.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)
            ):
                todo.append(child)


def test_this_python_is_one_that_the_distribution_accepts():
    assert SpecifierSet(PROJECT["requires-python"]).contains(
        ".".join(map(str, sys.version_info[:3]))
    )


MODEL_LIBRARIES = ("torch", "timm", "open_clip", "lightning", "wandb", "transformers")


def test_importing_the_dependencies_opens_no_connection():
    modules = "faiss PIL.Image yaml jinja2 rich matplotlib bm25s scipy safetensors jsonargparse"
    code = """
import sys
events = []
def record(event, details):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
        events.append(f"{event} {details}")
sys.addaudithook(record)
for name in sys.argv[1:]:
    __import__(name)
print(*events, sep="\\n", end="")
"""
    command = [sys.executable, "-c", code, *modules.split(), *MODEL_LIBRARIES]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
        == ""
    )
