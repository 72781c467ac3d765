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
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def check(found, promised):
    """promised: the names of all rows and what each has beside EVERY_ROW."""
    assert {name: row.keys() - EVERY_ROW - {"turns"} for name, row in found.items()} == promised
    for row in found.values():
        assert row.keys() >= EVERY_ROW and row["ratio"] == pytest.approx(row["ours"] / row["alternative"])
        assert all(math.isfinite(n) and n > 0 for n in numbers(row) + row.get("turns", [])), row


def test_gpu_benchmarks_run_tiny_on_a_cpu(tmp_path):
    found = rows(tmp_path, "--gpu")
    promised = {"matmul": {"memory_gb_per_s"}, "stage1_mfu": STEP, "stage1_compiled": STEP, "stage2_mfu": STEP}
    promised |= {"stage2_compiled": STEP, "stage2_bare_llm": set(), "stage2_bare_llm_and_fusion": set()}
    promised |= {"encoder_tf32": {"ms_per_video"}, "inline_vision": {"ms_per_video"}, "decode": {"share_of_bandwidth"}}
    check(found, promised)
    assert found["stage2_mfu"]["ms"].keys() == {"fusion_forward", "llm_forward", "backward_and_clipping", "optimiser"}
    assert found["stage1_mfu"]["mfu"]["convention"] == pytest.approx(found["stage1_mfu"]["ratio"])


def test_cpu_benchmarks_run(tmp_path):
    found = rows(tmp_path, "--only", "packing", "data_wait", "sparse_decode", "decode_memory")
    assert found["packing"].pop("same_loss_to") < 1e-5
    reading = {"sparse_decode": set(), "decode_memory": set()}
    check(found, {"packing": set(), "data_wait": {"seconds_without_prefetch"}, **reading})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line():
    done = bench("--gpu")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
