"""The weights in the repository: where they come from, and that they do what toy/README.md says."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toy import language
from toy.videos import arrays_of, make_videos
from toy.vision import mask_quality

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, CLIPS, README = ROOT / "toy" / "weights", ROOT / "toy" / "clips", ROOT / "toy" / "README.md"
MARGIN = 0.10  # 60 clips are few: a type may fall this far below its figure by chance


def test_files_are_those_of_the_provenance():
    provenance = json.loads((WEIGHTS / "provenance.json").read_text())
    files = [path for path in WEIGHTS.rglob("*") if path.is_file() and path.name != "provenance.json"]
    hashes = {str(path.relative_to(WEIGHTS)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert hashes == provenance["sha256"]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20


def test_toy_clips_cover_every_type():
    records = [json.loads(line) for line in (CLIPS / "samples.jsonl").read_text().splitlines()]
    assert {record["type"] for record in records} == set(language.QUESTIONS)
    videos = {record["video"] for record in records}
    assert videos == {path.name for path in CLIPS.glob("*.mp4")} and len(videos) >= 12


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    out = tmp_path_factory.mktemp("shipped") / "scores.json"
    options = ["--seed", "11", "--clips", "60", "--split", "val", "--controls", "blind", "--out", str(out)]
    subprocess.run([sys.executable, "evaluate.py", "toy", *options], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text())["summary"]


def test_shipped_weights_reach_the_figures_of_the_readme(scores):
    figures = {}
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| ") and cells[1] in {*language.QUESTIONS, "all together"}:
            figures[cells[1]] = float(cells[2])
    assert figures.keys() == {*language.QUESTIONS, "all together"}
    assert scores["accuracy"] > figures["all together"] - 0.04
    for type_, row in scores["by_type"].items():
        margin = max(MARGIN, 1.5 / row["n"] ** 0.5)
        assert row["accuracy"] > figures[type_] - margin, (type_, row)


def test_shipped_weights_reach_the_bars(scores):
    """What a toy that is worth reading must do, less what 60 clips can deviate by chance (two standard errors)."""
    bars = {"count": 0.97, "moved": 0.93, "direction": 0.9, "absent": 0.9, "first": 0.85, "colour": 0.9, "kind": 0.9}
    bars |= {"why": 0.82, "bare why": 0.7, "predict": 0.72, "order": 0.8, "counterfactual": 0.75}
    for type_, bar in bars.items():
        row = scores["by_type"][type_]
        standard_error = (bar * (1 - bar) / row["n"]) ** 0.5
        assert row["accuracy"] > bar - 2 * standard_error, (type_, row)
    assert scores["by_type"]["predict"]["outcome_accuracy"] > 0.7
    assert scores["by_type"]["held-out"]["outcome_where_named"] > 0.75
    assert scores["accuracy"] > 0.88


def test_readme_answers(capsys):
    from infer import main

    main([str(CLIPS / "red-egg-breaks-0.mp4"), "why?"])
    assert language.check(capsys.readouterr().out, "the red egg broke because the yellow ball hit it")
    main([str(CLIPS / "yellow-pin-nears-red-balloon-0.mp4"), "what happens next?"])
    truth = "the yellow pin will hit the red balloon and the red balloon will pop"
    assert language.check(capsys.readouterr().out, truth)


def test_the_picture_of_the_ablations_is_there():
    assert (ROOT / "toy" / "ablations.png").read_bytes()[:4] == b"\x89PNG"


def test_the_shipped_sam_finds_what_the_readme_says(tmp_path):
    """On one keyframe of each of 60 validation videos, decoded from mp4."""
    from vidreason import load_vision, read_config

    config = read_config(WEIGHTS)
    _, sam = load_vision(config, WEIGHTS)
    make_videos(tmp_path, "val", 0, 60, 2)
    quality = mask_quality(sam, config, *arrays_of(tmp_path), 60)
    text = " ".join(README.read_text().split())
    pattern = r"SAM finds (\.\d+) of the things on a keyframe \(IoU > \.5, mean IoU (\.\d+)\) with (\.\d+) false masks"
    recall, iou, false_masks = map(float, re.search(pattern, text).groups())
    assert abs(quality["recall"] - recall) < 0.01 and abs(quality["mIoU"] - iou) < 0.01, quality
    assert abs(quality["false masks"] - false_masks) < 0.03, quality


def test_blind_answers_are_poor(scores):
    assert scores["blind_accuracy"] < 0.45 < scores["accuracy"]
