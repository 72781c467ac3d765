"""The loop that trains the three toy foundation models."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


def train(
    log_path: Path,
    parameters: list[nn.Parameter],
    lr: float,
    steps: int,
    loss_of_step: Callable[[int], tuple[torch.Tensor, dict]],
    watch: Callable[[int], dict],
    weight_decay: float = 0.05,
):
    """The loop that the three models share: AdamW, clipping, cosine, progress bar, a line of log now and then.

    loss_of_step(step) -> loss, {figure: value}; watch(step) -> more figures (validation), and may save.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    recent = defaultdict(list)  # figure -> its values since the last line of log
    began = time.time()
    log_every = min(100, max(1, steps // 4))
    with open(log_path, "w") as log, tqdm(total=steps, desc=log_path.stem, mininterval=5) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, steps)
            # on a CPU the backward of fused attention takes half of a step; two plain products take a fifth
            with autocast(), sdpa_kernel(SDPBackend.MATH):
                loss, figures = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.update()

            for name, value in {"loss": loss, **figures}.items():
                recent[name].append(float(value))
            if (step + 1) % log_every == 0 or step + 1 == steps:
                figures = {name: round(float(np.mean(values)), 4) for name, values in recent.items()}
                minutes = round((time.time() - began) / 60, 2)
                figures |= watch(step + 1)
                recent.clear()
                log.write(json.dumps({"step": step + 1, "minutes": minutes, **figures}) + "\n")
                log.flush()
                bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in figures.items())[:150])


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, constant for half of the run, then a cosine to `floor`."""
    warm = min(1.0, (step + 1) / warmup)
    late = max(0.0, step / steps - 0.5) * 2
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * late)))


def autocast() -> torch.autocast:
    """bf16 where the processor multiplies it faster: 2.5 × with avx512_bf16."""
    cpu = Path("/proc/cpuinfo")
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu.exists() and "avx512_bf16" in cpu.read_text())


def millions(model: nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6
