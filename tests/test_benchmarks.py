"""What every block of data/benchmarks.py must keep, written once; and the recipe of data/README.md, as it is printed.

A new block needs a line in EXCERPTS (genuine files under fixtures/, or hand-written rows of the documented layout) and,
if it has formats, a line in REPLY_ROWS.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import write_rows

import evaluate
from data.benchmarks import BENCHMARKS, read_predictions, read_samples
from evaluation.score import score_predictions
from vidreason import VidReasonError

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"

VCR_LINE = {
    "annot_id": "val-0",
    "objects": ["person", "car"],
    "img_fn": "film/still.jpg",
    "question": ["Does", [0], "drive", "?"],
    "answer_choices": [["Yes", "."], ["No", "."], ["Never", "."], ["Once", "."]],
    "answer_label": 1,
    "rationale_choices": [["It", "rains", "."], [[1], "stands", "."], ["r2"], ["r3"]],
    "rationale_label": 1,
}
TOT_ROW = {"video_id": "before_0", "sentence": "a box appears before a ball falls"}
RECORD = {"id": "r", "video": "a.mp4", "question": "why?", "answer": ["it fell", "it was hit"], "type": "why"}

EXCERPTS = {  # name -> a genuine file, or (file name, hand-written rows)
    "nextqa": FIXTURES / "nextqa" / "val.csv",
    "nextqa-oe": FIXTURES / "nextqa_oe" / "test.csv",
    "nextgqa": FIXTURES / "nextgqa" / "test.csv",
    "activitynetqa": FIXTURES / "activitynet_qa" / "val_q.json",
    "clevrer": FIXTURES / "clevrer" / "train-orig-small.json",
    "vcr": ("val.jsonl", [VCR_LINE, {**VCR_LINE, "annot_id": "val-1"}]),
    "tot": ("test.csv", [TOT_ROW, {**TOT_ROW, "video_id": "before_1"}]),
    "vlm4d": FIXTURES / "vlm4d" / "real_mc.json",
    "video-holmes": FIXTURES / "video_holmes" / "RSmjqss0XKQ.json",
    "jsonl": ("records.jsonl", [RECORD, {**RECORD, "id": "s", "options": ["x", "y"], "answer": "B", "start": 2}]),
}


def words_per_option(scene, question, words):
    choices = [{"choice_id": i, "answer": word} for i, word in enumerate(words)]
    return {"scene_index": int(scene), "questions": [{"question_id": int(question), "choices": choices}]}


def parted(name):
    """'<video>_<number>' -> (video, number); a video's own name may hold a _."""
    video, _, number = name.rpartition("_")
    return video, number


REPLY_ROWS = {  # format -> (sample id, reply) -> the row of such a result file; of an object its (key, value)
    "nextqa": lambda name, reply: (name, {"prediction": reply, "answer": 0}),
    "nextgqa": lambda name, reply: (name, {"prediction": reply, "answer": 0}),
    "nextqa-oe": lambda name, reply: (parted(name)[0], {parted(name)[1]: reply}),
    "activitynetqa": lambda name, reply: {"question_id": name, "answer": reply},
    "clevrer": lambda name, reply: words_per_option(*parted(name), reply),
    "vlm4d": lambda name, reply: {"id": name.removeprefix("real_"), "response": reply},
    "vlm4d-judged": lambda name, reply: {
        "id": name.removeprefix("real_"), "extracted_answer": reply, "choices": {"A": "x"},
    },
    "video-holmes": lambda name, reply: {
        "video ID": parted(name)[0], "Question ID": int(parted(name)[1]), "Predicr Answer": reply,
    },
    "jsonl": lambda name, reply: {"id": name, "prediction": reply},
}  # fmt: skip


def right_reply(sample):
    if sample.option_truths:
        return ["correct" if truth else "wrong" for truth in sample.option_truths]
    return sample.answer if sample.gold is None else sample.gold


@pytest.fixture(params=list(BENCHMARKS))
def block(request, tmp_path):
    """(benchmark, its annotation file, the samples in it)"""
    benchmark, excerpt = BENCHMARKS[request.param], EXCERPTS[request.param]
    if isinstance(excerpt, tuple):
        name, rows = excerpt
        excerpt = write_rows(tmp_path / name, rows)
    return benchmark, excerpt, benchmark.read(excerpt)


def test_samples_are_whole(block):
    """Fails if ids collide, a text is empty, a gold is none of the options or not the answer, or a row has no name."""
    benchmark, _, samples = block
    assert benchmark.about and "\n" not in benchmark.about and BENCHMARKS[benchmark.name] is benchmark
    assert len({sample.id for sample in samples}) == len(samples) > 1
    for sample in samples:
        assert isinstance(sample.id, str) and sample.question.strip() and sample.answer.strip()
        assert sample.video is None or not Path(sample.video).is_absolute()
        if sample.option_truths:
            assert sample.gold is None and len(sample.option_truths) == len(sample.options)
            assert set(sample.option_truths) <= {True, False}
        elif sample.options:
            assert sample.gold in range(len(sample.options)) and sample.options[sample.gold] == sample.answer
        else:
            assert sample.gold is None and all(text.strip() for text in sample.also_right)
        groups = benchmark.groups(sample)
        assert groups and all(isinstance(group, str) and group for group in groups)
        assert len(set(groups)) == len(groups) and "all" not in groups
        assert isinstance(benchmark.resampled(sample.video), str) and isinstance(benchmark.line_of(sample), str)


def test_right_replies_are_right_and_silence_is_wrong(block):
    """Fails if a gold would be refused, a group loses its questions, or a missing reply is not counted."""
    benchmark, _, samples = block
    replies = {sample.id: right_reply(sample) for sample in samples}
    summary, items = score_predictions(benchmark, samples, replies)
    assert summary["accuracy"] == 1 and all(item["trouble"] == "" for item in items)
    assert all(row["accuracy"] == 1 and row["n"] for row in summary["by_type"].values())
    assert not benchmark.whole_lines or summary["by_type"][benchmark.whole_lines]["n"] == summary["n"] < len(samples)
    json.dumps([summary, items])

    del replies[samples[0].id]
    summary, items = score_predictions(benchmark, samples, replies)
    assert summary["accuracy"] < 1 and summary["missing"] == 1
    assert items[0]["trouble"] == "missing" and not items[0]["correct"]


def test_published_replies_come_back_as_they_were_written(block, tmp_path):
    """Fails if a format makes other ids than the reader, loses or changes a reply, or is silent about a double one."""
    benchmark, _, samples = block
    for format in benchmark.formats:
        suffix = ".json" if format != "jsonl" else ".jsonl"
        kind = ["correct", "wrong"] if samples[0].option_truths else "B"
        rows = [REPLY_ROWS[format](sample.id, kind) for sample in samples]
        if format == "nextqa-oe":  # an object has a key once
            rows = rows[:1]
        if isinstance(rows[0], tuple):
            rows = dict(rows)
        path = write_rows(tmp_path / f"real_mc{suffix}", rows)
        replies = read_predictions(path, format)
        assert replies == {sample.id: kind for sample in samples[: len(rows)]}
        with pytest.raises(VidReasonError, match="is answered twice"):
            read_predictions([path, path], format)


def test_training_reads_it(block, tmp_path):
    """Fails if a question becomes one that has no single answer to train on."""
    benchmark, path, samples = block
    questions = read_samples(f"{benchmark.name}:{path}@2", tmp_path)
    assert len(questions) >= len(samples) and {question.weight for question in questions} == {2.0}
    for question in questions:
        assert not question.option_truths and question.answer
        assert question.options is None or question.options[question.gold] == question.answer


def test_a_file_that_is_not_there_or_of_another_layout_is_named(block, tmp_path):
    """Fails if a mistake in a path or a file becomes a traceback, or does not say which file it is."""
    benchmark, path, _ = block
    with pytest.raises(VidReasonError, match="nowhere.csv"):
        benchmark.read(tmp_path / "nowhere.csv")
    other = write_rows(tmp_path / f"other{path.suffix}", [{"a": 1}])
    with pytest.raises(VidReasonError, match=other.name):
        benchmark.read(other)


def test_a_limit_takes_whole_lines_only(block):
    """Fails if --limit parts questions that belong together, or takes others when it grows."""
    benchmark, _, samples = block
    few = {sample.id for sample in evaluate.limited(benchmark, samples, 1)}
    lines = {benchmark.line_of(sample) for sample in samples if sample.id in few}
    assert len(lines) == 1 and few == {sample.id for sample in samples if benchmark.line_of(sample) in lines}
    assert few <= {sample.id for sample in evaluate.limited(benchmark, samples, 2)}


# --------------------------------------------------------------------------- the recipe

README = ROOT / "data" / "README.md"


@pytest.fixture
def recipe():
    """The block of code that data/README.md prints under "Add a benchmark", registered while the test runs."""
    section = README.read_text("utf-8").split("## Add a benchmark")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    known = set(BENCHMARKS)
    exec(code, {})
    (name,) = BENCHMARKS.keys() - known
    yield BENCHMARKS[name], code
    del BENCHMARKS[name]


def test_the_recipe_reads_and_scores_as_it_is_printed(recipe, tmp_path, monkeypatch, capsys):
    """Fails if the recipe is longer than it says, does not run, or what it makes is no benchmark of evaluate.py."""
    benchmark, code = recipe
    assert len(code.splitlines()) <= 25
    rows = [
        {"clip": "pan", "number": n, "question": f"q{n}?", "first": "a", "second": "b", "third": "c",
         "right": right, "step": step}
        for n, (right, step) in enumerate([("A", "boil"), ("C", "boil"), ("B", "fry")])
    ]  # fmt: skip
    asked = write_rows(tmp_path / "test.csv", rows)
    said = write_rows(tmp_path / "said.json", [{"clip": "pan", "number": n, "reply": "(C)"} for n in range(3)])
    samples = benchmark.read(asked)
    assert [(s.id, s.video, s.gold, s.category) for s in samples][1] == ("pan/1", "pan.mp4", 2, "boil")
    assert read_samples(f"{benchmark.name}:{asked}", tmp_path) == samples

    command = [benchmark.name, "--annotations", asked, "--predictions", said, "--out", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, command)])
    evaluate.main()
    assert capsys.readouterr().out.rstrip().endswith("accuracy 0.3333 n 3")
    by_type = json.loads((tmp_path / "out.json").read_text())["summary"]["by_type"]
    assert by_type["boil"]["accuracy"] == 0.5 and by_type["fry"]["accuracy"] == 0

    write_rows(asked, [{**rows[0], "right": "D"}])
    with pytest.raises(VidReasonError, match="test.csv, line 2"):
        benchmark.read(asked)
