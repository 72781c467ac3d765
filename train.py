"""Train the fusion core (stage 1), then the fusion core and LoRA adapters of the LLM (stage 2): §3.4 of the paper.

    python train.py --stage 1                      # toy world: captions, everything else frozen
    python train.py --stage 2                      # toy world: questions and answers, from the newest stage-1 run

Both read Z_vision from `--features`, computed once (and now, if it is not there yet). The loss is the mean over the
target tokens of the global batch (Eq. 6), however that batch is split into micro-batches.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise
import argparse
import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import HfArgumentParser

from data import ROOT, TOY_MODEL, FeatureCache, Parser, encode_videos, guarded, read_jsonl, write_familiar
from vidreason import PRESETS, Conversation, VidReason, VidReasonError, collate_features, encode_pair, pack, read_config

TOY_DATA = ROOT / "runs" / "world" / "train"


@dataclass
class Settings:
    stage: int = field(metadata={"help": "1: align the fusion core on captions; 2: instruction tuning with LoRA."})
    preset: str = field(
        default="toy", metadata={"help": "Model sizes and this stage's defaults.", "choices": list(PRESETS)}
    )
    model: str | None = field(
        default=None, metadata={"help": "Model directory that names the frozen parts (default: toy/weights)."}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Run whose fusion core stage 2 starts from (default: newest stage 1)."}
    )
    data: list[str] | None = field(default=None, metadata={"help": "JSONL files of records, see data.py."})
    videos: str = field(
        default=str(TOY_DATA), metadata={"help": "Folder that the records' video names are relative to."}
    )
    max_videos: int | None = field(default=None, metadata={"help": "Use the first so many videos of the data only."})
    features: str | None = field(
        default=None, metadata={"help": "Folder of Z_vision shards; missing ones are computed first."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where log.jsonl, loss.png and model/ go (default: runs/stageN)."}
    )
    max_steps: int | None = field(default=None, metadata={"help": "Optimiser steps."})
    batch: int | None = field(default=None, metadata={"help": "Videos per optimiser step."})
    micro_batch: int | None = field(
        default=None, metadata={"help": "Videos per forward pass (default: all of the batch)."}
    )
    pairs_per_video: int | None = field(default=None, metadata={"help": "Questions of one video that share a row."})
    lr: float | None = field(default=None, metadata={"help": "Peak learning rate."})
    lora_lr: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the adapters (default: the same)."}
    )
    muon_lr: float | None = field(
        default=None, metadata={"help": "If given, the fusion core's matrices are trained by Muon at this peak rate."}
    )
    warmup: float | None = field(
        default=None, metadata={"help": "Warm-up: steps if at least 1, else a share of the run."}
    )
    weight_decay: float | None = field(default=None, metadata={"help": "AdamW's; none on norms, biases and queries."})
    text_share: float | None = field(
        default=None, metadata={"help": "Text-only records per video record in a batch (stage 2's replay)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialisation and sample order."})
    threads: int = field(default=os.cpu_count() or 1, metadata={"help": "CPU threads."})
    processes: int = field(default=os.cpu_count() or 1, metadata={"help": "Processes that compute missing features."})


# The paper's values are those of preset "paper"; the toy's come from its validation split.
DEFAULTS = {
    ("toy", 1): dict(
        max_videos=5500,
        max_steps=1500,
        batch=32,
        pairs_per_video=1,
        lr=1e-3,
        muon_lr=0.02,
        warmup=100,
        weight_decay=0.02,
        text_share=0.0,
    ),
    ("toy", 2): dict(
        max_videos=8000,
        max_steps=1300,
        batch=32,
        pairs_per_video=7,
        lr=1e-3,
        muon_lr=0.01,
        warmup=100,
        weight_decay=0.02,
        text_share=0.25,
    ),
    ("paper", 1): dict(batch=2048, pairs_per_video=1, lr=1e-4, warmup=2000, weight_decay=0.05, text_share=0.0),
    ("paper", 2): dict(batch=256, pairs_per_video=1, lr=2e-5, warmup=0.03, weight_decay=0.05, text_share=0.0),
}


def complete(settings: Settings) -> Settings:
    """Fill what was not given on the command line from the preset and stage."""
    if settings.stage not in (1, 2):
        raise VidReasonError(f"there is no stage {settings.stage} (--stage): choose 1 or 2; stage 0 is toy/pretrain.py")
    if settings.preset != "toy" and not settings.model:
        where = "--model): give a directory whose config.json names the encoder, the SAM and the LLM"
        raise VidReasonError(f"preset {settings.preset} needs a model directory ({where}")
    defaults = DEFAULTS.get((settings.preset, settings.stage), DEFAULTS["paper", settings.stage])
    filled = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    settings = replace(settings, **filled)
    for name in ("batch", "micro_batch", "pairs_per_video", "max_steps", "max_videos", "threads", "processes"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise VidReasonError(f"{value} is too few (--{name}): give at least 1")
    names = ["captions.jsonl"] if settings.stage == 1 else ["samples.jsonl", "captions.jsonl", "text.jsonl"]
    return replace(
        settings,
        model=settings.model or str(TOY_MODEL),
        data=settings.data or [str(TOY_DATA / n) for n in names],
        features=settings.features or str(ROOT / "runs" / "features"),
        micro_batch=settings.micro_batch or settings.batch,
        output_dir=settings.output_dir or str(ROOT / "runs" / f"stage{settings.stage}"),
    )


# --------------------------------------------------------------------------- data


class Batches:
    """Which samples make up step k: a pure function of (seed, k), so that a resumed run needs no loader state."""

    def __init__(self, settings, model, samples, names):
        self.settings, self.cache, tokenizer = settings, FeatureCache(settings.features), model.tokenizer
        self.num_queries = model.config.num_queries
        by_video, self.text = {}, []
        for s in tqdm(samples, desc="tokens", mininterval=2):
            if s.video is None:
                context = tokenizer(s.context, add_special_tokens=False).input_ids
                self.text.append(Conversation([encode_pair(tokenizer, s.question, s.answer)], context))
            elif s.video in names and s.video in self.cache:
                by_video.setdefault(s.video, []).append(encode_pair(tokenizer, s.question, s.answer))
        self.videos = sorted(by_video.items())
        if not self.videos:
            raise VidReasonError(f"no sample has a readable video ({settings.videos}): check --data and --videos")

    def step(self, k):
        """→ micro-batches [(Packed, vision | None)] and their number of target tokens"""
        s, rng = self.settings, np.random.default_rng((self.settings.seed, k))
        epochs, places = np.divmod(np.arange(k * s.batch, (k + 1) * s.batch), len(self.videos))
        order = {e: np.random.default_rng((s.seed, e, 1)).permutation(len(self.videos)) for e in set(epochs.tolist())}
        chosen = [self.videos[order[e][place]] for e, place in zip(epochs.tolist(), places, strict=True)]
        chosen = [
            (name, [pairs[i] for i in rng.permutation(len(pairs))[: s.pairs_per_video]]) for name, pairs in chosen
        ]
        chosen.sort(key=lambda c: sum(len(p) + len(t) for p, t in c[1]))  # rows of one length waste no padding
        micro = []
        for i in range(0, s.batch, s.micro_batch):
            part = chosen[i : i + s.micro_batch]
            vision = collate_features([self.cache[name] for name, _ in part])
            micro.append((pack([Conversation(pairs) for _, pairs in part], self.num_queries), vision))
        if self.text and s.text_share:
            picks = rng.integers(len(self.text), size=round(s.batch * s.text_share))
            micro.append((pack([self.text[i] for i in picks], 0), None))
        return micro, sum(len(packed.targets) for packed, _ in micro)


# --------------------------------------------------------------------------- one run


def newest_stage1(settings):
    runs = sorted(Path(ROOT / "runs").glob("stage1*/model/fusion.safetensors"), key=lambda p: p.stat().st_mtime)
    if not settings.init_from and not runs:
        raise VidReasonError(
            "no stage-1 run to start from (runs/): run `python train.py --stage 1` first, or give --init_from"
        )
    return Path(settings.init_from) if settings.init_from else runs[-1].parent


def build(settings):
    """The model with what this stage trains, from the model directory (stage 1) or a stage-1 run (stage 2)."""
    torch.manual_seed(settings.seed)
    if settings.stage == 1:
        directory = Path(settings.model)
        config = PRESETS["toy"] if settings.preset == "toy" else read_config(directory)
        model = VidReason.create(config, directory)
    else:
        model = VidReason.load(newest_stage1(settings))
        model.add_lora()
    return model.freeze(settings.stage)


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


def schedule(step, settings):
    """Linear warm-up, then a cosine to zero: the factor of the learning rate."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * settings.max_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.max_steps - warmup)))


def describe(model):
    """What is frozen, what is trained: printed before step 1."""
    for part in ("encoder", "sam", "fusion", "llm"):
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        print(
            f"  {part:8s}{sum(p.numel() for p in parameters) / 1e6:8.2f} M parameters, {trained / 1e6:.2f} M trained",
            flush=True,
        )


def train_step(model, optimizers, micro, tokens):
    """One optimiser step over a global batch: Eq. 6 divided by all its target tokens → (loss, gradient norm)."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for packed, vision in micro:
        with precision():
            nll, _ = model(packed, *(vision or ()))
        (nll / tokens).backward()
        total += nll.item()
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return total / tokens, norm.item()


@contextmanager
def precision():
    """bf16 where the processor multiplies it (2.5 ×); unfused attention: the fused backward is slow on CPUs."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled="avx512_bf16" in flags):
        yield


def plot(out):
    """loss.png from log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([x["step"] for x in log], [x["loss"] for x in log], lw=0.5, color="0.6", label="each step")
    window = max(1, len(log) // 50)
    smooth = np.convolve([x["loss"] for x in log], np.ones(window) / window, "valid")
    axes.plot(range(window, len(log) + 1), smooth, "k", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss, nats per target token", yscale="log")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def run(settings):
    torch.set_num_threads(settings.threads)
    out = Path(settings.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    samples = [s for path in settings.data for s in read_jsonl(path)]
    model = build(settings)
    names = sorted({s.video for s in samples if s.video})[: settings.max_videos]
    encode_videos(model.directory, model.config, settings.videos, names, settings.features, settings.processes)
    batches = Batches(settings, model, samples, set(names))
    settings.max_steps = settings.max_steps or 4 * len(batches.videos) // settings.batch
    print(
        f"stage {settings.stage}: {len(batches.videos)} videos, {settings.max_steps} steps of {settings.batch}, "
        f"{settings.threads} threads"
    )
    describe(model)
    optimizers = build_optimizers(model, settings)
    began = time.time()
    with (
        open(out / "log.jsonl", "w") as log,
        tqdm(total=settings.max_steps, desc=f"stage {settings.stage}", mininterval=2) as bar,
    ):
        for step in range(settings.max_steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * schedule(step, settings)
            start = time.time()
            micro, tokens = batches.step(step)
            loss, norm = train_step(model, optimizers, micro, tokens)
            seconds = time.time() - start
            log.write(
                json.dumps(
                    {
                        "step": step + 1,
                        "loss": loss,
                        "lr": optimizers[0].param_groups[0]["lr"],
                        "grad_norm": norm,
                        "tokens_per_s": tokens / seconds,
                        "samples_per_s": settings.batch / seconds,
                    }
                )
                + "\n"
            )
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:.0f} target tokens/s")
    plot(out)
    model.eval()
    model.save(out / "model", parts=("fusion", "lora"))
    write_familiar(batches.cache, out / "model" / "familiar.safetensors")
    print(f"stage {settings.stage} done in {(time.time() - began) / 60:.1f} minutes: {out / 'model'}")


def main():
    class TrainParser(Parser, HfArgumentParser):
        """HfArgumentParser makes the options from Settings, Parser the errors."""

    parser = TrainParser(Settings, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    run(complete(settings))


if __name__ == "__main__":
    guarded(main)
