"""Every benchmark is read and scored as its own code does; fixtures/README.md says where the excerpts are from.

VCR, Test of Time and Video-Holmes' result file have no excerpt that may be kept here, nor has a scene with CLEVRER's
descriptive questions: hand-written files of the documented layouts stand in, and their tests say so.
"""

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import write_rows

from data.benchmarks import BENCHMARKS, as_asked, read_predictions, read_samples, split_weight
from data.records import contents_of, open_tar
from evaluation.score import score_predictions
from vidreason import VidReasonError

FIXTURES = Path(__file__).resolve().parent / "fixtures"
NEXTQA, NEXTQA_OE, NEXTGQA = FIXTURES / "nextqa", FIXTURES / "nextqa_oe", FIXTURES / "nextgqa"
ACTIVITYNET, VLM4D = FIXTURES / "activitynet_qa", FIXTURES / "vlm4d"
RESULTS = VLM4D / "processed_outputs_paper_results"
CLEVRER, HOLMES = FIXTURES / "clevrer" / "train-orig-small.json", FIXTURES / "video_holmes"


def read(name, *paths):
    return {s.id: s for s in BENCHMARKS[name].read(paths)}


def score(name, samples, predictions):
    summary, items = score_predictions(BENCHMARKS[name], list(samples.values()), predictions)
    return summary, {item["id"]: item for item in items}


def percent(summary):
    """{group: (accuracy in per cent, n)}, as published tables have it"""
    rows = {**summary["by_type"], "all": summary}
    return {name: (round(100 * row["accuracy"], 2), row["n"]) for name, row in rows.items()}


# --------------------------------------------------------------------------- NExT-QA


def test_nextqa_answers_count_from_zero():
    samples = read("nextqa", NEXTQA / "val.csv")
    s = samples["4010069381_6"]
    assert len(samples) == 20 and s.gold == 0 and s.answer == s.options[0] == "roll the handle"
    assert (s.video, s.category) == ("NExTVideo/1106/4010069381.mp4", "CH")
    assert samples["3763643225_7"].options[4] == "catching toy"  # stands there with a space at its end
    assert read("nextqa", NEXTQA / "test.csv")["4544425606_3"].options[3] == "none"  # some csv readers make it NaN


def test_nextqa_scores_equal_the_published_code():
    """What eval_mc.py prints for the excerpt. (On the whole file it prints 46.26, 50.74, 59.33 and 49.74, as we do.)"""
    predictions = read_predictions(NEXTQA / "HGA-bert-ft-h256-val-example.json", "nextqa")
    summary, items = score("nextqa", read("nextqa", NEXTQA / "val.csv"), predictions)
    found = percent(summary)
    assert found["C"] == (63.64, 11) and found["T"] == (83.33, 6) and found["D"] == (33.33, 3)
    assert found["CW"] == (62.5, 8) and found["CH"] == (66.67, 3) and found["TN"] == (100, 4) and found["TC"] == (50, 2)
    assert found["DC"] == (0, 1) and found["DL"] == (100, 1) and found["DO"] == (0, 1)
    assert "TP" not in found  # counts as TN
    assert found["all"] == (65.0, 20)  # per question: the mean of the three groups would be 60.1
    assert items["4882821564_1"]["correct"] and not items["4010069381_6"]["correct"]


def test_gold_comes_from_the_annotations(tmp_path):
    """A result file's own "answer", which eval_mc.py believes, changes nothing."""
    rows = json.loads((NEXTQA / "HGA-bert-ft-h256-val-example.json").read_text())
    cheat = {name: {**row, "answer": row["prediction"]} for name, row in rows.items()}
    predictions = read_predictions(write_rows(tmp_path / "cheat.json", cheat), "nextqa")
    assert score("nextqa", read("nextqa", NEXTQA / "val.csv"), predictions)[0]["accuracy"] == 0.65


def test_of_two_equal_options_an_index_is_right_once_and_a_text_always():
    samples = read("nextqa", NEXTQA / "test.csv")
    s = samples["3842638015_4"]
    assert s.options[3] == s.options[4] == "happy" and s.gold == 4
    for said, right in ((4, True), (3, False), ("happy", True), ("D", True), ("(E)", True), ("A", False)):
        assert score("nextqa", samples, {s.id: said})[1][s.id]["correct"] is right, said


def test_nextqa_open_ended():
    samples = read("nextqa-oe", NEXTQA_OE / "test.csv")
    assert len(samples) == 17 and samples["5772591393_4"].also_right == ("turn its head",)
    assert samples["4924794333_4"].also_right == () and samples["4924794333_4"].category == "DB"
    assert samples["5772591393_4"].video == "5772591393.mp4"  # no map beside the file
    predictions = {"5772591393_4": "turn its head", "7004238086_5": "sitting on the sofa", "4924794333_4": "yes"}
    assert score("nextqa-oe", samples, predictions)[0]["accuracy"] == 2 / 17


def test_nextqa_open_ended_result_file(tmp_path):
    """Hand-written in the layout of NExT-OE's results/*.json: {video: {qid: text}}."""
    path = write_rows(tmp_path / "HGA.json", {"5772591393": {"4": "turn its head"}, "7004238086": {"0": ""}})
    assert read_predictions(path, "nextqa-oe") == {"5772591393_4": "turn its head", "7004238086_0": ""}


# --------------------------------------------------------------------------- NExT-GQA


def test_nextgqa_answers_are_texts(tmp_path):
    """Fails if `answer` is taken for an index, or of two equal options (happy, happy) the second is the gold one.

    The result file is hand-written in the layout of NExT-GQA's code/TempGQA/train/trainval_gdqa.py.
    """
    samples = read("nextgqa", NEXTGQA / "val.csv", NEXTGQA / "test.csv")
    s = samples["10001787725_1"]
    assert len(samples) == 13 + 17 and (s.gold, s.answer, s.category) == (4, "protect from falling", "CW")
    assert s.video == "NExTVideo/1009/10001787725.mp4"
    twice = samples["3842638015_4"]
    assert twice.options[3:] == ["happy", "happy"] and twice.gold == 3
    rows = {name: {"prediction": 4, "answer": 4} for name in ("10001787725_1", "3842638015_4")}
    predictions = read_predictions(write_rows(tmp_path / "res.json", rows), "nextgqa")
    summary, items = score("nextgqa", samples, predictions)
    assert items["10001787725_1"]["correct"] and not items["3842638015_4"]["correct"]
    assert percent(summary)["C"][1] + percent(summary)["T"][1] == 30 and summary["missing"] == 28


# --------------------------------------------------------------------------- ActivityNet-QA


def test_activitynetqa_is_joined_by_id(tmp_path):
    samples = read("activitynetqa", ACTIVITYNET / "val_q.json")
    s = samples["v_-_gDSRlC1kg_8"]
    assert (s.video, s.answer, s.category) == ("v_-_gDSRlC1kg.mp4", "4", "number")
    questions, answers = (json.loads((ACTIVITYNET / f"val_{x}.json").read_text()) for x in "qa")
    apart = [write_rows(tmp_path / "asked.json", questions), write_rows(tmp_path / "said.json", answers[::-1])]
    assert read("activitynetqa", *apart) == samples == read("activitynetqa", *apart[::-1])
    both = read("activitynetqa", ACTIVITYNET / "val_q.json", ACTIVITYNET / "test_q.json")
    assert len(both) == 15 + 17


def test_activitynetqa_free_are_the_types_from_3_on():
    """The published eval.py prints the same per type and for all, but 1.5 for Free: it divides by the types that come
    third to last in the file. (On the whole file it prints .7583, where we have .5055.)"""
    predictions = read_predictions(ACTIVITYNET / "pred_val_example.json", "activitynetqa")
    found = percent(score("activitynetqa", read("activitynetqa", ACTIVITYNET / "val_q.json"), predictions)[0])
    assert found["all"] == (66.67, 15) and found["free"] == (75.0, 12)
    one_each = {"motion": 0, "spatial relation": 100, "temporal relation": 0, "color": 0, "object": 0, "location": 100}
    assert {name: found[name] for name in one_each} == {name: (right, 1) for name, right in one_each.items()}
    assert found["yes/no"] == (100, 7) and found["number"] == (0, 1) and found["other"] == (100, 1)


# --------------------------------------------------------------------------- CLEVRER


def test_clevrer_options_are_right_or_wrong_each():
    samples = read("clevrer", CLEVRER)
    assert [sum(s.option_truths) for s in samples.values()] == [1, 2, 0, 4, 3]
    assert all(s.gold is None and len(s.option_truths) == len(s.options) == 4 for s in samples.values())
    s = samples["9253_12"]
    assert (s.video, s.category) == ("video_09000-10000/video_09253.mp4", "explanatory")
    assert s.option_truths == (False, True, False, False) and s.answer == "the presence of the metal cube"
    assert samples["7748_11"].answer == "none of them" and samples["7627_11"].answer.count(" and ") >= 3


def test_clevrer_scores_per_option_and_per_question(tmp_path):
    """The result file is hand-written in the layout of CLEVRER's executor/get_results.py."""
    samples = read("clevrer", CLEVRER)
    words = {name: ["correct" if t else "wrong" for t in s.option_truths] for name, s in samples.items()}
    words["3886_12"][0] = "correct"  # three options right
    words["4071_11"][3] = "error"  # what their executor writes where it fails: three right
    choices = {k: [{"choice_id": i, "answer": w} for i, w in enumerate(v)] for k, v in words.items()}
    del choices["9253_12"][1]  # a hole must not shift the others
    path = tmp_path / "nsdr.json"
    scenes = [
        {"scene_index": int(scene), "questions": [{"question_id": int(q), "choices": found[::-1]}]}
        for (scene, q), found in ((k.split("_"), v) for k, v in choices.items())
    ]
    predictions = read_predictions(write_rows(path, scenes), "clevrer")
    assert predictions["9253_12"] == ["wrong", None, "wrong", "wrong"]
    summary, items = score("clevrer", samples, predictions)
    assert [i for i in items if items[i]["correct"]] == ["7748_11", "7627_11"]  # none right, and all right
    row = {"accuracy": 2 / 5, "n": 5, "per_option_accuracy": 17 / 20, "options": 20}
    row |= {"chance_accuracy": 1 / 16, "majority_accuracy": 1 / 5}
    assert all(group.pop("interval")[0] <= 2 / 5 for group in summary["by_type"].values())
    assert summary["by_type"] == {"explanatory": row, "multiple choice": row} and summary["unparsed"] == 2
    del predictions["7748_11"]  # no option is right, so that silence must not count as right
    summary, items = score("clevrer", samples, predictions)
    assert not items["7748_11"]["correct"] and summary["missing"] == 1
    assert summary["by_type"]["explanatory"]["per_option_accuracy"] == 13 / 20


def test_clevrer_descriptive_questions_and_the_host_s_layout(tmp_path):
    """Hand-written after the README on CLEVRER's host."""
    choices = [{"choice_id": i, "choice": f"c{i}", "answer": a} for i, a in ((1, "wrong"), (0, "correct"))]
    questions = [
        {"question_id": 0, "question": "How many?", "question_type": "descriptive", "answer": "2"},
        {"question_id": 1, "question": "What next?", "question_type": "predictive", "choices": choices},
    ]
    scene = {"scene_index": 10007, "video_filename": "video_10007.mp4", "questions": questions}
    samples = read("clevrer", write_rows(tmp_path / "validation.json", [scene]))
    count, following = samples.values()
    assert count.video == "video_10000-11000/video_10007.mp4" and (count.answer, count.options) == ("2", None)
    assert following.options == ["c0", "c1"] and following.option_truths == (True, False)
    summary, _ = score("clevrer", samples, {"10007_0": "2", "10007_1": ["correct", "correct"]})
    assert percent(summary)["descriptive"] == (100, 1)
    assert summary["by_type"]["predictive"]["per_option_accuracy"] == 0.5
    del questions[1]["choices"][0]["answer"]  # the test set
    with pytest.raises(VidReasonError, match="validation.json, scene 10007, question 1"):
        read("clevrer", write_rows(tmp_path / "validation.json", [scene]))


def test_clevrer_trains_option_by_option():
    asked = read_samples(f"clevrer:{CLEVRER}")
    assert len(asked) == 20 and {s.answer for s in asked} == {"yes", "no"}
    assert sum(s.answer == "yes" for s in asked) == 10 and all(s.options[s.gold] == s.answer for s in asked)
    assert asked[1].question.endswith("sphere's exit? the presence of the metal cube: yes or no?")


# --------------------------------------------------------------------------- VCR


@pytest.fixture
def vcr(tmp_path):
    """Hand-written in the layout that r2c's dataloaders/vcr.py quotes; VCR may not be passed on."""
    row = {
        "objects": ["person", "car", "person"],
        "img_fn": "lsmdc_X/X@0.jpg",
        "question": ["Does", [2], "like", [0, 1], "?"],
        "answer_choices": [["Yes", "."], ["No", ",", [0], "does", "n't", "."], [[2], "'s", "sad", "."], ["No", "."]],
        "answer_label": 1,
        "rationale_choices": [["r0"], ["r1"], [[4], "waves"], ["r3"]],
        "rationale_label": 2,
    }
    return write_rows(tmp_path / "val.jsonl", [{**row, "annot_id": f"val-{i}"} for i in range(4)])


def test_vcr_names_people_and_asks_twice(vcr):
    answer, reason, *_ = read("vcr", vcr).values()
    assert (answer.id, answer.category, answer.video) == ("val-0/Q->A", "Q->A", "vcr1images/lsmdc_X/X@0.jpg")
    assert answer.question == "Does person3 like person1 and car2?" and answer.gold == 1
    assert answer.options == ["Yes.", "No, person1 doesn't.", "person3's sad.", "No."]
    assert (reason.id, reason.category, reason.gold) == ("val-0/QA->R", "QA->R", 2)
    assert reason.question == "Does person3 like person1 and car2? No, person1 doesn't."  # the gold answer is said
    assert reason.answer == "person5 waves"  # tags may exceed the objects


def test_vcr_q_ar_is_both_right_on_one_line(vcr):
    right = {"Q->A": 1, "QA->R": 2}
    hits = [("Q->A", "QA->R"), ("Q->A",), ("QA->R",), ("Q->A",)]
    predictions = {f"val-{i}/{m}": right[m] if m in hit else 0 for i, hit in enumerate(hits) for m in right}
    found = percent(score("vcr", read("vcr", vcr), predictions)[0])
    assert found["Q->A"] == (75, 4) and found["QA->R"] == (50, 4)
    assert found["Q->AR"] == found["all"] == (25, 4)  # their product would be 37.5


# --------------------------------------------------------------------------- Test of Time


def test_tot_pairs(tmp_path):
    """Hand-written in the layout that TestOfTime's package/datasets/synthetic.py reads."""
    rows = [{"video_id": f"after_{i}", "sentence": f"A circle {i} after a blue box", "end_time": 2} for i in range(9)]
    rows.append({"video_id": "after_x", "sentence": "a ball after a box seen before noon", "end_time": 2})
    rows.append({"video_id": "before_0", "sentence": "a box before a ball thrown after lunch", "end_time": 2})
    samples = read("tot", write_rows(tmp_path / "test_v2.0.csv", rows))
    after, before = samples["after_3"], samples["before_0"]
    assert after.answer == "a circle 3 after a blue box" and after.video == "videos/after_3.mp4"
    assert sorted(after.options) == ["a blue box after a circle 3", "a circle 3 after a blue box"]
    assert samples["after_x"].category == "after"  # whatever the sentence says
    assert before.category == "before" and "a ball thrown after lunch before a box" in before.options
    assert {s.gold for s in samples.values()} == {0, 1}  # the right one is not always the first
    write_rows(tmp_path / "test_v2.0.csv", [{**rows[0], "sentence": "a circle, then a box"}])
    with pytest.raises(VidReasonError, match="test_v2.0.csv, line 2"):
        read("tot", tmp_path / "test_v2.0.csv")


# --------------------------------------------------------------------------- VLM4D


def test_vlm4d_golds_are_texts_or_numbers():
    samples = read("vlm4d", VLM4D / "real_mc.json", VLM4D / "synthetic_mc.json")
    bus, one, zero = (samples[f"real_validation_{n}"] for n in (1, 3, 4))
    assert bus.gold == 1 and bus.answer == "there are no buses in the video"
    assert one.options == ["1", "2", "3", "0"] and (one.gold, one.answer) == (0, "1")  # as an index it would be 2
    assert (zero.gold, zero.answer) == (3, "0")
    assert bus.video == "videos_real/davis/aerobatics.mp4"
    twins = [samples[f"real_validation_{n}"] for n in (1288, 1289)]
    assert twins[0].question == twins[1].question and [s.gold for s in twins] == [0, 3]


def test_vlm4d_ids_of_both_halves_stay_apart():
    samples = read("vlm4d", VLM4D / "real_mc.json", VLM4D / "synthetic_mc.json")
    assert len(samples) == 12 + 6 and samples["synthetic_validation_1"].answer == "left"
    assert list(read("vlm4d", VLM4D / "real_mc.json")) == [s for s in samples if s.startswith("real")]  # alone, too


def test_vlm4d_groups():
    samples = read("vlm4d", VLM4D / "real_mc.json", VLM4D / "synthetic_mc.json")
    found = percent(score("vlm4d", samples, {name: s.gold for name, s in samples.items()})[0])
    assert {name: n for name, (_, n) in found.items()} == {
        "real": 12, "real ego-centric": 3, "real exo-centric": 9, "all": 18,
        "synthetic": 6, "synthetic FP": 1, "synthetic directional": 5,
    }  # fmt: skip
    assert samples["real_validation_129"].answer == "no dogs in the video"  # but FP is for synthetic ones only
    assert samples["real_validation_129"].category == "real exo-centric"


def test_vlm4d_scores_equal_the_published_code():
    """What acc_final_statistics.py writes for these two files: exo 25, synthetic 0, all 12.5."""
    names = "real_mc_cot/Qwen2.5-VL-7B-Instruct_1fps.json", "synthetic_mc_direct-output/InternVideo2-Chat-8B_1fps.json"
    files = [RESULTS / name for name in names]
    predictions = read_predictions(files, "vlm4d-judged")
    found = percent(score("vlm4d", read("vlm4d", *files), predictions)[0])  # result files hold their questions
    assert found == {
        "real": (25, 4), "real exo-centric": (25, 4), "synthetic": (0, 4), "synthetic directional": (0, 3),
        "synthetic FP": (0, 1), "all": (12.5, 8),
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_vlm4d_verdicts_are_those_of_the_checked_judge(path):
    summary, items = score("vlm4d", read("vlm4d", path), read_predictions(path, "vlm4d-judged"))
    rows = json.loads(path.read_text())
    assert [i["correct"] for i in items.values()] == [row["correct"] for row in rows]
    assert summary["unparsed"] == sum(row["extracted_answer"] == "No Valid Answer" for row in rows)
    assert list(read_predictions(path, "vlm4d").values()) == [row["response"] for row in rows]


def test_vlm4d_judge_rewords_options(tmp_path):
    (tmp_path / "real_mc_cot").mkdir()
    rows = json.loads((RESULTS / "real_mc_cot/LLaVA-NeXT-Video-34B-hf_8frame.json").read_text())[:3]
    says = "B: no buses in it", "B: left", "A: 2"  # the last two are one option's letter and another one's text
    for row, found in zip(rows, says, strict=True):
        row["extracted_answer"] = found
    path = write_rows(tmp_path / "real_mc_cot" / "m.json", rows)
    items = score("vlm4d", read("vlm4d", path), read_predictions(path, "vlm4d-judged"))[1]
    assert [i["correct"] for i in items.values()] == [True, False, False]


def test_vlm4d_equal_options_are_equally_right():
    samples = read("vlm4d", VLM4D / "real_mc.json")
    for said, right in (("C", True), ("D", True), ("away from the camera", True), ("B", False)):
        items = score("vlm4d", samples, {"real_validation_633": said})[1]
        assert items["real_validation_633"]["correct"] is right, said


def test_vlm4d_replies_to_older_questions(tmp_path):
    """Under a fixed id the options have changed since: the reply is about those that it was shown."""
    folder = tmp_path / "real_mc_cot"
    folder.mkdir()
    rows = json.loads((RESULTS / "real_mc_direct-output/deepseek-vl2_8frame.json").read_text())
    rows[0]["choices"] = dict(zip("ABCD", [*rows[0]["choices"].values()][::-1], strict=True))  # B is now "right"
    path, now = write_rows(folder / "old.json", rows), BENCHMARKS["vlm4d"].read(VLM4D / "real_mc.json")
    vlm4d = BENCHMARKS["vlm4d"]
    asked, changed = as_asked(vlm4d, now, path)
    assert changed == ["real_validation_1"] and asked[1:] == now[1:] and asked[0].video == now[0].video
    predictions = read_predictions(path, "vlm4d")
    assert not score_predictions(vlm4d, asked, predictions)[1][0]["correct"]
    assert score_predictions(vlm4d, now, predictions)[1][0]["correct"]


# --------------------------------------------------------------------------- Video-Holmes


def test_video_holmes_ids_start_again_with_each_film(tmp_path):
    """The questions are excerpts; the result file is hand-written in the layout of Video-Holmes' evaluate.py."""
    samples = read("video-holmes", *sorted(HOLMES.glob("*.json")))
    s = samples["RSmjqss0XKQ_8"]
    assert len(samples) == 16 and (s.video, s.gold, s.category) == ("RSmjqss0XKQ.mp4", 5, "CTI")
    assert s.options[5] == s.answer and len(s.options) == 6
    rows = [{"video ID": film, "Question ID": 1, "Predicr Answer": "A"} for film in ("RSmjqss0XKQ", "dGS48Kcax5k")]
    predictions = read_predictions(write_rows(tmp_path / "Results.json", rows), "video-holmes")
    summary, items = score("video-holmes", samples, predictions)
    assert items["RSmjqss0XKQ_1"]["correct"] and not items["dGS48Kcax5k_1"]["correct"]
    assert percent(summary)["SR"] == (50, 2) and summary["missing"] == 14 and summary["n"] == 16


# --------------------------------------------------------------------------- our own records


def test_records_with_options(tmp_path):
    rows = [
        {"id": "text", "video": "a.mp4", "question": "q", "options": ["x", "y"], "answer": "y", "type": "why"},
        {"id": "letter", "question": "q", "options": {"B": "y", "A": "x"}, "answer": "B"},
        {"id": "index", "question": "q", "options": ["x", "y"], "answer": 1},
        {"id": "number", "question": "q", "options": [3, 2, 7], "answer": 7},
        {"id": "gold", "question": "q", "options": ["x", "y"], "gold": 1},
        {"id": "open", "video": "a.mp4", "question": "q", "answer": ["y", "z"], "start": 1, "end": 2.5},
        {"id": "rest", "video": "a.mp4", "question": "q", "answer": "y", "start": 1, "end": None},
    ]
    samples = read("jsonl", write_rows(tmp_path / "r.jsonl", rows))
    assert {name: s.gold for name, s in samples.items()} == {
        "text": 1, "letter": 1, "index": 1, "number": 2, "gold": 1, "open": None, "rest": None,
    }  # fmt: skip
    assert samples["number"].answer == "7" and samples["text"].category == "why"
    assert samples["open"].also_right == ("z",) and samples["open"].video == "a.mp4#t=1.000,2.500"
    assert samples["rest"].video == "a.mp4#t=1.000,"
    for span in ({"start": -1}, {"start": 2, "end": 1}, {"end": float("nan")}, {"video": "a.mp4#t=1", "start": 2}):
        with pytest.raises(VidReasonError, match="name no span of the video.*line 1"):
            read("jsonl", write_rows(tmp_path / "bad.jsonl", [{**rows[0], **span}]))


@pytest.mark.parametrize(
    "fields, gold",
    [
        ({"options": ["x", "y"], "answer": "b"}, 1),  # a letter in lower case
        ({"options": {"A": "x", "C": "y", "D": "z"}, "answer": "C"}, 1),  # a key, not the third letter
        ({"options": {"a": "x", "b": "y"}, "answer": "B"}, 1),
        ({"options": ["x", "y"], "answer": 0}, 0),  # a place, from zero
        ({"options": ["x", "y"], "gold": "1"}, 1),  # of a .csv
        ({"options": ["x", "y"], "gold": "B"}, 1),
        ({"options": ["2", "4"], "gold": 1, "answer": "4"}, 1),
        ({"options": ["2", "4"], "answer": "4"}, 1),  # text is never a place
        ({"options": ["1", "0"], "gold": 0}, 0),  # gold is never a text
        ({"options": [f"word {i}" for i in range(14)], "answer": "N"}, 13),
        ({"options": '["x", "y"]', "answer": " y "}, 1),
    ],
)
def test_what_an_answer_may_be(fields, gold, tmp_path):
    """Fails if a letter, a key, a place or a text is read as another one of them."""
    path = write_rows(tmp_path / "r.jsonl", [{"id": "a", "question": "q", **fields}])
    assert read("jsonl", path)["a"].gold == gold


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"options": ["x", "y"], "answer": True}, "True is no option"),
        ({"options": ["x", "y"], "answer": False}, "False is no option"),
        ({"options": ["x", "y"], "gold": True}, "True is no option"),
        ({"options": ["x", "y"], "answer": 1.0}, "1.0 is no option"),
        ({"options": ["x", "y"], "answer": ["x"]}, "is no option"),
        ({"options": ["x", "y"], "answer": 2}, "'2' is none of x, y"),
        ({"options": ["x", "y"], "answer": -1}, "'-1' is none of"),
        ({"options": {"A": "x", "C": "y"}, "answer": "B"}, "'B' is none of"),
        ({"options": [3, 2, 1], "answer": 1}, "may mean more than one"),  # a place or a text
        ({"options": {"A": "B", "B": "A"}, "answer": "A"}, "may mean more than one"),  # a key or a text
        ({"options": ["y", "y", "z"], "answer": "y"}, "two options read the same"),
        ({"options": ["x", "y "] + ["y"], "answer": "x"}, "two options read the same"),
        ({"answer": True}, 'no "answer"'),
        ({"answer": "  "}, 'no "answer"'),
        ({"answer": "x", "question": ""}, '"question" is empty'),
        ({"answer": "x", "question": "  "}, '"question" is empty'),
        ({"answer": "x", "question": None}, '"question" is empty'),
    ],
)
def test_an_answer_that_could_be_misread_is_refused(fields, says, tmp_path):
    """Fails if one of these is guessed at, or the message does not name file and line."""
    good = {"question": "q", "answer": "a"}
    path = write_rows(tmp_path / "r.jsonl", [good, {"question": "q", **fields}])
    with pytest.raises(VidReasonError, match=says) as error:
        read("jsonl", path)
    assert "r.jsonl, line 2" in str(error.value)


def test_an_empty_question_of_a_csv_is_refused(tmp_path):
    """Fails if it becomes the prompt of a caption."""
    path = write_rows(tmp_path / "r.csv", [{"video": "a.mp4", "question": "", "answer": "x"}])
    with pytest.raises(VidReasonError, match='"question" is empty.*line 2'):
        read("jsonl", path)


def test_dialogues_as_most_tools_write_them(tmp_path):
    """Fails if LLaVA's or the messages layout is refused, a turn is lost, or a mark where a video stood is read."""
    human = {"from": "human", "value": "<video>\nWhy did it break?"}
    llava = [human, {"from": "gpt", "value": "It fell."}]
    llava += [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "Then."}]
    parts = [{"type": "video", "video": "file://b.mp4"}, {"type": "text", "text": "What moves?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]}]
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "<video> Who?"}]
    plain.append({"role": "assistant", "content": "He."})
    rows = [
        {"id": "l", "video": "a.mp4", "conversations": llava},
        {"id": "m", "messages": said},
        {"id": "p", "messages": plain, "videos": ["c.mp4"]},
    ]
    for name in ("r.json", "r.jsonl"):
        samples = read("jsonl", write_rows(tmp_path / name, rows))
        assert {key: (s.video, s.question, s.answer) for key, s in samples.items()} == {
            "l/1": ("a.mp4", "Why did it break?", "It fell."),
            "l/2": ("a.mp4", "Why did it break?\nIt fell.\nWhen?", "Then."),
            "m": ("b.mp4", "What moves?", "A ball."),
            "p": ("c.mp4", "Be short.\nWho?", "He."),
        }


@pytest.mark.parametrize(
    "turns, says",
    [
        ([{"role": "user", "content": "q"}], "without an answer"),
        ([{"role": "tool", "content": "q"}], "a turn of 'tool'"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "a turn with 'image'"),
        ([{"role": "assistant", "content": "a"}], '"question" is empty'),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_named(turns, says, tmp_path):
    """Fails if it is a traceback, or a picture is passed over without a word."""
    path = write_rows(tmp_path / "r.jsonl", [{"video": "a.mp4", "messages": turns}])
    with pytest.raises(VidReasonError, match=f"{says}.*line 1"):
        read("jsonl", path)


def test_plain_records_that_were_refused(tmp_path):
    """Fails if a number as an answer, a time as h:mm:ss, a mark of UTF-8, UTF-16 or a blank line stops a run."""
    row = {"id": "a", "video": "a.mp4", "question": "how many?", "answer": 3, "start": "00:01:03.5", "end": "1:05"}
    line = json.dumps(row)
    for text, encoding in (("\ufeff" + line, "utf-8"), (f"\n{line}\n\n", "utf-8"), (line, "utf-16")):
        (tmp_path / "r.jsonl").write_text(text, encoding)
        sample = read("jsonl", tmp_path / "r.jsonl")["a"]
        assert (sample.answer, sample.video) == ("3", "a.mp4#t=63.500,65.000")
    (tmp_path / "r.csv").write_text("video,caption\na.mp4,ein Bär\n", "utf-16")
    assert [s.answer for s in read("jsonl", tmp_path / "r.csv").values()] == ["ein Bär"]


def test_other_encodings_and_deep_nesting_are_named(tmp_path):
    """Fails if letters come out as others, or a file that nests too deeply is a traceback."""
    (tmp_path / "r.jsonl").write_bytes('{"video": "a.mp4", "caption": "ein Bär"}'.encode("latin-1"))
    with pytest.raises(VidReasonError, match="neither UTF-8 nor UTF-16.*r.jsonl.*save it as UTF-8"):
        read("jsonl", tmp_path / "r.jsonl")
    (tmp_path / "deep.jsonl").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(VidReasonError, match="deep.jsonl"):
        read("jsonl", tmp_path / "deep.jsonl")


def test_members_of_a_tar_as_tools_name_them(tmp_path):
    """Fails if dots, ./, upper case or a link in a shard lose a record, or name a member that is not there."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", link=""):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member, io.BytesIO(content))

        add("./a.b.v2.mp4", b"film")
        add("./a.b.v2.txt", b"first")
        add("sub/C.MP4", b"film")
        add("sub/C.TXT", b"second")
        add("d.mp4", link="a.b.v2.mp4")
        add("d.txt", b"third")
    samples = read("jsonl", path)
    said = {name: (Path(s.video).name, s.answer) for name, s in samples.items()}
    assert said == {"a.b.v2": ("a.b.v2.mp4", "first"), "sub/C": ("C.MP4", "second"), "d": ("d.mp4", "third")}
    opened, members = open_tar(path)
    inside = [str(Path(s.video).relative_to(path)) for s in samples.values()]
    assert all(name in members for name in inside)

    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add("e.txt", link="nowhere.txt")
    with pytest.raises(VidReasonError, match="e.txt is a link that leads nowhere.*1.tar"):
        read("jsonl", tmp_path / "1.tar")


def test_no_member_of_a_tar_leads_out_of_it(tmp_path):
    """Fails if a file beside the shard, or anywhere else, is read in place of a member of that name."""
    (tmp_path / "outside.txt").write_text("secret")
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for stem in ("../outside", "/absolute", "a/../../b"):
            for suffix in (".mp4", ".txt"):
                member = tarfile.TarInfo(stem + suffix)
                member.size = 6
                tar.addfile(member, io.BytesIO(b"inside"))
    samples = read("jsonl", folder / "0.tar")
    said = {name: s.answer for name, s in samples.items()}
    assert said == dict.fromkeys(["../outside", "absolute", "../b"], "inside")
    opened, members = open_tar(folder / "0.tar")
    for sample in samples.values():
        name = Path(sample.video).relative_to(folder / "0.tar")
        assert contents_of(opened, members[str(name)]) == b"inside"


def test_ids_that_collide_become_distinct(tmp_path):
    row = {"video": "a.mp4", "question": "q", "answer": "a"}
    one = write_rows(tmp_path / "one.jsonl", [{**row, "id": 1}, {**row, "id": 2}])
    two = write_rows(tmp_path / "two.jsonl", [{**row, "id": 2}, {**row, "id": 3}, {**row, "id": 3}])
    assert [s.id for s in BENCHMARKS["jsonl"].read([one, two])] == ["1", "one/2", "two/2", "two/3", "two/3#2"]
    assert [s.id for s in BENCHMARKS["jsonl"].read(two)] == ["2", "3", "3#2"]


# --------------------------------------------------------------------------- mistakes, missing things, mixtures


@pytest.mark.parametrize(
    "name, rows, where",
    [
        ("nextqa", {"answer": 5}, "line 2"),
        ("nextqa", {"answer": -1}, "line 2"),
        ("nextqa", {"a4": ""}, "line 2"),
        ("nextqa", {"type": ""}, "line 2"),
        ("vlm4d", [{"id": "validation_1", "video": "/main/videos_real/a.mp4", "question": "q",
                    "choices": {"A": 1, "B": 2}, "answer": 0}], "record 1"),  # in range as an index
        ("vlm4d", [{"id": "v_1", "video": "a.mp4", "question": "q", "choices": {"A": 1}, "answer": 1}], "which half"),
        ("video-holmes", [{"video ID": "v", "Question ID": 1, "Question Type": "SR", "Question": "q",
                           "Options": {"A": "x"}, "Answer": "B"}], "record 1"),
        ("activitynetqa", [{"question_id": "v_a_1", "video_name": "a", "question": "q"}], "no answer to v_a_1"),
        ("clevrer", [{"scene_index": 1}], "record 1"),
        ("vcr", [{"objects": []}], "line 1"),
        ("jsonl", [{"answer": "z", "options": ["x", "y"]}], "line 1"),
        ("jsonl", [{"answer": "x", "options": "x, y"}], "line 1"),
        ("jsonl", [{"answer": []}], "line 1"),
    ],
)  # fmt: skip
def test_bad_records_are_named_by_file_and_place(name, rows, where, tmp_path):
    suffix = {"nextqa": ".csv", "vcr": ".jsonl", "jsonl": ".jsonl"}.get(name, ".json")
    if name == "nextqa":
        with open(NEXTQA / "val.csv", newline="") as file:
            rows = [{**next(csv.DictReader(file)), **rows}]
    path = write_rows(tmp_path / f"bad{suffix}", rows)
    with pytest.raises(VidReasonError, match=where) as error:
        read(name, path)
    assert path.name in str(error.value)


def test_rows_that_do_not_fit_their_header_are_named(tmp_path):
    text = (NEXTQA / "val.csv").read_text().replace("roll the handle,", "roll, the handle,")  # no quotes around it
    (tmp_path / "val.csv").write_text(text)
    with pytest.raises(VidReasonError, match="line 2 has more fields"):
        read("nextqa", tmp_path / "val.csv")
    (tmp_path / "val.csv").write_text("")
    with pytest.raises(VidReasonError, match="val.csv"):
        read("nextqa", tmp_path / "val.csv")
    with pytest.raises(VidReasonError, match="nowhere.csv"):
        read("nextqa", tmp_path / "nowhere.csv")


def test_missing_empty_and_unreadable_predictions_count_as_wrong(tmp_path):
    samples = read("nextqa", NEXTQA / "val.csv")
    names, gold = list(samples), {name: s.gold for name, s in samples.items()}
    said = [*("", "  ", None), *("the first or the second", 7, -1, True, "3"), *(gold[n] for n in names[8:12])]
    rows = [{"id": name, "prediction": p} for name, p in zip([*names[:12], "elsewhere"], [*said, 0], strict=True)]
    predictions = read_predictions(write_rows(tmp_path / "p.jsonl", rows), "jsonl")
    summary, _ = score("nextqa", samples, predictions)
    counts = {key: summary[key] for key in ("n", "accuracy", "missing", "empty", "unparsed", "unasked")}
    assert counts == {"n": 20, "accuracy": 4 / 20, "missing": 8, "empty": 3, "unparsed": 5, "unasked": 1}


def test_bad_result_files_are_named(tmp_path):
    twice = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prediction": 1}, {"id": "a", "prediction": 2}])
    with pytest.raises(VidReasonError, match="a is answered twice.*p.jsonl, line 2"):
        read_predictions(twice, "jsonl")
    with pytest.raises(VidReasonError, match="'prediction'.*p.json, record 1"):
        read_predictions(write_rows(tmp_path / "p.json", {"a_1": {"answer": 1}}), "nextqa")
    with pytest.raises(VidReasonError, match="--format"):
        score("nextqa", read("nextqa", NEXTQA / "val.csv"), {"elsewhere": 1})


def test_training_reads_every_benchmark(tmp_path, vcr):
    files = {
        "nextqa": NEXTQA / "val.csv",
        "nextqa-oe": NEXTQA_OE / "val.csv",
        "activitynetqa": ACTIVITYNET / "val_q.json",
        "vcr": vcr,
        "vlm4d": VLM4D / "real_mc.json",
        "video-holmes": HOLMES / "RSmjqss0XKQ.json",
    }
    for name, path in files.items():
        for s in read_samples(f"{name}:{path}", tmp_path):
            assert s.question and s.answer and (s.options is None or s.options[s.gold] == s.answer)
    plain = write_rows(tmp_path / "c:d.jsonl", [{"video": "a.mp4", "caption": "a ball"}])
    assert read_samples(plain)[0].answer == read_samples(f"jsonl:{plain}")[0].answer == "a ball"


def test_weights():
    assert split_weight("nextqa:a/train.csv@2.5") == ("nextqa:a/train.csv", 2.5)
    assert split_weight("b@home.jsonl") == ("b@home.jsonl", 1.0)
    with pytest.raises(VidReasonError, match="weight 0"):
        split_weight("c.jsonl@0")


def test_videos_are_found_where_they_lie(tmp_path):
    """Another suffix, no v_, one flat folder, or the folder itself named; two files of one name are not guessed at."""
    for name in ("v_TIEzvhv6xaI.webm", "7X3wPRKuAsU.mkv", "x/v_JTQsElq5UN4.mp4", "y/v_JTQsElq5UN4.mp4"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).touch()
    found = {s.id: s.video for s in read_samples(f"activitynetqa:{ACTIVITYNET}/val_q.json", tmp_path / "a")}
    assert found["v_TIEzvhv6xaI_2"] == "v_TIEzvhv6xaI.webm" and found["v_7X3wPRKuAsU_3"] == "7X3wPRKuAsU.mkv"
    assert found["v_JTQsElq5UN4_3"] == "v_JTQsElq5UN4.mp4" and found["v_KxJpfKZbNiI_3"] == "v_KxJpfKZbNiI.mp4"
    (tmp_path / "n" / "1106").mkdir(parents=True)
    (tmp_path / "n" / "1106" / "4010069381.mp4").touch()
    samples = read_samples(f"nextqa:{NEXTQA}/val.csv", tmp_path / "n")
    assert samples[0].video == "1106/4010069381.mp4" and samples[1].video == "NExTVideo/1104/4882821564.mp4"


def test_the_command_line(tmp_path):
    """NExT-QA's own result file through evaluate.py; a format or file that does not fit is one line."""
    out, shown = tmp_path / "scores.json", f"nextqa --annotations {NEXTQA / 'val.csv'} --predictions"
    result = next(NEXTQA.glob("HGA*.json"))

    def call(arguments):
        command = [sys.executable, "evaluate.py", *arguments.split()]
        return subprocess.run(command, cwd=FIXTURES.parent.parent, capture_output=True, text=True)

    done = call(f"{shown} {result} --out {out}")
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1] == "accuracy 0.6500 n 20", done.stderr
    found = json.loads(out.read_text())
    assert {"C", "T", "D"} <= found["summary"]["by_type"].keys() and len(found["items"]) == 20
    for arguments, says in ((f"{shown} {result} --format nope", "nope"), ("nextqa", "--annotations"),
                            (f"{shown} {VLM4D / 'real_mc.json'}", "real_mc.json")):  # fmt: skip
        done = call(arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr, done.stderr
