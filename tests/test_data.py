"""Programs answer mistakes with one line and exit code 2; records and features are read as documented."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
from vidreason import VidReasonError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command, says",
    [
        ("train.py --stage 1 --bogus", "unknown option --bogus"),
        ("train.py --stage 7", "no stage 7"),
        ("train.py --stage 1 --batch 0", "--batch"),
        ("train.py --stage 1 --preset paper", "preset paper needs a model directory"),
        ("train.py --stage 1 --data nowhere.jsonl", "nowhere.jsonl"),
        ("evaluate.py nope", "nope"),
        ("evaluate.py toy --clips 0", "--clips"),
        ("evaluate.py toy --model nowhere", "nowhere"),
        ("data.py features --videos nowhere --out nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_line(command, says, tmp_path):
    command = [sys.executable, *command.split()]
    command += ["--output_dir", str(tmp_path)] if "train.py" in command else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "Loading weights" not in line and "Warning" not in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ") and says in lines[-1]


def test_read_jsonl(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [
        {"id": 1, "video": "a.mp4", "question": "why?", "answer": "because"},
        {"video": "b.mp4", "caption": "a ball"},
        {"question": "what?", "answer": "that", "context": "a story"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    why, caption, text = data.read_jsonl(path)
    assert (why.video, why.question, why.answer) == ("a.mp4", "why?", "because")
    assert (caption.question, caption.answer) == (data.CAPTION_PROMPT, "a ball")
    assert text.video is None and text.context == "a story"


@pytest.mark.parametrize("line", ["{", "[]", '{"video": "a.mp4"}', '{"answer": 5}', '{"answer": "x", "question": 5}'])
def test_bad_records_are_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text('{"answer": "fine"}\n' + line)
    with pytest.raises(VidReasonError, match=r"records.jsonl, line 2"):
        data.read_jsonl(path)


def test_features_survive_a_kill_between_shards(config, tmp_path, write_clips):
    """Shards finish out of order; what a killed run left behind is neither lost nor computed again."""
    from safetensors.torch import save_file

    from vidreason import VideoTransformer, build_sam

    names = write_clips(tmp_path / "videos", 6)
    save_file(VideoTransformer(config).state_dict(), tmp_path / "encoder.safetensors")
    save_file(build_sam(config).state_dict(), tmp_path / "sam.safetensors")
    out = tmp_path / "features"
    config = replace(config, encoder_weights="encoder.safetensors", sam_weights="sam.safetensors")
    data.encode_videos(tmp_path, config, tmp_path / "videos", names, out, processes=1, shard_size=2)
    before = {n: data.FeatureCache(out)[n].z_vision for n in names}
    for leftover in out.glob("shard-000001.*"):
        leftover.unlink()
    assert len(data.FeatureCache(out).videos) == 4
    data.encode_videos(tmp_path, config, tmp_path / "videos", names, out, processes=2, shard_size=1)
    cache = data.FeatureCache(out)
    assert set(cache.videos) == set(names)
    assert all(torch.equal(cache[n].z_vision, before[n]) for n in names)


def test_unreadable_videos_are_named_not_replaced(config, tmp_path, write_clips):
    from safetensors.torch import save_file

    from vidreason import VideoTransformer, build_sam

    names = write_clips(tmp_path, 1)
    (tmp_path / "bad.mp4").write_text("not a video")
    save_file(VideoTransformer(config).state_dict(), tmp_path / "encoder.safetensors")
    save_file(build_sam(config).state_dict(), tmp_path / "sam.safetensors")
    config = replace(config, encoder_weights="encoder.safetensors", sam_weights="sam.safetensors")
    data.encode_videos(tmp_path, config, tmp_path, [*names, "bad.mp4"], tmp_path / "features")
    cache = data.FeatureCache(tmp_path / "features")
    assert set(cache.videos) == set(names) and "bad.mp4" in cache.bad


def test_missing_weights_stop_before_any_worker_starts(config, tmp_path):
    config = replace(config, encoder_weights="nowhere.safetensors", sam_weights="nowhere.safetensors")
    with pytest.raises(VidReasonError, match="nowhere.safetensors"):
        data.encode_videos(tmp_path, config, tmp_path, ["a.mp4"], tmp_path / "features")
