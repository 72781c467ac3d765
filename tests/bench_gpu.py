"""Benchmarks on a GPU: full sizes, random weights. tests/bench.py runs them."""

import copy
import statistics
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from bench_turns import bare_steps, medians, now, race, row
from torch import nn

import train
import vidreason
from data.program import ROOT
from plan import blocks_of, llm_on_meta, step_costs
from vidreason import PRESETS, Conversation, VidReason, pack


def full_config(options):
    if options.tiny:
        config = replace(PRESETS["toy"], llm="toy/weights/llm", points_per_side=2, keyframe_size=64)
    else:
        config = PRESETS[options.preset]
    return replace(config, llm=options.llm_shape or config.llm)


def random_llm(config, device):
    """The LLM in bf16, its weights made where they will be used: 16 GB that never pass through the CPU."""
    llm = llm_on_meta(config.llm, ROOT).requires_grad_(False).to_empty(device=device)
    llm.tie_weights()
    for parameter in llm.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1)
    decoder = llm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(llm.config).to(device)  # to_empty emptied its frequencies, too
    return llm.eval()


def ceilings(options):
    """-> (FLOP/s of bf16 products, of fp32 products, bytes/s of copies): the best that this device reaches"""
    if not hasattr(options, "ceilings"):
        side = 64 if options.tiny else 8192
        fp32 = torch.randn(side, side, device=options.device)
        bf16, copy_of_it = fp32.bfloat16(), torch.empty_like(fp32)
        work = partial(torch.matmul, bf16, bf16), partial(torch.matmul, fp32, fp32), partial(copy_of_it.copy_, fp32)
        seconds = medians(work, options, 4 * options.rounds)
        amounts = 2 * side**3, 2 * side**3, 2 * fp32.nbytes
        options.ceilings = [amount / time for amount, time in zip(amounts, seconds)]
    return options.ceilings


def matmul(options):
    """The ceiling: products of two large square matrices in bf16 ÷ in fp32. MFU is a share of this bf16 figure."""
    bf16, fp32, memory = ceilings(options)
    yield row("matmul", bf16 / 1e12, fp32 / 1e12, "TFLOP/s", memory_gb_per_s=memory / 1e9)


def parts_of(model, optimizers, step, options):
    """Median milliseconds of the parts of train_step, between marks that hooks set while it runs."""
    cuda = options.device.type == "cuda"
    marks = []

    def mark(*_):
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    def milliseconds(start, end):
        return start.elapsed_time(end) if cuda else 1000 * (end - start)

    hooks = [
        model.register_forward_pre_hook(mark),
        model.fusion.register_forward_hook(mark),
        model.register_forward_hook(mark),
        optimizers[0].register_step_pre_hook(mark),
        optimizers[-1].register_step_post_hook(mark),
    ]
    parts = {"fusion_forward": [], "llm_forward": [], "backward_and_clipping": [], "optimiser": []}
    for _ in range(options.rounds):
        marks.clear()
        step()
        now(options.device)
        for times, start, end in zip(parts.values(), marks[:-1], marks[1:], strict=True):
            times.append(milliseconds(start, end))
    for hook in hooks:
        hook.remove()
    return {part: statistics.median(times) for part, times in parts.items()}


def full_model(stage, config, settings, device):
    """-> a model of full size with random weights, by way of train.py's own functions and of FSDP2 on one process; a
    second LLM that shares these weights, without adapters"""
    llm = random_llm(config, device)
    twin = copy.deepcopy(llm, {id(p): p for p in llm.parameters()})
    model = VidReason(config, nn.Identity(), nn.Identity(), llm, None)
    if stage == 2:
        model.add_lora()
    train.parallelise(model.freeze(stage).to(device), settings, device)
    for block in blocks_of(model.llm):
        block.compile(dynamic=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    return model, twin


def random_batch(config, vocabulary, count, length, device):
    """-> (Packed, Z_vision with times and mask): `count` rows with `length` target tokens each"""
    words = torch.randint(vocabulary, (count, length)).tolist()
    packed = pack([Conversation([([], ids)]) for ids in words], config.num_queries).to(device)
    vision_tokens = config.num_clips * (1 + config.masks_per_keyframe)
    times = torch.arange(vision_tokens, device=device).expand(count, -1) / 10
    z_vision = torch.randn(*times.shape, config.encoder_width, device=device)
    return packed, (z_vision, times, times >= 0)


def full_steps(stage, micro, text, options):
    """The rows of one stage at full size, `micro` videos with `text` words each."""
    config, device, name = full_config(options), options.device, f"stage{stage}"
    with torch.device("meta"):
        shape = VidReason(config, nn.Identity(), nn.Identity(), llm_on_meta(config.llm, ROOT), None)
        costs = step_costs(shape, stage, micro, text)
    settings = train.Settings(stage=stage, precision="bf16", **train.DEFAULTS["paper", stage])
    model, twin = full_model(stage, config, settings, device)
    optimizers = train.build_optimizers(model, settings)
    step = partial(train.train_step, model, optimizers, settings=settings, device=device)
    packed, vision_inputs = random_batch(config, twin.config.vocab_size, micro, text, device)
    micro_batches = [(packed, vision_inputs)]
    compiled = partial(step, micro_batches)

    def eager_step(micro_batches):
        with torch.compiler.set_stance("force_eager"):
            return step(micro_batches)

    eager = partial(eager_step, micro_batches)

    def details(run, seconds):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        peak, _, _ = ceilings(options)
        mfu = {}
        for kind, llm in (("convention", "llm"), ("executed", "llm_executed")):
            flops = costs["fusion"] + costs[llm]
            mfu[kind] = flops * micro / seconds / peak
        tokens_per_s = packed.position_ids.numel() / seconds
        milliseconds = parts_of(model, optimizers, run, options)
        return {"tokens_per_s": tokens_per_s, "mfu": mfu, "ms": milliseconds, "peak_gib": train.memory_gib(device)}

    (seconds,) = medians([eager], options)
    best = ceilings(options)[0] / (costs["fusion"] + costs["llm"])
    yield row(f"{name}_mfu", micro / seconds, best, "samples/s", **details(eager, seconds))
    raced = race(f"{name}_compiled", compiled, eager, micro, "samples/s", options)
    yield {**raced, **details(compiled, micro / raced["ours"])}
    if stage == 2:
        lora, n = model.llm.peft_config["default"], config.num_queries
        yield from bare_steps("stage2_bare_llm", twin, lora, packed, n, eager, eager_step, settings, options)


def stage1(options):
    """Stage-1 steps ÷ what the ceiling allows (MFU, of 4 FLOP per frozen and 6 per trained parameter and token, and
    attention; executed: without the lm_head where nothing is predicted), then with compiled ÷ with eager blocks."""
    micro, text = (2, 4) if options.tiny else (64, 32)
    for measured in full_steps(1, micro, text, options):
        yield measured
        if measured["name"] == "stage1_mfu":
            options.cached = measured["ours"]


def stage2(options):
    """Stage-2 steps ÷ what the ceiling allows, compiled ÷ eager, on as much text alone and then with the fusion core ÷
    those of a bare LLM with peft's LoRA."""
    micro, text = (2, 6) if options.tiny else (8, 300)
    yield from full_steps(2, micro, text, options)


def vision(options):
    """The encoder in TF32, as data/features.py has it ÷ in bf16; stage-1 samples with cached ÷ with inline vision,
    decoding not counted. A SAM with random weights keeps next to no masks: its time, hence this ratio, is a lower
    bound."""
    config, device = full_config(options), options.device
    encoder = race_encoder(config, options)
    yield encoder
    seconds = {"encoder": 1 / encoder["ours"]}
    rng = np.random.default_rng(0)
    keyframe = rng.integers(0, 256, (config.keyframe_size, config.keyframe_size, 3), np.uint8)
    sams = ["toy"] if config.sam == "toy" else ["vit_h", "vit_b"]
    for name in sams:
        sam = vidreason.build_sam(replace(config, sam=name)).requires_grad_(False).eval().to(device)
        (per_keyframe,) = medians([partial(vidreason.segment, keyframe, sam, config)], options)
        seconds[name] = config.num_clips * per_keyframe
        vidreason.mask_generator.cache_clear()  # or it would keep this SAM on the GPU

    milliseconds = {name: 1e3 * value for name, value in seconds.items()}
    if hasattr(options, "cached"):
        inline = 1 / (1 / options.cached + seconds["encoder"] + seconds[config.sam])
        yield row("inline_vision", options.cached, inline, "samples/s", ms_per_video=milliseconds)
    else:
        yield {"name": "inline_vision", "skipped": "it needs stage1", "ms_per_video": milliseconds}


def race_encoder(config, options):
    """The row that compares the encoder in TF32 with bf16."""
    torch.set_float32_matmul_precision("high")  # as in the workers of data/features.py
    encoder = vidreason.VideoTransformer(config).requires_grad_(False).eval().to(options.device)
    shape = (config.num_clips, config.frames_per_clip, 3, config.image_size, config.image_size)
    clips = torch.rand(shape, device=options.device)
    in_bf16 = torch.autocast(options.device.type, torch.bfloat16)(encoder)
    raced = race("encoder_tf32", partial(encoder, clips), partial(in_bf16, clips), 1, "videos/s", options)
    return {**raced, "ms_per_video": {"tf32": 1e3 / raced["ours"], "bf16": 1e3 / raced["alternative"]}}


def decode(options):
    """Greedy decoding of one answer with a static cache and (on a GPU) torch.compile ÷ with the default cache. Share of
    the bandwidth: bytes of weights × tokens/s ÷ bytes/s of copies."""
    llm = random_llm(full_config(options), options.device)
    tokens = 4 if options.tiny else 128
    words = llm.get_input_embeddings().weight
    prompt = {
        "inputs_embeds": words[None, :64],
        "attention_mask": torch.ones(1, 64, dtype=torch.long, device=words.device),
    }
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    default = partial(llm.generate, **prompt, **length, do_sample=False, pad_token_id=0)
    static = partial(default, cache_implementation="static")
    assert static().shape == default().shape == (1, tokens)
    raced = race("decode", static, default, tokens, "tokens/s", options)

    weights = sum(parameter.nbytes for parameter in llm.parameters())
    if not llm.config.tie_word_embeddings:
        weights -= words.nbytes  # of the table of words only one row is read
    _, _, bandwidth = ceilings(options)
    shares = {side: raced[side] * weights / bandwidth for side in ("ours", "alternative")}
    yield {**raced, "share_of_bandwidth": shares}
