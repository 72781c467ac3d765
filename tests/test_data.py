"""Programs answer mistakes with one line and exit code 2; records and features are read as documented."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pebble import ProcessPool

from data.benchmarks import read_samples
from data.features import FeatureCache, Unreadable, encode_videos, outcome_of, report_bad
from vidreason import CAPTION_PROMPT, VidReasonError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command, says",
    [
        ("train.py --stage 1 --bogus", "unknown option --bogus"),
        ("train.py --stage 7", "no stage 7"),
        ("train.py --stage 1 --batch 0", "--batch"),
        ("train.py --stage 1 --preset paper", "preset paper has no data of its own"),
        ("train.py --stage 1 --sam_weights nowhere.pth", "nowhere.pth"),
        ("train.py --stage 1 --llm nobody/nothing", "nobody/nothing"),
        ("train.py --stage 1 --device cuda", "no GPU that torch can use"),
        ("train.py --stage 1 --data nowhere.jsonl", "nowhere.jsonl"),
        ("evaluate.py nope", "nope"),
        ("evaluate.py toy --clips 0", "--clips"),
        ("evaluate.py toy --model nowhere", "nowhere"),
        ("-m data.features --videos nowhere --out nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_line(command, says, tmp_path):
    command = [sys.executable, *command.split()]
    if "train.py" in command:
        command += ["--output_dir", str(tmp_path), "--videos", "toy/clips"]
        command += [] if "--data" in command or "paper" in command else ["--data", "toy/clips/samples.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "Loading weights" not in line and "Warning" not in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert lines[-1].startswith("error: ") and says in lines[-1]


def test_read_samples(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [
        {"id": 1, "video": "a.mp4", "question": "why?", "answer": "because"},
        {"video": "b.mp4", "caption": "a ball"},
        {"question": "what?", "answer": "that", "context": "a story"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    why, caption, text = read_samples(path)
    assert (why.video, why.question, why.answer) == ("a.mp4", "why?", "because")
    assert (caption.question, caption.answer) == (CAPTION_PROMPT, "a ball")
    assert text.video is None and text.context == "a story"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"video": "a.mp4"}', '{"answer": true}', '{"answer": "x", "question": 5}']
)
def test_bad_records_are_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text('{"answer": "fine"}\n' + line)
    with pytest.raises(VidReasonError, match=r"records.jsonl, line 2"):
        read_samples(path)


def test_features_survive_a_kill_between_shards(config, tmp_path, write_clips):
    """Shards finish out of order; what a killed run left behind is neither lost nor computed again."""
    from safetensors.torch import save_file

    from vidreason import VideoTransformer, build_sam

    names = write_clips(tmp_path / "videos", 6)
    save_file(VideoTransformer(config).state_dict(), tmp_path / "encoder.safetensors")
    save_file(build_sam(config).state_dict(), tmp_path / "sam.safetensors")
    out = tmp_path / "features"
    config = replace(config, encoder_weights="encoder.safetensors", sam_weights="sam.safetensors")
    encode_videos(tmp_path, config, tmp_path / "videos", names, out, processes=1, shard_size=2)
    before = {n: FeatureCache(out)[n].z_vision for n in names}
    for leftover in out.glob("shard-*-000001.*"):
        leftover.unlink()
    assert len(FeatureCache(out).videos) == 4
    encode_videos(tmp_path, config, tmp_path / "videos", names, out, processes=2, shard_size=1)
    cache = FeatureCache(out)
    assert set(cache.videos) == set(names)
    assert all(torch.equal(cache[n].z_vision, before[n]) for n in names)


@pytest.fixture
def vision(config, tmp_path):
    """-> config whose weights lie in tmp_path"""
    from safetensors.torch import save_file

    from vidreason import VideoTransformer, build_sam

    save_file(VideoTransformer(config).state_dict(), tmp_path / "encoder.safetensors")
    save_file(build_sam(config).state_dict(), tmp_path / "sam.safetensors")
    return replace(config, encoder_weights="encoder.safetensors", sam_weights="sam.safetensors")


def test_unreadable_videos_are_named_not_replaced(vision, tmp_path, write_clips):
    names = write_clips(tmp_path, 1)
    (tmp_path / "bad.mp4").write_text("not a video")
    encode_videos(tmp_path, vision, tmp_path, [*names, "bad.mp4"], tmp_path / "features")
    cache = FeatureCache(tmp_path / "features")
    assert set(cache.videos) == set(names) and "not a video" in cache.bad["bad.mp4"]
    with pytest.raises(VidReasonError, match="1 of 2 videos cannot be read"):
        report_bad(cache, [*names, "bad.mp4"], tmp_path / "bad_videos.jsonl", 0.4)
    assert list(report_bad(cache, [*names, "bad.mp4"], tmp_path / "bad_videos.jsonl", 0.6)) == ["bad.mp4"]
    write_clips(tmp_path, 2)  # the second is a good one under a new name; now mend the bad one
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "1.mp4").read_bytes())
    encode_videos(tmp_path, vision, tmp_path, [*names, "bad.mp4"], tmp_path / "features")
    assert not FeatureCache(tmp_path / "features").bad


def test_two_ranks_share_the_videos_and_every_video_is_there_once(vision, tmp_path, write_clips):
    names = write_clips(tmp_path / "videos", 5)
    for rank in (1, 0):
        encode_videos(tmp_path, vision, tmp_path / "videos", names, tmp_path / "f", 1, 2, rank, 2)
    shards = [json.loads(p.read_text())["videos"] for p in (tmp_path / "f").glob("shard-*.json")]
    assert sorted(sum(shards, [])) == names and len(shards) == 3


def test_a_decoder_that_hangs_or_dies_costs_one_video(vision, tmp_path, write_clips):
    """No time at all is given, so that the worker is killed as one that hangs would be."""
    names = write_clips(tmp_path, 1)
    encode_videos(tmp_path, vision, tmp_path, names, tmp_path / "features", patience=0.01)
    assert "took more than 0.01 s" in FeatureCache(tmp_path / "features").bad["0.mp4"]
    with ProcessPool(1) as pool:
        outcome = outcome_of(pool.schedule(os._exit, args=(1,)), tmp_path / "0.mp4", 5)
    assert isinstance(outcome, Unreadable)
    assert "the decoder died" in outcome.reason and "0.mp4" in outcome.reason


def test_tar_shards_are_read_where_they_lie(vision, tmp_path, write_clips):
    """video2dataset's layout: KEY.mp4, KEY.txt and KEY.json side by side; 0002 has lost its video."""
    import tarfile

    names = write_clips(tmp_path / "plain", 2)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i, text in enumerate(["a red ball", "a blue box", "lost"]):
            members = {".txt": text.encode(), ".json": json.dumps({"caption": "older", "url": "u"}).encode()}
            members |= {".mp4": (tmp_path / "plain" / names[i]).read_bytes()} if i < 2 else {}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{i:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples = read_samples(tmp_path / "00000.tar", tmp_path)
    assert [(s.video, s.answer) for s in samples][:2] == [
        ("00000.tar/0000.mp4", "a red ball"),
        ("00000.tar/0001.mp4", "a blue box"),
    ]
    asked = [*(s.video for s in samples), "00000.tar/0001.mp4#t=1,2"]
    encode_videos(tmp_path, vision, tmp_path, asked, tmp_path / "f1")
    encode_videos(tmp_path, vision, tmp_path / "plain", [*names, "1.mp4#t=1,2"], tmp_path / "f2")
    inside, plain = FeatureCache(tmp_path / "f1"), FeatureCache(tmp_path / "f2")
    assert "no such member" in inside.bad["00000.tar/0002.mp4"] and len(inside.videos) == 3
    for span in ("", "#t=1,2"):
        assert torch.equal(inside[f"00000.tar/0001.mp4{span}"].z_vision, plain[f"1.mp4{span}"].z_vision)
    assert not torch.equal(plain["1.mp4"].times[:4], plain["1.mp4#t=1,2"].times[:4])


def test_features_of_another_file_of_that_name_are_refused(vision, tmp_path, write_clips):
    names = write_clips(tmp_path / "one", 2)
    encode_videos(tmp_path, vision, tmp_path / "one", names, tmp_path / "features")
    (tmp_path / "two").mkdir()
    encode_videos(tmp_path, vision, tmp_path / "two", names, tmp_path / "features")  # gone since: features stay
    (tmp_path / "two" / names[1]).write_bytes((tmp_path / "one" / names[1]).read_bytes() + b" ")
    with pytest.raises(VidReasonError, match=f"another file called {names[1]}"):
        encode_videos(tmp_path, vision, tmp_path / "two", names, tmp_path / "features")


def test_csv_rows_are_whole_or_refused(tmp_path):
    at = tmp_path / "r.csv"
    at.write_text("id,video,caption\n1,a.mp4,a dog, running on grass\n")
    with pytest.raises(VidReasonError, match="line 2 has more fields than the header"):
        read_samples(at)
    at.write_text('id,video,question,options,answer\n1,a.mp4,where?,"[""left"", ""right""]",B\n')
    sample = read_samples(at)[0]
    assert sample.options == ["left", "right"] and sample.gold == 1
    at.write_text("id,video,question,options,answer\n1,a.mp4,where?,left or right,B\n")
    with pytest.raises(VidReasonError, match="line 2"):
        read_samples(at)


def test_csv_of_webvid_and_of_our_own(tmp_path):
    (tmp_path / "webvid.csv").write_text(
        'videoid,contentUrl,duration,page_dir,name\n21,http://x,PT1S,001_050,"a dog, running"\n'
    )
    (sample,) = read_samples(tmp_path / "webvid.csv")
    assert (sample.id, sample.video, sample.answer) == ("21", "001_050/21.mp4", "a dog, running")
    (tmp_path / "own.csv").write_text("video,question,answer\na.mp4,why ?,because\n")
    (sample,) = read_samples(tmp_path / "own.csv")
    assert (sample.video, sample.question, sample.answer) == ("a.mp4", "why ?", "because")
    for text, where in (("file,caption\na,b\n", "header"), ("video,caption\na,b\nc,\n", "line 3")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(VidReasonError, match=where):
            read_samples(tmp_path / "bad.csv")


def test_missing_weights_stop_before_any_worker_starts(config, tmp_path):
    config = replace(config, encoder_weights="nowhere.safetensors", sam_weights="nowhere.safetensors")
    with pytest.raises(VidReasonError, match="nowhere.safetensors"):
        encode_videos(tmp_path, config, tmp_path, ["a.mp4"], tmp_path / "features")
