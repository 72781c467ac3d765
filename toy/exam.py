"""The toy world as a benchmark: fresh clips, the world's own checker, the table that is kept."""

import json
import time
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.benchmarks import Benchmark
from data.features import FeatureCache
from data.program import positive
from data.records import Sample, to_sample
from evaluation.replies import ask, evaluate_model
from evaluation.score import tally
from toy import language, videos, world
from vidreason import VidReason, VidReasonError, write_aside

TOY_VISION = (
    "the toy's encoder learned from the simulator's labels (kinds, colours, motions, who hits whom, up to .75 s "
    "ahead), its SAM from the renderer's masks: this measures fusion, language and reasoning on top of vision trained "
    "with labels"
)


def toy_questions(seed: int, clips: int, folder: Path, split: str = "test") -> list[dict]:
    """Write the clips as mp4 -> one record per question.

    A fifth more clips show pairs of kinds that no training video shows; training texts say what comes of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(i, False) for i in range(clips)] + [(i, True) for i in range(clips // 5)]
    records = []
    for index, held_out in tqdm(jobs, desc="clips"):
        clip = world.make_clip(seed, index, split, held_out, cut=True if held_out else None)
        asked = videos.write_clip(clip, videos.sample_id(split, seed, index, held_out), folder)
        records += [record for record in asked if (record["type"] == "held-out") == held_out]
    return records


# --------------------------------------------------------------------------- the exam


def add_options(parser: ArgumentParser):
    """The command line of `evaluate.py toy`."""
    parser.description = f"Fresh clips of the toy world. To know: {TOY_VISION}."
    parser.add_argument("--seed", type=int, default=0, help="which stream of clips (default 0)")
    parser.add_argument("--clips", type=positive, default=200, help="a fifth more show held-out pairs (default 200)")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="val for choosing (default test)")
    kept = "keep the table in FILE, beside those of other --seed: no line per question"
    parser.add_argument("--summary", type=Path, metavar="FILE", help=kept)
    parser.set_defaults(limit=None)


def evaluate_toy(args: Namespace, model: VidReason, work: Path) -> tuple[dict, list[dict]]:
    """Answers are generated freely and checked by the world's grammar -> (summary, items).

    Where a question has options, the likeliest one stands beside the answer.
    """
    records = toy_questions(args.seed, args.clips, args.videos, args.split)
    samples = [to_sample(record, record["id"]) for record in records]
    open_questions = [replace(sample, options=None, gold=None) for sample in samples]
    summary, items = evaluate_model(args, TOY, model, open_questions, work, "free")

    chosen = choose_options(args, model, samples, work)
    add_option_accuracy(summary, samples, chosen)
    for sample, item in zip(samples, items, strict=True):
        item |= {"options": sample.options, "option": chosen.get(sample.id)}
    add_majority_answers(summary, items)
    add_outcomes(summary, items)
    return summary, items


def choose_options(args: Namespace, model: VidReason, samples: list[Sample], work: Path) -> dict[str, dict]:
    """{id: the reply by likelihood} of the questions that have options."""
    optioned = [sample for sample in samples if sample.options]
    cache = FeatureCache(args.features or work / "features")
    kept = work / "options.jsonl"
    replies = ask(model, optioned, cache.__getitem__, "likelihood", kept, args.batch, "options")
    ids = [sample.id for sample in optioned]
    return dict(zip(ids, replies, strict=True))


def add_option_accuracy(summary: dict, samples: list[Sample], chosen: dict[str, dict]):
    """Beside the accuracy of a type that of its options; a type without any has none."""
    right = [chosen[sample.id]["said"] == sample.gold if sample.id in chosen else None for sample in samples]
    for group, hits in tally(TOY, samples, right).items():
        row = summary if group == "all" else summary["by_type"][group]
        row["option_accuracy"] = sum(hit for _, hit in hits) / len(hits)


def add_majority_answers(summary: dict, items: list[dict]):
    """What a type's commonest answer is."""
    golds = defaultdict(Counter)
    for item in items:
        golds[item["type"]][item["gold"]] += 1
    for kind, row in summary["by_type"].items():
        row["majority_answer"] = golds[kind].most_common(1)[0][0]


def add_outcomes(summary: dict, items: list[dict]):
    """Of predictions: is it right who is affected and how, of all and of those that name the right pair?"""
    for kind in ("predict", "held-out"):
        outcomes, where_named = [], []
        for item in items:
            if item["type"] == kind:
                outcomes.append(language.check_outcome(item["prediction"], item["gold"]))
                if language.names_pair(item["prediction"], item["gold"]):
                    where_named.append(outcomes[-1])
        if outcomes:
            summary["by_type"][kind] |= {
                "outcome_accuracy": float(np.mean(outcomes)),
                "pair_named": len(where_named),
                "outcome_where_named": round(float(np.mean(where_named)), 4) if where_named else None,
            }


def is_right(answer: Any, sample: Sample) -> bool:
    """By the world's grammar: tense and articles are free, every noun, colour and verb must be right."""
    return language.check(answer, sample.answer)


def outcome_line(row: dict) -> str:
    """What stands below the types that predict: naming the pair and knowing what comes of it are two things."""
    if "outcome_accuracy" not in row:
        return ""
    return (
        f"  · outcome right {row['outcome_accuracy']:.3f}; the right pair named in {row['pair_named']}, "
        f"outcome right there {row['outcome_where_named']}"
    )


TOY = Benchmark(
    name="toy",
    about="fresh clips of the toy world",
    same=is_right,
    measures_words=False,
    exam=evaluate_toy,
    add_options=add_options,
    note=f"vision: {TOY_VISION}",
    remark=outcome_line,
)


# --------------------------------------------------------------------------- the table that is kept


def read_tables(path: Path) -> dict[str, dict]:
    """The tables that a --summary file holds so far: {seed as text: table}; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["streams"])
    except (ValueError, KeyError, TypeError) as error:
        raise VidReasonError(f"no file of tables: {error!r} ({path}): give --summary another name") from error


def keep_table(path: Path, args: Namespace, summary: dict, origin: dict):
    """Add this stream's table to the file at `path`, in place of an older one of the same --seed.

    It is the summary without a line per question, with what is needed to get it again.
    """
    tables = read_tables(path)
    split = "" if args.split == "test" else f" --split {args.split}"
    stream = {
        "command": f"python evaluate.py toy --seed {args.seed} --clips {args.clips}{split}",
        "date": time.strftime("%F"),
    }
    for name in ("seed", "clips", "split", "python", "versions", "weights_sha256"):
        stream[name] = origin[name]
    stream["vision"] = TOY_VISION
    for name in ("missing", "unreadable", "empty", "unparsed"):
        stream[name] = summary[name]
    rows = {"all together": summary, **summary["by_type"]}
    stream["rows"] = {kind: kept_row(row) for kind, row in rows.items()}
    tables[str(args.seed)] = stream

    text = json.dumps({"streams": dict(sorted(tables.items()))}, indent=1) + "\n"
    write_aside(path, lambda aside: aside.write_text(text))


def kept_row(row: dict) -> dict:
    """What a table shows of a group: its n, accuracies and intervals, and the counts of its outcomes."""
    wanted = ("n", "majority_answer", "pair_named", "outcome_where_named")
    kept = {}
    for name, value in row.items():
        if name in wanted or name.endswith(("accuracy", "interval")):
            kept[name] = round(value, 6) if isinstance(value, float) else value
    return kept
