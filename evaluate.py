"""Score a model: fresh clips, every question, controls beside each number.

    python evaluate.py toy --seed 7 --clips 200 [--model DIR] [--out FILE]
    python evaluate.py nextqa --annotations val.csv --predictions result.json      # another system's replies

The toy clips come from the world's test stream, which nothing was trained on or chosen by. Answers are checked by the
world's own grammar. "blind" asks the same question without the video; "majority" always says the commonest answer;
"options" picks the likeliest of the question's options instead of generating.
"""

import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    ACTIVITYNET_TYPES,
    READERS,
    TOY_MODEL,
    FeatureCache,
    Parser,
    Place,
    encode_videos,
    guarded,
    jsonl_rows,
    load,
    naming,
    numbered,
    positive,
    vlm4d_half,
    write_json,
)
from vidreason import VidReason, VidReasonError, read_config


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


def jsonl_prediction(row, path):
    """Ours: {"id", "prediction"}: an option's index from zero, a reply in words, or for CLEVRER a list of words."""
    row = json.loads(row)
    return [(str(row["id"]), row["prediction"])]


def clevrer_prediction(scene, path):
    """What CLEVRER's executor/get_results.py writes: choices as a list of "correct" and "wrong", in their order."""
    for q in scene["questions"]:
        said = {choice["choice_id"]: choice["answer"] for choice in q.get("choices", ())}
        said = [said.get(i) for i in range(max(said) + 1)] if said else q.get("answer")
        yield f"{scene['scene_index']}_{q['question_id']}", said


def vlm4d_judged_prediction(row, path):
    """What VLM4D's judge took from a reply, "B: left": the letter alone if its words are no option's (it rewords)."""
    letter, _, words = row["extracted_answer"].partition(": ")
    said = row["extracted_answer"] if words in map(str, row["choices"].values()) else letter
    return [(f"{vlm4d_half(row, path)}_{row['id']}", said)]


FORMATS = {  # how a result file stores replies: a row, or a member of an object → pairs of id and prediction
    "nextqa": lambda row, path: [(row[0], row[1]["prediction"])],
    "nextqa-oe": lambda row, path: [(f"{row[0]}_{qid}", said) for qid, said in row[1].items()],
    "activitynetqa": lambda row, path: [(row["question_id"], row["answer"])],
    "clevrer": clevrer_prediction,
    "vlm4d": lambda row, path: [(f"{vlm4d_half(row, path)}_{row['id']}", row["response"])],
    "vlm4d-judged": vlm4d_judged_prediction,
    "video-holmes": lambda row, path: [(f"{row['video ID']}_{row['Question ID']}", row["Predicr Answer"])],  # sic
    "jsonl": jsonl_prediction,
}


def read_predictions(paths, format):
    """Another system's replies as its result files hold them → {sample id: index, text, or a word per option}.

    Golds and verdicts in those files are not read; NExT-QA's eval_mc.py and VLM4D's statistics believe them.
    """
    predictions = {}
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        place = Place([path])
        with naming(path, place):
            found = jsonl_rows(path) if format == "jsonl" else load(path)
            found = found if format == "jsonl" else numbered(found.items() if isinstance(found, dict) else found)
            for name, said in (pair for row in place(found) for pair in FORMATS[format](row, path)):
                if name in predictions:
                    raise ValueError(f"{name} is answered twice")
                predictions[name] = said
    return predictions


def as_asked(samples, paths):
    """VLM4D reworded questions after some systems had answered them. → the samples as its result files have them
    where they do, and the ids of those that differ."""
    asked = {s.id: s for s in READERS["vlm4d"](paths)}
    found = [replace(asked.get(s.id, s), video=s.video) for s in samples]
    return found, [new.id for new, old in zip(found, samples, strict=True) if new != old]


def letter_or_text(reply, options):
    """→ index of the option that a reply consists of ("B", "(B)", "left", "B: left"), or None."""
    found, texts = re.fullmatch(r"\(?([A-Z])\)?[.:]?\s*(.*)", reply.strip(), re.DOTALL), [o.lower() for o in options]
    index = ord(found[1]) - ord("A") if found else len(options)
    if index < len(options) and found[2].lower() in ("", texts[index]):
        return index
    return texts.index(reply.strip().lower()) if reply.strip().lower() in texts else None


def verdict(sample, said, extract):
    """→ (right?, whether each option is or None, what keeps it from being judged: "", "empty" or "unparsed").

    An index must be the gold one. A reply is right if the option that it chooses reads as the gold one does.
    """
    empty = "empty" if said in (None, []) or (isinstance(said, str) and not said.strip()) else ""
    if sample.options and sample.truths:
        read = [{"correct": True, "wrong": False}.get(word, word) for word in (said if isinstance(said, list) else [])]
        read = (read + [None] * len(sample.truths))[: len(sample.truths)]
        hits = [one is truth for one, truth in zip(read, sample.truths, strict=True)]
        return all(hits), hits, empty or ("" if {*map(type, read)} == {bool} else "unparsed")
    if empty or not sample.options:  # exact, as ActivityNet-QA's eval.py has it
        return not empty and said in (sample.answer, *sample.truths), None, empty
    if isinstance(said, str):
        index = extract(said, sample.options)
        right = index is not None and sample.options[index] == sample.answer
    else:
        index = said if type(said) is not bool and said in range(len(sample.options)) else None
        right = index == sample.gold
    return right, None, "unparsed" if index is None else ""


GROUPS = {  # what a question counts in, as the benchmarks' own tables have it
    "nextqa": lambda s: ("TN" if s.category == "TP" else s.category, s.category[0]),
    "activitynetqa": lambda s: (s.category, *["free"] * (s.category in ACTIVITYNET_TYPES[3:])),
    "clevrer": lambda s: (s.category, *["multiple choice"] * bool(s.options)),
    "vlm4d": lambda s: (s.category, s.category.split()[0]),
}
GROUPS["nextqa-oe"] = GROUPS["nextqa"]


def tally(benchmark, samples, right):
    """→ {group: [(video, right?)]}; "all" is what the benchmark's headline counts, for VCR the lines right twice."""
    groups, lines = defaultdict(list), defaultdict(list)
    for s, r in zip(samples, right, strict=True):
        for group in (*GROUPS.get(benchmark, lambda s: (s.category or "other",))(s), "all"):
            groups[group].append((s.video, r))
        lines[s.id.rpartition("/")[0], s.video].append(r)
    if benchmark == "vcr":
        groups["all"] = groups["Q->AR"] = [(video, all(both)) for (_, video), both in lines.items()]
    return dict(groups)


def score_predictions(benchmark, samples, predictions, extract=letter_or_text):
    """→ (summary, items). Missing, empty and unparsed predictions count as wrong, and are counted."""
    unasked = predictions.keys() - {s.id for s in samples}
    if len(unasked) == len(predictions):
        raise VidReasonError("no prediction is about any of the questions (--predictions): is --format right?")
    items, options = [], defaultdict(list)
    for s in samples:
        right, hits, trouble = verdict(s, predictions.get(s.id), extract)
        trouble = trouble if s.id in predictions else "missing"
        gold = list(s.truths) if s.options and s.truths else s.answer if s.gold is None else s.gold
        item = {"id": s.id, "type": s.category, "question": s.question, "options": s.options, "gold": gold}
        items.append({**item, "prediction": predictions.get(s.id), "correct": right, "trouble": trouble})
        for group in GROUPS[benchmark](s) if hits else ():
            options[group] += hits
    by_type = {}
    for group, found in tally(benchmark, samples, [item["correct"] for item in items]).items():
        videos, right = zip(*found, strict=True)
        by_type[group] = {"accuracy": sum(right) / len(right), "interval": interval(right, videos), "n": len(right)}
    for group, hits in options.items():
        by_type[group].update(option_accuracy=sum(hits) / len(hits), options=len(hits))
    troubles = Counter(item["trouble"] for item in items)
    counts = {name: troubles[name] for name in ("missing", "empty", "unparsed")}
    return {**by_type.pop("all"), **counts, "unasked": len(unasked), "by_type": by_type}, items


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


def evaluate_predictions(args):
    """Another system's replies under our protocol: no model runs."""
    if not args.annotations or not args.predictions:
        wanted = "--annotations FILE… and --predictions FILE…"
        raise VidReasonError(f"{args.benchmark} needs {wanted} (command line): our own models run on toy only so far")
    samples, note = READERS[args.benchmark](args.annotations), ""
    format = args.format or args.benchmark
    if format not in FORMATS:
        raise VidReasonError(f"{format} has no result format of its own (--format): choose {', '.join(FORMATS)}")
    if args.benchmark == "vlm4d" and format.startswith("vlm4d"):
        samples, changed = as_asked(samples, args.predictions)
        note = f"{len(changed)} questions were asked in other words than the annotations have, and count as asked"
    summary, items = score_predictions(args.benchmark, samples, read_predictions(args.predictions, format))
    print(f"\n{'type':24s}{'accuracy':>9s}{'95 % interval':>16s}{'n':>7s}")
    for name, row in [*sorted(summary["by_type"].items()), ("all together", summary)]:
        options = f"   per option {row['option_accuracy']:.3f} of {row['options']}" if "options" in row else ""
        between = "{:.3f} – {:.3f}".format(*row["interval"])
        print(f"{name:24s}{row['accuracy']:9.4f}{between:>16s}{row['n']:7d}{options}")
    counts = ", ".join(f"{summary[k]} {k}" for k in ("missing", "empty", "unparsed"))
    print(
        f"counted as wrong: {counts}; predictions about no question: {summary['unasked']}",
        note,
        sep="\n",
        end="\n" * bool(note),
    )
    provenance = {"benchmark": args.benchmark, "format": format}
    for kind in ("annotations", "predictions"):
        provenance[kind] = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in getattr(args, kind)}
    return summary, items, provenance


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["toy", *READERS], metavar="BENCHMARK", help=", ".join(["toy", *READERS]))
    group = parser.add_argument_group("toy: fresh clips, our model")
    group.add_argument("--seed", type=int, default=0, help="which stream of clips (default 0)")
    group.add_argument(
        "--clips", type=positive, default=200, help="how many clips; a fifth more show held-out pairs (default 200)"
    )
    group.add_argument(
        "--split", choices=["val", "test"], default="test", help="val for choosing, test for reporting (default test)"
    )
    group.add_argument("--model", type=Path, default=TOY_MODEL, help="model directory (default toy/weights)")
    group.add_argument("--processes", type=positive, default=os.cpu_count(), help="processes that look at the clips")
    group = parser.add_argument_group("any other benchmark: another system's replies")
    group.add_argument("--annotations", type=Path, nargs="+", help="the benchmark's own files")
    group.add_argument("--predictions", type=Path, nargs="+", help="result files")
    group.add_argument("--format", help=f"how they store replies (default: as BENCHMARK): {', '.join(FORMATS)}")
    parser.add_argument("--out", type=Path, help="JSON file for the summary and one item per question")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if args.out:  # an hour's work should not be lost to a folder that cannot be written
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.touch()
    if args.benchmark == "toy":
        (summary, items), origin = evaluate_toy(args), provenance(args)
        print_table(summary)
    else:
        summary, items, origin = evaluate_predictions(args)
    if args.out:
        write_json(args.out, {"summary": summary, "provenance": origin, "items": items})
    blind = f" blind {summary['blind_accuracy']:.4f}" if "blind_accuracy" in summary else ""
    print(f"accuracy {summary['accuracy']:.4f}{blind} n {summary['n']}")


if __name__ == "__main__":
    guarded(main)
