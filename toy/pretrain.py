"""Stage 0: the toy foundation models — a video transformer, a SAM and a Llama — from scratch, on the toy world.

    python -m toy.pretrain world       # training and validation videos as mp4, decoded once (runs/world)
    python -m toy.pretrain llm         # stories, questions and world knowledge, text only   (toy/weights/llm)
    python -m toy.pretrain llm --init toy/weights/llm --seed 2 --steps 1000 --lookup_steps 200   # new stories
    python -m toy.pretrain llm --init toy/weights/llm --seed 3 --steps 2000 --lookup_steps 300   # and more of them
    python -m toy.pretrain encoder     # the video transformer: what is where, how it moves (toy/weights/encoder…)
    python -m toy.pretrain sam         # segment_anything from point prompts                (toy/weights/sam…)

Real projects download these three. No video shows a held-out pair of kinds; texts tell how such a meeting ends. Encoder
and SAM learn from labels that real videos lack: the simulator's kinds, colours, motions and hits up to .75 s ahead, and
the renderer's masks. All is seeded. Then: `python train.py --stage 1` and `--stage 2`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise, see the README
import argparse
import hashlib
import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from data.program import guarded
from toy.llm import pretrain_llm
from toy.videos import alone_in, make_videos, write_text
from toy.vision import pretrain_encoder, pretrain_sam
from vidreason import VidReason

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, RUNS = ROOT / "toy" / "weights", ROOT / "runs"


# --------------------------------------------------------------------------- videos


# --------------------------------------------------------------------------- the LLM


# --------------------------------------------------------------------------- the video transformer


# --------------------------------------------------------------------------- SAM


# --------------------------------------------------------------------------- what the repository ships

COMMANDS = [
    "python -m toy.pretrain world",
    "python -m toy.pretrain llm",
    "python -m toy.pretrain llm --init toy/weights/llm --seed 2 --steps 1000 --lookup_steps 200",
    "python -m toy.pretrain llm --init toy/weights/llm --seed 3 --steps 2000 --lookup_steps 300",
    "python -m toy.pretrain encoder",
    "python -m toy.pretrain sam",
    "python train.py --stage 1",
    "python train.py --stage 2",
    "python -m toy.pretrain ship",
]


def ship(args):
    """Put the newest stage-2 run beside the foundation models, in fp16, with where everything comes from."""
    run = args.runs / "stage2" / "model"
    VidReason.load(run).save(args.weights, parts=("fusion", "lora"), dtype=torch.float16)
    shutil.copy(run / "familiar.safetensors", args.weights)
    files = sorted(p for p in args.weights.rglob("*") if p.is_file() and p.name != "provenance.json")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    provenance = {
        "commands": COMMANDS,
        "seed": args.seed,
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "segment-anything")},
        "sha256": {str(p.relative_to(args.weights)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (args.weights / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"{sum(p.stat().st_size for p in files) / 2**20:.1f} MiB: {args.weights}")


# --------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="part", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that make videos and stories")
    common.add_argument(
        "--runs", type=Path, default=RUNS, help="folder for videos, logs and intermediate weights (default runs)"
    )
    common.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="model directory to write to (default toy/weights)"
    )
    common.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that multiply matrices")
    p = sub.add_parser("world", parents=[common], help="make training and validation videos")
    p.add_argument("--clips", type=int, default=12000)
    p.add_argument("--val_clips", type=int, default=400)
    p = sub.add_parser("llm", parents=[common], help="train the toy LLM on text")
    for flag, default in dict(
        stories=16000, steps=3400, lookup_steps=800, batch=32, width=128, layers=5, heads=2, evaluate_every=400
    ).items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=1e-3)
    told = "neither sentences nor stories about the pairs of kinds that no video shows, nor what kinds do to each other"
    p.add_argument("--no_knowledge", dest="knowledge", action="store_false", help=told)
    p.add_argument("--init", help="directory of an LLM to go on with, instead of random weights")
    p = sub.add_parser("encoder", parents=[common], help="train the video transformer")
    for flag, default in dict(clips=None, steps=3200, batch=64, evaluate_every=500).items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=1e-3)
    p = sub.add_parser("sam", parents=[common], help="train the toy SAM")
    for flag, default in dict(steps=1600, batch=12, points=10, evaluate_every=400).items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=8e-4)
    sub.add_parser("ship", parents=[common], help="write the newest stage-2 run into toy/weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.part == "world":
        for split, count in (("val", args.val_clips), ("train", args.clips)):
            with alone_in(args.runs / "world" / split):
                if split == "train":
                    write_text(args.runs / "world" / split / "text.jsonl", args.seed, count // 2)
                make_videos(args.runs / "world" / split, split, args.seed, count, args.processes)
    else:
        args.weights.mkdir(parents=True, exist_ok=True)
        {"llm": pretrain_llm, "encoder": pretrain_encoder, "sam": pretrain_sam, "ship": ship}[args.part](args)


if __name__ == "__main__":
    guarded(main)
