"""Data: every dataset becomes the same record, frozen vision is computed once, step k's batch is a function of k.

    python data.py features --videos DIR --out DIR [--model DIR]      # every video's Z_vision, ready for any later run
    python data.py instruct --videos DIR --teacher URL --model NAME --out FILE.jsonl      # as Causal-Vid-Instruct

Records come from
    *.jsonl   {"id", "video", "question", "answer"}; without "question" it is a caption (or "caption" stands in place of
              "answer"); without "video" it is text alone and may carry a "context" that is read before the question;
              "start" and "end" in seconds show a part of the video, as does "video": "film.mp4#t=2.5,8"
    *.csv     the same columns, or WebVid's: videoid, page_dir, name
    *.tar     webdataset / video2dataset shards: KEY.mp4 with KEY.txt or KEY.json beside it, read where they lie
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import csv
import hashlib
import json
import multiprocessing
import re
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from base64 import b64encode
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool, ThreadPool, concurrent
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.io import encode_jpeg
from tqdm import tqdm

from vidreason import (
    CAPTION_PROMPT,
    PREDICT_PROMPT,
    READER,
    REASON_PROMPT,
    Conversation,
    Features,
    VidReasonError,
    collate_features,
    encode_pair,
    load_vision,
    pack,
    perceive,
    read_config,
    read_video,
    split_span,
)

ROOT = Path(__file__).resolve().parent
TOY_MODEL = ROOT / "toy" / "weights"
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


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


def read_samples(spec, videos=".") -> list[Sample]:
    """Training's way in: FILE (.jsonl, .csv or .tar of records), or BENCHMARK:FILE for one of READERS.

    Either may end in @WEIGHT. `videos` is the folder that video names are relative to. A question with a truth per
    option is asked option by option. VidReasonError names file and line (or record) of what cannot be used.
    """
    spec, weight = split_weight(spec)
    name, colon, path = spec.partition(":")
    if not colon or name not in READERS:
        name, path = "jsonl", spec
    samples = READERS[name](path, videos)
    samples = samples if name == "jsonl" else locate(samples, videos)
    samples = [one for s in samples for one in (per_option(s) if s.options and s.truths else [s])]
    return [replace(s, weight=weight) for s in samples] if weight != 1 else samples


def split_weight(spec):
    """'nextqa:train.csv@2.5' → ('nextqa:train.csv', 2.5): an epoch shows each of its videos 2.5 times."""
    found = re.fullmatch(r"(.+)@(\d*\.?\d+)", str(spec))  # not "*", which shells take for a pattern
    if found and not float(found[2]):
        raise VidReasonError(f"weight 0 ({spec}): leave the file out instead")
    return (found[1], float(found[2])) if found else (str(spec), 1.0)


# --------------------------------------------------------------------------- readers: one per layout


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


def file_of(path):
    """The file on disk that holds a video: that of a span, or the .tar of a member."""
    path = Path(split_span(path)[0])
    return next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), path)


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


def per_option(sample) -> list[Sample]:
    """A question of which any number of options may be right, as one yes-or-no question per option."""
    out = []
    for i, (option, truth) in enumerate(zip(sample.options, sample.truths, strict=True)):
        question, chosen = f"{sample.question} {option}: yes or no?", multiple_choice(["yes", "no"], int(not truth))
        out.append(replace(sample, id=f"{sample.id}/{i}", question=question, truths=(), **chosen))
    return out


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


def load(path):
    return json.loads(path.read_text("utf-8-sig"))


def load_beside(path, name):
    return load(path.with_name(name)) if path.with_name(name).exists() else {}


def numbered(records):
    return ((f"record {n}", row) for n, row in enumerate(records, 1))


def table(path):
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


def nextqa_fields(row, folders):
    video, qid = text(row["video"]), text(row["qid"])  # qid counts within a video
    file = f"NExTVideo/{folders[video]}.mp4" if folders else f"{video}.mp4"
    return {"id": f"{video}_{qid}", "video": file, "question": text(row["question"]), "category": text(row["type"])}


def read_nextqa(path, place):
    """NExT-QA, multiple choice (doc-doc/NExT-QA, dataset/nextqa/*.csv): `answer` counts a0 … a4 from zero."""
    folders = load_beside(path, "map_vid_vidorID.json")
    for row in place(table(path)):
        chosen = multiple_choice([row[f"a{i}"] for i in range(5)], int(row["answer"]))
        yield Sample(**nextqa_fields(row, folders), **chosen)


def read_nextqa_oe(path, place):
    """NExT-QA, open-ended (doc-doc/NExT-OE, dataset/nextqa/*.csv); half the test set has a second right answer."""
    folders, more = (load_beside(path, f) for f in ("map_vid_vidorID.json", f"add_reference_answer_{path.stem}.json"))
    for row in place(table(path)):
        second = more.get(row["video"], {}).get(row["qid"])
        truths = (text(second),) if second else ()
        yield Sample(**nextqa_fields(row, folders), answer=text(row["answer"]), truths=truths)


def read_activitynetqa(path, place):
    """ActivityNet-QA (MILVLG/activitynet-qa, dataset/*_q.json), joined by id with the *_a.json beside it or also given.

    Files have ActivityNet's v_ before an id that may itself begin with v_.
    """
    rows, answers, beside = load(path), {}, path.with_name(path.name.replace("_q.", "_a."))
    if "question" not in rows[0]:
        return  # answers: the file of their questions reads them
    for other in {p for p in (*place.paths, beside) if p.exists()} - {path}:
        answers.update({row["question_id"]: row for row in load(other) if "answer" in row})
    for row in place(numbered(rows)):
        name, video = row["question_id"], f"v_{row['video_name']}.mp4"
        if name not in answers:
            raise ValueError(f"no answer to {name} in {beside.name} or another file that was given")
        kind = ACTIVITYNET_TYPES[range(9).index(answers[name]["type"])]
        yield Sample(name, video, text(row["question"]), text(answers[name]["answer"]), category=kind)


def read_clevrer(path, place):
    """CLEVRER (the host's train.json and validation.json; CLEVRER-Humans' {scene: questions}).

    A descriptive question has one word as answer; of any other's options none, some or all are right.
    """
    scenes = load(path)
    if isinstance(scenes, dict):
        scenes = [{"scene_index": int(scene), **found} for scene, found in scenes.items()]
    for scene in place(numbered(scenes)):
        n = scene["scene_index"]
        folder, file = n // 1000 * 1000, scene.get("video_filename") or f"video_{n:05d}.mp4"
        for q in place((f"scene {n}, question {i}", q) for i, q in enumerate(scene["questions"])):
            name, video = f"{n}_{q['question_id']}", f"video_{folder:05d}-{folder + 1000:05d}/{file}"
            sample = Sample(name, video, text(q["question"]), "", category=q["question_type"])
            if sample.category != "descriptive":
                choices = sorted(q["choices"], key=lambda choice: choice["choice_id"])
                sample.options = [text(choice["choice"]) for choice in choices]
                sample.truths = tuple({"correct": True, "wrong": False}[choice["answer"]] for choice in choices)
                right = (o for o, truth in zip(sample.options, sample.truths, strict=True) if truth)
            sample.answer = " and ".join(right) or "none of them" if sample.options else text(q["answer"])
            yield sample


def vcr_text(tokens, objects):
    """Tags are lists of places in `objects`, from zero; they read person1, car4: counted from one, as in *_orig."""
    kinds = dict(enumerate(objects))  # some tags exceed it
    words = (t if isinstance(t, str) else " and ".join(f"{kinds.get(i, 'person')}{i + 1}" for i in t) for t in tokens)
    return re.sub(r" (?=[.,?!;:]|'\w|n't\b)", "", " ".join(words))


def read_vcr(path, place):
    """VCR (rowanz/r2c, dataloaders/vcr.py): a line is two questions, Q->A and, with its gold answer said, QA->R.

    Q->AR is no question: evaluate.py counts the lines of which both are right.
    """
    for row in map(json.loads, place(jsonl_rows(path))):
        say, video = partial(vcr_text, objects=row["objects"]), f"vcr1images/{row['img_fn']}"
        question = say(row["question"])
        for mode, kind in (("Q->A", "answer"), ("QA->R", "rationale")):
            chosen = multiple_choice(map(say, row[f"{kind}_choices"]), row[f"{kind}_label"])
            yield Sample(f"{row['annot_id']}/{mode}", video, question, category=mode, **chosen)
            question += f" {chosen['answer']}"


def read_tot(path, place):
    """Test of Time's synthetic pairs (bpiyush/TestOfTime, package/datasets/synthetic.py); the relation is in the id.

    The benchmark compares sim(video, sentence) with that of the sentence with its events swapped; to choose one of
    the two sentences is our own version for language models.
    """
    for row in place(table(path)):
        name = text(row["video_id"])
        relation = "before" if "before" in name else "after"
        events = text(row["sentence"]).lower().split(f" {relation} ")
        if len(events) != 2:
            raise ValueError(f"{row['sentence']!r} is not two events with {relation!r} between them")
        gold = zlib.crc32(name.encode()) % 2  # not always the first
        chosen = multiple_choice([f" {relation} ".join(events[:: 1 if i == gold else -1]) for i in range(2)], gold)
        yield Sample(name, f"videos/{name}.mp4", TOT_QUESTION, category=relation, **chosen)


def vlm4d_half(row, path):
    """Ids count from 1 in each half of VLM4D, so that "real" or "synthetic" must become part of them."""
    found = re.search(r"videos_(real|synthetic)/", row.get("video") or "")
    found = found or re.search(r"(real|synthetic)_mc", f"{path.parent.name}/{path.name}")
    if not found:
        raise ValueError("neither its video nor the file's name (real_mc…, synthetic_mc…) says which half it is of")
    return found[1]


def read_vlm4d(path, place):
    """VLM4D (ShijieZhou-UCLA/VLM4D, data/*_mc.json; its result files, too): `answer` is an option's text or number.

    Categories are those of its acc_final_statistics.py.
    """
    for row in place(numbered(load(path))):
        gold, half = text(row["answer"] if "answer" in row else row["ground_truth_answer"]), vlm4d_half(row, path)
        options = [text(row["choices"][letter]) for letter in sorted(row["choices"])]
        kind = "FP" if f"{gold.lower()} ".startswith("no ") else "directional"
        if half == "real":
            kind = "ego-centric" if int(row["id"].rpartition("_")[2]) > 922 else "exo-centric"
        video = row["video"].rpartition("/main/")[2] if row.get("video") else None  # stored as a download address
        chosen = multiple_choice(options, index_of(gold, options))
        yield Sample(f"{half}_{row['id']}", video, text(row["question"]), category=f"{half} {kind}", **chosen)


def read_video_holmes(path, place):
    """Video-Holmes (TencentARC/Video-Holmes, *_Video-Holmes.json); question ids may start again with each film."""
    for row in place(numbered(load(path))):
        letters, name = sorted(row["Options"]), f"{row['video ID']}_{row['Question ID']}"
        chosen = multiple_choice([row["Options"][k] for k in letters], index_of(row["Answer"].strip(), letters))
        yield Sample(name, f"{row['video ID']}.mp4", text(row["Question"]), category=row["Question Type"], **chosen)


LETTERS = list("ABCDEFGHIJ")
ACTIVITYNET_TYPES = "motion,spatial relation,temporal relation,yes/no,color,object,location,number,other".split(",")
TOT_QUESTION = "In which order do the two events of the video happen?"
READERS = {  # name → read(path or paths, videos=".") -> list[Sample]
    name: partial(read_files, samples_of)
    for name, samples_of in {
        "jsonl": read_records,
        "nextqa": read_nextqa,
        "nextqa-oe": read_nextqa_oe,
        "activitynetqa": read_activitynetqa,
        "clevrer": read_clevrer,
        "vcr": read_vcr,
        "tot": read_tot,
        "vlm4d": read_vlm4d,
        "video-holmes": read_video_holmes,
    }.items()
}


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


# --------------------------------------------------------------------------- features: frozen work, done once


@lru_cache(maxsize=4)
def open_tar(path):
    """A tar and where each of its members lies; kept open, because finding that out reads all of it."""
    tar = tarfile.open(path)
    return tar, {member.name: member for member in tar}


ORDERS = {  # what a control shows in place of n frames in their order: n indices
    "shuffled": lambda n, name: np.random.default_rng(zlib.crc32(name.encode())).permutation(n),
    "one_frame": lambda n, name: np.full(n, n // 2),
}


def look_at(path, vision):
    """perceive() of a file, or of a member of a tar: x/shard.tar/key.mp4."""
    name, tar = Path(split_span(path)[0]), file_of(path)
    if tar == name:
        return perceive(path, *vision)
    opened, members = open_tar(tar)
    member = members.get(str(name.relative_to(tar)))
    if member is None:
        raise VidReasonError(f"no such member ({path}): download the shard again")
    with tempfile.NamedTemporaryFile(suffix=name.suffix) as file:
        file.write(opened.extractfile(member).read())
        file.flush()
        try:
            return perceive(file.name + str(path)[len(str(name)) :], *vision)
        except VidReasonError as error:
            raise VidReasonError(str(error).replace(file.name, str(name))) from error


def sha256(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


def fingerprint(config, model_dir, order=None) -> dict:
    """What Z_vision depends on. Features with another fingerprint are stale and are refused."""
    settings = {
        k: v
        for k, v in asdict(config).items()
        if not k.startswith(("fusion", "llm", "lora", "max_new", "num_queries", "time_"))
    }
    for part in ("encoder_weights", "sam_weights"):
        path = Path(model_dir, settings[part])
        if path.is_file():
            settings[part] = sha256(path)[:16]
    settings["reader"] = READER
    return {**settings, "order": order} if order else settings


def write_json(path, value):
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value))
    aside.rename(path)


def start_worker(config, model_dir, device, order):
    global VISION, ORDER  # one encoder and SAM per process, not per video
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    VISION, ORDER = (*load_vision(config, model_dir, device), config), order


def encode_one(path):
    """→ (z_vision (N_v, D_v) fp16, times, is_object) as arrays, or why the video cannot be read."""
    try:
        frames = VISION[-1].num_clips * VISION[-1].frames_per_clip
        found = look_at(path, (*VISION, *([ORDERS[ORDER](frames, path.name)] if ORDER else [])))
    except VidReasonError as error:
        return str(error)
    return found.z_vision.half().cpu().numpy(), found.times.cpu().numpy(), found.is_object.cpu().numpy()


def outcome_of(future, path, patience):
    """What encode_one returned; a worker that hung or died is a bad video, too: some files do that to decoders."""
    try:
        return future.result()
    except TimeoutError:
        return f"decoding took more than {patience} s ({path}): convert it again"
    except ProcessExpired as error:
        return f"the decoder died: {error} ({path}): convert it again"


def write_shard(folder, names, outcomes, path):
    """One shard, its index last: a shard without an index does not exist."""
    kept = [(n, o) for n, o in zip(names, outcomes, strict=True) if not isinstance(o, str)]
    bad = {n: o for n, o in zip(names, outcomes, strict=True) if isinstance(o, str)}
    if kept:
        arrays = zip(*(o for _, o in kept), strict=True)
        keys = ("z_vision", "times", "is_object")
        tensors = {k: torch.from_numpy(np.concatenate(a)) for k, a in zip(keys, arrays, strict=True)}
        save_file(tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    counts = [len(o[1]) for _, o in kept]
    kept = [name for name, _ in kept]
    sizes = [file_of(folder / name).stat().st_size for name in kept]
    write_json(path.with_suffix(".json"), {"videos": kept, "counts": counts, "sizes": sizes, "bad": bad})


def claim(folder, print_, write):
    """Refuse a folder of features that were made otherwise; else mark it, if this process is the one to write."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "fingerprint.json"
    if mark.exists() and json.loads(mark.read_text()) != print_:
        raise VidReasonError(
            f"features were made by another encoder, SAM or settings, or of other frames ({folder}): "
            "give another --features folder"
        )
    if write:
        write_json(mark, print_)


def encode_videos(
    model_dir,
    config,
    folder,
    names,
    out,
    processes=1,
    shard_size=100,
    rank=0,
    world=1,
    device="cpu",
    patience=300,
    order=None,
):
    """Write Z_vision of every named video below `folder` to shards in `out`; of several ranks each does its part.

    A killed run goes on where it stopped. A video of more than `patience` seconds is bad. `order`: one of ORDERS.
    """
    out, folder = Path(out), Path(folder)
    claim(out, fingerprint(config, model_dir, order), rank == 0)
    known = FeatureCache(out)
    known.check(folder, names)
    names = [n for n in sorted(set(names))[rank::world] if n not in known]
    if not names:
        return
    load_vision(config, model_dir)  # if the weights are wrong, say so here and not in every worker
    stem = f"shard-{rank:04d}-{time.time_ns():x}"  # never an old name again
    groups = [names[i : i + shard_size] for i in range(0, len(names), shard_size)]
    pool = ProcessPool(
        min(processes, len(names)),
        max_tasks=5000,  # decoders leak
        initializer=start_worker,
        initargs=(config, model_dir, device, order),
        context=multiprocessing.get_context("spawn"),
    )
    quiet = {"disable": True} if rank else {}  # else TQDM_DISABLE decides
    waiting, bar = deque(), tqdm(total=len(names), desc=f"videos → Z_vision{f', {order}' * bool(order)}", **quiet)

    def finish(number, group, futures):
        outcomes = []
        for name, future in zip(group, futures, strict=True):
            outcomes.append(outcome_of(future, folder / name, patience))
            bar.update()
        write_shard(folder, group, outcomes, out / f"{stem}-{number:06d}.safetensors")

    try:
        for number, group in enumerate(groups):
            futures = [pool.schedule(encode_one, args=(folder / name,), timeout=patience) for name in group]
            waiting.append((number, group, futures))
            if len(waiting) > 1:  # the next group is under way while this one ends
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
        pool.close()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()
        bar.close()


class FeatureCache:
    """Read-only view of a folder that encode_videos wrote. `bad` maps unreadable videos to their reasons."""

    def __init__(self, folder):
        self.folder, self.videos, self.sizes, self.bad, self.open = Path(folder), {}, {}, {}, {}
        for index in sorted(self.folder.glob("shard-*.json")):
            shard, start = json.loads(index.read_text()), 0
            self.bad.update(shard["bad"])
            if "sizes" in shard:  # older ones have none
                self.sizes.update(zip(shard["videos"], shard["sizes"], strict=True))
            for name, count in zip(shard["videos"], shard["counts"], strict=True):
                self.videos[name] = (index.with_suffix(".safetensors"), start, start + count)
                start += count
        self.bad = {name: why for name, why in self.bad.items() if name not in self.videos}  # mended since

    def check(self, folder, names, most=1000):
        """Refuse features of other files of the same names. Looks at `most` of them; those that are gone pass."""
        known = [name for name in names if name in self.sizes]
        for name in known[:: len(known) // most + 1]:
            file = file_of(Path(folder, name))
            if file.is_file() and file.stat().st_size != self.sizes[name]:
                raise VidReasonError(
                    f"features were made of another file called {name} ({self.folder}): give another --features folder"
                )

    def __contains__(self, name):
        return name in self.videos

    def __getitem__(self, name) -> Features:
        path, start, end = self.videos[name]
        if path not in self.open:
            self.open[path] = safe_open(path, "pt")
        part = {key: self.open[path].get_slice(key)[start:end] for key in ("z_vision", "times", "is_object")}
        return Features(part["z_vision"].float(), part["times"], part["is_object"])


def report_bad(cache, names, path, max_bad_fraction):
    """Write bad_videos.jsonl; VidReasonError if too many of the named videos cannot be read."""
    bad = {name: cache.bad.get(name, "no features") for name in names if name not in cache}
    path.with_suffix(".partial").write_text(
        "".join(json.dumps({"video": name, "reason": why}) + "\n" for name, why in sorted(bad.items()))
    )
    path.with_suffix(".partial").rename(path)
    if len(bad) > max_bad_fraction * len(names):
        example = next(iter(bad.values()))
        raise VidReasonError(
            f"{len(bad)} of {len(names)} videos cannot be read, for example: {example.rstrip('.')} ({path}): "
            "mend them, or raise --max_bad_fraction; what could be read is kept"
        )
    return bad


# --------------------------------------------------------------------------- batches


class Batches:
    """Which samples make up step k: a pure function of (seed, k), so that a resumed run needs no loader state.

    With several ranks each takes every world-th row of the global batch, which is the same whatever their number. An
    epoch shows a video as often as its weight says; of 2.5 times the half is drawn anew for each epoch.
    """

    def __init__(self, settings, samples, cache, tokenizer, num_queries, rank=0, world=1):
        self.settings, self.cache, self.num_queries = settings, cache, num_queries
        self.rank, self.world = rank, world
        self.encode = lru_cache(maxsize=1 << 18)(partial(encode_pair, tokenizer))
        self.words = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        by_video, self.text = {}, [s for s in samples if s.video is None]
        for s in samples:
            if s.video is not None and s.video in cache:
                by_video.setdefault((s.video, s.weight), []).append(s)
        self.videos = sorted(by_video.items())
        if not self.videos:
            raise VidReasonError(f"no sample has a readable video ({settings.videos}): check --data and --videos")
        weights = np.array([weight for (_, weight), _ in self.videos])
        self.epoch_length = max(1, round(weights.sum()))
        self.ends = np.cumsum(weights) * (self.epoch_length / weights.sum())
        self.ends[-1] = self.epoch_length  # rounding must not make one epoch longer than another
        self.order = lru_cache(maxsize=2)(self.order_of)

    def order_of(self, epoch):
        """Indices of the epoch's videos, in its order."""
        start = np.random.default_rng((self.settings.seed, epoch, 4)).random()
        times = np.diff(np.floor(np.concatenate([[0], self.ends]) + start)).astype(int)
        shown = np.repeat(np.arange(len(self.videos)), times)
        return np.random.default_rng((self.settings.seed, epoch, 1)).permutation(shown)

    def digest(self):
        """A hash of all that decides what step k is, apart from the settings."""
        found = hashlib.sha256()
        for name, samples in [*self.videos, ("", self.text)]:
            found.update(repr((name, [(s.question, s.answer, s.context) for s in samples])).encode())
        return found.hexdigest()

    def step(self, k):
        """→ this rank's micro-batches [(Packed, vision | None)]"""
        s, seen, told = self.settings, [], []
        for place in range(k * s.batch + self.rank, (k + 1) * s.batch, self.world):
            epoch, index = divmod(place, self.epoch_length)
            (name, _), samples = self.videos[self.order(epoch)[index]]
            some = np.random.default_rng((s.seed, place, 2)).permutation(len(samples))[: s.pairs_per_video]
            seen.append((Conversation([self.encode(samples[i].question, samples[i].answer) for i in some]), name))
        if self.text and s.text_share:
            picks = np.random.default_rng((s.seed, k, 3)).integers(len(self.text), size=round(s.batch * s.text_share))
            for text in (self.text[i] for i in picks[self.rank :: self.world]):
                told.append((Conversation([self.encode(text.question, text.answer)], self.words(text.context)), None))
        micro = []
        for rows in (seen, told):
            rows.sort(key=lambda row: len(row[0].context) + sum(len(p) + len(t) for p, t in row[0].pairs))
            for i in range(0, len(rows), s.micro_batch):  # rows of one length waste no padding
                said, names = zip(*rows[i : i + s.micro_batch], strict=True)
                vision = collate_features([self.cache[name] for name in names]) if rows is seen else None
                micro.append((pack(said, self.num_queries if rows is seen else 0), vision))
        return micro


def write_familiar(cache, path, quantile=0.999):
    """What the clips of a cache look like, so that infer.py can say that a clip is unlike them, if not of each.

    mean (D_v,) and whiten (D_v, D_v) of the global tokens, limit (): almost every known video stays below it.
    """
    tokens = [cache[name].z_vision[~cache[name].is_object] for name in list(cache.videos)[:4000]]  # each (N_t, D_v)
    flat = torch.cat(tokens).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T) + 1e-3 * flat.var(0).mean() * torch.eye(flat.shape[1]))
    mean, whiten = flat.mean(0).float(), (vectors * values.rsqrt()).float().contiguous()
    distances = torch.stack([((t - mean) @ whiten).norm(dim=1).mean() for t in tokens])
    save_file(
        {"mean": mean, "whiten": whiten, "limit": distances.quantile(quantile) * 1.1}, path.with_suffix(".partial")
    )
    path.with_suffix(".partial").rename(path)


# --------------------------------------------------------------------------- §4.1.2: Causal-Vid-Instruct, by a teacher

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
STOPS = {  # what every call would meet: HTTP status → advice
    401: "put a valid key into the environment variable that --api_key_env names",
    402: "top up the account",
    404: "check the model's name, and the address, which mostly ends in /v1",
}


class NoReply(Exception):
    """This call has no answer, others may have one. refused: the model, or a filter before it, declined."""

    def __init__(self, reason, refused=False, usage=(0, 0)):
        super().__init__(" ".join(str(reason).split())[:300])
        self.refused, self.usage = refused, usage


@lru_cache(maxsize=4)  # one pool of connections for all threads
def chat_client(**options):
    import openai

    return openai.OpenAI(**options)


def chat(url, model, messages, key="none", timeout=120, tries=8, **options):
    """One reply of an OpenAI-compatible endpoint → (text, (prompt tokens, reply tokens), the model that served it).

    The client tries 408, 409, 429, 5xx, time-outs and broken connections again: after what Retry-After says (up to two
    minutes), else with exponential back-off and jitter. VidReasonError: every call would meet that; NoReply: this has.
    """
    import openai  # here, because it takes a second that no other program owes

    try:
        url = url.removesuffix("/chat/completions")
        client = chat_client(base_url=url, api_key=key, timeout=timeout, max_retries=tries - 1)
        reply = client.chat.completions.create(model=model, messages=messages, **options)
        choice, used = reply.choices[0], reply.usage
        usage = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        text, refusal, served_by = choice.message.content or "", choice.message.refusal, reply.model
    except openai.APIConnectionError as error:
        why = f"{type(error.__cause__).__name__} {error.__cause__}"  # names: the client's HTTP library has changed once
        if why.startswith(("Connect", "Proxy", "UnsupportedProtocol")):
            raise VidReasonError(f"cannot reach the endpoint: {why} ({url}): check it, and its server") from error
        raise NoReply(f"no answer in {tries} tries of {timeout} s: {why}") from error
    except openai.APIStatusError as error:
        status = 402 if error.code == "insufficient_quota" else error.status_code  # which OpenAI calls 429
        if status in STOPS:
            raise VidReasonError(f"endpoint declines: {str(error)[:200]} ({url}, {model}): {STOPS[status]}") from error
        raise NoReply(error, error.code in ("content_filter", "content_policy_violation")) from error
    except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise NoReply(f"the answer is no chat completion: {error}") from error
    if refusal or choice.finish_reason == "content_filter":
        raise NoReply(refusal or "stopped by a content filter", True, usage)
    return text, usage, served_by


def show(path, frames):
    """A clip as the teacher sees it (§4.1.2) → content of a chat message, or why the video cannot be read."""
    torch.set_num_threads(1)
    try:  # the middle of each of its equal parts; the centre square, for the student sees no more either
        _, times, pictures = read_video(path, frames, 1, 16, FRAME_SIDE)
    except VidReasonError as error:
        return str(error)
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
    if isinstance(content, str):
        return "unreadable", content, spent
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


def positive(text) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, as all others."""

    def error(self, message):
        raise VidReasonError(f"{message} (command line): see {self.prog} --help")


def guarded(main):
    """Run a program; a mistake of the user is one line on stderr and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' advice to programmers, not to users
    try:
        main()
        return
    except OSError as error:
        message = f"{error.strerror} ({error.filename}): check the path"
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory: {str(error)[:80]} (GPU): lower --batch or --micro_batch, or give --checkpointing"
    except VidReasonError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted (you): the same command goes on from the last checkpoint, if the program keeps any"
    if int(os.environ.get("RANK", 0)):
        time.sleep(3)  # most mistakes are everybody's; torchrun stops the others when rank 0 has said it
    sys.exit(print(f"error: {' '.join(message.split())}", file=sys.stderr) or 2)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("features", help="encode videos once: Z_vision of each, in shards")
    p.add_argument("--videos", type=Path, required=True, help="folder of videos")
    p.add_argument("--out", type=Path, required=True, help="folder for the shards; a killed run goes on")
    p.add_argument(
        "--model",
        type=Path,
        default=TOY_MODEL,
        help="model directory whose encoder and SAM are used (default: the toy)",
    )
    p.add_argument("--processes", type=positive, default=os.cpu_count(), help="processes that work side by side")
    p = sub.add_parser("instruct", help="Causal-Vid-Instruct: a teacher explains and predicts, records for stage 2")
    p.add_argument("--videos", type=Path, required=True, help="folder of videos")
    p.add_argument("--teacher", required=True, metavar="URL", help="OpenAI-compatible endpoint, such as http://…/v1")
    p.add_argument("--model", required=True, help="the teacher's name there; it must take images")
    p.add_argument("--out", type=Path, required=True, help="FILE.jsonl; failures are listed in FILE.failed.jsonl")
    p.add_argument("--frames", type=positive, default=8, help="frames that the teacher sees of each video")
    p.add_argument("--concurrency", type=positive, default=8, help="videos under way at a time")
    p.add_argument("--max_videos", type=positive, help="a fair sample of so many; try a few before you pay for all")
    p.add_argument("--price", type=float, nargs=2, metavar=("PROMPT", "REPLY"), help="dollars per million tokens")
    p.add_argument("--timeout", type=positive, default=120, help="seconds that one try may take")
    p.add_argument("--tries", type=positive, default=8, help="tries of a call that meets 429, 5xx or a time-out")
    p.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    args = parser.parse_args()
    videos = (p for p in args.videos.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    names = sorted(str(p.relative_to(args.videos)) for p in videos)
    if not names:
        raise VidReasonError(f"no videos ({args.videos}): name a folder that holds some")
    if args.command == "instruct":
        return instruct(args, names)
    encode_videos(args.model, read_config(args.model), args.videos, names, args.out, args.processes)
    cache = FeatureCache(args.out)
    print(f"{len(cache.videos)} videos encoded, {len(cache.bad)} unreadable: {args.out}")


if __name__ == "__main__":
    guarded(main)
