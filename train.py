"""Train the fusion core (stage 1), then the fusion core and LoRA adapters of the LLM (stage 2): §3.4 of the paper.

Laptop, the toy world:
    torchrun train.py --stage 1                    # captions
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

Frozen in stage 1: encoder, SAM and LLM; trained: the fusion core. Frozen in stage 2: encoder, SAM and the LLM's own
weights; trained: the fusion core, and LoRA adapters beside the LLM's weights.

What encoder and SAM see is computed once, into --features; a video that cannot be read is named in bad_videos.jsonl
and skipped on every rank. The loss is the mean over the target tokens of the global batch (Eq. 6), however many
processes and micro-batches share it. The same command again goes on from the newest complete checkpoint in
--output_dir.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import json
import math
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
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
from data.program import ROOT, TOY_MODEL, Parser, guarded, launcher, print_columns, python, sha256, shown, write_json
from data.records import Sample, file_of
from plan import assumptions_of, blocks_of, flops_per_token, headline_of, matmul_ceiling, plan, tables_of
from toy.videos import MP4_BYTES, make_training_world, sample_id, videos_in
from vidreason import (
    CAPTION_PROMPT,
    PRESETS,
    Config,
    VidReason,
    VidReasonError,
    read_config,
)

TOY_DATA = ROOT / "runs" / "world" / "train"


# --------------------------------------------------------------------------- settings


def decisive(help: str, default=None, **metadata):
    """An option that decides what a run results in: to go on from a checkpoint it must be the same (see agreed)."""
    return field(default=default, metadata={"help": help, **metadata})


def free(help: str, default=None, **metadata):
    """An option that may differ when a run goes on. Of --data and --init_from agreed() compares the contents."""
    return field(default=default, compare=False, metadata={"help": help, **metadata})


@dataclass
class Settings:
    stage: int = decisive("1: align the fusion core on captions; 2: instruction tuning with LoRA.", 1)
    preset: str = decisive("Model sizes, and this stage's defaults.", "toy", choices=list(PRESETS))
    # what is trained on what
    model: str | None = free("Directory of frozen parts; its config.json, if any, replaces the preset's sizes.")
    encoder_weights: str | None = decisive("Weights of the video transformer: .safetensors, or ViCLIP's .pth.")
    sam: str | None = decisive("Which Segment Anything: vit_b, vit_l, vit_h or toy.")
    sam_weights: str | None = decisive("Its weights: .safetensors, or an official sam_vit_*.pth.")
    llm: str | None = decisive("The LLM: a directory, or a hub id.")
    init_from: str | None = free("Model directory whose fusion core stage 2 starts from (default: newest stage 1).")
    data: list[str] | None = free(
        "Files of records: .jsonl, .csv or .tar, or BENCHMARK:FILE (nextqa:train.csv), see data/records.py; FILE@2.5 "
        "shows its videos 2.5 times per epoch."
    )
    videos: str | None = free("Folder that the records' video names are relative to.")
    max_videos: int | None = decisive("Use the first so many videos of the data only.")
    features: str | None = free(
        "Folder of Z_vision shards; missing ones are computed first (default: runs/features)."
    )
    max_bad_fraction: float = free("Stop if more than this share of the videos cannot be read.", 0.01)
    # how
    epochs: float | None = decisive("Passes over the videos.")
    max_steps: int | None = decisive("Optimiser steps, in place of epochs.")
    batch: int | None = decisive("Videos per optimiser step, over all processes.")
    micro_batch: int | None = free("Videos per forward pass of one process (default: its whole share).")
    pairs_per_video: int | None = decisive("Questions of one video that share a row.")
    lr: float | None = decisive("Peak learning rate.")
    lora_lr: float | None = decisive("Peak learning rate of the adapters (default: the same).")
    muon_lr: float | None = decisive("If given, the fusion core's matrices are trained by Muon at this peak rate.")
    warmup: float | None = decisive("Warm-up: steps if at least 1, else a share of the run.")
    weight_decay: float | None = decisive("Of matrices; norms, biases and queries have none.")
    text_share: float | None = decisive("Text-only records per video record in a batch (stage 2's replay).")
    seed: int = decisive("Seed of initialisation and sample order.", 0)
    # where and how fast
    output_dir: str | None = free("Where log.jsonl, loss.png, checkpoints/ and model/ go (default: runs/stageN).")
    save_every: int = free("Steps between checkpoints.", 200)
    keep: int = free("How many of the newest checkpoints are kept.", 2)
    restart: bool = free("Delete the checkpoints in --output_dir and begin anew.", False)
    device: str = free("auto takes a GPU if there is one.", "auto", choices=["auto", "cpu", "cuda"])
    precision: str = decisive(
        "bf16 arithmetic, or fp32; auto: bf16 where the processor has it.", "auto", choices=["auto", "bf16", "fp32"]
    )
    shard: str = free(
        "The frozen LLM: replicate it on every process, or full: shard it inside each machine; auto: replicate if it "
        "fits. What is trained is sharded over all processes either way.",
        "auto",
        choices=["auto", "replicate", "full"],
    )
    checkpointing: bool = free("Recompute activations in the backward pass: less memory, a third more time.", False)
    compile: bool = free("torch.compile the LLM's blocks.", False)
    report_to: str | None = free("Also log to this.", choices=["tensorboard", "wandb"])
    threads: int | None = free("CPU threads per process (default: its share of the cores).")
    processes: int | None = free("Processes that compute missing features, per rank (default: cores, 4 per GPU).")
    plan: bool = free("Say what a run would need (memory, hours, bytes), and stop.", False)
    world_size: int = free("Number of GPUs that --plan reckons with.", 1)
    mfu: float = free("Share of a GPU's peak that --plan reckons with.", 0.33)


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
    videos = max(settings.max_videos or 0, videos_in(TOY_DATA))
    return "full" if videos >= enough else "short"


# Settings are completed in two steps: complete() needs nothing but the command line, fit_to_processes() the processes
# that were started. What is left is max_steps where epochs were given, which run() counts when it knows the videos.


def complete(settings: Settings) -> Settings:
    """Fill what was not given on the command line from the preset and stage. VidReasonError: it cannot be meant so."""
    if settings.stage not in (1, 2):
        raise VidReasonError(f"there is no stage {settings.stage} (--stage): choose 1 or 2; stage 0 is toy/pretrain.py")
    defaults = dict(DEFAULTS[recipe(settings), settings.stage])
    if settings.epochs is not None or settings.max_steps is not None:  # one of them is enough
        defaults.pop("epochs", None)
        defaults.pop("max_steps", None)
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    settings = replace(settings, **missing)
    check(settings)
    return with_places(settings)


COUNTS = (
    "batch", "micro_batch", "pairs_per_video", "max_steps", "max_videos", "threads", "processes",
    "save_every", "keep", "world_size",
)  # fmt: skip
NAMED_PARTS = ("encoder_weights", "sam", "sam_weights", "llm")  # settings that say where the frozen parts come from


def check(settings: Settings):
    for name in COUNTS:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise VidReasonError(f"{value} is too few (--{name}): give at least 1")
    has_data = settings.preset == "toy" or (settings.data and settings.videos)
    if not has_data and not settings.plan:
        raise VidReasonError(f"preset {settings.preset} has no data of its own (--data, --videos): name yours")
    given = [name for name in NAMED_PARTS if getattr(settings, name)]
    if settings.stage == 2 and given:
        raise VidReasonError(
            f"stage 2 takes its frozen parts from --init_from (--{given[0]}): change the config.json there"
        )


def with_places(settings: Settings) -> Settings:
    """Where data come from and results go, if it was not said: the toy world, and runs/."""
    toy_model = str(TOY_MODEL) if settings.preset == "toy" else None
    records = ["captions.jsonl"]
    if settings.stage == 2:
        records = ["samples.jsonl", "captions.jsonl", "text.jsonl"]
    return replace(
        settings,
        model=settings.model or toy_model,
        data=settings.data or [str(TOY_DATA / name) for name in records],
        videos=settings.videos or str(TOY_DATA),
        features=settings.features or str(ROOT / "runs" / "features"),
        output_dir=settings.output_dir or str(ROOT / "runs" / f"stage{settings.stage}"),
    )


def fit_to_processes(settings: Settings, device: torch.device, cores: int) -> Settings:
    """Fill what depends on the processes of this run. cores: the share of this process. VidReasonError: rows that they
    cannot share, or no stage 1 that stage 2 could start from."""
    texts = round(settings.batch * settings.text_share)
    for name, rows in (("batch", settings.batch), ("text_share", texts)):
        if rows % world():
            raise VidReasonError(f"{rows} rows cannot be shared by {world()} processes (--{name}): give a multiple")
    share = settings.batch // world()
    workers = min(4, cores) if device.type == "cuda" else cores
    return replace(
        settings,
        micro_batch=min(settings.micro_batch or share, share),
        processes=settings.processes or workers,
        init_from=str(newest_stage1(settings)) if settings.stage == 2 else settings.init_from,
    )


def config_of(settings: Settings) -> tuple[Config, Path]:
    """-> (Config, directory that its relative paths start at)"""
    directory = Path(settings.model or ".")
    config = PRESETS[settings.preset]
    if settings.model and (not directory.is_dir() or (directory / "config.json").exists()):
        config = read_config(directory)  # which says so if there is no such directory
    given = {}
    for name in NAMED_PARTS:
        value = getattr(settings, name)
        if value and Path(value).exists():
            value = str(Path(value).resolve())
        if value:
            given[name] = value
    return replace(config, **given), directory


# --------------------------------------------------------------------------- the model, on one process or many


def build(settings: Settings, device: torch.device, dtype: torch.dtype) -> VidReason:
    """The model with what this stage trains: a new fusion core (stage 1), or that of a stage-1 run and new adapters.

    All else is frozen, see VidReason.freeze: encoder, SAM and the LLM's own weights, in stage 2 as in stage 1.
    """
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
    model.fusion.to(device)
    model.llm.to(device)  # encoder and SAM have done their work: Z_vision is cached
    return model


def newest_stage1(settings: Settings) -> Path:
    """The model directory that stage 2 starts from. VidReasonError: there is none, or it is not one."""
    if settings.init_from:
        directory = Path(settings.init_from)
    else:
        fusion_cores = sorted(
            (ROOT / "runs").glob("stage1*/model/fusion.safetensors"), key=lambda path: path.stat().st_mtime
        )
        if not fusion_cores:
            raise VidReasonError(
                "no stage-1 run to start from (runs/): run `python train.py --stage 1` first, or give --init_from"
            )
        directory = fusion_cores[-1].parent
    read_config(directory)
    return directory


def parallelise(model: VidReason, settings: Settings, device: torch.device) -> str:
    """FSDP2 with the whole model as root, because its forward looks the words up. -> how it was done, in words

    What is trained is sharded over all processes, in fp32, and used in bf16 on GPUs. Sharding the frozen LLM is a
    question of bandwidth: every micro-batch gathers it twice, so it is replicated where it fits and else sharded
    inside each machine only, block by block.
    """
    shard_llm = settings.shard == "full" or (settings.shard == "auto" and not fits_in_memory(model.llm, device))
    mesh = mesh_of_processes(device, inside_machines=shard_llm)
    bf16 = device.type == "cuda" and uses_bf16(settings, device)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )

    not_sharded = {*model.encoder.parameters(), *model.sam.parameters()}
    if shard_llm:
        for block in blocks_of(model.llm):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    else:
        not_sharded |= {p for p in model.llm.parameters() if not p.requires_grad}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=not_sharded)

    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are sums over ranks: train_step divides by the global count
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return f"sharded over {tuple(mesh.shape)} ({'with' if shard_llm else 'without'} the LLM)"


def fits_in_memory(llm: nn.Module, device: torch.device) -> bool:
    """Whether each GPU has room for all of the LLM's frozen weights beside what else a step needs."""
    if device.type != "cuda":
        return True
    frozen = [p for p in llm.parameters() if not p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in frozen)
    return size <= 0.4 * torch.cuda.get_device_properties(device).total_memory


def mesh_of_processes(device: torch.device, inside_machines: bool):
    """All processes in one row; or, to shard inside each machine only, a row for each of several machines."""
    machines = max(1, world() // int(os.environ.get("LOCAL_WORLD_SIZE", world())))
    if inside_machines and machines > 1:
        shape = (machines, world() // machines)
        return init_device_mesh(device.type, shape, mesh_dim_names=("machines", "gpus"))
    return init_device_mesh(device.type, (world(),), mesh_dim_names=("gpus",))


def build_optimizers(model: VidReason, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW: weight decay on matrices only, the adapters at their own rate. Muon, if asked for: the core's matrices."""
    by_rate_and_decay = {}
    for_muon = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim == 2 and not name.endswith("queries")  # N_q vectors beside each other are no matrix
        if settings.muon_lr and name.startswith("fusion.layers") and is_matrix:
            for_muon.append(p)
            continue
        lr = settings.lr
        if "lora_" in name:
            lr = settings.lora_lr or settings.lr
        decay = settings.weight_decay if is_matrix else 0.0
        by_rate_and_decay.setdefault((lr, decay), []).append(p)

    groups = []
    for (lr, decay), parameters in by_rate_and_decay.items():
        groups.append({"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay})
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if for_muon:
        group = {"params": for_muon, "peak": settings.muon_lr}
        optimizers.append(torch.optim.Muon([group], lr=settings.muon_lr, weight_decay=settings.weight_decay))
    return optimizers


def describe(model: VidReason, settings: Settings, notes: list[str]):
    """What is frozen, trained, loaded and new: printed before step 1."""
    config, directory = model.config, model.directory
    origin = {
        "encoder": f"from {Path(directory, config.encoder_weights)}",
        "sam": f"{config.sam} from {Path(directory, config.sam_weights)}",
        "fusion": "new",
        "llm": f"from {config.llm}",
    }
    if settings.stage == 2:
        origin["fusion"] = f"from {directory}"
        origin["llm"] += f", new LoRA adapters of rank {config.lora_rank}"
    for part, source in origin.items():
        sizes = {True: 0, False: 0}  # of what is trained, of what is frozen
        for p in getattr(model, part).parameters():
            sizes[p.requires_grad] += p.numel()
        state = f"{sizes[True] / 1e6:.2f} M trained"
        if not sizes[True]:
            state = "frozen"
        elif not sizes[False]:
            state = "trained"
        print(f"  {part:8s}{sum(sizes.values()) / 1e6:9.2f} M parameters, {state}; {source}")
    print(*(f"  {note}" for note in notes), sep="\n", flush=True)


# --------------------------------------------------------------------------- one step


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier(group=None):
    if world() > 1:
        dist.barrier(group)


def sum_over_processes(value: float, device: torch.device) -> float:
    value = torch.tensor(value, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(value)
    return value.item()


def schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero: the factor of the learning rate."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * settings.max_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.max_steps - warmup)))


def uses_bf16(settings: Settings, device: torch.device) -> bool:
    """As asked for; by itself on GPUs that have it, and on CPUs with avx512_bf16, which multiply it faster."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags


@contextmanager
def arithmetic(settings: Settings, device: torch.device):
    """The precision of a step; on a CPU unfused attention, because the fused backward is slow there."""
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(settings, device)):
        yield


def target_tokens_of_the_global_batch(micro_batches: list, device: torch.device) -> float:
    """Tokens that Eq. 6 sums over, in all micro-batches of all processes: every loss of the step is divided by it."""
    own = sum(len(packed.targets) for packed, _ in micro_batches)
    return sum_over_processes(own, device)


def train_step(model, optimizers, micro_batches, settings, device) -> tuple[float, float, int]:
    """One optimiser step on Batches.step's rows: Eq. 6 as the mean over the target tokens of the global batch.

    -> (loss, norm of the gradient before it was clipped, target tokens)
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)

    target_tokens = target_tokens_of_the_global_batch(micro_batches, device)
    nll_sum = 0.0
    for i, (packed, vision) in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == len(micro_batches) - 1)  # gradients meet once per step
        vision = [tensor.to(device, non_blocking=True) for tensor in vision or ()]
        with arithmetic(settings, device):
            nll, _ = model(packed.to(device), *vision)
        # Before the backward pass, and by the count of all: gradients are only ever added, over micro-batches here and
        # over processes by FSDP, so that their sum is the gradient of the global mean. Means of each micro-batch would
        # weigh a token by how few others came with it.
        (nll / target_tokens).backward()
        nll_sum += nll.detach().double()

    trained = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trained += group["params"]
    norm = nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()

    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    loss = sum_over_processes(nll_sum.item(), device) / target_tokens
    return loss, norm.item(), int(target_tokens)


# --------------------------------------------------------------------------- checkpoints


def training_state(model: VidReason, optimizers: list) -> dict[str, torch.Tensor]:
    """Everything that a step changes, by name: tensors only, so that a checkpoint is safetensors and no pickle.

    The schedule, the sample order and the state of the random generators follow from the step.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    state = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            for key, value in moments.items():
                state[f"optimizer.{names[p]}.{key}"] = value
    return state


def agreed(settings: Settings, batches: Batches) -> dict:
    """What must be the same for a resumed run to be the same run: decisive options, the data, stage 2's start."""
    agreement = {}
    for option in fields(settings):
        if option.compare:
            agreement[option.name] = getattr(settings, option.name)
    if settings.stage == 2:
        agreement["start"] = start_of(settings.init_from)
    agreement["data"] = batches.digest()
    return agreement


def start_of(model_dir: Path | str) -> str:
    """The fusion core that a stage 2 starts from, as a hash."""
    return sha256(Path(model_dir, "fusion.safetensors"))[:16]


def save_checkpoint(model, optimizers, out: Path, step: int, keep: int, agreement: dict):
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


def complete_checkpoints(out: Path) -> list[Path]:
    """Oldest first; what a killed save left behind ends in .partial."""
    folders = Path(out, "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if folder.suffix != ".partial")


def resume(model, optimizers, out: Path, agreement: dict, restart: bool) -> int:
    """Load the newest complete checkpoint, if any -> the number of steps that are done.

    VidReasonError: it is another run's, it cannot be read, or it holds other tensors than this run trains.
    """
    if rank() == 0:
        for leftover in out.glob("checkpoints/step-*" if restart else "checkpoints/*.partial"):
            shutil.rmtree(leftover)
    barrier()
    checkpoints = complete_checkpoints(out)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    refuse_another_run(newest, agreement)
    allocate_moments(optimizers)
    state = training_state(model, optimizers)
    reader = dcp.HuggingFaceStorageReader(str(newest))
    refuse_other_tensors(newest, reader, state)
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    return int(newest.name.removeprefix("step-"))


WAY_OUT = "give the same settings, another --output_dir, or --restart to begin anew"


def refuse_another_run(checkpoint: Path, agreement: dict):
    before = json.loads((checkpoint / "run.json").read_text())
    differing = []
    for name, value in agreement.items():
        if before.get(name) != value:
            differing.append(f"{name} was {before.get(name)}, is {value}")
    if differing:
        raise VidReasonError(f"this is another run: {', '.join(differing)} ({checkpoint}): {WAY_OUT}")


def refuse_other_tensors(checkpoint: Path, reader, state: dict[str, torch.Tensor]):
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged file makes safetensors, JSON and torch say
        raise VidReasonError(
            f"checkpoint cannot be read: {error} ({checkpoint}): delete it to go on from the one before"
        ) from error
    theirs = {key: (tuple(tensor.size), tensor.properties.dtype) for key, tensor in metadata.items()}
    ours = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}
    differing = [f"missing {key}" for key in ours.keys() - theirs]
    differing += [f"unexpected {key}" for key in theirs.keys() - ours]
    for key in ours.keys() & theirs:
        if theirs[key] != ours[key]:
            differing.append(f"{key} is {theirs[key]}, not {ours[key]}")
    if differing:
        raise VidReasonError(f"checkpoint does not fit: {', '.join(sorted(differing))} ({checkpoint}): {WAY_OUT}")


def allocate_moments(optimizers: list):
    """Optimisers make their moments in their first step; one with rate and gradients zero changes nothing else."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def save_model(model: VidReason, out: Path):
    """The model directory that infer.py reads, by rank 0, from the shards of all."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole = p.full_tensor() if isinstance(p, DTensor) else p.detach()
            state[name] = whole.cpu()
    if rank() == 0:
        model.save(out / "model", parts=("fusion", "lora"), state=state)


# --------------------------------------------------------------------------- the log of a run


class Log:
    """log.jsonl (one object per step), the progress bar, TensorBoard or W&B: on rank 0."""

    def __init__(self, out: Path, settings: Settings, done: int):
        self.path = out / "log.jsonl"
        kept = []
        if done and self.path.exists():
            kept = self.path.read_text().splitlines(keepends=True)[:done]
        self.path.write_text("".join(kept))  # steps after the checkpoint are done again
        self.file = open(self.path, "a")
        self.bar = tqdm(total=settings.max_steps, initial=done, desc=f"stage {settings.stage}", mininterval=2)
        self.report = reporter(settings, out, done)

    def write(self, step: int, row: dict):
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        self.bar.update()
        memory = f"{row['memory_gib']:.1f} GiB"
        if "mfu" in row:
            memory += f", MFU {row['mfu']:.2f}"
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:.0f} target tokens/s, {memory}")
        if self.report:
            self.report(step, row)

    def close(self):
        self.file.close()
        self.bar.close()
        plot(self.path)


def reporter(settings: Settings, out: Path, done: int) -> Callable[[int, dict], None] | None:
    """What takes each row of the log, too, if --report_to asks for it."""
    package = settings.report_to
    try:
        if package == "tensorboard":
            return tensorboard(out, done)
        if package == "wandb":
            return wandb_run(out, settings)
    except ImportError as error:
        raise VidReasonError(f"{package} is not installed (--report_to): pip install {package}") from error
    return None


def tensorboard(out: Path, done: int):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=done)

    def report(step, row):
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return report


def wandb_run(out: Path, settings: Settings):
    import wandb

    run_there = wandb.init(project="vidreason", dir=out, config=asdict(settings))

    def report(step, row):
        run_there.log(row, step=step)

    return report


def plot(path: Path):
    """loss.png beside log.jsonl."""
    from matplotlib.figure import Figure  # pyplot would choose how the whole process draws

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    window = max(1, len(rows) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, losses, lw=0.5, color="0.6", label="each step")
    axes.plot(range(window, len(rows) + 1), smooth, "k", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss, nats per target token", yscale="log")
    axes.legend()
    figure.savefig(path.with_name("loss.png"), dpi=120, bbox_inches="tight")


def memory_gib(device: torch.device) -> float:
    """The peak so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


# --------------------------------------------------------------------------- one run


def train(model, batches: Batches, optimizers, settings: Settings, device, out: Path, begin: int, agreement: dict):
    """Steps `begin` … max_steps, each logged, with checkpoints in between."""
    log = Log(out, settings, begin) if rank() == 0 else None
    seconds_per_token = 0.0  # at best, in the LLM, forward and backward
    if device.type == "cuda" and settings.max_steps > begin:
        seconds_per_token = flops_per_token(model) / matmul_ceiling(device)

    for step, micro_batches, waited in batches_ahead(batches, begin, settings.max_steps):
        start = time.perf_counter()
        torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, if an LLM has any, follows from the step
        set_rates(optimizers, schedule(step, settings))
        loss, norm, target_tokens = train_step(model, optimizers, micro_batches, settings, device)
        seconds = waited + time.perf_counter() - start

        if log:
            row = {
                "loss": loss,
                "lr": optimizers[0].param_groups[0]["lr"],
                "grad_norm": norm,
                "tokens_per_s": target_tokens / seconds,
                "samples_per_s": settings.batch / seconds,
                "data_wait": waited / seconds,
                "memory_gib": memory_gib(device),
            }
            if seconds_per_token:  # of this process; padding counts as work
                tokens = sum(packed.position_ids.numel() for packed, _ in micro_batches)
                row["mfu"] = seconds_per_token * tokens / seconds
            log.write(step + 1, row)
        if not math.isfinite(loss):
            raise VidReasonError(f"loss is {loss} at step {step + 1} ({out}): lower --lr, or look at the data")
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.max_steps:
            save_checkpoint(model, optimizers, out, step + 1, settings.keep, agreement)
    if log:
        log.close()


def batches_ahead(batches: Batches, begin: int, end: int) -> Iterator[tuple[int, list, float]]:
    """-> (step, its micro-batches, seconds they were waited for); while a step runs, a thread prepares the next."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(batches.step, begin)
        for step in range(begin, end):
            start = time.perf_counter()
            micro_batches = coming.result()
            waited = time.perf_counter() - start
            coming = thread.submit(batches.step, step + 1)
            yield step, micro_batches, waited


def set_rates(optimizers: list, factor: float):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def start_processes(settings: Settings) -> tuple[torch.device, int]:
    """-> (device of this process, its share of the machine's cores).

    torchrun sets RANK; a lone GPU is a group of one, for the mixed precision of FSDP2.
    """
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise VidReasonError("there is no GPU that torch can use (--device cuda): give --device cpu")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    elif cuda:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(settings.threads or share)
    return device, share


def run(given: Settings):
    """One stage from the command line to the model directory and what to type next."""
    settings = complete(given)
    device, cores = start_processes(settings)
    settings = fit_to_processes(settings, device, cores)
    out = Path(settings.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    # ranks may be hours apart before the first step, and NCCL gives up after ten minutes
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world() > 1 else None
    if in_toy_world(given):
        if rank() == 0:
            make_toy_world(settings)
        barrier(patient)

    samples = []
    for path in settings.data:
        samples += read_samples(path, settings.videos)
    half = device.type == "cuda" and uses_bf16(settings, device)  # on a CPU the toy's LLM costs no memory
    model = build(settings, device, torch.bfloat16 if half else torch.float32)
    cache, asked = features_of(samples, model, settings, device, patient)
    batches = Batches(settings, samples, cache, model.tokenizer, model.config.num_queries, rank(), world())
    if not settings.max_steps:
        steps = math.ceil(settings.epochs * batches.epoch_length / settings.batch)
        settings = replace(settings, max_steps=steps)
    notes = [
        f"stage {settings.stage}: {len(batches.videos)} videos ({asked - len(cache.videos)} of {asked} unreadable), "
        f"{settings.max_steps} steps of {settings.batch}, "
        f"on {world()} × {device.type}, {torch.get_num_threads()} threads each",
        *note_on_answers(samples),
    ]

    if settings.compile:
        for block in blocks_of(model.llm):
            block.compile(dynamic=True)
    if world() > 1 or device.type == "cuda":
        notes.append(parallelise(model, settings, device))
    optimizers = build_optimizers(model, settings)
    agreement = agreed(settings, batches)
    begin = resume(model, optimizers, out, agreement, settings.restart)
    if begin:
        notes.append(f"goes on after step {begin}")
    if rank() == 0:
        describe(model, settings, notes)
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


def note_on_answers(samples: list[Sample]) -> list[str]:
    """What should be known of answers before they are trained."""
    several = sum(bool(sample.also_right) for sample in samples)
    if not several:
        return []
    return [f"{several} questions have more than one right answer: the first one of each is trained"]


def features_of(samples: list[Sample], model, settings: Settings, device, patient) -> tuple[FeatureCache, int]:
    """Z_vision of the samples' videos, computed first where it is missing -> (cache of these videos, how many they are
    with those that cannot be read: these are named in bad_videos.jsonl, and are in the cache of no rank)."""
    names = sorted({sample.video for sample in samples if sample.video})[: settings.max_videos]
    encode_videos(
        model.directory,
        model.config,
        settings.videos,
        names,
        settings.features,
        settings.processes,
        rank=rank(),
        world=world(),
        device=str(device),
    )
    barrier(patient)
    cache = FeatureCache(settings.features)
    if rank() == 0:
        report_bad(cache, names, Path(settings.output_dir, "bad_videos.jsonl"), settings.max_bad_fraction)
    cache.videos = {name: cache.videos[name] for name in names if name in cache}
    return cache, len(names)


# --------------------------------------------------------------------------- the toy world, made when a run needs it

# Core-seconds: of a video with its text, of its Z_vision, of a step of 32 videos in either stage
PACE = {"world": 0.09, "vision": 0.5, 1: 0.7, 2: 2.2}
PACE_CORES = 2
PACE_MACHINE = "as measured on two cores of an Intel Xeon (2.1 GHz, avx512_bf16)"
Z_VISION_BYTES = 7400  # of one toy video


def in_toy_world(given: Settings) -> bool:
    return given.preset == "toy" and not given.data


def toy_missing(settings: Settings) -> tuple[int, int]:
    """-> how many videos have to be made before this run, and how many have no Z_vision yet"""
    count = settings.max_videos
    cache = FeatureCache(settings.features)
    names = [f"{sample_id('train', 0, i)}.mp4" for i in range(count)]
    videos = count if videos_in(TOY_DATA) < count else 0
    return videos, sum(name not in cache for name in names)


def toy_work(settings: Settings, videos: int, unseen: int) -> str:
    """Which recipe a run in the toy world follows, what of toy_missing it makes first, about how long it all takes."""
    stage = settings.stage
    kind = recipe(replace(settings, data=None))
    steps = settings.max_steps or math.ceil(settings.epochs * settings.max_videos / settings.batch)
    lines = [f"stage {stage} in the toy world, {kind} recipe: {settings.max_videos} videos, {steps} steps"]
    if kind == "short":
        full = DEFAULTS["full", stage]
        sizes = f"{full['max_videos']} videos, {full['max_steps']} steps"
        lines.append(f"the full recipe ({sizes}) is what follows `python -m toy.pretrain world`")
    if videos:
        lines.append(f"makes {videos} videos ({videos * MP4_BYTES / 1e6:.1f} MB): {shown(TOY_DATA)}")
    if unseen:
        size = unseen * Z_VISION_BYTES / 1e6
        lines.append(f"then Z_vision of {unseen} ({size:.1f} MB): {shown(settings.features)}")
    core_seconds = videos * PACE["world"] + unseen * PACE["vision"]
    first = core_seconds / PACE_CORES / 60  # minutes
    end = (core_seconds + steps * settings.batch / 32 * PACE[stage]) / PACE_CORES / 60
    lines.append(f"about {first:.1f} minutes to the first loss, {end:.1f} to the end, {PACE_MACHINE}")
    return "\n  ".join(lines)


def make_toy_world(settings: Settings):
    """Say what this run is and will make; then make the videos of it that are not there. On one rank."""
    print(toy_work(settings, *toy_missing(settings)), flush=True)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the others only wait
    make_training_world(TOY_DATA, settings.max_videos, settings.processes * ranks_here)


# --------------------------------------------------------------------------- what to type next

# of stage 1's options those that hold for stage 2; the rest has a default of its own there
KEPT = (
    "preset", "videos", "max_videos", "features", "max_bad_fraction", "seed", "save_every", "keep",
    "device", "precision", "shard", "checkpointing", "compile", "report_to", "threads", "processes",
)  # fmt: skip
KEPT_IN_TOY_WORLD = ("max_steps", "batch")  # a trial run stays one


def holds_another_stage2(folder: Path, stage1: Path) -> bool:
    """Whether in `folder` a stage 2 began from another fusion core than that of the model directory `stage1`."""
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        return False
    return json.loads((checkpoints[-1] / "run.json").read_text()).get("start") != start_of(stage1)


def kept_options(given: Settings) -> list[str]:
    """What was given to stage 1 and holds for stage 2, as one types it."""
    names = KEPT
    if in_toy_world(given):
        names += KEPT_IN_TOY_WORLD
    options = []
    for name in names:
        value = getattr(given, name)
        if value == getattr(Settings(), name):
            continue
        options.append(f"--{name}")
        if name in ("videos", "features"):
            options.append(shown(value))
        elif value is not True:
            options.append(str(value))
    return options


def stage2_options(given: Settings, out: Path) -> list[str]:
    """What stage 2 needs on its command line after this stage 1."""
    options = kept_options(given)
    if given.data:
        options += ["--data", "QUESTIONS.jsonl"]
    usual = ROOT / "runs" / "stage2"
    folder = usual
    if given.output_dir:
        options += ["--init_from", shown(out / "model")]
        folder = out.with_name(f"{out.name}-stage2")
    while holds_another_stage2(folder, out / "model"):
        folder = folder.with_name(f"{folder.name}-again")
    if folder != usual:
        options += ["--output_dir", shown(folder)]
    return options


def next_commands(given: Settings, settings: Settings, video: str) -> list[str]:
    """What to type after this run, in this directory: stage 2 after stage 1, and a question about one of the videos."""
    script = Path(sys.argv[0])
    out = Path(settings.output_dir)
    clip = ROOT / "toy" / "clips" / "red-egg-breaks-0.mp4"
    if not in_toy_world(given):
        clip = Path(settings.videos, video)
        if file_of(clip).suffix == ".tar":
            clip = Path("CLIP.mp4")  # infer.py reads no tar
    question = CAPTION_PROMPT if settings.stage == 1 else "why?"
    infer = f"{python()} {shown(script.with_name('infer.py'))}"
    commands = [f'{infer} {shown(clip)} "{question}" --model {shown(out / "model")}']
    if settings.stage == 1:
        options = " ".join(["--stage 2", *stage2_options(given, out)])
        commands.insert(0, f"{launcher()} {shown(script)} {options}")
    return commands


# --------------------------------------------------------------------------- --plan: what a run would need


def plan_run(settings: Settings):
    """--plan: both stages with what the command line says, else their defaults; without --max_videos the paper's."""
    both = [complete(replace(settings, stage=stage)) for stage in (1, 2)]
    given = {"batch": [of_stage.batch for of_stage in both], "mfu": settings.mfu}
    if settings.micro_batch:
        given["micro_batch"] = [settings.micro_batch] * 2
    if settings.preset == "toy":
        given["text_tokens"] = (40, 200)
    if both[0].max_videos:
        given["videos"] = [of_stage.max_videos for of_stage in both]
        given["pairs"] = given["videos"]
    given["epochs"] = []
    for of_stage, pairs in zip(both, given.get("pairs", (110e6, 260e3)), strict=True):
        given["epochs"].append(of_stage.epochs or of_stage.max_steps * of_stage.batch / pairs)
    print_plan(plan(*config_of(both[0]), settings.world_size, **given))
    if in_toy_world(settings):
        one, two = both
        print("\nWithout a GPU:", toy_work(one, *toy_missing(one)), toy_work(two, 0, 0), sep="\n")


def print_plan(numbers: dict):
    """What plan.plan returned, as text."""
    print(headline_of(numbers))
    for table in tables_of(numbers):
        rows = []
        for name, *cells in table.rows:
            remark = [f"  {cell}" for cell in cells[len(table.heads) :]]
            rows.append([f"  {name.replace('_', ' ')}", *cells[: len(table.heads)], *remark])
        print()
        print_columns([table.title, *table.heads], rows, widths=[42, *(13 for _ in table.heads), 0])
        if table.note:
            print(table.note)
    print()
    print(assumptions_of(numbers))


class TrainParser(Parser, HfArgumentParser):
    """HfArgumentParser makes the options from Settings, Parser the errors."""


def main():
    parser = TrainParser(Settings, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    disable_progress_bar()  # of loading weights, once per process
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that one process saves is meant so
    if settings.plan:
        plan_run(settings)
    else:
        run(settings)


if __name__ == "__main__":
    guarded(main)
