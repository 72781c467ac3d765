"""Stage 0, vision: the video transformer and a SAM, from scratch."""

import math
import multiprocessing
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from toy import language, world
from toy.loop import autocast, train
from toy.videos import arrays_of
from vidreason import PRESETS, VideoTransformer, build_sam, segment

SLOTS, NONE = 4, 0  # at most four things on a table; class 0 of a partner: nobody
COLOUR_OF = {c: i for i, c in enumerate(language.COLOUR_ORDER)}
EVENTS = ["start", "hit", "wall", *world.EFFECTS]
FRAMES = 4  # frames per clip of the toy preset
THING_HEADS = {"kind": 8, "colour": 6, "state": 3, "hits": 7, "hit_by": 7, "next_hits": 7, "next_hit_by": 7}  # classes
CLIP_HEADS = {"count": 5, "moving": 5, "first": 7}


def labels_of(job):
    """What a good video encoder should know, for each clip of one video: classes per thing, numbers, events.

    `next_hits`/`next_hit_by` look up to .75 s beyond the clip's last frame: an encoder that sees motion sees where it
    leads. Partners are named by colour, never by kind, so nothing here ties two kinds together.
    """
    split, seed, index = job
    clip = world.make_clip(seed, index, split)
    clips = world.NUM_FRAMES // FRAMES
    classes = np.full((clips, SLOTS, len(THING_HEADS)), -1, np.int64)
    numbers, events = np.zeros((clips, SLOTS, 6), np.float32), np.zeros((clips, SLOTS, len(EVENTS)), np.float32)
    whole = np.zeros((clips, len(CLIP_HEADS)), np.int64)
    colour = [COLOUR_OF[t.colour] for t in clip.things]
    for c in range(clips):
        first, last = c * FRAMES, c * FRAMES + FRAMES - 1
        seen = [e for e in clip.events if first < math.ceil(e.time * world.FPS) <= last]
        soon = [e for e in clip.events if last < e.time * world.FPS < last + 3]
        for i, thing in enumerate(clip.things):
            partner = [NONE] * 4
            for at, log in ((0, seen), (2, soon[::-1])):
                for e in log:
                    if e.type == "hit" and i in (e.subject, e.object):
                        partner[at + (i == e.object)] = 1 + colour[e.object if i == e.subject else e.subject]
            classes[c, i] = world.KINDS.index(thing.kind), colour[i], min(int(clip.state[last - 1, i]), 2), *partner
            place = clip.trajectory[first : last + 1, i]
            numbers[c, i] = *((place[2] - 0.5) * 3), *((place[3] - place[2]) * 10), *((place[1] - place[0]) * 10)
            for e in seen:
                events[c, i, EVENTS.index(e.type)] += e.subject == i
        moving = [e.subject for e in seen if e.direction]
        whole[c] = len(clip.things), len(set(moving)), 1 + colour[moving[0]] if moving else NONE
    return classes, numbers, events.clip(max=1), whole


class EncoderTask:
    """Batches and losses of the encoder: every thing's token (mask-pooled, as Eq. 2 will) and every clip's [CLS]."""

    def __init__(self, folder, split, seed, count, processes, rng):
        (self.frames, self.owner), self.rng = arrays_of(folder), rng
        with multiprocessing.Pool(processes) as pool:
            jobs = [(split, seed, i) for i in range(count or len(self.frames))]
            found = list(tqdm(pool.imap(labels_of, jobs, 64), total=len(jobs), desc=f"{split} labels"))
        self.classes, self.numbers, self.events, self.whole = (torch.from_numpy(np.stack(x)) for x in zip(*found))
        active = self.events.flatten(2).any(-1) | (self.numbers[..., 2:].abs().amax((-2, -1)) > 0.05)
        self.active, self.all = active.nonzero().numpy(), np.argwhere(np.ones(active.shape, bool))

    def batch(self, size):
        """→ clips float (B, F, 3, H, W) in [0, 1], owner (B, F, H, W), labels"""
        pick = np.concatenate(
            [
                source[self.rng.integers(len(source), size=n)]
                for source, n in ((self.active, size * 3 // 4), (self.all, size - size * 3 // 4))
            ]
        )
        spans = [(v, slice(c * FRAMES, (c + 1) * FRAMES)) for v, c in pick]
        frames = torch.from_numpy(np.stack([self.frames[v, s] for v, s in spans])).float() / 255
        owner = torch.from_numpy(np.stack([self.owner[v, s] for v, s in spans]))
        v, c = torch.from_numpy(pick).T
        return frames, owner, (self.classes[v, c], self.numbers[v, c], self.events[v, c], self.whole[v, c])


class EncoderHeads(nn.Module):
    """Linear read-outs that exist during stage 0 only."""

    def __init__(self, width):
        super().__init__()
        self.thing = nn.Linear(width, sum(THING_HEADS.values()) + 6 + len(EVENTS))
        self.clip = nn.Linear(width, sum(CLIP_HEADS.values()))
        self.patch = nn.Linear(width, 9 + 7)


def encoder_loss(encoder, heads, frames, owner, labels):
    classes, numbers, events, whole = labels
    cls, patches = encoder(frames)  # (B, D), (B, T, P, D)
    side = int(patches.shape[2] ** 0.5)
    pixels = frames.shape[-1] // side
    share = torch.stack([F.avg_pool2d((owner == i + 1).float(), pixels) for i in range(SLOTS)], 1).flatten(
        3
    )  # (B, 4, F, P)
    key = share[:, :, FRAMES // 2]  # the keyframe's masks, as fractions of patches
    area = key.sum(-1)
    tokens = key @ patches[:, FRAMES // 2 // 2].float() / area.clamp(min=1e-3)[..., None]
    visible = (area > 0.3) & (classes[..., 0] >= 0)
    out = heads.thing(tokens[visible]).float()
    classes, numbers, events = classes[visible], numbers[visible], events[visible]
    loss, figures, at = 0.0, {}, 0
    for k, (name, n) in enumerate(THING_HEADS.items()):
        truth, logits = classes[:, k], out[:, at : at + n]
        weight = torch.ones(n)
        if n == 7:
            weight[NONE] = 0.4
        loss = loss + F.cross_entropy(logits, truth, weight)
        rare = truth != 0 if n == 7 or name == "state" else truth >= 0
        figures[name] = (logits.argmax(-1) == truth)[rare].float().mean() if rare.any() else 1.0
        at += n
    moving = 1 + 3 * (numbers[:, 2:].abs().amax(-1) > 0.05).float()
    loss = loss + 2 * ((out[:, at : at + 6] - numbers).square().mean(-1) * moving).mean()
    figures["speed error"] = (out[:, at + 2 : at + 4] - numbers[:, 2:4]).abs().mean() / 10
    loss = loss + 5 * F.binary_cross_entropy_with_logits(out[:, at + 6 :], events)
    found = (out[:, at + 6 :] > 0).float()
    figures["event F1"] = 2 * (found * events).sum() / (found.sum() + events.sum()).clamp(min=1)
    summary = heads.clip(cls).float().split(list(CLIP_HEADS.values()), -1)
    for k, logits in enumerate(summary):
        loss = loss + 0.5 * F.cross_entropy(logits, whole[:, k])
    dense = share[:, :, 1::2].transpose(1, 2)  # (B, T, 4, P): second frame of each tubelet
    top, who = dense.max(2)
    kind, colour = (
        torch.where(top > 0.3, labels[0][:, :, k].clamp(min=0).gather(1, who.flatten(1)).view_as(who) + 1, 0)
        for k in (0, 1)
    )
    kinds, colours = heads.patch(patches).float().split([9, 7], -1)
    for logits, truth in ((kinds, kind), (colours, colour)):
        weight = torch.ones(logits.shape[-1])
        weight[0] = 0.1
        loss = loss + 0.5 * F.cross_entropy(logits.flatten(0, -2), truth.flatten(), weight)
    return loss, figures


def pretrain_encoder(args):
    torch.manual_seed(args.seed)
    encoder = VideoTransformer(PRESETS["toy"])
    heads = EncoderHeads(PRESETS["toy"].encoder_width)
    task = EncoderTask(
        args.runs / "world" / "train", "train", args.seed, args.clips, args.processes, np.random.default_rng(args.seed)
    )
    val = EncoderTask(args.runs / "world" / "val", "val", args.seed, None, args.processes, np.random.default_rng(1))
    parameters = list(encoder.parameters()) + list(heads.parameters())
    print(
        f"encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, "
        f"{len(task.all)} clips, {len(task.active)} with motion"
    )

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        save_file({k: v.half() for k, v in encoder.state_dict().items()}, args.runs / "encoder.safetensors")
        encoder.eval()
        with torch.no_grad(), autocast():
            figures = [encoder_loss(encoder, heads, *val.batch(64))[1] for _ in range(6)]
        encoder.train()
        return {"val": {k: round(float(np.mean([f[k] for f in figures])), 3) for k in figures[0]}}

    train(
        args.runs / "encoder.jsonl",
        parameters,
        args.lr,
        args.steps,
        lambda step: encoder_loss(encoder, heads, *task.batch(args.batch)),
        watch,
    )
    save_file({k: v.half() for k, v in encoder.state_dict().items()}, args.weights / "encoder.safetensors")


def sam_batch(frames, owner, rng, images, points):
    """→ pictures float (B, 3, S, S) in 0…255, points (B, N, 1, 2) as x, y in pixels, targets (B, N, S, S), real (B, N).

    A fifth of the points fall on the bare table (real False): their predicted IoU is trained to 0, so that the grid's
    many misses are dropped.
    """
    which = np.stack([rng.integers(len(frames), size=images), rng.integers(world.NUM_FRAMES, size=images)], 1)
    pictures = np.stack([frames[v, f] for v, f in which])
    places, targets, real = (
        np.zeros((images, points, 1, 2), np.float32),
        np.zeros((images, points, *owner.shape[2:]), np.float32),
        np.zeros((images, points), bool),
    )
    for b, (v, f) in enumerate(which):
        seen = owner[v, f]
        present = np.unique(seen[seen > 0])
        for n in range(points):
            thing = rng.choice(present) if n < points * 4 // 5 and len(present) else 0
            ys, xs = np.where(seen == thing)
            at = rng.integers(len(ys))
            places[b, n, 0] = xs[at] + 0.5, ys[at] + 0.5
            real[b, n] = thing > 0
            targets[b, n] = (seen == thing) & (thing > 0)
    return (
        torch.from_numpy(pictures).float(),
        torch.from_numpy(places),
        torch.from_numpy(targets),
        torch.from_numpy(real),
    )


def sam_loss(sam, pictures, places, targets, real):
    """Focal + dice on the best of the three masks, and the regressed IoU (Kirillov et al., 2023, §3)."""
    embeddings = sam.image_encoder((pictures - sam.pixel_mean) / sam.pixel_std)
    position = sam.prompt_encoder.get_dense_pe()
    masks, ious = [], []
    for embedding, place in zip(embeddings, places):
        sparse, dense = sam.prompt_encoder(points=(place, torch.ones(place.shape[:2])), boxes=None, masks=None)
        m, i = sam.mask_decoder.predict_masks(embedding[None], position, sparse, dense)
        masks.append(m[:, 1:])  # the three "multimask" outputs that AMG reads
        ious.append(i[:, 1:])
    logits, iou = torch.stack(masks).float(), torch.stack(ious).float()  # (B, N, 3, h, w), (B, N, 3)
    small = F.interpolate(targets, size=logits.shape[-2:], mode="area")[:, :, None].expand_as(logits)
    p = logits.sigmoid()
    focal = (F.binary_cross_entropy_with_logits(logits, small, reduction="none") * (p - small).square()).mean(
        (-2, -1)
    ) * 20
    dice = 1 - (2 * (p * small).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + small.sum((-2, -1)) + 1)
    on, truth = logits > 0, small > 0.5
    exact = (on & truth).sum((-2, -1)) / (on | truth).sum((-2, -1)).clamp(min=1) * real[..., None]
    each = focal + dice * real[..., None]
    best = each.min(-1).values + 0.1 * each.mean(-1)
    figures = {"IoU": exact.max(-1).values[real].mean(), "IoU error": (iou - exact).abs().mean()}
    return (best * (real + 0.2 * ~real)).mean() + 2 * (iou - exact).square().mean(), figures


def mask_quality(sam, config, frames, owner, count):
    """The whole automatic path on `count` keyframes: mean best IoU per thing, share found, false masks per picture."""
    best, false, began = [], [], time.time()
    for v in range(min(count, len(frames))):
        f = v % world.NUM_FRAMES
        masks = segment(frames[v, f].transpose(1, 2, 0), sam, config).numpy()
        truth = [owner[v, f] == i for i in range(1, SLOTS + 1) if (owner[v, f] == i).sum() > 30]
        iou = np.array([[(m & t).sum() / (m | t).sum() for m in masks] for t in truth]).reshape(len(truth), len(masks))
        best += list(iou.max(1)) if len(masks) else [0.0] * len(truth)
        false.append(int((iou.max(0) < 0.5).sum()) if len(truth) and len(masks) else len(masks))
    return {
        "mIoU": round(float(np.mean(best)), 3),
        "recall": round(float(np.mean(np.array(best) > 0.5)), 3),
        "false masks": round(float(np.mean(false)), 3),
        "ms per keyframe": round((time.time() - began) / min(count, len(frames)) * 1e3),
    }


def pretrain_sam(args):
    torch.manual_seed(args.seed)
    sam, rng = build_sam(PRESETS["toy"]), np.random.default_rng(args.seed)
    data = {split: arrays_of(args.runs / "world" / split) for split in ("train", "val")}
    print(f"SAM: {sum(p.numel() for p in sam.parameters()) / 1e6:.2f} M parameters")

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        save_file({k: v.half() for k, v in sam.state_dict().items()}, args.runs / "sam.safetensors")
        sam.eval()
        quality = mask_quality(sam, PRESETS["toy"], *data["val"], 60 if step < args.steps else 200)
        sam.train()
        return quality

    train(
        args.runs / "sam.jsonl",
        list(sam.parameters()),
        args.lr,
        args.steps,
        lambda step: sam_loss(sam, *sam_batch(*data["train"], rng, args.batch, args.points)),
        watch,
        weight_decay=0.01,
    )
    save_file({k: v.half() for k, v in sam.state_dict().items()}, args.weights / "sam.safetensors")
