"""Benchmarks on a CPU: the toy's weights and clips. tests/bench.py runs them."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
import torch.nn.functional as F
from bench_turns import bare_steps, medians, race, row
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
import vidreason
from data.batches import Batches
from data.benchmarks import read_samples
from data.features import FeatureCache, encode_videos
from data.program import ROOT, TOY_MODEL
from vidreason import Conversation, Features, VidReason, collate_features, pack, read_config

CLIPS, CPU = ROOT / "toy" / "clips", torch.device("cpu")


@cache
def toy_features(tiny):
    folder = tempfile.TemporaryDirectory()  # lives as long as this program, being cached with the rest
    names = sorted(path.name for path in CLIPS.glob("*.mp4"))
    if tiny:
        names = names[:4]
    encode_videos(TOY_MODEL, read_config(TOY_MODEL), CLIPS, names, folder.name)
    return FeatureCache(folder.name), folder


def toy(stage, options):
    """-> (model, settings, batches, train_step but for its micro-batches): shipped weights and clips, as in train.py"""
    batch = 4 if options.tiny else 16
    given = {"data": [str(CLIPS / "samples.jsonl")], "videos": str(CLIPS), "batch": batch, "micro_batch": batch}
    settings = train.complete(train.Settings(stage=stage, device="cpu", **given))
    if stage == 2:
        model = VidReason.load(TOY_MODEL)
    else:
        model = VidReason.create(read_config(TOY_MODEL), TOY_MODEL)
    model = model.freeze(stage)
    samples = read_samples(settings.data[0])
    if stage == 1:
        samples = as_captions(samples)
    features, _ = toy_features(options.tiny)
    batches = Batches(settings, samples, features, model.tokenizer, model.config.num_queries)
    optimizers = train.build_optimizers(model, settings)
    step = partial(train.train_step, model, optimizers, settings=settings, device=CPU)
    return model, settings, batches, step


def as_captions(samples):
    """The clips come with questions only: their answers stand in for captions, which have 49 words on average."""
    answers = defaultdict(list)
    for sample in samples:
        answers[sample.video].append(sample.answer)
    captions = {}
    for video, texts in answers.items():
        words = " . ".join(texts).split()
        captions[video] = " ".join(words[:49])
    return [replace(s, question=vidreason.CAPTION_PROMPT, answer=captions[s.video]) for s in samples]


def cached_features(options):
    """Stage-1 steps that find Z_vision in the cache (epoch 2) ÷ steps that first encode their videos (epoch 1)."""
    model, settings, batches, step = toy(1, options)

    def first_epoch():
        for (name, _), _ in batches.videos[: settings.batch]:
            model.perceive(CLIPS / name)
        step(batches.step(0))

    def second_epoch():
        step(batches.step(0))

    yield race("cached_features", second_epoch, first_epoch, settings.batch, "samples/s", options)


def packing(options):
    """Stage-2 steps with all questions of a video in one row ÷ with a row for each question, in one padded batch."""
    model, settings, batches, step = toy(2, options)
    packed_rows, single_rows = [], []  # conversations
    packed_features, single_features = [], []
    for (name, _), samples in batches.videos[: settings.batch]:
        features = batches.cache[name]
        pairs = [batches.encode(s.question, s.answer) for s in samples[: settings.pairs_per_video]]
        packed_rows.append(Conversation(pairs))
        packed_features.append(features)
        single_rows += [Conversation([pair]) for pair in pairs]
        single_features += [features] * len(pairs)
    together = pack(packed_rows, model.config.num_queries), collate_features(packed_features)
    one_by_one = pack(single_rows, model.config.num_queries), collate_features(single_features)

    loss, truth = loss_of(model, together), loss_of(model, one_by_one)
    steps = partial(step, [together]), partial(step, [one_by_one])
    same = {"same_loss_to": abs(loss - truth) / truth}
    yield race("packing", *steps, len(single_rows), "questions/s", options, **same)


@torch.no_grad()
def loss_of(model, micro_batch):
    packed, vision = micro_batch
    loss, _ = model(packed, *vision)
    return loss.item()


def target_logits(options):
    """Logits where a target is predicted ÷ at every position: LLM forward and backward passes, then bytes of logits."""
    model, settings, batches, _ = toy(2, options)
    ((packed, vision),) = batches.step(0)
    e_vision = model.fusion(*vision).detach()

    def targets_only():
        with train.arithmetic(settings, CPU):
            vidreason.loss(model.llm, packed, e_vision)[0].backward()

    def everywhere():
        with train.arithmetic(settings, CPU):
            e_text = model.llm.get_input_embeddings()(packed.ids)
            e_input = torch.cat([e_vision, e_text], dim=1)
            given = {"attention_mask": packed.attention_mask, "position_ids": packed.position_ids, "use_cache": False}
            logits = model.llm(inputs_embeds=e_input, **given).logits.float()
            chosen = logits[packed.rows, packed.columns]
            F.cross_entropy(chosen, packed.targets, reduction="sum").backward()

    yield race("target_logits", targets_only, everywhere, 1, "passes/s", options)
    of_one_position = 4 * model.llm.config.vocab_size
    targets, positions = len(packed.targets), packed.position_ids.numel()
    yield row("logits_bytes", of_one_position * targets, of_one_position * positions, "bytes")


def bare_llm(options):
    """Our stage-2 steps, on as much text alone and then with the fusion core ÷ those of a bare LLM with peft's LoRA."""
    model, settings, batches, step = toy(2, options)
    micro = batches.step(0)
    packed, _ = micro[0]
    lora = model.llm.peft_config["default"]
    llm, _ = vidreason.load_llm(TOY_MODEL / "llm")
    ours, num_queries = partial(step, micro), model.config.num_queries
    yield from bare_steps("bare_llm", llm, lora, packed, num_queries, ours, step, settings, options)


def unfused_attention(options):
    """Attention on a CPU unfused, as in arithmetic() ÷ by the fused kernel: its two passes, then stage-2 steps."""
    model, settings, batches, step = toy(2, options)
    micro = batches.step(0)
    packed, _ = micro[0]
    mask = packed.attention_mask
    llm = model.llm.config
    dtype = torch.bfloat16 if train.uses_bf16(settings, CPU) else torch.float32
    shape = (settings.batch, llm.num_attention_heads, mask.shape[-1], llm.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))

    def fused():
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

    def unfused():
        with sdpa_kernel(SDPBackend.MATH):
            fused()

    def fused_step():
        with mock.patch.object(train, "sdpa_kernel", lambda backend: nullcontext()):
            step(micro)

    yield race("unfused_attention", unfused, fused, 1, "passes/s", options)
    yield race("unfused_steps", partial(step, micro), fused_step, settings.batch, "samples/s", options)


def bf16(options):
    """Stage-2 steps in bf16 ÷ in fp32, on a processor that multiplies bf16 (avx512_bf16)."""
    _, settings, batches, step = toy(2, options)
    steps = []
    for precision in ("bf16", "fp32"):
        steps.append(partial(step, batches.step(0), settings=replace(settings, precision=precision)))
    if train.uses_bf16(settings, CPU):
        yield race("bf16", *steps, settings.batch, "samples/s", options)
    else:
        yield {"name": "bf16", "skipped": "this processor has no avx512_bf16"}


def checked_texture(rng, size):
    """A picture (H, W, 3) of squares of 8 pixels in random colours."""
    height, width = size
    colours = rng.integers(0, 256, (height // 8, width // 8, 3))
    return colours.astype(np.uint8).repeat(8, 0).repeat(8, 1)


def write_film(path, pictures, size, rate, options):
    """Write RGB pictures uint8 (H, W, 3) as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def filmed(seconds, rate, size):
    """Pictures of a noisy texture that drifts: as H.264 with B-frames 440 kbit/s, like filmed video."""
    rng = np.random.default_rng(0)
    texture = checked_texture(rng, size)
    noise = rng.normal(0, 8, (16, *size, 3))
    for i in range(seconds * rate):
        picture = np.roll(texture, 2 * i, axis=1) + noise[i % 16]
        yield picture.clip(0, 255).astype(np.uint8)


def sparse_decode(options):
    """read_video of 32 frames of a minute of 1280 × 720 ÷ the same with the same decoder decoding every frame."""

    def every_picture(path, timeline, seconds, side):
        wanted = set(np.searchsorted(timeline.starts, seconds, side="right") - 1)
        kept = []
        with av.open(path) as container:
            stream = vidreason.picture_stream(container)
            frames = vidreason.decode(container, stream)
            for number, shown in enumerate(vidreason.play_by_stamp(frames, timeline)):
                picture = vidreason.to_picture(shown.frame, 1, None, side)
                if number in wanted:
                    kept.append((shown.start, picture))
        starts, pictures = zip(*kept, strict=True)
        return np.array(starts), list(pictures)

    def read_all():
        with mock.patch.object(vidreason, "pictures_at", every_picture):
            return read()

    with tempfile.TemporaryDirectory() as folder:
        size, seconds, rate = (720, 1280), 60, 30
        if options.tiny:
            size, seconds = (240, 320), 10
        path = Path(folder, "long.mp4")
        write_film(path, filmed(seconds, rate, size), size, rate, {"g": str(rate)})  # a keyframe per second
        read = partial(vidreason.read_video, path, 4, 8, 224)
        assert torch.equal(read()[0], read_all()[0])
        yield race("sparse_decode", read, read_all, 1, "videos/s", options)


READ_ONE = """
import re, sys
from vidreason import read_video
read_video(sys.argv[1], 4, 8, 224)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss counts the parent's memory, too
"""


def decode_memory(options):
    """Peak memory of a process that reads 32 frames of an 8K film ÷ of a 720p film."""
    small, large = (720, 1280), (4320, 7680)
    if options.tiny:
        large = (1080, 1920)
    yield row("decode_memory", peak_memory(large), peak_memory(small), "KiB")


def peak_memory(size):
    """KiB that a process of its own needs to read 32 frames of a film of this height and width."""
    texture = checked_texture(np.random.default_rng(0), size)
    pictures = (np.roll(texture, 8 * i, axis=1) for i in range(32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "film.mp4")
        write_film(path, pictures, size, 4, {"preset": "veryfast"})
        command = [sys.executable, "-c", READ_ONE, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def data_wait(options):
    """Seconds that a stage-2 step waits for its batch ÷ seconds of the whole step; no text is found in a cache."""
    model, settings, batches, step = toy(2, options)
    batches.encode = batches.encode.__wrapped__  # 17 clips would soon be in its cache, a real data set is not
    settings = replace(settings, max_steps=1 + 8 * options.rounds, warmup=1, save_every=10**9)
    with tempfile.TemporaryDirectory() as folder:
        train.train(model, batches, step.args[1], settings, CPU, Path(folder), 0, {})
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    steps, waits = [], []
    for line in lines[1:]:  # the first step has nothing to overlap with
        log = json.loads(line)
        seconds = settings.batch / log["samples_per_s"]
        steps.append(seconds)
        waits.append(log["data_wait"] * seconds)
    (alone,) = medians([partial(batches.step, 1)], options)
    yield row("data_wait", statistics.mean(waits), statistics.mean(steps), "s", seconds_without_prefetch=alone)


def padding(options):
    """Real tokens ÷ tokens with padding in stage 2's batches: of the toy's training data if made, else of its clips."""
    data = {}
    if not train.TOY_DATA.exists():
        data = {"data": [str(CLIPS / "samples.jsonl")], "videos": str(CLIPS)}
    settings = train.complete(train.Settings(stage=2, **data))
    settings = replace(settings, micro_batch=settings.batch)
    samples = []
    for path in settings.data:
        samples += read_samples(path, settings.videos)
    blank = Features(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.bool))
    features = dict.fromkeys((sample.video for sample in samples), blank)
    _, tokenizer = vidreason.load_llm(TOY_MODEL / "llm")
    batches = Batches(settings, samples, features, tokenizer, read_config(TOY_MODEL).num_queries)

    real, padded = Counter(), Counter()  # tokens, by kind of row
    for number in range(4 * options.rounds):
        for packed, vision in batches.step(number):
            count = (packed.position_ids > 0).sum().item() + len(packed.ids)  # one position 0 starts each row
            for kind in ("all", "with_video" if vision else "text_alone"):
                real[kind] += count
                padded[kind] += packed.position_ids.numel()
    shares = {kind: real[kind] / padded[kind] for kind in real}
    source = str(Path(settings.data[0]).relative_to(ROOT))
    yield row("padding", real["all"], padded["all"], "tokens", share=shares, data=source)
