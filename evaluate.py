"""Score a model: fresh clips, every question, controls beside each number.

    python evaluate.py toy --seed 7 --clips 200 [--model DIR] [--out FILE]

The toy clips come from the world's test stream, which nothing was trained on or chosen by. Answers are checked by the
world's own grammar. "blind" asks the same question without the video; "majority" always says the commonest answer;
"options" picks the likeliest of the question's options instead of generating.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import hashlib
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import TOY_MODEL, FeatureCache, Parser, encode_videos, guarded, positive, write_json
from vidreason import VidReason, read_config


def toy_questions(seed, clips, folder, split="test"):
    """Write the clips as mp4 → one record per question.

    A fifth more clips show pairs of kinds that no training video shows.
    """
    from toy import world

    jobs = [(i, False) for i in range(clips)] + [(i, True) for i in range(clips // 5)]
    records = []
    for index, held_out in tqdm(jobs, desc="clips"):
        clip = world.make_clip(seed, index, split, held_out, cut=True if held_out else None)
        asked = world.write_clip(clip, world.sample_id(split, seed, index, held_out), folder)
        records += [r for r in asked if (r["type"] == "held-out") == held_out]
    return records


def answer_all(model, cache, records, blind, batch=64):
    """Generated answers, in the order of the records; similar lengths share a batch."""
    order = sorted(range(len(records)), key=lambda i: (len(records[i]["answer"]), len(records[i]["question"])))
    answers = [""] * len(records)
    for start in tqdm(range(0, len(order), batch), desc="blind answers" if blind else "answers"):
        part = order[start : start + batch]
        videos = [None if blind else cache[records[i]["video"]] for i in part]
        for i, text in zip(part, model.answer_batch(videos, [records[i]["question"] for i in part]), strict=True):
            answers[i] = text
    return answers


def choose_options(model, cache, records):
    """The likeliest option of each question that has options, else None."""
    chosen = []
    for r in tqdm(records, desc="options"):
        scores = model.option_logprobs(cache[r["video"]], r["question"], r["options"]) if r["options"] else None
        chosen.append(None if scores is None else r["options"][int(scores.argmax())])
    return chosen


def interval(right, groups, rounds=1000):
    """95 % bootstrap interval of a mean, resampling whole videos: questions about one video are not independent."""
    names = sorted(set(groups))
    index = {name: i for i, name in enumerate(names)}
    total, count = np.zeros(len(names)), np.zeros(len(names))
    for r, g in zip(right, groups, strict=True):
        total[index[g]] += r
        count[index[g]] += 1
    picks = np.random.default_rng(0).integers(len(names), size=(rounds, len(names)))
    means = total[picks].sum(1) / count[picks].sum(1)
    return [round(float(np.percentile(means, q)), 3) for q in (2.5, 97.5)]


def summarise(items):
    """Accuracy, interval, controls and n of some items."""
    answers = defaultdict(Counter)
    for i in items:
        answers[i["type"]][i["truth"]] += 1
    options = [i["option_correct"] for i in items if i["option_correct"] is not None]
    return {
        "accuracy": round(float(np.mean([i["correct"] for i in items])), 4),
        "interval": interval([i["correct"] for i in items], [i["video"] for i in items]),
        "blind_accuracy": round(float(np.mean([i["blind_correct"] for i in items])), 4),
        "majority": round(sum(found.most_common(1)[0][1] for found in answers.values()) / len(items), 4),
        "option_accuracy": round(float(np.mean(options)), 4) if options else None,
        "n": len(items),
    }


def evaluate_toy(args):
    from toy import world

    model = VidReason.load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = toy_questions(args.seed, args.clips, folder, args.split)
        encode_videos(
            args.model, model.config, folder, [r["video"] for r in records], folder / "features", args.processes, 16
        )
        cache = FeatureCache(folder / "features")
        answers, blind, chosen = (
            answer_all(model, cache, records, False),
            answer_all(model, cache, records, True),
            choose_options(model, cache, records),
        )
    items = [
        {
            "id": r["id"],
            "video": r["video"],
            "type": r["type"],
            "question": r["question"],
            "options": r["options"],
            "truth": r["answer"],
            "answer": a,
            "correct": world.check(a, r["answer"]),
            "blind_answer": b,
            "blind_correct": world.check(b, r["answer"]),
            "option": o,
            "option_correct": None if o is None else o == r["answer"],
        }
        for r, a, b, o in zip(records, answers, blind, chosen, strict=True)
    ]
    by_type = defaultdict(list)
    for item in items:
        by_type[item["type"]].append(item)
    summary = {**summarise(items), "by_type": {t: summarise(found) for t, found in sorted(by_type.items())}}
    for t in ("predict", "held-out"):
        named = [i for i in by_type[t] if world.names_pair(i["answer"], i["truth"])]
        outcomes = [world.check_outcome(i["answer"], i["truth"]) for i in by_type[t]]
        summary["by_type"].get(t, {}).update(
            outcome_accuracy=round(float(np.mean(outcomes)), 4) if outcomes else None,
            pair_named=len(named),
            outcome_where_named=round(float(np.mean([world.check_outcome(i["answer"], i["truth"]) for i in named])), 4)
            if named
            else None,
        )
    return summary, items


def print_table(summary):
    print(f"\n{'type':16s}{'accuracy':>9s}{'95 % interval':>16s}{'options':>9s}{'blind':>8s}{'majority':>10s}{'n':>7s}")
    for name, row in [*summary["by_type"].items(), ("all together", summary)]:
        options = "" if row["option_accuracy"] is None else f"{row['option_accuracy']:.3f}"
        low, high = row["interval"]
        print(
            f"{name:16s}{row['accuracy']:9.3f}{f'{low:.3f} – {high:.3f}':>16s}{options:>9s}{row['blind_accuracy']:8.3f}"
            f"{row['majority']:10.3f}{row['n']:7d}"
        )
        if row.get("outcome_accuracy") is not None:
            print(
                f"  · outcome right {row['outcome_accuracy']:.3f}; the right pair named in {row['pair_named']}, "
                f"outcome right there {row['outcome_where_named']}"
            )


def provenance(args):
    """What a reader needs to reproduce the numbers."""
    import transformers

    config = read_config(args.model)
    parts = [
        Path(args.model),
        *(Path(args.model, name) for name in (config.encoder_weights, config.sam_weights, config.llm)),
    ]
    files = sorted(
        {f.resolve() for p in parts if p.exists() for f in ([p] if p.is_file() else p.rglob("*.safetensors"))}
    )
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {
        "model": str(args.model),
        "weights_sha256": hashes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "benchmark": args.benchmark,
        "split": args.split,
        "seed": args.seed,
        "clips": args.clips,
    }


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["toy"], help="what to score on")
    parser.add_argument("--seed", type=int, default=0, help="which stream of clips (default 0)")
    parser.add_argument(
        "--clips", type=positive, default=200, help="how many clips; a fifth more show held-out pairs (default 200)"
    )
    parser.add_argument(
        "--split", choices=["val", "test"], default="test", help="val for choosing, test for reporting (default test)"
    )
    parser.add_argument("--model", type=Path, default=TOY_MODEL, help="model directory (default toy/weights)")
    parser.add_argument("--out", type=Path, help="JSON file for the summary and one item per question")
    parser.add_argument("--processes", type=positive, default=os.cpu_count(), help="processes that look at the clips")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if args.out:  # an hour's work should not be lost to a folder that cannot be written
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.touch()
    summary, items = evaluate_toy(args)
    if args.out:
        write_json(args.out, {"summary": summary, "provenance": provenance(args), "items": items})
    print_table(summary)
    print(f"accuracy {summary['accuracy']:.4f} blind {summary['blind_accuracy']:.4f} n {summary['n']}")


if __name__ == "__main__":
    guarded(main)
