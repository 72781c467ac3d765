"""The whole recipe from nothing, tiny: stage 0 -> 1 -> 2 -> evaluate -> infer, each as a user would call it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.features import FeatureCache
from toy import ablations, language
from toy.llm import story_of
from vidreason import VidReasonError

ROOT = Path(__file__).resolve().parent.parent


def run(command):
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def losses(path):
    return [line["loss"] for line in read_lines(path)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Run everything once, in a folder of its own -> the folder, the command line that trains in it"""
    runs = tmp_path_factory.mktemp("recipe")
    weights, videos = runs / "weights", runs / "world" / "train"
    places = f"--runs {runs} --weights {weights}"
    run(f"-m toy.pretrain world {places} --clips 60 --val_clips 6")
    run(f"-m toy.pretrain llm {places} --stories 300 --steps 200 --lookup_steps 0 --layers 2 --batch 16")
    run(f"-m toy.pretrain encoder {places} --steps 30 --batch 16")
    run(f"-m toy.pretrain sam {places} --steps 60 --batch 4")
    train = f"train.py --model {weights} --videos {videos} --features {runs / 'features'}"
    train += " --batch 8 --max_steps 40 --warmup 5"
    run(f"{train} --stage 1 --data {videos / 'captions.jsonl'} --output_dir {runs / 'stage1'}")
    start = f"--init_from {runs / 'stage1' / 'model'} --output_dir {runs / 'stage2'}"
    run(f"{train} --stage 2 --data {videos / 'samples.jsonl'} {videos / 'text.jsonl'} {start}")
    return runs, train


def test_every_loss_falls(recipe):
    runs, _ = recipe
    for name in ("stage1", "stage2"):
        curve = losses(runs / name / "log.jsonl")
        assert len(curve) == 40, name
        assert sum(curve[-5:]) < 0.93 * sum(curve[:5]), (name, curve)
        assert (runs / name / "loss.png").stat().st_size > 1000
    for name in ("llm", "encoder", "sam"):
        curve = losses(runs / f"{name}.jsonl")
        assert len(curve) >= 4, name
        assert curve[-1] < curve[0], (name, curve)


def test_the_trained_model_answers_and_is_scored(recipe):
    runs, _ = recipe
    model, scores = runs / "stage2" / "model", runs / "scores.json"
    printed = run(f"evaluate.py toy --clips 4 --split val --model {model} --out {scores}")
    last_line = printed.strip().splitlines()[-1].split()
    result = json.loads(scores.read_text())
    summary = result["summary"]
    assert last_line[0::2] == ["accuracy", "blind", "n"]
    assert int(last_line[5]) == len(result["items"]) == summary["n"]
    assert {"accuracy", "blind_accuracy", "by_type"} <= summary.keys()
    for row in summary["by_type"].values():
        assert {"accuracy", "blind_accuracy", "n"} <= row.keys()
    clip = next((runs / "world" / "val").glob("*.mp4"))
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


@pytest.fixture
def small_ablations(recipe, tmp_path, monkeypatch):
    """Four of the variants, tiny, on the shipped LLM -> their names, the arguments of `ablate`"""
    names = ["full", "w/o fusion core", "w/o object features", "w/o stage 2"]
    variants = [variant for variant in ablations.VARIANTS if variant.name in names]
    monkeypatch.setattr(ablations, "VARIANTS", variants)
    monkeypatch.setattr(ablations, "DATA", recipe[0] / "world" / "train")
    monkeypatch.setattr(ablations, "STEPS", {1: 3, 2: 2})
    monkeypatch.setattr(ablations, "VIDEOS", 20)
    runs = tmp_path / "ablations"
    shutil.copytree(ROOT / "toy" / "weights" / "llm", runs / "full" / "llm" / "llm")
    where = {"runs": runs, "features": tmp_path / "features", "out": tmp_path / "table.json"}
    return names, SimpleNamespace(**where, seeds=1, seed=3, clips=3, split="val", processes=2)


def test_ablations(small_ablations, capsys):
    """A row each, nothing trained twice, no objects without objects."""
    names, args = small_ablations
    ablations.ablate(args)
    printed = capsys.readouterr().out
    rows = json.loads(args.out.read_text())["variants"]
    assert list(rows) == names and all(name in printed for name in names)
    assert args.out.with_suffix(".png").exists()
    for name in names[1:]:
        assert rows[name]["difference"] == pytest.approx(rows[name]["accuracy"] - rows["full"]["accuracy"])
        assert 0 <= rows[name]["held_out"]["outcome_right"] <= rows[name]["held_out"]["named"]

    assert (args.runs / "full" / "seed0" / "stage2" / "model" / "lora").exists()
    score = json.loads((args.runs / "no_stage_2" / "seed0" / "score.json").read_text())
    assert "stage1/model" in score["provenance"]["model"]
    blind_to_objects = FeatureCache(args.runs / "features_no_objects")
    assert len(blind_to_objects.videos) == 20
    assert not any(blind_to_objects[name].is_object.any() for name in blind_to_objects.videos)
    sees_objects = FeatureCache(args.features)
    assert any(sees_objects[name].is_object.any() for name in sees_objects.videos)

    made = times_of_weights(args.runs)
    ablations.ablate(args)
    assert times_of_weights(args.runs) == made
    assert json.loads(args.out.read_text())["variants"] == rows
    args.seed = 4
    with pytest.raises(VidReasonError, match="other settings"):
        ablations.ablate(args)


def times_of_weights(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_synthetic_data_are(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "DATA", recipe[0] / "world" / "train")
    ablations.write_data(tmp_path)
    types = {row["type"] for row in read_lines(tmp_path / "no_synthetic_data.jsonl")}
    assert "why" in types and not types & {"explain", "predict"}
    synthetic = set()
    for kind in ("explain", "predict", "held-out"):
        synthetic.update(language.QUESTIONS[kind])
    before = {row["question"] for row in read_lines(ablations.DATA / "text.jsonl")}
    after = {row["question"] for row in read_lines(tmp_path / "no_synthetic_text.jsonl")}
    assert synthetic & before and after and not synthetic & after


def test_what_world_knowledge_is():
    text = {"context": "there is a red pin and a blue balloon .", "question": "why ?", "answer": "it popped"}
    assert ablations.mentions_held_out_pair(text)
    assert not ablations.mentions_held_out_pair({**text, "context": "there is a red pin and a blue egg ."})
    for index in range(0, 60, 6):
        with_knowledge, _ = story_of((0, index, True))
        without, _ = story_of((0, index, False))
        assert ablations.mentions_held_out_pair({"context": with_knowledge})
        assert not ablations.mentions_held_out_pair({"context": without})
