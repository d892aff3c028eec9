"""Counts the structure of `jobs/` from its imports: rooms, levels, arrows, module sizes. `make lint` fails on what the limits forbid.

    python tools/structure.py           print the figures
    python tools/structure.py --check   also exit with 1 where a limit is broken

A room is a file or a package at the top of `jobs/`; an arrow says that one room imports another, whether at the top of a module or inside a
function. Which rooms may import which is the layers contract of import-linter in pyproject.toml; here are circles, counts and sizes.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_ROOMS = 20
MOST_LINES = 450
LEAST_LINES = 30
SHORT_FOR_A_REASON = frozenset({"jobs/errors.py"})  # one idea that needs no more lines


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module


def circles(arrows: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components with more than one node)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for node in sorted(arrows):
        if node not in order:
            visit(node)
    return found


def levels(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Longest way down from each node of a graph without circles; 0: imports nothing of the package."""
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            found[node] = 1 + max((level(target) for target in arrows.get(node, ())), default=-1)
        return found[node]

    for node in arrows:
        level(node)
    return found


def main() -> int:
    """Print the figures; 1 with `--check` where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    known = modules(ROOT / "jobs")
    between_modules: dict[str, set[str]] = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    rooms = {name: name.split(".")[1] for name in known if "." in name}
    between_rooms: dict[str, set[str]] = {room: set() for room in rooms.values()}
    for name, targets in between_modules.items():
        for target in targets:
            if name in rooms and target in rooms and rooms[name] != rooms[target]:
                between_rooms[rooms[name]].add(rooms[target])
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in known.values()}
    code = {name: count for name, count in lines.items() if not name.endswith("__init__.py")}
    room_circles, module_circles = circles(between_rooms), circles(between_modules)
    problems = [f"circle of rooms: {' '.join(group)}" for group in room_circles]
    problems += [f"circle of modules: {' '.join(group)}" for group in module_circles]
    problems += [f"{name}: {count} lines, more than {MOST_LINES}" for name, count in code.items() if count > MOST_LINES]
    problems += [
        f"{name}: {count} lines, fewer than {LEAST_LINES}"
        for name, count in code.items()
        if count < LEAST_LINES and name not in SHORT_FOR_A_REASON
    ]
    if len(between_rooms) > MOST_ROOMS:
        problems.append(f"{len(between_rooms)} rooms at the top of jobs/, more than {MOST_ROOMS}")
    print(f"rooms {len(between_rooms)}, arrows between rooms {sum(map(len, between_rooms.values()))}")
    if not room_circles:
        ranked = levels(between_rooms)
        print(f"levels of rooms {1 + max(ranked.values())}")
        for number in sorted(set(ranked.values()), reverse=True):
            print(f"  {number}: {' '.join(sorted(room for room, level in ranked.items() if level == number))}")
    print(f"modules {len(code)}, lines {sum(lines.values())}, longest {max(code.values())}, shortest {min(code.values())}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems and check else 0


if __name__ == "__main__":
    sys.exit(main())
