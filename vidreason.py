"""VidReason: video + question -> reasoned answer. The whole model, in the order data flows.

    video -> clips -> VideoTransformer (Eq. 1) -> SAM -> mask_pool (Eq. 2) -> FusionCore (Eq. 3, 4) -> LLM (Eq. 5, 6)

One shape alphabet, used in every docstring and line-end comment:
    B batch     N_t clips per video     F frames per clip     P patches per frame     K masks per keyframe
    N_o object tokens   N_v = N_t + N_o vision tokens   N_q queries   D_v, D_q, D_llm widths of encoder, fusion, LLM
"""

import itertools
import json
import math
import os
import re
import shutil
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torchvision.transforms.functional import InterpolationMode, center_crop, resize
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

READ_ERRORS = (OSError, ValueError, RuntimeError, IndexError, av.FFmpegError)


class VidReasonError(Exception):
    """A mistake the user can mend. Its message is one line: "<what> (<where>): <what to do>"."""
    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # libraries' own messages may have several lines


# --------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Every size and every choice that makes one VidReason differ from another; the defaults are the paper's."""
    num_clips: int = 4  # N_t: equal non-overlapping spans that a video is cut into, one global token each.
    frames_per_clip: int = 8  # F: frames sampled uniformly from each clip.
    image_size: int = 224  # Side in pixels of the square frames that the encoder sees.
    patch_size: int = 16  # Side in pixels of a patch.
    encoder_width: int = 768  # D_v: width of the encoder, hence of every vision token.
    encoder_layers: int = 12  # Transformer blocks of the encoder.
    encoder_heads: int = 12  # Attention heads of the encoder.
    tubelet: int = 1  # Frames that one patch embedding spans.
    frame_difference: float = 0.0  # s > 0 shows a frame pair (a, b) as its mean and s (b - a): visible motion.
    sam: str = "vit_h"  # Which Segment Anything model: toy, vit_b, vit_l or vit_h.
    points_per_side: int = 16  # SAM is prompted with a grid of points_per_side x points_per_side points.
    masks_per_keyframe: int = 16  # K: at most this many masks are kept per keyframe.
    keyframe_size: int = 512  # Keyframes are shrunk to at most this side before SAM sees them.
    sam_iou_threshold: float = 0.88  # Masks whose IoU SAM itself predicts to be lower are dropped.
    sam_stability_threshold: float = 0.95  # Masks that change more when SAM's cut-off moves are dropped.
    num_queries: int = 32  # N_q: learnable queries, hence vision tokens that the LLM reads.
    fusion_width: int = 768  # D_q: width of the fusion core.
    fusion_layers: int = 8  # Layers of the fusion core.
    fusion_heads: int = 12  # Attention heads of the fusion core.
    time_embedding: bool = True  # Tells the fusion core when; False is the paper as printed, blind to order.
    encoder_weights: str = ""  # .safetensors or ViCLIP's .pth; relative paths start at the model directory.
    sam_weights: str = ""  # .safetensors or an upstream sam_vit_*.pth.
    llm: str = "meta-llama/Meta-Llama-3-8B-Instruct"  # A directory or a hub id.
    max_new_tokens: int = 256  # Longest answer, in tokens, unless the caller says otherwise.
    lora_rank: int = 64  # LoRA rank of stage 2.
    lora_alpha: int = 128  # LoRA alpha of stage 2.


PRESETS = {
    "toy": Config(
        frames_per_clip=4, image_size=96, patch_size=12, encoder_width=128, encoder_layers=4, encoder_heads=4,
        tubelet=2, frame_difference=4.0, sam="toy", points_per_side=8, masks_per_keyframe=6, sam_iou_threshold=0.4,
        sam_stability_threshold=0.65, fusion_width=128, fusion_layers=4, fusion_heads=4, max_new_tokens=64,
        lora_rank=16, lora_alpha=32, encoder_weights="encoder.safetensors", sam_weights="sam.safetensors", llm="llm",
    ),
    "small": Config(sam="vit_b", llm="Qwen/Qwen2.5-0.5B-Instruct"),
    "paper": Config(),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- §3.1.1 video -> clips
READER = "PyAV: the picture on screen at each moment, upright, in square pixels"  # features name what made them
RESTARTING = ("mpegts", "mpeg")  # formats whose files people join end to end, each with a clock of its own
INDEXED = ("mov", "matroska")  # formats that store when each picture is shown, and where decoding may begin

_resize = partial(resize, interpolation=InterpolationMode.BICUBIC, antialias=True)  # pixels that fit stay as they are


def read_video(path, num_clips, frames_per_clip, image_size, keyframe_size=512, order=slice(None)):
    """Cut a video into N_t equal spans and take the frames shown at the centres of the F equal parts of each (§3.1.1).
    -> frames uint8 (N_t, F, 3, image_size, image_size); times float32 (N_t, F), seconds since the start at which each
    came on screen; keyframes: the middle frame (index F // 2) of each clip, uint8 array (S, S, 3), S <= keyframe_size.
    A frame is what a player shows at that second: upright, in square pixels, nothing that an edit list hides. Both show
    the centre square of the picture, so a mask of one fits the patches of the other. A video of few frames repeats
    them. order (for controls): which of the N_t * F frames to show in the place of each; times stay. The path may end
    in a span of the file (split_span). Raises VidReasonError for a file that is missing, empty, truncated, not a video
    or without picture, and for a span in which nothing is shown."""
    path, start, end = split_span(path)
    check_video(path)
    total = num_clips * frames_per_clip
    try:
        timeline = read_timeline(path)
        end = min(end, timeline.end)
        if start >= end:
            raise VidReasonError(f"nothing is shown from {start} to {end} s ({path}): give a span within the video")
        centres = start + (end - start) * (np.arange(total) + 0.5) / total
        began, pictures = pictures_at(path, timeline, centres, max(image_size, keyframe_size))
    except READ_ERRORS as error:
        raise VidReasonError(f"video is truncated or damaged: {str(error)[:80]} ({path}): get it again") from error

    squares = [center_crop(picture, min(picture.shape[1:])) for picture in pictures]
    positions = np.arange(total)[order].reshape(num_clips, frames_per_clip)
    frames = torch.stack([_resize(squares[i], [image_size]) for i in positions.flat])
    keyframes = []
    for i in positions[:, frames_per_clip // 2]:
        side = min(keyframe_size, squares[i].shape[-1])
        keyframes.append(_resize(squares[i], [side]).permute(1, 2, 0).numpy())
    times = torch.from_numpy(began - start).float().clip(min=0)  # what a span begins with may have come before it
    return frames.unflatten(0, positions.shape), times.view(positions.shape), keyframes


def split_span(path):
    """A W3C media fragment, "film.mp4#t=2.5,8" -> ("film.mp4", 2.5, 8.0), in seconds; without one 0 to infinity."""
    found = re.fullmatch(r"(.+)#t=(\d+\.?\d*)?(?:,(\d+\.?\d*)?)?", str(path))
    return (found[1], float(found[2] or 0), float(found[3] or "inf")) if found else (str(path), 0.0, float("inf"))


def check_video(path):
    """Raises VidReasonError unless the file holds a video. Looks at its header only."""
    path = Path(split_span(path)[0])
    if not path.is_file() or path.stat().st_size == 0:
        what = "video file is empty" if path.is_file() else "video is a directory" if path.is_dir() else "no such video"
        raise VidReasonError(f"{what} ({path}): give the path of a video file")
    try:
        with av.open(str(path)) as container:
            has_picture = picture_stream(container) is not None
    except READ_ERRORS as error:
        raise VidReasonError(f"not a video, or cut off ({path}): play it to check, or convert it to mp4") from error
    if not has_picture:
        raise VidReasonError(f"file has sound or text but no picture ({path}): give a video")


def picture_stream(container):
    """The stream that a player shows, to be decoded in this thread: the default one, else the largest; None without."""
    if container.format.name == "tty":  # FFmpeg takes any *.txt for a recorded terminal
        return None
    cover = av.stream.Disposition.attached_pic  # the picture on an album is no video
    default = av.stream.Disposition.default
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    ranks = [(bool(stream.disposition & default), stream.width * stream.height) for stream in streams]
    if not streams:
        return None
    stream = streams[ranks.index(max(ranks))]
    stream.codec_context.thread_count = 1  # programs that read many films have a process for each core
    return stream


def demux(container, stream):
    """The packets of a stream, coded pictures and the empty one that empties the decoder. Where streams were joined,
    the clock of what follows is put right: it goes on without a gap, as players do."""
    restarts = container.format.name in RESTARTING
    offset = 0
    expected = None
    for packet in container.demux(stream):
        if packet.size == 0 and packet.dts is not None:
            continue  # a picture left out: the one before it stays
        if restarts and packet.dts is not None:
            jump = 0 if expected is None else float((packet.dts + offset - expected) * stream.time_base)
            if jump < -0.1 or jump > 10:  # seconds; FFmpeg's own limits
                offset = expected - packet.dts
            packet.dts += offset
            packet.pts = None if packet.pts is None else packet.pts + offset
            expected = packet.dts + (packet.duration or 0)
        yield packet


class CodedPicture(NamedTuple):
    """What a container tells of one picture; its time stamps are in ticks, or None."""
    shown_at: int | None
    decoded_at: int | None
    duration: int
    is_key: bool
    is_hidden: bool  # by an edit list


@dataclass
class Timeline:
    """When the pictures of a film come on screen, in seconds since the first one."""
    starts: np.ndarray  # of every picture, ascending
    end: float  # when the last one goes
    zero: int  # time stamp of the first one, in ticks
    tick: float  # seconds
    counted: bool  # time stamps are not to be trusted: the i-th picture that comes out of the decoder is at starts[i]
    keyframes: np.ndarray  # seconds at which decoding may begin, ascending; empty: at the start of the file only


def read_timeline(path):
    """The timeline by the packets of a file, none of which is decoded. Raises OSError if many of them are missing."""
    pictures = []
    with av.open(path) as container:
        stream = picture_stream(container)
        promised, rate, tick = stream.frames, float(stream.average_rate or 25), float(stream.time_base)
        counted = not stores_presentation_times(container, stream)
        indexed = container.format.name.startswith(INDEXED)
        for packet in demux(container, stream):
            if packet.size:
                known = packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard
                pictures.append(CodedPicture(*known))
    if not pictures:
        raise OSError("no picture is there")

    # A header may be off by a few pictures, and an AVI's counts those that are left out; a broken download lacks many.
    decoded_at = [picture.decoded_at for picture in pictures if picture.decoded_at is not None] or [0]
    there = max(len(pictures), (max(decoded_at) - min(decoded_at)) * tick * rate)
    if there < 0.9 * promised:
        raise OSError(f"only {len(pictures)} of {promised} frames are there")

    shown = [picture for picture in pictures if not picture.is_hidden] or pictures
    counted = counted or any(picture.shown_at is None for picture in shown)
    stamps = [picture.decoded_at if counted else picture.shown_at for picture in shown]
    step = 1 / (rate * tick)
    if None in stamps:
        stamps = [step * i for i in range(len(shown))]
    last = shown[stamps.index(max(stamps))]
    keys = [picture.shown_at for picture in shown if picture.is_key and indexed and not counted]

    zero = min(stamps)
    starts = (np.sort(stamps) - zero) * tick
    usual = np.median(np.diff(starts)) if len(starts) > 1 else step * tick
    end = starts[-1] + (last.duration * tick or usual)
    return Timeline(starts, float(end), zero, tick, counted, (np.sort(keys) - zero) * tick)


def stores_presentation_times(container, stream):
    """Whether a container says of each picture when it is shown. AVI and ASF say when it is decoded, another time where
    there are B-frames; so does Matroska of a stream that it holds as an AVI would, which bears a codec tag. A program
    stream says it of the first picture in a packet only."""
    wrapped = container.format.name.startswith("matroska") and stream.codec_context.codec_tag.strip("\0")
    return container.format.name not in ("avi", "asf", "mpeg") and not wrapped


class OutOfStep(OSError):
    """What comes out of the decoder contradicts the timeline."""


def pictures_at(path, timeline, seconds, side):
    """The pictures on screen at some seconds, ascending. -> (when each of them began, float array; the pictures, list
    of uint8 tensors (3, H, W), upright, whose short side is at most `side`). Where the container has a table of
    keyframes, jumps between them and decodes only what it must; if what comes is not what the container announced,
    plays all from the start; if time stamps contradict each other, decodes the film once more to put them in order.
    Raises OSError if nothing can be decoded."""
    try:
        return watch(path, timeline, seconds, side)
    except OutOfStep:
        from_start = replace(timeline, keyframes=timeline.keyframes[:0])
    try:
        return watch(path, from_start, seconds, side)
    except OutOfStep:
        return watch(path, count_pictures(path, timeline), seconds, side)


def watch(path, timeline, seconds, side):
    """pictures_at in one pass. Raises OutOfStep where the film does not keep to the timeline."""
    began, pictures = [], []
    expected = timeline.starts[np.searchsorted(timeline.starts, seconds, side="right") - 1]
    sparse = len(timeline.keyframes) > 0
    wanted = {timeline.zero + round(start / timeline.tick) for start in expected} if sparse else None
    with av.open(path) as container:
        stream = picture_stream(container)
        aspect = float(stream.sample_aspect_ratio or 1)
        played = play(container, stream, timeline, wanted)
        shown, coming, picture = next(played, None), next(played, None), None
        if shown is None:
            raise OSError("no frame can be decoded")
        # asked once: a frame that was asked for its side data stays in memory until Python looks for cycles
        matrix = shown.frame.side_data.get("DISPLAYMATRIX")
        matrix = None if matrix is None else np.frombuffer(matrix, np.int32).tolist()
        for now, start in zip(seconds, expected, strict=True):
            passed = timeline.keyframes[timeline.keyframes <= now]
            if coming and len(passed) and coming.start < passed[-1]:
                played = jump(container, stream, timeline, wanted, passed[-1])
                shown, coming, picture = next(played), next(played, None), None
            while coming and coming.start <= now:
                shown, coming, picture = coming, None, None
                if shown.start == start:  # at once: a frame of an 8K film holds 50 MB while the next is decoded
                    picture = to_picture(shown.frame, aspect, matrix, side)
                    shown = Shown(start, None)
                coming = next(played, None)
            if sparse and shown.start != start:
                raise OutOfStep("another picture than the container announced")
            if picture is None:
                picture = to_picture(shown.frame, aspect, matrix, side)
            began.append(shown.start)
            pictures.append(picture)
        if timeline.counted:
            deque(played, maxlen=0)  # whether the count was right is known at the end of the film
    return np.array(began), pictures


class Shown(NamedTuple):
    """A decoded frame and the second at which it comes on screen."""
    start: float
    frame: av.VideoFrame | None  # None: its picture has been made


def play(container, stream, timeline, wanted=None):
    """Yields the frames from where the container stands, in the order in which they are shown."""
    number, last = 0, -math.inf
    for frame in decode(container, stream, wanted):
        if timeline.counted:
            if number == len(timeline.starts):
                raise OutOfStep("more pictures than packets")
            start = timeline.starts[number]
            number += 1
        else:
            if frame.pts is None:
                raise OutOfStep("a picture without time stamp")
            start = (frame.pts - timeline.zero) * timeline.tick
            if start <= last:
                raise OutOfStep("time goes back")
            last = start
        yield Shown(start, frame)
        del frame  # so that it is free, too
    if timeline.counted and number < len(timeline.starts):
        raise OutOfStep("fewer pictures than packets")


def jump(container, stream, timeline, wanted, keyframe):
    """The same from `keyframe` seconds on. Pictures before that lean on others that were jumped over."""
    container.seek(timeline.zero + round(keyframe / timeline.tick), stream=stream)
    played = itertools.dropwhile(lambda shown: shown.start < keyframe, play(container, stream, timeline, wanted))
    first = next(played, None)
    if first is None or first.start != keyframe:
        raise OutOfStep("a jump did not lead to its keyframe")
    return itertools.chain([first], played)


def decode(container, stream, wanted=None):
    """Yields the frames of a stream, or without some that no other leans on if their time stamp is not `wanted`.
    What cannot be decoded is left out, as by players: the picture before stays."""
    for packet in demux(container, stream):
        if wanted is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        with suppress(av.InvalidDataError):
            yield from packet.decode()


def count_pictures(path, timeline):
    """The timeline of a film whose packets do not tell it: the time stamps of all its decoded pictures, in order."""
    with av.open(path) as container:
        stamps = [frame.pts for frame in decode(container, picture_stream(container))]
    if None in stamps:
        starts = np.arange(len(stamps)) * timeline.end / len(stamps)
    else:
        starts = (np.sort(stamps) - min(stamps)) * timeline.tick
    return replace(timeline, starts=starts, counted=True, keyframes=timeline.keyframes[:0])


def to_picture(frame, aspect, matrix, side):
    """A decoded frame as it is displayed -> uint8 tensor (3, H, W), its short side shrunk to `side` if it is longer.
    aspect: width / height of a pixel. matrix: how the track is turned (see turn), or None."""
    shrink = min(1.0, side / min(frame.width * aspect, frame.height))
    width, height = round(frame.width * aspect * shrink), round(frame.height * shrink)
    picture = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    if matrix is not None:
        picture = turn(picture, matrix)
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)


def turn(picture, matrix):
    """Turn and mirror a picture (H, W, 3) by the matrix of its track, which moves (x, y) to (a x + c y, b x + d y)."""
    a, b, _, c, d = matrix[:5]
    down, right = d, a
    if abs(b) > abs(a):  # a quarter turn: rows become columns
        picture = picture.transpose(1, 0, 2)
        down, right = b, c
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


# ------------------------------------------------------------------------------------ Eq. 1: the video transformer
class EncoderBlock(nn.Module):
    """Pre-norm transformer block with CLIP's QuickGELU; its parameter names are those of the ViCLIP checkpoints."""
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class VideoTransformer(nn.Module):
    """VideoTransformer(.) of Eq. 1: joint space-time attention over the patches of one clip and one [CLS] token.
    It is the vision tower of ViCLIP (InternVideo, OpenGVLab): same parameter names and arithmetic, so upstream weights
    load as they are. Two things are ours and off by default: tubelet > 1 and frame_difference > 0 (see Config)."""
    def __init__(self, config):
        super().__init__()
        width, tubelet, patch = config.encoder_width, config.tubelet, config.patch_size
        self.tubelet, self.frame_difference = tubelet, config.frame_difference
        self.conv1 = nn.Conv3d(3, width, (tubelet, patch, patch), (tubelet, patch, patch), bias=False)
        positions = 1 + (config.image_size // patch) ** 2
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(positions, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, config.frames_per_clip // tubelet, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [EncoderBlock(width, config.encoder_heads) for _ in range(config.encoder_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = nn.LayerNorm(width)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, clips):
        """clips (B, F, 3, H, W) float in [0, 1] -> cls (B, D_v), patches (B, F // tubelet, P, D_v), row by row."""
        x = (clips - self.mean) / self.std
        if self.frame_difference > 0:
            a, b = x[:, 0::2], x[:, 1::2]
            x = torch.stack([(a + b) / 2, (b - a) * self.frame_difference], dim=2).flatten(1, 2)  # (B, F, 3, H, W)
        x = self.conv1(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # (B, F // tubelet, P, D_v)
        x = x + self.positional_embedding[1:] + self.temporal_positional_embedding[:, :, None]
        cls = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x.flatten(1, 2)], dim=1))
        for block in self.transformer["resblocks"]:
            x = block(x)
        x = self.ln_post(x)
        return x[:, 0], x[:, 1:].unflatten(1, (-1, len(self.positional_embedding) - 1))


# ----------------------------------------------------------------------------- §3.1.2: masks, Eq. 2: object tokens
def build_sam(config):
    """Segment Anything: "vit_b", "vit_l", "vit_h" as published, or "toy", 0.45 M parameters of the same classes."""
    if config.sam in ("vit_b", "vit_l", "vit_h"):
        return sam_model_registry[config.sam]()
    if config.sam != "toy":
        raise VidReasonError(f"unknown SAM '{config.sam}' (config.sam): choose toy, vit_b, vit_l or vit_h")
    side, patch, width = 96, 8, 48
    encoder = ImageEncoderViT(
        img_size=side, patch_size=patch, embed_dim=96, depth=3, num_heads=4, mlp_ratio=3, out_chans=width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=0,
    )  # fmt: skip
    prompts = PromptEncoder(width, (side // patch, side // patch), (side, side), mask_in_chans=16)
    mixer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=192, num_heads=4)
    decoder = MaskDecoder(transformer_dim=width, transformer=mixer, iou_head_depth=2, iou_head_hidden_dim=width)
    return Sam(encoder, prompts, decoder).eval()


mask_generator = lru_cache(maxsize=2)(SamAutomaticMaskGenerator)  # one per SAM, not one per frame


def segment(keyframe, sam, config):
    """Grid-prompted masks of one keyframe (§3.1.2): the K best by stability x predicted IoU, the larger first on ties.
    keyframe uint8 array (H, W, 3) RGB -> masks bool (K', H, W) on the CPU, 0 <= K' <= K; a flat picture has none."""
    thresholds = {"pred_iou_thresh": config.sam_iou_threshold, "stability_score_thresh": config.sam_stability_threshold}
    generate = mask_generator(sam, config.points_per_side, **thresholds).generate
    found = [mask for mask in generate(keyframe) if mask["area"] > 0] if config.masks_per_keyframe else []
    found.sort(key=lambda mask: (-mask["stability_score"] * mask["predicted_iou"], -mask["area"]))
    best = [torch.from_numpy(mask["segmentation"]) for mask in found[: config.masks_per_keyframe]]
    return torch.stack(best) if best else torch.zeros(0, *keyframe.shape[:2], dtype=torch.bool)


def mask_pool(patches, masks):
    """Eq. 2: z_obj = 1/|M| sum over pixels p in M of PatchEmbed(p), for every mask at once.
    Pixels of one patch share its embedding, so the sum is (pixels of M in each patch / |M|) @ patches: one matmul, the
    same number. patches (P, D_v) of a square grid, masks bool (K, H, W) -> (K, D_v). An empty mask gives zeros."""
    grid = int(len(patches) ** 0.5)
    masks = masks.to(patches)
    patch_of = lambda n: F.one_hot(((torch.arange(n) + 0.5) * grid / n).long(), grid).to(patches)
    rows, columns = map(patch_of, masks.shape[1:])  # one-hot (pixels, grid): which patch holds a pixel's centre
    counts = rows.T @ masks @ columns  # (K, grid, grid)
    area = masks.sum((1, 2)).clamp(min=1)
    return (counts.flatten(1) / area[:, None]) @ patches


# -------------------------------------------------------------------------- §3.2: the fusion core, Eq. 3 and Eq. 4
def attention(Q, K, V, key_mask=None, return_weights=False):
    """Eq. 3: softmax(Q K^T / sqrt(d_k)) V.
    Q (B, h, N_q, d_k), K and V (B, h, N, d_k), key_mask bool (B, N), True where a key is real -> (B, h, N_q, d_k), and
    with return_weights also the softmax (B, h, N_q, N). The mask is boolean on purpose: with no real key the answer is
    zero, where large negative numbers would silently give the mean over the padding."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if not return_weights:
        return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    scores = Q @ K.transpose(-2, -1) / Q.shape[-1] ** 0.5
    weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(dim=-1).nan_to_num()
    return weights @ V, weights


def time_embedding(seconds, width):
    """Sines and cosines of a time at periods from 1 second to 10 minutes: seconds (B, N) -> (B, N, width)."""
    periods = torch.logspace(0, 1, width // 2, base=600, device=seconds.device)
    angles = 2 * torch.pi * seconds[..., None].float() / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FusionLayer(nn.Module):
    """Self-attention among the queries, cross-attention to Z_vision, feed-forward: pre-norm and residual, each."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_cross, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_qkv, self.self_out, self.cross_out = (nn.Linear(width, n * width) for n in (3, 1, 1))
        self.W_Q, self.W_K, self.W_V = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries, z_vision, key_mask, return_weights=False):
        """queries (B, N_q, D_q), z_vision (B, N_v, D_q), key_mask (B, N_v) -> queries, weights (B, h, N_q, N_v)."""
        Q, K, V = map(self._split, self.self_qkv(self.norm_self(queries)).chunk(3, dim=-1))
        queries = queries + self.self_out(attention(Q, K, V).transpose(1, 2).flatten(2))
        Q = self._split(self.W_Q(self.norm_cross(queries)))
        K, V = self._split(self.W_K(z_vision)), self._split(self.W_V(z_vision))
        seen = attention(Q, K, V, key_mask, return_weights)
        seen, weights = seen if return_weights else (seen, None)
        queries = queries + self.cross_out(seen.transpose(1, 2).flatten(2))
        return queries + self.ffn(self.norm_ffn(queries)), weights

    def _split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D_q) -> (B, h, N, d_k)


class FusionCore(nn.Module):
    """§3.2: N_q learnable queries distil Z_vision, of any length, into N_q tokens in the LLM's embedding space.
    output_scale: standard deviation of E_vision at the start; that of the LLM's word embeddings suits a frozen LLM."""
    def __init__(self, config, llm_width, output_scale=0.02):
        super().__init__()
        width = config.fusion_width
        self.queries = nn.Parameter(0.5 * torch.randn(config.num_queries, width))
        self.norm_in, self.proj_in = nn.LayerNorm(config.encoder_width), nn.Linear(config.encoder_width, width)
        self.layers = nn.ModuleList(FusionLayer(width, config.fusion_heads) for _ in range(config.fusion_layers))
        self.norm_out, self.linear_proj = nn.LayerNorm(width), nn.Linear(width, llm_width)
        nn.init.normal_(self.linear_proj.weight, std=output_scale / width**0.5)  # its input has unit variance
        nn.init.zeros_(self.linear_proj.bias)
        self.time_embedding = config.time_embedding

    def forward(self, z_vision, times, key_mask, return_weights=False):
        """z_vision (B, N_v, D_v), times (B, N_v) seconds, key_mask bool (B, N_v), True = real -> E_vision
        (B, N_q, D_llm); with return_weights also where each query looked: (B, layers, heads, N_q, N_v), sums to 1."""
        z = self.proj_in(self.norm_in(z_vision))
        if self.time_embedding:
            z = z + time_embedding(times, z.shape[-1]).to(z.dtype)
        queries, all_weights = self.queries.expand(len(z), -1, -1), []
        if not self.layers:  # the paper's ablation "w/o fusion core": the mean of Z_vision and a linear projection
            queries = queries + (z * key_mask[..., None]).sum(1, keepdim=True) / key_mask.sum(1)[:, None, None]
        for layer in self.layers:
            queries, weights = layer(queries, z, key_mask, return_weights)
            all_weights.append(weights)
        e_vision = self.linear_proj(self.norm_out(queries))  # Eq. 4
        return (e_vision, torch.stack(all_weights, dim=1)) if return_weights else e_vision


# ------------------------------------------------------------------ §3.3.1: prompts, E_input = [E_vision ; E_text]
REASON_PROMPT = (
    "The provided visual information depicts a sequence of events. Analyze the causal relationships between these "
    "events and provide a step-by-step explanation for the final outcome."
)
PREDICT_PROMPT = (
    "Based on the events observed in the video, predict the three most likely subsequent events. For each prediction, "
    "provide a brief justification and a confidence score from 0 to 1."
)
CAPTION_PROMPT = "Describe the video."


def encode_prompt(tokenizer, prompt):
    """Token ids of a user's turn and the header of the assistant's, by the tokenizer's own chat template."""
    if not tokenizer.chat_template:
        raise VidReasonError(f"tokenizer has no chat template ({tokenizer.name_or_path}): use an instruction-tuned LLM")
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


def encode_pair(tokenizer, prompt, target):
    """-> (prompt ids, target ids): the target is what the assistant adds, up to the template's end-of-turn token."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
    ids = list(tokenizer.apply_chat_template(turns, return_dict=False))
    if ids[: len(prompt_ids)] != prompt_ids:
        raise VidReasonError(f"chat template rewrites what it has said ({tokenizer.name_or_path}): use another LLM")
    start, special = len(prompt_ids), {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [i + 1 for i, token in enumerate(ids) if i >= start and token in special]  # a line break may follow the end
    return prompt_ids, ids[start : ends[-1]] if ends else [*ids[start:], tokenizer.eos_token_id]


@dataclass
class Conversation:
    """What is said about one video: (prompt ids, target ids) pairs that do not see each other. When training on text
    alone, the context takes the place of E_vision: tokens before the pairs that all of them see."""
    pairs: list
    context: list = field(default_factory=list)


class Packed(NamedTuple):
    """What pack returns. L = N_q + the longest row of text, M = all target tokens of the batch."""
    ids: torch.Tensor  # (B, L - N_q) text tokens, right-padded with 0
    position_ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, 1, L, L) bool, True = may look
    rows: torch.Tensor  # (M,) row of the position that predicts the m-th target token
    columns: torch.Tensor  # (M,) column of it
    targets: torch.Tensor  # (M,) the token it should predict
    owner: torch.Tensor  # (M,) which pair it belongs to, counted through the whole batch

    def to(self, device):
        return Packed(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack(conversations, num_queries):
    """One row per video: [E_vision | context | pair 1 | pair 2 | ...], so that E_vision is read once for all its pairs.
    Each pair sees the prefix and itself only, and its positions restart right after the prefix: its loss is exactly
    that of a row of its own. num_queries is N_q, or 0 for rows without vision. -> Packed, on the CPU."""
    texts = [c.context + [token for prompt, target in c.pairs for token in prompt + target] for c in conversations]
    length = num_queries + max(map(len, texts))
    ids = torch.zeros(len(texts), length - num_queries, dtype=torch.long)
    position_ids = torch.zeros(len(texts), length, dtype=torch.long)
    segment_ids = torch.full((len(texts), length), -1)  # 0 prefix, 1.. pairs, -1 padding
    rows, columns, targets, owner, number = [], [], [], [], itertools.count()
    for row, (conversation, text) in enumerate(zip(conversations, texts, strict=True)):
        start = prefix = num_queries + len(conversation.context)
        ids[row, : len(text)] = torch.tensor(text)
        position_ids[row, :prefix], segment_ids[row, :prefix] = torch.arange(prefix), 0
        for pair, (prompt, target) in enumerate(conversation.pairs):
            first, end = start + len(prompt), start + len(prompt) + len(target)
            position_ids[row, start:end] = torch.arange(prefix, prefix + end - start)
            segment_ids[row, start:end] = pair + 1
            before = first - 1 if prompt else prefix - 1  # without a prompt the end of the prefix predicts the first
            assert before >= 0, "the first target token needs something to be predicted from"
            columns += [before, *range(first, end - 1)] if target else []
            rows += [row] * len(target)
            owner += [next(number)] * len(target)
            targets += target
            start = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((segment_ids[:, None] == 0) | (segment_ids[:, None] == segment_ids[:, :, None]))
    return Packed(ids, position_ids, mask[:, None], *map(torch.tensor, (rows, columns, targets, owner)))


# -------------------------------------------------------------------------------- §3.3.2: the LLM, Eq. 5 and Eq. 6
def target_logprobs(llm, packed, e_vision=None):
    """Eq. 5: log P(y_t | E_input, y_<t) for every target token of a Packed batch -> (M,) float32.
    e_vision (B, N_q, D_llm), or None for rows of text alone. Vocabulary-wide logits exist at target positions only."""
    embeddings = llm.get_input_embeddings()(packed.ids)
    if e_vision is not None:
        embeddings = torch.cat([e_vision.to(embeddings.dtype), embeddings], dim=1)  # E_input = [E_vision ; E_text]
    inputs = {"inputs_embeds": embeddings, "attention_mask": packed.attention_mask, "position_ids": packed.position_ids}
    hidden = llm.get_decoder()(**inputs, use_cache=False).last_hidden_state
    logits = llm.get_output_embeddings()(hidden[packed.rows, packed.columns]).float()  # (M, vocabulary)
    return -F.cross_entropy(logits, packed.targets, reduction="none")


def loss(llm, packed, e_vision=None):
    """Eq. 6: -sum_t log P(y*_t | E_vision, y*_<t) over a Packed batch -> (the sum, not the mean; number of targets)."""
    return -target_logprobs(llm, packed, e_vision).sum(), len(packed.targets)


def generate(
    llm, tokenizer, e_input, mask, max_new_tokens, beams=1, answers=1, top_p=None, temperature=None, streamer=None
):
    """Decoding by Eq. 5: greedy, beam search (beams > 1) or nucleus sampling (top_p or temperature given).
    e_input (B, L, D_llm), LEFT-padded, mask (B, L), 0 at padding -> B x answers lists of new token ids, each cut at the
    first stop token: the tokenizer's, one of the LLM's own list, or the one that its chat template writes."""
    own = llm.generation_config.eos_token_id
    end_of_turn = encode_pair(tokenizer, "a", "b")[1][-1]
    stop = {tokenizer.eos_token_id, end_of_turn, *(own if isinstance(own, list) else [own])} - {None}
    sampling = top_p is not None or temperature is not None
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=beams, num_return_sequences=answers, do_sample=sampling,
        top_p=1.0 if top_p is None else top_p, temperature=1.0 if temperature is None else temperature,
        top_k=0 if sampling else 50,  # 50 is the library's "not set"
        repetition_penalty=1.0,  # many LLMs ship another default, which cannot see a prompt made of embeddings
        eos_token_id=sorted(stop), pad_token_id=min(stop) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )  # fmt: skip
    streamer = streamer if beams == 1 else None  # a beam's words are not final until it ends
    new = llm.generate(inputs_embeds=e_input, attention_mask=mask, generation_config=settings, streamer=streamer)
    return [[*itertools.takewhile(lambda token: token not in stop, row)] for row in new.tolist()]


# ------------------------------------------------------------------------------------------------- the whole model
@dataclass
class Features:
    """What the visual backbone saw in one video (§3.1): Z_vision = [Z_global ; Z_obj] and where it comes from."""
    z_vision: torch.Tensor  # (N_v, D_v) float32, the N_t global tokens first
    times: torch.Tensor  # (N_v,) seconds: the mean of a clip's frames, the keyframe of an object
    is_object: torch.Tensor  # (N_v,) bool
    masks: list = field(default_factory=list)  # per clip bool (K', S, S); object tokens stand in the same order
    keyframes: list = field(default_factory=list)  # per clip uint8 array (S, S, 3)
    frame_times: torch.Tensor | None = None  # (N_t, F) seconds; the keyframe is frame F // 2


def collate_features(features):
    """list of B Features -> z_vision (B, N_v, D_v), times (B, N_v), key_mask bool (B, N_v), padded on the right."""
    z_vision = nn.utils.rnn.pad_sequence([f.z_vision for f in features], batch_first=True)
    times = nn.utils.rnn.pad_sequence([f.times for f in features], batch_first=True)
    lengths = torch.tensor([len(f.times) for f in features], device=times.device)
    return z_vision, times, torch.arange(times.shape[1], device=times.device) < lengths[:, None]


@torch.no_grad()
def perceive(video, encoder, sam, config, order=slice(None)):
    """§3.1: a video file -> Features. SAM makes it slow: trainers and evaluations keep what it returns."""
    c = config
    seen = read_video(video, c.num_clips, c.frames_per_clip, c.image_size, c.keyframe_size, order)
    return look(*seen, encoder, sam, config)


@torch.no_grad()
def look(frames, times, keyframes, encoder, sam, config):
    """What read_video returns -> Features."""
    c, middle, device = config, config.frames_per_clip // 2, encoder.conv1.weight.device
    z_global, patches = encoder(frames.to(device) / 255)  # Eq. 1: (N_t, D_v), (N_t, F // tubelet, P, D_v)
    masks = [segment(keyframe, sam, config) for keyframe in keyframes]
    z_obj = [mask_pool(p[middle // c.tubelet], m) for p, m in zip(patches, masks, strict=True)]  # Eq. 2
    token_times = torch.cat([times.mean(1), times[:, middle].repeat_interleave(torch.tensor([*map(len, masks)]))])
    is_object = torch.arange(len(token_times), device=device) >= len(z_global)
    return Features(torch.cat([z_global, *z_obj]), token_times.to(device), is_object, masks, keyframes, times)


def load_vision(config, directory, device="cpu"):
    """-> (encoder, sam), frozen, with the weights that config names: all that perceive needs."""
    encoder, sam = VideoTransformer(config), build_sam(config)
    load_weights(encoder, _find(config.encoder_weights, directory))
    load_weights(sam, _find(config.sam_weights, directory))
    return encoder.requires_grad_(False).eval().to(device), sam.requires_grad_(False).eval().to(device)


class VidReason(nn.Module):
    """Encoder, SAM, fusion core, LLM. VidReason.load reads a model directory, VidReason.create starts a new model."""
    def __init__(self, config, encoder, sam, llm, tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.directory = config, tokenizer, Path()
        self.encoder, self.sam, self.llm = encoder, sam, llm
        words = llm.get_input_embeddings().weight
        self.fusion = FusionCore(config, words.shape[1], 0.02 if words.is_meta else words.float().std().item())

    @property
    def device(self):
        return self.fusion.queries.device

    def perceive(self, video):
        """§3.1: a video file -> Features."""
        return perceive(video, self.encoder, self.sam, self.config)

    def fuse(self, features, return_weights=False):
        """§3.2: list of B Features -> E_vision (B, N_q, D_llm)."""
        return self.fusion(*(tensor.to(self.device) for tensor in collate_features(features)), return_weights)

    def embed(self, prompt):
        """§3.3.1: E_text (1, L, D_llm) of a prompt in the LLM's chat template."""
        ids = encode_prompt(self.tokenizer, prompt)
        return self.llm.get_input_embeddings()(torch.tensor([ids], device=self.device))

    @torch.no_grad()
    def answer(self, video, prompt=REASON_PROMPT, **generation):
        """Algorithm 1. video: a file or its Features; generation: the options of generate -> the answer as text."""
        features = video if isinstance(video, Features) else self.perceive(video)  # Z_vision = [Z_global ; Z_obj]
        e_vision = self.fuse([features])  # E_vision = f_fusion(Z_vision)
        e_text = self.embed(prompt)  # E_text = TokenizeAndEmbed(P_task)
        e_input = torch.cat([e_vision.to(e_text.dtype), e_text], dim=1)  # E_input = [E_vision ; E_text]
        return self._respond(e_input, torch.ones_like(e_input[..., 0], dtype=torch.long), generation)[0]  # Y

    @torch.no_grad()
    def answer_batch(self, videos, prompts, **generation):
        """Many answers at once. videos: files, Features, or None for a question asked blind -> list of texts."""
        features = [v if v is None or isinstance(v, Features) else self.perceive(v) for v in videos]
        seen = [f for f in features if f is not None]
        e_vision, rows = iter(self.fuse(seen) if seen else []), []
        for f, prompt in zip(features, prompts, strict=True):
            e_text = self.embed(prompt)[0]
            rows.append(e_text if f is None else torch.cat([next(e_vision).to(e_text.dtype), e_text]))
        masks = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        return self._respond(pad(rows), pad(masks), generation)

    def _respond(self, e_input, mask, generation):
        options = {"max_new_tokens": self.config.max_new_tokens, **generation}
        answers = generate(self.llm, self.tokenizer, e_input, mask, **options)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    @torch.no_grad()
    def option_logprobs(self, features, prompt, options):
        """Sum of log P of each option as answer, its end included -> (len(options),). features None: asked blind.
        Prompt and E_vision are read once for all options, which do not see each other."""
        pairs = [encode_pair(self.tokenizer, prompt, option) for option in options]
        conversation = Conversation([([], target) for _, target in pairs], context=pairs[0][0])
        packed = pack([conversation], 0 if features is None else self.config.num_queries).to(self.device)
        logprobs = target_logprobs(self.llm, packed, None if features is None else self.fuse([features]))
        return logprobs.new_zeros(len(options)).index_add(0, packed.owner, logprobs)

    def forward(self, packed, z_vision=None, times=None, key_mask=None):
        """Eq. 6 of a Packed batch with the output of collate_features, or of text alone -> (sum of NLL, tokens)."""
        return loss(self.llm, packed, None if z_vision is None else self.fusion(z_vision, times, key_mask))

    def add_lora(self):
        """Wrap the LLM, and nothing else, with LoRA adapters on all its linear layers (§3.4.2, §4.2.2)."""
        size = {"r": self.config.lora_rank, "lora_alpha": self.config.lora_alpha}
        self.llm = get_peft_model(self.llm, LoraConfig(**size, target_modules="all-linear", task_type="CAUSAL_LM"))

    def freeze(self, stage):
        """§3.4: stage 1 trains the fusion core alone, stage 2 also the LoRA adapters, which add_lora must have made."""
        self.eval().fusion.train()
        self.llm.train(stage == 2)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("fusion.") or (stage == 2 and ".lora_" in name))
        return self

    @classmethod
    def create(cls, config, directory=".", device="cpu", dtype=torch.float32):
        """Frozen parts from where config says (relative to directory), the LLM in dtype, and a new fusion core."""
        model = cls(config, *load_vision(config, directory), *load_llm(_find(config.llm, directory), dtype))
        model.directory = Path(directory)
        return model.requires_grad_(False).eval().to(device)

    @classmethod
    def load(cls, directory, device="cpu", dtype=torch.float32):
        """Read a model directory: config.json, fusion.safetensors, lora/ if any, and what the config names."""
        directory = Path(directory)
        model = cls.create(read_config(directory), directory, dtype=dtype)
        load_weights(model.fusion, directory / "fusion.safetensors")
        if (directory / "lora").is_dir():
            model.add_lora()
            load_weights(model.llm, directory / "lora" / "adapter_model.safetensors")
        return model.requires_grad_(False).eval().to(device)

    def save(self, directory, parts=("encoder", "sam", "llm", "fusion", "lora"), dtype=torch.float32, state=None):
        """Write a model directory, each file aside first. A part left out stays where it is; config.json says where.
        state: whole tensors by parameter name, in place of the model's own, of which a process may hold a shard."""
        directory, config, lora = Path(directory), replace(self.config), isinstance(self.llm, PeftModel)
        directory.mkdir(parents=True, exist_ok=True)
        for part, name in (("encoder", "encoder_weights"), ("sam", "sam_weights"), ("llm", "llm")):
            source = _find(getattr(config, name), self.directory)
            elsewhere = os.path.relpath(source, directory) if isinstance(source, Path) else source
            setattr(config, name, (part if part == "llm" else f"{part}.safetensors") if part in parts else elsewhere)
        cast = lambda state: {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in state.items()}
        state = self.state_dict() if state is None else state
        of = lambda part: {key[len(part) + 1 :]: state[key] for key in state if key.startswith(f"{part}.")}
        for part in {"encoder", "sam", "fusion"} & set(parts):
            _write_aside(directory / f"{part}.safetensors", partial(save_file, cast(of(part))))
        if "llm" in parts:
            base = self.llm.get_base_model() if lora else self.llm
            words = {k.replace(".base_layer", ""): v for k, v in cast(base.state_dict()).items() if ".lora_" not in k}
            if base.config.tie_word_embeddings:
                del words["lm_head.weight"]
            _write_aside(directory / "llm", lambda at: base.save_pretrained(at, state_dict=words))
            self.tokenizer.save_pretrained(directory / "llm")
        if "lora" in parts and lora:
            adapters = cast(get_peft_model_state_dict(self.llm, of("llm"), save_embedding_layers=False))
            adapter = self.llm.peft_config["default"]
            adapter.base_model_name_or_path = config.llm
            _write_aside(directory / "lora", lambda at: (
                adapter.save_pretrained(at), save_file(adapters, at / "adapter_model.safetensors")))  # fmt: skip
        elif "lora" in parts:
            shutil.rmtree(directory / "lora", ignore_errors=True)  # of an older model
        _write_aside(directory / "config.json", lambda at: at.write_text(json.dumps(asdict(config), indent=2) + "\n"))


# --------------------------------------------------------------------------------------- reading weights, strictly
def read_config(directory):
    """The Config of a model directory."""
    try:
        return Config(**json.loads(Path(directory, "config.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise VidReasonError(f"no config.json to read: {error} ({directory}): give a model directory") from error


def _find(name, directory):
    """A path relative to the model directory, if it is one; else the name as it stands, perhaps a hub id."""
    return Path(directory, name) if name and Path(directory, name).exists() else name


def _write_aside(path, write):
    aside = path.with_name(path.name + ".partial")
    write(aside)
    shutil.rmtree(path, ignore_errors=True)  # os.replace cannot replace a directory
    os.replace(aside, path)


def _download(name):
    """The file of a hub repository, as owner/repository/file -> where its copy lies."""
    try:
        owner, repository, file = str(name).split("/", 2)
        return hf_hub_download(f"{owner}/{repository}", file)
    except (OSError, ValueError) as error:
        what = f"no such weights ({name or 'none named'})"
        raise VidReasonError(f"{what}: give a file, or owner/repository/file of the hub") from error


def load_weights(module, path):
    """Fill a module from .safetensors or an upstream .pth (ViCLIP whole or its vision tower, SAM), or a peft model from
    its adapter. Strict: VidReasonError names every key that is missing, unexpected or of another shape."""
    path = path if path and Path(path).is_file() else _download(path)
    torch.serialization.add_safe_globals([(OrderedDict, "utils.easydict.EasyDict")])  # the settings in ViCLIP's .pth
    try:
        found = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors have one each
        raise VidReasonError(f"weights cannot be read: {error} ({path}): download them again") from error
    found = found.get("model", found) if isinstance(found, dict) else {}
    found = {key[15:]: found[key] for key in found if key.startswith("vision_encoder.")} or found
    found.pop("proj", None)  # ViCLIP's way from [CLS] to its contrastive space, of which Eq. 1 makes no use
    adapter = isinstance(module, PeftModel)
    own = get_peft_model_state_dict(module, save_embedding_layers=False) if adapter else module.state_dict()
    problems = [f"missing {key}" for key in own if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in own]
    shapes = {key: (tuple(found[key].shape), tuple(own[key].shape)) for key in own if key in found}
    problems += [f"{key} is {theirs}, not {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]
    if problems:
        raise VidReasonError(f"weights do not fit the model: {', '.join(problems)} ({path}): check config.json")
    set_peft_model_state_dict(module, found) if adapter else module.load_state_dict(found)


def load_llm(name, dtype=torch.float32):
    """-> (causal LM, tokenizer) from a directory or the hub; SDPA, because it takes pack's 4-D boolean mask."""
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        llm, report = AutoModelForCausalLM.from_pretrained(name, **settings)
    except (OSError, ValueError, ImportError) as error:
        advice = "give a directory or an open model (Qwen/Qwen2.5-0.5B-Instruct), or accept its licence and log in"
        raise VidReasonError(f"LLM cannot be loaded: {str(error)[:120]} ({name}): {advice}") from error
    problems = [f"{kind} {key}" for kind, keys in report.items() for key in keys]
    if problems:
        raise VidReasonError(f"weights do not fit the LLM: {', '.join(problems)} ({name}): download them again")
    return llm, tokenizer
