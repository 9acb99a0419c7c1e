"""Rules on the shipped source that no run of it would show.

No code from data, and who may import whom.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.source_code import ROOT, imports, module_name, shipped_files

UNSAFE_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "importlib.import_module",
}
UNSAFE_ENDINGS = (".read_pickle", ".to_pickle", ".unsafe_load", ".full_load")
MUST_BE_FALSE = {"shell", "allow_pickle", "trust_remote_code"}
MUST_BE_WEIGHTS_ONLY = ("torch.load", ".load_from_checkpoint")
SAFE_LOADERS = ("SafeLoader", "CSafeLoader")

FILES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in shipped_files()]


def unsafe(tree: ast.AST) -> list[str]:
    """What could run code that arrived as data: one `line N: what` for each place."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                bad = [alias.name for alias in names if alias.name.split(".")[0] in UNSAFE_MODULES]
            case ast.ImportFrom(module=str(module)):
                bad = [module] if module.split(".")[0] in UNSAFE_MODULES else []
            case ast.Call():
                bad = _unsafe_call(node)
            case _:
                bad = []
        found += [f"line {node.lineno}: {what}" for what in bad]
    return found


def _unsafe_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    bad = [
        f"{key} is not False"
        for key in MUST_BE_FALSE & keywords.keys()
        if not _is(keywords[key], False)
    ]
    if name in UNSAFE_CALLS or name.endswith(UNSAFE_ENDINGS):
        bad.append(name)
    if name == "yaml.load" or name == "yaml.load_all":
        loader = keywords.get("Loader", call.args[1] if len(call.args) > 1 else None)
        if loader is None or not ast.unparse(loader).endswith(SAFE_LOADERS):
            bad.append(f"{name} without a safe loader")
    if name.endswith(MUST_BE_WEIGHTS_ONLY) and not _is(keywords.get("weights_only"), True):
        bad.append(f"{name} without weights_only=True")
    if name.split(".")[-1] == "Environment" and not {"autoescape", None} & keywords.keys():
        bad.append("a template environment without autoescape")
    return bad


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", FILES)
def test_no_code_runs_from_data(path):
    assert unsafe(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "os.system(command)",
        "importlib.import_module(name)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "TwoTower.load_from_checkpoint(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "jinja2.Environment()",
    ],
)
def test_rule_sees_unsafe_code(code):
    assert len(unsafe(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "re.compile('a')",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.CSafeLoader)",
        "torch.load(path, weights_only=True)",
        "jinja2.Environment(autoescape=True)",
    ],
)
def test_rule_lets_safe_code_pass(code):
    assert unsafe(ast.parse(code)) == []


# A package or module, and what it must not import, lazily or not.
MODELS = ("torch", "torchvision", "lightning", "open_clip", "timm", "transformers")
SEARCH_ONLY = tuple(
    f"tritower.retrieval.{room}" for room in ("building", "updating", "evaluating", "showing")
)
FORBIDDEN = {
    "tritower.terminal": (*MODELS, "faiss", "tritower.artefacts"),
    "tritower.artefacts": (*MODELS, "faiss", "tritower.datamodules"),
    "tritower.datamodules": (
        "faiss",
        "open_clip",
        "timm",
        "transformers",
        "tritower.retrieval.ivf",
    ),
    "tritower.datamodules.prepare": ("torch", "lightning"),
    "tritower.datamodules.images": ("torch", "lightning"),
    "tritower.datamodules.samples": ("torch", "lightning"),
    "tritower.retrieval": (*MODELS, "tritower.towers", "tritower.datamodules"),
    "tritower.retrieval.index": SEARCH_ONLY,
    "tritower.retrieval.bulk": SEARCH_ONLY,
    "tritower.retrieval.more_like_this": SEARCH_ONLY,
    "tritower.retrieval.ranking": SEARCH_ONLY,
    "tritower.retrieval.vectors": SEARCH_ONLY,
    "tritower.retrieval.products": SEARCH_ONLY,
    "tritower.retrieval.ivf": SEARCH_ONLY,
    "tritower.retrieval.filtering": SEARCH_ONLY,
    "tritower.towers": ("faiss",),
}
FORBIDDEN["tritower.terminal"] += ("tritower.datamodules", "tritower.towers", "tritower.retrieval")
FORBIDDEN["tritower.artefacts"] += ("tritower.towers", "tritower.retrieval")
FORBIDDEN["tritower.datamodules"] += ("tritower.towers",)


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of the packages or lies in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES)
def test_imports_point_the_right_way(path):
    name = module_name(path)
    forbidden = {
        bad for package, bads in FORBIDDEN.items() if within(name, (package,)) for bad in bads
    }
    if not name.startswith("tritower.commands"):
        forbidden.add("tritower.commands")
    wrong = [i for i in imports(path) if within(i.module, tuple(forbidden))]
    assert not wrong, "\n".join(f"{path.name}:{i.line} imports {i.module}" for i in wrong)


def test_modules_import_each_other_without_cycles():
    ours = {module_name(path): path for path in shipped_files()}
    graph = {
        name: {i.module for i in imports(path)} & ours.keys() - {name}
        for name, path in ours.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def folder_of(module: str, modules: set[str]) -> str:
    """`tritower.retrieval.ivf.engine` -> `tritower.retrieval.ivf`; a package is its own folder."""
    return module if module in modules else module.rpartition(".")[0]


def test_folders_import_each_other_without_cycles():
    ours = {module_name(path): path for path in shipped_files()}
    packages = {name for name, path in ours.items() if path.name == "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, path in ours.items():
        folder = folder_of(name, packages)
        targets = {folder_of(i.module, packages) for i in imports(path) if i.module in ours}
        graph.setdefault(folder, set()).update(targets - {folder})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_training_needs_no_faiss():
    ours = {module_name(path): path for path in shipped_files()}
    reached, todo = set(), ["tritower.towers.cli"]
    while todo:
        name = todo.pop()
        if name in ours and name not in reached:
            todo += [i.module for i in imports(ours[name]) if not i.lazy]
        reached.add(name)
    assert "tritower.towers.two_tower" in reached
    assert "faiss" not in reached


def test_searching_and_preparing_start_without_torch():
    light = [module_name(path) for path in (ROOT / "retrieval").rglob("*.py")]
    light += [name for name in FORBIDDEN if name.startswith("tritower.datamodules.")]
    code = (
        f"import sys, tritower.commands.index, {', '.join(light)}\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.name) for p in sorted((ROOT / "configs").rglob("*.yaml"))]
)
def test_config_starts_with_the_command_that_runs_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    command = f"{path.relative_to(ROOT)}"
    assert any(line.startswith("python ") and command in line for line in comment), "\n".join(
        comment
    )
