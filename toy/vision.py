"""Stage 0, vision: the video transformer and a SAM, from scratch.

Both learn from labels that real videos lack: the encoder from the simulator's (`labels_of`), the SAM from the
renderer's masks. Shapes: B clips or pictures, F frames and P patches per frame, T tubelets of two frames, D_v the
encoder's width, four slots for the things on a table, N points per picture.
"""

import math
import multiprocessing
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from toy import language, world
from toy.loop import autocast, millions, train
from toy.videos import arrays_of
from vidreason import PRESETS, Config, VideoTransformer, build_sam, segment

SLOTS = 4  # at most four things on a table
NONE = 0  # class of a partner: nobody; of a patch: the table
FRAMES = PRESETS["toy"].frames_per_clip
COLOUR_OF = {colour: i for i, colour in enumerate(language.COLOUR_ORDER)}
EVENTS = ["start", "hit", "wall", *world.EFFECTS]
PARTNERS = {"hits": 7, "hit_by": 7, "next_hits": 7, "next_hit_by": 7}  # nobody, or a colour
THING_HEADS = {"kind": 8, "colour": 6, "state": 3, **PARTNERS}  # read-out of a thing's token -> number of classes
CLIP_HEADS = {"count": 5, "moving": 5, "first": 7}  # of a clip's [CLS]
PATCH_HEADS = {"kind": 9, "colour": 7}  # of a patch: the table, or one more than a thing's class
MOVEMENTS = 6  # numbers per thing: place, velocity at the end, velocity at the beginning


# --------------------------------------------------------------------------- what the encoder should know


class Labels(NamedTuple):
    """Of C clips; of a batch, C is B. From labels_of as numpy arrays, else as tensors."""

    classes: torch.Tensor  # (C, 4, 7) int64 in the order of THING_HEADS; -1 in a slot without a thing
    numbers: torch.Tensor  # (C, 4, 6) float32: x, y of place and velocities, scaled to about 1
    events: torch.Tensor  # (C, 4, 11) float32: 1 where a thing is the subject of such an event, in the order of EVENTS
    whole: torch.Tensor  # (C, 3) int64 in the order of CLIP_HEADS


def labels_of(job: tuple[str, int, int]) -> Labels:
    """What a good video encoder should know of each clip of one video (split, seed, index).

    `next_hits`/`next_hit_by` look up to .75 s beyond the clip's last frame: an encoder that sees motion sees where it
    leads. Partners are named by colour, never by kind, so nothing here ties two kinds together.
    """
    split, seed, index = job
    video = world.make_clip(seed, index, split)
    colours = [COLOUR_OF[thing.colour] for thing in video.things]
    clips = world.NUM_FRAMES // FRAMES
    classes = np.full((clips, SLOTS, len(THING_HEADS)), -1, np.int64)
    numbers = np.zeros((clips, SLOTS, MOVEMENTS), np.float32)
    events = np.zeros((clips, SLOTS, len(EVENTS)), np.float32)
    whole = np.zeros((clips, len(CLIP_HEADS)), np.int64)

    for c in range(clips):
        first, last = c * FRAMES, c * FRAMES + FRAMES - 1
        seen = events_between(video, first, last)
        soon = [event for event in video.events if last < event.time * world.FPS < last + 3]
        for i, thing in enumerate(video.things):
            kind = world.KINDS.index(thing.kind)
            state = min(int(video.state[last - 1, i]), world.POPPED)
            partners = partners_of(i, seen, colours)
            next_partners = partners_of(i, soon[::-1], colours)  # of several the one that comes first
            classes[c, i] = [kind, colours[i], state, *partners, *next_partners]
            numbers[c, i] = movement(video.trajectory[first : last + 1, i])
        for event in seen:
            events[c, event.subject, EVENTS.index(event.type)] = 1
        moving = [event.subject for event in seen if event.direction]
        first_moved = 1 + colours[moving[0]] if moving else NONE
        whole[c] = [len(video.things), len(set(moving)), first_moved]
    return Labels(classes, numbers, events, whole)


def events_between(video: world.Clip, first: int, last: int) -> list[world.Event]:
    """Those that a frame after `first`, up to `last`, is the first to show."""
    return [event for event in video.events if first < math.ceil(event.time * world.FPS) <= last]


def partners_of(index: int, events: list[world.Event], colours: list[int]) -> list[int]:
    """Classes of whom a thing hits and of who hits it, in the last such event of the list."""
    hits = hit_by = NONE
    for event in events:
        if event.type != "hit":
            continue
        if event.subject == index:
            hits = 1 + colours[event.object]
        elif event.object == index:
            hit_by = 1 + colours[event.subject]
    return [hits, hit_by]


def movement(path: np.ndarray) -> np.ndarray:
    """Where a thing is in the four frames of a clip, path (4, 2) -> (6,) float32, scaled to about 1."""
    place = (path[2] - 0.5) * 3
    velocity = (path[3] - path[2]) * 10
    earlier_velocity = (path[1] - path[0]) * 10
    return np.concatenate([place, velocity, earlier_velocity])


class EncoderTask:
    """Batches for the encoder: the clips of one split with their labels, three quarters of them with motion."""

    def __init__(self, folder: Path, split: str, seed: int, count: int | None, processes: int, rng):
        self.rng = rng
        self.frames, self.owner = arrays_of(folder)
        jobs = [(split, seed, index) for index in range(count or len(self.frames))]
        with multiprocessing.Pool(processes) as pool:
            made = pool.imap(labels_of, jobs, 64)
            labels = list(tqdm(made, total=len(jobs), desc=f"{split} labels"))
        parts = [np.stack(part) for part in zip(*labels)]
        self.labels = Labels(*map(torch.from_numpy, parts))  # each (videos, clips, ...)

        velocities = self.labels.numbers[..., 2:]
        moving = velocities.abs().amax((-2, -1)) > 0.05
        active = self.labels.events.flatten(2).any(-1) | moving
        self.active = active.nonzero().numpy()  # (n, 2): video, clip
        self.all = np.argwhere(np.ones(active.shape, bool))

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, Labels]:
        """-> frames float (B, F, 3, H, W) in [0, 1], owner (B, F, H, W), labels"""
        with_motion = size * 3 // 4
        picked = np.concatenate([self.pick(self.active, with_motion), self.pick(self.all, size - with_motion)])
        frames, owner = [], []
        for video, clip in picked:
            span = slice(clip * FRAMES, (clip + 1) * FRAMES)
            frames.append(self.frames[video, span])
            owner.append(self.owner[video, span])
        frames = torch.from_numpy(np.stack(frames)).float() / 255
        owner = torch.from_numpy(np.stack(owner))
        videos, clips = torch.from_numpy(picked).T
        return frames, owner, Labels(*(part[videos, clips] for part in self.labels))

    def pick(self, clips: np.ndarray, count: int) -> np.ndarray:
        return clips[self.rng.integers(len(clips), size=count)]


# --------------------------------------------------------------------------- the encoder's loss


class EncoderHeads(nn.Module):
    """Linear read-outs that exist during stage 0 only."""

    def __init__(self, width: int):
        super().__init__()
        self.thing = nn.Linear(width, sum(THING_HEADS.values()) + MOVEMENTS + len(EVENTS))
        self.clip = nn.Linear(width, sum(CLIP_HEADS.values()))
        self.patch = nn.Linear(width, sum(PATCH_HEADS.values()))


def encoder_loss(
    encoder: VideoTransformer, heads: EncoderHeads, frames: torch.Tensor, owner: torch.Tensor, labels: Labels
) -> tuple[torch.Tensor, dict]:
    """Read labels from every thing's token (mask-pooled, as Eq. 2 will), from every clip's [CLS] and from every patch.

    -> loss, {figure: value}
    """
    cls, patches = encoder(frames)  # (B, D_v), (B, T, P, D_v)
    shares = patch_shares(owner, patches.shape[2])  # (B, 4, F, P)
    tokens, area = pool_things(patches, shares)  # (B, 4, D_v), (B, 4)
    visible = (area > 0.3) & (labels.classes[..., 0] >= 0)

    readouts = heads.thing(tokens[visible]).float()
    of_things = [part[visible] for part in (labels.classes, labels.numbers, labels.events)]
    terms, figures = thing_terms(readouts, *of_things)
    terms += clip_terms(heads.clip(cls).float(), labels.whole)
    second_frames = shares[:, :, 1::2].transpose(1, 2)  # (B, T, 4, P): of each tubelet, the one whose state it is
    terms += patch_terms(heads.patch, patches, second_frames, labels.classes)
    return sum(terms), figures


def patch_shares(owner: torch.Tensor, patches: int) -> torch.Tensor:
    """owner (B, F, H, W) -> the share of each patch that each thing covers (B, 4, F, P)"""
    side = int(patches**0.5)
    pixels = owner.shape[-1] // side
    shares = [F.avg_pool2d((owner == i + 1).float(), pixels) for i in range(SLOTS)]
    return torch.stack(shares, 1).flatten(3)


def pool_things(patches: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 on the keyframe with true masks -> tokens (B, 4, D_v), area in patches (B, 4)"""
    keyframe = FRAMES // 2
    masks = shares[:, :, keyframe]
    area = masks.sum(-1)
    features = patches[:, keyframe // 2].float()  # of the tubelet that holds the keyframe
    tokens = masks @ features / area.clamp(min=1e-3)[..., None]
    return tokens, area


def thing_terms(readouts, classes, numbers, events):
    """readouts (n, 65), labels of n visible things -> terms of the loss, {figure: value}"""
    terms, figures = [], {}
    start = 0
    for k, (name, size) in enumerate(THING_HEADS.items()):
        logits, truth = readouts[:, start : start + size], classes[:, k]
        weight = torch.ones(size)
        if name in PARTNERS:
            weight[NONE] = 0.4  # mostly nobody
        terms.append(F.cross_entropy(logits, truth, weight))
        figures[name] = accuracy_where_it_counts(name, logits, truth)
        start += size

    predicted = readouts[:, start : start + MOVEMENTS]
    moving = numbers[:, 2:].abs().amax(-1) > 0.05
    error = (predicted - numbers).square().mean(-1)
    terms.append(2 * (error * (1 + 3 * moving.float())).mean())
    speed_error = predicted[:, 2:4] - numbers[:, 2:4]
    figures["speed error"] = speed_error.abs().mean() / 10

    event_logits = readouts[:, start + MOVEMENTS :]
    terms.append(5 * F.binary_cross_entropy_with_logits(event_logits, events))
    figures["event F1"] = f1((event_logits > 0).float(), events)
    return terms, figures


def f1(predicted, truth):
    both = (predicted * truth).sum()
    return 2 * both / (predicted.sum() + truth.sum()).clamp(min=1)


def accuracy_where_it_counts(name, logits, truth):
    """Of partners and states, only where there is a partner or a state other than whole: most have none."""
    counts = truth >= 0
    if name in PARTNERS or name == "state":
        counts = truth != 0
    if not counts.any():
        return 1.0
    return (logits.argmax(-1) == truth)[counts].float().mean()


def clip_terms(readouts, whole):
    """readouts (B, 17), whole (B, 3) -> terms of the loss"""
    parts = readouts.split(list(CLIP_HEADS.values()), -1)
    return [0.5 * F.cross_entropy(logits, truth) for logits, truth in zip(parts, whole.T)]


def patch_terms(head, patches, shares, classes):
    """Kind and colour of what covers each patch. shares (B, T, 4, P), classes (B, 4, 7) -> terms of the loss"""
    share, covering = shares.max(2)  # (B, T, P) each
    truths = []
    for k in (0, 1):  # kind, colour
        of_slots = classes[:, :, k].clamp(min=0)
        of_patches = of_slots.gather(1, covering.flatten(1)).view_as(covering)
        truths.append(torch.where(share > 0.3, of_patches + 1, NONE))

    parts = head(patches).float().split(list(PATCH_HEADS.values()), -1)
    terms = []
    for logits, truth in zip(parts, truths):
        logits = logits.flatten(0, -2)
        weight = torch.ones(logits.shape[-1])
        weight[NONE] = 0.1  # mostly table
        terms.append(0.5 * F.cross_entropy(logits, truth.flatten(), weight))
    return terms


def save_half(module: nn.Module, path: Path):
    state_dict = module.state_dict()
    save_file({name: tensor.half() for name, tensor in state_dict.items()}, path)


def mean_figures(rounds: list[dict]) -> dict[str, float]:
    means = {}
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        means[name] = round(float(np.mean(values)), 3)
    return means


def pretrain_encoder(args):
    torch.manual_seed(args.seed)
    encoder = VideoTransformer(PRESETS["toy"])
    heads = EncoderHeads(PRESETS["toy"].encoder_width)
    folder, rng = args.runs / "world", np.random.default_rng(args.seed)
    task = EncoderTask(folder / "train", "train", args.seed, args.clips, args.processes, rng)
    validation = EncoderTask(folder / "val", "val", args.seed, None, args.processes, np.random.default_rng(1))
    size = f"{millions(encoder):.2f} M parameters"
    print(f"encoder: {size}, {len(task.all)} clips, {len(task.active)} with motion")

    def loss_of_step(step):
        return encoder_loss(encoder, heads, *task.batch(args.batch))

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        save_half(encoder, args.runs / "encoder.safetensors")
        encoder.eval()
        with torch.no_grad(), autocast():
            rounds = [encoder_loss(encoder, heads, *validation.batch(64))[1] for _ in range(6)]
        encoder.train()
        return {"val": mean_figures(rounds)}

    parameters = [*encoder.parameters(), *heads.parameters()]
    train(args.runs / "encoder.jsonl", parameters, args.lr, args.steps, loss_of_step, watch)
    save_half(encoder, args.weights / "encoder.safetensors")


# --------------------------------------------------------------------------- SAM


class Prompts(NamedTuple):
    """A batch for SAM."""

    pictures: torch.Tensor  # (B, 3, S, S) float in 0...255
    points: torch.Tensor  # (B, N, 1, 2) float: x, y in pixels
    targets: torch.Tensor  # (B, N, S, S) float, 1 where the thing under the point is
    real: torch.Tensor  # (B, N) bool: the point is on a thing


def sam_batch(frames: np.ndarray, owner: np.ndarray, rng: np.random.Generator, images: int, points: int) -> Prompts:
    """Random frames with random points.

    A fifth of the points fall on the bare table (real False): their predicted IoU is trained to 0, so that the grid's
    many misses are dropped.
    """
    videos = rng.integers(len(frames), size=images)
    moments = rng.integers(world.NUM_FRAMES, size=images)
    places = np.zeros((images, points, 1, 2), np.float32)
    targets = np.zeros((images, points, *owner.shape[2:]), np.float32)
    real = np.zeros((images, points), bool)
    for b in range(images):
        seen = owner[videos[b], moments[b]]
        present = np.unique(seen[seen > 0])
        for n in range(points):
            on_a_thing = n < points * 4 // 5 and len(present) > 0
            thing = rng.choice(present) if on_a_thing else 0
            places[b, n, 0] = pixel_of(seen == thing, rng)
            if on_a_thing:
                real[b, n] = True
                targets[b, n] = seen == thing

    pictures = np.stack([frames[video, moment] for video, moment in zip(videos, moments)])
    return Prompts(
        torch.from_numpy(pictures).float(),
        torch.from_numpy(places),
        torch.from_numpy(targets),
        torch.from_numpy(real),
    )


def pixel_of(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The middle x, y of a random pixel of a mask."""
    ys, xs = np.where(mask)
    chosen = rng.integers(len(ys))
    return xs[chosen] + 0.5, ys[chosen] + 0.5


def sam_loss(sam, pictures, points, targets, real) -> tuple[torch.Tensor, dict]:
    """Focal + dice on the best of the three masks, and the regressed IoU (Kirillov et al., 2023, §3).

    -> loss, {figure: value}
    """
    logits, iou = predict_masks(sam, pictures, points)  # (B, N, 3, h, w), (B, N, 3)
    targets = F.interpolate(targets, size=logits.shape[-2:], mode="area")
    targets = targets[:, :, None].expand_as(logits)
    shown = real[..., None]  # (B, N, 1)

    probabilities = logits.sigmoid()
    each = focal_loss(logits, probabilities, targets) + dice_loss(probabilities, targets) * shown
    best = each.min(-1).values + 0.1 * each.mean(-1)  # a little of the mean keeps the other two masks alive
    true_iou = iou_of(logits > 0, targets > 0.5) * shown

    mask_term = (best * (real + 0.2 * ~real)).mean()
    iou_term = 2 * (iou - true_iou).square().mean()
    best_iou = true_iou.max(-1).values
    figures = {"IoU": best_iou[real].mean(), "IoU error": (iou - true_iou).abs().mean()}
    return mask_term + iou_term, figures


def predict_masks(sam, pictures, points):
    """-> logits (B, N, 3, h, w), predicted IoU (B, N, 3): the three "multimask" outputs that `segment` reads"""
    embeddings = sam.image_encoder((pictures - sam.pixel_mean) / sam.pixel_std)
    position = sam.prompt_encoder.get_dense_pe()
    all_logits, all_ious = [], []
    for embedding, place in zip(embeddings, points):
        prompts = (place, torch.ones(place.shape[:2]))
        sparse, dense = sam.prompt_encoder(points=prompts, boxes=None, masks=None)
        logits, iou = sam.mask_decoder.predict_masks(embedding[None], position, sparse, dense)
        all_logits.append(logits[:, 1:])  # the first is for prompts of several points
        all_ious.append(iou[:, 1:])
    return torch.stack(all_logits).float(), torch.stack(all_ious).float()


def focal_loss(logits, probabilities, targets):
    """(B, N, 3, h, w) each -> (B, N, 3), weighted 20 to 1 against dice, as in the paper"""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    pixels = cross_entropy * (probabilities - targets).square()
    return pixels.mean((-2, -1)) * 20


def dice_loss(probabilities, targets):
    """(B, N, 3, h, w) each -> (B, N, 3)"""
    overlap = (probabilities * targets).sum((-2, -1))
    areas = probabilities.sum((-2, -1)) + targets.sum((-2, -1))
    return 1 - (2 * overlap + 1) / (areas + 1)


def iou_of(masks, truth):
    """(B, N, 3, h, w) bool each -> (B, N, 3)"""
    union = (masks | truth).sum((-2, -1)).clamp(min=1)
    return (masks & truth).sum((-2, -1)) / union


def mask_quality(sam, config: Config, frames: np.ndarray, owner: np.ndarray, count: int) -> dict[str, float]:
    """The whole automatic path on `count` keyframes: mean best IoU per thing, share found, false masks per picture."""
    best_ious, false_masks = [], []
    began = time.time()
    count = min(count, len(frames))
    for video in range(count):
        moment = video % world.NUM_FRAMES
        picture = frames[video, moment].transpose(1, 2, 0)
        masks = segment(picture, sam, config).numpy()  # (M, H, W)
        iou = ious_with_things(masks, owner[video, moment])  # (things, M)
        best_ious += list(iou.max(1, initial=0))
        unlike_any = iou.max(0, initial=0) < 0.5
        false_masks.append(int(unlike_any.sum()))

    milliseconds = (time.time() - began) / count * 1e3
    recall = np.mean(np.array(best_ious) > 0.5)
    return {
        "mIoU": round(float(np.mean(best_ious)), 3),
        "recall": round(float(recall), 3),
        "false masks": round(float(np.mean(false_masks)), 3),
        "ms per keyframe": round(milliseconds),
    }


def ious_with_things(masks: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """masks (M, H, W) bool, owner (H, W) -> IoU (things, M); what is nearly hidden is not asked for"""
    things = owner == np.arange(1, SLOTS + 1)[:, None, None]  # (4, H, W)
    things = things[things.sum((-2, -1)) > 30]
    things = things[:, None]  # beside each mask
    overlap = (masks & things).sum((-2, -1))
    return overlap / (masks | things).sum((-2, -1))


def pretrain_sam(args):
    torch.manual_seed(args.seed)
    sam = build_sam(PRESETS["toy"])
    rng = np.random.default_rng(args.seed)
    frames, owner = arrays_of(args.runs / "world" / "train")
    validation = arrays_of(args.runs / "world" / "val")
    print(f"SAM: {millions(sam):.2f} M parameters")

    def loss_of_step(step):
        return sam_loss(sam, *sam_batch(frames, owner, rng, args.batch, args.points))

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        save_half(sam, args.runs / "sam.safetensors")
        sam.eval()
        count = 60 if step < args.steps else 200
        quality = mask_quality(sam, PRESETS["toy"], *validation, count)
        sam.train()
        return quality

    log, parameters = args.runs / "sam.jsonl", list(sam.parameters())
    train(log, parameters, args.lr, args.steps, loss_of_step, watch, weight_decay=0.01)
    save_half(sam, args.weights / "sam.safetensors")
