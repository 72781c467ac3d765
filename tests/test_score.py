"""Tables as they are printed; verdicts; and what the READMEs of data/ and evaluation/ name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data.benchmarks import BENCHMARKS
from data.program import print_columns
from data.records import Sample
from evaluation.score import (
    Trouble,
    baselines,
    compare,
    interval,
    print_comparison,
    print_table,
    score_predictions,
    verdict_on,
)

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


# --------------------------------------------------------------------------- numbers and tables, to the letter

TABLE = """
type           accuracy   95 % interval     blind     black    chance  majority      n
each             0.0000   0.000 – 0.000               0.500     0.250     1.000      1   per option 0.500 of 2
how              0.5000   0.500 – 0.500     0.000               0.417     0.500      2
why              0.2500   0.000 – 0.333     0.750     0.500     0.333     0.500      4
all together     0.2857   0.000 – 0.429     0.500     0.500     0.345     0.571      7
"""
COUNTS = """counted as wrong: 2 missing, 1 empty, 1 unparsed
not asked (--limit): 2; replies to no question: 1
"""
COMPARISON = """type               first  second  difference     95 % interval         p      n
how                1.000   0.500      -0.500   -0.500 – -0.500         1      2
why                0.500   1.000      +0.500   +0.000 – +0.667       0.5      4
all together       0.667   0.833      +0.167   -0.500 – +0.667         1      6
"""

FILMS = ["a", "a", "b", "c", "c", "c"]


def questions():
    """Six choices of two kinds about three films."""
    samples = []
    for i, film in enumerate(FILMS):
        kind = "how" if i < 2 else "why"
        options = ["x", "y", "z", "x y"][: 2 + i % 3]
        samples.append(Sample(str(i), film, "q", options[i % 2], options, gold=i % 2, category=kind))
    return samples


def test_an_interval_resamples_groups():
    """Fails if questions are resampled in place of films, with other percentiles, rounds, digits or another seed."""
    right = [1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1]
    assert interval(right, "aabbccddeeff") == [0.333, 0.917]
    assert interval(right, range(12)) == [0.417, 0.917]
    assert interval([0.5, 0.5], "ab") == [0.5, 0.5]


def test_baselines_by_hand():
    """Fails if the majority is not that of its kind, or chance not one of the options, or one truth of each."""
    samples = questions()
    samples.append(Sample("6", "d", "q", "", ["x", "y"], option_truths=(True, False), category="each"))
    samples.append(Sample("7", "d", "q", "a word", category="open"))
    chance, majority = baselines(samples).values()
    assert chance == [1 / 2, 1 / 3, 1 / 4, 1 / 2, 1 / 3, 1 / 4, 0.25, None]
    assert majority[:6] == [True, False, True, False, True, False]


def test_the_table_to_the_letter(capsys):
    """Fails if a column, a remark, a count or a blank moves, is lost, or has another number."""
    each = Sample("6", "d", "q", "", ["x", "y"], option_truths=(True, False), category="each")
    replies = {"0": 0, "1": "the answer is z", "2": "", "3": 1, "6": ["correct", "correct"], "elsewhere": 1}
    columns = {"blind": [0, 0, 1, 1, 1, 0, None], "black": [None] * 2 + [0.5] * 5}
    summary, _ = score_predictions(RECORDS, [*questions(), each], replies, columns)
    print_table(RECORDS, summary | {"skipped": 2})
    assert capsys.readouterr().out == TABLE + COUNTS
    print_table(RECORDS, summary)
    assert capsys.readouterr().out == TABLE + COUNTS.replace("--limit): 2", "--limit): 0")
    print_table(RECORDS, summary | {"unasked": 0, "missing": 0, "empty": 0, "unparsed": 0})
    assert capsys.readouterr().out == TABLE


def test_the_comparison_to_the_letter(tmp_path, capsys):
    """Fails if a column moves or is lost, or a share, an interval or a p-value is another."""
    for name, replies in (("one", [0, 1, 0, 1, 1, 0]), ("two", [0, 0, 0, 1, 0, 1])):
        said = {str(i): reply for i, reply in enumerate(replies)}
        _, items = score_predictions(RECORDS, questions(), said)
        (tmp_path / name).write_text(json.dumps({"items": items}))
    print_comparison(compare(tmp_path / "one", tmp_path / "two"))
    assert capsys.readouterr().out == COMPARISON


def test_an_item_names_other_right_answers_where_there_are_any():
    """Fails if a result file loses them, or has an empty list of them everywhere."""
    samples = [Sample("1", "v", "q", "a", also_right=("b",)), Sample("2", "v", "q", "a")]
    _, items = score_predictions(RECORDS, samples, {"1": "b", "2": "b"})
    assert items[0]["also_right"] == ["b"] and "also_right" not in items[1]


def test_words_beyond_the_options_are_not_read():
    """Fails if more words than options, or none of their kind, break the verdict."""
    sample = Sample("1", "v", "q", "", ["x", "y"], option_truths=(True, False))
    assert verdict_on(sample, ["correct", "wrong", "wrong"], RECORDS.same).read == [True, False]
