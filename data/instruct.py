"""Causal-Vid-Instruct (§4.1.2): a teacher explains videos and predicts what follows, records for stage 2.

    python -m data.instruct --videos DIR --teacher URL --model NAME --out FILE.jsonl
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import hashlib
import json
import multiprocessing
import re
from base64 import b64encode
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pebble import ThreadPool, concurrent
from torchvision.io import encode_jpeg
from tqdm import tqdm

from data.endpoint import NoReply, chat
from data.features import Unreadable, outcome_of
from data.program import Parser, guarded, positive
from data.records import videos_below
from vidreason import PREDICT_PROMPT, REASON_PROMPT, VidReasonError, read_video

TEACHER_PROMPT = (  # §4.1.2, word for word
    "Observe the following video clip. First, provide a step-by-step causal explanation of the events. Second, predict "
    "what is most likely to happen immediately after the clip ends."
)
REPLY_FORM = (  # ours. One event: infer.py --task predict finds its three by beams, each a whole answer
    "The clip is given as {} frames in order, seen at {} seconds. Tell what happens in it, do not mention frames. "
    'Reply with one JSON object alone: {{"explanation": ["...", "...", as many as it takes], "prediction": "..."}}. '
    "Each step says in one sentence what happens and what causes it; the prediction is one sentence."
)
FRAME_SIDE, FRAME_TOKENS, TEXT_TOKENS, REPLY_TOKENS = 512, 300, 200, 250  # for the estimate: models count images unlike
ASKS, STREAK = 3, 20  # replies of no use that a video may cost; videos in a row that may fail before the run stops


def show(path, frames):
    """A clip as the teacher sees it (§4.1.2) → content of a chat message, or why the video cannot be read."""
    torch.set_num_threads(1)
    try:  # the middle of each of its equal parts; the centre square, for the student sees no more either
        _, times, pictures = read_video(path, frames, 1, 16, FRAME_SIDE)
    except VidReasonError as error:
        return Unreadable(str(error))
    text = f"{TEACHER_PROMPT}\n\n{REPLY_FORM.format(frames, ', '.join(f'{t:.1f}' for t in times.flatten().tolist()))}"
    jpegs = (encode_jpeg(torch.from_numpy(picture).permute(2, 0, 1), quality=90).numpy() for picture in pictures)
    urls = (f"data:image/jpeg;base64,{b64encode(jpeg).decode()}" for jpeg in jpegs)
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


def read_reply(text):
    """The teacher's JSON → (numbered steps, prediction). ValueError says what is wrong with it, for the teacher too."""
    text = text.rpartition("</think>")[2]
    if not (found := re.search(r"\{.*\}", text, re.DOTALL)):
        raise ValueError(f"no JSON object in {text[:80]!r}")
    found = json.loads(found[0])
    steps = found.get("explanation")
    if not isinstance(steps, list) or not 2 <= len(steps) <= 20:
        raise ValueError('"explanation" is not a list of 2 to 20 steps')
    parts = [" ".join(part.split()) if isinstance(part, str) else "" for part in (*steps, found.get("prediction"))]
    parts = [re.sub(r"^(step )?\d+[.:)] *", "", part, flags=re.IGNORECASE) for part in parts]
    if not all(10 <= len(part) <= 600 for part in parts) or len(set(parts)) < len(parts):
        raise ValueError("the steps and the prediction are not different sentences of 10 to 600 characters")
    return "\n".join(f"{i}. {step}" for i, step in enumerate(parts[:-1], 1)), parts[-1]


def ask_teacher(path, args, key, context, patience=300):
    """→ ("done", (explanation, prediction)) or ("unreadable" | "refused" | "failed", reason), and the tokens it took"""
    look = concurrent.process(timeout=patience, context=context)(show)  # some files hang or kill their decoder
    content, spent = outcome_of(look(path, args.frames), path, patience), np.zeros(2)
    if isinstance(content, Unreadable):
        return "unreadable", content.reason, spent
    messages, why = [{"role": "user", "content": content}], ""
    try:
        for _ in range(ASKS):
            text, usage, _ = chat(args.teacher, args.model, messages, key, args.timeout, args.tries)
            spent += usage
            try:
                return "done", read_reply(text), spent
            except ValueError as error:
                why = str(error)
            again = f"This is of no use: {why}. Reply again, with the JSON object alone."
            messages += [{"role": "assistant", "content": text or "?"}, {"role": "user", "content": again}]
    except NoReply as error:
        return "refused" if error.refused else "failed", str(error), spent + error.usage
    return "failed", f"{ASKS} replies of no use, the last: {why}", spent


def ask_about(names, args, key):
    """Ask about --concurrency videos at a time → the name and outcome of each, in the order in which they end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidreason", "openai"])  # imported once, not once per process
    threads, running, names = ThreadPool(args.concurrency), {}, iter(names)
    while True:
        for name in islice(names, args.concurrency - len(running)):
            running[threads.schedule(ask_teacher, (args.videos / name, args, key, context))] = name
        if not running:
            return
        ended = wait(running, return_when=FIRST_COMPLETED).done
        for future in sorted(ended, key=lambda f: f.exception() is not None):  # what was paid for comes first
            yield running.pop(future), *future.result()


def finished(out, head):
    """Names of the videos whose two records stand in `out`; what a kill left of the last one's is cut off.

    VidReasonError if a line begins otherwise than `head`: the file is not ours to cut.
    """
    names, end, position = set(), 0, 0
    with open(out, "rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.startswith(head[: len(line)]):
                raise VidReasonError(f"records of another --model, --frames or origin ({out}, line {number}): move it")
            if line.endswith(b"\n") and (row := json.loads(line))["id"].endswith("#predict"):
                names.add(row["video"])
                end = position
    os.truncate(out, end)
    return names


def instruct(args, names):
    """Causal-Vid-Instruct (§4.1.2): a teacher explains each video and predicts what follows, two records for stage 2.

    The second record has the paper's prompt, which asks for three events, and as its answer the one that the paper's
    teacher prompt asks for. Both are written at once, so that a killed run goes on without gap or double; what has
    failed is asked again, too.
    """
    # by hash: --max_videos takes a fair sample, and a larger number only adds to it
    names = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())[: args.max_videos]
    key, price = os.environ.get(args.api_key_env, "").strip() or "none", np.array(args.price or (0, 0)) / 1e6
    worth = lambda tokens: f"{sum(tokens) / 1e6:.3g} M tokens" + (f", ${tokens @ price:.2f}" if args.price else "")
    origin, failures = {"teacher": args.model, "frames": args.frames}, args.out.with_suffix(".failed.jsonl")
    kinds, spent, streak, found = Counter(), np.zeros(2), 0, ""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        done = finished(args.out, json.dumps(origin)[:-1].encode())
        todo = [name for name in names if name not in done]
        guess = len(todo) * np.array([TEXT_TOKENS + FRAME_TOKENS * args.frames, REPLY_TOKENS])
        known = len(names) - len(todo)
        print(f"{known} videos are done, {len(todo)} to ask about: very roughly {worth(guess)}", flush=True)
        if not todo:
            return
        with suppress(NoReply):  # a wrong address, key or model is told at once, not after all tries
            chat(args.teacher, args.model, [{"role": "user", "content": "Say ok."}], key, args.timeout, 1)
        with open(failures, "w") as report, tqdm(total=len(todo), desc="videos → records", unit="video") as bar:
            for name, kind, found, tokens in ask_about(todo, args, key):
                kinds[kind], spent = kinds[kind] + 1, spent + tokens
                streak = {"failed": streak + 1, "unreadable": streak}.get(kind, 0)
                if kind == "done":
                    parts = zip(("explain", "predict"), (REASON_PROMPT, PREDICT_PROMPT), found, strict=True)
                    rows = ({"id": f"{name}#{p}", "video": name, "question": q, "answer": a} for p, q, a in parts)
                    file.write("".join(json.dumps({**origin, **row}) + "\n" for row in rows))
                    file.flush()
                    os.fsync(file.fileno())
                else:
                    print(json.dumps({"video": name, "kind": kind, "reason": found}), file=report, flush=True)
                bar.update()
                bar.set_postfix_str(f"{worth(spent)} of about {worth(spent / sum(kinds.values()) * len(todo))}")
                if streak == STREAK:
                    raise VidReasonError(f"{streak} videos failed in a row: {found} ({failures}): mend that and go on")
    if not done and not kinds["done"]:
        raise VidReasonError(f"no video gave records, for example: {found} ({failures}): see the reasons there")
    told = ", ".join(f"{kinds[kind]} {kind}" for kind in ("done", "refused", "failed", "unreadable"))
    print(f"{told} ({failures}), {worth(spent)}; {2 * (len(done) + kinds['done'])} records in all: {args.out}")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--teacher", required=True, metavar="URL", help="OpenAI-compatible endpoint, such as http://…/v1")
    parser.add_argument("--model", required=True, help="the teacher's name there; it must take images")
    parser.add_argument("--out", type=Path, required=True, help="FILE.jsonl; failures are listed in FILE.failed.jsonl")
    parser.add_argument("--frames", type=positive, default=8, help="frames that the teacher sees of each video")
    parser.add_argument("--concurrency", type=positive, default=8, help="videos under way at a time")
    few = "a fair sample of so many; try a few before you pay for all"
    parser.add_argument("--max_videos", type=positive, help=few)
    price = "dollars per million tokens"
    parser.add_argument("--price", type=float, nargs=2, metavar=("PROMPT", "REPLY"), help=price)
    parser.add_argument("--timeout", type=positive, default=120, help="seconds that one try may take")
    tries = "tries of a call that meets 429, 5xx or a time-out"
    parser.add_argument("--tries", type=positive, default=8, help=tries)
    key = "environment variable that holds the key"
    parser.add_argument("--api_key_env", default="OPENAI_API_KEY", help=key)
    args = parser.parse_args()
    instruct(args, videos_below(args.videos))


if __name__ == "__main__":
    guarded(main)
