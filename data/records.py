"""Records: .jsonl, .csv and .tar files as Samples, whatever dataset they come from.

    *.jsonl   {"id", "video", "question", "answer"}; without "question" it is a caption (or "caption" stands in place of
              "answer"); without "video" it is text alone and may carry a "context" that is read before the question;
              "start" and "end" in seconds (or h:mm:ss) show a part of the video, as does "video": "film.mp4#t=2.5,8";
              or a dialogue: "messages" [{"role", "content"}] or LLaVA's "conversations" [{"from", "value"}]
    *.json    a list of the same
    *.csv     the same columns, or WebVid's: videoid, page_dir, name
    *.tar     webdataset / video2dataset shards: KEY.mp4 with KEY.txt or KEY.json beside it, read where they lie
"""

import codecs
import csv
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidreason import CAPTION_PROMPT, VidReasonError, split_span

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


# --------------------------------------------------------------------------- one question


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
    option_truths: tuple[bool, ...] = ()  # one per option, where none, some or all may be right (CLEVRER)
    also_right: tuple[str, ...] = ()  # further right answers to an open question
    weight: float = 1.0  # how often an epoch shows its video


def text(value: Any) -> str:
    """JSON has numbers among its options and answers, and some fields carry stray spaces."""
    if isinstance(value, (str, int, float)) and str(value).strip():
        return str(value).strip()
    raise ValueError(f"{value!r} where text should be")


def multiple_choice(options: Iterable, gold: int) -> dict:
    """The fields of Sample that say which option is right; gold: its index from zero."""
    options = [text(option) for option in options]
    if gold not in range(len(options)):  # -1 would be the last
        raise ValueError(f"there is no option {gold}")
    return {"options": options, "gold": gold, "answer": options[gold]}


def index_of(answer: str, options: list[str]) -> int:
    """The first option that reads as the answer. ValueError if none does."""
    if answer not in options:
        raise ValueError(f"the answer {answer!r} is none of {', '.join(options)}")
    return options.index(answer)


def per_option(sample: Sample) -> list[Sample]:
    """A question of which any number of options may be right, as a yes-or-no question per option; any other as is."""
    if not sample.option_truths:
        return [sample]

    questions = []
    for i, (option, truth) in enumerate(zip(sample.options, sample.option_truths, strict=True)):
        question = f"{sample.question} {option}: yes or no?"
        chosen = multiple_choice(["yes", "no"], gold=0 if truth else 1)
        questions.append(replace(sample, id=f"{sample.id}/{i}", question=question, option_truths=(), **chosen))
    return questions


# --------------------------------------------------------------------------- reading files


class Place:
    """Where a reader is, for messages: (where, row) pairs pass through it and come out as rows.

    paths: all files that are read together; videos: the folder that video names are relative to.
    """

    def __init__(self, paths: list[Path], videos: str | Path = "."):
        self.paths = paths
        self.videos = videos
        self.where = "start"

    def __call__(self, rows: Iterable[tuple[str, Any]]) -> Iterator:
        for self.where, row in rows:
            yield row


@contextmanager
def naming(path: Path, place: Place):
    """Whatever is wrong with a file becomes one line that names the file and the record."""
    try:
        yield
    except UnicodeError as error:
        advice = "save it as UTF-8"
        raise VidReasonError(f"the annotations are neither UTF-8 nor UTF-16: {error} ({path}): {advice}") from error
    except RecursionError as error:
        raise VidReasonError(f"unreadable record: nested too deeply ({path}, {place.where}): remove it") from error
    except (OSError, tarfile.TarError) as error:
        raise VidReasonError(f"cannot read the annotations: {error} ({path}): check the path") from error
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:  # not the layout, mostly
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise VidReasonError(f"unreadable record: {what} ({path}, {place.where}): mend or remove it") from error


def as_paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """One path or several, as a list."""
    if isinstance(paths, (str, Path)):
        return [Path(paths)]
    return [Path(path) for path in paths]


ReadFile = Callable[[Path, Place], Iterator[Sample]]


def read_files(read_file: ReadFile, paths: str | Path | Iterable[str | Path], videos: str | Path = ".") -> list[Sample]:
    """Samples of one file or several, their ids distinct. VidReasonError names file and record of what is unusable."""
    paths = as_paths(paths)
    samples_of_files = []
    for path in paths:
        place = Place(paths, videos)
        with naming(path, place):
            samples_of_files.append(list(read_file(path, place)))
    if not any(samples_of_files):
        raise VidReasonError(f"no records ({', '.join(map(str, paths))}): the file is empty")

    make_ids_distinct(paths, samples_of_files)
    samples = []
    for samples_of_file in samples_of_files:
        samples += samples_of_file
    return samples


def make_ids_distinct(paths: list[Path], samples_of_files: list[list[Sample]]):
    """An id that stands more than once gets its file's name before it and, if need be, #2, #3, ... behind it."""
    uses = Counter()
    for samples in samples_of_files:
        uses.update(sample.id for sample in samples)

    seen = Counter()
    for path, samples in zip(paths, samples_of_files, strict=True):
        for sample in samples:
            if uses[sample.id] == 1:
                continue
            if len(paths) > 1:
                sample.id = f"{path.stem}/{sample.id}"
            seen[sample.id] += 1
            if seen[sample.id] > 1:
                sample.id += f"#{seen[sample.id]}"


def load(path: Path) -> Any:
    """What a .json file holds."""
    return json.loads(path.read_text(encoding_of(path)))


def encoding_of(path: Path) -> str:
    """UTF-8, or UTF-16 if the file begins as that does; a mark at the beginning is no part of the text."""
    with open(path, "rb") as file:
        beginning = file.read(2)
    return "utf-16" if beginning in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def load_beside(path: Path, name: str) -> Any:
    """What the .json file `name` in the same folder holds; an empty dict if there is none."""
    beside = path.with_name(name)
    return load(beside) if beside.exists() else {}


def numbered(records: Iterable) -> Iterator[tuple[str, Any]]:
    """Pairs (where, record) for Place."""
    return ((f"record {number}", record) for number, record in enumerate(records, 1))


def csv_table(path: Path) -> Iterator[tuple[str, dict]]:
    """Pairs (where, row) of a .csv with a header."""
    with open(path, encoding=encoding_of(path), newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            if None in row:
                raise ValueError(f"line {rows.line_num} has more fields than the header")
            yield f"line {rows.line_num}", row


def jsonl_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Pairs (where, line) of a .jsonl; lines are parsed by who reads them, so that a bad one is named."""
    with open(path, encoding=encoding_of(path)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line


# --------------------------------------------------------------------------- our own records


def read_records(path: Path, place: Place) -> Iterator[Sample]:
    """Our own layout, as the top of this file has it; WebVid's .csv and .tar shards become it."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = csv_rows(path)
    elif suffix == ".tar":
        rows = tar_rows(path, place.videos)
    elif suffix == ".json":
        rows = numbered(load(path))
    else:
        rows = jsonl_lines(path)
    for row in place(rows):
        if isinstance(row, str):
            row = json.loads(row)
        for question in questions_of(row):
            yield to_sample(question, place.where)


def to_sample(row: dict, where: str) -> Sample:
    """A record -> Sample; `where` is its id if it has none. With "options" see gold_of. Without them "answer" is a text
    or a number, or a list of such that are all right, of which training says the first."""
    answer = row.get("answer", row.get("caption"))
    also_right = []
    if row.get("options"):
        options = options_of(row["options"])
        chosen = multiple_choice(options.values(), gold_of(row, answer, options))
    else:
        right = answer if isinstance(answer, list) else [answer]
        if not right or any(one is None or isinstance(one, bool) or not str(one).strip() for one in right):
            raise ValueError('no "answer" or "caption"')
        first, *also_right = map(text, right)
        chosen = {"answer": first}

    for name in ("question", "video", "context"):
        if not isinstance(row.get(name) or "", str):
            raise ValueError(f'"{name}" is not text')
    question = row.get("question", CAPTION_PROMPT)
    if not (question or "").strip():
        raise ValueError('"question" is empty: a caption has no "question" at all')
    return Sample(
        id=str(row.get("id", where)),
        video=with_span(row.get("video"), seconds(row.get("start")), seconds(row.get("end"))),
        question=question,
        category=str(row.get("type") or row.get("category") or ""),
        context=row.get("context") or "",
        also_right=tuple(also_right),
        **chosen,
    )


# --------------------------------------------------------------------------- which option is right


def options_of(options: list | dict | str) -> dict[str, str]:
    """A record's options by their keys, in their order: texts by key, or a list, whose keys are the letters; either may
    stand in JSON (a field of a .csv). Two that read the same are refused: nobody could tell which was chosen."""
    if isinstance(options, str):
        options = json.loads(options)
    if isinstance(options, list):
        if len(options) > len(LETTERS):
            raise ValueError(f"{len(options)} options: at most {len(LETTERS)} can have a letter")
        options = dict(zip(LETTERS[: len(options)], options, strict=True))
    if not isinstance(options, dict):
        raise ValueError('"options" is neither a list nor texts by letter')
    texts = {key.strip(): text(options[key]) for key in sorted(options)}
    if len(set(texts.values())) < len(texts):
        raise ValueError(f"two options read the same: {', '.join(texts.values())}")
    return texts


def gold_of(row: dict, answer: Any, options: dict[str, str]) -> int:
    """The place of the right option, from zero. The one rule for what a record may say of it:

    "gold" is that place, or the option's key; else "answer" is, if it is text, the option's text or its key (a letter
    in either case), and if it is a number, that place or the option's text. What can be read in two ways, or is true
    or false, is refused.
    """
    keys = [key.casefold() for key in options]
    texts = list(options.values())
    said = row.get("gold")
    if said is None:
        said = answer
    if isinstance(said, bool) or not isinstance(said, (str, int)):
        raise ValueError(f"the answer {said!r} is no option's text, letter or number")

    readings = set()
    word = str(said).strip()
    is_number = isinstance(said, int) or (row.get("gold") is not None and word.isdecimal())
    if is_number and int(word) in range(len(texts)):
        readings.add(int(word))
    if word.casefold() in keys:
        readings.add(keys.index(word.casefold()))
    if word in texts and row.get("gold") is None:
        readings.add(texts.index(word))
    if not readings:
        raise ValueError(f'the answer {word!r} is none of {", ".join(texts)} (the place of one, from zero, is "gold")')
    if len(readings) > 1:
        raise ValueError(f'the answer {word!r} may mean more than one of {", ".join(texts)}: say its place in "gold"')
    return readings.pop()


# --------------------------------------------------------------------------- dialogues

ASKS = ("human", "user")
SAYS = ("gpt", "assistant", "model")


def questions_of(row: dict) -> list[dict]:
    """A record as it is; a dialogue as a record for each answer in it. The question of a later one is all that was said
    before, with the question: one text."""
    turns = row.get("messages", row.get("conversations"))
    if turns is None:
        return [row]
    records = []
    before = []
    shared = {key: value for key, value in row.items() if key not in ("messages", "conversations", "videos")}
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        words, videos = content_of(turn.get("content", turn.get("value")))
        named = [*videos, *(row.get("videos") or [])]
        if named:
            shared.setdefault("video", named[0])
        if role in SAYS:
            question = "\n".join(before)
            records.append({**shared, "question": question, "answer": words})
        elif role not in (*ASKS, "system"):
            raise ValueError(f"a turn of {role!r}: neither of a user nor of an assistant")
        before.append(words)

    if not records:
        raise ValueError("a dialogue without an answer")
    if len(records) > 1 and "id" in row:
        for number, record in enumerate(records, 1):
            record["id"] = f"{row['id']}/{number}"
    return records


def content_of(content: str | list) -> tuple[str, list[str]]:
    """What a turn says -> (its words without the marks where a video stood, names of videos)"""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    words, videos = [], []
    for part in parts:
        if part["type"] == "text":
            words.append(re.sub(r"\s*<(?:video|image)>\s*", " ", part["text"]).strip())
        elif part["type"] == "video":
            videos.append(str(part["video"]).removeprefix("file://"))
        else:
            raise ValueError(f"a turn with {part['type']!r}: only text and video can be read")
    return "\n".join(word for word in words if word), videos


# --------------------------------------------------------------------------- parts of a video


def seconds(value: Any) -> float | None:
    """A record's "start" or "end", in seconds or as h:mm:ss; None if it has none."""
    if value in (None, ""):
        return None
    if not isinstance(value, str):
        return float(value)
    total = 0.0
    for part in value.split(":"):  # 00:01:03.5
        total = 60 * total + float(part)
    return total


def with_span(video: str | None, start: float | None, end: float | None) -> str | None:
    """A video's name with the part of it that is meant: film.mp4#t=2.500,8.000"""
    if not video or (start is None and end is None):
        return video
    start = start or 0
    if "#t=" in video or not 0 <= start < (end or float("inf")):
        raise ValueError('"start" and "end" name no span of the video, or "video" names one already')
    until = "" if end is None else f"{end:.3f}"
    return f"{video}#t={start:.3f},{until}"


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Pairs (where, record) of a .csv with our columns or WebVid's."""
    with open(path, encoding=encoding_of(path), newline="") as file:
        for number, fields in enumerate(csv.DictReader(file), 2):  # line 1 is the header
            if None in fields:
                raise ValueError(f"line {number} has more fields than the header: put texts with commas in quotes")
            row = {key: value for key, value in fields.items() if key and (value or key == "question")}
            if "videoid" in row:  # WebVid: <page_dir>/<videoid>.mp4, the caption is called name
                row = {"id": row["videoid"], "caption": row.get("name"), **row}
                row["video"] = str(Path(row.get("page_dir", ""), f"{row['videoid']}.mp4"))
            elif "video" not in row:
                raise ValueError('its header, or the next line, has no "video" or "videoid"')
            yield f"line {number}", row


# --------------------------------------------------------------------------- shards


def tar_rows(path: Path, videos: str | Path) -> Iterator[tuple[str, dict]]:
    """Pairs (where, record) of a shard; a KEY without a video is kept, to be told as bad."""
    shard = os.path.relpath(path, videos)
    if shard.startswith(".."):
        shard = str(path.resolve())
    with tarfile.open(path) as tar:
        for key, parts in tar_keys(tar):
            yield f"key {key}", tar_row(shard, key, parts)


def tar_keys(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(KEY, {suffix: bytes}) of a shard, whose members of one KEY stand side by side, as webdataset asks."""
    key, parts = None, {}
    for member in tar:
        member_key, suffix = parted(name_of(member))
        is_file = member.isfile() or member.issym() or member.islnk()
        if not is_file or not posixpath.basename(member_key):
            continue
        if member_key != key and key is not None:
            yield key, parts
            parts = {}
        key = member_key
        is_text = suffix.lower() in (".txt", ".json")
        parts[suffix] = contents_of(tar, member) if is_text else b""  # videos stay where they lie
    if key is not None:
        yield key, parts


def name_of(member: tarfile.TarInfo) -> str:
    """A member's name without ./ and a leading slash. Members are looked up by it: none is a path outside the tar."""
    return posixpath.normpath(member.name).lstrip("/")


def parted(name: str) -> tuple[str, str]:
    """A member's name -> (KEY, suffix); what is no video, text or JSON is parted at its first dot, as by webdataset."""
    stem, suffix = posixpath.splitext(name)
    if suffix.lower() in (*VIDEO_SUFFIXES, ".txt", ".json"):
        return stem, suffix
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f".{suffix}"


def contents_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a member holds, or the one that it is a link to."""
    try:
        return tar.extractfile(member).read()
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{member.name} is a link that leads nowhere") from error


def tar_row(shard: str, key: str, parts: dict[str, bytes]) -> dict:
    """The record of one KEY: what its .json says, and its .txt as the caption."""
    by_lower_case = {suffix.lower(): suffix for suffix in parts}
    suffix = next((by_lower_case[suffix] for suffix in VIDEO_SUFFIXES if suffix in by_lower_case), ".mp4")
    row = json.loads(parts[by_lower_case[".json"]]) if ".json" in by_lower_case else {}
    row |= {"id": key, "video": f"{shard}/{key}{suffix}"}
    if ".txt" in by_lower_case:
        row["caption"] = parts[by_lower_case[".txt"]].decode().strip()
    return row


@lru_cache(maxsize=4)
def open_tar(path: Path) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    """A tar and where each of its members lies; kept open, because finding that out reads all of it."""
    tar = tarfile.open(path)
    return tar, {name_of(member): member for member in tar}


# --------------------------------------------------------------------------- where videos lie


def file_of(path: str | Path) -> Path:
    """The file on disk that holds a video: that of a span, or the .tar of a member."""
    path = Path(split_span(path)[0])
    shards = (parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file())
    return next(shards, path)


def locate(samples: list[Sample], videos: str | Path) -> list[Sample]:
    """Where a video lies in `videos` under another suffix or folder than its layout's, its name becomes that one.

    The samples themselves are changed. Two files of one name are not guessed at.
    """
    names = {sample.video for sample in samples if sample.video}
    lost = {name for name in names if not file_of(Path(videos, name)).exists()}
    if not lost:
        return samples

    lying = {}  # stem -> the files of that stem, relative to `videos`
    for path in Path(videos).rglob("*"):
        if path.suffix.lower() in (*VIDEO_SUFFIXES, ".jpg"):
            lying.setdefault(path.stem, []).append(str(path.relative_to(videos)))
    for sample in samples:
        if sample.video in lost:
            film = split_span(sample.video)[0]
            span = sample.video[len(film) :]
            stem = Path(film).stem
            files = lying.get(stem) or lying.get(stem.removeprefix("v_"), [])  # some keep ActivityNet without its v_
            if len(files) == 1:
                sample.video = files[0] + span
    return samples


def videos_below(folder: Path) -> list[str]:
    """Names, relative to a folder, of all videos in it and its subfolders. VidReasonError if there are none."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES]
    if not files:
        raise VidReasonError(f"no videos ({folder}): name a folder that holds some")
    return sorted(str(path.relative_to(folder)) for path in files)
