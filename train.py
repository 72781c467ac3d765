"""Train the fusion core (stage 1), then the fusion core and LoRA adapters of the LLM (stage 2): §3.4 of the paper.

Laptop, the toy world:
    torchrun train.py --stage 1                    # captions; everything but the fusion core is frozen
    torchrun train.py --stage 2                    # questions and answers, from the newest stage-1 run
    torchrun --nproc_per_node 2 train.py --stage 1 # the same on two processes
The videos are made first, as many as the run shows: few, for a short recipe. After `python -m toy.pretrain world`,
which makes more of them, the same commands are the full recipe. `python` in place of `torchrun` does the same.

One machine with 8 GPUs, the paper's sizes and settings:
    torchrun --nproc_per_node 8 train.py --stage 1 --preset paper --encoder_weights ViCLIP-B-16.pth \\
        --sam_weights sam_vit_h_4b8939.pth --data webvid.csv --videos VIDEOS --features FEATURES
Four machines, the same command on each (HOST is the first):
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py …
SLURM:
    HOST=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)
    srun --nodes 4 --ntasks-per-node 1 torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d \\
        --rdzv_id $SLURM_JOB_ID --rdzv_endpoint $HOST:29500 train.py …
Before renting any of them:
    python train.py --preset paper --plan --world_size 32

Frozen vision is computed once, into --features; a video that cannot be read is named in bad_videos.jsonl and skipped
on every rank. The loss is the mean over the target tokens of the global batch (Eq. 6), however many processes and
micro-batches share it. The same command again goes on from the newest complete checkpoint in --output_dir.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import json
import math
import resource
import shlex
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from data.batches import Batches
from data.benchmarks import read_samples
from data.features import FeatureCache, encode_videos, report_bad, write_familiar
from data.program import ROOT, TOY_MODEL, Parser, guarded, sha256, write_json
from data.records import file_of
from plan import flops_per_token, matmul_ceiling, plan, print_plan
from toy.videos import MP4_BYTES, make_training_world, sample_id, videos_in
from vidreason import (
    CAPTION_PROMPT,
    PRESETS,
    VidReason,
    VidReasonError,
    read_config,
)

TOY_DATA = ROOT / "runs" / "world" / "train"


def option(help, default=None, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class Settings:
    stage: int = option("1: align the fusion core on captions; 2: instruction tuning with LoRA.", 1)
    preset: str = option("Model sizes, and this stage's defaults.", "toy", choices=list(PRESETS))
    # what is trained on what
    model: str | None = option("Directory of frozen parts; its config.json, if any, replaces the preset's sizes.")
    encoder_weights: str | None = option("Weights of the video transformer: .safetensors, or ViCLIP's .pth.")
    sam: str | None = option("Which Segment Anything: vit_b, vit_l, vit_h or toy.")
    sam_weights: str | None = option("Its weights: .safetensors, or an official sam_vit_*.pth.")
    llm: str | None = option("The LLM: a directory, or a hub id.")
    init_from: str | None = option("Model directory whose fusion core stage 2 starts from (default: newest stage 1).")
    data: list[str] | None = option(
        "Files of records: .jsonl, .csv or .tar, or BENCHMARK:FILE (nextqa:train.csv), see data/records.py; FILE@2.5 "
        "shows its videos 2.5 times per epoch."
    )
    videos: str | None = option("Folder that the records' video names are relative to.")
    max_videos: int | None = option("Use the first so many videos of the data only.")
    features: str | None = option(
        "Folder of Z_vision shards; missing ones are computed first (default: runs/features)."
    )
    max_bad_fraction: float = option("Stop if more than this share of the videos cannot be read.", 0.01)
    # how
    epochs: float | None = option("Passes over the videos.")
    max_steps: int | None = option("Optimiser steps, in place of epochs.")
    batch: int | None = option("Videos per optimiser step, over all processes.")
    micro_batch: int | None = option("Videos per forward pass of one process (default: its whole share).")
    pairs_per_video: int | None = option("Questions of one video that share a row.")
    lr: float | None = option("Peak learning rate.")
    lora_lr: float | None = option("Peak learning rate of the adapters (default: the same).")
    muon_lr: float | None = option("If given, the fusion core's matrices are trained by Muon at this peak rate.")
    warmup: float | None = option("Warm-up: steps if at least 1, else a share of the run.")
    weight_decay: float | None = option("Of matrices; norms, biases and queries have none.")
    text_share: float | None = option("Text-only records per video record in a batch (stage 2's replay).")
    seed: int = option("Seed of initialisation and sample order.", 0)
    # where and how fast
    output_dir: str | None = option("Where log.jsonl, loss.png, checkpoints/ and model/ go (default: runs/stageN).")
    save_every: int = option("Steps between checkpoints.", 200)
    keep: int = option("How many of the newest checkpoints are kept.", 2)
    restart: bool = option("Delete the checkpoints in --output_dir and begin anew.", False)
    device: str = option("auto takes a GPU if there is one.", "auto", choices=["auto", "cpu", "cuda"])
    precision: str = option(
        "bf16 arithmetic, or fp32; auto: bf16 where the processor has it.", "auto", choices=["auto", "bf16", "fp32"]
    )
    shard: str = option(
        "The frozen LLM: replicate it on every process, or full: shard it inside each machine; auto: replicate if it "
        "fits. What is trained is sharded over all processes either way.",
        "auto",
        choices=["auto", "replicate", "full"],
    )
    checkpointing: bool = option("Recompute activations in the backward pass: less memory, a third more time.", False)
    compile: bool = option("torch.compile the LLM's blocks.", False)
    report_to: str | None = option("Also log to this.", choices=["tensorboard", "wandb"])
    threads: int | None = option("CPU threads per process (default: its share of the cores).")
    processes: int | None = option("Processes that compute missing features, per rank (default: cores, 4 per GPU).")
    plan: bool = option("Say what a run would need (memory, hours, bytes), and stop.", False)
    world_size: int = option("Number of GPUs that --plan reckons with.", 1)
    mfu: float = option("Share of a GPU's peak that --plan reckons with.", 0.33)


# The paper's values (§4.2.2) are those of "paper"; the toy's come from its validation split: the full recipe, and the
# short one of a fresh clone. The paper states no warm-up for stage 2, where stage 1's 2000 steps would be most of the
# run: 3 % is our choice.
PAPER = dict(pairs_per_video=1, weight_decay=0.05, text_share=0.0)
TOY = dict(batch=32, lr=1e-3, warmup=100, weight_decay=0.02)
TOY_1 = dict(TOY, pairs_per_video=1, muon_lr=0.02, text_share=0.0)
TOY_2 = dict(TOY, micro_batch=16, pairs_per_video=7, muon_lr=0.01, text_share=0.35)
DEFAULTS = {
    ("short", 1): dict(TOY_1, max_videos=1500, max_steps=1000),
    ("short", 2): dict(TOY_2, max_videos=1500, max_steps=500),
    ("full", 1): dict(TOY_1, max_videos=8000, max_steps=1500),
    ("full", 2): dict(TOY_2, max_videos=8000, max_steps=1500),
    ("paper", 1): dict(PAPER, batch=2048, lr=1e-4, warmup=2000, epochs=4),
    ("paper", 2): dict(PAPER, batch=256, lr=2e-5, warmup=0.03, epochs=3),
}


def recipe(settings: Settings) -> str:
    """Which of DEFAULTS are meant. In the toy world the number of its videos decides between the short and the full."""
    if settings.preset != "toy":
        return "paper"
    if settings.data:
        return "full"
    enough = DEFAULTS["full", settings.stage]["max_videos"]
    return "full" if max(settings.max_videos or 0, videos_in(TOY_DATA)) >= enough else "short"


def complete(settings: Settings) -> Settings:
    """Fill what was not given on the command line from the preset and stage."""
    if settings.stage not in (1, 2):
        raise VidReasonError(f"there is no stage {settings.stage} (--stage): choose 1 or 2; stage 0 is toy/pretrain.py")
    toy = settings.preset == "toy"
    defaults = DEFAULTS[recipe(settings), settings.stage]
    if settings.epochs is not None or settings.max_steps is not None:  # one of them is enough
        defaults = {k: v for k, v in defaults.items() if k not in ("epochs", "max_steps")}
    settings = replace(settings, **{k: v for k, v in defaults.items() if getattr(settings, k) is None})
    for (
        name
    ) in "batch micro_batch pairs_per_video max_steps max_videos threads processes save_every keep world_size".split():
        if (value := getattr(settings, name)) is not None and value < 1:
            raise VidReasonError(f"{value} is too few (--{name}): give at least 1")
    if not toy and not settings.plan and not (settings.data and settings.videos):
        raise VidReasonError(f"preset {settings.preset} has no data of its own (--data, --videos): name yours")
    parts = ("encoder_weights", "sam", "sam_weights", "llm")
    if settings.stage == 2 and (given := [name for name in parts if getattr(settings, name)]):
        raise VidReasonError(
            f"stage 2 takes its frozen parts from --init_from (--{given[0]}): change the config.json there"
        )
    names = ["captions.jsonl"] if settings.stage == 1 else ["samples.jsonl", "captions.jsonl", "text.jsonl"]
    return replace(
        settings,
        model=settings.model or (str(TOY_MODEL) if toy else None),
        data=settings.data or [str(TOY_DATA / n) for n in names],
        videos=settings.videos or str(TOY_DATA),
        features=settings.features or str(ROOT / "runs" / "features"),
        output_dir=settings.output_dir or str(ROOT / "runs" / f"stage{settings.stage}"),
    )


def config_of(settings):
    """→ (Config, directory that its relative paths start at)"""
    directory = Path(settings.model or ".")
    sized = settings.model and (not directory.is_dir() or (directory / "config.json").exists())
    config = read_config(directory) if sized else PRESETS[settings.preset]
    given = {name: getattr(settings, name) for name in ("encoder_weights", "sam", "sam_weights", "llm")}
    here = lambda value: str(Path(value).resolve()) if Path(value).exists() else value
    return replace(config, **{name: here(value) for name, value in given.items() if value}), directory


# --------------------------------------------------------------------------- the model, on one process or many


def build(settings, device, dtype):
    """The model with what this stage trains: a new fusion core (stage 1), or that of a stage-1 run and new adapters."""
    torch.manual_seed(settings.seed)
    if settings.stage == 1:
        model = VidReason.create(*config_of(settings), dtype=dtype)
    else:
        model = VidReason.load(Path(settings.init_from or newest_stage1(settings)), dtype=dtype)
        if (model.directory / "lora").is_dir():
            raise VidReasonError(f"stage 2 starts from a stage-1 model ({model.directory}): this one has adapters")
        model.add_lora()
    model.freeze(settings.stage)
    if settings.checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.llm.train()  # transformers recomputes in this mode only; the LLMs of our presets have no dropout
    model.fusion.to(device), model.llm.to(device)  # encoder and SAM have done their work: Z_vision is cached
    return model


def newest_stage1(settings: Settings) -> Path:
    """The model directory that stage 2 starts from. VidReasonError: there is none, or it is not one."""
    runs = sorted(Path(ROOT / "runs").glob("stage1*/model/fusion.safetensors"), key=lambda p: p.stat().st_mtime)
    if not settings.init_from and not runs:
        raise VidReasonError(
            "no stage-1 run to start from (runs/): run `python train.py --stage 1` first, or give --init_from"
        )
    found = Path(settings.init_from) if settings.init_from else runs[-1].parent
    read_config(found)
    return found


def parallelise(model, settings, device):
    """FSDP2 with the whole model as root, because its forward looks the words up.

    What is trained is sharded over all processes, in fp32, and used in bf16 on GPUs. Sharding the frozen LLM is a
    question of bandwidth: every micro-batch gathers it twice, so it is replicated where it fits and else sharded
    inside each machine only, block by block.
    """
    llm_bytes = sum(p.numel() * p.element_size() for p in model.llm.parameters() if not p.requires_grad)
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    full = settings.shard == "full" or (settings.shard == "auto" and llm_bytes > 0.4 * room)
    machines = max(1, world() // int(os.environ.get("LOCAL_WORLD_SIZE", world())))
    shape = (machines, world() // machines) if full and machines > 1 else (world(),)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("machines", "gpus")[-len(shape) :])
    bf16 = torch.bfloat16 if device.type == "cuda" and uses_bf16(settings, device) else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outside = {*model.encoder.parameters(), *model.sam.parameters()}
    if full:
        for block in model.llm.get_decoder().layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    else:
        outside |= {p for p in model.llm.parameters() if not p.requires_grad}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=outside)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are sums over ranks: train_step divides by the global count
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return f"sharded over {shape} ({'with' if full else 'without'} the LLM)"


def build_optimizers(model, settings):
    """AdamW: weight decay on matrices only, the adapters at their own rate. Muon, if asked for: the core's matrices."""
    groups, matrices = {}, []
    for name, p in model.named_parameters():
        if p.requires_grad and settings.muon_lr and name.startswith("fusion.layers") and p.ndim == 2:
            matrices.append(p)
        elif p.requires_grad:
            decay = settings.weight_decay if p.ndim == 2 and not name.endswith("queries") else 0.0
            lr = settings.lora_lr or settings.lr if "lora_" in name else settings.lr
            groups.setdefault((lr, decay), []).append(p)
    groups = [{"params": ps, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if matrices:
        group = {"params": matrices, "peak": settings.muon_lr}
        optimizers.append(torch.optim.Muon([group], lr=settings.muon_lr, weight_decay=settings.weight_decay))
    return optimizers


def describe(model, settings, notes):
    """What is frozen, trained, loaded and new: printed before step 1."""
    c, where = model.config, model.directory
    origin = {
        "encoder": f"from {Path(where, c.encoder_weights)}",
        "sam": f"{c.sam} from {Path(where, c.sam_weights)}",
        "fusion": "new" if settings.stage == 1 else f"from {where}",
        "llm": f"from {c.llm}" + (f", new LoRA adapters of rank {c.lora_rank}" if settings.stage == 2 else ""),
    }
    for part, source in origin.items():
        parameters = list(getattr(model, part).parameters())
        total, trained = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
        state = "frozen" if not trained else "trained" if trained == total else f"{trained / 1e6:.2f} M trained"
        print(f"  {part:8s}{total / 1e6:9.2f} M parameters, {state}; {source}")
    print(*(f"  {note}" for note in notes), sep="\n", flush=True)


# --------------------------------------------------------------------------- one step


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def total(value, device):
    """Sum over all processes."""
    value = torch.tensor(value, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(value)
    return value.item()


def schedule(step, settings):
    """Linear warm-up, then a cosine to zero: the factor of the learning rate."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * settings.max_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.max_steps - warmup)))


def uses_bf16(settings, device):
    """As asked for; by itself on GPUs that have it, and on CPUs with avx512_bf16, which multiply it faster."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags


@contextmanager
def arithmetic(settings, device):
    """The precision of a step; on a CPU unfused attention, because the fused backward is slow there."""
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(settings, device)):
        yield


def train_step(model, optimizers, micro, settings, device):
    """One optimiser step: Eq. 6 divided by all target tokens of the global batch → (loss, gradient norm, tokens)."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    tokens, nll_sum = total(sum(len(packed.targets) for packed, _ in micro), device), 0.0
    for i, (packed, vision) in enumerate(micro):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == len(micro) - 1)  # gradients meet once per step
        vision = [tensor.to(device, non_blocking=True) for tensor in vision or ()]
        with arithmetic(settings, device):
            nll, _ = model(packed.to(device), *vision)
        (nll / tokens).backward()
        nll_sum += nll.detach().double()
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return total(nll_sum.item(), device) / tokens, norm.item(), int(tokens)


# --------------------------------------------------------------------------- checkpoints


def training_state(model, optimizers):
    """Everything that a step changes, by name: tensors only, so that a checkpoint is safetensors and no pickle.

    The schedule, the sample order and the state of the random generators follow from the step.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    state = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            state |= {f"optimizer.{names[p]}.{key}": value for key, value in moments.items()}
    return state


def agreed(settings, batches):
    """What must be the same for a resumed run to be the same run."""
    free = "output_dir features save_every keep restart device shard checkpointing compile report_to threads processes"
    free += " plan world_size mfu max_bad_fraction micro_batch data videos model init_from"
    fixed = {k: v for k, v in asdict(settings).items() if k not in free.split()}
    if settings.stage == 2:
        fixed["start"] = start_of(settings.init_from)
    return {**fixed, "data": batches.digest()}


def start_of(model_dir) -> str:
    """The fusion core that a stage 2 starts from, as a hash."""
    return sha256(Path(model_dir, "fusion.safetensors"))[:16]


def save_checkpoint(model, optimizers, out, step, keep, agreement):
    """checkpoints/step-N: written aside, renamed when complete, and only then are older ones deleted."""
    final = out / "checkpoints" / f"step-{step:08d}"
    aside = final.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
    dcp.save(training_state(model, optimizers), storage_writer=writer, no_dist=not dist.is_initialized())
    barrier()
    if rank() == 0:
        write_json(aside / "run.json", agreement)
        aside.rename(final)
        for old in complete_checkpoints(out)[:-keep]:
            shutil.rmtree(old)


def complete_checkpoints(out):
    """Oldest first; what a killed save left behind ends in .partial."""
    return sorted(p for p in Path(out, "checkpoints").glob("step-*") if p.suffix != ".partial")


def resume(model, optimizers, out, agreement, restart):
    """Load the newest complete checkpoint, if any → the number of steps that are done."""
    if rank() == 0:
        for leftover in out.glob("checkpoints/step-*" if restart else "checkpoints/*.partial"):
            shutil.rmtree(leftover)
    barrier()
    checkpoints = complete_checkpoints(out)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    before = json.loads((newest / "run.json").read_text())
    differing = [f"{k} was {before.get(k)}, is {v}" for k, v in agreement.items() if before.get(k) != v]
    advice = "give the same settings, another --output_dir, or --restart to begin anew"
    if differing:
        raise VidReasonError(f"this is another run: {', '.join(differing)} ({newest}): {advice}")
    allocate_moments(optimizers)
    state, reader = training_state(model, optimizers), dcp.HuggingFaceStorageReader(str(newest))
    try:
        found = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged file makes safetensors, JSON and torch say
        raise VidReasonError(
            f"checkpoint cannot be read: {error} ({newest}): delete it to go on from the one before"
        ) from error
    theirs = {k: (tuple(v.size), v.properties.dtype) for k, v in found.items()}
    ours = {k: (tuple(v.shape), v.dtype) for k, v in state.items()}
    differing = [f"missing {k}" for k in ours.keys() - theirs] + [f"unexpected {k}" for k in theirs.keys() - ours]
    differing += [f"{k} is {theirs[k]}, not {ours[k]}" for k in ours.keys() & theirs if theirs[k] != ours[k]]
    if differing:
        raise VidReasonError(f"checkpoint does not fit: {', '.join(sorted(differing))} ({newest}): {advice}")
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    return int(newest.name[5:])


def allocate_moments(optimizers):
    """Optimisers make their moments in their first step; one with rate and gradients zero changes nothing else."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate, group["lr"] = group["lr"], 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
            group["rate"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group.pop("rate")


def barrier(group=None):
    if world() > 1:
        dist.barrier(group)


def save_model(model, out):
    """The model directory that infer.py reads, by rank 0, from the shards of all."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[name] = p.full_tensor().cpu() if isinstance(p, DTensor) else p.detach().cpu()
    if rank() == 0:
        model.save(out / "model", parts=("fusion", "lora"), state=state)


# --------------------------------------------------------------------------- one run


class Log:
    """log.jsonl (one object per step), the progress bar, TensorBoard or W&B: on rank 0."""

    def __init__(self, out, settings, done):
        self.path, self.writer = out / "log.jsonl", None
        lines = self.path.read_text().splitlines(keepends=True)[:done] if done and self.path.exists() else []
        self.path.write_text("".join(lines))  # steps after the checkpoint are done again
        self.file = open(self.path, "a")
        self.bar = tqdm(total=settings.max_steps, initial=done, desc=f"stage {settings.stage}", mininterval=2)
        try:
            if settings.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(out / "tensorboard", purge_step=done)
                self.writer = lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()]
            elif settings.report_to == "wandb":
                import wandb

                run = wandb.init(project="vidreason", dir=out, config=asdict(settings))
                self.writer = lambda step, row: run.log(row, step=step)
        except ImportError as error:
            what = settings.report_to
            raise VidReasonError(f"{what} is not installed (--report_to): pip install {what}") from error

    def write(self, step, row):
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        self.bar.update()
        memory = f"{row['memory_gib']:.1f} GiB" + (f", MFU {row['mfu']:.2f}" if "mfu" in row else "")
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:.0f} target tokens/s, {memory}")
        if self.writer:
            self.writer(step, row)

    def close(self):
        self.file.close()
        self.bar.close()
        plot(self.path)


def plot(path):
    """loss.png beside log.jsonl."""
    from matplotlib.figure import Figure  # pyplot would choose how the whole process draws

    log = [json.loads(line) for line in path.read_text().splitlines()]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([x["step"] for x in log], [x["loss"] for x in log], lw=0.5, color="0.6", label="each step")
    window = max(1, len(log) // 50)
    smooth = np.convolve([x["loss"] for x in log], np.ones(window) / window, "valid")
    axes.plot(range(window, len(log) + 1), smooth, "k", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss, nats per target token", yscale="log")
    axes.legend()
    figure.savefig(path.with_name("loss.png"), dpi=120, bbox_inches="tight")


def memory_gib(device):
    """The peak so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def train(model, batches, optimizers, settings, device, out, begin, agreement):
    """Steps `begin` … max_steps; while one runs, a thread prepares the next batch."""
    log = Log(out, settings, begin) if rank() == 0 else None
    gpu = device.type == "cuda" and settings.max_steps > begin
    share = flops_per_token(model) / matmul_ceiling(device) if gpu else 0  # seconds that a token takes at best
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batches.step, begin)
        for step in range(begin, settings.max_steps):
            start = time.perf_counter()
            micro = coming.result()
            waited = time.perf_counter() - start
            coming = ahead.submit(batches.step, step + 1)
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, if an LLM has any, follows from the step
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * schedule(step, settings)
            loss, norm, tokens = train_step(model, optimizers, micro, settings, device)
            seconds = time.perf_counter() - start
            if log:
                row = {"loss": loss, "lr": optimizers[0].param_groups[0]["lr"], "grad_norm": norm}
                row |= {"tokens_per_s": tokens / seconds, "samples_per_s": settings.batch / seconds}
                row |= {"data_wait": waited / seconds, "memory_gib": memory_gib(device)}
                if gpu:  # of this process; padding counts as work
                    row["mfu"] = share * sum(packed.position_ids.numel() for packed, _ in micro) / seconds
                log.write(step + 1, row)
            if not math.isfinite(loss):
                raise VidReasonError(f"loss is {loss} at step {step + 1} ({out}): lower --lr, or look at the data")
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.max_steps:
                save_checkpoint(model, optimizers, out, step + 1, settings.keep, agreement)
    if log:
        log.close()


def start_processes(settings):
    """→ (device of this process, settings with its share of the cores).

    torchrun sets RANK; a lone GPU is a group of one, for the mixed precision of FSDP2.
    """
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise VidReasonError("there is no GPU that torch can use (--device cuda): give --device cpu")
    here = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(here)
    device = torch.device("cuda", here) if cuda else torch.device("cpu")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    elif cuda:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(settings.threads or share)
    return device, replace(settings, processes=settings.processes or (min(4, share) if cuda else share))


def run(given: Settings):
    """One stage from the command line to the model directory and what to type next."""
    device, settings = start_processes(complete(given))
    out = Path(settings.output_dir)
    for name, count in (("batch", settings.batch), ("text_share", round(settings.batch * settings.text_share))):
        if count % world():
            raise VidReasonError(f"{count} rows cannot be shared by {world()} processes (--{name}): give a multiple")
    share = settings.batch // world()
    settings = replace(settings, micro_batch=min(settings.micro_batch or share, share))
    if settings.stage == 2:
        settings = replace(settings, init_from=str(newest_stage1(settings)))
    out.mkdir(parents=True, exist_ok=True)
    # ranks may be hours apart before the first step, and NCCL gives up after ten minutes
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world() > 1 else None
    if in_toy_world(given):
        if rank() == 0:
            make_toy_world(settings)
        barrier(patient)
    samples = [s for path in settings.data for s in read_samples(path, settings.videos)]
    half = device.type == "cuda" and uses_bf16(settings, device)  # on a CPU the toy's LLM costs no memory
    model = build(settings, device, torch.bfloat16 if half else torch.float32)
    names = sorted({s.video for s in samples if s.video})[: settings.max_videos]
    config, split = model.config, (rank(), world(), str(device))
    encode_videos(model.directory, config, settings.videos, names, settings.features, settings.processes, 100, *split)
    barrier(patient)
    cache = FeatureCache(settings.features)
    bad = report_bad(cache, names, out / "bad_videos.jsonl", settings.max_bad_fraction) if rank() == 0 else ()
    cache.videos = {name: cache.videos[name] for name in names if name in cache}
    batches = Batches(settings, samples, cache, model.tokenizer, config.num_queries, rank(), world())
    steps = settings.max_steps or math.ceil(settings.epochs * batches.epoch_length / settings.batch)
    settings = replace(settings, max_steps=steps)
    notes = [
        f"stage {settings.stage}: {len(batches.videos)} videos ({len(bad)} of {len(names)} unreadable), {steps} "
        f"steps of {settings.batch}, on {world()} × {device.type}, {torch.get_num_threads()} threads each"
    ]
    if settings.compile:
        for block in model.llm.get_decoder().layers:
            block.compile(dynamic=True)
    if world() > 1 or device.type == "cuda":
        notes.append(parallelise(model, settings, device))
    optimizers, agreement = build_optimizers(model, settings), agreed(settings, batches)
    begin = resume(model, optimizers, out, agreement, settings.restart)
    if rank() == 0:
        describe(model, settings, notes + [f"goes on after step {begin}"] * (begin > 0))
    began = time.time()
    train(model, batches, optimizers, settings, device, out, begin, agreement)
    save_model(model, out)
    if rank() == 0:
        write_familiar(cache, out / "model" / "familiar.safetensors")
        print(f"stage {settings.stage} done in {(time.time() - began) / 60:.1f} minutes: {out / 'model'}")
        print("Next:", *next_commands(given, settings, next(iter(cache.videos))), sep="\n    ", flush=True)
    if dist.is_initialized():
        barrier()  # without it gloo aborts at exit now and then
        dist.destroy_process_group()


# --------------------------------------------------------------------------- the toy world, made when a run needs it

# Core-seconds: of a video with its text, of its Z_vision, of a step of 32 videos in either stage
PACE = {"world": 0.09, "vision": 0.5, 1: 0.7, 2: 2.2}
PACE_MACHINE = "as measured on two cores of an Intel Xeon (2.1 GHz, avx512_bf16)"
Z_VISION_BYTES = 7400  # of one toy video


def in_toy_world(given: Settings) -> bool:
    return given.preset == "toy" and not given.data


def toy_missing(settings: Settings) -> tuple[int, int]:
    """-> how many videos have to be made before this run, and how many have no Z_vision yet"""
    count, cache = settings.max_videos, FeatureCache(settings.features)
    names = [f"{sample_id('train', 0, i)}.mp4" for i in range(count)]
    videos = count if videos_in(TOY_DATA) < count else 0
    return videos, sum(name not in cache for name in names)


def toy_work(settings: Settings, videos: int, unseen: int) -> str:
    """Which recipe a run in the toy world follows, what of toy_missing it makes first, about how long it all takes."""
    stage, kind = settings.stage, recipe(replace(settings, data=None))
    steps = settings.max_steps or math.ceil(settings.epochs * settings.max_videos / settings.batch)
    lines = [f"stage {stage} in the toy world, {kind} recipe: {settings.max_videos} videos, {steps} steps"]
    if kind == "short":
        full = DEFAULTS["full", stage]
        sizes = f"{full['max_videos']} videos, {full['max_steps']} steps"
        lines += [f"the full recipe ({sizes}) is what follows `python -m toy.pretrain world`"]
    if videos:
        lines += [f"makes {videos} videos ({videos * MP4_BYTES / 1e6:.1f} MB): {shown(TOY_DATA)}"]
    if unseen:
        lines += [f"then Z_vision of {unseen} ({unseen * Z_VISION_BYTES / 1e6:.1f} MB): {shown(settings.features)}"]
    first = videos * PACE["world"] + unseen * PACE["vision"]
    end = first + steps * settings.batch / 32 * PACE[stage]
    lines += [f"about {first / 120:.1f} minutes to the first loss, {end / 120:.1f} to the end, {PACE_MACHINE}"]
    return "\n  ".join(lines)


def make_toy_world(settings: Settings):
    """Say what this run is and will make; then make the videos of it that are not there. On one rank."""
    print(toy_work(settings, *toy_missing(settings)), flush=True)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    make_training_world(TOY_DATA, settings.max_videos, settings.processes * here)  # the other ranks only wait


# --------------------------------------------------------------------------- what to type next

# of stage 1's options those that hold for stage 2; the rest has a default of its own there
KEPT = "preset videos max_videos features max_bad_fraction seed save_every keep device precision shard checkpointing "
KEPT += "compile report_to threads processes"
KEPT_IN_TOY_WORLD = "max_steps batch"  # a trial run stays one


def shown(path) -> str:
    """A path as one types it in this directory."""
    try:
        path = Path(path).resolve().relative_to(Path.cwd())
    except ValueError:
        pass  # it lies elsewhere
    return shlex.quote(str(path))


def python() -> str:
    """This Python, as one types it in this shell."""
    for name in ("python", "python3"):
        if Path(shutil.which(name) or "").parent == Path(sys.executable).parent:
            return name
    return shlex.quote(sys.executable)


def launcher() -> str:
    """How this program was started: by python, or by torchrun with so many processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return python()
    on_path = Path(shutil.which("torchrun") or "").parent == Path(sys.executable).parent
    torchrun = "torchrun" if on_path else f"{python()} -m torch.distributed.run"
    here, everywhere = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here < everywhere:
        return f"{torchrun} (its options as before)"
    return f"{torchrun} --nproc_per_node {here}" if here > 1 else torchrun


def holds_another_stage2(folder: Path, stage1: Path) -> bool:
    """Whether in `folder` a stage 2 began from another fusion core than that of the model directory `stage1`."""
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        return False
    return json.loads((checkpoints[-1] / "run.json").read_text()).get("start") != start_of(stage1)


def stage2_options(given: Settings, out: Path) -> list[str]:
    """What stage 2 needs on its command line after this stage 1."""
    names = KEPT.split() + (KEPT_IN_TOY_WORLD.split() if in_toy_world(given) else [])
    options = []
    for name in names:
        value = getattr(given, name)
        if value == getattr(Settings(), name):
            continue
        options.append(f"--{name}")
        if value is not True:
            options.append(shown(value) if name in ("videos", "features") else str(value))
    if given.data:
        options += ["--data", "QUESTIONS.jsonl"]
    folder = ROOT / "runs" / "stage2"
    if given.output_dir:
        options += ["--init_from", shown(out / "model")]
        folder = out.with_name(f"{out.name}-stage2")
    while holds_another_stage2(folder, out / "model"):
        folder = folder.with_name(f"{folder.name}-again")
    if folder != ROOT / "runs" / "stage2":
        options += ["--output_dir", shown(folder)]
    return options


def next_commands(given: Settings, settings: Settings, video: str) -> list[str]:
    """What to type after this run, in this directory: stage 2 after stage 1, and a question about one of the videos."""
    script, out = Path(sys.argv[0]), Path(settings.output_dir)
    clip = ROOT / "toy" / "clips" / "red-egg-breaks-0.mp4"
    if not in_toy_world(given):
        clip = Path(settings.videos, video)
        clip = clip if file_of(clip).suffix != ".tar" else Path("CLIP.mp4")  # infer.py reads no tar
    question = CAPTION_PROMPT if settings.stage == 1 else "why?"
    infer = f"{python()} {shown(script.with_name('infer.py'))} {shown(clip)} "
    commands = [infer + f'"{question}" --model {shown(out / "model")}']
    if settings.stage == 1:
        options = " ".join(["--stage 2", *stage2_options(given, out)])
        commands.insert(0, f"{launcher()} {shown(script)} {options}")
    return commands


# --------------------------------------------------------------------------- --plan: what a run would need


def plan_run(settings):
    """--plan: both stages with what the command line says, else their defaults; without --max_videos the paper's."""
    both = [complete(replace(settings, stage=stage)) for stage in (1, 2)]
    given = {"batch": [s.batch for s in both], "mfu": settings.mfu}
    if settings.micro_batch:
        given["micro_batch"] = [settings.micro_batch] * 2
    if settings.preset == "toy":
        given["text_tokens"] = (40, 200)
    if both[0].max_videos:
        given["videos"] = given["pairs"] = [s.max_videos for s in both]
    pairs = given.get("pairs", (110e6, 260e3))
    given["epochs"] = [s.epochs or s.max_steps * s.batch / n for s, n in zip(both, pairs, strict=True)]
    print_plan(plan(*config_of(both[0]), settings.world_size, **given))
    if in_toy_world(settings):
        one, two = both
        print("\nWithout a GPU:", toy_work(one, *toy_missing(one)), toy_work(two, 0, 0), sep="\n")


def main():
    class TrainParser(Parser, HfArgumentParser):
        """HfArgumentParser makes the options from Settings, Parser the errors."""

    parser = TrainParser(Settings, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    disable_progress_bar()  # of loading weights, once per process
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that one process saves is meant so
    plan_run(settings) if settings.plan else run(settings)


if __name__ == "__main__":
    guarded(main)
