"""Our model on a benchmark: protocols, controls, what is missing, and killed runs; on the toy's weights and clips."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import evaluation.replies
from data.benchmarks import BENCHMARKS
from data.features import ORDERS, FeatureCache, encode_videos
from data.records import Sample
from evaluation.choice import yes_or_no
from evaluation.replies import ask
from evaluation.score import baselines, interval, score_predictions, tally
from vidreason import VidReason, VidReasonError, read_video

ROOT = Path(__file__).resolve().parent.parent
CLIPS, WEIGHTS = ROOT / "toy" / "clips", ROOT / "toy" / "weights"


def call(*command, check=0):
    done = subprocess.run([sys.executable, "evaluate.py", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == check, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr.strip().splitlines()[-1] if check else done.stdout


@pytest.fixture(scope="module")
def model():
    return VidReason.load(WEIGHTS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Four of the toy's clips, one file that is no video, one that is not there; questions in our own layout."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "videos").mkdir()
    rows = [json.loads(line) for line in (CLIPS / "samples.jsonl").read_text().splitlines()]
    names = sorted({r["video"] for r in rows if r["type"] in ("why", "direction")})[:4]
    for name in names:
        shutil.copy(CLIPS / name, folder / "videos")
    (folder / "videos" / "broken.mp4").write_text("this is no video")
    kept = [r for r in rows if r["video"] in names]
    part = {**kept[0], "id": "part", "video": Path(kept[0]["video"]).stem, "start": 0, "end": 2}  # found as .mp4, cut
    asked = [*kept, part, {**kept[0], "id": "b", "video": "broken.mp4"}]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "lost.jsonl").write_text(
        "\n".join(map(json.dumps, [*asked, {**kept[0], "id": "l", "video": "lost.mp4"}]))
    )
    return folder


@pytest.fixture(scope="module")
def result(place):
    shown = call("jsonl", "--annotations", place / "asked.jsonl", "--videos", place / "videos",
                 "--features", place / "features", "--processes", 1, "--out", place / "result.json")  # fmt: skip
    return json.loads((place / "result.json").read_text()), shown


def test_every_question_is_scored_with_its_controls(result, place):
    found, shown = result
    summary, items = found["summary"], {i["id"]: i for i in found["items"]}
    rows = [json.loads(line) for line in (place / "asked.jsonl").read_text().splitlines()]
    assert items.keys() == {r["id"] for r in rows} and summary["n"] == len(rows)
    assert summary["accuracy"] == sum(i["correct"] for i in items.values()) / len(items) > 0.6
    for name in ("blind", "black", "shuffled", "one_frame"):
        assert summary[f"{name}_accuracy"] == pytest.approx(
            sum(i["controls"][name]["correct"] for i in items.values()) / len(items)
        )
        assert summary[f"{name}_accuracy"] < summary["accuracy"] and name.replace("_", " ") in shown
    optioned = [r for r in rows if r.get("options")]
    assert summary["chance_accuracy"] == pytest.approx(np.mean([1 / len(r["options"]) for r in optioned]))
    assert {"weights_sha256", "config", "versions", "prompts", "frames", "annotations"} <= found["provenance"].keys()
    assert found["provenance"]["frames"]["total"] == 16
    assert not (place / "result.json.parts").exists()


def test_a_span_of_a_video_is_what_is_seen(result, place):
    item = next(i for i in result[0]["items"] if i["id"] == "part")
    assert item["video"].endswith(".mp4#t=0.000,2.000") and not item["trouble"]
    cache = FeatureCache(next((place / "features").glob("**/fingerprint.json")).parent)
    assert cache[item["video"]].times.max() < 2


def test_an_unreadable_video_counts_as_wrong_and_is_named(result):
    found, shown = result
    broken = next(i for i in found["items"] if i["id"] == "b")
    assert broken["trouble"] == "unreadable" and not broken["correct"] and not broken["controls"]["blind"]["correct"]
    assert found["summary"]["unreadable"] == 1 and "not a video" in found["summary"]["unreadable_videos"]["broken.mp4"]
    assert "1 unreadable" in shown


def test_the_likeliest_option_is_the_one_that_is_likeliest_by_itself(result, model, place):
    found, _ = result
    item = next(i for i in found["items"] if i["options"] and i["trouble"] == "")
    features = model.perceive(place / "videos" / item["video"])
    alone = torch.cat([model.option_logprobs(features, item["question"], [o]) for o in item["options"]])
    assert torch.allclose(alone, torch.tensor(item["likelihoods"]), atol=0.05) and item["read"] == int(alone.argmax())
    lengths = torch.tensor([len(model.tokenizer(o).input_ids) + 1 for o in item["options"]])  # + the end
    assert item["tokens"] == lengths.tolist() and item["normalised"] == int((alone / lengths).argmax())


def test_a_missing_video_is_an_error_unless_allowed(place):
    shared = ["jsonl", "--annotations", place / "lost.jsonl", "--videos", place / "videos", "--controls"]
    shared += ["--features", place / "features", "--processes", 1]
    says = call(*shared, check=2)
    assert says.startswith("error: 1 of 7 videos are missing, for example lost.mp4") and "--allow_missing" in says
    out = place / "allowed.json"
    call(*shared, "--allow_missing", "--out", out)
    found = json.loads(out.read_text())
    lost = next(i for i in found["items"] if i["id"] == "l")
    assert lost["trouble"] == "missing" and not lost["correct"] and found["summary"]["missing_videos"] == ["lost.mp4"]
    assert not {"black_accuracy", "blind_accuracy"} & found["summary"].keys()


def test_a_killed_evaluation_goes_on_and_gives_the_same_file(result, place):
    out, parts = place / "again.json", place / "again.json.parts"
    command = ["jsonl", "--annotations", place / "asked.jsonl", "--videos", place / "videos", "--processes", 1]
    command += ["--features", place / "features", "--out", out]
    killed = 0
    for wanted in ("full.jsonl", "shuffled.jsonl"):
        process = subprocess.Popen(
            [sys.executable, "evaluate.py", *map(str, command)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not ((parts / wanted).exists() and (parts / wanted).stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        torn = (parts / wanted).read_bytes()
        (parts / wanted).write_bytes(torn + torn[: len(torn) // 2].replace(b"\n", b""))  # as if cut in a line
    assert killed == 2
    says = call(*command, "--batch", 63, check=2)
    assert "parts of another run, which differs in batch" in says
    kept = (parts / "full.jsonl").stat().st_mtime_ns
    answered = (parts / "full.jsonl").read_bytes().count(b"\n")
    assert answered >= 1 and kept
    call(*command)
    assert json.loads(out.read_text()) == result[0]


def test_controls_show_what_they_say():
    clip, shape = next(CLIPS.glob("*.mp4")), (4, 4, 96)
    frames, times, _ = read_video(clip, *shape)
    flat = frames.flatten(0, 1)
    for name, kinds in (("shuffled", 16), ("one_frame", 1)):
        order = ORDERS[name](16, clip.name)
        shown, at, keyframes = read_video(clip, *shape, order=order)
        assert torch.equal(shown.flatten(0, 1), flat[order]) and torch.equal(at, times)
        assert len(set(order)) == kinds and len(keyframes) == 4
        assert np.array_equal(keyframes[1], read_video(clip, 16, 1, 96)[2][order[6]])
    assert not np.array_equal(order, ORDERS["shuffled"](16, clip.name))
    assert np.array_equal(ORDERS["shuffled"](16, "a"), ORDERS["shuffled"](16, "a"))
    assert not np.array_equal(ORDERS["shuffled"](16, "a"), ORDERS["shuffled"](16, "b"))


def test_features_of_a_control_are_no_features_of_the_video(model, tmp_path):
    run = [WEIGHTS, model.config, CLIPS, [min(CLIPS.glob("*.mp4")).name], tmp_path]
    encode_videos(*run, order="shuffled")
    with pytest.raises(VidReasonError, match="another encoder, SAM or settings"):
        encode_videos(*run)


def test_options_that_may_all_be_right_are_asked_one_by_one(model, tmp_path, monkeypatch):
    sample = Sample("1", "v", "what moved?", "x", ["the red egg", "the blue box"], option_truths=(True, False))
    other = Sample("2", "v", "how many?", "two")
    asked = []

    def replies(model, samples, features, protocol, prompts):
        asked.extend(s.question for s in samples)
        return [{"said": 0 if s.options else "two"} for s in samples]

    monkeypatch.setattr(evaluation.replies, "reply_to", replies)
    found = ask(model, [sample, other], lambda video: None, "likelihood", tmp_path / "kept.jsonl")
    assert [f["said"] for f in found] == [[True, True], "two"]
    assert sorted(asked) == ["how many?", "what moved? the blue box: yes or no?", "what moved? the red egg: yes or no?"]
    summary, items = score_predictions(BENCHMARKS["clevrer"], [sample], {"1": [True, False]})
    assert summary["accuracy"] == 1 and summary["chance_accuracy"] == 0.25
    assert [yes_or_no(r) for r in ("Yes.", "B", 0, 1, "perhaps")] == [True, False, True, False, None]


def test_a_run_that_goes_on_asks_again_where_its_questions_changed(tmp_path, monkeypatch):
    """As when a video that could not be read has been mended: whatever was kept of later batches belongs elsewhere."""
    samples, asked = [Sample(str(i), f"v{i}", f"q{i}", "a") for i in range(6)], []

    def replies(model, samples, features, protocol, prompts):
        asked.extend(s.id for s in samples)
        return [{"said": s.question} for s in samples]

    monkeypatch.setattr(evaluation.replies, "reply_to", replies)

    def said(some):
        found = ask(None, some, lambda video: None, "direct", tmp_path / "kept.jsonl", batch=2)
        return [reply["said"] for reply in found]

    assert said(samples[:2] + samples[3:]) == ["q0", "q1", "q3", "q4", "q5"]
    del asked[:]
    assert said(samples) == [s.question for s in samples] and asked == ["2", "3", "4", "5"]
    del asked[:]
    assert said(samples) == [s.question for s in samples] and not asked


def test_intervals_resample_films_not_their_spans():
    spans = [f"film{i % 3}.mp4#t={i},{i + 1}" for i in range(30)]
    samples = [Sample(str(i), video, "?", "a") for i, video in enumerate(spans)]
    right = [i % 3 == 0 for i in range(30)]
    videos, _ = zip(*tally(BENCHMARKS["jsonl"], samples, right)["all"], strict=True)
    assert set(videos) == {"film0.mp4", "film1.mp4", "film2.mp4"}
    assert interval(right, videos) == [0, 1]


def test_a_limit_takes_both_questions_of_a_line_of_vcr():
    samples = [Sample(f"{i}/{which}", "v", "?", "a") for i in range(20) for which in ("answer", "rationale")]
    few = evaluate.limited(BENCHMARKS["vcr"], samples, 7)
    lines = [s.id.split("/")[0] for s in few]
    assert len(few) == 8 and all(lines.count(line) == 2 for line in lines)
    more = evaluate.limited(BENCHMARKS["vcr"], samples, 9)
    assert {s.id for s in few} < {s.id for s in more}
    assert len(evaluate.limited(BENCHMARKS["tot"], samples, 7)) == 7


def test_a_written_choice_is_read_from_the_reply(model, monkeypatch, tmp_path):
    samples = [Sample(str(i), "v", "where?", "right", ["left", "right"], gold=1) for i in range(3)]
    said, prompts = iter(["Left, then right. Therefore, the final answer is: B", "B", "neither"]), []

    def batch(features, asked):
        prompts.extend(asked)
        return [next(said) for _ in asked]

    monkeypatch.setattr(model, "answer_batch", batch)
    found = ask(model, samples, lambda video: None, "cot", tmp_path / "kept.jsonl")
    assert prompts[0].startswith("where?\nA: left\nB: right\n") and "step by step" in prompts[0]
    summary, items = score_predictions(BENCHMARKS["jsonl"], samples, {s.id: f["said"] for s, f in zip(samples, found)})
    assert [i["read"] for i in items] == [1, 1, None] and summary["unparsed"] == 1 and summary["accuracy"] == 2 / 3


def test_majority_and_chance_by_hand():
    samples = [Sample(str(i), "v", "?", a, category=c) for i, (a, c) in enumerate(["ax", "ax", "bx", "cy"])]
    assert baselines(samples) == {"chance": [None] * 4, "majority": [True, True, False, True]}


def test_limit_takes_a_fair_sample_and_counts_the_rest(place):
    shared = ["jsonl", "--annotations", place / "asked.jsonl", "--videos", place / "videos", "--controls"]
    shared += ["--features", place / "features", "--processes", 1, "--limit", 5, "--out", place / "few.json"]
    shown = call(*shared)
    found = json.loads((place / "few.json").read_text())
    rows = (place / "asked.jsonl").read_text().splitlines()
    assert found["summary"]["n"] == 5 and found["summary"]["skipped"] == len(rows) - 5 and "not asked" in shown


def test_records_without_a_video_and_shards(place, tmp_path):
    """A question about no video is a missing one; a member of a .tar is there if its shard is."""
    rows = [json.loads(line) for line in (place / "asked.jsonl").read_text().splitlines()][:2]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(place / "videos" / rows[0]["video"], "a.mp4")
    asked = [{**rows[0], "id": 1, "type": 3}, {**rows[1], "id": 2, "video": "0.tar/a.mp4", "type": None}]
    asked.append({"id": 3, "question": "?", "answer": "a", "type": "x"})
    shutil.copy(place / "videos" / rows[0]["video"], tmp_path)
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, asked)))
    shared = ["jsonl", "--annotations", tmp_path / "r.jsonl", "--videos", tmp_path, "--processes", 1, "--controls"]
    assert "1 of 3 videos are missing" in call(*shared, check=2)
    call(*shared, "--allow_missing", "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [i["trouble"] for i in found["items"]] == ["", "", "missing"]
    assert found["summary"]["by_type"].keys() == {"3", "other", "x"}
    assert "it is a folder" in call(*shared, "--out", tmp_path, check=2) and not list(tmp_path.glob("*.partial"))


def test_ranking_sheet_from_result_files(result, place):
    """compare --human_sheet, a person's ranks, and back."""
    out = place / "sheet"
    call("compare", place / "result.json", place / "result.json", check=0)
    other = json.loads((place / "result.json").read_text())
    for item in other["items"]:
        item["prediction"] = "something else"
        item["video"] = f"elsewhere/{item['video']}"  # where another system's videos lie
    (place / "other.json").write_text(json.dumps(other))
    files = [place / "result.json", place / "other.json"]
    call("compare", *files, "--human_sheet", out, "--videos", place / "videos", "--count", 6)
    key = json.loads((out / "key.json").read_text())
    better = str(place / "result.json")
    ranks = {q: {x: 1 if m == better else 2 for x, m in kept["models"].items()} for q, kept in key["questions"].items()}
    (place / "ranks.json").write_text(json.dumps({"sheet": key["sheet"], "annotator": "p", "ranks": ranks}))
    shown = call("compare", "--human_sheet", out, "--ranks", place / "ranks.json")
    assert "loss 1.000" in shown and "n 6" in shown or "win 1.000" in shown and "n 6" in shown
    assert "takes two result files" in call("compare", files[0], check=2)
    (out / "key.json").write_text("{")
    assert "not a sheet's key" in call("compare", "--human_sheet", out, "--ranks", place / "ranks.json", check=2)


def test_the_ablated_model_without_fusion_core_is_a_mean_and_a_linear_layer(model):
    from dataclasses import replace

    from vidreason import FusionCore

    core = FusionCore(replace(model.config, fusion_layers=0, num_queries=1, time_embedding=False), 16).eval()
    z, mask = torch.randn(2, 5, model.config.encoder_width), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = core(z, torch.zeros(2, 5), mask)
    by_hand = core.linear_proj(core.norm_out(core.queries + core.proj_in(core.norm_in(z[0, :3])).mean(0)))
    assert found.shape == (2, 1, 16) and torch.allclose(found[0], by_hand, atol=1e-6)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two clips of the toy world, scored: (all that --out wrote, the table that --summary kept, what was printed)."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "tables.json").write_text(json.dumps({"streams": {"5": {"rows": {}}, "8": {"rows": "older"}}}))
    asked = ["toy", "--seed", 8, "--clips", 2, "--split", "val", "--controls", "blind", "--processes", 1]
    shown = call(*asked, "--out", folder / "all.json", "--summary", folder / "tables.json")
    return json.loads((folder / "all.json").read_text()), json.loads((folder / "tables.json").read_text()), shown


def test_a_kept_table_is_the_summary_beside_those_of_other_streams(table):
    found, kept, _ = table
    streams = kept["streams"]
    assert streams.keys() == {"5", "8"} and streams["5"] == {"rows": {}}
    summary, stream = found["summary"], streams["8"]
    assert stream["command"] == "python evaluate.py toy --seed 8 --clips 2 --split val"
    assert stream["weights_sha256"] == found["provenance"]["weights_sha256"]
    assert stream["rows"].keys() == {"all together", *summary["by_type"]}
    for kind, row in {"all together": summary, **summary["by_type"]}.items():
        shown = stream["rows"][kind]
        assert shown["n"] == row["n"] and shown["interval"] == row["interval"]
        for name in ("accuracy", "blind_accuracy", "majority_accuracy"):
            assert shown[name] == pytest.approx(row[name], abs=1e-6)
    golds = [item["gold"] for item in found["items"] if item["type"] == "count"]
    assert golds.count(stream["rows"]["count"]["majority_answer"]) == max(golds.count(gold) for gold in golds)
    assert "items" not in stream


def test_the_toy_says_that_its_vision_was_trained_with_labels(table, monkeypatch, capsys):
    _, kept, shown = table
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "toy", "--help"])
    with pytest.raises(SystemExit):
        evaluate.parse()
    for text in (shown, kept["streams"]["8"]["vision"], capsys.readouterr().out):
        assert "on top of vision trained with labels" in " ".join(text.split())


def test_a_summary_that_cannot_be_kept_is_refused_before_the_work(tmp_path, monkeypatch):
    def called(*options):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "toy", *map(str, options)])
        evaluate.main()

    monkeypatch.setattr(evaluate, "run_model", lambda *args: pytest.fail("the work has begun"))
    (tmp_path / "other.json").write_text('{"variants": {}}')
    with pytest.raises(VidReasonError, match="no file of tables.*other.json"):
        called("--summary", tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == '{"variants": {}}'
    with pytest.raises(VidReasonError, match="--ablations"):  # that is toy.ablations' own command
        called("--ablations", "--summary", tmp_path / "new.json")
