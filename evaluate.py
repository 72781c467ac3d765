"""Score answers: a benchmark's questions, its own protocol, controls beside every number.

    python evaluate.py toy --seed 7 --clips 200 [--model DIR] [--out FILE]           # fresh clips of the toy world
    python evaluate.py toy --seed 13 --clips 200 --summary toy/results.json          # toy/README's table, to keep
    python evaluate.py nextqa --annotations val.csv --videos DIR --model DIR         # our model on a benchmark
    python evaluate.py nextqa --annotations val.csv --predictions result.json        # another system's replies
    python evaluate.py compare A.json B.json                                         # two result files, paired

Columns: "accuracy" counts everything that is missing, unreadable or cannot be parsed as wrong. "blind" asks the same
without video, "black" shows a black one, "shuffled" the frames in random order, "one frame" the middle frame in every
place: what a control still gets right need not be seen in the video, or not in its order. "chance" guesses among the
options, "majority" always gives the commonest answer of the question's type. Intervals resample whole videos; they know
nothing of what another training run would have given.

The toy's vision was trained with labels (TOY_VISION), so its table measures fusion, language and reasoning on top of
that. A judge (--judge_url) sees no frame: it compares an answer with the reference.

A killed run goes on when the same command is given again, if it has --out; its parts lie beside that file until then.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import hashlib
import json
import platform
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.benchmarks import BENCHMARKS, Benchmark, as_asked, owners_of_formats, read_predictions
from data.program import TOY_MODEL, Parser, guarded, positive, sha256, write_json
from data.records import Sample
from evaluation.judge import JUDGE_AXES, judge
from evaluation.people import human_sheet, read_rankings
from evaluation.replies import CONTROLS, evaluate_model
from evaluation.score import compare, print_comparison, print_table, read_items, score_predictions
from evaluation.words import open_ended, wups
from toy.exam import TOY, keep_table, read_tables
from vidreason import VidReason, VidReasonError


def known_benchmarks() -> dict[str, Benchmark]:
    """All that the command line may name."""
    return {TOY.name: TOY, **BENCHMARKS}


# --------------------------------------------------------------------------- where numbers come from


def origin_of(args: Namespace, benchmark: Benchmark, model: VidReason | None = None) -> dict:
    """What a reader needs to reproduce the numbers, and what a run that goes on must share with the killed one."""
    libraries = ("torch", "transformers", "peft", "segment-anything", "numpy", "av")
    origin = {"benchmark": benchmark.name, "python": platform.python_version()}
    origin["versions"] = {name: version(name) for name in libraries}
    for kind in ("annotations", "predictions"):
        origin[kind] = {str(path): sha256(path) for path in getattr(args, kind, None) or ()}
    for name in ("seed", "clips", "split", "protocol", "controls", "limit", "format", "allow_missing", "batch"):
        if hasattr(args, name):
            origin[name] = getattr(args, name)
    for name in ("videos", "features"):
        if getattr(args, name, None):
            origin[name] = str(getattr(args, name))
    if model:
        origin |= origin_of_model(args.model, model, benchmark.prompts)
    return origin


def origin_of_model(directory: Path, model: VidReason, prompts: dict[str, str]) -> dict:
    """What was asked, and how: the model's settings, the prompts, and a hash of every file of weights."""
    config = model.config
    files = set(directory.rglob("*.safetensors"))
    for name in (config.encoder_weights, config.sam_weights, config.llm):  # parts that lie elsewhere
        part = Path(directory, name)
        if part.is_file():
            files.add(part)
        else:
            files.update(part.rglob("*.safetensors"))

    clips, frames = config.num_clips, config.frames_per_clip
    return {
        "model": str(directory),
        "config": asdict(config),
        "prompts": prompts,
        "frames": {"clips": clips, "frames_per_clip": frames, "total": clips * frames},
        "weights_sha256": {os.path.relpath(file, directory): sha256(file) for file in sorted(files)},
    }


def parts_of(out: Path | None, origin: dict) -> AbstractContextManager:
    """Where a run keeps what it has so far: beside --out, else in a folder that goes when it ends."""
    if not out:
        return tempfile.TemporaryDirectory()
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(exist_ok=True)
    mark = parts / "origin.json"
    now = json.loads(json.dumps(origin))
    then = json.loads(mark.read_text()) if mark.exists() else now
    if then != now:
        other = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        raise VidReasonError(f"parts of another run, which differs in {', '.join(other)} ({parts}): remove it first")
    write_json(mark, origin)
    return nullcontext(parts)


# --------------------------------------------------------------------------- replies, ours or another system's


def limited(benchmark: Benchmark, samples: list[Sample], limit: int | None) -> list[Sample]:
    """--limit questions, by hash: a fair sample, and a larger number only adds to it. All of a line's or none."""
    if not limit:
        return samples
    lines = defaultdict(list)
    for i, sample in enumerate(samples):
        lines[benchmark.line_of(sample)].append(i)

    kept = []
    for line in sorted(lines, key=digest):
        if len(kept) >= limit:
            break
        kept += lines[line]
    return [samples[i] for i in sorted(kept)]


def digest(name: str) -> bytes:
    """A hash, to order by."""
    return hashlib.sha256(name.encode()).digest()


def load_model(directory: Path) -> VidReason:
    """The model in bf16 on a GPU if there is one, else in fp32."""
    if torch.cuda.is_available():
        return VidReason.load(directory, "cuda", torch.bfloat16)
    return VidReason.load(directory, "cpu", torch.float32)


def run_model(args: Namespace, benchmark: Benchmark) -> tuple[dict, list[dict], dict]:
    """Our model's replies -> (summary, items, origin)."""
    model = load_model(args.model)
    everything = [] if benchmark.exam else benchmark.read(args.annotations, args.videos)
    origin = origin_of(args, benchmark, model)
    with parts_of(args.out, origin) as work:
        work = Path(work)
        if benchmark.exam:
            args.videos = args.videos or work / "clips"
            summary, items = benchmark.exam(args, model, work)
        else:
            samples = limited(benchmark, everything, args.limit)
            summary, items = evaluate_model(args, benchmark, model, samples, work, args.protocol)
            summary["skipped"] = len(everything) - len(samples)
    return summary, items, origin


def run_predictions(args: Namespace, benchmark: Benchmark) -> tuple[dict, list[dict], dict]:
    """Another system's replies under our protocol -> (summary, items, origin): no model runs."""
    everything = benchmark.read(args.annotations)
    samples = limited(benchmark, everything, args.limit)
    args.format = args.format or benchmark.name
    formats = owners_of_formats()
    if args.format not in formats:
        choose = ", ".join(formats)
        raise VidReasonError(f"{args.format} has no result format of its own (--format): choose {choose}")

    note = ""
    if benchmark.replies_hold_questions and args.format in benchmark.formats:
        samples, changed = as_asked(benchmark, samples, args.predictions)
        note = f"{len(changed)} questions were asked in other words than the annotations have, and count as asked"
    predictions = read_predictions(args.predictions, args.format)
    left_out = {sample.id for sample in everything} - {sample.id for sample in samples}
    predictions = {name: reply for name, reply in predictions.items() if name not in left_out}
    summary, items = score_predictions(benchmark, samples, predictions)
    print(note)
    summary["skipped"] = len(left_out)
    return summary, items, origin_of(args, benchmark)


# --------------------------------------------------------------------------- open answers


def score_wups(benchmark: Benchmark, summary: dict, items: list[dict]):
    """NExT-OE's own score, of each answer and of the groups of its table."""
    groups = defaultdict(list)
    try:
        for item in tqdm(items, desc="WUPS"):
            item["wups"] = wups_of(benchmark, item)
            sample = Sample(item["id"], item["video"], item["question"], item["gold"], category=item["type"])
            for group in benchmark.groups(sample):
                groups[group].append(item["wups"])
    except ImportError as error:
        why = f"WUPS: pip install {error.name}" if error.name else str(error)
        summary["open_ended"]["missing"]["WUPS"] = why
        return

    summary["wups"] = float(np.mean([item["wups"] for item in items]))
    for group, scores in groups.items():
        summary["by_type"][group]["wups"] = float(np.mean(scores))
    of_groups = ", ".join(f"{group} {100 * np.mean(scores):.2f}" for group, scores in sorted(groups.items()))
    print(f"WUPS@0 {100 * summary['wups']:.2f}: {of_groups}")


def wups_of(benchmark: Benchmark, item: dict) -> float:
    """The best over all right answers."""
    equal = item["type"] in benchmark.wups_equal
    reply = str(item["prediction"] or "")
    return max(wups(reply, reference, equal) for reference in references_of(item))


def references_of(item: dict) -> list[str]:
    """All answers that are right."""
    return [item["gold"], *item.get("also_right", ())]


def score_words(args: Namespace, benchmark: Benchmark, summary: dict, items: list[dict]):
    """Open answers: how near their words come to the reference, and what a judge thinks of them (§4.3.2)."""
    open_items = [item for item in items if isinstance(item["gold"], str)]
    if not open_items:
        return
    if benchmark.measures_words:
        score_metrics(benchmark, summary, open_items, args.bert_model)
    if args.judge_url:
        score_by_judge(args, summary, open_items)


def score_metrics(benchmark: Benchmark, summary: dict, items: list[dict], bert_model: str):
    """BLEU and its like into the summary, and a line of them on the screen."""
    texts = [item["prediction"] if isinstance(item["prediction"], str) else "" for item in items]
    scores = open_ended(texts, [references_of(item) for item in items], bert_model)
    summary["open_ended"] = scores
    print("words: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if isinstance(score, float)))
    if benchmark.wups:
        score_wups(benchmark, summary, items)
    for why in sorted(set(scores["missing"].values())):
        print(f"not computed: {why}")


def score_by_judge(args: Namespace, summary: dict, items: list[dict]):
    """The judge's axes into the summary, its verdict into each item."""
    questions = []
    for item in items:
        question = {"id": item["id"], "question": item["question"], "reference": item["gold"]}
        questions.append({**question, "answer": str(item["prediction"] or "")})
    cache = args.judge_cache or Path("runs", "judge")
    scores = judge(questions, args.judge_url, args.judge_model, cache)

    verdicts = scores.pop("verdicts")
    for item in items:
        item["judge"] = verdicts.get(item["id"])
    summary["judge"] = scores
    axes = ", ".join(f"{axis} {scores[axis]}" for axis in JUDGE_AXES)
    print(f"judge {args.judge_model} (1 to 10): {axes}; {scores['n']} answers, {len(scores['failed'])} not judged")


# --------------------------------------------------------------------------- one benchmark


def evaluate(args: Namespace, benchmark: Benchmark):
    """Replies, the table, the scores of open answers, the result file."""
    check_outputs(args)
    table_file = getattr(args, "summary", None)
    run = run_predictions if getattr(args, "predictions", None) else run_model
    summary, items, origin = run(args, benchmark)
    print_table(benchmark, summary)
    if benchmark.note:
        print(benchmark.note)
    if table_file:
        keep_table(table_file, args, summary, origin)
    score_words(args, benchmark, summary, items)
    if args.out:
        write_json(args.out, {"summary": summary, "provenance": origin, "items": items})
        shutil.rmtree(args.out.with_name(args.out.name + ".parts"), ignore_errors=True)
    blind = f" blind {summary['blind_accuracy']:.4f}" if "blind_accuracy" in summary else ""
    print(f"accuracy {summary['accuracy']:.4f}{blind} n {summary['n']}")


def check_outputs(args: Namespace):
    """An hour's work should not be lost to a file that cannot be written."""
    if args.out:
        if args.out.is_dir():
            raise VidReasonError(f"it is a folder ({args.out}): --out wants the name of a file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        probe = args.out.with_name(args.out.name + ".partial")
        probe.touch()
        probe.unlink()
    if getattr(args, "summary", None):
        read_tables(args.summary)
        args.summary.parent.mkdir(parents=True, exist_ok=True)


# --------------------------------------------------------------------------- result files side by side


def run_compare(args: Namespace):
    """Two result files, paired; or a sheet for people to rank their answers; or the ranks that they gave."""
    if args.ranks:
        print_rankings(args.human_sheet / "key.json", args.ranks)
    elif args.human_sheet:
        write_sheet(args)
    elif len(args.results) != 2:
        raise VidReasonError("compare takes two result files (command line): more only with --human_sheet")
    else:
        print_comparison(compare(*args.results))


def print_rankings(key_file: Path, ranks: list[Path]):
    """A line for each pair of models."""
    for row in read_rankings(key_file, ranks):
        shares = "win {win:.3f} tie {tie:.3f} loss {loss:.3f}".format(**row)
        print("{model} against {against}: {shares} p {p:.2g} n {n}".format(shares=shares, **row))


def write_sheet(args: Namespace):
    """A blind ranking sheet of the answers in some result files, about the questions of the first."""
    items_of = {str(path): read_items(path) for path in args.results}
    questions = []
    for name, item in next(iter(items_of.values())).items():
        questions.append({"id": name, "question": item["question"], "video": args.videos / item["video"]})
    answers = {}
    for path, items in items_of.items():
        answers[path] = {name: answer_of(item) for name, item in items.items()}
    human_sheet(questions, answers, args.human_sheet, args.seed, args.count)
    print(f"give people {args.human_sheet / 'index.html'} (and clips/ beside it, if there); keep key.json")


def answer_of(item: dict) -> str:
    """What people read as the answer: the chosen option's words, else the reply."""
    if item["options"] and type(item["read"]) is int:
        return item["options"][item["read"]]
    return str(item["prediction"])


# --------------------------------------------------------------------------- the command line


def parse() -> Namespace:
    """The command line. VidReasonError: it asks for what cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    common = argparse.ArgumentParser(add_help=False)
    add_common_options(common)
    for benchmark in known_benchmarks().values():
        one = kinds.add_parser(benchmark.name, parents=[common], help=benchmark.about)
        if benchmark.add_options:
            benchmark.add_options(one)
        else:
            add_file_options(one, benchmark)
    add_compare_options(kinds.add_parser("compare", help="result files, paired"))

    args = parser.parse_args()
    if getattr(args, "seed", 0) < 0:
        parser.error("--seed must not be negative")
    if hasattr(args, "annotations") and not (args.predictions or args.videos):
        parser.error("--videos DIR for our model, or --predictions FILE… for another system's replies")
    if args.benchmark == "compare" and args.ranks and not args.human_sheet:
        parser.error("--ranks needs --human_sheet DIR, where key.json lies")
    return args


def add_common_options(parser: ArgumentParser):
    """What every benchmark takes."""
    add = parser.add_argument
    add("--model", type=Path, default=TOY_MODEL, help="model directory (default toy/weights)")
    add("--out", type=Path, help="JSON file for the summary and one item per question")
    add("--videos", type=Path, help="folder of the videos (toy: where to keep its clips)")
    add("--features", type=Path, help="folder that keeps Z_vision for other runs of the same encoder")
    what = f"which controls, of {', '.join(CONTROLS)}; none: give no name (default all)"
    add("--controls", nargs="*", choices=CONTROLS, default=CONTROLS, metavar="NAME", help=what)
    workers = 4 if torch.cuda.is_available() else os.cpu_count()  # each holds a SAM of its own
    add("--processes", type=positive, default=workers, help="processes that look at videos")
    add("--batch", type=positive, default=64, help="questions answered together (default 64)")
    judged = "OpenAI-compatible endpoint, https://…/v1, that judges open answers by the reference; it sees no frame"
    add("--judge_url", help=judged)
    dated = "a dated name: undated ones drift (%(default)s)"
    add("--judge_model", default="gpt-4o-2024-08-06", help=dated)
    add("--judge_cache", type=Path, help="folder of its replies: a rerun is free (default runs/judge)")
    add("--bert_model", default="roberta-large", help="of BERTScore: a hub id or a folder (%(default)s)")


def add_file_options(parser: ArgumentParser, benchmark: Benchmark):
    """What a benchmark takes whose questions lie in files."""
    add = parser.add_argument
    add("--annotations", type=Path, nargs="+", required=True, help="the benchmark's own files")
    protocols = ("likelihood", *benchmark.prompts)
    add("--protocol", choices=protocols, default="likelihood", help="of options: %(choices)s (%(default)s)")
    add("--allow_missing", action="store_true", help="questions about missing videos count as wrong")
    add("--limit", type=positive, help="only so many questions, a fair sample")
    add("--predictions", type=Path, nargs="+", help="another system's result files: no model runs")
    formats = ", ".join(owners_of_formats())
    add("--format", help=f"how they store replies (default: as BENCHMARK): {formats}")


def add_compare_options(parser: ArgumentParser):
    """What `compare` takes."""
    add = parser.add_argument
    add("results", type=Path, nargs="*", help="files that --out wrote")
    add("--human_sheet", type=Path, help="folder: write a blind ranking sheet of their answers")
    add("--videos", type=Path, default=".", help="where the clips lie (--human_sheet)")
    add("--count", type=positive, default=200, help="questions on the sheet (%(default)s)")
    add("--seed", type=int, default=0, help="which questions, in which order")
    add("--ranks", type=Path, nargs="+", help="filled-in sheets: win, tie, loss, sign test")


def main():
    args = parse()
    if args.benchmark == "compare":
        run_compare(args)
    else:
        evaluate(args, known_benchmarks()[args.benchmark])


if __name__ == "__main__":
    guarded(main)
