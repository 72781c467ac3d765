"""The rooms and their doors: who imports whom, read from the sources themselves (imports inside functions, too)."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # who may be imported in which room
    "vidreason": set(),
    "plan": {"vidreason"},
    "infer": {"vidreason"},
    "data": {"vidreason", "data"},
    "evaluation": {"vidreason", "data", "evaluation"},
    "toy": {"vidreason", "data", "evaluation", "toy"},
    "evaluate": {"vidreason", "data", "evaluation", "toy"},
    "train": {"vidreason", "plan", "data", "toy"},
}
FILES = {  # rooms within rooms
    "toy.world": set(),
    "toy.draw": {"toy.world"},
    "toy.language": {"toy.world", "vidreason"},
    "data.program": {"vidreason"},
    "data.records": {"vidreason", "data.program"},
}


def sources():
    """-> {module: path} of every file of the house, without tests and notebooks."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("evaluation/*.py"), *ROOT.glob("toy/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports_of(text):
    """-> every module that a source imports anywhere, and of `from a import b` also a.b, which may be one."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who is meant"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


@cache
def arrows():
    """-> {module: modules of the house that it imports}"""
    known = sources()
    return {module: imports_of(path.read_text()) & known.keys() for module, path in known.items()}


def room_of(module):
    return module.split(".")[0]


def test_imports_are_found():
    """Fails if imports inside functions, or of a module from its package, are overlooked."""
    text = "import json\ndef f():\n    from toy import world\n    import data.records as r\n"
    assert {"json", "toy", "toy.world", "data.records"} == imports_of(text)


@pytest.mark.parametrize("module", sorted(sources()))
def test_a_room_is_entered_by_its_doors_only(module):
    """Fails if a file imports from a room that the drawing in DESIGN does not let it enter."""
    entered = {room_of(other) for other in arrows()[module]}
    assert entered <= ROOMS[room_of(module)]
    if module in FILES:
        others = {other for other in arrows()[module] if other != room_of(module)}
        assert others <= FILES[module]


def test_there_is_no_circle():
    """Fails if two files import each other, be it by way of others."""
    remaining = arrows()
    while remaining:
        free = {module for module, others in remaining.items() if not others & remaining.keys() - {module}}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {module: others for module, others in remaining.items() if module not in free}


def test_processes_meet_in_train_alone():
    """Fails if another file than train.py knows of ranks: the model is written as if there were one."""
    for module, path in sources().items():
        parallel = {name for name in imports_of(path.read_text()) if name.startswith("torch.distributed")}
        assert module == "train" or not parallel, (module, parallel)
