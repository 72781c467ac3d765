"""Records: .jsonl, .csv and .tar files as Samples, whatever dataset they come from.

    *.jsonl   {"id", "video", "question", "answer"}; without "question" it is a caption (or "caption" stands in place of
              "answer"); without "video" it is text alone and may carry a "context" that is read before the question;
              "start" and "end" in seconds show a part of the video, as does "video": "film.mp4#t=2.5,8"
    *.csv     the same columns, or WebVid's: videoid, page_dir, name
    *.tar     webdataset / video2dataset shards: KEY.mp4 with KEY.txt or KEY.json beside it, read where they lie
"""

import csv
import json
import os
import tarfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from vidreason import CAPTION_PROMPT, VidReasonError, split_span

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
LETTERS = list("ABCDEFGHIJ")


@dataclass(slots=True)
class Sample:
    """One question (or caption) about one video; video None: text alone. Every rank holds all in memory."""

    id: str
    video: str | None  # may end in a span of seconds: film.mp4#t=2.5,8
    question: str
    answer: str  # what training should say; for multiple choice the gold option's text
    options: list[str] | None = None
    category: str = ""
    context: str = ""
    gold: int | None = None  # index of the right option; options need not be distinct
    truths: tuple = ()  # per-option truth (CLEVRER: 0..n right), or further right answers (open-ended)
    weight: float = 1.0  # how often an epoch shows its video


def text(value) -> str:
    """JSON has numbers among its options and answers, and some fields carry stray spaces."""
    if isinstance(value, (str, int, float)) and str(value).strip():
        return str(value).strip()
    raise ValueError(f"{value!r} where text should be")


def multiple_choice(options, gold):
    """The fields of Sample that say which option is right; gold: its index from zero."""
    options = [text(o) for o in options]
    if gold not in range(len(options)):  # -1 would be the last
        raise ValueError(f"there is no option {gold}")
    return {"options": options, "gold": gold, "answer": options[gold]}


def index_of(answer, options):
    if answer not in options:
        raise ValueError(f"the answer {answer!r} is none of {', '.join(options)}")
    return options.index(answer)


def per_option(sample) -> list[Sample]:
    """A question of which any number of options may be right, as one yes-or-no question per option."""
    out = []
    for i, (option, truth) in enumerate(zip(sample.options, sample.truths, strict=True)):
        question, chosen = f"{sample.question} {option}: yes or no?", multiple_choice(["yes", "no"], int(not truth))
        out.append(replace(sample, id=f"{sample.id}/{i}", question=question, truths=(), **chosen))
    return out


class Place:
    """Where a reader is, for messages: (where, row) pairs pass through it and come out as rows."""

    def __init__(self, paths, videos="."):
        self.paths, self.videos, self.where = paths, videos, "start"

    def __call__(self, rows):
        for self.where, row in rows:
            yield row


@contextmanager
def naming(path, place):
    """Whatever is wrong with a file becomes one line that names the file and the record."""
    try:
        yield
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise VidReasonError(f"cannot read the annotations: {error} ({path}): check the path") from error
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:  # not the layout, mostly
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise VidReasonError(f"unreadable record: {what} ({path}, {place.where}): mend or remove it") from error


def read_files(samples_of, paths, videos=".") -> list[Sample]:
    """Samples of one file or several, their ids distinct: READERS[name](paths) is this for its layout."""
    paths, parts = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)], []
    for path in paths:
        place = Place(paths, videos)
        with naming(path, place):
            parts.append(list(samples_of(path, place)))
    if not any(parts):
        raise VidReasonError(f"no records ({', '.join(map(str, paths))}): the file is empty")
    uses, seen = Counter(s.id for part in parts for s in part), Counter()
    for path, part in zip(paths, parts, strict=True):
        for s in part:
            if uses[s.id] > 1:
                s.id = f"{path.stem}/{s.id}" if len(paths) > 1 else s.id
                seen[s.id] += 1
                s.id += f"#{seen[s.id]}" if seen[s.id] > 1 else ""
    return [s for part in parts for s in part]


def load(path):
    return json.loads(path.read_text("utf-8-sig"))


def load_beside(path, name):
    return load(path.with_name(name)) if path.with_name(name).exists() else {}


def numbered(records):
    return ((f"record {n}", row) for n, row in enumerate(records, 1))


def csv_table(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            if None in row:
                raise ValueError(f"line {rows.line_num} has more fields than the header")
            yield f"line {rows.line_num}", row


def read_records(path, place):
    """Our own layout (see data.py); WebVid's .csv and .tar shards become it."""
    rows = {".csv": csv_rows, ".tar": partial(tar_rows, videos=place.videos)}.get(path.suffix, jsonl_rows)
    for row in place(rows(path)):
        yield to_sample(row, place.where)


def to_sample(row, where) -> Sample:
    """With "options" (a list, or texts by letter) "gold" is the right one's index, or else "answer" its text, index or
    letter, tried in this order. Without them "answer" is a text, or a list of texts that are all right."""
    row = json.loads(row) if isinstance(row, str) else row
    answer, options, chosen = row.get("answer", row.get("caption")), row.get("options"), {}
    if options:
        options = json.loads(options) if isinstance(options, str) else options  # a field of a .csv
        if not isinstance(options, (list, dict)):
            raise ValueError('"options" is neither a list nor texts by letter')
        options = list(map(text, [options[k] for k in sorted(options)] if isinstance(options, dict) else options))
        letter = isinstance(answer, str) and answer.strip() not in options and answer.strip() in LETTERS
        gold = row.get("gold", answer if isinstance(answer, int) and str(answer) not in options else None)
        gold = LETTERS.index(answer.strip()) if letter and gold is None else gold
        chosen = multiple_choice(options, index_of(str(answer).strip(), options) if gold is None else gold)
    answer, *others = [chosen["answer"]] if chosen else answer if isinstance(answer, list) and answer else [answer]
    if not all(isinstance(a, str) and a.strip() for a in (answer, *others)):
        raise ValueError('no "answer" or "caption"')
    for name in ("question", "video", "context"):
        if not isinstance(row.get(name) or "", str):
            raise ValueError(f'"{name}" is not text')
    start, end = (float(row[name]) if row.get(name) not in (None, "") else None for name in ("start", "end"))
    video = row.get("video")
    if video and (start, end) != (None, None):
        if "#t=" in video or not 0 <= (start or 0) < (end or float("inf")):
            raise ValueError('"start" and "end" name no span of the video, or "video" names one already')
        video += f"#t={start or 0:.3f}," + ("" if end is None else f"{end:.3f}")
    found = {"category": str(row.get("type") or row.get("category") or ""), "context": row.get("context") or ""}
    found |= {**chosen, "answer": answer, "truths": tuple(others)}
    return Sample(str(row.get("id", where)), video, row.get("question") or CAPTION_PROMPT, **found)


def jsonl_rows(path):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield f"line {number}", line


def csv_rows(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):  # line 1 is the header
            if None in row:
                raise ValueError(f"line {number} has more fields than the header: put texts with commas in quotes")
            row = {key: value for key, value in row.items() if key and value}
            if "videoid" in row:  # WebVid: <page_dir>/<videoid>.mp4, the caption is called name
                row = {"id": row["videoid"], "caption": row.get("name"), **row}
                row["video"] = str(Path(row.get("page_dir", ""), f"{row['videoid']}.mp4"))
            elif "video" not in row:
                raise ValueError('its header, or the next line, has no "video" or "videoid"')
            yield f"line {number}", row


def tar_rows(path, videos):
    """Members of one KEY stand side by side, as webdataset asks; a KEY without a video is kept, to be told as bad."""
    base = os.path.relpath(path, videos)
    base = str(path.resolve()) if base.startswith("..") else base

    def row_of(key, parts):
        found = {"id": key, "video": f"{base}/{key}" + next((s for s in VIDEO_SUFFIXES if s in parts), ".mp4")}
        if ".json" in parts:
            found = {**json.loads(parts[".json"]), **found}
        return {**found, "caption": parts[".txt"].decode().strip()} if ".txt" in parts else found

    with tarfile.open(path) as tar:
        last, parts = None, {}
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}".lstrip("/")
            if not member.isfile() or not stem:
                continue
            if key != last and last is not None:
                yield f"key {last}", row_of(last, parts)
                parts = {}
            last, suffix = key, f".{suffix.lower()}"
            parts[suffix] = tar.extractfile(member).read() if suffix in (".txt", ".json") else b""
        if last is not None:
            yield f"key {last}", row_of(last, parts)


def file_of(path):
    """The file on disk that holds a video: that of a span, or the .tar of a member."""
    path = Path(split_span(path)[0])
    return next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), path)


@lru_cache(maxsize=4)
def open_tar(path):
    """A tar and where each of its members lies; kept open, because finding that out reads all of it."""
    tar = tarfile.open(path)
    return tar, {member.name: member for member in tar}


def locate(samples, videos):
    """Where a video lies in `videos` under another suffix or folder than its layout's, its name becomes that one."""
    lost, lying = {s.video for s in samples if s.video and not file_of(Path(videos, s.video)).exists()}, {}
    for path in Path(videos).rglob("*") if lost else ():
        if path.suffix.lower() in (*VIDEO_SUFFIXES, ".jpg"):
            lying.setdefault(path.stem, []).append(str(path.relative_to(videos)))
    for s in samples:
        if s.video in lost:
            name = split_span(s.video)[0]
            stem, span = Path(name).stem, s.video[len(name) :]
            found = lying.get(stem) or lying.get(stem.removeprefix("v_"), ())  # some keep ActivityNet without its v_
            s.video = found[0] + span if len(found) == 1 else s.video
    return samples


def videos_below(folder: Path) -> list[str]:
    """Names, relative to a folder, of all videos in it and its subfolders. VidReasonError if there are none."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES]
    if not names:
        raise VidReasonError(f"no videos ({folder}): name a folder that holds some")
    return sorted(names)
