"""Do the tests bite? Change one thing in a file, run the tests that guard it, and see whether one fails.

    python tests/mutate.py                                # 60 changes per file, drawn by --seed
    python tests/mutate.py vidreason.py --count 300 --processes 2
    python tests/mutate.py evaluation/choice.py --all

A change ("mutant") is a comparison, an operator, a number or a condition turned into another one, an argument, a bound
of a slice or a statement left out. A mutant is killed if a test fails, or runs ten times as long as all tests did; what
survives is printed with its line; some survivors mean the same as the original. The score is killed / all, with its
95 % interval (Wilson).

Every mutant is tested in a copy of the repository, by a child of a process that has imported the libraries once.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
GUARDS = {  # what is mutated, and the tests that should notice, the fastest first
    "vidreason.py": [
        "tests/test_model.py", "tests/test_families.py", "tests/test_video.py", "tests/test_upstream.py",
        "tests/test_shipped.py::test_readme_answers",
    ],
    "data/batches.py": [
        "tests/test_batches.py", "tests/test_train.py", "-k",
        "test_batches or order_of_samples or every_video_comes or weights_say",
    ],
    "evaluation/score.py": [
        "tests/test_score.py", "tests/test_benchmarks.py", "tests/test_readers.py", "tests/test_judging.py",
        "-k", "not command_line and not human and not extractor and not judge",
    ],
    "evaluation/choice.py": ["tests/test_judging.py", "-k", "extractor or a_choice or plain_ways or of_one_s_own"],
}  # fmt: skip
OTHER_COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OTHER_OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*", ast.Mod: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*",
}  # fmt: skip
OTHER_METHODS = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """The source between two places (line, byte of the line), and what stands there instead."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str
    original: str

    def __str__(self):
        original = " ".join(self.original.split())
        return f"line {self.start[0]}: {original[:70]}  ->  {self.text[:70] or 'nothing'}"


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the file. Texts, annotations and messages of errors are left alone."""
    found = []
    for node in nodes_that_count(ast.parse(source)):
        for place, text in replacements(node):
            original = ast.get_source_segment(source, place)
            if original is not None:
                start = (place.lineno, place.col_offset)
                end = (place.end_lineno, place.end_col_offset)
                found.append(Mutant(start, end, text, original))
    return sorted(set(found), key=lambda mutant: (mutant.start, mutant.end, mutant.text))


def nodes_that_count(node):
    """A tree without what no behaviour follows from."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or isinstance(node, ast.Raise | ast.Assert):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes_that_count(child)


def replacements(node):
    """-> pairs of (node of the tree, source that takes its place)"""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield node, f"({left} {OTHER_COMPARISONS[type(node.ops[0])]} {right})"
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER_OPERATORS:
        left, right = ast.unparse(node.left), ast.unparse(node.right)
        yield node, f"(({left}) {OTHER_OPERATORS[type(node.op)]} ({right}))"
    if isinstance(node, ast.BoolOp):
        operator = " or " if isinstance(node.op, ast.And) else " and "
        yield node, "(" + operator.join(f"({ast.unparse(value)})" for value in node.values) + ")"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node, f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, repr(node.value + 1)
    if isinstance(node, ast.Attribute) and node.attr in OTHER_METHODS:
        yield node, f"{ast.unparse(node.value)}.{OTHER_METHODS[node.attr]}"
    if isinstance(node, ast.Slice):
        for bound in (node.lower, node.upper):
            if bound is not None:
                yield bound, ""
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg is not None:
                others = [other for other in node.keywords if other is not keyword]
                yield node, ast.unparse(ast.Call(node.func, node.args, others))
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.AugAssign | ast.Delete):
        yield node, "pass"


def mutate(source: str, mutant: Mutant) -> str:
    """The source with the mutant in it; lines keep their numbers up to it."""
    lines = source.encode().splitlines(keepends=True)
    (first, start), (last, end) = mutant.start, mutant.end
    before = b"".join(lines[: first - 1]) + lines[first - 1][:start]
    after = lines[last - 1][end:] + b"".join(lines[last:])
    return (before + mutant.text.encode() + after).decode()


# ------------------------------------------------------------------------------------------------- running the tests

CHILD = """
import os, sys
sys.path[:0] = ["tests", "."]
import pytest
import av, numpy, torch, transformers, peft, segment_anything, torchvision, sacrebleu
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *line.split("\\t")[:-1]]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Workshop:
    """A copy of the repository and a process in it that runs tests on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", "*.ipynb")
        shutil.copytree(ROOT, folder, ignore=ignored)
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=folder, env={**os.environ, **quiet}, stdin=pipe, stdout=pipe, text=True
        )

    def test(self, guards: list[str], patience: float) -> bool:
        """Whether every test passes, within `patience` seconds."""
        self.server.stdin.write("\t".join([*guards, "\n"]))
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        alarm = Alarm(child, patience)
        code = int(self.server.stdout.readline())
        alarm.stop()
        return code == 0

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class Alarm:
    """Ends a process group after some seconds."""

    def __init__(self, group, seconds):
        from threading import Timer

        self.timer = Timer(seconds, self.ring, [group])
        self.timer.daemon = True
        self.timer.start()

    def ring(self, group):
        os.killpg(group, signal.SIGKILL)

    def stop(self):
        self.timer.cancel()


def survivors_of(name: str, mutants: list[Mutant], processes: int, folder: Path) -> list[Mutant]:
    """Those that no test notices. The tests must pass on the file as it is."""
    source = (ROOT / name).read_text()
    guards = GUARDS[name]
    workshops = Queue()
    for number in range(processes):
        workshops.put(Workshop(folder / f"{Path(name).stem}{number}"))
    first = workshops.get()
    began = time.monotonic()
    if not first.test(guards, patience=3600):
        raise SystemExit(f"error: tests fail without any mutant ({name}: {' '.join(guards)}): mend that first")
    patience = 60 + 10 * (time.monotonic() - began)
    workshops.put(first)

    def survives(mutant):
        workshop = workshops.get()
        path = workshop.folder / name
        path.write_text(mutate(source, mutant))
        try:
            return workshop.test(guards, patience)
        finally:
            path.write_text(source)
            workshops.put(workshop)

    with ThreadPoolExecutor(processes) as pool:
        verdicts = list(tqdm(pool.map(survives, mutants), total=len(mutants), desc=name))
    for _ in range(processes):
        workshops.get().close()
    return [mutant for mutant, survived in zip(mutants, verdicts, strict=True) if survived]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z = 1.96
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(GUARDS), metavar="FILE", help=", ".join(GUARDS))
    parser.add_argument("--count", type=int, default=60, help="mutants per file (default 60)")
    parser.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--seed", type=int, default=0, help="which of them (default 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="mutants tested side by side")
    args = parser.parse_args()
    for name in args.files:
        if name not in GUARDS:
            parser.error(f"no tests are named for {name}: choose {', '.join(GUARDS)}")

    killed = total = 0
    for name in args.files:
        mutants = mutants_of((ROOT / name).read_text())
        chosen = mutants
        if not args.all and len(mutants) > args.count:
            chosen = random.Random(args.seed).sample(mutants, args.count)
        with tempfile.TemporaryDirectory() as folder:
            survivors = survivors_of(name, chosen, args.processes, Path(folder))
        low, high = wilson(len(chosen) - len(survivors), len(chosen))
        share = 1 - len(survivors) / len(chosen)
        print(f"{name}: {share:.3f} killed ({low:.3f} – {high:.3f}), {len(chosen)} of {len(mutants)} mutants")
        for mutant in survivors:
            print(f"  survives: {mutant}")
        killed += len(chosen) - len(survivors)
        total += len(chosen)
    print(f"mutation score {killed / total:.3f}, {total} mutants")


if __name__ == "__main__":
    main()
