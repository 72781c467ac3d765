"""§5.3 of the paper on the toy world: the recipe without each of its parts, retrained and scored.

    python -m toy.ablations [--seeds 3] [--clips 200] [--processes 2]

What a part changes is trained again: an LLM once, stages 1 and 2 once per seed. Runs are short (STEPS), so compare a
row with "full" here, not with the shipped weights, which were trained for longer. Encoder and SAM are the shipped ones
in every variant, trained with labels. Seeds vary stages 1 and 2, not the LLM; intervals resample videos, not seeds, and
stand beside the accuracy over all questions only: what a single type shows was observed, not shown. All of it lies in
runs/ablations; a killed run goes on. The table is printed, and written with a plot to toy/ablations.json and .png.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from data.features import encode_videos
from data.program import ROOT, TOY_MODEL, Parser, guarded, positive, print_columns, write_json
from evaluation.score import interval
from toy import language, world
from toy.exam import toy_questions
from toy.videos import videos_in
from vidreason import VidReasonError, read_config, write_aside

DATA = ROOT / "runs" / "world" / "train"
STEPS, VIDEOS, STORIES = {"llm": 3400, 1: 500, 2: 120}, 3000, 16000
SYNTHETIC = ("explain", "predict")  # types of question: the two parts of Causal-Vid-Instruct
NO_SYNTHETIC_DATA, NO_SYNTHETIC_TEXT = "no_synthetic_data.jsonl", "no_synthetic_text.jsonl"
NO_WORLD_KNOWLEDGE = "no_world_knowledge.jsonl"


@dataclass(frozen=True)
class Variant:
    """A row of the table: how it differs from the full recipe."""

    name: str
    config: dict = field(default_factory=dict)  # settings of the model
    llm_flags: tuple[str, ...] = ()  # of `python -m toy.pretrain llm`, for an LLM of its own
    samples: str | None = None  # file of questions for stage 2, written by write_data
    text: str | None = None  # file of texts for stage 2, written by write_data
    stages: int = 2

    @property
    def folder(self) -> str:
        return self.name.replace("w/o ", "no_").replace(" ", "_")

    @property
    def sees_objects(self) -> bool:
        return self.config.get("masks_per_keyframe") != 0

    @property
    def has_own_llm(self) -> bool:
        return self is FULL or bool(self.llm_flags)

    @property
    def has_own_stage_1(self) -> bool:
        """The others differ after stage 1 only, and go on from that of the full recipe."""
        return self.has_own_llm or bool(self.config)


FULL = Variant("full")
VARIANTS = [
    FULL,
    Variant("w/o fusion core", config={"fusion_layers": 0, "num_queries": 1}),  # mean of Z_vision and a linear layer
    Variant("w/o object features", config={"masks_per_keyframe": 0}),
    Variant("w/o stage 2", stages=1),
    Variant("w/o synthetic data", samples=NO_SYNTHETIC_DATA, text=NO_SYNTHETIC_TEXT),
    Variant("smaller LLM", llm_flags=("--width", "64", "--layers", "2")),
    Variant("w/o time embedding", config={"time_embedding": False}),  # the paper as printed
    Variant("w/o world knowledge", llm_flags=("--no_knowledge",), text=NO_WORLD_KNOWLEDGE),
]
SHOWN = ("why", "explain", "predict", "held-out", "direction", "order", "first")  # columns of the table
# and "outcome of pair": of the held-out pairs that an answer names, over all seeds, how often its outcome is right


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--clips", type=positive, default=200, help="a fifth more show held-out pairs (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="which stream of clips (default 0)")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="val for choosing (default test)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count(), help="programs that run side by side")
    runs = ROOT / "runs" / "ablations"
    parser.add_argument("--runs", type=Path, default=runs, help="where the runs lie (default runs/ablations)")
    features = "folder of Z_vision of the training videos (default runs/features)"
    parser.add_argument("--features", type=Path, help=features)
    out = ROOT / "toy" / "ablations.json"
    table = "the table as .json; its plot lies beside it as .png (default toy/ablations.json)"
    parser.add_argument("--out", type=Path, default=out, help=table)
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must not be negative")
    ablate(args)


def ablate(args):
    """Train and score what is not there yet, --processes programs at a time; then the table."""
    began = time.time()
    runs = args.runs.resolve()
    settings = {
        "clips": args.clips,
        "split": args.split,
        "seed": args.seed,
        "steps": {str(part): steps for part, steps in STEPS.items()},
        "videos": VIDEOS,
        "stories": STORIES,
    }
    claim(runs, settings)
    write_data(runs)
    scores = train_all(runs, args)

    rows, baseline = {}, None
    for variant in VARIANTS:
        rows[variant.name], accuracies = mean_row(scores[variant.name], baseline)
        baseline = baseline or accuracies
    print_rows(rows)
    minutes = round((time.time() - began) / 60, 1)
    settings |= {"seeds": args.seeds, "minutes_of_last_run": minutes}
    write_json(args.out, {"settings": settings, "variants": rows})
    picture = args.out.with_suffix(".png")
    plot(rows, picture)
    print(f"written: {args.out}, {picture}")


def claim(runs: Path, settings: dict):
    """Make the folder of runs, or go on in it. VidReasonError: no world to train on, or runs with other settings."""
    if videos_in(DATA) < VIDEOS:  # train.py makes a smaller world when it finds none
        advice = "run `python -m toy.pretrain world`"
        raise VidReasonError(f"the toy world has fewer than {VIDEOS} videos ({DATA}): {advice}")
    runs.mkdir(parents=True, exist_ok=True)
    mark = runs / "settings.json"
    if mark.exists() and json.loads(mark.read_text()) != settings:
        raise VidReasonError(f"its runs had other settings ({runs}): give another --runs, or remove it")
    write_json(mark, settings)


# --------------------------------------------------------------------------- data of stage 2


def write_data(runs: Path):
    """Stage 2's data for the variants that go without a part of it."""
    samples = (DATA / "samples.jsonl").read_text().splitlines()
    write_lines(runs / NO_SYNTHETIC_DATA, [line for line in samples if json.loads(line)["type"] not in SYNTHETIC])

    texts = (DATA / "text.jsonl").read_text().splitlines()
    synthetic = set()
    for kind in (*SYNTHETIC, "held-out"):  # "held-out" is a "predict" about certain pairs
        synthetic.update(language.QUESTIONS[kind])
    write_lines(runs / NO_SYNTHETIC_TEXT, [line for line in texts if json.loads(line)["question"] not in synthetic])
    write_lines(runs / NO_WORLD_KNOWLEDGE, [line for line in texts if is_without_knowledge(json.loads(line))])


def is_without_knowledge(text: dict) -> bool:
    """World knowledge: what kinds do to each other, and stories about the pairs that no video shows."""
    return "context" in text and not mentions_held_out_pair(text)


def mentions_held_out_pair(text: dict) -> bool:
    parts = [text.get(part, "") for part in ("context", "question", "answer")]
    words = set(" ".join(parts).split())
    return any(pair <= words for pair in world.HELD_OUT)


def write_lines(path: Path, lines: list[str]):
    text = "\n".join(lines) + "\n"
    write_aside(path, lambda aside: aside.write_text(text))


# --------------------------------------------------------------------------- training


def train_all(runs: Path, args) -> dict[str, list[Path]]:
    """-> the score files of each variant, one per seed"""
    scores = defaultdict(list)
    first = [variant for variant in VARIANTS if variant.has_own_stage_1]
    then = [variant for variant in VARIANTS if not variant.has_own_stage_1]  # they need the full recipe's
    total = len(VARIANTS) * (1 + args.seeds)
    with ThreadPoolExecutor(args.processes) as pool, tqdm(total=total, desc="ablations") as bar:
        for _ in pool.map(lambda variant: prepare(runs, variant), VARIANTS):
            bar.update()
        look(runs, args)
        for variants in (first, then):
            jobs = [(variant, seed) for seed, variant in itertools.product(range(args.seeds), variants)]
            made = pool.map(lambda job: train_and_score(runs, *job, args), jobs)
            for (variant, _), score in zip(jobs, made, strict=True):
                scores[variant.name].append(score)
                bar.update()
    return scores


def call(*command):
    """One program with one thread; its own lines are of no interest unless it fails."""
    command = [str(word) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise VidReasonError(f"{' '.join(command)}: {done.stderr.strip()[-400:]} (ablations): mend it and repeat")


def prepare(runs: Path, variant: Variant):
    """The variant's frozen parts: the shipped encoder and SAM, and an LLM, which is trained unless it is there."""
    made = llm_folder(runs, variant)
    if variant.has_own_llm and not (made / "llm" / "tokenizer.json").exists():
        train_llm(made, variant)
    frozen = runs / variant.folder / "frozen"
    frozen.mkdir(parents=True, exist_ok=True)
    config = {**vars(read_config(TOY_MODEL)), **variant.config, "llm": str(made / "llm")}
    for part in ("encoder_weights", "sam_weights"):
        config[part] = str(TOY_MODEL / config[part])
    write_json(frozen / "config.json", config)


def llm_folder(runs: Path, variant: Variant) -> Path:
    owner = variant if variant.has_own_llm else FULL
    return runs / owner.folder / "llm"


def train_llm(folder: Path, variant: Variant):
    steps = STEPS["llm"]
    command = ["-m", "toy.pretrain", "llm", *variant.llm_flags]
    command += ["--steps", steps, "--lookup_steps", steps // 4, "--evaluate_every", steps, "--stories", STORIES]
    command += ["--runs", folder / "log", "--weights", folder, "--processes", 1, "--threads", 1]
    call(*command)


def look(runs: Path, args):
    """Frozen work, once for all variants: Z_vision of every video, with objects and without."""
    clips = {record["video"] for record in toy_questions(args.seed, args.clips, runs / "clips", args.split)}
    samples = (DATA / "samples.jsonl").read_text().splitlines()
    videos = sorted({json.loads(line)["video"] for line in samples})[:VIDEOS]
    without_objects = [variant for variant in VARIANTS if not variant.sees_objects]
    for variant in [FULL, *without_objects]:
        frozen = runs / variant.folder / "frozen"
        config = read_config(frozen)
        train_features, test_features = features(runs, variant, args)
        encode_videos(frozen, config, DATA, videos, train_features, args.processes)
        encode_videos(frozen, config, runs / "clips", clips, test_features, args.processes)


def features(runs: Path, variant: Variant, args) -> tuple[Path, Path]:
    """Folders of Z_vision: of the training videos, of the test clips."""
    if not variant.sees_objects:
        return runs / "features_no_objects", runs / "seen_no_objects"
    shared = args.features or ROOT / "runs" / "features"
    return shared.resolve(), runs / "seen"


def train_and_score(runs: Path, variant: Variant, seed: int, args) -> Path:
    """Both stages of one variant and seed -> its score file. What a killed run left is gone on with."""
    out = runs / variant.folder / f"seed{seed}"
    score = out / "score.json"
    if score.exists():
        return score
    train_features, test_features = features(runs, variant, args)
    common = ["--seed", seed, "--batch", 16, "--warmup", 30, "--save_every", 50, "--max_videos", VIDEOS]
    common += ["--videos", DATA, "--features", train_features, "--threads", 1, "--processes", 1]

    if variant.has_own_stage_1:
        model = train_stage_1(out / "stage1", runs / variant.folder / "frozen", common)
    else:
        model = runs / FULL.folder / f"seed{seed}" / "stage1" / "model"
    if variant.stages == 2:
        model = train_stage_2(out / "stage2", model, runs, variant, common)

    out.mkdir(parents=True, exist_ok=True)
    command = ["evaluate.py", "toy", "--model", model, "--out", score]
    command += ["--seed", args.seed, "--clips", args.clips, "--split", args.split, "--controls", "--processes", 1]
    command += ["--videos", runs / "clips", "--features", test_features]
    call(*command)
    return score


def train_stage_1(out: Path, frozen: Path, common: list) -> Path:
    data = ["--data", DATA / "captions.jsonl", "--model", frozen, "--output_dir", out]
    call("train.py", "--stage", 1, "--max_steps", STEPS[1], *data, *common)
    return out / "model"


def train_stage_2(out: Path, start: Path, runs: Path, variant: Variant, common: list) -> Path:
    samples = runs / variant.samples if variant.samples else DATA / "samples.jsonl"
    text = runs / variant.text if variant.text else DATA / "text.jsonl"
    data = ["--data", samples, DATA / "captions.jsonl", text, "--init_from", start]
    call("train.py", "--stage", 2, "--max_steps", STEPS[2], "--output_dir", out, *data, *common)
    return out / "model"


# --------------------------------------------------------------------------- the table


def mean_row(scores: list[Path], baseline: dict[str, float] | None = None) -> tuple[dict, dict[str, float]]:
    """One row of the table: means over seeds; intervals resample whole videos, seeds are averaged before.

    baseline: accuracy of each question in the row to compare with -> the row, accuracy of each question
    """
    results = [json.loads(path.read_text()) for path in scores]
    items = {item["id"]: item for item in results[0]["items"]}
    hits = defaultdict(list)  # question -> right or not, of each seed
    for result in results:
        for item in result["items"]:
            hits[item["id"]].append(item["correct"])
    accuracies = {question: float(np.mean(of_seeds)) for question, of_seeds in hits.items()}
    videos = [items[question]["video"] for question in accuracies]

    by_type = defaultdict(list)
    for question, accuracy in accuracies.items():
        by_type[items[question]["type"]].append(accuracy)
    row = {
        "accuracy": float(np.mean([*accuracies.values()])),
        "interval": interval(accuracies.values(), videos),
        "seeds": [result["summary"]["accuracy"] for result in results],
        "by_type": {kind: mean_and_count(by_type[kind]) for kind in sorted(by_type)},
        "held_out": held_out_outcomes(results),
    }
    if baseline:
        gains = [accuracy - baseline[question] for question, accuracy in accuracies.items()]
        row["difference"] = float(np.mean(gains))
        row["difference_interval"] = interval(gains, videos)
    return row, accuracies


def mean_and_count(values: list[float]) -> dict:
    return {"accuracy": float(np.mean(values)), "n": len(values)}


def held_out_outcomes(results: list[dict]) -> dict[str, int]:
    """Over all seeds: how many held-out pairs were named, and how often the outcome was right then."""
    named, right = 0, 0.0
    for result in results:
        held_out = result["summary"]["by_type"].get("held-out", {})
        if held_out.get("pair_named"):  # else there is no share
            named += held_out["pair_named"]
            right += held_out["pair_named"] * held_out["outcome_where_named"]
    return {"named": named, "outcome_right": round(right)}


def print_rows(rows: dict[str, dict]):
    heads = ["variant", "accuracy", "95 % interval", "against full", *SHOWN, "outcome of pair", "   seeds"]
    widths = [22, 9, 16, 26, *(10 for _ in SHOWN), 18, 0]
    print()
    print_columns(heads, [cells_of(name, row) for name, row in rows.items()], widths)


def cells_of(name: str, row: dict) -> list[str]:
    """A line of the table; few clips may lack a type of question."""
    difference = ""
    if "difference" in row:
        difference = "{:+.3f} ({:+.3f} – {:+.3f})".format(row["difference"], *row["difference_interval"])
    cells = [name, f"{row['accuracy']:.3f}", "{:.3f} – {:.3f}".format(*row["interval"]), difference]
    for kind in SHOWN:
        scores = row["by_type"].get(kind)
        cells.append(f"{scores['accuracy']:.3f}" if scores else "")
    seeds = " ".join(f"{accuracy:.3f}" for accuracy in row["seeds"])
    return [*cells, "{outcome_right} of {named}".format(**row["held_out"]), f"   {seeds}"]


def plot(rows: dict[str, dict], path: Path):
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
    write_aside(path, lambda aside: figure.savefig(aside, format="png", dpi=110))


if __name__ == "__main__":
    guarded(main)
