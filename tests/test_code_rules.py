"""Rules on the shipped source that no run of it would show.

No code from data, and who may import whom.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.source_code import ROOT, imports, module_name, shipped_files, tree

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


# --- Size, shapes and words.

ARRAY_TYPES = re.compile(r"\b(NDArray|ndarray|ArrayLike|Tensor|Vectors|Rows|Mask|Codes|LossRows)\b")
SHAPE = re.compile(r"\((?:[A-Z0-9]\b|P x|Q x|[mn],|size,|count,|num_rows,|\.\.\.|\))")
"""`(B, D)`, `(3, H, W)`, `(n,)`, `(...)`, and `()` for a scalar."""

REJECTED_WORDS = frozenset(
    "asked crowd facet facets fine finer gallery gauge gone hot_bytes mate mates of_logits "
    "one_each one_per over_batches own_side pieces questions said similarities stand_in twins "
    "verdict ways without_groups".split()
)
"""Names that the glossary replaces; see docs/architecture.md."""


def signature(node: ast.FunctionDef) -> str:
    """The annotations of a function, as text."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotations = [argument.annotation for argument in arguments] + [node.returns]
    return " ".join(ast.unparse(one) for one in annotations if one is not None)


def public_functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its public classes; none inside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child)
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield child


def without_shapes(module: ast.Module) -> list[str]:
    """Public functions on arrays whose docstring shows no shape."""
    return [
        f"line {node.lineno}: {node.name}"
        for node in public_functions(module)
        if ARRAY_TYPES.search(signature(node)) and not SHAPE.search(ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("path", FILES)
def test_public_functions_on_arrays_show_shapes(path):
    assert not without_shapes(tree(path))


def test_rule_sees_missing_shapes():
    shown = 'def f(x: Tensor) -> int:\n    """(B, D) rows."""'
    missing = 'class A:\n    def f(self, x: NDArray[np.int64]) -> int:\n        """All rows."""'
    assert without_shapes(ast.parse(shown)) == []
    assert without_shapes(ast.parse(missing)) == ["line 2: f"]


def rejected_names(module: ast.Module) -> list[str]:
    """Names of functions, classes, arguments and variables that the glossary replaces."""
    found = []
    for node in ast.walk(module):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                pass
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case _:
                continue
        if name.lstrip("_") in REJECTED_WORDS:
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", FILES)
def test_names_are_those_of_the_glossary(path):
    assert not rejected_names(tree(path))


def test_rule_sees_rejected_names():
    assert rejected_names(ast.parse("def f(gauge):\n    return self._twins + fine_tuned")) == [
        "line 1: gauge",
        "line 2: _twins",
    ]


@pytest.mark.parametrize("path", FILES)
def test_classes_and_functions_are_short(path):
    long = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= 200:
            long.append(f"class {node.name}")
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and node.end_lineno - body[0].lineno >= 60:
                long.append(f"function {node.name}")
    assert not long, "at most 200 lines a class, 60 a function's body"


def test_test_files_import_no_test_file():
    wrong = [
        f"{path.name} imports {module}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for module in modules_imported(path)
        if module.split(".")[0] == "tests" and module.split(".")[-1].startswith("test_")
    ]
    assert not wrong


def modules_imported(path: Path) -> list[str]:
    """Modules of the import statements of a file, wherever they stand."""
    modules = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules
