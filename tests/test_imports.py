"""The one way through the rooms (DESIGN.md): imports go from a room to those below it, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssdops
from ssdops.backends import registry

ROOT = Path(ssdops.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = (
    (
        "cli",
        "cli_bench",
        "cli_cache",
        "cli_calibrate",
        "cli_common",
        "cli_demo",
        "cli_doctor",
        "cli_explain",
        "cli_export",
        "cli_tune",
        "plot",
        "plot_example",
        "plot_bench",
    ),
    ("trial", "trial_inputs"),
    ("pytest_plugin",),
    ("nn", "compat", "distributed", "testing"),
    ("api",),
    ("arguments",),
    ("ops",),
    ("adjoint", "vmap", "carry"),
    ("run", "decode"),
    ("plan",),
    ("steps",),
    ("autotune",),
    ("backends",),
    ("register", "symbols"),
    ("masks", "named"),
    ("ir.passes",),
    ("ir",),
    ("plugins",),
    ("errors", "config"),
)
"""From the top down; a room is a module or a package of that name inside ssdops."""
SHARED_BACKEND_MODULES = {"banded", "base", "quadratic", "registry", "rows", "scan", "structured", "transposed"}
"""What backends are made of, rather than backends."""


def module_of(file: Path) -> str:
    """`ssdops/ir/text.py` → `ir.text`, `ssdops/ir/__init__.py` → `ir`, `ssdops/__init__.py` → ``."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def level(module: str) -> int | None:
    """How far down the module's room lies; None if it has none. The longest name that fits is the room."""
    fits = [
        (len(room), at) for at, names in enumerate(ROOMS) for room in names if module == room or module.startswith(f"{room}.")
    ]
    return max(fits)[1] if fits else None


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """The modules inside ssdops that a file imports, wherever in the file, with the line."""
    name = module_of(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "ssdops" or alias.name.startswith("ssdops."):
                    yield alias.name.removeprefix("ssdops").removeprefix("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and not (node.module == "ssdops" or (node.module or "").startswith("ssdops.")):
                continue
            if node.level:
                parts = package.split(".") if package else []
                kept = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            else:
                base = (node.module or "").removeprefix("ssdops").removeprefix(".")
            for alias in node.names:  # `from . import nodes` names a module, `from .nodes import Decay` does not
                inner = f"{base}.{alias.name}" if base else alias.name
                yield (inner if inner in MODULES else base), node.lineno


IMPORTS = [(module_of(file), target, line) for file in FILES for target, line in imports(file)]


def test_imports_are_found():
    """What this file proves rests on these being seen, each spelt in another way."""
    found = {(importer, target) for importer, target, _ in IMPORTS}
    assert {("api", "ops"), ("api", "masks"), ("api", "ir.nodes"), ("ir.text", "ir.nodes"), ("ir.text", "errors"),
            ("ir.passes.driver", "ir.verify"), ("backends.naive", "backends.base"), ("", "api")} <= found  # fmt: skip


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_every_module_lives_in_a_room(module):
    assert level(module) is not None, f"{module} is in no room of DESIGN.md; add it to ROOMS, and there"


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_go_down(module):
    for importer, target, line in IMPORTS:
        if importer == module:
            assert target, f"ssdops/{module.replace('.', '/')}.py:{line} imports the package itself"
            here, there = level(module), level(target)
            assert there is not None and here is not None
            assert here <= there, f"{module} (line {line}) imports {target}, which lies above it"


def test_modules_are_not_in_a_circle():
    edges: dict[str, set[str]] = {}
    for importer, target, _ in _at_the_top():
        edges.setdefault(importer, set()).add(target)

    through: set[str] = set()  # modules from which no path leads into a circle

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' → '.join((*path, module))}"
        if module in through:
            return
        for target in edges.get(module, ()):
            visit(target, (*path, module))
        through.add(module)

    for module in MODULES:
        visit(module, ())


def _at_the_top() -> Iterator[tuple[str, str, int]]:
    """Imports that run when the module is imported; inside a function is where a circle may be cut."""
    for name, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        lines = {line for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for line in range(f.lineno, f.end_lineno + 1)}
        yield from ((name, target, line) for target, line in imports(file) if line not in lines and target != name)


def backend_of(module: str) -> str | None:
    """The backend that a module belongs to: `backends.triton.launch` → `triton`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "backends" and parts[1] not in SHARED_BACKEND_MODULES else None


def test_backends_never_import_one_another():
    for importer, target, line in IMPORTS:
        if importer.split(".")[0] == "backends" and backend_of(target) is not None:
            assert backend_of(importer) == backend_of(target), f"{importer}:{line} imports {target}"


def test_every_backend_is_in_the_registry_and_nothing_else():
    listed = {path.split(":")[0].removeprefix("ssdops.backends.").split(".")[0] for path in registry.BACKENDS.values()}
    assert listed == {backend for module in MODULES if (backend := backend_of(module))}


def test_the_registry_is_a_literal_that_imports_nothing():
    tree = ast.parse(MODULES["backends.registry"].read_text(encoding="utf-8"))
    tables = [node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "BACKENDS"]
    assert len(tables) == 1 and tables[0].value is not None
    assert ast.literal_eval(tables[0].value) == registry.BACKENDS
    assert all(backend_of(target) is None for importer, target, _ in IMPORTS if importer == "backends.registry")


def test_the_package_only_re_exports():
    """Besides the lazy lookup there is nothing to be found in it, and every name that it promises is there."""
    allowed = (ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.If)
    for node in ast.parse(MODULES[""].read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, allowed), ast.unparse(node)
        if isinstance(node, ast.FunctionDef):
            assert node.name in ("__getattr__", "__dir__")
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING" and all(isinstance(x, ast.ImportFrom) for x in node.body)
    assert sorted(ssdops.__all__) == list(ssdops.__all__) == dir(ssdops)
    assert all(hasattr(ssdops, name) for name in ssdops.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ssdops.nonsense


@pytest.mark.parametrize("module", MODULES)
def test_only_config_reads_the_environment(module):
    if module == "config":
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv", "environb"), f"{module}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {a.name for a in node.names} & {"environ", "getenv", "environb"}, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_foreign_is_executed(module):
    """No eval, exec or pickle in the package; nothing compiled from text outside the code generator of a backend."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{module}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & {"pickle", "marshal", "shelve"}, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", [m for m in MODULES if m and (level(m) or 0) >= level("masks")])  # type: ignore[operator]
def test_the_lower_rooms_know_no_compiler(module):
    """ir, masks, errors and config stand on torch alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {name.split(".")[0] for name in names} & {"triton", "tvm", "tvm_ffi", "numpy"}, f"{module}:{node.lineno}"
