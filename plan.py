"""What a run will cost, before renting anything: memory, FLOPs, hours, bytes (python train.py --plan)."""

import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from vidreason import Conversation, VideoTransformer, VidReason, VidReasonError, build_sam, pack

LLM_SHAPES = {  # of LLMs that need a licence or a download before their config.json can be read
    "meta-llama/Meta-Llama-3-8B-Instruct": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
}  # fmt: skip


def llm_on_meta(name, directory):
    """The LLM in bf16 without its weights. name: a key of LLM_SHAPES, a path relative to directory, or a hub id."""
    where = Path(directory, name)
    try:
        config = LLM_SHAPES.get(name) or AutoConfig.from_pretrained(where if where.exists() else name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        advice = f"give a directory with its config.json, or one of {', '.join(LLM_SHAPES)}"
        raise VidReasonError(f"no shape of this LLM: {str(error)[:120]} ({name}): {advice}") from error


class FusedAttention(TorchFunctionMode):
    """Meta tensors get an explicit attention, which keeps its L × L weights; this is the kernel that GPUs get."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        (q, k, v), mask = args, kwargs.get("attn_mask")
        bias = None if mask is None else q.new_empty(mask.shape).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def trace(function, weights=()):
    """Run function on meta tensors → (its FLOPs, bytes that autograd keeps for the backward pass beside the weights)"""
    saved, weights = {}, {p.untyped_storage()._cdata for p in weights}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    useful = {backward: lambda _, q, k, v, *args, **kwargs: 2 * sdpa_flop_count(q, k, v)}  # it also recomputes
    with FusedAttention(), FlopCounterMode(display=False, custom_mapping=useful) as counter, hooks:
        function()
    return counter.get_total_flops(), sum(size for storage, size in saved.items() if storage not in weights)


def count(module, lora=False):
    return sum(p.numel() for name, p in module.named_parameters() if (".lora_" in name) == lora)


def vision_costs(model):
    """→ (FLOPs, bytes) of one video, by part."""
    c, sam, points = model.config, model.sam, model.config.points_per_side**2
    asks, side = sam.prompt_encoder, sam.image_encoder.img_size
    width, grid = asks.embed_dim, asks.image_embedding_size
    with torch.no_grad(), torch.device("meta"):
        clip, picture = torch.empty(1, c.frames_per_clip, 3, *2 * [c.image_size]), torch.empty(1, 3, side, side)
        picture_embedding, where = torch.empty(1, width, *grid), asks.get_dense_pe()
        prompts = torch.empty(points, 2, width), torch.empty(1, width, *grid)  # a point and its padding; no mask
        per_clip, image = trace(lambda: model.encoder(clip))[0], trace(lambda: sam.image_encoder(picture))[0]
        masks = trace(lambda: sam.mask_decoder(picture_embedding, where, *prompts, multimask_output=True))[0]
    flops = {"encoder_per_clip": per_clip, "encoder": c.num_clips * per_clip, "SAM_image_encoder_per_keyframe": image}
    flops |= {"SAM_mask_decoder_per_keyframe": masks, "SAM": c.num_clips * (image + masks)}
    return flops, {
        "decoded_frames": c.num_clips * c.frames_per_clip * 3 * c.image_size**2,  # uint8
        "decoded_keyframes": c.num_clips * 3 * c.keyframe_size**2,  # uint8, at most
        "SAM_mask_logits_of_64_points": 3 * min(64, points) * 4 * c.keyframe_size**2,  # fp32, three masks per point
        "Z_vision_fp16": c.num_clips * (1 + c.masks_per_keyframe) * 2 * c.encoder_width,
        "Z_vision_times_and_flags": c.num_clips * (1 + c.masks_per_keyframe) * 5,  # fp32, bool
    }


def step_costs(model, stage, micro, text_tokens):
    """One sample's forward and backward pass in bf16, micro samples at once; every text token counts as a target.
    FLOPs are what MFU is defined by: 4 P_frozen + 6 P_trained per token and attention, lm_head at every position; in
    "executed" it is where target_logprobs needs it. "saved": bytes that autograd keeps, logits not among them."""
    with torch.device("meta"):
        if stage == 2:
            model.add_lora()
        model.fusion.bfloat16(), model.llm.bfloat16()  # what FSDP2 gathers; memory() counts the fp32 masters
        trained = sum(p.numel() for p in model.freeze(stage).parameters() if p.requires_grad)
        c, (vocabulary, width) = model.config, model.llm.get_output_embeddings().weight.shape
        z = torch.empty(micro, c.num_clips * (1 + c.masks_per_keyframe), c.encoder_width, dtype=torch.bfloat16)
        vision = z, torch.empty(z.shape[:2]), torch.empty(z.shape[:2], dtype=torch.bool)
        packed = pack([Conversation([([], [0] * text_tokens)])] * micro, c.num_queries)
        forward, fusion_saved = trace(lambda: model.fusion(*vision), model.parameters())
        fusion, _ = trace(lambda: model.fusion(*vision).sum().backward())
        whole, saved = trace(lambda: model(packed, *vision)[0].backward(), model.parameters())
    elsewhere = 4 * micro * c.num_queries * vocabulary * width  # lm_head where nothing is predicted
    costs = {"fusion_forward": forward, "fusion": fusion, "llm": whole - fusion + elsewhere}
    costs |= {"llm_executed": whole - fusion, "fusion_saved": fusion_saved}
    costs["llm_saved"] = saved - fusion_saved - 4 * micro * text_tokens * vocabulary
    return {"trained": trained, "text_tokens": text_tokens, **{name: value / micro for name, value in costs.items()}}


def memory(model, costs, micro, world_size, gpu_memory):
    """→ (bytes on one GPU by part, the largest micro-batches that leave a tenth of it free)
    LLM: bf16; sharded inside a machine of at most 8 GPUs, two blocks and what no block holds are whole at a time.
    Trained: fp32 parameter, gradient and two moments over all GPUs; bf16 copy and unreduced fp32 gradient on each."""
    llm, blocks, trained = count(model.llm), model.llm.get_decoder().layers, costs["trained"]
    whole = llm - count(blocks) * (1 - 2 / len(blocks)) if world_size > 1 else 0
    llms = {"LLM_replicated": 2 * llm, "LLM_sharded": 2 * (llm / min(8, world_size) + whole)}
    held = {"trained_states": 16 * trained / world_size, "trained_copies": 6 * trained}
    per_sample = {"activations": costs["fusion_saved"] + costs["llm_saved"]}
    per_sample["logits"] = costs["text_tokens"] * model.llm.config.vocab_size * 10  # bf16, fp32, its gradient
    fixed = {way: size + sum(held.values()) for way, size in llms.items()}
    moving = sum(per_sample.values())
    parts = {**llms, **held, **{name: micro * size for name, size in per_sample.items()}}
    parts |= {f"total_{way}": size + micro * moving for way, size in fixed.items()}
    return parts, {way: max(0, int((0.9 * gpu_memory - size) / moving)) for way, size in fixed.items()}


def plan(
    config, directory=".", world_size=1, micro_batch=(64, 8), pairs=(110e6, 260e3), videos=(110e6, 111e3),
    epochs=(4, 3), batch=(2048, 256), text_tokens=(32, 300), mfu=0.33, sam_mfu=0.06, peak=989.5e12, gpu_memory=80e9,
):  # fmt: skip
    """What training config on world_size GPUs takes → nested dict: parameters, FLOPs, bytes, hours. Pairs of values are
    for stages 1 and 2. Defaults: the paper's sizes (§4.2; its stage-2 sets add up to 210 to 310 thousand pairs, on 111
    thousand videos) and an H100 SXM: peak FLOP/s in bf16 without sparsity; mfu of Llama-3-8B in torchtitan's eager
    FSDP2 (0.39 compiled). sam_mfu: ViT-H, 32² points, 9.7 TFLOP, 0.5 s on an A100 (segment-anything-fast #69)."""
    with torch.device("meta"):
        model = VidReason(config, VideoTransformer(config), build_sam(config), llm_on_meta(config.llm, directory), None)
    flops, sizes = vision_costs(model)
    encoder, sam = flops["encoder"] / (mfu * peak), flops["SAM"] / (sam_mfu * peak)  # seconds per video
    given = {"world_size": world_size, "mfu": mfu, "sam_mfu": sam_mfu, "peak": peak, "gpu_memory": gpu_memory}
    numbers = {"config": asdict(config), "given": given, "flops": flops, "bytes": sizes}
    stages = zip(micro_batch, pairs, videos, epochs, batch, text_tokens, strict=True)
    for stage, (micro, n_pairs, n_videos, n_epochs, n_batch, text) in enumerate(stages, 1):
        share, samples = math.ceil(n_batch / world_size), n_pairs * n_epochs
        micro = min(micro, share)
        costs = step_costs(model, stage, micro, text)
        seconds = (costs["fusion"] + costs["llm"]) / (mfu * peak)  # per sample
        by_part, largest = memory(model, costs, micro, world_size, gpu_memory)
        numbers[f"stage{stage}"] = costs | {
            "pairs": n_pairs, "epochs": n_epochs, "videos": n_videos, "batch": n_batch, "micro_batch": micro,
            "accumulation": math.ceil(share / micro), "steps": math.ceil(samples / n_batch),
            "memory": by_part, "largest_micro_batch": largest,
            "cache": n_videos * (sizes["Z_vision_fp16"] + sizes["Z_vision_times_and_flags"]),
            "hours": samples * seconds / world_size / 3600,
            "hours_without_cache": samples * (seconds + encoder + sam) / world_size / 3600,
            "encoder_gpu_days": n_videos * encoder / 86400, "SAM_gpu_days": n_videos * sam / 86400,
            "SAM_gpu_days_at_mfu": n_videos * sam / 86400 * sam_mfu / mfu,
        }  # fmt: skip
    parts = {part: count(getattr(model, part)) for part in ("encoder", "sam", "fusion", "llm")}
    return numbers | {"parameters": {**parts, "lora": count(model.llm, lora=True)}}


def si(number, unit=""):
    """1.44e12, "B" → "1.44 TB"."""
    number = float(f"{number:.3g}")  # 999.9 is 1.00 k
    power = min(5, int(math.log10(max(number, 1)) / 3 + 1e-9))
    return f"{number / 1000**power:#.3g}".rstrip(".") + f" {' kMGTP'[power].strip()}{unit}".rstrip()


def table(title, heads, rows):
    """rows: (name, what stands under each head, a remark); the last ones may be missing."""
    print(f"\n{title:42s}" + "".join(f"{head:>13s}" for head in heads))
    for name, *cells in rows:
        columns = "".join(f"{cell:>13s}" for cell in cells[: len(heads)])
        print(f"  {name.replace('_', ' '):40s}{columns}  {''.join(cells[len(heads) :])}".rstrip())


def print_plan(numbers):
    """A plan as text, for somebody about to rent GPUs."""
    c, given, stages = numbers["config"], numbers["given"], [numbers["stage1"], numbers["stage2"]]
    clips = f"{c['num_clips']} clips of {c['frames_per_clip']} frames"
    print(f"{c['llm']}, SAM {c['sam']}, {clips}, {given['world_size']} GPU(s)")
    rows = [(part, si(size)) for part, size in numbers["parameters"].items()]
    table("Parameters", ["all"], rows + [(f"trained in stage {i}", si(s["trained"])) for i, s in enumerate(stages, 1)])
    rows = [(part, si(size)) for part, size in numbers["flops"].items()]
    rows += [(part, "", si(size, "B")) for part, size in numbers["bytes"].items()]
    rows += [("fusion core, forward", si(stages[0]["fusion_forward"]))]
    rows += [("fusion core, forward + backward", si(stages[0]["fusion"]), si(stages[0]["fusion_saved"], "B"), "saved")]
    for i, s in enumerate(stages, 1):
        name = f"LLM, stage {i}, {c['num_queries']} + {s['text_tokens']} tokens"
        remark = f"saved; {si(s['llm_executed'])} with lm_head at targets only"
        rows += [(name, si(s["llm"]), si(s["llm_saved"], "B"), remark)]
    table("One sample (multiply-add = 2 FLOP)", ["FLOP", "bytes"], rows)
    print(
        f"  {c['points_per_side']}² points and at most K = {c['masks_per_keyframe']} masks per keyframe of "
        f"{c['keyframe_size']}². Tokens: vision + text. LLM: 4 FLOP per\n  frozen parameter and token, 6 per trained "
        "one, and attention. Saved: activations for the backward pass."
    )
    print_memory(given, stages)
    print_time(given, stages)


def print_memory(given, stages):
    rows = [("micro-batch × accumulation", *(f"{s['micro_batch']} × {s['accumulation']}" for s in stages))]
    rows += [(part, *(si(s["memory"][part], "B") for s in stages)) for part in stages[0]["memory"]]
    for way in stages[0]["largest_micro_batch"]:
        rows += [(f"largest micro-batch, {way}", *(f"{s['largest_micro_batch'][way]:,}" for s in stages))]
    table("Memory per GPU", ["stage 1", "stage 2"], rows)
    print(
        "  LLM in bf16; sharded: inside each machine, gathered twice per micro-batch. Trained states: fp32, gradient\n"
        "  and two moments, over all GPUs; copies: bf16, unreduced gradients. Activations: no checkpointing.\n"
        f"  Largest: with {si(0.9 * given['gpu_memory'], 'B')}; 0: does not fit."
    )


def print_time(given, stages):
    lines = {
        "pairs × epochs": lambda s: f"{si(s['pairs'])} × {s['epochs']:.3g}",
        "global batch": lambda s: f"{s['batch']:,}",
        "optimiser steps": lambda s: f"{s['steps']:,}",
        "videos": lambda s: si(s["videos"]),
        "once: feature cache": lambda s: si(s["cache"], "B"),
        "once: encoder, GPU-days": lambda s: f"{s['encoder_gpu_days']:,.2f}",
        "once: SAM, GPU-days": lambda s: f"{s['SAM_gpu_days']:,.2f}",
        f"  (did SAM reach {given['mfu']:.0%} of the peak)": lambda s: f"{s['SAM_gpu_days_at_mfu']:,.2f}",
        "training with that cache, hours": lambda s: f"{s['hours']:,.2f}",
        "or with vision in every epoch, hours": lambda s: f"{s['hours_without_cache']:,.2f}",
    }
    table("Time and disk", ["stage 1", "stage 2"], [(name, *map(show, stages)) for name, show in lines.items()])
    hours = {f"training in stage {i}": s["hours"] * given["world_size"] for i, s in enumerate(stages, 1)}
    hours |= {f"extraction by {part}": 24 * sum(s[f"{part}_gpu_days"] for s in stages) for part in ("encoder", "SAM")}
    most, total = max(hours, key=hours.get), sum(hours.values())
    print(
        f"\nWhat dominates: {most}, {hours[most] / total:.0%} of both stages' {total:,.2f} GPU-hours with a cache.\n"
        f"Assumed: {given['world_size']} GPU(s) of {given['peak'] / 1e12:g} TFLOP/s (H100 SXM, bf16: 989.5), of which "
        f"training and encoder reach {given['mfu']:.0%}\nand SAM {given['sam_mfu']:.0%} (0.5 s for 32² points "
        "on an A100, in bf16, is 6%). Not counted: decoding\nvideos (0.4 to 2.6 core-seconds each), loading, network, "
        "checkpoints, idle GPUs."
    )


def matmul_ceiling(device):
    """FLOP/s of a large bf16 matrix product here: what MFU is a share of."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for repeat in range(13):
        if repeat == 3:
            start.record()
        a @ a
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1000)


def flops_per_token(model):
    """4 per frozen and 6 per trained parameter that a token meets in the LLM: no gradient of a frozen weight exists."""
    table = model.llm.get_input_embeddings().weight  # a look-up, unless it is the output layer, too
    tied = model.llm.get_output_embeddings().weight is table
    sizes = {True: 0, False: 0}
    for p in model.llm.parameters():
        sizes[p.requires_grad] += 0 if p is table and not tied else p.numel()
    return 6 * sizes[True] + 4 * sizes[False]
