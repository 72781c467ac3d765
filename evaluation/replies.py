"""Our model is asked: under a protocol, and under the controls that stand beside every score."""

import itertools
import json
import string
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.benchmarks import PROMPTS
from data.features import ORDERS, FeatureCache, encode_videos
from data.records import file_of, locate, per_option
from evaluation.choice import extract_choice, yes_or_no
from evaluation.score import exact, score_predictions, verdict
from vidreason import VidReasonError, encode_pair, look

CONTROLS = ("blind", "black", *ORDERS)


def prompt_of(sample, protocol):
    if not sample.options:
        return sample.question
    options = "\n".join(f"{string.ascii_uppercase[i]}: {option}" for i, option in enumerate(sample.options))
    return PROMPTS[protocol].format(question=sample.question, options=options)


def likeliest(model, features, sample):
    """The option whose words are likeliest as the answer, by their sum of log P (and by its mean over tokens)."""
    scores = model.option_logprobs(features, sample.question, sample.options)
    lengths = [len(encode_pair(model.tokenizer, sample.question, option)[1]) for option in sample.options]
    normalised = int((scores / torch.tensor(lengths, device=scores.device)).argmax())
    likelihoods = [round(score, 4) for score in scores.tolist()]
    return {"said": int(scores.argmax()), "normalised": normalised, "likelihoods": likelihoods, "tokens": lengths}


def reply_to(model, samples, features, protocol):
    """One batch → a reply to each sample: {"said": an option's index or a text, …}; features None: asked blind."""
    replies, written = [None] * len(samples), []
    for i, sample in enumerate(samples):
        if sample.options and protocol == "likelihood":
            replies[i] = likeliest(model, features[i], sample)
        else:
            written.append(i)
    if written:
        prompts = [prompt_of(samples[i], protocol) for i in written]
        for i, said in zip(written, model.answer_batch([features[i] for i in written], prompts), strict=True):
            replies[i] = {"said": said}
    return replies


def ask(model, samples, see, protocol, kept, batch=64, desc="answers"):
    """A reply to each sample, questions of similar length together. see: video → Features, or None.

    `kept` is a file of the batches that are answered: a killed run goes on after them, or after the first that would
    now hold other questions, as when a video has been mended. Of a question with a truth per option every option is
    asked about by itself.
    """
    parts = [per_option(s) if s.options and s.truths else [s] for s in samples]
    asked = [one for part in parts for one in part]
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i].answer), len(asked[i].question)))
    groups, replies = [order[i : i + batch] for i in range(0, len(order), batch)], {}
    lines = kept.read_bytes().splitlines(keepends=True) if kept.exists() else []
    lines = [json.loads(line) for line in lines if line.endswith(b"\n")]  # a kill may tear the last one
    names = [[asked[i].id for i in group] for group in groups]
    wanted = iter(names)
    lines = [*itertools.takewhile(lambda line: line["ids"] == next(wanted, None), lines)]
    with open(kept, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        for number, group in enumerate(tqdm(groups, desc=desc)):
            if number >= len(lines):
                some = [asked[i] for i in group]
                answers = reply_to(model, some, [see(s.video) for s in some], protocol)
                lines.append({"ids": names[number], "replies": answers})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            replies.update(zip(group, lines[number]["replies"], strict=True))
    found, place = [], 0
    for sample, part in zip(samples, parts, strict=True):
        own, place = [replies[i] for i in range(place, place + len(part))], place + len(part)
        found.append(own[0] if part[0] is sample else {"said": [yes_or_no(r["said"]) for r in own], "options": own})
    return found


def see_nothing(model):
    """Features of a black clip of four seconds: encoder and SAM see it as any other."""
    config = model.config
    clips, frames, side = config.num_clips, config.frames_per_clip, config.image_size
    black = torch.zeros(clips, frames, 3, side, side, dtype=torch.uint8)
    times = torch.arange(clips * frames).view(clips, frames) * 4 / (clips * frames)
    keyframes = [np.zeros((side, side, 3), np.uint8)] * clips
    return look(black, times, keyframes, model.encoder, model.sam, config)


def seen(args, model, names, work):
    """Encode every video, and the controls' versions of it → {condition: function from video to Features}, bad."""
    features = args.features or work / "features"
    run = [model.directory, model.config, args.videos, names]
    settings = {"processes": args.processes, "shard_size": 16, "device": str(model.device)}
    encode_videos(*run, features, **settings)
    caches = {"full": FeatureCache(features)}
    for order in (o for o in ORDERS if o in args.controls):
        encode_videos(*run, features / order, order=order, **settings)
        caches[order] = FeatureCache(features / order)
    conditions = {name: cache.__getitem__ for name, cache in caches.items()}
    conditions["blind"] = lambda video: None
    if "black" in args.controls:
        nothing = see_nothing(model)
        conditions["black"] = lambda video: nothing
    bad = {n: next((c.bad[n] for c in caches.values() if n in c.bad), "") for n in names}
    return conditions, {name: why for name, why in bad.items() if why}


def find_videos(samples, args):
    """Which videos are not there. Refused unless --allow_missing: a score of what is left flatters."""
    if not args.videos.is_dir():
        raise VidReasonError(f"no such folder ({args.videos}): give the benchmark's videos with --videos")
    samples = locate(samples, args.videos)
    lost = sorted({str(s.video) for s in samples if not s.video or not file_of(Path(args.videos, s.video)).is_file()})
    if lost and not args.allow_missing:
        raise VidReasonError(
            f"{len(lost)} of {len({s.video for s in samples})} videos are missing, for example {lost[0]} "
            f"({args.videos}): get them, or count their questions as wrong with --allow_missing"
        )
    return samples, lost


def evaluate_model(args, model, samples, work, protocol, same=exact):
    """Our model's replies under every condition → (summary, items)"""
    samples, lost = find_videos(samples, args)
    conditions, bad = seen(args, model, sorted({s.video for s in samples if s.video} - set(lost)), work)
    there = [s for s in samples if str(s.video) not in lost and s.video not in bad]
    if not there:
        raise VidReasonError(f"not one video can be read ({args.videos}): check --videos")
    replies = {}
    for condition in ("full", *args.controls):
        kept, see = work / f"{condition}.jsonl", conditions[condition]
        answers = ask(model, there, see, protocol, kept, args.batch, f"answers, {condition}")
        replies[condition] = dict(zip((s.id for s in there), answers, strict=True))

    def right(condition, key):
        said = {i: reply.get(key) for i, reply in replies[condition].items()}
        return [verdict(s, said.get(s.id), extract_choice, same)[0] for s in samples]

    columns = {name: right(name, "said") for name in replies if name != "full"}
    if protocol == "likelihood" and any(s.options and not s.truths for s in samples):
        scored = right("full", "normalised")
        columns["normalised"] = [
            r if s.options and not s.truths else None for s, r in zip(samples, scored, strict=True)
        ]
    said = {i: reply["said"] for i, reply in replies["full"].items()}
    summary, items = score_predictions(args.benchmark, samples, said, same=same, columns=columns)
    for number, (sample, item) in enumerate(zip(samples, items, strict=True)):
        extra = {k: v for k, v in replies["full"].get(sample.id, {}).items() if k != "said"}
        others = {name: replies[name].get(sample.id, {}).get("said") for name in replies if name != "full"}
        item |= extra | {"controls": {n: {"said": o, "correct": columns[n][number]} for n, o in others.items()}}
        if sample.video in bad:
            item["trouble"] = "unreadable"
    summary |= {name: sum(item["trouble"] == name for item in items) for name in ("missing", "unreadable")}
    return summary | {"missing_videos": lost, "unreadable_videos": bad}, items
