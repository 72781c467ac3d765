"""Frozen vision, computed once: a folder that holds Z_vision of every video.

    python -m data.features --videos DIR --out DIR [--model DIR]      # ready for any later run of the same encoder
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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data.program import TOY_MODEL, Parser, guarded, positive, sha256, write_json
from data.records import file_of, open_tar, videos_below
from vidreason import READER, Features, VidReasonError, load_vision, perceive, read_config, split_span

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
