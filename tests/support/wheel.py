"""The wheel of this checkout, and an environment that has nothing of the project but the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.support.source_code import FOLDERS, ROOT


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy, so that no build leftovers take part."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, source], check=True, timeout=120)
    (path,) = folder.glob("tritower-*.whl")
    return path


def install_wheel(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment; returns the folder of its programs.

    Its dependencies are those of this environment: the path of their folder is added, which brings
    no editable install with it (`.pth` files there are not read).
    """
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    (packages,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q"]
    subprocess.run([*command, "--no-deps", "--no-index", wheel], check=True, timeout=120)
    outer = sysconfig.get_paths()["purelib"]
    (packages / "dependencies.pth").write_text(f"{outer}\n", encoding="utf-8")
    return programs
