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
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import dataclass
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
FRAME_SIDE = 512  # pixels; smaller pictures stay as they are
FRAME_TOKENS, TEXT_TOKENS, REPLY_TOKENS = 300, 200, 250  # for the estimate: models count images unlike
ASKS = 3  # replies of no use that a video may cost
STREAK = 20  # videos in a row that may fail before the run stops


# --------------------------------------------------------------------------- one video


def show(path: Path, frames: int) -> list[dict] | Unreadable:
    """A clip as the teacher sees it (§4.1.2): content of a chat message, text first, then a picture for each frame."""
    torch.set_num_threads(1)
    try:  # the middle of each of its equal parts; the centre square, for the student sees no more either
        _, times, pictures = read_video(path, frames, 1, 16, FRAME_SIDE)
    except VidReasonError as error:
        return Unreadable(str(error))
    seconds = ", ".join(f"{time:.1f}" for time in times.flatten().tolist())
    text = f"{TEACHER_PROMPT}\n\n{REPLY_FORM.format(frames, seconds)}"
    content = [{"type": "text", "text": text}]
    for picture in pictures:
        jpeg = encode_jpeg(torch.from_numpy(picture).permute(2, 0, 1), quality=90)
        url = f"data:image/jpeg;base64,{b64encode(jpeg.numpy()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return content


def read_reply(text: str) -> tuple[str, str]:
    """The teacher's JSON -> (numbered steps, prediction). ValueError: what is wrong with it, as the teacher is told."""
    text = text.rpartition("</think>")[2]
    braces = re.search(r"\{.*\}", text, re.DOTALL)
    if not braces:
        raise ValueError(f"no JSON object in {text[:80]!r}")
    reply = json.loads(braces[0])
    steps = reply.get("explanation")
    if not isinstance(steps, list) or not 2 <= len(steps) <= 20:
        raise ValueError('"explanation" is not a list of 2 to 20 steps')
    sentences = [sentence_of(part) for part in (*steps, reply.get("prediction"))]
    fitting = all(10 <= len(sentence) <= 600 for sentence in sentences)
    if not fitting or len(set(sentences)) < len(sentences):
        raise ValueError("the steps and the prediction are not different sentences of 10 to 600 characters")
    *steps, prediction = sentences
    explanation = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    return explanation, prediction


def sentence_of(part) -> str:
    """On one line and without a number of the teacher's own; empty if it is no text."""
    if not isinstance(part, str):
        return ""
    one_line = " ".join(part.split())
    return re.sub(r"^(step )?\d+[.:)] *", "", one_line, flags=re.IGNORECASE)


@dataclass
class Outcome:
    """What came of a video."""

    kind: str  # "done", "unreadable", "refused" or "failed"
    tokens: np.ndarray  # (2,) of prompts and of replies, paid for whatever came of it
    answers: tuple[str, str] | None = None  # explanation and prediction, if done
    reason: str = ""  # if not


def ask_teacher(path: Path, args, key: str, context, patience: float = 300) -> Outcome:
    look = concurrent.process(timeout=patience, context=context)(show)  # some files hang or kill their decoder
    content = outcome_of(look(path, args.frames), path, patience)
    tokens = np.zeros(2)
    if isinstance(content, Unreadable):
        return Outcome("unreadable", tokens, reason=content.reason)

    messages = [{"role": "user", "content": content}]
    for _ in range(ASKS):
        try:
            text, usage, _ = chat(args.teacher, args.model, messages, key, args.timeout, args.tries)
        except NoReply as error:
            kind = "refused" if error.refused else "failed"
            return Outcome(kind, tokens + error.usage, reason=str(error))
        tokens += usage
        try:
            return Outcome("done", tokens, read_reply(text))
        except ValueError as error:
            fault = str(error)
        again = f"This is of no use: {fault}. Reply again, with the JSON object alone."
        messages.append({"role": "assistant", "content": text or "?"})
        messages.append({"role": "user", "content": again})
    return Outcome("failed", tokens, reason=f"{ASKS} replies of no use, the last: {fault}")


# --------------------------------------------------------------------------- many videos


def ask_about(names: list[str], args, key: str) -> Iterator[tuple[str, Outcome]]:
    """Ask about --concurrency videos at a time -> the name and outcome of each, in the order in which they end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidreason", "openai"])  # imported once, not once per process
    threads = ThreadPool(args.concurrency)
    names = iter(names)
    running = {}  # future -> name
    while True:
        free = args.concurrency - len(running)
        for name in islice(names, free):
            future = threads.schedule(ask_teacher, (args.videos / name, args, key, context))
            running[future] = name
        if not running:
            return
        ended = wait(running, return_when=FIRST_COMPLETED).done
        for future in sorted(ended, key=has_failed):  # what was paid for comes first
            yield running.pop(future), future.result()


def has_failed(future) -> bool:
    return future.exception() is not None


def finished(out: Path, head: bytes) -> set[str]:
    """Names of the videos whose two records stand in `out`; what a kill left of the last one's is cut off.

    VidReasonError if a line begins otherwise than `head`: the file is not ours to cut.
    """
    names = set()
    position = 0
    end = 0  # of the last whole pair of records
    with open(out, "rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.startswith(head[: len(line)]):
                raise VidReasonError(f"records of another --model, --frames or origin ({out}, line {number}): move it")
            if not line.endswith(b"\n"):
                continue
            record = json.loads(line)
            if record["id"].endswith("#predict"):
                names.add(record["video"])
                end = position
    os.truncate(out, end)
    return names


def write_records(file, name: str, origin: dict, answers: tuple[str, str]) -> None:
    """Both records of a video at once, and on the disk before the next is asked for."""
    explanation, prediction = answers
    explain = {"id": f"{name}#explain", "video": name, "question": REASON_PROMPT, "answer": explanation}
    predict = {"id": f"{name}#predict", "video": name, "question": PREDICT_PROMPT, "answer": prediction}
    lines = [json.dumps({**origin, **record}) + "\n" for record in (explain, predict)]
    file.write("".join(lines))
    file.flush()
    os.fsync(file.fileno())


class Tally:
    """What came of the videos so far, and what it cost. price: dollars per million prompt and reply tokens, or None."""

    def __init__(self, videos: int, price):
        self.videos = videos
        self.price = price
        self.kinds = Counter()
        self.tokens = np.zeros(2)
        self.streak = 0  # videos that failed one after the other; unreadable ones between them say nothing
        self.reason = ""  # why the last one failed

    def add(self, outcome: Outcome):
        self.kinds[outcome.kind] += 1
        self.tokens = self.tokens + outcome.tokens
        self.reason = outcome.reason
        if outcome.kind == "failed":
            self.streak += 1
        elif outcome.kind != "unreadable":
            self.streak = 0

    def worth(self, tokens: np.ndarray) -> str:
        text = f"{sum(tokens) / 1e6:.3g} M tokens"
        if self.price:
            dollars = tokens @ (np.array(self.price) / 1e6)
            text += f", ${dollars:.2f}"
        return text

    def progress(self) -> str:
        whole = self.tokens / self.kinds.total() * self.videos
        return f"{self.worth(self.tokens)} of about {self.worth(whole)}"


def fair_sample(names: list[str], count: int | None) -> list[str]:
    """In the order of hashes: a larger count only adds to a smaller one."""
    names = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return names[:count]


def instruct(args, names: list[str]) -> None:
    """Causal-Vid-Instruct (§4.1.2): a teacher explains each video and predicts what follows, two records for stage 2.

    The second record has the paper's prompt, which asks for three events, and as its answer the one that the paper's
    teacher prompt asks for. Both are written at once, so that a killed run goes on without gap or double; what has
    failed is asked again, too.
    """
    names = fair_sample(names, args.max_videos)
    key = os.environ.get(args.api_key_env, "").strip() or "none"
    origin = {"teacher": args.model, "frames": args.frames}
    failures = args.out.with_suffix(".failed.jsonl")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        done = finished(args.out, json.dumps(origin)[:-1].encode())
        todo = [name for name in names if name not in done]
        tally = Tally(len(todo), args.price)
        estimate = len(todo) * np.array([TEXT_TOKENS + FRAME_TOKENS * args.frames, REPLY_TOKENS])
        known = len(names) - len(todo)
        print(f"{known} videos are done, {len(todo)} to ask about: very roughly {tally.worth(estimate)}", flush=True)
        if not todo:
            return

        with suppress(NoReply):  # a wrong address, key or model is told at once, not after all tries
            chat(args.teacher, args.model, [{"role": "user", "content": "Say ok."}], key, args.timeout, 1)
        with open(failures, "w") as report, tqdm(total=len(todo), desc="videos → records", unit="video") as bar:
            for name, outcome in ask_about(todo, args, key):
                tally.add(outcome)
                if outcome.kind == "done":
                    write_records(file, name, origin, outcome.answers)
                else:
                    failure = {"video": name, "kind": outcome.kind, "reason": outcome.reason}
                    print(json.dumps(failure), file=report, flush=True)
                bar.update()
                bar.set_postfix_str(tally.progress())
                if tally.streak == STREAK:
                    what = f"{tally.streak} videos failed in a row: {tally.reason}"
                    raise VidReasonError(f"{what} ({failures}): mend that and go on")

    if not done and not tally.kinds["done"]:
        raise VidReasonError(f"no video gave records, for example: {tally.reason} ({failures}): see the reasons there")
    counts = ", ".join(f"{tally.kinds[kind]} {kind}" for kind in ("done", "refused", "failed", "unreadable"))
    records = 2 * (len(done) + tally.kinds["done"])
    print(f"{counts} ({failures}), {tally.worth(tally.tokens)}; {records} records in all: {args.out}")


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
