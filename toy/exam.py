"""The toy world as a benchmark: fresh clips, the world's own checker, the table that is kept."""

import json
import time
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from data.features import FeatureCache
from data.records import to_sample
from evaluation.replies import ask, evaluate_model
from evaluation.score import tally
from toy import language, videos, world
from vidreason import VidReasonError

TOY_VISION = (
    "the toy's encoder learned from the simulator's labels (kinds, colours, motions, who hits whom, up to .75 s "
    "ahead), its SAM from the renderer's masks: this measures fusion, language and reasoning on top of vision trained "
    "with labels"
)


def toy_questions(seed, clips, folder, split="test"):
    """Write the clips as mp4 → one record per question.

    A fifth more clips show pairs of kinds that no training video shows; training texts say what comes of them.
    """

    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(i, False) for i in range(clips)] + [(i, True) for i in range(clips // 5)]
    records = []
    for index, held_out in tqdm(jobs, desc="clips"):
        clip = world.make_clip(seed, index, split, held_out, cut=True if held_out else None)
        asked = videos.write_clip(clip, videos.sample_id(split, seed, index, held_out), folder)
        records += [r for r in asked if (r["type"] == "held-out") == held_out]
    return records


def evaluate_toy(args, model, work):
    """Answers are generated freely and checked by the world's grammar; where a question has options, the likeliest one
    stands beside them."""

    records = toy_questions(args.seed, args.clips, args.videos, args.split)
    samples = [to_sample(r, r["id"]) for r in records]
    same = lambda said, sample: language.check(said, sample.answer)
    summary, items = evaluate_model(
        args, model, [replace(s, options=None, gold=None) for s in samples], work, "free", same
    )
    optioned = [s for s in samples if s.options]
    cache = FeatureCache(args.features or work / "features")
    found = ask(model, optioned, cache.__getitem__, "likelihood", work / "options.jsonl", args.batch, "options")
    chosen = {s.id: reply for s, reply in zip(optioned, found, strict=True)}
    right = [chosen[s.id]["said"] == s.gold if s.id in chosen else None for s in samples]
    for group, rows in tally("toy", samples, right).items():
        row = summary if group == "all" else summary["by_type"][group]
        row["option_accuracy"] = sum(r for _, r in rows) / len(rows)
    by_type = defaultdict(list)
    for sample, item in zip(samples, items, strict=True):
        item |= {"options": sample.options, "option": chosen.get(sample.id)}
        by_type[item["type"]].append(item)
    for kind, row in summary["by_type"].items():
        row["majority_answer"] = Counter(item["gold"] for item in by_type[kind]).most_common(1)[0][0]
    for t in {"predict", "held-out"} & by_type.keys():
        outcome = {i["id"]: language.check_outcome(i["prediction"], i["gold"]) for i in by_type[t]}
        named = [outcome[i["id"]] for i in by_type[t] if language.names_pair(i["prediction"], i["gold"])]
        summary["by_type"][t] |= {
            "outcome_accuracy": float(np.mean([*outcome.values()])),
            "pair_named": len(named),
            "outcome_where_named": round(float(np.mean(named)), 4) if named else None,
        }
    return summary, items


def read_tables(path):
    """The tables that a --summary file holds so far: {seed as text: table}; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["streams"])
    except (ValueError, KeyError, TypeError) as error:
        raise VidReasonError(f"no file of tables: {error!r} ({path}): give --summary another name") from error


def keep_table(path, args, summary, origin):
    """Add this stream's table to the file at `path`, in place of an older one of the same --seed.

    It is the summary without a line per question, with what is needed to get it again.
    """
    tables = read_tables(path)
    split = "" if args.split == "test" else f" --split {args.split}"
    command = f"python evaluate.py toy --seed {args.seed} --clips {args.clips}{split}"
    told = {"command": command, "date": time.strftime("%F")}
    told |= {name: origin[name] for name in ("seed", "clips", "split", "python", "versions", "weights_sha256")}
    counts = {name: summary[name] for name in ("missing", "unreadable", "empty", "unparsed")}
    rows = {"all together": summary, **summary["by_type"]}
    kept = {kind: table_row(row) for kind, row in rows.items()}
    tables[str(args.seed)] = {**told, "vision": TOY_VISION, **counts, "rows": kept}
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps({"streams": dict(sorted(tables.items()))}, indent=1) + "\n")
    aside.rename(path)


def table_row(row):
    """What a table shows of a group: its n, accuracies and intervals, and the counts of its outcomes."""
    wanted = ("n", "majority_answer", "pair_named", "outcome_where_named")
    shown = {name: value for name, value in row.items() if name in wanted or name.endswith(("accuracy", "interval"))}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in shown.items()}
