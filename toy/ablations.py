"""§5.3 of the paper on the toy world: the recipe without each of its parts, retrained and scored.

    python -m toy.ablations [--seeds 3] [--clips 200] [--processes 2]

What a part changes is trained again: an LLM once, stages 1 and 2 once per seed. Runs are short (STEPS), so compare a
row with "full" here, not with the shipped weights, which were trained for longer. Encoder and SAM are the shipped ones
in every variant, trained with labels. Seeds vary stages 1 and 2, not the LLM; intervals resample videos, not seeds, and
stand beside the accuracy over all questions only: what a single type shows was observed, not shown. All of it lies in
runs/ablations; a killed run goes on. The table is printed, and written with a plot to toy/ablations.json and .png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.features import encode_videos
from data.program import ROOT, TOY_MODEL, Parser, guarded, positive, write_json
from evaluation.score import interval
from toy import language, world
from toy.exam import toy_questions
from toy.videos import videos_in
from vidreason import VidReasonError, read_config

DATA = ROOT / "runs" / "world" / "train"
STEPS, VIDEOS, STORIES = {"llm": 3400, 1: 500, 2: 120}, 3000, 16000
SYNTHETIC = ("explain", "predict")  # types of question: the two parts of Causal-Vid-Instruct
VARIANTS = {  # → how each differs from the full recipe
    "full": {},
    "w/o fusion core": {"config": {"fusion_layers": 0, "num_queries": 1}},  # mean of Z_vision and a linear layer
    "w/o object features": {"config": {"masks_per_keyframe": 0}},
    "w/o stage 2": {"stages": 1},
    "w/o synthetic data": {"without": SYNTHETIC},  # nor as text alone
    "smaller LLM": {"llm": ["--width", "64", "--layers", "2"]},
    "w/o time embedding": {"config": {"time_embedding": False}},  # the paper as printed
    "w/o world knowledge": {"llm": ["--no_knowledge"]},
}
SHOWN = ("why", "explain", "predict", "held-out", "direction", "order", "first")  # columns of the table
# and "outcome of pair": of the held-out pairs that an answer names, over all seeds, how often its outcome is right


def call(*command):
    """One program with one thread; its own lines are of no interest unless it fails."""
    command, quiet = [*map(str, command)], {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **quiet}
    )
    if done.returncode:
        raise VidReasonError(f"{' '.join(command)}: {done.stderr.strip()[-400:]} (ablations): mend it and repeat")


def slug(name):
    return name.replace("w/o ", "no_").replace(" ", "_")


def mentions_held_out_pair(row):
    words = set(" ".join(row.get(k, "") for k in ("context", "question", "answer")).split())
    return any(pair <= words for pair in world.HELD_OUT)


def write_data(runs):
    """Stage 2's data for the variants that go without a part of it."""
    # both parts of Causal-Vid-Instruct as they are asked, "held-out" being a "predict" about certain pairs
    synthetic = {question for kind in (*SYNTHETIC, "held-out") for question in language.QUESTIONS[kind]}
    samples, texts = ((DATA / name).read_text().splitlines() for name in ("samples.jsonl", "text.jsonl"))
    kept = {
        "no_synthetic_data": [line for line in samples if json.loads(line)["type"] not in SYNTHETIC],
        "no_synthetic_text": [line for line in texts if json.loads(line)["question"] not in synthetic],
        # world knowledge: what kinds do to each other, and stories about the pairs that no video shows
        "no_world_knowledge": [t for t in texts if "context" in t and not mentions_held_out_pair(json.loads(t))],
    }
    for name, lines in kept.items():
        (runs / f"{name}.partial").write_text("\n".join(lines) + "\n")
        (runs / f"{name}.partial").rename(runs / f"{name}.jsonl")


def prepare(runs, name):
    """The variant's frozen parts: the shipped encoder and SAM, and an LLM, which is trained unless it is there."""
    change, frozen = VARIANTS[name], runs / slug(name) / "frozen"
    frozen.mkdir(parents=True, exist_ok=True)
    made = runs / (slug(name) if "llm" in change else "full") / "llm"
    if "llm" in change or name == "full":
        if not (made / "llm" / "tokenizer.json").exists():
            places = ["--runs", made / "log", "--weights", made, "--processes", 1, "--threads", 1]
            steps = ["--steps", STEPS["llm"], "--lookup_steps", STEPS["llm"] // 4, "--evaluate_every", STEPS["llm"]]
            call("-m", "toy.pretrain", "llm", *change.get("llm", ()), *steps, "--stories", STORIES, *places)
    config = {**vars(read_config(TOY_MODEL)), **change.get("config", {}), "llm": str(made / "llm")}
    config |= {part: str(TOY_MODEL / config[part]) for part in ("encoder_weights", "sam_weights")}
    write_json(frozen / "config.json", config)
    return frozen


def features(runs, name, args):
    """Folders of Z_vision: of the training videos, of the test clips."""
    if "masks_per_keyframe" in VARIANTS[name].get("config", {}):
        return runs / "features_no_objects", runs / "seen_no_objects"
    return (args.features or ROOT / "runs" / "features").resolve(), runs / "seen"


def look(runs, args):
    """Frozen work, once for all variants: Z_vision of every video, with objects and without."""
    clips = {r["video"] for r in toy_questions(args.seed, args.clips, runs / "clips", args.split)}
    rows = map(json.loads, (DATA / "samples.jsonl").read_text().splitlines())
    videos = sorted({row["video"] for row in rows})[:VIDEOS]
    for name in ("full", "w/o object features"):
        frozen, (train, test) = runs / slug(name) / "frozen", features(runs, name, args)
        for folder, names, out in ((DATA, videos, train), (runs / "clips", clips, test)):
            encode_videos(frozen, read_config(frozen), folder, names, out, args.processes)


def train_and_score(runs, name, seed, args):
    """Both stages of one variant and seed → its score file. What a killed run left is gone on with."""
    change, out, full = VARIANTS[name], runs / slug(name) / f"seed{seed}", runs / "full" / f"seed{seed}"
    score, (train_features, test_features) = out / "score.json", features(runs, name, args)
    if score.exists():
        return score
    common = ["--seed", seed, "--batch", 16, "--warmup", 30, "--save_every", 50, "--max_videos", VIDEOS]
    common += ["--videos", DATA, "--features", train_features, "--threads", 1, "--processes", 1]
    model = full / "stage1" / "model"
    if not change.keys() & {"stages", "without"}:  # the others share the full recipe's stage 1
        model, frozen = out / "stage1" / "model", runs / slug(name) / "frozen"
        data = ["--data", DATA / "captions.jsonl", "--model", frozen, "--output_dir", model.parent]
        call("train.py", "--stage", 1, "--max_steps", STEPS[1], *data, *common)
    if change.get("stages") != 1:
        samples, text = DATA / "samples.jsonl", DATA / "text.jsonl"
        if name == "w/o synthetic data":
            samples, text = runs / "no_synthetic_data.jsonl", runs / "no_synthetic_text.jsonl"
        if name == "w/o world knowledge":
            text = runs / "no_world_knowledge.jsonl"
        data = ["--data", samples, DATA / "captions.jsonl", text, "--init_from", model]
        call("train.py", "--stage", 2, "--max_steps", STEPS[2], "--output_dir", out / "stage2", *data, *common)
        model = out / "stage2" / "model"
    out.mkdir(parents=True, exist_ok=True)
    asked = ["--seed", args.seed, "--clips", args.clips, "--split", args.split, "--controls", "--processes", 1]
    asked += ["--videos", runs / "clips", "--features", test_features]
    call("evaluate.py", "toy", "--model", model, "--out", score, *asked)
    return score


def mean_row(scores, baseline=None):
    """One row of the table: means over seeds; intervals resample whole videos, seeds are averaged before."""
    correct, found = defaultdict(list), [json.loads(path.read_text()) for path in scores]
    for item in (i for score in found for i in score["items"]):
        correct[item["id"]].append(item["correct"])
    items = {i["id"]: i for i in found[0]["items"]}
    mean = {i: float(np.mean(hits)) for i, hits in correct.items()}
    videos = [items[i]["video"] for i in mean]
    row = {"accuracy": float(np.mean([*mean.values()])), "interval": interval(mean.values(), videos)}
    row["seeds"] = [score["summary"]["accuracy"] for score in found]
    by_type = defaultdict(list)
    for i, hit in mean.items():
        by_type[items[i]["type"]].append(hit)
    row["by_type"] = {kind: {"accuracy": float(np.mean(h)), "n": len(h)} for kind, h in sorted(by_type.items())}
    met = [score["summary"]["by_type"].get("held-out", {}) for score in found]  # a pair that is not named says nothing
    named = [(m["pair_named"], m["outcome_where_named"]) for m in met if m.get("pair_named")]
    row["held_out"] = {"named": sum(n for n, _ in named), "outcome_right": round(sum(n * share for n, share in named))}
    if baseline:
        gain = [hit - baseline[i] for i, hit in mean.items()]
        row |= {"difference": float(np.mean(gain)), "difference_interval": interval(gain, videos)}
    return row, mean


def print_rows(rows):
    heads = "".join(f"{kind:>10s}" for kind in SHOWN) + f"{'outcome of pair':>18s}"
    print(f"\n{'variant':22s}{'accuracy':>9s}{'95 % interval':>16s}{'against full':>26s}{heads}   seeds")
    for name, row in rows.items():
        between, gain = "{:.3f} – {:.3f}".format(*row["interval"]), ""
        if "difference" in row:
            gain = "{:+.3f} ({:+.3f} – {:+.3f})".format(row["difference"], *row["difference_interval"])
        cells = (row["by_type"].get(kind) for kind in SHOWN)  # few clips may lack a type
        cells = "".join(f"{cell['accuracy']:10.3f}" if cell else " " * 10 for cell in cells)
        seeds = " ".join(f"{one:.3f}" for one in row["seeds"])
        met = "{outcome_right} of {named}".format(**row["held_out"])
        print(f"{name:22s}{row['accuracy']:9.3f}{between:>16s}{gain:>26s}{cells}{met:>18s}   {seeds}")


def plot(rows, path):
    from matplotlib.figure import Figure

    names = list(rows)[::-1]
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    axis = figure.subplots()
    for y, name in enumerate(names):
        row = rows[name]
        axis.plot(row["interval"], [y, y], color="black", lw=1.5)
        axis.plot(row["accuracy"], y, "o", color="black", ms=8)
        axis.plot(row["seeds"], [y - 0.25] * len(row["seeds"]), "|", color="black", ms=7)
        axis.text(row["accuracy"], y + 0.18, f"{row['accuracy']:.3f}", ha="center", fontsize=9)
    axis.axvline(rows["full"]["accuracy"], ls=":", color="gray")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("accuracy over all questions: mean of seeds with 95 % interval; small strokes: single seeds")
    figure.savefig(path.with_suffix(".partial"), format="png", dpi=110)
    path.with_suffix(".partial").rename(path)


def ablate(args):
    """Train and score what is not there yet, --processes programs at a time; then the table."""
    runs, began, seeds = args.runs.resolve(), time.time(), range(args.seeds)
    if videos_in(DATA) < VIDEOS:  # train.py makes a smaller world when it finds none
        advice = "run `python -m toy.pretrain world`"
        raise VidReasonError(f"the toy world has fewer than {VIDEOS} videos ({DATA}): {advice}")
    runs.mkdir(parents=True, exist_ok=True)
    told = {"clips": args.clips, "split": args.split, "seed": args.seed, "steps": {str(k): n for k, n in STEPS.items()}}
    told |= {"videos": VIDEOS, "stories": STORIES}
    mark = runs / "settings.json"
    if mark.exists() and json.loads(mark.read_text()) != told:
        raise VidReasonError(f"its runs had other settings ({runs}): give another --runs, or remove it")
    write_json(mark, told)
    write_data(runs)
    later = [name for name in VARIANTS if VARIANTS[name].keys() & {"stages", "without"}]  # they use full's stage 1
    parts = ([name for name in VARIANTS if name not in later], later)
    rounds = [[(name, seed) for seed in seeds for name in part] for part in parts]
    with (
        ThreadPoolExecutor(args.processes) as pool,
        tqdm(total=len(VARIANTS) * (1 + args.seeds), desc="ablations") as bar,
    ):
        for _ in pool.map(lambda name: prepare(runs, name), VARIANTS):
            bar.update()
        look(runs, args)
        scores = defaultdict(list)
        for jobs in rounds:
            for (name, _), score in zip(
                jobs, pool.map(lambda job: train_and_score(runs, *job, args), jobs), strict=True
            ):
                scores[name].append(score)
                bar.update()
    rows, baseline = {}, None
    for name in VARIANTS:
        rows[name], mean = mean_row(scores[name], baseline)
        baseline = baseline or mean
    print_rows(rows)
    told |= {"seeds": args.seeds, "minutes_of_last_run": round((time.time() - began) / 60, 1)}
    out = args.out
    write_json(out, {"settings": told, "variants": rows})
    plot(rows, out.with_suffix(".png"))
    print(f"written: {out}, {out.with_suffix('.png')}")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--clips", type=positive, default=200, help="a fifth more show held-out pairs (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="which stream of clips (default 0)")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="val for choosing (default test)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count(), help="programs that run side by side")
    runs = ROOT / "runs" / "ablations"
    parser.add_argument("--runs", type=Path, default=runs, help="where the runs lie (default runs/ablations)")
    seen = "folder of Z_vision of the training videos (default runs/features)"
    parser.add_argument("--features", type=Path, help=seen)
    out = ROOT / "toy" / "ablations.json"
    table = "the table as .json; its plot lies beside it as .png (default toy/ablations.json)"
    parser.add_argument("--out", type=Path, default=out, help=table)
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must not be negative")
    ablate(args)


if __name__ == "__main__":
    guarded(main)
