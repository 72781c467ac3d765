"""What the benchmarks share: ours and the alternative take turns, and a row of the table says how they did."""

import statistics
import time
from functools import partial

import peft
import torch
from torch import nn

import train
from vidreason import Conversation, pack


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(functions, options, rounds=None):
    """Seconds of each turn of each function; the first turn warms up and does not count."""
    turns = rounds or options.rounds
    times = [[] for _ in functions]
    for _ in range(1 + turns):
        for function, seconds in zip(functions, times, strict=True):
            start = now(options.device)
            function()
            seconds.append(now(options.device) - start)
    return [seconds[1:] for seconds in times]


def medians(*args):
    return [statistics.median(times) for times in take_turns(*args)]


def row(name, ours, alternative, unit, **more):
    return {"name": name, "unit": unit, "ours": ours, "alternative": alternative, "ratio": ours / alternative, **more}


def race(name, ours, alternative, count, unit, options, **more):
    """A row of rates, where each function does `count` things per turn. turns: the extremes of the ratio."""
    our_times, their_times = take_turns((ours, alternative), options)
    ratios = [theirs / ours for ours, theirs in zip(our_times, their_times, strict=True)]
    our_rate = count / statistics.median(our_times)
    their_rate = count / statistics.median(their_times)
    return row(name, our_rate, their_rate, unit, turns=[min(ratios), max(ratios)], **more)


def bare_steps(name, llm, lora, packed, num_queries, ours, step, settings, options):
    """The rows that compare our steps with those of transformers and peft: causal text, logits everywhere."""
    llm = peft.get_peft_model(llm, lora).train()
    trained = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr)
    ids = torch.randint(llm.config.vocab_size, packed.position_ids.shape).to(options.device)
    texts = []  # as long as rows with vision: words stand in for E_vision
    for words in ids.tolist():
        prefix, target = words[:num_queries], words[num_queries:]
        texts.append(Conversation([([], target)], prefix))

    def bare():
        optimizer.zero_grad(set_to_none=True)
        with train.arithmetic(settings, options.device):
            loss = llm(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    text_alone = partial(step, [(pack(texts, 0), None)])
    yield race(name, text_alone, bare, ids.numel(), "tokens/s", options)
    yield race(f"{name}_and_fusion", ours, bare, ids.numel(), "tokens/s", options)
