"""The whole recipe from nothing, tiny: stage 0 → 1 → 2 → evaluate → infer, each as a user would call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(command):
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def losses(path):
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Run everything once, in a folder of its own."""
    runs = tmp_path_factory.mktemp("recipe")
    weights, world, places = runs / "weights", runs / "world" / "train", f"--runs {runs} --weights {runs / 'weights'}"
    run(f"-m toy.pretrain world {places} --clips 60 --val_clips 6")
    run(f"-m toy.pretrain llm {places} --stories 300 --steps 200 --lookup_steps 0 --layers 2 --batch 16")
    run(f"-m toy.pretrain encoder {places} --steps 30 --batch 16")
    run(f"-m toy.pretrain sam {places} --steps 60 --batch 4")
    train = f"train.py --model {weights} --videos {world} --features {runs / 'features'}"
    train += " --batch 8 --max_steps 40 --warmup 5"
    run(f"{train} --stage 1 --data {world / 'captions.jsonl'} --output_dir {runs / 'stage1'}")
    start = f"--init_from {runs / 'stage1' / 'model'} --output_dir {runs / 'stage2'}"
    run(f"{train} --stage 2 --data {world / 'samples.jsonl'} {world / 'text.jsonl'} {start}")
    return runs, train


def test_every_loss_falls(recipe):
    for name in ("stage1", "stage2"):
        found = losses(recipe[0] / name / "log.jsonl")
        assert len(found) == 40 and sum(found[-5:]) < 0.93 * sum(found[:5]), (name, found)
        assert (recipe[0] / name / "loss.png").stat().st_size > 1000
    for name in ("llm", "encoder", "sam"):
        found = losses(recipe[0] / f"{name}.jsonl")
        assert len(found) >= 4 and found[-1] < found[0], (name, found)


def test_the_trained_model_answers_and_is_scored(recipe):
    model, scores = recipe[0] / "stage2" / "model", recipe[0] / "scores.json"
    out = run(f"evaluate.py toy --clips 4 --split val --model {model} --out {scores}")
    result, last = json.loads(scores.read_text()), out.strip().splitlines()[-1].split()
    assert last[0::2] == ["accuracy", "blind", "n"] and int(last[5]) == len(result["items"]) == result["summary"]["n"]
    assert {"accuracy", "blind_accuracy", "by_type"} <= result["summary"].keys()
    assert all({"accuracy", "blind_accuracy", "n"} <= row.keys() for row in result["summary"]["by_type"].values())
    clip = next((recipe[0] / "world" / "val").glob("*.mp4"))
    assert run(f"infer.py {clip} why? --model {model}").strip()


def test_retraining_is_deterministic(recipe):
    runs, train = recipe
    run(f"{train} --stage 1 --data {runs / 'world' / 'train' / 'captions.jsonl'} --output_dir {runs / 'again'}")
    assert losses(runs / "again" / "log.jsonl") == losses(runs / "stage1" / "log.jsonl")


def test_stale_features_are_refused(recipe):
    runs, train = recipe
    fingerprint = runs / "features" / "fingerprint.json"
    kept = fingerprint.read_text()
    fingerprint.write_text(kept.replace('"image_size": 96', '"image_size": 95'))
    command = f"{train} --stage 1 --data {runs / 'world' / 'train' / 'captions.jsonl'} --output_dir {runs / 'never'}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    fingerprint.write_text(kept)
    assert done.returncode == 2 and "error: features were made by another encoder" in done.stderr
