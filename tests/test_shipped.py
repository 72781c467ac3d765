"""The weights in the repository: where they come from, and that they do what the README says."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toy import language
from toy.videos import make_videos
from toy.vision import mask_quality

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, CLIPS = ROOT / "toy" / "weights", ROOT / "toy" / "clips"
MARGIN = 0.10  # 60 clips are few: a type may fall this far below its figure by chance


def test_files_are_those_of_the_provenance():
    provenance = json.loads((WEIGHTS / "provenance.json").read_text())
    files = {str(p.relative_to(WEIGHTS)): p for p in WEIGHTS.rglob("*") if p.is_file() and p.name != "provenance.json"}
    assert files.keys() == provenance["sha256"].keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == provenance["sha256"][name], name
    assert sum(p.stat().st_size for p in files.values()) <= 16 * 2**20


def test_toy_clips_cover_every_type():
    records = [json.loads(line) for line in (CLIPS / "samples.jsonl").read_text().splitlines()]
    assert {r["type"] for r in records} == set(language.QUESTIONS)
    videos = {r["video"] for r in records}
    assert videos == {p.name for p in CLIPS.glob("*.mp4")} and len(videos) >= 12


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    out = tmp_path_factory.mktemp("shipped") / "scores.json"
    options = ["--seed", "11", "--clips", "60", "--split", "val", "--controls", "blind", "--out", str(out)]
    subprocess.run([sys.executable, "evaluate.py", "toy", *options], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text())["summary"]


def test_shipped_weights_reach_the_figures_of_the_readme(scores):
    lines = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    figures = {c[1].strip(): float(c[2]) for c in lines if c[1].strip() in {*language.QUESTIONS, "all together"}}
    assert figures.keys() == {*language.QUESTIONS, "all together"}
    assert scores["accuracy"] > figures["all together"] - 0.04
    for type_, row in scores["by_type"].items():
        assert row["accuracy"] > figures[type_] - max(MARGIN, 1.5 / row["n"] ** 0.5), (type_, row)


def test_shipped_weights_reach_the_bars(scores):
    """What a toy that is worth reading must do, less what 60 clips can deviate by chance (two standard errors)."""
    bars = {"count": 0.97, "moved": 0.93, "direction": 0.9, "absent": 0.9, "first": 0.85, "colour": 0.9, "kind": 0.9}
    bars |= {"why": 0.82, "bare why": 0.7, "predict": 0.72, "order": 0.8, "counterfactual": 0.75}
    for type_, bar in bars.items():
        row = scores["by_type"][type_]
        assert row["accuracy"] > bar - 2 * (bar * (1 - bar) / row["n"]) ** 0.5, (type_, row)
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
    make_videos(tmp_path, "val", 0, 60, 2)
    frames, owner = (np.load(tmp_path / f"{name}.npy") for name in ("frames", "owner"))
    found = mask_quality(load_vision(config, WEIGHTS)[1], config, frames, owner, 60)
    says = " ".join((ROOT / "README.md").read_text().split())
    pattern = r"SAM finds (\.\d+) of the things on a keyframe \(IoU > \.5, mean IoU (\.\d+)\) with (\.\d+) false masks"
    recall, iou, false = map(float, re.search(pattern, says).groups())
    assert abs(found["recall"] - recall) < 0.01 and abs(found["mIoU"] - iou) < 0.01, found
    assert abs(found["false masks"] - false) < 0.03, found


def test_blind_answers_are_poor(scores):
    assert scores["blind_accuracy"] < 0.45 < scores["accuracy"]
