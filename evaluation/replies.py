"""Our model is asked: under a protocol, and under the controls that stand beside every score."""

import itertools
import json
import string
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.benchmarks import PROMPTS, Benchmark
from data.features import ORDERS, FeatureCache, encode_videos
from data.records import Sample, file_of, locate, per_option
from evaluation.choice import yes_or_no
from evaluation.score import Right, Trouble, score_predictions, verdict_on
from vidreason import Features, VidReason, VidReasonError, encode_pair, look

CONTROLS = ("blind", "black", *ORDERS)

See = Callable[[str | None], Features | None]  # a video -> what is seen of it; None: asked blind


# --------------------------------------------------------------------------- one question


def prompt_of(sample: Sample, protocol: str, prompts: dict[str, str]) -> str:
    """The question, and where there are options, the protocol's words around them."""
    if not sample.options:
        return sample.question
    lines = [f"{string.ascii_uppercase[i]}: {option}" for i, option in enumerate(sample.options)]
    return prompts[protocol].format(question=sample.question, options="\n".join(lines))


def likeliest(model: VidReason, features: Features | None, sample: Sample) -> dict:
    """The option whose words are likeliest as the answer, by their sum of log P (and by its mean over tokens)."""
    scores = model.option_logprobs(features, sample.question, sample.options)
    lengths = [len(encode_pair(model.tokenizer, sample.question, option)[1]) for option in sample.options]
    per_token = scores / torch.tensor(lengths, device=scores.device)
    return {
        "said": int(scores.argmax()),
        "normalised": int(per_token.argmax()),
        "likelihoods": [round(score, 4) for score in scores.tolist()],
        "tokens": lengths,
    }


def reply_to(
    model: VidReason,
    samples: list[Sample],
    features: list[Features | None],
    protocol: str,
    prompts: dict[str, str] = PROMPTS,
) -> list[dict]:
    """One batch -> a reply to each sample: {"said": an option's index or a text, ...}; features None: asked blind."""
    replies = [None] * len(samples)
    written = []  # which are answered in words, all of them together
    for i, sample in enumerate(samples):
        if sample.options and protocol == "likelihood":
            replies[i] = likeliest(model, features[i], sample)
        else:
            written.append(i)

    if written:
        texts = [prompt_of(samples[i], protocol, prompts) for i in written]
        answers = model.answer_batch([features[i] for i in written], texts)
        for i, answer in zip(written, answers, strict=True):
            replies[i] = {"said": answer}
    return replies


# --------------------------------------------------------------------------- all questions


def ask(
    model: VidReason,
    samples: list[Sample],
    see: See,
    protocol: str,
    kept: Path,
    batch: int = 64,
    desc: str = "answers",
    prompts: dict[str, str] = PROMPTS,
) -> list[dict]:
    """A reply to each sample, questions of similar length together.

    `kept` is a file of the batches that are answered: a killed run goes on after them, or after the first that would
    now hold other questions, as when a video has been mended. Of a question with a truth per option every option is
    asked about by itself.
    """
    parts = [per_option(sample) for sample in samples]
    questions = list(itertools.chain.from_iterable(parts))
    batches = batches_of(questions, batch)
    lines = lines_of_killed_run(kept, questions, batches)

    replies = {}  # index of the question -> its reply
    with open(kept, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        for number, indices in enumerate(tqdm(batches, desc=desc)):
            if number == len(lines):
                some = [questions[i] for i in indices]
                features = [see(question.video) for question in some]
                answers = reply_to(model, some, features, protocol, prompts)
                lines.append({"ids": [question.id for question in some], "replies": answers})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            replies.update(zip(indices, lines[number]["replies"], strict=True))

    in_order = iter([replies[i] for i in range(len(questions))])
    answers = []
    for sample, part in zip(samples, parts, strict=True):
        answers.append(put_together(sample, list(itertools.islice(in_order, len(part)))))
    return answers


def batches_of(questions: list[Sample], size: int) -> list[list[int]]:
    """Indices of the questions, those of similar length together."""

    def length(i):
        return len(questions[i].answer), len(questions[i].question)

    order = sorted(range(len(questions)), key=length)
    return [order[start : start + size] for start in range(0, len(order), size)]


def lines_of_killed_run(kept: Path, questions: list[Sample], batches: list[list[int]]) -> list[dict]:
    """What an earlier run wrote of the same batches, {"ids", "replies"} each, up to the first that differs."""
    written = kept.read_bytes().splitlines(keepends=True) if kept.exists() else []
    lines = []
    for line, indices in zip(written, batches, strict=False):  # it may have ended early, or have had more batches
        if not line.endswith(b"\n"):  # a kill may tear the last one
            break
        line = json.loads(line)
        if line["ids"] != [questions[i].id for i in indices]:
            break
        lines.append(line)
    return lines


def put_together(sample: Sample, replies: list[dict]) -> dict:
    """The replies to the parts of a question as one."""
    if not sample.option_truths:
        return replies[0]
    return {"said": [yes_or_no(reply["said"]) for reply in replies], "options": replies}


# --------------------------------------------------------------------------- what is seen under each control


def see_blindly(video: str | None) -> None:
    """The question is asked without any video."""
    return None


def see_the_same(features: Features, video: str | None) -> Features:
    """Whatever the video, these features."""
    return features


def see_black(model: VidReason) -> Features:
    """Features of a black clip of four seconds: encoder and SAM see it as any other."""
    config = model.config
    clips, frames = config.num_clips, config.frames_per_clip
    side = config.image_size
    black = torch.zeros(clips, frames, 3, side, side, dtype=torch.uint8)
    times = torch.arange(clips * frames).view(clips, frames) * 4 / (clips * frames)
    keyframes = [np.zeros((side, side, 3), np.uint8)] * clips
    return look(black, times, keyframes, model.encoder, model.sam, config)


def seen(args: Namespace, model: VidReason, names: list[str], work: Path) -> tuple[dict[str, See], dict[str, str]]:
    """Encode every video, and the controls' versions of it.

    -> ({condition: function from video to Features}, {video that cannot be read: why}). Of `args` it takes videos,
    features, processes and controls.
    """
    features = args.features or work / "features"
    run = [model.directory, model.config, args.videos, names]
    settings = {"processes": args.processes, "shard_size": 16, "device": str(model.device)}
    encode_videos(*run, features, **settings)
    caches = {"full": FeatureCache(features)}
    for order in ORDERS:
        if order in args.controls:
            encode_videos(*run, features / order, order=order, **settings)
            caches[order] = FeatureCache(features / order)

    conditions = {name: cache.__getitem__ for name, cache in caches.items()}
    conditions["blind"] = see_blindly
    if "black" in args.controls:
        black = see_black(model)
        conditions["black"] = partial(see_the_same, black)
    return conditions, unreadable_in(caches, names)


def unreadable_in(caches: dict[str, FeatureCache], names: list[str]) -> dict[str, str]:
    """{video: why it cannot be read}, of those that fail in whatever order of frames."""
    bad = {}
    for name in names:
        reasons = [cache.bad[name] for cache in caches.values() if name in cache.bad]
        if reasons and reasons[0]:
            bad[name] = reasons[0]
    return bad


def find_videos(samples: list[Sample], args: Namespace) -> tuple[list[Sample], list[str]]:
    """-> (samples, names of videos that are not there). Refused unless --allow_missing: what is left flatters."""
    if not args.videos.is_dir():
        raise VidReasonError(f"no such folder ({args.videos}): give the benchmark's videos with --videos")
    samples = locate(samples, args.videos)
    names = {sample.video for sample in samples}
    lost = sorted(str(name) for name in names if not name or not file_of(Path(args.videos, name)).is_file())
    if lost and not args.allow_missing:
        raise VidReasonError(
            f"{len(lost)} of {len(names)} videos are missing, for example {lost[0]} "
            f"({args.videos}): get them, or count their questions as wrong with --allow_missing"
        )
    return samples, lost


# --------------------------------------------------------------------------- a whole evaluation


def evaluate_model(
    args: Namespace, benchmark: Benchmark, model: VidReason, samples: list[Sample], work: Path, protocol: str
) -> tuple[dict, list[dict]]:
    """Our model's replies under every condition -> (summary, items). `work`: a folder for what a killed run keeps."""
    samples, lost = find_videos(samples, args)
    there = sorted({sample.video for sample in samples if sample.video} - set(lost))
    conditions, bad = seen(args, model, there, work)
    askable = [sample for sample in samples if str(sample.video) not in lost and sample.video not in bad]
    if not askable:
        raise VidReasonError(f"not one video can be read ({args.videos}): check --videos")

    ids = [sample.id for sample in askable]
    replies = {}  # condition -> {sample id: reply}
    for condition in ("full", *args.controls):
        see = conditions[condition]
        kept = work / f"{condition}.jsonl"
        desc = f"answers, {condition}"
        answers = ask(model, askable, see, protocol, kept, args.batch, desc, benchmark.prompts)
        replies[condition] = dict(zip(ids, answers, strict=True))

    full = replies.pop("full")
    columns = {}  # name -> whether each sample is right
    for condition, answers in replies.items():
        columns[condition] = right_by(benchmark, samples, answers, "said")
    if protocol == "likelihood" and any(has_one_right_option(sample) for sample in samples):
        columns["normalised"] = right_per_token(benchmark, samples, full)
    predictions = {name: reply["said"] for name, reply in full.items()}
    summary, items = score_predictions(benchmark, samples, predictions, columns)

    for number, item in enumerate(items):
        details = dict(full.get(item["id"], {}))
        details.pop("said", None)  # it is the item's prediction
        item |= details
        item["controls"] = {}
        for condition, answers in replies.items():
            said = answers.get(item["id"], {}).get("said")
            item["controls"][condition] = {"said": said, "correct": columns[condition][number]}
        if item["video"] in bad:
            item["trouble"] = Trouble.UNREADABLE.value
    for trouble in (Trouble.MISSING, Trouble.UNREADABLE):
        summary[trouble.value] = sum(item["trouble"] == trouble.value for item in items)
    return summary | {"missing_videos": lost, "unreadable_videos": bad}, items


def has_one_right_option(sample: Sample) -> bool:
    """Whether the likeliest of its options is an answer to it."""
    return bool(sample.options) and not sample.option_truths


def right_by(benchmark: Benchmark, samples: list[Sample], replies: dict[str, dict], key: str) -> list[bool]:
    """Whether each sample's reply is right, by what stands under `key` in it; no reply is wrong."""
    right = []
    for sample in samples:
        said = replies.get(sample.id, {}).get(key)
        right.append(verdict_on(sample, said, benchmark.same).right)
    return right


def right_per_token(benchmark: Benchmark, samples: list[Sample], replies: dict[str, dict]) -> list[Right]:
    """Whether the option that is likeliest per token is right; None where there is no such choice."""
    right = right_by(benchmark, samples, replies, "normalised")
    return [one if has_one_right_option(sample) else None for sample, one in zip(samples, right, strict=True)]
