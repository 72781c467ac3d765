"""A fresh checkout: one command makes what it needs, survives a kill, and says what to type next."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toy.videos import make_training_world, make_videos, videos_in
from train import DEFAULTS, Settings, complete, recipe, toy_work

ROOT = Path(__file__).resolve().parent.parent
TINY = "--max_steps 2 --batch 4 --processes 1"


def fresh_copy(to):
    """What a clone holds: no runs."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__", ".*_cache"))
    return to


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return fresh_copy(tmp_path_factory.mktemp("fresh") / "vidreason")


def shell(command, folder, **kwargs):
    """Type a command in `folder`, with this Python's environment active -> CompletedProcess"""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, **kwargs
    )


def typed(command, folder):
    done = shell(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def next_commands(done):
    """The lines that a run ends with, each a command."""
    return [line.strip() for line in done.stdout.split("Next:\n")[1].splitlines()]


@pytest.fixture(scope="module")
def first(clone):
    """Stage 1 in the fresh clone, and stage 2 as stage 1 printed it."""
    stage1 = typed(f"torchrun train.py --stage 1 --max_videos 6 {TINY}", clone)
    return stage1, typed(next_commands(stage1)[0], clone)


def test_from_nothing_to_an_answer_by_what_is_printed(clone, first):
    one, two = first
    said, made = one.stdout.splitlines(), clone / "runs" / "world" / "train"
    assert said[0] == "stage 1 in the toy world, short recipe: 6 videos, 2 steps"
    assert "makes 6 videos (0.3 MB): runs/world/train" in one.stdout and "minutes to the first loss" in one.stdout
    assert sum(path.stat().st_size for path in made.glob("*.mp4")) == pytest.approx(0.34e6, rel=0.1)
    for bar in ("texts", "train videos", "videos → Z_vision", "stage 1"):
        assert f"{bar}: 100%" in one.stderr
    stage2, answer1 = next_commands(one)
    assert stage2 == "torchrun train.py --stage 2 --max_videos 6 --processes 1 --max_steps 2 --batch 4"
    assert "makes" not in two.stdout and "then Z_vision" not in two.stdout and "stage 2: 100%" in two.stderr
    (answer2,) = next_commands(two)
    for stage, answer in ((1, answer1), (2, answer2)):
        assert re.fullmatch(rf"python infer\.py toy/clips/\S+\.mp4 \S.* --model runs/stage{stage}/model", answer)
        assert typed(answer, clone).stdout.strip()


def test_what_is_printed_follows_the_folder_that_was_given(clone, tmp_path):
    """From another directory, by python, into a folder with a blank in its name; data of one's own."""
    videos = clone / "toy" / "clips"
    (tmp_path / "data.jsonl").write_text('{"video": "red-egg-breaks-0.mp4", "caption": "a red ball"}')
    given = f"--data data.jsonl --videos {videos} --features features {TINY}"
    done = typed(f"python {clone / 'train.py'} --stage 1 {given} --output_dir 'my runs/a'", tmp_path)
    stage2, _ = next_commands(done)
    assert f"--videos {videos} --features features --processes 1 --data QUESTIONS.jsonl" in stage2
    assert "--init_from 'my runs/a/model' --output_dir 'my runs/a-stage2'" in stage2
    (answer,) = next_commands(typed(f"{stage2} {TINY}".replace("QUESTIONS", "data"), tmp_path))
    assert (tmp_path / "my runs" / "a-stage2" / "model" / "lora").exists()
    assert f"{videos / 'red-egg-breaks-0.mp4'}" in answer and typed(answer, tmp_path).stdout.strip()


def test_stage_2_of_another_fusion_core_is_another_run(clone, first):
    """It is refused where the old one lies, and the printed command leads elsewhere."""
    done = typed(f"python train.py --stage 1 --max_videos 6 {TINY} --lr 2e-3 --restart", clone)
    stage2, _ = next_commands(done)
    assert stage2.endswith(" --output_dir runs/stage2-again")
    refused = shell(stage2.replace(" --output_dir runs/stage2-again", ""), clone)
    assert refused.returncode == 2 and "this is another run: start was" in refused.stderr


def test_two_processes_make_one_world(tmp_path):
    clone = fresh_copy(tmp_path / "clone")
    done = typed(f"torchrun --nproc_per_node 2 train.py --stage 1 --max_videos 4 {TINY}", clone)
    assert videos_in(clone / "runs" / "world" / "train") == 4 and "2 × cpu" in done.stdout
    assert done.stdout.count("makes 4 videos") == done.stderr.count("train videos: 100%") == 1
    assert next_commands(done)[0].startswith("torchrun --nproc_per_node 2 train.py --stage 2 ")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_world_half_made_is_not_taken_for_whole(tmp_path):
    """Killed between two videos; the same command goes on, to the bytes of a world made in one go."""
    clone = fresh_copy(tmp_path / "clone")
    folder, command = clone / "runs" / "world" / "train", f"train.py --stage 1 --max_videos 16 {TINY}"
    process = subprocess.Popen([sys.executable, *command.split()], cwd=clone, stderr=subprocess.DEVNULL)
    while len(kept := [*folder.glob("train-*-?????.mp4")]) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert videos_in(folder) == 0 and not (folder / "samples.jsonl").exists()
    typed(f"python {command}", clone)
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    make_training_world(tmp_path / "whole", 16, 2)
    whole = contents(tmp_path / "whole")
    assert contents(folder) == whole and len(whole) == 16 + 4  # captions, samples, text and the lock


def test_a_small_world_grows_into_a_larger_one(tmp_path):
    make_training_world(tmp_path / "grown", 2, 2)
    small = (tmp_path / "grown" / "captions.jsonl").read_text()
    make_training_world(tmp_path / "grown", 5, 2)
    make_training_world(tmp_path / "grown", 3, 2)  # is there
    make_videos(tmp_path / "full", "train", 0, 5, 2)
    assert (tmp_path / "full" / "frames.npy").exists() and not (tmp_path / "grown" / "frames.npy").exists()
    for path in (tmp_path / "full").glob("*.[mj]*"):
        assert path.read_bytes() == (tmp_path / "grown" / path.name).read_bytes()
    assert (tmp_path / "grown" / "captions.jsonl").read_text().startswith(small) and videos_in(tmp_path / "grown") == 5


def test_which_recipe(tmp_path, monkeypatch):
    """It is the number of videos that decides, and the first line says it."""
    monkeypatch.setattr("train.TOY_DATA", tmp_path)
    assert "short recipe: 64 videos, 4 steps" in toy_work(complete(Settings(max_videos=64, epochs=2)), 0, 0)

    def sizes(**given):
        settings = complete(Settings(**given))
        return settings.max_videos, settings.max_steps

    short, full = sizes(), (8000, 1500)
    assert short[0] < 8000 and sizes(max_videos=7) == (7, short[1]) and sizes(max_videos=8000) == full
    assert sizes(data=["mine.jsonl"], videos=".") == full
    (tmp_path / "captions.jsonl").write_text("\n" * 8000)
    assert sizes() == full and sizes(stage=2, init_from="x") == full and recipe(Settings(preset="small")) == "paper"


@pytest.mark.parametrize("obstacle", ["full", "a file"])
def test_a_world_that_cannot_be_written_is_one_line(tmp_path, obstacle):
    """A disk that is full says what a limit on the size of files says: a write fails."""
    clone = fresh_copy(tmp_path / "clone")
    if obstacle == "a file":
        (clone / "runs").mkdir()
        (clone / "runs" / "world").write_text("")
    limit = "ulimit -f 20; " if obstacle == "full" else ""
    done = shell(f"bash -c '{limit}python train.py --stage 1 --max_videos 4 {TINY}'", clone)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: cannot write the toy world: ") and "make room there, or give your own --data" in last
    assert videos_in(clone / "runs" / "world" / "train") == 0


def test_stage_2_first_names_stage_1(tmp_path):
    clone = fresh_copy(tmp_path / "clone")
    done = shell("python train.py --stage 2", clone)
    assert done.returncode == 2 and "run `python train.py --stage 1` first" in done.stderr
    assert not (clone / "runs").exists()
    done = shell(f"python train.py --stage 2 --init_from {tmp_path}", clone)
    assert done.returncode == 2 and "no config.json to read" in done.stderr and not (clone / "runs").exists()


def test_stage_0_says_which_world_it_needs(tmp_path):
    make_training_world(tmp_path / "world" / "train", 1, 1)
    done = shell(f"python -m toy.pretrain sam --runs {tmp_path} --weights {tmp_path / 'weights'}", ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: no arrays for stage 0") and len(done.stderr) < 300


def test_the_plan_of_a_fresh_clone(tmp_path):
    """It names the short recipe's own numbers, and those of the presets that need no toy world."""
    clone = fresh_copy(tmp_path / "clone")
    plan = typed("python train.py --plan", clone).stdout
    one, two = DEFAULTS["short", 1], DEFAULTS["short", 2]
    assert f"optimiser steps {one['max_steps']:,} {two['max_steps']:,}" in " ".join(plan.split())
    for stage, short in ((1, one), (2, two)):
        recipe = f"short recipe: {short['max_videos']} videos, {short['max_steps']} steps"
        assert f"stage {stage} in the toy world, {recipe}" in plan
    assert f"makes {one['max_videos']} videos" in plan and plan.count("makes") == 1
    for preset in ("small", "paper"):
        plan = typed(f"python train.py --preset {preset} --plan", clone).stdout
        assert "toy world" not in plan and "optimiser steps" in plan
    assert not (clone / "runs").exists()
