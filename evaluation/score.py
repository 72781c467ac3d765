"""From replies to numbers: what counts as right, groups, intervals, tables, pairs of result files."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data.benchmarks import film_of, groups_of
from evaluation.choice import extract_choice
from vidreason import VidReasonError


def exact(said, sample):
    """As ActivityNet-QA's eval.py has it."""
    return said in (sample.answer, *sample.truths)


def verdict(sample, said, extract, same=exact):
    """→ (right?, what was read, what keeps it from being judged: "", "empty" or "unparsed").

    Read is the index of an option, a bool per option (CLEVRER), or the text. An index must be the gold one. A reply is
    right if the option that it chooses reads as the gold one does.
    """
    empty = "empty" if said in (None, []) or (isinstance(said, str) and not said.strip()) else ""
    if sample.options and sample.truths:
        read = [{"correct": True, "wrong": False}.get(word, word) for word in (said if isinstance(said, list) else [])]
        read = (read + [None] * len(sample.truths))[: len(sample.truths)]
        right = all(one is truth for one, truth in zip(read, sample.truths, strict=True))
        return right, read, empty or ("" if {*map(type, read)} == {bool} else "unparsed")
    if empty or not sample.options:
        return not empty and same(said, sample), said, empty
    if isinstance(said, str):
        index = extract(said, sample.options)
        right = index is not None and sample.options[index] == sample.answer
    else:
        index = said if type(said) is not bool and said in range(len(sample.options)) else None
        right = index == sample.gold
    return right, index, "unparsed" if index is None else ""


def tally(benchmark, samples, right):
    """→ {group: [(video, right?)]}; "all" is what the benchmark's headline counts, for VCR the lines right twice.

    right: bools, or chances; None where the question was not asked that way.
    """
    groups, lines = defaultdict(list), defaultdict(list)
    for s, r in zip(samples, right, strict=True):
        if r is not None:
            for group in (*groups_of(benchmark, s), "all"):
                groups[group].append((film_of(s.video), r))
            lines[s.id.rpartition("/")[0], film_of(s.video)].append(r)
    if benchmark == "vcr" and lines:
        groups["all"] = groups["Q->AR"] = [(video, float(np.prod(both))) for (_, video), both in lines.items()]
    return dict(groups)


def interval(right, groups, rounds=1000):
    """95 % bootstrap interval of a mean, resampling whole videos: questions about one video are not independent."""
    names = sorted(set(map(str, groups)))
    index = {name: i for i, name in enumerate(names)}
    total, count = np.zeros(len(names)), np.zeros(len(names))
    for r, g in zip(right, groups, strict=True):
        total[index[str(g)]] += r
        count[index[str(g)]] += 1
    picks = np.random.default_rng(0).integers(len(names), size=(rounds, len(names)))
    means = total[picks].sum(1) / count[picks].sum(1)
    return [round(float(np.percentile(means, q)), 3) for q in (2.5, 97.5)]


def baselines(samples):
    """What needs no model: → {"chance": [...], "majority": [...]}, one number per question."""
    keys = [(s.category, s.answer if s.gold is None else s.gold) for s in samples]
    kinds = defaultdict(Counter)
    for kind, gold in keys:
        kinds[kind][gold] += 1
    commonest = {kind: found.most_common(1)[0][0] for kind, found in kinds.items()}
    chance = [None if not s.options else 0.5 ** len(s.truths) if s.truths else 1 / len(s.options) for s in samples]
    return {"chance": chance, "majority": [commonest[kind] == gold for kind, gold in keys]}


def score_predictions(benchmark, samples, predictions, extract=None, same=exact, columns=None):
    """→ (summary, items). Missing, empty and unparsed predictions count as wrong, and are counted.

    columns: {name: a bool, a chance or None per sample}, whose means stand beside the accuracy as <name>_accuracy.
    """
    unasked = predictions.keys() - {s.id for s in samples}
    if len(unasked) == len(predictions):
        raise VidReasonError("no prediction is about any of the questions (--predictions): is --format right?")
    items, per_option_hits = [], defaultdict(list)
    for s in samples:
        said = predictions.get(s.id)
        right, read, trouble = verdict(s, said, extract or extract_choice, same)
        gold = list(s.truths) if s.options and s.truths else s.answer if s.gold is None else s.gold
        item = {"id": s.id, "video": s.video, "type": s.category, "question": s.question, "options": s.options}
        also = {} if s.options or not s.truths else {"also_right": list(s.truths)}
        item |= {"gold": gold, **also, "prediction": said, "read": read, "correct": right}
        items.append({**item, "trouble": trouble if s.id in predictions else "missing"})
        for group in groups_of(benchmark, s) if s.options and s.truths else ():
            per_option_hits[group] += [one is truth for one, truth in zip(read, s.truths, strict=True)]
    by_type = defaultdict(dict)
    for name, right in {"": [item["correct"] for item in items], **baselines(samples), **(columns or {})}.items():
        for group, found in tally(benchmark, samples, right).items():
            videos, right = zip(*found, strict=True)
            by_type[group][f"{name}_accuracy".lstrip("_")] = sum(right) / len(right)
            if name not in ("chance", "majority"):
                by_type[group][f"{name}_interval".lstrip("_")] = interval(right, videos)
            by_type[group].setdefault("n", len(right))
    for group, hits in per_option_hits.items():
        by_type[group].update(per_option_accuracy=sum(hits) / len(hits), options=len(hits))
    troubles = Counter(item["trouble"] for item in items)
    counts = {name: troubles[name] for name in ("missing", "empty", "unparsed")}
    return {**by_type.pop("all"), **counts, "unasked": len(unasked), "by_type": dict(sorted(by_type.items()))}, items


COLUMNS = {  # of the table, as far as they were measured
    "option": "options",
    "normalised": "per token",
    "blind": "blind",
    "black": "black",
    "shuffled": "shuffled",
    "one_frame": "one frame",
    "chance": "chance",
    "majority": "majority",
}


def print_table(summary):
    rows = [*summary["by_type"].items(), ("all together", summary)]
    shown = [name for name in COLUMNS if any(f"{name}_accuracy" in row for _, row in rows)]
    width = max(len(name) for name, _ in rows) + 2
    heads = "".join(f"{COLUMNS[name]:>10s}" for name in shown)
    print(f"\n{'type':{width}s}{'accuracy':>9s}{'95 % interval':>16s}{heads}{'n':>7s}")
    for name, row in rows:
        cells = (row.get(f"{column}_accuracy") for column in shown)
        cells = "".join(f"{'' if cell is None else f'{cell:.3f}':>10s}" for cell in cells)
        extra = f"   per option {row['per_option_accuracy']:.3f} of {row['options']}" if "options" in row else ""
        between = "{:.3f} – {:.3f}".format(*row["interval"])
        print(f"{name:{width}s}{row['accuracy']:9.4f}{between:>16s}{cells}{row['n']:7d}{extra}")
        if row.get("outcome_accuracy") is not None:
            print(
                f"  · outcome right {row['outcome_accuracy']:.3f}; the right pair named in {row['pair_named']}, "
                f"outcome right there {row['outcome_where_named']}"
            )
    counts = {k: summary[k] for k in ("missing", "unreadable", "empty", "unparsed") if summary.get(k)}
    if counts:
        print("counted as wrong: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if summary.get("skipped") or summary.get("unasked"):
        print(f"not asked (--limit): {summary.get('skipped', 0)}; replies to no question: {summary['unasked']}")


def sign_test(wins, losses):
    """Two-sided exact p: how often a fair coin is at least this lopsided. On 0/1 outcomes: McNemar's exact test."""
    tail, term = 0, 1
    for k in range(min(wins, losses) + 1):
        tail, term = tail + term, term * (wins + losses - k) // (k + 1)
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def read_items(path):
    """A result file's items by id."""
    try:
        items = json.loads(Path(path).read_text())["items"]
        found = {i["id"]: {**i, "correct": bool(i["correct"])} for i in items}
    except (ValueError, KeyError, TypeError) as error:
        raise VidReasonError(f"no result file: {error!r} ({path}): give a file that --out wrote") from error
    if not items or len(found) != len(items):
        raise VidReasonError(f"no items, or two with one id ({path}): give a file that --out wrote")
    return found


def compare(first, second):
    """Two result files, paired: accuracies, difference with its 95 % interval by video, McNemar's exact test, which
    takes every question for independent. All are means over questions, for VCR too: not its Q->AR."""
    a, b = read_items(first), read_items(second)
    film = lambda item: Path(film_of(item.get("video"))).stem.removeprefix("v_")  # folder and suffix may differ
    asked = lambda found, i: i in found and [film(found[i]), *map(found[i].get, ("question", "options", "gold"))]
    other = [i for i in a.keys() | b.keys() if asked(a, i) != asked(b, i)]
    if other:
        raise VidReasonError(
            f"{len(other)} of {len(a.keys() | b.keys())} questions differ, for example {min(map(str, other))} "
            f"({first}, {second}): compare results of one benchmark, split and seed"
        )

    def paired(ids):
        gain = [b[i]["correct"] - a[i]["correct"] for i in ids]
        return {
            "accuracy": [round(float(np.mean([x[i]["correct"] for i in ids])), 4) for x in (a, b)],
            "difference": round(float(np.mean(gain)), 4),
            "interval": interval(gain, [film_of(a[i].get("video", i)) for i in ids]),
            "only_first_right": gain.count(-1),
            "only_second_right": gain.count(1),
            "p": sign_test(gain.count(1), gain.count(-1)),
            "n": len(ids),
        }

    kinds = defaultdict(list)
    for i, item in a.items():
        kinds[str(item.get("type", ""))].append(i)
    return {**paired(list(a)), "by_type": {t: paired(ids) for t, ids in sorted(kinds.items())}}


def print_comparison(found):
    print(f"{'type':16s}{'first':>8s}{'second':>8s}{'difference':>12s}{'95 % interval':>18s}{'p':>10s}{'n':>7s}")
    for name, row in [*found["by_type"].items(), ("all together", found)]:
        low, high = row["interval"]
        print(
            f"{name:16s}{row['accuracy'][0]:8.3f}{row['accuracy'][1]:8.3f}{row['difference']:+12.3f}"
            f"{f'{low:+.3f} – {high:+.3f}':>18s}{row['p']:10.2g}{row['n']:7d}"
        )
