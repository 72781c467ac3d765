"""Tables as they are printed; verdicts; and what the READMEs of data/ and evaluation/ name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data.benchmarks import BENCHMARKS
from data.program import print_columns
from data.records import Sample
from evaluation.score import Trouble, print_table, score_predictions, verdict_on

ROOT = Path(__file__).resolve().parent.parent
RECORDS = BENCHMARKS["jsonl"]


def test_columns_are_flush_and_a_remark_stands_behind_them(capsys):
    """Fails if a cell is cut, a column moves, or spaces hang at the end of a line."""
    rows = [["first", "1", "0.5", "  remark"], ["a line of its own, wider than the column"], ["second", "", "1"]]
    rows.append(["x", ""])
    print_columns(["name", "n", "share"], rows, widths=[8, 4, 7, 0])
    assert capsys.readouterr().out.split("\n") == [
        "name       n  share",
        "first      1    0.5  remark",
        "a line of its own, wider than the column",
        "second            1",
        "x",
        "",
    ]


def test_a_remark_of_the_benchmark_stands_below_its_row(capsys):
    """Fails if a block's remark or line of counts is lost, or stands below another row."""
    samples = [Sample(str(i), f"v{i}", "q", "a", category=kind) for i, kind in enumerate(["one", "two"])]
    talkative = replace(RECORDS, remark=lambda row: "  · it is all right" if row["accuracy"] == 1 else "")
    summary, _ = score_predictions(talkative, samples, {"0": "a", "1": ""})
    print_table(talkative, summary)
    lines = capsys.readouterr().out.split("\n")
    assert [line[:5] for line in lines[:3]] == ["", "type ", "one  "] and lines[3] == "  · it is all right"
    assert lines[4].startswith("two") and lines[6] == "counted as wrong: 1 empty"


@pytest.mark.parametrize(
    "changes, reply, right, read, trouble",
    [
        ({}, "a", True, "a", Trouble.NONE),
        ({}, "  ", False, "  ", Trouble.EMPTY),
        ({"also_right": ("b",)}, "b", True, "b", Trouble.NONE),
        ({"options": ["x", "a"], "gold": 1}, 1, True, 1, Trouble.NONE),
        ({"options": ["x", "a"], "gold": 1}, True, False, None, Trouble.UNPARSED),
        ({"options": ["x", "a"], "gold": 1}, "neither", False, None, Trouble.UNPARSED),
        ({"options": ["x", "a"], "option_truths": (True, False)}, [True, "wrong"], True, [True, False], Trouble.NONE),
        ({"options": ["x", "a"], "option_truths": (True, False)}, [True], False, [True, None], Trouble.UNPARSED),
        ({"options": ["x", "a"], "option_truths": (False, False)}, [], False, [None, None], Trouble.EMPTY),
    ],
)
def test_verdicts(changes, reply, right, read, trouble):
    """Fails if silence is right, a bool counts as an index, or trouble is not told apart."""
    sample = Sample("1", "v", "q", "a", **changes)
    assert verdict_on(sample, reply, RECORDS.same) == (right, read, trouble)


def test_result_files_have_trouble_as_a_word():
    """Fails if a result file cannot be written or holds anything but the word for what is wrong."""
    _, items = score_predictions(RECORDS, [Sample("1", "v", "q", "a"), Sample("2", "v", "q", "a")], {"1": ""})
    assert [item["trouble"] for item in json.loads(json.dumps(items))] == ["empty", "missing"]


@pytest.mark.parametrize("room", ["data", "evaluation"])
def test_the_rooms_readme_leads_somewhere(room):
    """Fails if a file that its README names is moved, or one of its files has no line there."""
    text = (ROOT / room / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and all((ROOT / room / link).exists() for link in links)
    files = {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py"}
    assert files <= set(links)


def test_the_readme_of_evaluation_names_every_benchmark():
    """Fails if a block is added without a word of it."""
    text = (ROOT / "evaluation" / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in text for name in BENCHMARKS)
