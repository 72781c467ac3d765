"""Score answers: a benchmark's questions, its own protocol, controls beside every number.

    python evaluate.py toy --seed 7 --clips 200 [--model DIR] [--out FILE]           # fresh clips of the toy world
    python evaluate.py toy --seed 13 --clips 200 --summary toy/results.json          # the README's table, to keep
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
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from data.benchmarks import FORMATS, PROMPTS, READERS, as_asked, groups_of, read_predictions
from data.program import TOY_MODEL, Parser, guarded, positive, sha256, write_json
from evaluation.judge import JUDGE_AXES, judge
from evaluation.people import human_sheet, read_rankings
from evaluation.replies import CONTROLS, evaluate_model
from evaluation.score import compare, print_comparison, print_table, read_items, score_predictions
from evaluation.words import open_ended, wups
from toy.exam import TOY_VISION, evaluate_toy, keep_table, read_tables
from vidreason import VidReason, VidReasonError

# --------------------------------------------------------------------------- what counts as right

# --------------------------------------------------------------------------- another system's replies

# --------------------------------------------------------------------------- the toy world

# --------------------------------------------------------------------------- an LLM as the judge

# --------------------------------------------------------------------------- comparing two result files


# --------------------------------------------------------------------------- the command line


def origin_of(args, model=None):
    """What a reader needs to reproduce the numbers, and what a run that goes on must share with the killed one."""
    libraries = ("torch", "transformers", "peft", "segment-anything", "numpy", "av")
    told = {"benchmark": args.benchmark, "python": platform.python_version()}
    told["versions"] = {name: version(name) for name in libraries}
    for kind in ("annotations", "predictions"):
        told[kind] = {str(p): sha256(p) for p in getattr(args, kind, None) or ()}
    wanted = ("seed", "clips", "split", "protocol", "controls", "limit", "format", "allow_missing", "batch")
    told |= {name: getattr(args, name) for name in wanted if hasattr(args, name)}
    told |= {name: str(getattr(args, name)) for name in ("videos", "features") if getattr(args, name, None)}
    if model:
        files = {f for f in Path(args.model).rglob("*.safetensors")}
        named = (model.config.encoder_weights, model.config.sam_weights, model.config.llm)
        for at in (Path(args.model, name) for name in named):  # parts that lie elsewhere
            files |= {at} if at.is_file() else {*at.rglob("*.safetensors")}
        clips, frames = model.config.num_clips, model.config.frames_per_clip
        told |= {"model": str(args.model), "config": asdict(model.config), "prompts": PROMPTS}
        told |= {"frames": {"clips": clips, "frames_per_clip": frames, "total": clips * frames}}
        told["weights_sha256"] = {os.path.relpath(f, args.model): sha256(f) for f in sorted(files)}
    return told


def parts_of(out, origin):
    """Where a run keeps what it has so far: beside --out, else in a folder that goes when it ends."""
    if not out:
        return tempfile.TemporaryDirectory()
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(exist_ok=True)
    mark = parts / "origin.json"
    told = json.loads(json.dumps(origin))
    if mark.exists() and (kept := json.loads(mark.read_text())) != told:
        other = sorted(k for k in kept.keys() | told.keys() if kept.get(k) != told.get(k))
        raise VidReasonError(f"parts of another run, which differs in {', '.join(other)} ({parts}): remove it first")
    write_json(mark, origin)
    return nullcontext(parts)


def limited(args, samples):
    """--limit questions, by hash: a fair sample, and a larger number only adds to it. Both of a line of VCR or none."""
    if not args.limit:
        return samples
    name_of = lambda s: s.id.rpartition("/")[0] if args.benchmark == "vcr" else s.id
    together, kept = defaultdict(list), []
    for i, s in enumerate(samples):
        together[name_of(s)].append(i)
    for name in sorted(together, key=lambda name: hashlib.sha256(name.encode()).digest()):
        kept += together[name] if len(kept) < args.limit else []
    return [samples[i] for i in sorted(kept)]


def run_model(args):
    gpu = torch.cuda.is_available()
    model = VidReason.load(args.model, *(("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)))
    samples = READERS[args.benchmark](args.annotations, args.videos or ".") if args.benchmark != "toy" else []
    total, origin = len(samples), origin_of(args, model)
    samples = limited(args, samples)
    with parts_of(args.out, origin) as work:
        work = Path(work)
        args.videos = args.videos or work / "clips"
        if args.benchmark == "toy":
            summary, items = evaluate_toy(args, model, work)
        else:
            summary, items = evaluate_model(args, model, samples, work, args.protocol)
    return {**summary, "skipped": total - len(samples)} if total else summary, items, origin


def run_predictions(args):
    """Another system's replies under our protocol: no model runs."""
    everything, note = READERS[args.benchmark](args.annotations), ""
    samples = limited(args, everything)
    format = args.format = args.format or args.benchmark
    if format not in FORMATS:
        raise VidReasonError(f"{format} has no result format of its own (--format): choose {', '.join(FORMATS)}")
    if args.benchmark == "vlm4d" and format.startswith("vlm4d"):
        samples, changed = as_asked(samples, args.predictions)
        note = f"{len(changed)} questions were asked in other words than the annotations have, and count as asked"
    predictions, left = read_predictions(args.predictions, format), {s.id for s in everything} - {s.id for s in samples}
    predictions = {name: said for name, said in predictions.items() if name not in left}
    summary, items = score_predictions(args.benchmark, samples, predictions)
    print(note)
    return {**summary, "skipped": len(left)}, items, origin_of(args)


def score_wups(summary, items):
    """NExT-OE's own score, of each answer and of the groups of its table."""
    groups, missing = defaultdict(list), summary["open_ended"]["missing"]
    try:
        for i in tqdm(items, desc="WUPS"):
            kind, texts = i["type"], [i["gold"], *i.get("also_right", ())]
            i["wups"] = max(wups(str(i["prediction"] or ""), text, equal=kind in ("DB", "DC")) for text in texts)
            for group in groups_of("nextqa-oe", SimpleNamespace(category=kind)):
                groups[group].append(i["wups"])
    except ImportError as error:
        missing["WUPS"] = f"WUPS: pip install {error.name}" if error.name else str(error)
        return
    summary["wups"] = float(np.mean([i["wups"] for i in items]))
    for group, scores in groups.items():
        summary["by_type"][group]["wups"] = float(np.mean(scores))
    of_groups = ", ".join(f"{group} {100 * np.mean(scores):.2f}" for group, scores in sorted(groups.items()))
    print(f"WUPS@0 {100 * summary['wups']:.2f}: {of_groups}")


def score_words(args, summary, items):
    """Open answers: how near their words come to the reference, and what a judge thinks of them (§4.3.2)."""
    open_items = [i for i in items if isinstance(i["gold"], str)]
    if not open_items:
        return
    if args.benchmark != "toy":
        said = [i["prediction"] if isinstance(i["prediction"], str) else "" for i in open_items]
        truths = [[i["gold"], *i.get("also_right", ())] for i in open_items]
        found = summary["open_ended"] = open_ended(said, truths, args.bert_model)
        print("words: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float)))
        if args.benchmark == "nextqa-oe":
            score_wups(summary, open_items)
        for why in sorted(set(found["missing"].values())):
            print(f"not computed: {why}")
    if args.judge_url:
        asked = ({"id": i["id"], "question": i["question"], "reference": i["gold"]} for i in open_items)
        asked = [{**a, "answer": str(i["prediction"] or "")} for a, i in zip(asked, open_items, strict=True)]
        cache = args.judge_cache or Path("runs", "judge")
        found = judge(asked, args.judge_url, args.judge_model, cache)
        verdicts = found.pop("verdicts")
        for i in open_items:
            i["judge"] = verdicts.get(i["id"])
        summary["judge"] = found
        axes = ", ".join(f"{axis} {found[axis]}" for axis in JUDGE_AXES)
        print(f"judge {args.judge_model} (1 to 10): {axes}; {found['n']} answers, {len(found['failed'])} not judged")


def evaluate(args):
    if args.out:  # an hour's work should not be lost to a folder that cannot be written
        if args.out.is_dir():
            raise VidReasonError(f"it is a folder ({args.out}): --out wants the name of a file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        probe = args.out.with_name(args.out.name + ".partial")
        probe.touch()
        probe.unlink()
    if getattr(args, "summary", None):
        read_tables(args.summary)
        args.summary.parent.mkdir(parents=True, exist_ok=True)
    replies = getattr(args, "predictions", None)
    summary, items, origin = run_predictions(args) if replies else run_model(args)
    print_table(summary)
    if args.benchmark == "toy":
        print(f"vision: {TOY_VISION}")
    if getattr(args, "summary", None):
        keep_table(args.summary, args, summary, origin)
    score_words(args, summary, items)
    if args.out:
        write_json(args.out, {"summary": summary, "provenance": origin, "items": items})
        shutil.rmtree(args.out.with_name(args.out.name + ".parts"), ignore_errors=True)
    blind = f" blind {summary['blind_accuracy']:.4f}" if "blind_accuracy" in summary else ""
    print(f"accuracy {summary['accuracy']:.4f}{blind} n {summary['n']}")


def run_compare(args):
    """Result files side by side, a sheet for people to rank their answers, or the ranks they gave."""
    if args.ranks:
        for row in read_rankings(args.human_sheet / "key.json", args.ranks):
            print(
                "{model} against {against}: win {win:.3f} tie {tie:.3f} loss {loss:.3f} p {p:.2g} n {n}".format(**row)
            )
        return
    if args.human_sheet:
        found = {str(path): read_items(path) for path in args.results}
        questions = [
            {"id": i, "question": q["question"], "video": args.videos / q["video"]}
            for i, q in next(iter(found.values())).items()
        ]
        text = lambda q: q["options"][q["read"]] if q["options"] and type(q["read"]) is int else str(q["prediction"])
        answers = {name: {i: text(q) for i, q in items.items()} for name, items in found.items()}
        human_sheet(questions, answers, args.human_sheet, args.seed, args.count)
        print(f"give people {args.human_sheet / 'index.html'} (and clips/ beside it, if there); keep key.json")
        return
    if len(args.results) != 2:
        raise VidReasonError("compare takes two result files (command line): more only with --human_sheet")
    print_comparison(compare(*args.results))


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, default=TOY_MODEL, help="model directory (default toy/weights)")
    common.add_argument("--out", type=Path, help="JSON file for the summary and one item per question")
    common.add_argument("--videos", type=Path, help="folder of the videos (toy: where to keep its clips)")
    common.add_argument("--features", type=Path, help="folder that keeps Z_vision for other runs of the same encoder")
    what = f"which controls, of {', '.join(CONTROLS)}; none: give no name (default all)"
    common.add_argument("--controls", nargs="*", choices=CONTROLS, default=CONTROLS, metavar="NAME", help=what)
    workers = 4 if torch.cuda.is_available() else os.cpu_count()  # each holds a SAM of its own
    common.add_argument("--processes", type=positive, default=workers, help="processes that look at videos")
    common.add_argument("--batch", type=positive, default=64, help="questions answered together (default 64)")
    judged = "OpenAI-compatible endpoint, https://…/v1, that judges open answers by the reference; it sees no frame"
    common.add_argument("--judge_url", help=judged)
    common.add_argument(
        "--judge_model", default="gpt-4o-2024-08-06", help="a dated name: undated ones drift (%(default)s)"
    )
    common.add_argument("--judge_cache", type=Path, help="folder of its replies: a rerun is free (default runs/judge)")
    common.add_argument(
        "--bert_model", default="roberta-large", help="of BERTScore: a hub id or a folder (%(default)s)"
    )
    told = f"Fresh clips of the toy world. To know: {TOY_VISION}."
    toy = kinds.add_parser("toy", parents=[common], help="fresh clips of the toy world", description=told)
    toy.add_argument("--seed", type=int, default=0, help="which stream of clips (default 0)")
    toy.add_argument("--clips", type=positive, default=200, help="a fifth more show held-out pairs (default 200)")
    toy.add_argument("--split", choices=["val", "test"], default="test", help="val for choosing (default test)")
    kept = "keep the table in FILE, beside those of other --seed: no line per question"
    toy.add_argument("--summary", type=Path, metavar="FILE", help=kept)
    toy.set_defaults(limit=None)
    for name in READERS:
        one = kinds.add_parser(name, parents=[common], help=READERS[name].args[0].__doc__.split("\n")[0])
        one.add_argument("--annotations", type=Path, nargs="+", required=True, help="the benchmark's own files")
        how = ("likelihood", *PROMPTS)
        one.add_argument("--protocol", choices=how, default="likelihood", help="of options: %(choices)s (%(default)s)")
        one.add_argument("--allow_missing", action="store_true", help="questions about missing videos count as wrong")
        one.add_argument("--limit", type=positive, help="only so many questions, a fair sample")
        one.add_argument("--predictions", type=Path, nargs="+", help="another system's result files: no model runs")
        one.add_argument("--format", help=f"how they store replies (default: as BENCHMARK): {', '.join(FORMATS)}")
    other = kinds.add_parser("compare", help="result files, paired")
    other.add_argument("results", type=Path, nargs="*", help="files that --out wrote")
    other.add_argument("--human_sheet", type=Path, help="folder: write a blind ranking sheet of their answers")
    other.add_argument("--videos", type=Path, default=".", help="where the clips lie (--human_sheet)")
    other.add_argument("--count", type=positive, default=200, help="questions on the sheet (%(default)s)")
    other.add_argument("--seed", type=int, default=0, help="which questions, in which order")
    other.add_argument("--ranks", type=Path, nargs="+", help="filled-in sheets: win, tie, loss, sign test")
    args = parser.parse_args()
    if getattr(args, "seed", 0) < 0:
        parser.error("--seed must not be negative")
    if args.benchmark not in ("toy", "compare") and not (args.predictions or args.videos):
        parser.error("--videos DIR for our model, or --predictions FILE… for another system's replies")
    if args.benchmark == "compare" and args.ranks and not args.human_sheet:
        parser.error("--ranks needs --human_sheet DIR, where key.json lies")
    return args


def main():
    args = parse()
    if args.benchmark == "compare":
        run_compare(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    guarded(main)
