"""Frozen vision, computed once: a folder that holds Z_vision of every video.

    python -m data.features --videos DIR --out DIR [--model DIR]      # ready for any later run of the same encoder

The folder: fingerprint.json says what Z_vision was made with; shard-*.safetensors hold it, about a hundred videos each;
shard-*.json beside each says which videos those are, and which could not be read.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import json
import multiprocessing
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, TimeoutError  # the built-in one since Python 3.11
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data.program import TOY_MODEL, Parser, guarded, positive, sha256, write_json
from data.records import contents_of, file_of, open_tar, videos_below
from vidreason import (
    READER,
    Config,
    Features,
    VidReasonError,
    load_vision,
    perceive,
    read_config,
    split_span,
    write_aside,
)


def shuffled(count: int, name: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).permutation(count)


def one_frame(count: int, name: str) -> np.ndarray:
    return np.full(count, count // 2)


# What a control shows in place of the frames of a video in their order: count and name of the video -> count indices
ORDERS = {"shuffled": shuffled, "one_frame": one_frame}


# --------------------------------------------------------------------------- in a worker: video -> Z_vision


class Encoded(NamedTuple):
    """Z_vision of one video, on its way to a shard; the fields are those of Features, and the names in the shard."""

    z_vision: np.ndarray  # (N_v, D_v) fp16
    times: np.ndarray  # (N_v,) fp32
    is_object: np.ndarray  # (N_v,) bool


@dataclass
class Unreadable:
    """In place of what a video should have become: why it could not."""

    reason: str


class Worker:
    """What a process keeps from video to video: one encoder and one SAM, and how frames are ordered."""

    def __init__(self, config: Config, model_dir, device: str, order: str | None):
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs
        self.encoder, self.sam = load_vision(config, model_dir, device)
        self.config = config
        self.order = order

    def perceive(self, path: Path) -> Features:
        order = slice(None)
        if self.order:
            frames = self.config.num_clips * self.config.frames_per_clip
            order = ORDERS[self.order](frames, path.name)
        return look_at(path, self.encoder, self.sam, self.config, order)


worker: Worker | None = None  # of this process, if it is one that encode_videos has started


def start_worker(*given):
    global worker  # functions are what a pool calls, so what lasts between the calls is the module's
    worker = Worker(*given)


def encode_one(path: Path) -> Encoded | Unreadable:
    """A corrupt video is caught here, and its way leads on to bad_videos.jsonl:

    decoded in a worker -> Unreadable -> "bad" in the index of its shard (write_shard) -> FeatureCache.bad -> report_bad
    -> bad_videos.jsonl; Batches, on every rank, skip what the cache does not hold. One that hangs or kills its decoder
    becomes Unreadable in outcome_of, and goes the same way.
    """
    try:
        features = worker.perceive(path)
    except VidReasonError as error:
        return Unreadable(str(error))
    z_vision = features.z_vision.half()
    return Encoded(*(tensor.cpu().numpy() for tensor in (z_vision, features.times, features.is_object)))


def look_at(path: Path, *vision) -> Features:
    """perceive() of a file, or of a member of a tar: x/shard.tar/key.mp4."""
    name = Path(split_span(path)[0])
    tar = file_of(path)
    if tar == name:
        return perceive(path, *vision)
    opened, members = open_tar(tar)
    member = members.get(str(name.relative_to(tar)))
    if member is None:
        raise VidReasonError(f"no such member ({path}): download the shard again")

    try:
        contents = contents_of(opened, member)
    except ValueError as error:
        raise VidReasonError(f"{error} ({path}): download the shard again") from error
    span = str(path)[len(str(name)) :]
    with tempfile.NamedTemporaryFile(suffix=name.suffix) as file:
        file.write(contents)
        file.flush()
        try:
            return perceive(file.name + span, *vision)
        except VidReasonError as error:
            raise VidReasonError(str(error).replace(file.name, str(name))) from error


# --------------------------------------------------------------------------- many workers: videos -> shards


def encode_videos(
    model_dir: Path | str,
    config: Config,
    folder: Path | str,
    names: list[str],
    out: Path | str,
    processes: int = 1,
    shard_size: int = 100,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
    patience: float = 300,
    order: str | None = None,
) -> None:
    """Write Z_vision of every named video below `folder` to shards in `out`; of several ranks each does its part.

    A killed run goes on where it stopped. A video of more than `patience` seconds is bad. `order`: one of ORDERS.
    VidReasonError if `out` holds features that were made otherwise, or if the weights cannot be used.
    """
    out, folder = Path(out), Path(folder)
    claim(out, fingerprint(config, model_dir, order), rank == 0)
    cache = FeatureCache(out)
    cache.check(folder, names)
    missing = [name for name in sorted(set(names))[rank::world] if name not in cache]
    if not missing:
        return
    load_vision(config, model_dir)  # if the weights are wrong, say so here and not in every worker

    title = "videos → Z_vision"
    if order:
        title += f", {order}"
    quiet = {"disable": True} if rank else {}  # else TQDM_DISABLE decides
    stem = f"shard-{rank:04d}-{time.time_ns():x}"  # never an old name again
    groups = [missing[i : i + shard_size] for i in range(0, len(missing), shard_size)]
    start = (config, model_dir, device, order)
    with worker_pool(min(processes, len(missing)), start) as pool, tqdm(total=len(missing), desc=title, **quiet) as bar:
        futures_of_groups = schedule_ahead(pool, folder, groups, patience)
        for number, (group, futures) in enumerate(zip(groups, futures_of_groups, strict=True)):
            outcomes = []
            for name, future in zip(group, futures, strict=True):
                outcomes.append(outcome_of(future, folder / name, patience))
                bar.update()
            write_shard(folder, group, outcomes, out / f"{stem}-{number:06d}.safetensors")


@contextmanager
def worker_pool(count: int, start: tuple) -> Iterator[ProcessPool]:
    """Processes in which encode_one works. They end with the block: when all is done, or at once if it fails."""
    pool = ProcessPool(
        count,
        max_tasks=5000,  # decoders leak
        initializer=start_worker,
        initargs=start,
        context=multiprocessing.get_context("spawn"),
    )
    try:
        yield pool
        pool.close()
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()


def schedule_ahead(pool, folder: Path, groups: list[list[str]], patience: float) -> Iterator[list[Future]]:
    """encode_one of each video of each group; the next group is under way while the caller waits for one."""
    under_way = deque()
    for group in groups:
        futures = [pool.schedule(encode_one, args=(folder / name,), timeout=patience) for name in group]
        under_way.append(futures)
        if len(under_way) > 1:
            yield under_way.popleft()
    yield from under_way


def outcome_of(future: Future, path: Path, patience: float):
    """What a worker returned; one that hung or died makes its video Unreadable: some files do that to decoders."""
    try:
        return future.result()
    except TimeoutError:
        return Unreadable(f"decoding took more than {patience} s ({path}): convert it again")
    except ProcessExpired as error:
        return Unreadable(f"the decoder died: {error} ({path}): convert it again")


def write_shard(folder: Path, names: list[str], outcomes: list[Encoded | Unreadable], path: Path) -> None:
    """One shard, its index last: a shard without an index does not exist."""
    videos = {}
    bad = {}
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, Unreadable):
            bad[name] = outcome.reason
        else:
            videos[name] = outcome

    if videos:
        tensors = {}
        for key in Encoded._fields:
            arrays = [getattr(encoded, key) for encoded in videos.values()]
            tensors[key] = torch.from_numpy(np.concatenate(arrays))
        write_aside(path, partial(save_file, tensors))

    index = {
        "videos": list(videos),
        "counts": [len(encoded.times) for encoded in videos.values()],  # N_v of each
        "sizes": [file_of(folder / name).stat().st_size for name in videos],  # bytes of each file
        "bad": bad,
    }
    write_json(path.with_suffix(".json"), index)


# --------------------------------------------------------------------------- whose features a folder holds

# How the names of those settings begin that change nothing about Z_vision
NOT_OF_VISION = ("fusion", "llm", "lora", "max_new", "num_queries", "time_")


def fingerprint(config: Config, model_dir: Path | str, order: str | None = None) -> dict:
    """What Z_vision depends on. Features with another fingerprint are stale and are refused."""
    settings = {}
    for name, value in asdict(config).items():
        if not name.startswith(NOT_OF_VISION):
            settings[name] = value
    for part in ("encoder_weights", "sam_weights"):
        path = Path(model_dir, settings[part])
        if path.is_file():
            settings[part] = sha256(path)[:16]
    settings["reader"] = READER
    if order:
        settings["order"] = order
    return settings


def claim(folder: Path, made_with: dict, write: bool) -> None:
    """Refuse a folder of features that were made otherwise; else mark it, if this process is the one to write."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "fingerprint.json"
    if mark.exists() and json.loads(mark.read_text()) != made_with:
        raise VidReasonError(
            f"features were made by another encoder, SAM or settings, or of other frames ({folder}): "
            "give another --features folder"
        )
    if write:
        write_json(mark, made_with)


# --------------------------------------------------------------------------- shards -> Features


class FeatureCache:
    """Read-only view of a folder that encode_videos wrote. `bad` maps unreadable videos to their reasons."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.videos = {}  # name -> (shard, its first row there, the row behind its last)
        self.sizes = {}  # name -> bytes of the video's file when it was encoded
        self.bad = {}  # name -> reason
        self.open = {}  # shard -> the opened file
        for index in sorted(self.folder.glob("shard-*.json")):
            self.add_shard(index)
        mended = self.bad.keys() & self.videos.keys()  # a later shard has them
        for name in mended:
            del self.bad[name]

    def add_shard(self, index: Path):
        shard = json.loads(index.read_text())
        self.bad.update(shard["bad"])
        if "sizes" in shard:  # older ones have none
            self.sizes.update(zip(shard["videos"], shard["sizes"], strict=True))
        start = 0
        for name, count in zip(shard["videos"], shard["counts"], strict=True):
            self.videos[name] = (index.with_suffix(".safetensors"), start, start + count)
            start += count

    def check(self, folder: Path | str, names: Iterable[str], most: int = 1000) -> None:
        """Refuse features of other files of the same names. Looks at `most` of them; those that are gone pass."""
        known = [name for name in names if name in self.sizes]
        step = len(known) // most + 1
        for name in known[::step]:
            file = file_of(Path(folder, name))
            if file.is_file() and file.stat().st_size != self.sizes[name]:
                raise VidReasonError(
                    f"features were made of another file called {name} ({self.folder}): give another --features folder"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.videos

    def __getitem__(self, name: str) -> Features:
        path, start, end = self.videos[name]
        if path not in self.open:
            self.open[path] = safe_open(path, "pt")
        shard = self.open[path]
        rows = {key: shard.get_slice(key)[start:end] for key in Encoded._fields}
        return Features(rows["z_vision"].float(), rows["times"], rows["is_object"])


def report_bad(cache: FeatureCache, names: list[str], path: Path, max_bad_fraction: float) -> dict[str, str]:
    """Write bad_videos.jsonl -> {name: reason}; VidReasonError if too many of the named videos cannot be read."""
    bad = {name: cache.bad.get(name, "no features") for name in names if name not in cache}
    lines = [json.dumps({"video": name, "reason": reason}) + "\n" for name, reason in sorted(bad.items())]
    write_aside(path, lambda aside: aside.write_text("".join(lines)))
    if len(bad) > max_bad_fraction * len(names):
        example = next(iter(bad.values()))
        raise VidReasonError(
            f"{len(bad)} of {len(names)} videos cannot be read, for example: {example.rstrip('.')} ({path}): "
            "mend them, or raise --max_bad_fraction; what could be read is kept"
        )
    return bad


def write_familiar(cache: FeatureCache, path: Path, quantile: float = 0.999, most: int = 4000) -> None:
    """What the clips of a cache look like, so that infer.py can say that a clip is unlike them, if not of each.

    mean (D_v,) and whiten (D_v, D_v) of the global tokens, limit (): almost every known video stays below it. The
    distance of a video is the mean over its clips of |(z - mean) @ whiten|: Mahalanobis's. Looks at `most` videos.
    """
    of_videos = []  # each (N_t, D_v)
    for name in list(cache.videos)[:most]:
        features = cache[name]
        of_videos.append(features.z_vision[~features.is_object])
    tokens = torch.cat(of_videos).double()

    width = tokens.shape[1]
    ridge = 1e-3 * tokens.var(0).mean() * torch.eye(width)  # directions without variance must not count without bound
    variances, directions = torch.linalg.eigh(torch.cov(tokens.T) + ridge)
    mean = tokens.mean(0).float()
    whiten = (directions * variances.rsqrt()).float().contiguous()

    distances = [((z_global - mean) @ whiten).norm(dim=1).mean() for z_global in of_videos]
    limit = torch.stack(distances).quantile(quantile) * 1.1
    write_aside(path, partial(save_file, {"mean": mean, "whiten": whiten, "limit": limit}))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards; a killed run goes on")
    vision = "model directory whose encoder and SAM are used (default: the toy)"
    parser.add_argument("--model", type=Path, default=TOY_MODEL, help=vision)
    parser.add_argument("--processes", type=positive, default=os.cpu_count(), help="processes that work side by side")
    args = parser.parse_args()
    names = videos_below(args.videos)
    encode_videos(args.model, read_config(args.model), args.videos, names, args.out, args.processes)
    cache = FeatureCache(args.out)
    print(f"{len(cache.videos)} videos encoded, {len(cache.bad)} unreadable: {args.out}")


if __name__ == "__main__":
    guarded(main)
