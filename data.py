"""Data: every dataset becomes the same record, frozen vision is computed once, step k's batch is a function of k.

    python data.py features --videos DIR --out DIR [--model DIR]      # every video's Z_vision, ready for any later run

Records come from
    *.jsonl   {"id", "video", "question", "answer"}; without "question" it is a caption (or "caption" stands in place of
              "answer"); without "video" it is text alone and may carry a "context" that is read before the question
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
import sys
import tarfile
import tempfile
import time
from collections import deque
from concurrent.futures import TimeoutError
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vidreason import (
    CAPTION_PROMPT,
    Conversation,
    Features,
    VidReasonError,
    collate_features,
    encode_pair,
    load_vision,
    pack,
    perceive,
    read_config,
)

ROOT = Path(__file__).resolve().parent
TOY_MODEL = ROOT / "toy" / "weights"
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


@dataclass(slots=True)
class Sample:
    """One question (or caption) about one video; video None: text alone. About 0.4 kB of memory each."""

    id: str
    video: str | None
    question: str
    answer: str
    options: list[str] | None = None
    category: str = ""
    context: str = ""


def read_samples(path, videos=".") -> list[Sample]:
    """Read a .jsonl, .csv or .tar of records; `videos` is the folder that video names are relative to.

    Raises VidReasonError with file and line (or key) for a record that cannot be used.
    """
    path = Path(path)
    rows = {".csv": csv_rows, ".tar": partial(tar_rows, videos=videos)}.get(path.suffix, jsonl_rows)
    samples, where = [], "start"
    try:
        for where, row in rows(path):
            samples.append(to_sample(row, where))
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise VidReasonError(f"cannot read the annotations: {error} ({path}): check the path") from error
    except (ValueError, AttributeError) as error:  # AttributeError: JSON, but no object
        raise VidReasonError(f"unreadable record: {error} ({path}, {where}): mend or remove it") from error
    if not samples:
        raise VidReasonError(f"no records ({path}): the file is empty")
    return samples


def to_sample(row, where) -> Sample:
    row = json.loads(row) if isinstance(row, str) else row
    answer = row.get("answer", row.get("caption"))
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError('no "answer" or "caption"')
    for name in ("question", "video", "context"):
        if not isinstance(row.get(name) or "", str):
            raise ValueError(f'"{name}" is not text')
    question, context = row.get("question") or CAPTION_PROMPT, row.get("context", "")
    name = str(row.get("id", where))
    return Sample(name, row.get("video"), question, answer, row.get("options"), row.get("type", ""), context)


def jsonl_rows(path):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield f"line {number}", line


def csv_rows(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):  # line 1 is the header
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


def look_at(path, vision):
    """perceive() of a file, or of a member of a tar: x/shard.tar/key.mp4."""
    tar = next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), None)
    if tar is None:
        return perceive(path, *vision)
    opened, members = open_tar(tar)
    member = members.get(str(path.relative_to(tar)))
    if member is None:
        raise VidReasonError(f"no such member ({path}): download the shard again")
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        file.write(opened.extractfile(member).read())
        file.flush()
        try:
            return perceive(file.name, *vision)
        except VidReasonError as error:
            raise VidReasonError(str(error).replace(file.name, str(path))) from error


def fingerprint(config, model_dir) -> dict:
    """What Z_vision depends on. Features with another fingerprint are stale and are refused."""
    settings = {
        k: v
        for k, v in asdict(config).items()
        if not k.startswith(("fusion", "llm", "lora", "max_new", "num_queries", "time_"))
    }
    for part in ("encoder_weights", "sam_weights"):
        path = Path(model_dir, settings[part])
        if path.is_file():
            found = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    found.update(block)
            settings[part] = found.hexdigest()[:16]
    return settings


def write_json(path, value):
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value))
    aside.rename(path)


def start_worker(config, model_dir, device):
    global VISION  # one encoder and SAM per process, not per video
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    VISION = (*load_vision(config, model_dir, device), config)


def encode_one(path):
    """→ (z_vision (N_v, D_v) fp16, times, is_object) as arrays, or why the video cannot be read."""
    try:
        found = look_at(path, VISION)
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


def write_shard(names, outcomes, path):
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
    write_json(path.with_suffix(".json"), {"videos": [n for n, _ in kept], "counts": counts, "bad": bad})


def encode_videos(
    model_dir, config, folder, names, out, processes=1, shard_size=100, rank=0, world=1, device="cpu", patience=300
):
    """Write Z_vision of every named video below `folder` to shards in `out`; of several ranks each does its part.

    A killed run goes on where it stopped; a video that takes more than `patience` seconds counts as bad.
    """
    out, folder = Path(out), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    mark, print_ = out / "fingerprint.json", fingerprint(config, model_dir)
    if mark.exists() and json.loads(mark.read_text()) != print_:
        raise VidReasonError(
            f"features were made by another encoder, SAM or settings ({out}): give another --features folder"
        )
    if rank == 0:
        write_json(mark, print_)
    known = FeatureCache(out).videos
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
        initargs=(config, model_dir, device),
        context=multiprocessing.get_context("spawn"),
    )
    waiting, bar = deque(), tqdm(total=len(names), desc="videos → Z_vision", disable=rank > 0)

    def finish(number, group, futures):
        outcomes = []
        for name, future in zip(group, futures, strict=True):
            outcomes.append(outcome_of(future, folder / name, patience))
            bar.update()
        write_shard(group, outcomes, out / f"{stem}-{number:06d}.safetensors")

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
        self.folder, self.videos, self.bad, self.open = Path(folder), {}, {}, {}
        for index in sorted(self.folder.glob("shard-*.json")):
            shard, start = json.loads(index.read_text()), 0
            self.bad.update(shard["bad"])
            for name, count in zip(shard["videos"], shard["counts"], strict=True):
                self.videos[name] = (index.with_suffix(".safetensors"), start, start + count)
                start += count
        self.bad = {name: why for name, why in self.bad.items() if name not in self.videos}  # mended since

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

    With several ranks each takes every world-th row of the global batch, which is the same whatever their number.
    """

    def __init__(self, settings, samples, cache, tokenizer, num_queries, rank=0, world=1):
        self.settings, self.cache, self.num_queries = settings, cache, num_queries
        self.rank, self.world = rank, world
        self.encode = lru_cache(maxsize=1 << 18)(partial(encode_pair, tokenizer))
        self.words = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        by_video, self.text = {}, [s for s in samples if s.video is None]
        for s in samples:
            if s.video is not None and s.video in cache:
                by_video.setdefault(s.video, []).append(s)
        self.videos = sorted(by_video.items())
        if not self.videos:
            raise VidReasonError(f"no sample has a readable video ({settings.videos}): check --data and --videos")
        self.order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((settings.seed, epoch, 1)).permutation(len(self.videos))
        )

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
            name, samples = self.videos[self.order(place // len(self.videos))[place % len(self.videos)]]
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
    """What the clips of a cache look like, so that infer.py can say that a clip is unlike them.

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
    try:
        main()
        return
    except OSError as error:
        message = f"{error.strerror} ({error.filename}): check the path"
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory: {str(error)[:80]} (GPU): lower --micro_batch, or give --checkpointing"
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
    args = parser.parse_args()
    videos = (p for p in args.videos.rglob("*") if p.suffix.lower() in (".mp4", ".webm", ".mkv", ".avi", ".mov"))
    names = sorted(str(p.relative_to(args.videos)) for p in videos)
    if not names:
        raise VidReasonError(f"no videos ({args.videos}): name a folder that holds some")
    encode_videos(args.model, read_config(args.model), args.videos, names, args.out, args.processes)
    cache = FeatureCache(args.out)
    print(f"{len(cache.videos)} videos encoded, {len(cache.bad)} unreadable: {args.out}")


if __name__ == "__main__":
    guarded(main)
