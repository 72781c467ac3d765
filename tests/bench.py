"""Benchmarks. Every claim about this project's speed comes from here, as a ratio to a named alternative.

    python tests/bench.py                                # toy weights and clips on a CPU, a few minutes
    python tests/bench.py --only packing bf16 --out bench.json
    python tests/bench.py --gpu --out gpu.json           # the paper's sizes with random weights, on one GPU
    python tests/bench.py --gpu --preset small

Ours and the alternative take turns in one process, and each figure is the median of --rounds turns: a busy neighbour
slows both alike. Ratio is ours ÷ alternative. A time on its own is a property of the machine and claims nothing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch is imported
import argparse
import copy
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import av
import numpy as np
import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
import vidreason
from data.batches import Batches
from data.benchmarks import read_samples
from data.features import FeatureCache, encode_videos
from data.program import TOY_MODEL, Parser, guarded, positive
from vidreason import PRESETS, Conversation, Features, VidReason, VidReasonError, collate_features, pack, read_config

CLIPS, CPU = ROOT / "toy" / "clips", torch.device("cpu")


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(functions, options, rounds=None):
    """Seconds of each turn of each function; the first turn warms up and does not count."""
    times = [[] for _ in functions]
    for _ in range(1 + (rounds or options.rounds)):
        for function, found in zip(functions, times, strict=True):
            start = now(options.device)
            function()
            found.append(now(options.device) - start)
    return [found[1:] for found in times]


def medians(*args):
    return [statistics.median(times) for times in take_turns(*args)]


def row(name, ours, alternative, unit, **more):
    return {"name": name, "unit": unit, "ours": ours, "alternative": alternative, "ratio": ours / alternative, **more}


def race(name, ours, alternative, count, unit, options, **more):
    """A row of rates, where each function does `count` things per turn. turns: the extremes of the ratio."""
    times = take_turns((ours, alternative), options)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    a, b = map(statistics.median, times)
    return row(name, count / a, count / b, unit, turns=[min(ratios), max(ratios)], **more)


# --------------------------------------------------------------------------- on a CPU: the toy


@cache
def toy_features(tiny):
    folder = tempfile.TemporaryDirectory()  # lives as long as this program, being cached with the rest
    names = sorted(path.name for path in CLIPS.glob("*.mp4"))[: 4 if tiny else None]
    encode_videos(TOY_MODEL, read_config(TOY_MODEL), CLIPS, names, folder.name)
    return FeatureCache(folder.name), folder


def toy(stage, options):
    """→ (model, settings, batches, train_step but for its micro-batches): shipped weights and clips, as in train.py."""
    batch = 4 if options.tiny else 16
    given = {"data": [str(CLIPS / "samples.jsonl")], "videos": str(CLIPS), "batch": batch, "micro_batch": batch}
    settings = train.complete(train.Settings(stage=stage, device="cpu", **given))
    create = VidReason.load if stage == 2 else partial(VidReason.create, read_config(TOY_MODEL))
    model, samples = create(TOY_MODEL).freeze(stage), read_samples(settings.data[0])
    if stage == 1:  # the clips come with questions only; the toy world's captions have 49 words on average
        said = {s.video: " . ".join(x.answer for x in samples if x.video == s.video).split()[:49] for s in samples}
        samples = [replace(s, question=vidreason.CAPTION_PROMPT, answer=" ".join(said[s.video])) for s in samples]
    batches = Batches(settings, samples, toy_features(options.tiny)[0], model.tokenizer, model.config.num_queries)
    step = partial(train.train_step, model, train.build_optimizers(model, settings), settings=settings, device=CPU)
    return model, settings, batches, step


def cached_features(options):
    """Stage-1 steps that find Z_vision in the cache (epoch 2) ÷ steps that first encode their videos (epoch 1)."""
    model, settings, batches, step = toy(1, options)

    def first_epoch():
        for (name, _), _ in batches.videos[: settings.batch]:
            model.perceive(CLIPS / name)
        step(batches.step(0))

    second_epoch = lambda: step(batches.step(0))
    yield race("cached_features", second_epoch, first_epoch, settings.batch, "samples/s", options)


def packing(options):
    """Stage-2 steps with all questions of a video in one row ÷ with a row for each question, in one padded batch."""
    model, settings, batches, step = toy(2, options)
    videos, n = batches.videos[: settings.batch], model.config.num_queries
    pairs = [[batches.encode(s.question, s.answer) for s in some[: settings.pairs_per_video]] for _, some in videos]
    seen = [batches.cache[name] for (name, _), _ in videos]
    repeated = [f for f, some in zip(seen, pairs, strict=True) for _ in some]
    one = [(pack([Conversation(some) for some in pairs], n), collate_features(seen))]
    many = [(pack([Conversation([pair]) for some in pairs for pair in some], n), collate_features(repeated))]
    with torch.no_grad():
        a, b = (model(packed, *vision)[0].item() for ((packed, vision),) in (one, many))
    steps = partial(step, one), partial(step, many)
    yield race("packing", *steps, len(repeated), "questions/s", options, same_loss_to=abs(a - b) / b)


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
            e_input = torch.cat([e_vision, model.llm.get_input_embeddings()(packed.ids)], dim=1)
            given = {"attention_mask": packed.attention_mask, "position_ids": packed.position_ids, "use_cache": False}
            logits = model.llm(inputs_embeds=e_input, **given).logits.float()[packed.rows, packed.columns]
            F.cross_entropy(logits, packed.targets, reduction="sum").backward()

    yield race("target_logits", targets_only, everywhere, 1, "passes/s", options)
    size = 4 * model.llm.config.vocab_size
    yield row("logits_bytes", size * len(packed.targets), size * packed.position_ids.numel(), "bytes")


def bare_steps(name, llm, lora, packed, num_queries, ours, step, settings, options):
    """The rows that compare our steps with those of transformers and peft: causal text, logits everywhere."""
    llm = peft.get_peft_model(llm, lora).train()
    trained = [p for p in llm.parameters() if p.requires_grad]
    optimizer, (count, length) = torch.optim.AdamW(trained, lr=settings.lr), packed.position_ids.shape
    ids = torch.randint(llm.config.vocab_size, (count, length)).to(options.device)
    prefix = [Conversation([([], text[num_queries:])], text[:num_queries]) for text in ids.tolist()]

    def bare():
        optimizer.zero_grad(set_to_none=True)
        with train.arithmetic(settings, options.device):
            loss = llm(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    text = partial(step, [(pack(prefix, 0), None)])
    yield race(name, text, bare, count * length, "tokens/s", options)
    yield race(f"{name}_and_fusion", ours, bare, count * length, "tokens/s", options)


def bare_llm(options):
    """Our stage-2 steps, on as much text alone and then with the fusion core ÷ those of a bare LLM with peft's LoRA."""
    model, settings, batches, step = toy(2, options)
    micro, lora, (llm, _) = batches.step(0), model.llm.peft_config["default"], vidreason.load_llm(TOY_MODEL / "llm")
    n, ours = model.config.num_queries, partial(step, micro)
    yield from bare_steps("bare_llm", llm, lora, micro[0][0], n, ours, step, settings, options)


def unfused_attention(options):
    """Attention on a CPU unfused, as in arithmetic() ÷ by the fused kernel: its two passes, then stage-2 steps."""
    model, settings, batches, step = toy(2, options)
    micro, llm = batches.step(0), model.llm.config
    mask, dtype = micro[0][0].attention_mask, torch.bfloat16 if train.uses_bf16(settings, CPU) else torch.float32
    shape = (settings.batch, llm.num_attention_heads, mask.shape[-1], llm.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))

    def attention(*backends):
        with sdpa_kernel(*backends) if backends else nullcontext():
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

    def fused_step():
        with mock.patch.object(train, "sdpa_kernel", lambda backend: nullcontext()):
            step(micro)

    yield race("unfused_attention", partial(attention, SDPBackend.MATH), attention, 1, "passes/s", options)
    yield race("unfused_steps", partial(step, micro), fused_step, settings.batch, "samples/s", options)


def bf16(options):
    """Stage-2 steps in bf16 ÷ in fp32, on a processor that multiplies bf16 (avx512_bf16)."""
    _, settings, batches, step = toy(2, options)
    kinds = [replace(settings, precision=precision) for precision in ("bf16", "fp32")]
    steps = [partial(step, batches.step(0), settings=kind) for kind in kinds]
    if train.uses_bf16(settings, CPU):
        yield race("bf16", *steps, settings.batch, "samples/s", options)
    else:
        yield {"name": "bf16", "skipped": "this processor has no avx512_bf16"}


def write_clip(path, seconds, rate=30, size=(240, 320)):
    """A noisy texture that drifts, in H.264 with a keyframe per second and B-frames: 440 kbit/s, like filmed video."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3)).repeat(8, 0).repeat(8, 1)
    noise = rng.normal(0, 8, (16, *size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": str(rate)})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(seconds * rate):
            picture = (np.roll(texture, 2 * i, axis=1) + noise[i % 16]).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def sparse_decode(options):
    """read_video of 32 frames of a minute of 1280 × 720 ÷ the same with the same decoder decoding every frame."""

    def every_picture(path, timeline, seconds, side):
        wanted = set(np.searchsorted(timeline.starts, seconds, side="right") - 1)
        kept = []
        with av.open(path) as container:
            stream = vidreason.picture_stream(container)
            for number, shown in enumerate(vidreason.play(container, stream, timeline)):
                picture = vidreason.to_picture(shown.frame, 1, None, side)
                if number in wanted:
                    kept.append((shown.start, picture))
        starts, pictures = zip(*kept, strict=True)
        return np.array(starts), list(pictures)

    def read_all():
        with mock.patch.object(vidreason, "pictures_at", every_picture):
            return read()

    with tempfile.TemporaryDirectory() as folder:
        size = (240, 320) if options.tiny else (720, 1280)
        write_clip(Path(folder, "long.mp4"), 10 if options.tiny else 60, size=size)
        read = partial(vidreason.read_video, Path(folder, "long.mp4"), 4, 8, 224)
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
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ((720, 1280), (1080, 1920) if options.tiny else (4320, 7680)):
            path = Path(folder, f"{size[0]}.mp4")
            texture = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
            picture = texture.repeat(8, 0).repeat(8, 1)
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=4, options={"preset": "veryfast"})
                stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
                for i in range(32):
                    frame = av.VideoFrame.from_ndarray(np.roll(picture, 8 * i, axis=1), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
            command = [sys.executable, "-c", READ_ONE, str(path)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout))
    yield row("decode_memory", peaks[1], peaks[0], "KiB")


def data_wait(options):
    """Seconds that a stage-2 step waits for its batch ÷ seconds of the whole step; no text is found in a cache."""
    model, settings, batches, step = toy(2, options)
    batches.encode = batches.encode.__wrapped__  # 17 clips would soon be in its cache, a real data set is not
    settings = replace(settings, max_steps=1 + 8 * options.rounds, warmup=1, save_every=10**9)
    with tempfile.TemporaryDirectory() as folder:
        train.train(model, batches, step.args[1], settings, CPU, Path(folder), 0, {})
        log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    steps = [settings.batch / x["samples_per_s"] for x in log[1:]]  # the first step has nothing to overlap with
    waits = [x["data_wait"] * seconds for x, seconds in zip(log[1:], steps, strict=True)]
    (alone,) = medians([partial(batches.step, 1)], options)
    yield row("data_wait", statistics.mean(waits), statistics.mean(steps), "s", seconds_without_prefetch=alone)


def padding(options):
    """Real tokens ÷ tokens with padding in stage 2's batches: of the toy's training data if made, else of its clips."""
    data = {} if train.TOY_DATA.exists() else {"data": [str(CLIPS / "samples.jsonl")], "videos": str(CLIPS)}
    settings = train.complete(train.Settings(stage=2, **data))
    settings, n = replace(settings, micro_batch=settings.batch), read_config(TOY_MODEL).num_queries
    samples = [s for path in settings.data for s in read_samples(path, settings.videos)]
    blank = Features(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.bool))
    seen, tokenizer = dict.fromkeys((s.video for s in samples), blank), vidreason.load_llm(TOY_MODEL / "llm")[1]
    batches, counts = Batches(settings, samples, seen, tokenizer, n), {}
    for packed, vision in (micro for k in range(4 * options.rounds) for micro in batches.step(k)):
        real = (packed.position_ids > 0).sum().item() + len(packed.ids)  # one position 0 starts each row
        for kind in ("all", "with_video" if vision else "text_alone"):
            before = counts.get(kind, (0, 0))
            counts[kind] = before[0] + real, before[1] + packed.position_ids.numel()
    shares = {kind: real / padded for kind, (real, padded) in counts.items()}
    yield row("padding", *counts["all"], "tokens", share=shares, data=str(Path(settings.data[0]).relative_to(ROOT)))


# --------------------------------------------------------------------------- on a GPU: full sizes, random weights


def full_config(options):
    if options.tiny:
        return replace(PRESETS["toy"], llm=options.llm_shape or "toy/weights/llm", points_per_side=2, keyframe_size=64)
    return replace(PRESETS[options.preset], llm=options.llm_shape or PRESETS[options.preset].llm)


def random_llm(config, device):
    """The LLM in bf16, its weights made where they will be used: 16 GB that never pass through the CPU."""
    llm = train.llm_on_meta(config.llm, ROOT).requires_grad_(False).to_empty(device=device)
    llm.tie_weights()
    for p in llm.parameters():
        p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1)
    decoder = llm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(llm.config).to(device)  # to_empty emptied its frequencies, too
    return llm.eval()


def ceilings(options):
    """→ (FLOP/s of bf16 products, of fp32 products, bytes/s of copies): the best that this device reaches."""
    if not hasattr(options, "ceilings"):
        a = torch.randn(2 * [64 if options.tiny else 8192], device=options.device)
        b, c = a.bfloat16(), torch.empty_like(a)
        seconds = medians((lambda: b @ b, lambda: a @ a, lambda: c.copy_(a)), options, 4 * options.rounds)
        options.ceilings = [x / s for x, s in zip((2 * len(a) ** 3, 2 * len(a) ** 3, 2 * a.nbytes), seconds)]
    return options.ceilings


def matmul(options):
    """The ceiling: products of two large square matrices in bf16 ÷ in fp32. MFU is a share of this bf16 figure."""
    bf16, fp32, memory = ceilings(options)
    yield row("matmul", bf16 / 1e12, fp32 / 1e12, "TFLOP/s", memory_gb_per_s=memory / 1e9)


def parts_of(model, optimizers, step, options):
    """Median milliseconds of the parts of train_step, between marks that hooks set while it runs."""
    found, cuda = [], options.device.type == "cuda"

    def mark(*_):
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    hooks = [model.register_forward_pre_hook(mark), model.fusion.register_forward_hook(mark)]
    hooks += [model.register_forward_hook(mark), optimizers[0].register_step_pre_hook(mark)]
    hooks += [optimizers[-1].register_step_post_hook(mark)]
    for _ in range(options.rounds):
        marks = []
        step()
        now(options.device)
        found.append([a.elapsed_time(b) if cuda else 1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)])
    for hook in hooks:
        hook.remove()
    parts = "fusion_forward", "llm_forward", "backward_and_clipping", "optimiser"
    return dict(zip(parts, map(statistics.median, zip(*found, strict=True)), strict=True))


def full_steps(stage, micro, text, options):
    """The rows of one stage at full size, by way of train.py's own functions and of FSDP2 on one process."""
    config, device, name = full_config(options), options.device, f"stage{stage}"
    with torch.device("meta"):
        shape = VidReason(config, nn.Identity(), nn.Identity(), train.llm_on_meta(config.llm, ROOT), None)
        costs = train.step_costs(shape, stage, micro, text)
    settings = train.Settings(stage=stage, precision="bf16", **train.DEFAULTS["paper", stage])
    llm = random_llm(config, device)
    twin = copy.deepcopy(llm, {id(p): p for p in llm.parameters()})  # the same weights, soon with other adapters
    model = VidReason(config, nn.Identity(), nn.Identity(), llm, None)
    if stage == 2:
        model.add_lora()
    train.parallelise(model.freeze(stage).to(device), settings, device)
    for block in model.llm.get_decoder().layers:
        block.compile(dynamic=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    step = partial(train.train_step, model, train.build_optimizers(model, settings), settings=settings, device=device)
    words = torch.randint(llm.config.vocab_size, (micro, text)).tolist()
    packed = pack([Conversation([([], ids)]) for ids in words], config.num_queries).to(device)
    times = torch.arange(config.num_clips * (1 + config.masks_per_keyframe), device=device).expand(micro, -1) / 10
    vision = torch.randn(*times.shape, config.encoder_width, device=device), times, times >= 0
    compiled = partial(step, [(packed, vision)])

    def eager(micro=None):
        with torch.compiler.set_stance("force_eager"):
            return step(micro or [(packed, vision)])

    def details(run, seconds):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        used = {k: costs["fusion"] + costs[llm] for k, llm in (("convention", "llm"), ("executed", "llm_executed"))}
        mfu = {k: flops * micro / seconds / ceilings(options)[0] for k, flops in used.items()}
        parts = parts_of(model, step.args[1], run, options)
        rates = {"tokens_per_s": packed.position_ids.numel() / seconds, "mfu": mfu}
        return {**rates, "ms": parts, "peak_gib": train.memory_gib(device)}

    (seconds,) = medians([eager], options)
    best = ceilings(options)[0] / (costs["fusion"] + costs["llm"])
    yield row(f"{name}_mfu", micro / seconds, best, "samples/s", **details(eager, seconds))
    found = race(f"{name}_compiled", compiled, eager, micro, "samples/s", options)
    yield {**found, **details(compiled, micro / found["ours"])}
    if stage == 2:
        lora, n = model.llm.peft_config["default"], config.num_queries
        yield from bare_steps("stage2_bare_llm", twin, lora, packed, n, eager, eager, settings, options)


def stage1(options):
    """Stage-1 steps ÷ what the ceiling allows (MFU, of 4 FLOP per frozen and 6 per trained parameter and token, and
    attention; executed: without the lm_head where nothing is predicted), then with compiled ÷ with eager blocks."""
    for found in full_steps(1, *((2, 4) if options.tiny else (64, 32)), options):
        yield found
        if found["name"] == "stage1_mfu":
            options.cached = found["ours"]


def stage2(options):
    """Stage-2 steps ÷ what the ceiling allows, compiled ÷ eager, on as much text alone and then with the fusion core ÷
    those of a bare LLM with peft's LoRA."""
    yield from full_steps(2, *((2, 6) if options.tiny else (8, 300)), options)


def vision(options):
    """The encoder in TF32, as data.py has it ÷ in bf16; stage-1 samples with cached ÷ with inline vision, decoding not
    counted. A SAM with random weights keeps next to no masks: its time, hence this ratio, is a lower bound."""
    config, device, seconds = full_config(options), options.device, {}
    torch.set_float32_matmul_precision("high")  # as in data.py's workers
    encoder = vidreason.VideoTransformer(config).requires_grad_(False).eval().to(device)
    clips = torch.rand(config.num_clips, config.frames_per_clip, 3, *2 * [config.image_size], device=device)
    autocast = torch.autocast(device.type, torch.bfloat16)
    found = race("encoder_tf32", partial(encoder, clips), partial(autocast(encoder), clips), 1, "videos/s", options)
    yield {**found, "ms_per_video": {"tf32": 1e3 / found["ours"], "bf16": 1e3 / found["alternative"]}}
    seconds["encoder"] = 1 / found["ours"]
    keyframe = np.random.default_rng(0).integers(0, 256, [*2 * [config.keyframe_size], 3], np.uint8)
    for name in {"toy": ["toy"]}.get(config.sam, ["vit_h", "vit_b"]):
        sam = vidreason.build_sam(replace(config, sam=name)).requires_grad_(False).eval().to(device)
        (per_keyframe,) = medians([partial(vidreason.segment, keyframe, sam, config)], options)
        seconds[name] = config.num_clips * per_keyframe
        vidreason.mask_generator.cache_clear()  # or it would keep this SAM on the GPU
    ms = {name: 1e3 * s for name, s in seconds.items()}
    if hasattr(options, "cached"):
        inline = 1 / (1 / options.cached + seconds["encoder"] + seconds[config.sam])
        yield row("inline_vision", options.cached, inline, "samples/s", ms_per_video=ms)
    else:
        yield {"name": "inline_vision", "skipped": "it needs stage1", "ms_per_video": ms}


def decode(options):
    """Greedy decoding of one answer with a static cache and (on a GPU) torch.compile ÷ with the default cache. Share of
    the bandwidth: bytes of weights × tokens/s ÷ bytes/s of copies."""
    llm, n = random_llm(full_config(options), options.device), 4 if options.tiny else 128
    words = llm.get_input_embeddings().weight
    e_input, mask = words[None, :64], torch.ones(1, 64, dtype=torch.long, device=words.device)
    fixed = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    default = partial(llm.generate, inputs_embeds=e_input, attention_mask=mask, **fixed)
    static = partial(default, cache_implementation="static")
    assert static().shape == default().shape == (1, n)
    found = race("decode", static, default, n, "tokens/s", options)
    read = sum(p.nbytes for p in llm.parameters()) - (0 if llm.config.tie_word_embeddings else words.nbytes)
    yield {**found, "share_of_bandwidth": {k: found[k] * read / ceilings(options)[2] for k in ("ours", "alternative")}}


# --------------------------------------------------------------------------- the program

ON_CPU = cached_features, packing, target_logits, bare_llm, unfused_attention, bf16
ON_CPU += sparse_decode, decode_memory, data_wait, padding
ON_GPU = matmul, stage1, stage2, vision, decode


def attempt(benchmark, options):
    """The rows of a benchmark; one that fails says so and does not take the others with it."""
    try:
        yield from benchmark(options)
    except torch.OutOfMemoryError as error:
        yield {"name": benchmark.__name__, "out_of_memory": str(error)[:80]}
    except Exception as error:
        yield {"name": benchmark.__name__, "failed": f"{type(error).__name__}: {error}"[:300]}


def show(found):
    if "ratio" in found:
        turns = "{:.3g} … {:.3g}".format(*found["turns"]) if "turns" in found else ""
        print("  {name:26s}{ours:11.4g}{alternative:13.4g}  {unit:11s}{ratio:9.4g}".format(**found), f"  {turns}")
    else:
        print(f"  {found['name']}")
    for key in (key for key in found if key not in row("", 1, 1, "", turns=())):
        several = found[key] if isinstance(found[key], dict) else {"": found[key]}
        told = (f"{k} {v:.4g}" if isinstance(v, (int, float)) else str(v) for k, v in several.items())
        print(f"      {key.replace('_', ' ')}: {', '.join(t.strip().replace('_', ' ') for t in told)}")


def circumstances(options):
    """Where and with what all this was measured."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    return {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, av, np)},
        "python_cuda": [platform.python_version(), torch.version.cuda],
        "commit": git.stdout.strip() or None,
        "arguments": sys.argv[1:],
    }


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.__name__ for benchmark in ON_CPU + ON_GPU]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"some of {', '.join(names)}")
    parser.add_argument("--rounds", type=positive, default=5, help="turns that each median is taken over")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--gpu", action="store_true", help="full sizes with random weights on one GPU")
    parser.add_argument("--preset", default="paper", choices=["paper", "small"], help="sizes for --gpu")
    parser.add_argument("--llm_shape", help="another LLM's sizes: a name that train.py knows, a directory or a hub id")
    parser.add_argument("--tiny", action="store_true", help="very small sizes, all on a CPU: does it still run?")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    chosen = [b for b in (ON_GPU if options.gpu else ON_CPU) if b.__name__ in (options.only or names)]
    if not chosen:
        raise VidReasonError(f"that needs {'no ' * options.gpu}--gpu (--only): see --help")
    device = "cuda" if options.gpu and not options.tiny else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise VidReasonError("there is no GPU that torch can use (--gpu): leave that out, or give --tiny")
    options.device, _ = train.start_processes(train.Settings(device=device, threads=torch.get_num_threads()))
    if options.gpu and not dist.is_initialized():  # FSDP2 asks for a group, if only of one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    print(f"{'':28s}{'ours':>11s}{'alternative':>13s}  {'unit':11s}{'ratio':>9s}   turn by turn")
    for benchmark in chosen:
        means = " ".join(benchmark.__doc__.split())
        print(f"{benchmark.__name__}: {means}")
        for found in attempt(benchmark, options):
            show(found)
            rows.append({**found, "means": means})
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    told = circumstances(options)
    print(f"{told['device']}, {told['threads']} of {told['cores']} cores, load {told['load_average']:.1f}")
    if options.out:
        options.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    wrong = [r["name"] for r in rows if "failed" in r or not math.isfinite(r.get("ratio", 1))]
    if wrong:
        sys.exit(f"error: benchmarks that failed: {', '.join(wrong)}")


if __name__ == "__main__":
    guarded(main)
