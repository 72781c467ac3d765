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
COMMANDS = [  # what the repository ships, from nothing
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


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.make is not make_world:
        args.weights.mkdir(parents=True, exist_ok=True)
    args.make(args)


def make_world(args):
    folder = args.runs / "world"
    with alone_in(folder / "val"):
        make_videos(folder / "val", "val", args.seed, args.val_clips, args.processes)
    with alone_in(folder / "train"):
        write_text(folder / "train" / "text.jsonl", args.seed, args.clips // 2)
        make_videos(folder / "train", "train", args.seed, args.clips, args.processes)


def ship(args):
    """Put the newest stage-2 run beside the foundation models, in fp16, with where everything comes from."""
    run = args.runs / "stage2" / "model"
    VidReason.load(run).save(args.weights, parts=("fusion", "lora"), dtype=torch.float16)
    shutil.copy(run / "familiar.safetensors", args.weights)

    files = sorted(path for path in args.weights.rglob("*") if path.is_file() and path.name != "provenance.json")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    provenance = {
        "commands": COMMANDS,
        "seed": args.seed,
        "commit": git.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "segment-anything")},
        "sha256": {str(path.relative_to(args.weights)): sha256(path) for path in files},
    }
    (args.weights / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 2**20:.1f} MiB: {args.weights}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    common = common_arguments()

    world = parts.add_parser("world", parents=[common], help="make training and validation videos")
    world.set_defaults(make=make_world)
    add_numbers(world, clips=12000, val_clips=400)

    llm = parts.add_parser("llm", parents=[common], help="train the toy LLM on text")
    llm.set_defaults(make=pretrain_llm)
    add_numbers(llm, stories=16000, steps=3400, lookup_steps=800, batch=32, width=128, layers=5, heads=2)
    add_numbers(llm, evaluate_every=400)
    llm.add_argument("--lr", type=float, default=1e-3)
    without = (
        "neither sentences nor stories about the pairs of kinds that no video shows, nor what kinds do to each other"
    )
    llm.add_argument("--no_knowledge", dest="knowledge", action="store_false", help=without)
    llm.add_argument("--init", help="directory of an LLM to go on with, instead of random weights")

    encoder = parts.add_parser("encoder", parents=[common], help="train the video transformer")
    encoder.set_defaults(make=pretrain_encoder)
    add_numbers(encoder, clips=None, steps=3200, batch=64, evaluate_every=500)
    encoder.add_argument("--lr", type=float, default=1e-3)

    sam = parts.add_parser("sam", parents=[common], help="train the toy SAM")
    sam.set_defaults(make=pretrain_sam)
    add_numbers(sam, steps=1600, batch=12, points=10, evaluate_every=400)
    sam.add_argument("--lr", type=float, default=8e-4)

    shipped = parts.add_parser("ship", parents=[common], help="write the newest stage-2 run into toy/weights")
    shipped.set_defaults(make=ship)
    return parser.parse_args()


def common_arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that make videos and stories")
    runs = "folder for videos, logs and intermediate weights (default runs)"
    common.add_argument("--runs", type=Path, default=RUNS, help=runs)
    weights = "model directory to write to (default toy/weights)"
    common.add_argument("--weights", type=Path, default=WEIGHTS, help=weights)
    common.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that multiply matrices")
    return common


def add_numbers(parser: argparse.ArgumentParser, **defaults: int | None):
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)


if __name__ == "__main__":
    guarded(main)
