"""Data: every dataset becomes the same record, and frozen vision is computed once.

    python data.py features --videos DIR --out DIR [--model DIR]      # every video's Z_vision, ready for any later run

Records are JSON lines: {"id", "video", "question", "answer"}; without "question" the record is a caption (or "caption"
stands in place of "answer"), without "video" it is text alone and may carry a "context" that is
read before the question.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import hashlib
import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vidreason import CAPTION_PROMPT, Features, VidReasonError, load_vision, perceive, read_config

ROOT = Path(__file__).resolve().parent
TOY_MODEL = ROOT / "toy" / "weights"


@dataclass
class Sample:
    """One question (or caption) about one video; video None: text alone."""

    id: str
    video: str | None
    question: str
    answer: str
    options: list[str] | None = None
    category: str = ""
    context: str = ""


def read_jsonl(path) -> list[Sample]:
    """Read a file of records. Raises VidReasonError with file and line for one that cannot be used."""
    samples = []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VidReasonError(f"cannot read the annotations: {error} ({path}): check the path") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            answer = record.get("answer", record.get("caption"))
            if not isinstance(answer, str) or not answer.strip():
                raise ValueError('no "answer" or "caption"')
            for name in ("question", "video", "context"):
                if not isinstance(record.get(name) or "", str):
                    raise ValueError(f'"{name}" is not text')
            samples.append(
                Sample(
                    str(record.get("id", number)),
                    record.get("video"),
                    record.get("question", CAPTION_PROMPT),
                    answer,
                    record.get("options"),
                    record.get("type", ""),
                    record.get("context", ""),
                )
            )
        except (ValueError, AttributeError) as error:
            raise VidReasonError(
                f"unreadable record: {error} ({path}, line {number}): mend or remove the line"
            ) from error
    if not samples:
        raise VidReasonError(f"no records ({path}): the file is empty")
    return samples


# --------------------------------------------------------------------------- features: frozen work, done once


def fingerprint(config, model_dir) -> dict:
    """What Z_vision depends on. Features with another fingerprint are stale and are refused."""
    settings = {
        k: v
        for k, v in asdict(config).items()
        if not k.startswith(("fusion", "llm", "lora", "max_new", "num_queries", "time_"))
    }
    for part in ("encoder_weights", "sam_weights"):
        path = Path(model_dir, settings[part])
        settings[part] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else settings[part]
    return settings


def write_json(path, value):
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value))
    aside.rename(path)


def start_worker(config, model_dir):
    global VISION  # one encoder and SAM per process, not per shard
    torch.set_num_threads(1)
    VISION = (*load_vision(config, model_dir), config)


def encode_shard(job):
    """Encode some videos into one shard; unreadable ones are named in it with their reason, never replaced."""
    folder, names, path = job
    kept, bad = [], {}
    for name in names:
        try:
            kept.append((name, perceive(folder / name, *VISION)))
        except VidReasonError as error:
            bad[name] = str(error)
    if kept:
        tensors = {
            "z_vision": torch.cat([f.z_vision for _, f in kept]).half(),
            "times": torch.cat([f.times for _, f in kept]),
            "is_object": torch.cat([f.is_object for _, f in kept]),
        }
        save_file(tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    write_json(
        path.with_suffix(".json"),
        {"videos": [n for n, _ in kept], "counts": [len(f.times) for _, f in kept], "bad": bad},
    )
    return len(names)


def encode_videos(model_dir, config, folder, names, out, processes=1, shard_size=100):
    """Write Z_vision of every named video below `folder` to shards in `out`. A killed run goes on where it stopped."""
    out, folder = Path(out), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    mark, print_ = out / "fingerprint.json", fingerprint(config, model_dir)
    if mark.exists() and json.loads(mark.read_text()) != print_:
        raise VidReasonError(
            f"features were made by another encoder, SAM or settings ({out}): give another --features folder"
        )
    write_json(mark, print_)
    known = FeatureCache(out).videos if any(out.glob("*.safetensors")) else {}
    names = [n for n in dict.fromkeys(names) if n not in known]
    start = 1 + max(
        (int(p.stem.split(".")[0][6:]) for p in out.glob("shard-*")), default=-1
    )  # never an old number again
    groups = [names[i : i + shard_size] for i in range(0, len(names), shard_size)]
    jobs = [(folder, group, out / f"shard-{start + i:06d}.safetensors") for i, group in enumerate(groups)]
    if not jobs:
        return
    load_vision(config, model_dir)  # if the weights are wrong, say so here and not in every worker
    with (
        multiprocessing.get_context("spawn").Pool(processes, start_worker, (config, model_dir)) as pool,
        tqdm(total=len(names), desc="videos → Z_vision") as bar,
    ):
        for done in pool.imap_unordered(encode_shard, jobs):
            bar.update(done)


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

    def __contains__(self, name):
        return name in self.videos

    def __getitem__(self, name) -> Features:
        path, start, end = self.videos[name]
        if path not in self.open:
            self.open[path] = safe_open(path, "pt")
        part = {key: self.open[path].get_slice(key)[start:end] for key in ("z_vision", "times", "is_object")}
        return Features(part["z_vision"].float(), part["times"], part["is_object"])


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
    except OSError as error:
        sys.exit(print(f"error: {error.strerror} ({error.filename}): check the path", file=sys.stderr) or 2)
    except VidReasonError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


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
