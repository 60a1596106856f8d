"""Fail when a module of the package imports against the one-way order.

Data flows one way through the package, so its imports do too. Each module may import from
the layers before its own and from nothing else of the package, whether at the top of the
file, inside a function or under TYPE_CHECKING. A subpackage is one place in the order; its own
modules import each other in one direction, too.

Usage: python tools/check_imports.py [package folder]
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# Modules of one layer do not import each other. Subpackages stand where their parts are to go;
# modules that have not moved into one keep their place beside it.
LAYERS: list[set[str]] = [
    {"_startup"},
    {"exceptions"},
    {"_compat"},
    {"_validation"},
    {"_types", "theta"},
    {"devices", "threads"},
    {"data"},
    {"modules"},
    {"targets"},
    {"update_rules"},
    {"inner"},
    {"meta_gradients"},
    {"native"},
    {"engine"},
    {"storage", "composites"},
    {"heads"},
    {"learners"},
    {"training"},
    {"model_files"},
    {"persistence", "versions"},
    {"estimators"},
    {"few_shot", "datasets"},
    {"evaluation"},
    {"inspection", "comparison", "distributed"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
# Stricter than their place in the order.
ONLY = {"datasets": {"exceptions", "_compat", "_validation"}}
# Task handling stays usable and testable without the deep learning stack, so neither it
# nor what it imports may bring that in.
TORCH_FREE = ("data.tasks", "data.spellings")
TORCH = {"torch", "skorch"}


def unit_of(path: Path, package: Path) -> str:
    """Name the top-level module or subpackage that a file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def module_of(path: Path, package: Path) -> str:
    """Name a module, or a subpackage by its `__init__`, within the package."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path, package: Path) -> list[tuple[int, str]]:
    """List (line, absolute dotted name) of everything a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    here = [package.name, *path.relative_to(package).parent.parts]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def check(package: Path) -> list[str]:
    """Return one message per violation in the package folder."""
    problems = cycles(package)
    paths = [path for path in sorted(package.rglob("*.py")) if path != package / "__init__.py"]
    modules = {module_of(path, package) for path in paths}
    inside: dict[str, set[str]] = {}
    torch_at: dict[str, str] = {}
    for path in paths:
        unit, module = unit_of(path, package), module_of(path, package)
        # with a module its package is imported
        inside[module] = {module.rpartition(".")[0]} & modules
        shown = path.relative_to(package.parent)
        if unit not in RANK:
            problems.append(
                f"{shown}: '{unit}' has no place in the import order. "
                "Add it to LAYERS in tools/check_imports.py."
            )
            continue
        for line, name in imported_names(path, package):
            where = f"{shown}:{line}"
            top, *rest = name.split(".")
            if top in TORCH:
                torch_at.setdefault(module, where)
            if top != package.name:
                continue
            inside[module] |= {".".join(rest[:n]) for n in range(1, len(rest) + 1)} & modules
            target = rest[0] if rest else ""
            if target == unit:
                continue
            if target not in RANK:
                what = f"'{target}', which is no module of the import order" if target else "it"
                problems.append(
                    f"{where}: imports {what}. Import from the module that defines the name, "
                    "and list a new module in LAYERS in tools/check_imports.py."
                )
                continue
            if RANK[target] >= RANK[unit]:
                problems.append(f"{where}: '{unit}' may not import from '{target}': {order()}")
            elif unit in ONLY and target not in ONLY[unit]:
                allowed = ", ".join(sorted(ONLY[unit]))
                problems.append(f"{where}: '{unit}' may import from {allowed} only.")
    for module in TORCH_FREE:
        problems += [
            f"{torch_at[reached]}: imports torch or skorch, but '{module}' has to do without"
            + ("." if reached == module else f" and imports '{reached}'.")
            for reached in sorted(closure(module, inside))
            if reached in torch_at
        ]
    return problems


def cycles(package: Path) -> list[str]:
    """Return one message for each circle of imports inside a subpackage."""
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in sorted((*package.glob("*/**/*.py"), *package.glob("*/**/*.pyi")))
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    imports: dict[str, list[str]] = {}
    for module, path in files.items():
        names = (name for _, name in imported_names(path, package))
        # `from a.b import c`: c is a module, or b is one that defines it
        found = (name if name in files else name.rpartition(".")[0] for name in names)
        unit = module.split(".")[1]
        imports[module] = [n for n in found if n in files and n.split(".")[1] == unit]
    problems = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = [*trail[trail.index(module) :], module]
            problems.append(
                f"{files[circle[-2]].relative_to(package.parent)}: imports in a circle, "
                f"{' -> '.join(circle)}. Move what they share into a module of its own."
            )
        elif module not in done:
            for name in imports[module]:
                visit(name, [*trail, module])
            done.add(module)

    for module in imports:
        visit(module, [])
    return problems


def closure(module: str, inside: dict[str, set[str]]) -> set[str]:
    """Every module that `module` imports, directly or not, and itself."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += inside.get(current, ())
    return seen


def order() -> str:
    """Spell the order out for a message."""
    layers = (sorted(layer) for layer in LAYERS)
    return " -> ".join(
        layer[0] if len(layer) == 1 else "{" + ", ".join(layer) + "}" for layer in layers
    )


def main(arguments: list[str]) -> int:
    """Check the folder named on the command line, by default this repository's package."""
    default = Path(__file__).resolve().parent.parent / "sklearn_maml"
    package = Path(arguments[0]).resolve() if arguments else default
    if not package.is_dir():
        print(f"{package} is not a folder. Pass the folder of the package.", file=sys.stderr)
        return 2
    problems = check(package)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
