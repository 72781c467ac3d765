"""tests/bench.py still runs, on sizes that say nothing about speed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EVERY_ROW = {"name", "means", "unit", "ours", "alternative", "ratio"}
STEP = {"tokens_per_s", "mfu", "ms", "peak_gib"}


def bench(*flags):
    return subprocess.run([sys.executable, "tests/bench.py", *flags], cwd=ROOT, capture_output=True, text=True)


def rows(tmp_path, *flags):
    done = bench(*flags, "--tiny", "--rounds", "1", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"device", "threads", "versions", "commit", "arguments"} <= result.keys()
    assert all(row["name"] in done.stdout for row in result["rows"])
    return {row["name"]: row for row in result["rows"]}


def numbers(value):
    """All numbers in a row, those in its dicts and lists too."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, dict):
        yield from numbers([*value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)


def check(measured, promised):
    """promised: the names of all rows and what each has beside EVERY_ROW."""
    details = {name: row.keys() - EVERY_ROW - {"turns"} for name, row in measured.items()}
    assert details == promised
    for row in measured.values():
        assert row.keys() >= EVERY_ROW
        assert row["ratio"] == pytest.approx(row["ours"] / row["alternative"])
        assert all(math.isfinite(number) and number > 0 for number in numbers(row)), row


def test_gpu_benchmarks_run_tiny_on_a_cpu(tmp_path):
    measured = rows(tmp_path, "--gpu")
    promised = {
        "matmul": {"memory_gb_per_s"},
        "stage1_mfu": STEP,
        "stage1_compiled": STEP,
        "stage2_mfu": STEP,
        "stage2_compiled": STEP,
        "stage2_bare_llm": set(),
        "stage2_bare_llm_and_fusion": set(),
        "encoder_tf32": {"ms_per_video"},
        "inline_vision": {"ms_per_video"},
        "decode": {"share_of_bandwidth"},
    }
    check(measured, promised)
    parts = {"fusion_forward", "llm_forward", "backward_and_clipping", "optimiser"}
    assert measured["stage2_mfu"]["ms"].keys() == parts
    assert measured["stage1_mfu"]["mfu"]["convention"] == pytest.approx(measured["stage1_mfu"]["ratio"])


def test_cpu_benchmarks_run(tmp_path):
    names = ["packing", "data_wait", "sparse_decode", "decode_memory"]
    measured = rows(tmp_path, "--only", *names)
    assert measured["packing"].pop("same_loss_to") < 1e-5
    check(measured, {name: {"seconds_without_prefetch"} if name == "data_wait" else set() for name in names})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line():
    done = bench("--gpu")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
