"""infer.py as its user meets it: a process with arguments, an exit code and two streams."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import tiny_llm, tiny_tokenizer
from safetensors.torch import save_file

from infer import main
from vidreason import REASON_PROMPT, VideoTransformer, VidReason, build_sam

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    torch.manual_seed(0)
    model = VidReason(config, VideoTransformer(config), build_sam(config), tiny_llm(), tiny_tokenizer())
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    return folder


def infer(capsys, *arguments):
    """infer.py inside this process -> (exit code, stdout, stderr)."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def processes(videos, weights):
    """A few calls as real processes, two at a time: most of each is imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

    def start(name):
        command = [sys.executable, ROOT / "infer.py", videos[name], "why ?", "--model", weights]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        return done.returncode, done.stdout, done.stderr

    names = ["missing", "empty", "text", "truncated", "folder", "good"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(start, names), strict=True))


def assert_one_error_line(code, out, err):
    assert code == 2 and out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and " (" in lines[0] and "): " in lines[0]


@pytest.mark.parametrize("name", ["missing", "empty", "text", "truncated", "folder"])
def test_a_bad_file_is_one_line_and_exit_code_2(processes, name):
    assert_one_error_line(*processes[name])


@pytest.mark.parametrize("name", ["plain", "broken_off", "sound"])
def test_more_bad_files(capsys, videos, weights, name):
    assert_one_error_line(*infer(capsys, videos[name], "why ?", "--model", weights))


def test_other_mistakes(capsys, videos, weights):
    good = videos["good"]
    assert_one_error_line(*infer(capsys, good, "why ?", "--model", videos["folder"]))
    assert_one_error_line(*infer(capsys))
    for options in (["--top_p", "1.5"], ["--temperature", "0"], ["--beams", "2", "--top_p", "0.5"], ["--beams", "x"]):
        assert_one_error_line(*infer(capsys, good, "why ?", "--model", weights, *options))


def test_a_process_streams_what_json_says(processes, capsys, videos, weights):
    code, out, err = processes["good"]
    assert code == 0 and err == ""
    code, json_out, err = infer(capsys, videos["good"], "why ?", "--json", "--model", weights)
    answer = json.loads(json_out)
    assert code == 0 and err == "" and answer["answer"].split() == out.split() and answer["answer"]
    assert answer["question"] == "why ?" and answer["unfamiliar"] is False and answer["objects"] >= 0


def test_default_question_and_decoding(capsys, videos, weights):
    call = (capsys, videos["good"], "--model", weights)
    assert json.loads(infer(*call, "--json")[1])["question"] == REASON_PROMPT
    assert infer(*call, "--beams", "3")[1].strip()
    sampled = [infer(*call, "--top_p", "0.9", "--temperature", "1.5", "--seed", seed)[1] for seed in (7, 7, 8)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(infer(*call, "--max_new_tokens", "2")[1].split()) <= 2


def test_predictions_are_sorted_and_confidences_are_shares(capsys, videos, weights):
    call = (capsys, videos["good"], "what will happen next ?", "--task", "predict", "--model", weights)
    result = json.loads(infer(*call, "--json")[1])
    confidences = [event["confidence"] for event in result["predictions"]]
    assert 1 <= len(confidences) <= 3 and confidences == sorted(confidences, reverse=True)
    assert all(0 <= c <= 1 for c in confidences) and sum(confidences) <= 1.002
    assert result["unsure"] == (confidences[0] < 0.5) and all(event["because"] for event in result["predictions"])
    text = infer(*call)[1]
    assert text.startswith("1. ") and "because: " in text


def test_a_strange_clip_is_announced(capsys, videos, weights):
    known = {"mean": torch.full((16,), 100.0), "whiten": torch.eye(16), "limit": torch.tensor(1.0)}
    save_file(known, weights / "familiar.safetensors")
    try:
        code, out, err = infer(capsys, videos["good"], "why ?", "--json", "--model", weights)
    finally:
        (weights / "familiar.safetensors").unlink()
    assert code == 0 and json.loads(out)["unfamiliar"] is True
    assert err.startswith("note: ") and len(err.splitlines()) == 1
