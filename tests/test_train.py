"""train.py as a program: the same numbers whatever the number of processes, and after any kill."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny_llm, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from data.batches import Batches
from data.benchmarks import read_samples
from data.features import FeatureCache, encode_videos
from data.records import Sample
from vidreason import VideoTransformer, VidReason, VidReasonError, build_sam

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ["the ball hits the egg", "it breaks because the ball hits it", "red", "the blue box rolls , the egg breaks"]


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    """A model directory with random weights, 12 videos with captions and questions of unequal length, features."""
    from conftest import write_video

    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    save_file(VideoTransformer(config).state_dict(), folder / "encoder.safetensors")
    save_file(build_sam(config).state_dict(), folder / "sam.safetensors")
    tiny_llm().save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "videos").mkdir()
    names = [f"{i}.mp4" for i in range(12)]
    for i, name in enumerate(names):
        write_video(folder / "videos" / name, n=4 + i)
    captions = [{"video": name, "caption": ANSWERS[i % 4]} for i, name in enumerate(names)]
    asked = []
    for i, name in enumerate(names):
        asked.append({"video": name, "question": "why ?", "answer": ANSWERS[i % 4]})
        asked.append({"video": name, "question": "why ?", "answer": ANSWERS[(i + 1) % 4]})
    asked += [{"question": "what ?", "answer": "it breaks", "context": "the ball hits the egg"}] * 3
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    encode_videos(folder, config, folder / "videos", names, folder / "features")
    return folder


def command(place, out, *flags, processes=0):
    """The command line of a run of 6 steps of 8 videos, in fp32, on one thread per process."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    given = f"train.py --model {place} --videos {place / 'videos'} --features {place / 'features'} --output_dir {out}"
    given += " --batch 8 --max_steps 6 --warmup 2 --lr 1e-3 --threads 1 --processes 1 --precision fp32 --device cpu"
    flags = " ".join(map(str, flags))
    if "--data" not in flags:
        flags += f" --data {place / 'captions.jsonl'}"
    return [*start, *given.split(), *flags.split()]


def run(*args, **kwargs):
    done = subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def refused(*args, **kwargs):
    """The one line that a run ends with; on a busy machine every rank has the time to say it."""
    done = subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True)
    if not kwargs:  # torchrun has an exit code and a traceback of its own
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    return line


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def core_of(out):
    """The fusion core that a run has left."""
    return load_file(out / "model" / "fusion.safetensors")


def adapters_of(out):
    return load_file(out / "model" / "lora" / "adapter_model.safetensors")


def differences(one, other):
    """name -> the largest absolute difference of its tensors"""
    assert one.keys() == other.keys()
    return {name: (one[name] - other[name]).abs().max() for name in one}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """An uninterrupted run of stage 1 in one process."""
    out = tmp_path_factory.mktemp("whole")
    text = run(place, out, "--stage 1 --muon_lr 0 --lr 1e-4 --save_every 1 --keep 2")
    return out, text


def test_a_run_says_what_is_trained_and_leaves_what_infer_needs(place, whole, videos):
    out, text = whole
    assert "fusion" in text and "new" in text and "frozen; from" in text and "12 videos (0 of 12 unreadable)" in text
    assert [p.name for p in train.complete_checkpoints(out)] == ["step-00000005", "step-00000006"]
    row = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "memory_gib", "data_wait"} <= set(row)
    assert (out / "loss.png").stat().st_size > 1000
    assert isinstance(VidReason.load(out / "model").answer(videos["good"], "why ?"), str)


@pytest.mark.parametrize("flags", ["", "--micro_batch 2", "--shard full"])
def test_two_processes_compute_what_one_computes(place, whole, tmp_path, flags):
    """1 × 8, 2 × 4, 2 × 2 with accumulation 2, and the LLM sharded: one loss, one set of weights (fp32).

    Biases of keys shift all scores alike, so that softmax gives them a gradient of zero; what is left of it is
    rounding, which Adam divides by its own size.
    """
    run(place, tmp_path, "--stage 1 --muon_lr 0 --lr 1e-4", flags, processes=2)
    assert losses(whole[0]) == pytest.approx(losses(tmp_path), rel=1e-6)
    alone, together = core_of(whole[0]), core_of(tmp_path)
    assert alone.keys() == together.keys()
    for name in alone:
        difference = (alone[name] - together[name]).abs()
        if name.endswith("self_qkv.bias"):
            of_queries, _, of_values = difference.chunk(3)
            difference = torch.cat([of_queries, of_values])
        assert name.endswith("W_K.bias") or difference.max() < 1e-6, name


def test_stage_2_on_two_processes_computes_what_one_computes(place, whole, tmp_path):
    """LoRA, and text-only rows that come last, in a forward pass of which the fusion core has no part."""
    flags = f"--stage 2 --init_from {whole[0] / 'model'} --pairs_per_video 2 --text_share 0.5 --muon_lr 0 --lr 1e-4"
    flags += f" --data {place / 'asked.jsonl'}"
    text = run(place, tmp_path / "one", flags)
    assert "LoRA adapters of rank 2" in text
    run(place, tmp_path / "two", flags, "--micro_batch 2", processes=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    of_adapters = differences(adapters_of(tmp_path / "one"), adapters_of(tmp_path / "two"))
    assert len(of_adapters) == 2 * 2 * 7  # A and B, layers, linear parts
    assert max(of_adapters.values()) < 1e-6
    of_cores = differences(core_of(tmp_path / "one"), core_of(tmp_path / "two"))
    for name, difference in of_cores.items():
        assert difference < 1e-6 or name.endswith(("W_K.bias", "qkv.bias")), name


def kill(arguments, out, mid_save):
    """Start a run and SIGKILL it while a checkpoint is being written, or at any time after its first step.

    -> whether it left a half-written checkpoint, None if it ended by itself."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, began = out / "log.jsonl", time.time()
    steps = len(log.read_text().splitlines()) if log.exists() else 0
    while process.poll() is None and time.time() - began < 300:
        if mid_save and any(out.glob("checkpoints/*.partial/*")):
            break
        if not mid_save and log.exists() and len(log.read_text().splitlines()) > steps:
            time.sleep(random.random() * 0.3)
            break
        time.sleep(0.0002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return any(out.glob("checkpoints/*.partial")) if process.returncode == -signal.SIGKILL else None


def test_a_killed_run_resumes_to_the_same_bits(place, whole, tmp_path):
    """Twice in the middle of a save, twice anywhere; then it runs to its end."""
    flags = "--stage 1 --muon_lr 0 --lr 1e-4 --save_every 1 --keep 2"
    left = [kill(command(place, tmp_path, flags), tmp_path, mid_save) for mid_save in (True, False, True, False)]
    assert left[0] or left[2], f"no kill hit a save: {left}"
    run(place, tmp_path, flags)
    assert losses(tmp_path) == losses(whole[0])
    assert not any((tmp_path / "checkpoints").glob("*.partial"))
    assert max(differences(core_of(whole[0]), core_of(tmp_path)).values()) == 0


def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_two(place, tmp_path):
    """Stage 1 with Muon; on two the bits are the same, on one the sums are ordered otherwise."""
    flags = "--stage 1 --muon_lr 0.01 --save_every 3 --keep 2"
    run(place, tmp_path / "a", flags, processes=2)
    for processes, tolerance in ((2, 0), (0, 0.02)):
        out = tmp_path / str(processes)
        out.mkdir()
        subprocess.run(["cp", "-r", tmp_path / "a" / "checkpoints", tmp_path / "a" / "log.jsonl", out], check=True)
        subprocess.run(["rm", "-r", out / "checkpoints" / "step-00000006"], check=True)
        assert "goes on after step 3" in run(place, out, flags, processes=processes)
        assert losses(out) == pytest.approx(losses(tmp_path / "a"), rel=tolerance, abs=0)


def test_another_run_or_a_foreign_checkpoint_is_refused(place, whole, tmp_path):
    subprocess.run(["cp", "-r", whole[0] / "checkpoints", tmp_path], check=True)
    flags = "--stage 1 --muon_lr 0 --lr 1e-4 --save_every 1 --keep 2"
    assert "lr was 0.0001, is 0.0002" in refused(place, tmp_path, flags.replace("1e-4", "2e-4"))
    (shard,) = (tmp_path / "checkpoints" / "step-00000006").glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        notes = {key: value.replace("fusion.queries", "fusion.stranger") for key, value in file.metadata().items()}
    renamed = {key.replace("fusion.queries", "fusion.stranger"): tensor for key, tensor in tensors.items()}
    save_file(renamed, shard, notes)
    says = refused(place, tmp_path, flags)
    assert "missing model.fusion.queries" in says and "unexpected model.fusion.stranger" in says and "--restart" in says
    shard.write_bytes(shard.read_bytes()[:100])
    assert "checkpoint cannot be read" in refused(place, tmp_path, flags)
    run(place, tmp_path, flags, "--restart")
    assert losses(tmp_path) == losses(whole[0])


def test_a_run_agrees_with_its_checkpoint_on_what_decides_it(whole):
    """Fails if an option is newly marked as decisive or as free: older runs would be refused, or others taken for them.

    A new option that decides the result is added here."""
    agreement = json.loads((train.complete_checkpoints(whole[0])[-1] / "run.json").read_text())
    frozen_parts = {"preset", "encoder_weights", "sam", "sam_weights", "llm"}
    length = {"max_videos", "epochs", "max_steps", "batch", "pairs_per_video", "text_share"}
    rates = {"lr", "lora_lr", "muon_lr", "warmup", "weight_decay"}
    assert agreement.keys() == {"stage", "seed", "precision", "data"} | frozen_parts | length | rates


def test_bad_videos_are_named_and_too_many_stop_the_run(place, tmp_path):
    (place / "videos" / "bad.mp4").write_text("not a video")
    records = (place / "captions.jsonl").read_text() + '\n{"video": "bad.mp4", "caption": "red"}'
    (tmp_path / "more.jsonl").write_text(records)
    flags = f"--stage 1 --muon_lr 0 --lr 1e-4 --data {tmp_path / 'more.jsonl'}"
    says = refused(place, tmp_path / "a", flags)
    assert "1 of 13 videos cannot be read" in says and "bad.mp4" in says and "--max_bad_fraction" in says
    row = json.loads((tmp_path / "a" / "bad_videos.jsonl").read_text())
    assert row["video"] == "bad.mp4" and "not a video" in row["reason"]
    run(place, tmp_path / "b", flags, "--max_bad_fraction 0.1", processes=2)
    assert len(losses(tmp_path / "b")) == 6


def settings_of(place, tmp_path, **given):
    """What complete() makes of a command line, as an object."""
    base = dict(stage=1, model=str(place), data=[str(place / "captions.jsonl")], videos=str(place / "videos"))
    base |= dict(features=str(place / "features"), output_dir=str(tmp_path), batch=4, micro_batch=4, max_steps=3)
    base |= dict(precision="fp32", processes=1, lr=1e-2, warmup=0)
    return train.complete(train.Settings(**(base | given)))


@pytest.mark.parametrize("stage", [1, 2])
def test_only_what_a_stage_trains_changes(place, whole, tmp_path, stage):
    """Encoder, SAM and LLM stay the same bit for bit; the queries learn through the frozen LLM."""
    given = {}
    if stage == 2:
        given = dict(stage=2, init_from=str(whole[0] / "model"), data=[str(place / "asked.jsonl")])
    settings = settings_of(place, tmp_path, **given)
    cpu = torch.device("cpu")
    model = train.build(settings, cpu, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    samples = read_samples(settings.data[0])
    cache = FeatureCache(place / "features")
    batches = Batches(settings, samples, cache, model.tokenizer, model.config.num_queries)
    optimizers = train.build_optimizers(model, settings)
    for step in range(2):
        train.train_step(model, optimizers, batches.step(step), settings, cpu)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {name for name in before if name.startswith("fusion.") or "lora_" in name}
    assert changed == expected and "fusion.queries" in changed
    assert any("lora_" in name for name in changed) == (stage == 2)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in expected)


def test_the_paper_s_settings_are_the_defaults_of_its_preset(model):
    """§4.2.2 of the paper, read back from what a run would use."""
    for stage, lr, batch, epochs, warmup in ((1, 1e-4, 2048, 4, 2000), (2, 2e-5, 256, 3, 0.03)):
        settings = train.complete(train.Settings(stage=stage, preset="paper", data=["x"], videos="y"))
        found = (settings.lr, settings.batch, settings.epochs, settings.warmup, settings.weight_decay)
        assert found == (lr, batch, epochs, warmup, 0.05) and settings.muon_lr is None and settings.max_steps is None
        if stage == 2:
            model.add_lora()
        (adamw,) = train.build_optimizers(model.freeze(stage), settings)
        assert type(adamw) is torch.optim.AdamW and {g["betas"] for g in adamw.param_groups} == {(0.9, 0.98)}
        decay = {}
        for group in adamw.param_groups:
            decay |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert decay[id(p)] == (0.05 if p.ndim == 2 and name != "fusion.queries" else 0.0), name
    config, _ = train.config_of(settings)
    assert (config.lora_rank, config.lora_alpha, config.num_queries, config.fusion_layers) == (64, 128, 32, 8)


def test_the_schedule_warms_up_and_decays_to_zero():
    settings = train.Settings(warmup=10, max_steps=110)
    assert [train.schedule(k, settings) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [train.schedule(k, settings) for k in (10, 60, 110)] == pytest.approx([1.0, 0.5, 0.0])
    share = train.Settings(warmup=0.03, max_steps=100)
    assert train.schedule(0, share) == pytest.approx(1 / 3) and train.schedule(3, share) == 1.0


def test_every_video_comes_once_per_epoch_on_one_rank_or_on_four(place, tmp_path):
    settings = settings_of(place, tmp_path, batch=4, micro_batch=1)
    samples = read_samples(place / "captions.jsonl")
    cache = FeatureCache(place / "features")

    class Spy(dict):
        def __getitem__(self, name):
            seen.append(name)
            return cache[name]

    spy = Spy.fromkeys(cache.videos)
    of_worlds = []
    for world in (1, 4):
        seen = []
        by_step = []
        for step in range(3):
            for rank in range(world):
                Batches(settings, samples, spy, tiny_tokenizer(), 5, rank, world).step(step)
            by_step.append(sorted(seen[-4:]))
        assert sorted(seen) == sorted(cache.videos)
        of_worlds.append(by_step)
    assert of_worlds[0] == of_worlds[1]


def test_the_order_of_samples_is_that_of_runs_begun_with_older_versions():
    """Fails if a random stream gets another number, is drawn from in another order, or counts something else."""
    samples = [Sample(f"text-{i}", None, "why ?", "red") for i in range(5)]
    cache = dict.fromkeys(["0.mp4", "1.mp4", "2.mp4", "3.mp4"])
    for name in cache:
        samples += [Sample(f"{name[0]}-{i}", name, f"why {i} ?", "red", weight=1.5) for i in range(3)]
    settings = train.Settings(seed=7, batch=4, pairs_per_video=2, text_share=0.5)
    batches = Batches(settings, samples, cache, tiny_tokenizer(), 5, rank=1, world=2)
    assert batches.order(0).tolist() == [1, 2, 2, 0, 0, 3] and batches.order(1).tolist() == [2, 0, 0, 2, 1, 3]
    asked = []
    for place in batches.places(1):
        asked += [sample.id for sample in batches.samples_at(place)[1]]
    assert asked == ["3-0", "3-1", "0-1", "0-2"]
    assert [batches.texts(step).tolist() for step in range(4)] == [[3], [2], [4], [3]]


def test_weights_say_how_often_an_epoch_shows_a_video(place, tmp_path):
    settings = settings_of(place, tmp_path, batch=1, micro_batch=1)
    cache = FeatureCache(place / "features")
    lines = (place / "captions.jsonl").read_text().splitlines()
    often, rarely = tmp_path / "often.jsonl", tmp_path / "rarely.jsonl"
    often.write_text("\n".join(lines[:4]))
    rarely.write_text("\n".join(lines[4:8]))
    samples = read_samples(f"{often}@2.5") + read_samples(f"{rarely}@0.25")
    batches = Batches(settings, samples, cache, tiny_tokenizer(), 5)
    assert batches.epoch_length == 11
    in_all = Counter()
    for epoch in range(40):
        shown = Counter(batches.videos[i][0] for i in batches.order(epoch))
        assert shown.total() == 11
        for key, _ in batches.videos:
            _, weight = key
            assert shown[key] in ((2, 3) if weight == 2.5 else (0, 1))
        in_all += shown
    for key, _ in batches.videos:
        _, weight = key
        least, most = (80, 120) if weight == 2.5 else (3, 17)
        assert least <= in_all[key] <= most

    plain = Batches(settings, read_samples(often), cache, tiny_tokenizer(), 5)
    thrice = Batches(settings, read_samples(f"{often}@3"), cache, tiny_tokenizer(), 5)  # changes the length alone
    assert sorted(thrice.order(0)) == sorted([*plain.order(0)] * 3)
    assert plain.digest() != thrice.digest()


def test_rows_that_cannot_be_shared_are_refused(place, tmp_path):
    says = refused(place, tmp_path, "--stage 1 --batch 7", processes=2)
    assert "7 rows cannot be shared by 2 processes (--batch)" in says


def test_a_missing_report_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(VidReasonError, match="pip install wandb"):
        train.Log(tmp_path, train.Settings(report_to="wandb", max_steps=1), 0)
