"""The whole recipe from nothing, tiny: stage 0 → 1 → 2 → evaluate → infer, each as a user would call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, folder):
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def losses(path):
    return [json.loads(line)["loss"] for line in open(path)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Run everything once, in a folder of its own."""
    folder = tmp_path_factory.mktemp("recipe")
    runs, weights = folder / "runs", folder / "weights"
    places = ["--runs", runs, "--weights", weights]
    run("-m", "toy.pretrain", "world", *places, "--clips", 60, "--val_clips", 6, folder=folder)
    run(
        "-m",
        "toy.pretrain",
        "llm",
        *places,
        "--stories",
        400,
        "--steps",
        60,
        "--layers",
        2,
        "--batch",
        16,
        folder=folder,
    )
    run("-m", "toy.pretrain", "encoder", *places, "--steps", 30, "--batch", 16, folder=folder)
    run("-m", "toy.pretrain", "sam", *places, "--steps", 60, "--batch", 4, folder=folder)
    train = [
        "train.py",
        "--model",
        weights,
        "--videos",
        runs / "world" / "train",
        "--features",
        runs / "features",
        "--batch",
        8,
    ]
    world = runs / "world" / "train"
    run(
        *train,
        "--stage",
        1,
        "--data",
        world / "captions.jsonl",
        "--max_steps",
        40,
        "--output_dir",
        runs / "stage1",
        folder=folder,
    )
    run(
        *train,
        "--stage",
        2,
        "--data",
        world / "samples.jsonl",
        world / "text.jsonl",
        "--max_steps",
        40,
        "--init_from",
        runs / "stage1" / "model",
        "--output_dir",
        runs / "stage2",
        folder=folder,
    )
    return folder


def test_every_loss_falls(recipe):
    for name in ("stage1", "stage2"):
        found = losses(recipe / "runs" / name / "log.jsonl")
        assert len(found) == 40 and sum(found[-5:]) < 0.8 * sum(found[:5]), (name, found)
        assert (recipe / "runs" / name / "loss.png").stat().st_size > 1000
    stage0 = [json.loads(open(recipe / "runs" / f"{n}.jsonl").readlines()[-1]) for n in ("llm", "encoder", "sam")]
    assert all(line["loss"] > 0 for line in stage0)


def test_the_trained_model_answers_and_is_scored(recipe):
    model = recipe / "runs" / "stage2" / "model"
    out = run(
        "evaluate.py",
        "toy",
        "--clips",
        4,
        "--split",
        "val",
        "--model",
        model,
        "--out",
        recipe / "scores.json",
        folder=recipe,
    )
    result = json.loads((recipe / "scores.json").read_text())
    last = out.strip().splitlines()[-1].split()
    assert last[0::2] == ["accuracy", "blind", "n"] and int(last[5]) == len(result["items"]) == result["summary"]["n"]
    assert {"accuracy", "blind_accuracy", "by_type"} <= result["summary"].keys()
    assert all({"accuracy", "blind_accuracy", "n"} <= row.keys() for row in result["summary"]["by_type"].values())
    clip = next((recipe / "runs" / "world" / "val").glob("*.mp4"))
    assert run("infer.py", clip, "why?", "--model", model, folder=recipe).strip()


def test_retraining_is_deterministic(recipe):
    runs = recipe / "runs"
    run(
        "train.py",
        "--stage",
        1,
        "--model",
        recipe / "weights",
        "--videos",
        runs / "world" / "train",
        "--features",
        runs / "features",
        "--batch",
        8,
        "--data",
        runs / "world" / "train" / "captions.jsonl",
        "--max_steps",
        40,
        "--output_dir",
        runs / "again",
        folder=recipe,
    )
    assert losses(runs / "again" / "log.jsonl") == losses(runs / "stage1" / "log.jsonl")
