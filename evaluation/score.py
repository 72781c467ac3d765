"""From replies to numbers: what counts as right, groups, intervals, tables, pairs of result files."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.benchmarks import Benchmark, film_of
from data.program import print_columns
from data.records import Sample
from evaluation.choice import extract_choice
from vidreason import VidReasonError

# --------------------------------------------------------------------------- what counts as right


class Trouble(Enum):
    """What keeps a reply from being judged; result files have the value. All but NONE count as wrong."""

    NONE = ""
    MISSING = "missing"  # there is no reply
    UNREADABLE = "unreadable"  # the video cannot be decoded
    EMPTY = "empty"
    UNPARSED = "unparsed"  # it chooses no option


class Verdict(NamedTuple):
    """What a reply is worth.

    read: what was read from it: the index of an option, a bool per option (CLEVRER), or the text; None for nothing.
    """

    right: bool
    read: int | str | list | None
    trouble: Trouble


def verdict_on(sample: Sample, reply: Any, same: Callable[[Any, Sample], bool]) -> Verdict:
    """The verdict on one reply: an option's index, a text, or a word or bool per option; `same` judges open answers."""
    is_empty = reply in (None, []) or (isinstance(reply, str) and not reply.strip())
    trouble = Trouble.EMPTY if is_empty else Trouble.NONE
    if sample.option_truths:
        return verdict_per_option(sample, reply, trouble)
    if is_empty:
        return Verdict(False, reply, trouble)
    if sample.options:
        return verdict_on_choice(sample, reply)
    return Verdict(same(reply, sample), reply, trouble)


def verdict_per_option(sample: Sample, reply: Any, trouble: Trouble) -> Verdict:
    """Right if every option is told right from wrong."""
    words = reply if isinstance(reply, list) else []
    read = [{"correct": True, "wrong": False}.get(word, word) for word in words]
    missing = len(sample.option_truths) - len(read)
    read = (read + [None] * missing)[: len(sample.option_truths)]
    right = all(one is truth for one, truth in zip(read, sample.option_truths, strict=True))
    if trouble is Trouble.NONE and not all(type(one) is bool for one in read):
        trouble = Trouble.UNPARSED
    return Verdict(right, read, trouble)


def verdict_on_choice(sample: Sample, reply: Any) -> Verdict:
    """An index must be the gold one; words are right if the option that they choose reads as the gold one does."""
    if isinstance(reply, str):
        index = extract_choice(reply, sample.options)
        right = index is not None and sample.options[index] == sample.answer
    else:
        is_index = type(reply) is not bool and reply in range(len(sample.options))
        index = reply if is_index else None
        right = index == sample.gold
    return Verdict(right, index, Trouble.UNPARSED if index is None else Trouble.NONE)


def gold_of(sample: Sample) -> int | str | list[bool]:
    """What is right: an option's index, a bool per option, or the text."""
    if sample.option_truths:
        return list(sample.option_truths)
    return sample.answer if sample.gold is None else sample.gold


# --------------------------------------------------------------------------- groups, intervals, baselines

Right = float | None  # a bool, or a chance from 0 to 1; None where a question was not asked that way


def tally(benchmark: Benchmark, samples: list[Sample], right: Iterable[Right]) -> dict[str, list[tuple[str, float]]]:
    """-> {group: [(what intervals resample, right?)]}; "all" is what the benchmark's headline counts.

    That is every question, or for VCR every line of which both questions are right.
    """
    groups, lines = defaultdict(list), defaultdict(list)
    for sample, one in zip(samples, right, strict=True):
        if one is None:
            continue
        unit = benchmark.resampled(sample.video)
        for group in (*benchmark.groups(sample), "all"):
            groups[group].append((unit, one))
        lines[benchmark.line_of(sample), unit].append(one)
    if benchmark.whole_lines and lines:
        whole = [(unit, float(np.prod(ones))) for (_, unit), ones in lines.items()]
        groups["all"] = groups[benchmark.whole_lines] = whole
    return dict(groups)


def interval(right: Iterable[float], groups: Iterable, rounds: int = 1000) -> list[float]:
    """95 % bootstrap interval of a mean, resampling whole videos: questions about one video are not independent."""
    names = sorted(set(map(str, groups)))
    index = {name: i for i, name in enumerate(names)}
    total = np.zeros(len(names))
    count = np.zeros(len(names))
    for one, group in zip(right, groups, strict=True):
        i = index[str(group)]
        total[i] += one
        count[i] += 1

    picks = np.random.default_rng(0).integers(len(names), size=(rounds, len(names)))
    means = total[picks].sum(1) / count[picks].sum(1)
    return [round(float(np.percentile(means, q)), 3) for q in (2.5, 97.5)]


def baselines(samples: list[Sample]) -> dict[str, list[Right]]:
    """What needs no model: -> {"chance": [...], "majority": [...]}, one number per question."""
    golds_of_kind = defaultdict(Counter)
    for sample in samples:
        golds_of_kind[sample.category][answer_or_gold(sample)] += 1
    commonest = {kind: golds.most_common(1)[0][0] for kind, golds in golds_of_kind.items()}
    majority = [commonest[sample.category] == answer_or_gold(sample) for sample in samples]
    return {"chance": [chance_of(sample) for sample in samples], "majority": majority}


def answer_or_gold(sample: Sample) -> int | str:
    """What "majority" counts: the index of the right option, or the words of the answer."""
    return sample.answer if sample.gold is None else sample.gold


def chance_of(sample: Sample) -> float | None:
    """How often guessing among the options is right; None for an open question."""
    if not sample.options:
        return None
    if sample.option_truths:
        return 0.5 ** len(sample.option_truths)
    return 1 / len(sample.options)


# --------------------------------------------------------------------------- a summary and its items


def score_predictions(
    benchmark: Benchmark,
    samples: list[Sample],
    predictions: dict[str, Any],
    columns: dict[str, list[Right]] | None = None,
) -> tuple[dict, list[dict]]:
    """-> (summary, items). Missing, empty and unparsed predictions count as wrong, and are counted.

    columns: {name: one number per sample}, whose means stand beside the accuracy as <name>_accuracy.
    """
    unasked = predictions.keys() - {sample.id for sample in samples}
    if len(unasked) == len(predictions):
        raise VidReasonError("no prediction is about any of the questions (--predictions): is --format right?")

    items = [item_of(sample, predictions, benchmark) for sample in samples]
    measured = {"": [item["correct"] for item in items]}
    measured |= baselines(samples)
    measured |= columns or {}
    by_type = summaries(benchmark, samples, measured)
    for group, hits in per_option_hits(benchmark, samples, items).items():
        by_type[group] |= {"per_option_accuracy": sum(hits) / len(hits), "options": len(hits)}

    summary = by_type.pop("all")
    troubles = Counter(item["trouble"] for item in items)
    for trouble in (Trouble.MISSING, Trouble.EMPTY, Trouble.UNPARSED):
        summary[trouble.value] = troubles[trouble.value]
    summary["unasked"] = len(unasked)
    summary["by_type"] = dict(sorted(by_type.items()))
    return summary, items


def item_of(sample: Sample, predictions: dict[str, Any], benchmark: Benchmark) -> dict:
    """A line of the result file: the question, what was said, what was read from it, whether it is right."""
    reply = predictions.get(sample.id)
    verdict = verdict_on(sample, reply, benchmark.same)
    trouble = verdict.trouble if sample.id in predictions else Trouble.MISSING
    item = {
        "id": sample.id,
        "video": sample.video,
        "type": sample.category,
        "question": sample.question,
        "options": sample.options,
        "gold": gold_of(sample),
    }
    if sample.also_right:
        item["also_right"] = list(sample.also_right)
    return item | {"prediction": reply, "read": verdict.read, "correct": verdict.right, "trouble": trouble.value}


def summaries(benchmark: Benchmark, samples: list[Sample], measured: dict[str, list[Right]]) -> dict[str, dict]:
    """-> {group: {"accuracy", "interval", "n", "<name>_accuracy", ...}}; the accuracy itself is measured[""]."""
    by_type = defaultdict(dict)
    for name, right in measured.items():
        prefix = f"{name}_" if name else ""
        for group, hits in tally(benchmark, samples, right).items():
            units, ones = zip(*hits, strict=True)
            by_type[group][f"{prefix}accuracy"] = sum(ones) / len(ones)
            if name not in ("chance", "majority"):
                by_type[group][f"{prefix}interval"] = interval(ones, units)
            by_type[group].setdefault("n", len(ones))
    return by_type


def per_option_hits(benchmark: Benchmark, samples: list[Sample], items: list[dict]) -> dict[str, list[bool]]:
    """-> {group: whether each option was told right from wrong}, of the questions that have a truth per option."""
    hits = defaultdict(list)
    for sample, item in zip(samples, items, strict=True):
        if sample.option_truths:
            of_sample = [one is truth for one, truth in zip(item["read"], sample.option_truths, strict=True)]
            for group in benchmark.groups(sample):
                hits[group] += of_sample
    return hits


# --------------------------------------------------------------------------- tables


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


def print_table(benchmark: Benchmark, summary: dict):
    """A row per type, and what was counted as wrong without being judged."""
    rows = {**summary["by_type"], "all together": summary}
    shown = []
    for column in COLUMNS:
        if any(f"{column}_accuracy" in row for row in rows.values()):
            shown.append(column)
    heads = ["type", "accuracy", "95 % interval", *(COLUMNS[name] for name in shown), "n"]
    widths = [max(map(len, rows)) + 2, 9, 16, *(10 for _ in shown), 7, 0]

    lines = []
    for name, row in rows.items():
        lines.append(table_row(name, row, shown))
        remark = benchmark.remark(row)
        if remark:
            lines.append([remark])
    print()
    print_columns(heads, lines, widths)
    print_counts(summary)


def table_row(name: str, row: dict, shown: list[str]) -> list[str]:
    """The cells of one type; a control that it was not put under has an empty one."""
    cells = [name, f"{row['accuracy']:.4f}", "{:.3f} – {:.3f}".format(*row["interval"])]
    for column in shown:
        accuracy = row.get(f"{column}_accuracy")
        cells.append("" if accuracy is None else f"{accuracy:.3f}")
    cells.append(str(row["n"]))
    if "options" in row:
        cells.append(f"   per option {row['per_option_accuracy']:.3f} of {row['options']}")
    return cells


def print_counts(summary: dict):
    """What was not judged, and what was not asked."""
    wrong = [trouble.value for trouble in Trouble if summary.get(trouble.value)]
    if wrong:
        print("counted as wrong: " + ", ".join(f"{summary[name]} {name}" for name in wrong))
    if summary.get("skipped") or summary.get("unasked"):
        print(f"not asked (--limit): {summary.get('skipped', 0)}; replies to no question: {summary['unasked']}")


# --------------------------------------------------------------------------- two result files


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p: how often a fair coin is at least this lopsided. On 0/1 outcomes: McNemar's exact test."""
    n = wins + losses
    tail, ways = 0, 1  # ways: n over k
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def read_items(path: str | Path) -> dict[str, dict]:
    """A result file's items by id."""
    try:
        items = json.loads(Path(path).read_text())["items"]
        items_by_id = {item["id"]: {**item, "correct": bool(item["correct"])} for item in items}
    except (ValueError, KeyError, TypeError) as error:
        raise VidReasonError(f"no result file: {error!r} ({path}): give a file that --out wrote") from error
    if not items or len(items_by_id) != len(items):
        raise VidReasonError(f"no items, or two with one id ({path}): give a file that --out wrote")
    return items_by_id


def asked(item: dict) -> list:
    """What must be the same for two systems to be compared on a question."""
    film = Path(film_of(item.get("video"))).stem.removeprefix("v_")  # folder and suffix may differ
    return [film, item.get("question"), item.get("options"), item.get("gold")]


def compare(first: str | Path, second: str | Path) -> dict:
    """Two result files, paired: accuracies, difference with its 95 % interval by film, McNemar's exact test, which
    takes every question for independent. All are means over questions, for VCR too: not its Q->AR."""
    a, b = read_items(first), read_items(second)
    other = a.keys() ^ b.keys()
    other |= {i for i in a.keys() & b.keys() if asked(a[i]) != asked(b[i])}
    if other:
        raise VidReasonError(
            f"{len(other)} of {len(a.keys() | b.keys())} questions differ, for example {min(map(str, other))} "
            f"({first}, {second}): compare results of one benchmark, split and seed"
        )

    kinds = defaultdict(list)
    for i, item in a.items():
        kinds[str(item.get("type", ""))].append(i)
    by_type = {kind: paired(a, b, ids) for kind, ids in sorted(kinds.items())}
    return {**paired(a, b, list(a)), "by_type": by_type}


def accuracy_of(items: dict[str, dict], ids: list[str]) -> float:
    """The share of some questions that is right, in four digits."""
    return round(float(np.mean([items[i]["correct"] for i in ids])), 4)


def paired(a: dict[str, dict], b: dict[str, dict], ids: list[str]) -> dict:
    """The comparison on some questions: gain is +1 where only b is right, -1 where only a is."""
    gain = [b[i]["correct"] - a[i]["correct"] for i in ids]
    films = [film_of(a[i].get("video", i)) for i in ids]
    return {
        "accuracy": [accuracy_of(a, ids), accuracy_of(b, ids)],
        "difference": round(float(np.mean(gain)), 4),
        "interval": interval(gain, films),
        "only_first_right": gain.count(-1),
        "only_second_right": gain.count(1),
        "p": sign_test(gain.count(1), gain.count(-1)),
        "n": len(ids),
    }


def print_comparison(comparison: dict):
    """A row per type of what `compare` found."""
    heads = ["type", "first", "second", "difference", "95 % interval", "p", "n"]
    lines = []
    for name, row in [*comparison["by_type"].items(), ("all together", comparison)]:
        first, second = row["accuracy"]
        low, high = row["interval"]
        lines.append([
            name,
            f"{first:.3f}",
            f"{second:.3f}",
            f"{row['difference']:+.3f}",
            f"{low:+.3f} – {high:+.3f}",
            f"{row['p']:.2g}",
            str(row["n"]),
        ])
    print_columns(heads, lines, widths=[16, 8, 8, 12, 18, 10, 7])
