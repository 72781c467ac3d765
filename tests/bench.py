"""Benchmarks. Every claim about this project's speed comes from here, as a ratio to a named alternative.

    python tests/bench.py                                # toy weights and clips on a CPU, a few minutes
    python tests/bench.py --only packing bf16 --out bench.json
    python tests/bench.py --gpu --out gpu.json           # the paper's sizes with random weights, on one GPU
    python tests/bench.py --gpu --preset small

Ours and the alternative take turns in one process, and each figure is the median of --rounds turns: a busy neighbour
slows both alike. Ratio is ours ÷ alternative. A time on its own is a property of the machine and claims nothing.

What is measured stands in bench_cpu.py and bench_gpu.py, a function each; how turns are taken, in bench_turns.py.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch is imported
import argparse
import gc
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import av
import bench_cpu as on_cpu
import bench_gpu as on_gpu
import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
from bench_turns import row

import train
from data.program import Parser, guarded, positive
from vidreason import VidReasonError

ON_CPU = [
    on_cpu.cached_features,
    on_cpu.packing,
    on_cpu.target_logits,
    on_cpu.bare_llm,
    on_cpu.unfused_attention,
    on_cpu.bf16,
    on_cpu.sparse_decode,
    on_cpu.decode_memory,
    on_cpu.data_wait,
    on_cpu.padding,
]
ON_GPU = [on_gpu.matmul, on_gpu.stage1, on_gpu.stage2, on_gpu.vision, on_gpu.decode]


def attempt(benchmark, options):
    """The rows of a benchmark; one that fails says so and does not take the others with it."""
    try:
        yield from benchmark(options)
    except torch.OutOfMemoryError as error:
        yield {"name": benchmark.__name__, "out_of_memory": str(error)[:80]}
    except Exception as error:
        yield {"name": benchmark.__name__, "failed": f"{type(error).__name__}: {error}"[:300]}


def show(measured):
    if "ratio" in measured:
        turns = "{:.3g} … {:.3g}".format(*measured["turns"]) if "turns" in measured else ""
        line = "  {name:26s}{ours:11.4g}{alternative:13.4g}  {unit:11s}{ratio:9.4g}".format(**measured)
        print(line, f"  {turns}")
    else:
        print(f"  {measured['name']}")
    shown = row("", 1, 1, "", turns=()).keys()
    for key, value in measured.items():
        if key not in shown:
            print(f"      {words_of(key)}: {describe(value)}")


def words_of(key):
    return key.replace("_", " ")


def describe(value):
    if isinstance(value, dict):
        return ", ".join(f"{words_of(key)} {describe(part)}" for key, part in value.items())
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    return str(value)


def processor():
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.machine()


def circumstances(options):
    """Where and with what all this was measured."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, av, np)},
        "python_cuda": [platform.python_version(), torch.version.cuda],
        "commit": git.stdout.strip() or None,
        "arguments": sys.argv[1:],
    }


def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.__name__ for benchmark in ON_CPU + ON_GPU]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"some of {', '.join(names)}")
    parser.add_argument("--rounds", type=positive, default=5, help="turns that each median is taken over")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--gpu", action="store_true", help="full sizes with random weights on one GPU")
    parser.add_argument("--preset", default="paper", choices=["paper", "small"], help="sizes for --gpu")
    parser.add_argument("--llm_shape", help="another LLM's sizes: a name that train.py knows, a directory or a hub id")
    parser.add_argument("--tiny", action="store_true", help="very small sizes, all on a CPU: does it still run?")
    return parser.parse_args()


def choose(options):
    """-> the benchmarks that were asked for, all on one kind of device"""
    benchmarks = ON_GPU if options.gpu else ON_CPU
    if options.only:
        benchmarks = [benchmark for benchmark in benchmarks if benchmark.__name__ in options.only]
    if not benchmarks:
        flag = "no --gpu" if options.gpu else "--gpu"
        raise VidReasonError(f"that needs {flag} (--only): see --help")
    return benchmarks


def start_device(options):
    device = "cuda" if options.gpu and not options.tiny else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise VidReasonError("there is no GPU that torch can use (--gpu): leave that out, or give --tiny")
    device, _ = train.start_processes(train.Settings(device=device, threads=torch.get_num_threads()))
    if options.gpu and not dist.is_initialized():  # FSDP2 asks for a group, if only of one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return device


def measure(benchmarks, options):
    """Run and show them -> all rows"""
    rows = []
    print(f"{'':28s}{'ours':>11s}{'alternative':>13s}  {'unit':11s}{'ratio':>9s}   turn by turn")
    for benchmark in benchmarks:
        means = " ".join(benchmark.__doc__.split())
        print(f"{benchmark.__name__}: {means}")
        for measured in attempt(benchmark, options):
            show(measured)
            rows.append({**measured, "means": means})
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main():
    options = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)
    benchmarks = choose(options)
    options.device = start_device(options)
    rows = measure(benchmarks, options)
    where = circumstances(options)
    print(f"{where['device']}, {where['threads']} of {where['cores']} cores, load {where['load_average']:.1f}")
    if options.out:
        options.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    failed = [measured["name"] for measured in rows if has_failed(measured)]
    if failed:
        sys.exit(f"error: benchmarks that failed: {', '.join(failed)}")


def has_failed(measured):
    return "failed" in measured or not math.isfinite(measured.get("ratio", 1))


if __name__ == "__main__":
    guarded(main)
