"""What a run will cost, before renting anything: memory, FLOPs, hours, bytes (python train.py --plan).

Nothing is computed: the model's parts run on the meta device, where tensors have shapes and no contents, and what they
would multiply and keep is counted.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from vidreason import Config, Conversation, VideoTransformer, VidReason, VidReasonError, build_sam, pack

LLM_SHAPES = {  # of LLMs that need a licence or a download before their config.json can be read
    "meta-llama/Meta-Llama-3-8B-Instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}


def llm_on_meta(name: str, directory: Path | str) -> nn.Module:
    """The LLM in bf16 without its weights. name: a key of LLM_SHAPES, a path relative to directory, or a hub id."""
    path = Path(directory, name)
    try:
        config = LLM_SHAPES.get(name) or AutoConfig.from_pretrained(path if path.exists() else name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        advice = f"give a directory with its config.json, or one of {', '.join(LLM_SHAPES)}"
        raise VidReasonError(f"no shape of this LLM: {str(error)[:120]} ({name}): {advice}") from error


# --------------------------------------------------------------------------- counting


class FusedAttention(TorchFunctionMode):
    """Meta tensors get an explicit attention, which keeps its L × L weights; this is the kernel that GPUs get."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        bias = None
        mask = kwargs.get("attn_mask")
        if mask is not None:
            bias = q.new_empty(mask.shape).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def useful_flops_of_backward(_, q, k, v, *args, **kwargs) -> int:
    """Twice the forward pass; that the kernel also computes the forward pass again is no progress."""
    return 2 * sdpa_flop_count(q, k, v)


def trace(function: Callable[[], object], weights: Iterable[torch.Tensor] = ()) -> tuple[int, int]:
    """Run function on meta tensors -> (its FLOPs, bytes that autograd keeps for the backward pass, weights apart)"""
    weights = {p.untyped_storage()._cdata for p in weights}
    saved = {}  # storage -> bytes; tensors that share one count once

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    counter = FlopCounterMode(display=False, custom_mapping={backward: useful_flops_of_backward})
    with FusedAttention(), counter, hooks:
        function()
    activations = sum(size for storage, size in saved.items() if storage not in weights)
    return counter.get_total_flops(), activations


def count(module: nn.Module, lora: bool = False) -> int:
    """Parameters: those of LoRA adapters, or all others."""
    return sum(p.numel() for name, p in module.named_parameters() if (".lora_" in name) == lora)


# --------------------------------------------------------------------------- what one video, or one sample, costs


def vision_flops(model: VidReason) -> dict[str, int]:
    """FLOPs of one video by part."""
    config, sam = model.config, model.sam
    points = config.points_per_side**2
    side = sam.image_encoder.img_size
    width = sam.prompt_encoder.embed_dim
    grid = sam.prompt_encoder.image_embedding_size
    with torch.no_grad(), torch.device("meta"):
        clip = torch.empty(1, config.frames_per_clip, 3, config.image_size, config.image_size)
        picture = torch.empty(1, 3, side, side)
        image_embedding = torch.empty(1, width, *grid)
        positions = sam.prompt_encoder.get_dense_pe()
        prompts = torch.empty(points, 2, width)  # a point and its padding
        no_mask = torch.empty(1, width, *grid)
        inputs = (image_embedding, positions, prompts, no_mask)

        encoder, _ = trace(lambda: model.encoder(clip))
        image_encoder, _ = trace(lambda: sam.image_encoder(picture))
        mask_decoder, _ = trace(lambda: sam.mask_decoder(*inputs, multimask_output=True))
    return {
        "encoder_per_clip": encoder,
        "encoder": config.num_clips * encoder,
        "SAM_image_encoder_per_keyframe": image_encoder,
        "SAM_mask_decoder_per_keyframe": mask_decoder,
        "SAM": config.num_clips * (image_encoder + mask_decoder),
    }


def vision_bytes(config: Config) -> dict[str, int]:
    """Bytes of one video by what they are."""
    frames = config.num_clips * config.frames_per_clip
    keyframes = config.num_clips
    points = min(64, config.points_per_side**2)  # SAM is asked about so many at a time
    tokens = most_vision_tokens(config)
    return {
        "decoded_frames": frames * 3 * config.image_size**2,  # uint8
        "decoded_keyframes": keyframes * 3 * config.keyframe_size**2,  # uint8, at most
        "SAM_mask_logits_of_64_points": points * 3 * config.keyframe_size**2 * 4,  # fp32, three masks per point
        "Z_vision_fp16": tokens * config.encoder_width * 2,
        "Z_vision_times_and_flags": tokens * (4 + 1),  # fp32, bool
    }


def most_vision_tokens(config: Config) -> int:
    """N_v, if every keyframe has all the masks it may have."""
    return config.num_clips * (1 + config.masks_per_keyframe)


def step_costs(model: VidReason, stage: int, micro: int, text_tokens: int) -> dict[str, float]:
    """One sample's forward and backward pass in bf16, micro samples at once; every text token counts as a target.

    FLOPs are what MFU is defined by: 4 P_frozen + 6 P_trained per token and attention, lm_head at every position; in
    "executed" it is where target_logprobs needs it. "saved": bytes that autograd keeps, logits not among them.
    """
    config = model.config
    vocabulary, width = model.llm.get_output_embeddings().weight.shape
    with torch.device("meta"):
        if stage == 2:
            model.add_lora()
        model.fusion.bfloat16()  # what FSDP2 gathers; memory() counts the fp32 masters
        model.llm.bfloat16()
        model.freeze(stage)
        tokens = most_vision_tokens(config)
        z_vision = torch.empty(micro, tokens, config.encoder_width, dtype=torch.bfloat16)
        times = torch.empty(micro, tokens)
        key_mask = torch.empty(micro, tokens, dtype=torch.bool)
        vision = (z_vision, times, key_mask)
        conversation = Conversation([([], [0] * text_tokens)])
        packed = pack([conversation] * micro, config.num_queries)

        fusion_forward, fusion_saved = trace(lambda: model.fusion(*vision), model.parameters())
        fusion, _ = trace(lambda: model.fusion(*vision).sum().backward())
        whole, saved = trace(lambda: model(packed, *vision)[0].backward(), model.parameters())

    lm_head_elsewhere = 4 * micro * config.num_queries * vocabulary * width  # FLOPs, where nothing is predicted
    logits = 4 * micro * text_tokens * vocabulary  # bytes in fp32
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "text_tokens": text_tokens,
        # FLOPs of one sample
        "fusion_forward": fusion_forward / micro,
        "fusion": fusion / micro,
        "llm": (whole - fusion + lm_head_elsewhere) / micro,
        "llm_executed": (whole - fusion) / micro,
        # bytes of one sample
        "fusion_saved": fusion_saved / micro,
        "llm_saved": (saved - fusion_saved - logits) / micro,
    }


def memory(model: VidReason, costs: dict, micro: int, world_size: int, gpu_memory: float) -> tuple[dict, dict]:
    """-> (bytes on one GPU by part, the largest micro-batches that leave a tenth of it free)

    LLM: bf16; sharded inside a machine of at most 8 GPUs, two blocks and what no block holds are whole at a time.
    Trained: fp32 parameter, gradient and two moments over all GPUs; bf16 copy and unreduced fp32 gradient on each.
    """
    llm = count(model.llm)
    blocks = blocks_of(model.llm)
    whole = 0  # parameters
    if world_size > 1:
        whole = llm - count(blocks) * (1 - 2 / len(blocks))
    of_llm = {
        "LLM_replicated": 2 * llm,
        "LLM_sharded": 2 * (llm / min(8, world_size) + whole),
    }
    states = 16 * costs["trained"] / world_size
    copies = 6 * costs["trained"]
    activations = costs["fusion_saved"] + costs["llm_saved"]  # of one sample
    logits = costs["text_tokens"] * model.llm.config.vocab_size * 10  # of one sample: bf16, fp32, its gradient

    parts = {
        **of_llm,
        "trained_states": states,
        "trained_copies": copies,
        "activations": micro * activations,
        "logits": micro * logits,
    }
    largest = {}
    for way, size in of_llm.items():
        fixed = size + (states + copies)
        parts[f"total_{way}"] = fixed + micro * (activations + logits)
        largest[way] = max(0, int((0.9 * gpu_memory - fixed) / (activations + logits)))
    return parts, largest


# --------------------------------------------------------------------------- the plan


class StageRun(NamedTuple):
    """What a stage is to go through."""

    micro_batch: int
    pairs: float
    videos: float
    epochs: float
    batch: int
    text_tokens: int


def plan(
    config: Config,
    directory: Path | str = ".",
    world_size: int = 1,
    micro_batch=(64, 8),
    pairs=(110e6, 260e3),
    videos=(110e6, 111e3),
    epochs=(4, 3),
    batch=(2048, 256),
    text_tokens=(32, 300),
    mfu: float = 0.33,
    sam_mfu: float = 0.06,
    peak: float = 989.5e12,
    gpu_memory: float = 80e9,
) -> dict:
    """What training config on world_size GPUs takes -> nested dict: parameters, FLOPs, bytes, hours.

    Pairs of values are for stages 1 and 2. Defaults: the paper's sizes (§4.2; its stage-2 sets add up to 210 to 310
    thousand pairs, on 111 thousand videos) and an H100 SXM: peak FLOP/s in bf16 without sparsity; mfu of Llama-3-8B in
    torchtitan's eager FSDP2 (0.39 compiled). sam_mfu: ViT-H, 32² points, 9.7 TFLOP, 0.5 s on an A100
    (segment-anything-fast #69).
    """
    with torch.device("meta"):
        llm = llm_on_meta(config.llm, directory)
        model = VidReason(config, VideoTransformer(config), build_sam(config), llm, None)
    given = {"world_size": world_size, "mfu": mfu, "sam_mfu": sam_mfu, "peak": peak, "gpu_memory": gpu_memory}
    numbers = {
        "config": asdict(config),
        "given": given,
        "flops": vision_flops(model),
        "bytes": vision_bytes(config),
    }
    runs = zip(micro_batch, pairs, videos, epochs, batch, text_tokens, strict=True)
    for stage, run in enumerate(runs, 1):
        numbers[f"stage{stage}"] = stage_plan(model, stage, StageRun(*run), numbers)
    numbers["parameters"] = {
        "encoder": count(model.encoder),
        "sam": count(model.sam),
        "fusion": count(model.fusion),
        "llm": count(model.llm),
        "lora": count(model.llm, lora=True),
    }
    return numbers


def stage_plan(model: VidReason, stage: int, run: StageRun, numbers: dict) -> dict:
    """One stage of a plan. numbers: what plan() knows of the model and was given."""
    given, flops, sizes = numbers["given"], numbers["flops"], numbers["bytes"]
    world_size = given["world_size"]
    share = math.ceil(run.batch / world_size)
    micro = min(run.micro_batch, share)
    samples = run.pairs * run.epochs
    costs = step_costs(model, stage, micro, run.text_tokens)
    parts, largest = memory(model, costs, micro, world_size, given["gpu_memory"])

    reached = given["mfu"] * given["peak"]  # FLOP/s
    step = (costs["fusion"] + costs["llm"]) / reached  # seconds per sample
    encoder = flops["encoder"] / reached  # seconds per video
    sam = flops["SAM"] / (given["sam_mfu"] * given["peak"])  # seconds per video
    sam_days = run.videos * sam / 86400
    return costs | {
        "pairs": run.pairs,
        "epochs": run.epochs,
        "videos": run.videos,
        "batch": run.batch,
        "micro_batch": micro,
        "accumulation": math.ceil(share / micro),
        "steps": math.ceil(samples / run.batch),
        "memory": parts,  # bytes
        "largest_micro_batch": largest,
        "cache": run.videos * (sizes["Z_vision_fp16"] + sizes["Z_vision_times_and_flags"]),  # bytes
        "hours": samples * step / world_size / 3600,
        "hours_without_cache": samples * (step + encoder + sam) / world_size / 3600,
        "encoder_gpu_days": run.videos * encoder / 86400,
        "SAM_gpu_days": sam_days,
        "SAM_gpu_days_at_mfu": sam_days * given["sam_mfu"] / given["mfu"],
    }


# --------------------------------------------------------------------------- the plan as text


def si(number: float, unit: str = "") -> str:
    """1.44e12, "B" -> "1.44 TB"."""
    number = float(f"{number:.3g}")  # 999.9 is 1.00 k
    power = min(5, int(math.log10(max(number, 1)) / 3 + 1e-9))
    digits = f"{number / 1000**power:#.3g}".rstrip(".")
    prefix = " kMGTP"[power].strip()
    return f"{digits} {prefix}{unit}".rstrip()


class Table(NamedTuple):
    """A part of the plan to be read by people."""

    title: str
    heads: list[str]
    rows: list[tuple[str, ...]]  # a name, what stands under each head, perhaps a remark
    note: str = ""  # some lines below it


def side_by_side(columns: list[dict[str, str]]) -> list[tuple]:
    """Rows of a table, from a column of named cells for each head."""
    rows = []
    for name in columns[0]:
        cells = [column[name] for column in columns]
        rows.append((name, *cells))
    return rows


def headline_of(numbers: dict) -> str:
    """What is planned."""
    config, given = numbers["config"], numbers["given"]
    clips = f"{config['num_clips']} clips of {config['frames_per_clip']} frames"
    return f"{config['llm']}, SAM {config['sam']}, {clips}, {given['world_size']} GPU(s)"


def tables_of(numbers: dict) -> list[Table]:
    """A plan as tables, for somebody about to rent GPUs."""
    stages = [numbers["stage1"], numbers["stage2"]]
    return [
        parameters_table(numbers["parameters"], stages),
        sample_table(numbers, stages),
        memory_table(numbers["given"], stages),
        time_table(numbers["given"], stages),
    ]


def parameters_table(parameters: dict[str, int], stages: list[dict]) -> Table:
    rows = [(part, si(size)) for part, size in parameters.items()]
    for i, stage in enumerate(stages, 1):
        rows.append((f"trained in stage {i}", si(stage["trained"])))
    return Table("Parameters", ["all"], rows)


def sample_table(numbers: dict, stages: list[dict]) -> Table:
    config = numbers["config"]
    rows = [(part, si(flops)) for part, flops in numbers["flops"].items()]
    for part, size in numbers["bytes"].items():
        rows.append((part, "", si(size, "B")))
    forward, both, saved = (stages[0][name] for name in ("fusion_forward", "fusion", "fusion_saved"))
    rows.append(("fusion core, forward", si(forward)))
    rows.append(("fusion core, forward + backward", si(both), si(saved, "B"), "saved"))
    for i, stage in enumerate(stages, 1):
        name = f"LLM, stage {i}, {config['num_queries']} + {stage['text_tokens']} tokens"
        remark = f"saved; {si(stage['llm_executed'])} with lm_head at targets only"
        rows.append((name, si(stage["llm"]), si(stage["llm_saved"], "B"), remark))
    note = (
        f"  {config['points_per_side']}² points and at most K = {config['masks_per_keyframe']} masks per keyframe of "
        f"{config['keyframe_size']}². Tokens: vision + text. LLM: 4 FLOP per\n  frozen parameter and token, 6 per "
        "trained one, and attention. Saved: activations for the backward pass."
    )
    return Table("One sample (multiply-add = 2 FLOP)", ["FLOP", "bytes"], rows, note)


def memory_table(given: dict, stages: list[dict]) -> Table:
    columns = []
    for stage in stages:
        column = {"micro-batch × accumulation": f"{stage['micro_batch']} × {stage['accumulation']}"}
        for part, size in stage["memory"].items():
            column[part] = si(size, "B")
        for way, micro in stage["largest_micro_batch"].items():
            column[f"largest micro-batch, {way}"] = f"{micro:,}"
        columns.append(column)
    note = (
        "  LLM in bf16; sharded: inside each machine, gathered twice per micro-batch. Trained states: fp32, gradient\n"
        "  and two moments, over all GPUs; copies: bf16, unreduced gradients. Activations: no checkpointing.\n"
        f"  Largest: with {si(0.9 * given['gpu_memory'], 'B')}; 0: does not fit."
    )
    return Table("Memory per GPU", ["stage 1", "stage 2"], side_by_side(columns), note)


def time_table(given: dict, stages: list[dict]) -> Table:
    columns = []
    for stage in stages:
        column = {
            "pairs × epochs": f"{si(stage['pairs'])} × {stage['epochs']:.3g}",
            "global batch": f"{stage['batch']:,}",
            "optimiser steps": f"{stage['steps']:,}",
            "videos": si(stage["videos"]),
            "once: feature cache": si(stage["cache"], "B"),
            "once: encoder, GPU-days": f"{stage['encoder_gpu_days']:,.2f}",
            "once: SAM, GPU-days": f"{stage['SAM_gpu_days']:,.2f}",
            f"  (did SAM reach {given['mfu']:.0%} of the peak)": f"{stage['SAM_gpu_days_at_mfu']:,.2f}",
            "training with that cache, hours": f"{stage['hours']:,.2f}",
            "or with vision in every epoch, hours": f"{stage['hours_without_cache']:,.2f}",
        }
        columns.append(column)
    return Table("Time and disk", ["stage 1", "stage 2"], side_by_side(columns))


def assumptions_of(numbers: dict) -> str:
    """What dominates, and what the plan takes for granted."""
    given, one, two = numbers["given"], numbers["stage1"], numbers["stage2"]
    gpu_hours = {
        "training in stage 1": one["hours"] * given["world_size"],
        "training in stage 2": two["hours"] * given["world_size"],
        "extraction by encoder": 24 * (one["encoder_gpu_days"] + two["encoder_gpu_days"]),
        "extraction by SAM": 24 * (one["SAM_gpu_days"] + two["SAM_gpu_days"]),
    }
    most = max(gpu_hours, key=gpu_hours.get)
    total = sum(gpu_hours.values())
    share = gpu_hours[most] / total
    return (
        f"What dominates: {most}, {share:.0%} of both stages' {total:,.2f} GPU-hours with a cache.\n"
        f"Assumed: {given['world_size']} GPU(s) of {given['peak'] / 1e12:g} TFLOP/s (H100 SXM, bf16: 989.5), of which "
        f"training and encoder reach {given['mfu']:.0%}\nand SAM {given['sam_mfu']:.0%} (0.5 s for 32² points "
        "on an A100, in bf16, is 6%). Not counted: decoding\nvideos (0.4 to 2.6 core-seconds each), loading, network, "
        "checkpoints, idle GPUs."
    )


# --------------------------------------------------------------------------- a run's own MFU


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product here: what MFU is a share of."""
    side, warm_up, repeats = 8192, 3, 10
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    for i in range(warm_up + repeats):
        if i == warm_up:
            start.record()
        matrix @ matrix
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1000
    return repeats * 2 * side**3 / seconds


def blocks_of(llm: nn.Module) -> nn.ModuleList:
    """The LLM's transformer blocks, whatever its family calls them."""
    number = llm.config.get_text_config().num_hidden_layers
    for module in llm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise VidReasonError(f"no list of {number} blocks in this LLM ({type(llm).__name__}): use another one")


def flops_per_token(model: VidReason) -> int:
    """4 per frozen and 6 per trained parameter that a token meets in the LLM: no gradient of a frozen weight exists."""
    embeddings = model.llm.get_input_embeddings().weight  # a look-up, unless it is the output layer, too
    tied = model.llm.get_output_embeddings().weight is embeddings
    flops = 0
    for p in model.llm.parameters():
        if p is embeddings and not tied:
            continue
        flops += (6 if p.requires_grad else 4) * p.numel()
    return flops
