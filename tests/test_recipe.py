"""The whole recipe from nothing, tiny: stage 0 → 1 → 2 → evaluate → infer, each as a user would call it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.features import FeatureCache
from toy import ablations, language, world
from toy.llm import story_of
from vidreason import VidReasonError

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


def test_ablations(recipe, tmp_path, monkeypatch, capsys):
    """Four of the variants, tiny, on the shipped LLM: a row each, nothing trained twice, no objects without objects."""
    runs, out = tmp_path / "ablations", tmp_path / "table.json"
    shutil.copytree(ROOT / "toy" / "weights" / "llm", runs / "full" / "llm" / "llm")
    kept = ("full", "w/o fusion core", "w/o object features", "w/o stage 2")
    monkeypatch.setattr(ablations, "VARIANTS", {name: ablations.VARIANTS[name] for name in kept})
    monkeypatch.setattr(ablations, "DATA", recipe[0] / "world" / "train")
    monkeypatch.setattr(ablations, "STEPS", {1: 3, 2: 2})
    monkeypatch.setattr(ablations, "VIDEOS", 20)
    where = {"runs": runs, "features": tmp_path / "features", "out": out}
    args = SimpleNamespace(**where, seeds=1, seed=3, clips=3, split="val", processes=2)
    ablations.ablate(args)
    shown, made = capsys.readouterr().out, {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")}
    rows = json.loads(out.read_text())["variants"]
    assert list(rows) == list(kept) and all(name in shown for name in kept) and out.with_suffix(".png").exists()
    for name in kept[1:]:
        assert rows[name]["difference"] == pytest.approx(rows[name]["accuracy"] - rows["full"]["accuracy"])
        assert 0 <= rows[name]["held_out"]["outcome_right"] <= rows[name]["held_out"]["named"]
    assert (runs / "full" / "seed0" / "stage2" / "model" / "lora").exists()
    assert (
        "stage1/model" in json.loads((runs / "no_stage_2" / "seed0" / "score.json").read_text())["provenance"]["model"]
    )
    z = FeatureCache(runs / "features_no_objects")
    assert len(z.videos) == 20 and not any(z[name].is_object.any() for name in z.videos)
    z = FeatureCache(tmp_path / "features")
    assert any(z[name].is_object.any() for name in z.videos)
    ablations.ablate(args)
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")} == made
    assert json.loads(out.read_text())["variants"] == rows
    with pytest.raises(VidReasonError, match="other settings"):
        ablations.ablate(SimpleNamespace(**where, seeds=1, seed=4, clips=3, split="val", processes=2))


def test_what_synthetic_data_are(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "DATA", recipe[0] / "world" / "train")
    ablations.write_data(tmp_path)
    kept = [json.loads(x) for x in (tmp_path / "no_synthetic_data.jsonl").read_text().splitlines()]
    questions = lambda path: [json.loads(line)["question"] for line in path.read_text().splitlines()]
    texts, before = questions(tmp_path / "no_synthetic_text.jsonl"), questions(ablations.DATA / "text.jsonl")
    asked = {q for kind in ("explain", "predict", "held-out") for q in language.QUESTIONS[kind]}
    assert not {"explain", "predict"} & {row["type"] for row in kept} and "why" in {row["type"] for row in kept}
    assert texts and not asked & {*texts} and asked & {*before}


def test_what_world_knowledge_is():
    told = {"context": "there is a red pin and a blue balloon .", "question": "why ?", "answer": "it popped"}
    assert ablations.mentions_held_out_pair(told)
    assert not ablations.mentions_held_out_pair({**told, "context": "there is a red pin and a blue egg ."})
    story = [story_of((0, i, False))[0].split() for i in range(0, 60, 6)]
    assert not any(pair <= set(words) for words in story for pair in world.HELD_OUT)
    with_knowledge = [story_of((0, i, True))[0].split() for i in range(0, 60, 6)]
    assert all(any(pair <= set(words) for pair in world.HELD_OUT) for words in with_knowledge)
