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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

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


def read_video(
    path: str | Path,
    num_clips: int,
    frames_per_clip: int,
    image_size: int,
    keyframe_size: int = 512,
    order: slice | np.ndarray = slice(None),
) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
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
    count = num_clips * frames_per_clip
    try:
        timeline = read_timeline(path)
        end = min(end, timeline.end)
        if start >= end:
            raise VidReasonError(f"nothing is shown from {start} to {end} s ({path}): give a span within the video")
        centres = start + (end - start) * (np.arange(count) + 0.5) / count
        began, pictures = pictures_at(path, timeline, centres, max(image_size, keyframe_size))
    except READ_ERRORS as error:
        raise VidReasonError(f"video is truncated or damaged: {str(error)[:80]} ({path}): get it again") from error

    squares = [center_crop(picture, min(picture.shape[1:])) for picture in pictures]
    shown = np.arange(count)[order].reshape(num_clips, frames_per_clip)
    frames = torch.stack([resize_square(squares[i], image_size) for i in shown.flat])

    keyframes = []
    for i in shown[:, frames_per_clip // 2]:
        side = min(keyframe_size, squares[i].shape[-1])
        keyframe = resize_square(squares[i], side)
        keyframes.append(keyframe.permute(1, 2, 0).numpy())

    seconds = torch.from_numpy(began - start).float()
    times = seconds.clip(min=0)  # what a span begins with may have come before it
    return frames.unflatten(0, shown.shape), times.view(shown.shape), keyframes


def resize_square(square, side):
    """uint8 (3, S, S) -> (3, side, side); pixels of that size already stay as they are."""
    return resize(square, [side], interpolation=InterpolationMode.BICUBIC, antialias=True)


def split_span(path: str | Path) -> tuple[str, float, float]:
    """A W3C media fragment, "film.mp4#t=2.5,8" -> ("film.mp4", 2.5, 8.0), in seconds; without one 0 to infinity."""
    fragment = re.fullmatch(r"(.+)#t=(\d+\.?\d*)?(?:,(\d+\.?\d*)?)?", str(path))
    if fragment is None:
        return str(path), 0.0, math.inf
    file, start, end = fragment.groups()
    return file, float(start or 0), float(end or math.inf)


def check_video(path: str | Path) -> None:
    """Raises VidReasonError unless the file holds a video. Looks at its header only."""
    path = Path(split_span(path)[0])
    advice = "give the path of a video file"
    if path.is_dir():
        raise VidReasonError(f"video is a directory ({path}): {advice}")
    if not path.is_file():
        raise VidReasonError(f"no such video ({path}): {advice}")
    if path.stat().st_size == 0:
        raise VidReasonError(f"video file is empty ({path}): {advice}")

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
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        return None
    chosen = max(streams, key=rank_of_stream)
    chosen.codec_context.thread_count = 1  # programs that read many films have a process for each core
    return chosen


def rank_of_stream(stream):
    """What the stream that players show is largest in."""
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return is_default, stream.width * stream.height


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
            if expected is not None:
                ahead = packet.dts + offset - expected
                seconds = float(ahead * stream.time_base)
                if seconds < -0.1 or seconds > 10:  # FFmpeg's own limits
                    offset = expected - packet.dts
            packet.dts += offset
            if packet.pts is not None:
                packet.pts += offset
            expected = packet.dts + (packet.duration or 0)
        yield packet


class Header(NamedTuple):
    """What a container says of its pictures as a whole."""

    count: int  # how many there are; 0: it does not say
    rate: float  # pictures per second
    tick: float  # seconds of one unit of its time stamps
    says_when_shown: bool  # of each picture
    has_index: bool  # of the places at which decoding may begin


def read_header(container, stream):
    """-> Header, before anything is read of the stream."""
    return Header(
        count=stream.frames,
        rate=float(stream.average_rate or 25),
        tick=float(stream.time_base),
        says_when_shown=says_when_shown(container, stream),
        has_index=container.format.name.startswith(INDEXED),
    )


def says_when_shown(container, stream):
    """Whether a container says of each picture when it is shown. AVI and ASF say when it is decoded, another time where
    there are B-frames; so does Matroska of a stream that it holds as an AVI would, which bears a codec tag. A program
    stream says it of the first picture in a packet only."""
    name = container.format.name
    if name in ("avi", "asf", "mpeg"):
        return False
    codec_tag = stream.codec_context.codec_tag.strip("\0")
    return not (name.startswith("matroska") and codec_tag)


class CodedPicture(NamedTuple):
    """What a container tells of one picture; its time stamps are in ticks, or None."""

    shown_at: int | None
    decoded_at: int | None
    duration: int
    is_key: bool
    is_hidden: bool  # by an edit list


def coded_picture(packet):
    """A packet of PyAV -> CodedPicture."""
    duration = packet.duration or 0
    return CodedPicture(packet.pts, packet.dts, duration, packet.is_keyframe, packet.is_discard)


@dataclass
class Timeline:
    """When the pictures of a film come on screen, in seconds since the first one."""

    starts: np.ndarray  # of every picture, ascending
    end: float  # when the last one goes
    zero: int  # time stamp of the first one, in ticks
    tick: float  # seconds
    counted: bool  # time stamps are not to be trusted: the i-th picture that comes out of the decoder is at starts[i]
    keyframes: np.ndarray  # seconds at which decoding may begin, ascending; empty: at the start of the file only


def read_timeline(path: str | Path) -> Timeline:
    """The timeline by the packets of a file, none of which is decoded. Raises OSError if many of them are missing."""
    with av.open(path) as container:
        stream = picture_stream(container)
        header = read_header(container, stream)
        pictures = [coded_picture(packet) for packet in demux(container, stream) if packet.size]
    if not pictures:
        raise OSError("no picture is there")
    check_complete(pictures, header)
    return timeline_of(pictures, header)


def check_complete(pictures, header):
    """A header may be off by a few pictures, and an AVI's counts those that are left out; a broken download lacks
    many."""
    decoded_at = [picture.decoded_at for picture in pictures if picture.decoded_at is not None]
    span = 0
    if decoded_at:
        span = max(decoded_at) - min(decoded_at)
    there = max(len(pictures), span * header.tick * header.rate)
    if there < 0.9 * header.count:
        raise OSError(f"only {len(pictures)} of {header.count} frames are there")


def timeline_of(pictures, header):
    """-> Timeline of all CodedPictures of a file that are shown."""
    shown = [picture for picture in pictures if not picture.is_hidden]
    shown = shown or pictures
    stamps = [picture.shown_at for picture in shown]
    counted = not header.says_when_shown or None in stamps
    if counted:
        stamps = [picture.decoded_at for picture in shown]
    step = 1 / (header.rate * header.tick)  # ticks from one picture to the next
    if None in stamps:
        stamps = [step * i for i in range(len(shown))]
    zero = min(stamps)
    starts = (np.sort(stamps) - zero) * header.tick

    last = shown[stamps.index(max(stamps))]
    lasts = last.duration * header.tick
    if not lasts:
        lasts = np.median(np.diff(starts)) if len(starts) > 1 else step * header.tick

    keys = []
    if header.has_index and not counted:
        keys = [picture.shown_at for picture in shown if picture.is_key]
    keyframes = (np.sort(keys) - zero) * header.tick
    return Timeline(starts, float(starts[-1] + lasts), zero, header.tick, counted, keyframes)


class OutOfStep(OSError):
    """What comes out of the decoder contradicts the timeline."""


def pictures_at(
    path: str | Path, timeline: Timeline, seconds: np.ndarray, side: int
) -> tuple[np.ndarray, list[torch.Tensor]]:
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
    announced = timeline.starts[np.searchsorted(timeline.starts, seconds, side="right") - 1]
    with av.open(path) as container:
        player = Player(container, timeline, announced, side)
        for now, start in zip(seconds, announced, strict=True):
            pictures.append(player.picture_at(now, start))
            began.append(player.shown.start)
        if timeline.counted:
            deque(player.coming_pictures, maxlen=0)  # whether the count was right is known at the end of the film
    return np.array(began), pictures


class Shown(NamedTuple):
    """A decoded frame and the second at which it comes on screen."""

    start: float
    frame: av.VideoFrame | None  # None: its picture has been made


class Player:
    """Plays a film forwards, jumping over what nobody wants to see where the container has an index.

    wanted: seconds at which the pictures that will be asked for begin. side: of pictures, see to_picture.
    """

    def __init__(self, container, timeline, wanted, side):
        self.container = container
        self.stream = picture_stream(container)
        self.timeline = timeline
        self.jumps = len(timeline.keyframes) > 0
        self.wanted_stamps = None
        if self.jumps:
            self.wanted_stamps = {timeline.zero + round(start / timeline.tick) for start in wanted}

        self.begin(self.play())
        if self.shown is None:
            raise OSError("no frame can be decoded")
        self.side = side
        self.aspect = float(self.stream.sample_aspect_ratio or 1)
        # asked once: a frame that was asked for its side data stays in memory until Python looks for cycles
        matrix = self.shown.frame.side_data.get("DISPLAYMATRIX")
        self.matrix = None if matrix is None else np.frombuffer(matrix, np.int32).tolist()

    def begin(self, pictures):
        """Show the first of `pictures`, an iterator of Shown."""
        self.coming_pictures = pictures
        self.shown = next(pictures, None)
        self.coming = next(pictures, None)
        self.picture = None

    def picture_at(self, now, announced):
        """-> the picture on screen `now`, a second after those asked before. `announced`: when it should have begun."""
        keyframes = self.timeline.keyframes
        passed = keyframes[keyframes <= now]
        if self.coming and len(passed) and self.coming.start < passed[-1]:
            self.begin(self.jump(passed[-1]))

        while self.coming and self.coming.start <= now:
            self.shown = self.coming
            self.coming = self.picture = None
            if self.shown.start == announced:
                self.make_picture()  # at once: a frame of an 8K film holds 50 MB while the next is decoded
            self.coming = next(self.coming_pictures, None)

        if self.jumps and self.shown.start != announced:
            raise OutOfStep("another picture than the container announced")
        if self.picture is None:
            self.make_picture()
        return self.picture

    def make_picture(self):
        """Turn the frame on screen into `picture`, and let go of it."""
        self.picture = to_picture(self.shown.frame, self.aspect, self.matrix, self.side)
        self.shown = Shown(self.shown.start, None)

    def play(self):
        """-> iterator of Shown, from where the container stands."""
        frames = decode(self.container, self.stream, self.wanted_stamps)
        if self.timeline.counted:
            return play_by_count(frames, self.timeline)
        return play_by_stamp(frames, self.timeline)

    def jump(self, keyframe):
        """Play from `keyframe` seconds on. Pictures before that lean on others that were jumped over."""
        stamp = self.timeline.zero + round(keyframe / self.timeline.tick)
        self.container.seek(stamp, stream=self.stream)
        pictures = itertools.dropwhile(lambda shown: shown.start < keyframe, self.play())
        first = next(pictures, None)
        if first is None or first.start != keyframe:
            raise OutOfStep("a jump did not lead to its keyframe")
        return itertools.chain([first], pictures)


def play_by_stamp(frames, timeline):
    """Yields frames as Shown, each when its own time stamp says."""
    last = -math.inf
    for frame in frames:
        if frame.pts is None:
            raise OutOfStep("a picture without time stamp")
        start = (frame.pts - timeline.zero) * timeline.tick
        if start <= last:
            raise OutOfStep("time goes back")
        last = start
        yield Shown(start, frame)
        del frame  # so that it is free while the next is decoded


def play_by_count(frames, timeline):
    """Yields frames as Shown, the i-th when the timeline says."""
    count = 0
    for frame in frames:
        if count == len(timeline.starts):
            raise OutOfStep("more pictures than packets")
        yield Shown(timeline.starts[count], frame)
        del frame
        count += 1
    if count < len(timeline.starts):
        raise OutOfStep("fewer pictures than packets")


def decode(container, stream, wanted_stamps=None):
    """Yields the frames of a stream, or without some that no other leans on if their time stamp is not wanted.
    What cannot be decoded is left out, as by players: the picture before stays."""
    for packet in demux(container, stream):
        if wanted_stamps is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted_stamps else "NONREF"
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
    full_width = frame.width * aspect
    shrink = min(1.0, side / min(full_width, frame.height))
    width, height = round(full_width * shrink), round(frame.height * shrink)
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
    if down < 0:
        picture = picture[::-1]
    if right < 0:
        picture = picture[:, ::-1]
    return picture


# ------------------------------------------------------------------------------------ Eq. 1: the video transformer
class EncoderBlock(nn.Module):
    """Pre-norm transformer block with CLIP's QuickGELU; its parameter names are those of the ViCLIP checkpoints."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"c_fc": widen, "c_proj": narrow})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        y = y * torch.sigmoid(1.702 * y)  # QuickGELU
        return x + self.mlp["c_proj"](y)


class VideoTransformer(nn.Module):
    """VideoTransformer(.) of Eq. 1: joint space-time attention over the patches of one clip and one [CLS] token.
    It is the vision tower of ViCLIP (InternVideo, OpenGVLab): same parameter names and arithmetic, so upstream weights
    load as they are. Two things are ours and off by default: tubelet > 1 and frame_difference > 0 (see Config)."""

    def __init__(self, config: Config):
        super().__init__()
        width, patch = config.encoder_width, config.patch_size
        self.tubelet = config.tubelet
        self.frame_difference = config.frame_difference
        block = (config.tubelet, patch, patch)
        self.conv1 = nn.Conv3d(3, width, kernel_size=block, stride=block, bias=False)

        patches = (config.image_size // patch) ** 2
        steps = config.frames_per_clip // config.tubelet
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + patches, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, steps, width))

        self.ln_pre = nn.LayerNorm(width)
        blocks = [EncoderBlock(width, config.encoder_heads) for _ in range(config.encoder_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = nn.LayerNorm(width)

        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet's pixels
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """clips (B, F, 3, H, W) float in [0, 1] -> cls (B, D_v), patches (B, F // tubelet, P, D_v), row by row."""
        x = (clips - self.mean) / self.std
        if self.frame_difference > 0:
            x = self.show_motion(x)
        x = self.conv1(x.transpose(1, 2))  # (B, D_v, F // tubelet, rows, columns)
        x = x.flatten(3).permute(0, 2, 3, 1)  # (B, F // tubelet, P, D_v)
        x = x + self.positional_embedding[1:]
        x = x + self.temporal_positional_embedding[:, :, None]

        cls = self.class_embedding + self.positional_embedding[0]
        cls = cls.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x.flatten(1, 2)], dim=1))
        for block in self.transformer["resblocks"]:
            x = block(x)
        x = self.ln_post(x)

        patches_per_frame = len(self.positional_embedding) - 1
        return x[:, 0], x[:, 1:].unflatten(1, (-1, patches_per_frame))

    def show_motion(self, x):
        """Each pair of frames (a, b) becomes its mean and its scaled difference: (B, F, 3, H, W) of the same shape."""
        a, b = x[:, 0::2], x[:, 1::2]
        difference = (b - a) * self.frame_difference
        return torch.stack([(a + b) / 2, difference], dim=2).flatten(1, 2)


# ----------------------------------------------------------------------------- §3.1.2: masks, Eq. 2: object tokens
def build_sam(config: Config) -> Sam:
    """Segment Anything: "vit_b", "vit_l", "vit_h" as published, or "toy", 0.45 M parameters of the same classes."""
    if config.sam in ("vit_b", "vit_l", "vit_h"):
        return sam_model_registry[config.sam]()
    if config.sam != "toy":
        raise VidReasonError(f"unknown SAM '{config.sam}' (config.sam): choose toy, vit_b, vit_l or vit_h")
    side, patch, width = 96, 8, 48
    grid = side // patch
    encoder = ImageEncoderViT(
        img_size=side,
        patch_size=patch,
        embed_dim=96,
        depth=3,
        num_heads=4,
        mlp_ratio=3,
        out_chans=width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=0,
    )
    prompts = PromptEncoder(width, (grid, grid), (side, side), mask_in_chans=16)
    mixer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=192, num_heads=4)
    decoder = MaskDecoder(
        transformer_dim=width,
        transformer=mixer,
        iou_head_depth=2,
        iou_head_hidden_dim=width,
    )
    return Sam(encoder, prompts, decoder).eval()


mask_generator = lru_cache(maxsize=2)(SamAutomaticMaskGenerator)  # one per SAM, not one per frame


def segment(keyframe: np.ndarray, sam: Sam, config: Config) -> torch.Tensor:
    """Grid-prompted masks of one keyframe (§3.1.2): the K best by stability x predicted IoU, the larger first on ties.
    keyframe uint8 array (H, W, 3) RGB -> masks bool (K', H, W) on the CPU, 0 <= K' <= K; a flat picture has none."""
    if config.masks_per_keyframe == 0:
        return torch.zeros(0, *keyframe.shape[:2], dtype=torch.bool)
    generator = mask_generator(
        sam,
        config.points_per_side,
        pred_iou_thresh=config.sam_iou_threshold,
        stability_score_thresh=config.sam_stability_threshold,
    )
    answers = [answer for answer in generator.generate(keyframe) if answer["area"] > 0]
    answers.sort(key=worst_last)
    best = [torch.from_numpy(answer["segmentation"]) for answer in answers[: config.masks_per_keyframe]]
    if not best:
        return torch.zeros(0, *keyframe.shape[:2], dtype=torch.bool)
    return torch.stack(best)


def worst_last(answer):
    """The place of one of SAM's answers in their order."""
    quality = answer["stability_score"] * answer["predicted_iou"]
    return -quality, -answer["area"]


def mask_pool(patches: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Eq. 2: z_obj = 1/|M| sum over pixels p in M of PatchEmbed(p), for every mask at once.
    Pixels of one patch share its embedding, so the sum is (pixels of M in each patch / |M|) @ patches: one matmul, the
    same number. patches (P, D_v) of a square grid, masks bool (K, H, W) -> (K, D_v). An empty mask gives zeros."""
    grid = int(len(patches) ** 0.5)
    masks = masks.to(patches)
    _, height, width = masks.shape
    rows = patch_of_pixel(height, grid).to(patches)
    columns = patch_of_pixel(width, grid).to(patches)
    counts = rows.T @ masks @ columns  # (K, grid, grid): pixels of each mask in each patch
    area = masks.sum((1, 2)).clamp(min=1)
    return (counts.flatten(1) / area[:, None]) @ patches


def patch_of_pixel(pixels, grid):
    """One-hot (pixels, grid): which of `grid` patches along one side holds the centre of each pixel."""
    centres = torch.arange(pixels) + 0.5
    return F.one_hot((centres * grid / pixels).long(), grid)


# -------------------------------------------------------------------------- §3.2: the fusion core, Eq. 3 and Eq. 4
def attention(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Eq. 3: softmax(Q K^T / sqrt(d_k)) V.
    Q (B, h, N_q, d_k), K and V (B, h, N, d_k), key_mask bool (B, N), True where a key is real -> (B, h, N_q, d_k), and
    with return_weights also the softmax (B, h, N_q, N). The mask is boolean on purpose: with no real key the answer is
    zero, where large negative numbers would silently give the mean over the padding."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if not return_weights:
        return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    scores = Q @ K.transpose(-2, -1) / Q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num()  # no real key: 0 / 0
    return weights @ V, weights


def time_embedding(seconds: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of a time at periods from 1 second to 10 minutes: seconds (B, N) -> (B, N, width)."""
    periods = torch.logspace(0, 1, width // 2, base=600, device=seconds.device)
    angles = 2 * torch.pi * seconds[..., None].float() / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FusionLayer(nn.Module):
    """Self-attention among the queries, cross-attention to Z_vision, feed-forward: pre-norm and residual, each."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_self = nn.LayerNorm(width)
        self.norm_cross = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)

        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_out = nn.Linear(width, width)
        self.W_Q = nn.Linear(width, width)
        self.W_K = nn.Linear(width, width)
        self.W_V = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries, z_vision, key_mask, return_weights=False):
        """queries (B, N_q, D_q), z_vision (B, N_v, D_q), key_mask (B, N_v) -> queries, weights (B, h, N_q, N_v)."""
        Q, K, V = self.self_qkv(self.norm_self(queries)).chunk(3, dim=-1)
        mixed = attention(self.split_heads(Q), self.split_heads(K), self.split_heads(V))
        queries = queries + self.self_out(self.join_heads(mixed))

        Q = self.split_heads(self.W_Q(self.norm_cross(queries)))
        K = self.split_heads(self.W_K(z_vision))
        V = self.split_heads(self.W_V(z_vision))
        weights = None
        if return_weights:
            seen, weights = attention(Q, K, V, key_mask, return_weights=True)
        else:
            seen = attention(Q, K, V, key_mask)
        queries = queries + self.cross_out(self.join_heads(seen))

        return queries + self.ffn(self.norm_ffn(queries)), weights

    def split_heads(self, x):
        """(B, N, D_q) -> (B, h, N, d_k)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join_heads(self, x):
        """(B, h, N, d_k) -> (B, N, D_q)"""
        return x.transpose(1, 2).flatten(2)


class FusionCore(nn.Module):
    """§3.2: N_q learnable queries distil Z_vision, of any length, into N_q tokens in the LLM's embedding space.
    output_scale: standard deviation of E_vision at the start; that of the LLM's word embeddings suits a frozen LLM."""

    def __init__(self, config: Config, llm_width: int, output_scale: float = 0.02):
        super().__init__()
        width = config.fusion_width
        # wide apart: with the customary 0.02 what all layers add drowns the difference, and two queries leave an
        # untrained core with a mean cosine of .996; with 0.5 it is .44 (toy; the paper's sizes .998 and .67)
        self.queries = nn.Parameter(0.5 * torch.randn(config.num_queries, width))
        self.norm_in = nn.LayerNorm(config.encoder_width)
        self.proj_in = nn.Linear(config.encoder_width, width)
        layers = [FusionLayer(width, config.fusion_heads) for _ in range(config.fusion_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm_out = nn.LayerNorm(width)
        self.linear_proj = nn.Linear(width, llm_width)
        nn.init.normal_(self.linear_proj.weight, std=output_scale / width**0.5)  # its input has unit variance
        nn.init.zeros_(self.linear_proj.bias)
        self.time_embedding = config.time_embedding

    def forward(
        self,
        z_vision: torch.Tensor,
        times: torch.Tensor,
        key_mask: torch.Tensor,
        return_weights: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """z_vision (B, N_v, D_v), times (B, N_v) seconds, key_mask bool (B, N_v), True = real -> E_vision
        (B, N_q, D_llm); with return_weights also where each query looked: (B, layers, heads, N_q, N_v), sums to 1."""
        z = self.proj_in(self.norm_in(z_vision))
        if self.time_embedding:  # cross-attention sees a set: without this no order, hence no before and after
            z = z + time_embedding(times, z.shape[-1]).to(z.dtype)

        queries = self.queries.expand(len(z), -1, -1)
        if not self.layers:  # the paper's ablation "w/o fusion core": the mean of Z_vision and a linear projection
            queries = queries + masked_mean(z, key_mask)
        all_weights = []
        for layer in self.layers:
            queries, weights = layer(queries, z, key_mask, return_weights)
            all_weights.append(weights)

        e_vision = self.linear_proj(self.norm_out(queries))  # Eq. 4
        if return_weights:
            return e_vision, torch.stack(all_weights, dim=1)
        return e_vision


def masked_mean(z, key_mask):
    """(B, N, D) -> (B, 1, D), the mean over real tokens."""
    total = (z * key_mask[..., None]).sum(1, keepdim=True)
    return total / key_mask.sum(1)[:, None, None]


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


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a user's turn and all that the chat template writes before the assistant's words."""
    turn = template_of(tokenizer, tokenizer.chat_template)
    return token_ids(tokenizer, turn.before + turn.plain(prompt) + turn.between)


def encode_pair(tokenizer, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """-> (prompt ids, target ids): the target is what the assistant adds, up to the template's end-of-turn token.
    Blanks around a text are not part of it, and a text that spells a special token does not become one."""
    turn = template_of(tokenizer, tokenizer.chat_template)
    asked = turn.before + turn.plain(prompt) + turn.between
    said = turn.lead + turn.plain(target) + turn.end
    prompt_ids = token_ids(tokenizer, asked)
    ids = token_ids(tokenizer, asked + said)
    start = len(prompt_ids)
    if ids[:start] != prompt_ids:  # two words became one token across the border
        ids = prompt_ids + token_ids(tokenizer, said)
    target_ids = ids[start:]
    if not turn.end:
        target_ids.append(tokenizer.eos_token_id)
    return prompt_ids, target_ids


def token_ids(tokenizer, text):
    """Of a text in which the template has written all special tokens."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class Turn(NamedTuple):
    """What a chat template writes around a question and its answer: [before | Q | between | lead | A | end]."""

    before: str
    between: str
    lead: str  # blanks that the answer's first token carries
    end: str  # up to the first special token; empty if there is none
    special: re.Pattern  # what the tokenizer takes for more than text

    def plain(self, text: str) -> str:
        """A text without blanks around it, the special tokens that it spells broken in two: "< |im_end|>"."""
        return self.special.sub(lambda token: f"{token[0][:1]} {token[0][1:]}", text.strip())


@lru_cache(maxsize=8)
def template_of(tokenizer, chat_template) -> Turn:
    """A chat template, taken apart at a question and an answer. What it writes before an answer that it has is the
    prompt, not what it would write for an answer to come: some templates open a thought there, or close an empty one
    here, and all that is no part of the answer. Raises VidReasonError for a template that changes what was said."""
    name = tokenizer.name_or_path
    if not chat_template:
        raise VidReasonError(f"tokenizer has no chat template ({name}): use an instruction-tuned LLM")
    question, answer = "QUESTION", "ANSWER"
    user = {"role": "user", "content": question}
    turns = [user, {"role": "assistant", "content": answer}]
    system = []
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may raise what it likes: some demand a system's turn
        system = [{"role": "system", "content": "You are a helpful assistant."}]
        try:
            whole = tokenizer.apply_chat_template(system + turns, tokenize=False)
        except Exception as error:
            raise VidReasonError(f"chat template fails: {error} ({name}): use another LLM") from error
    if whole.count(question) != 1 or whole.count(answer) != 1:
        raise VidReasonError(f"chat template changes what is said ({name}): use another LLM")

    before, rest = whole.split(question)
    between, after = rest.split(answer)
    lead = ""
    begun = tokenizer.apply_chat_template([*system, user], tokenize=False, add_generation_prompt=True)
    begun = begun.removeprefix(before + question)
    if between.startswith(begun) and between[len(begun) :].isspace():
        lead = between[len(begun) :]
        between = begun

    names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile("|".join(names) or "(?!)")  # without any, what matches nothing
    end_of_turn = special.search(after)
    end = after[: end_of_turn.end()] if end_of_turn else ""
    return Turn(before, between, lead, end, special)


@dataclass
class Conversation:
    """What is said about one video: (prompt ids, target ids) pairs that do not see each other. When training on text
    alone, the context takes the place of E_vision: tokens before the pairs that all of them see."""

    pairs: list[tuple[list[int], list[int]]]
    context: list[int] = field(default_factory=list)

    def tokens(self) -> list[int]:
        """All of it in a row."""
        tokens = list(self.context)
        for prompt, target in self.pairs:
            tokens += prompt + target
        return tokens


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


PADDING, PREFIX = -1, 0  # segments of a row; its pairs are 1, 2, ...


def pack(conversations: list[Conversation], num_queries: int) -> Packed:
    """One row per video: [E_vision | context | pair 1 | pair 2 | ...], so that E_vision is read once for all its pairs.
    Each pair sees the prefix and itself only, and its positions restart right after the prefix: its loss is exactly
    that of a row of its own. num_queries is N_q, or 0 for rows without vision. -> Packed, on the CPU."""
    texts = [conversation.tokens() for conversation in conversations]
    length = num_queries + max(map(len, texts))
    ids = torch.zeros(len(texts), length - num_queries, dtype=torch.long)
    position_ids = torch.zeros(len(texts), length, dtype=torch.long)
    segments = torch.full((len(texts), length), PADDING)
    rows, columns, targets, owner = [], [], [], []
    pairs_before = 0

    for row, (conversation, text) in enumerate(zip(conversations, texts, strict=True)):
        prefix = num_queries + len(conversation.context)
        ids[row, : len(text)] = torch.tensor(text)
        position_ids[row, :prefix] = torch.arange(prefix)
        segments[row, :prefix] = PREFIX

        start = prefix
        for segment, (prompt, target) in enumerate(conversation.pairs, 1):
            first = start + len(prompt)  # column of the first target token
            end = first + len(target)
            # to the pair it must look as if it alone followed the prefix
            position_ids[row, start:end] = torch.arange(prefix, prefix + end - start)
            segments[row, start:end] = segment

            before = first - 1 if prompt else prefix - 1  # without a prompt the end of the prefix predicts the first
            assert before >= 0, "the first target token needs something to be predicted from"
            if target:
                columns += [before, *range(first, end - 1)]
            rows += [row] * len(target)
            owner += [pairs_before] * len(target)
            targets += target
            pairs_before += 1
            start = end

    causal = torch.ones(length, length, dtype=torch.bool).tril()
    looks_at_prefix = segments[:, None] == PREFIX
    looks_at_itself = segments[:, None] == segments[:, :, None]
    mask = causal & (looks_at_prefix | looks_at_itself)
    places = (torch.tensor(numbers) for numbers in (rows, columns, targets, owner))
    return Packed(ids, position_ids, mask[:, None], *places)


# -------------------------------------------------------------------------------- §3.3.2: the LLM, Eq. 5 and Eq. 6
def target_logprobs(llm, packed: Packed, e_vision: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 5: log P(y_t | E_input, y_<t) for every target token of a Packed batch -> (M,) float32, of any causal LLM:
    its own forward, in rows as they are packed where its attention allows that, else with a row for each pair.
    e_vision (B, N_q, D_llm), or None for rows of text alone. Vocabulary-wide logits exist at target positions only."""
    e_input = llm.get_input_embeddings()(packed.ids)
    if e_vision is not None:
        e_input = torch.cat([e_vision.to(e_input.dtype), e_input], dim=1)  # E_input = [E_vision ; E_text]
    if packed.attention_mask.shape[-1] <= longest_packed_row(llm):
        logits = packed_logits(llm, packed, e_input)
    else:
        logits = unpacked_logits(llm, packed, e_input)
    return -F.cross_entropy(logits.float(), packed.targets, reduction="none")


def packed_logits(llm, packed, e_input):
    """(M, vocabulary), from rows as they are packed; the mask takes the place of whatever the LLM would mask itself."""
    mask, positions = packed.attention_mask, packed.position_ids
    return logits_at(llm, e_input, packed.rows, packed.columns, attention_mask=mask, position_ids=positions)


def unpacked_logits(llm, packed, e_input):
    """(M, vocabulary), from a row for each pair: what the last position of a pair may look at, in its order."""
    sequences, rows, columns = [], [], []
    _, sizes = packed.owner.unique_consecutive(return_counts=True)  # of the pairs, which stand one after another
    places = zip(packed.rows.split(sizes.tolist()), packed.columns.split(sizes.tolist()), strict=True)
    for row, (rows_of_pair, columns_of_pair) in enumerate(places):
        visible = packed.attention_mask[rows_of_pair[0], 0, columns_of_pair[-1]].nonzero()[:, 0]
        sequences.append(e_input[rows_of_pair[0], visible])
        rows.append(torch.full_like(rows_of_pair, row))
        columns.append(torch.searchsorted(visible, columns_of_pair))
    # padded on the right: no position looks to its right, so no mask is needed
    e_input = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return logits_at(llm, e_input, torch.cat(rows), torch.cat(columns))


def logits_at(llm, e_input, rows, columns, **inputs):
    """The logits of the LLM's own forward, scaled and capped as it does, at some places only -> (M, vocabulary)"""

    def select(head, args):
        """What the LLM's head is asked for."""
        return (args[0][rows, columns][None],)

    hook = llm.get_output_embeddings().register_forward_pre_hook(select)
    try:
        return llm(inputs_embeds=e_input, use_cache=False, **inputs).logits[0]
    finally:
        hook.remove()


LONGEST_PACKED_ROWS = WeakKeyDictionary()  # what longest_packed_row found out


def longest_packed_row(llm) -> float:
    """Up to how many tokens packed rows give the logits that rows of their own give; 0 if they never do."""
    if llm not in LONGEST_PACKED_ROWS:
        LONGEST_PACKED_ROWS[llm] = attention_window(llm) if reads_packed_rows(llm) else 0
    return LONGEST_PACKED_ROWS[llm]


def reads_packed_rows(llm) -> bool:
    """Whether packed rows, if short, give the logits of rows of their own. No list says it of every family (ALiBi,
    state spaces and convolutions do not, some attentions take no such mask), so the LLM is asked, with a few tokens."""
    if llm.get_input_embeddings().weight.is_meta:  # a plan: there are no logits
        return True
    was_training = llm.training
    llm.eval()
    agrees = agrees_with_itself(llm)
    llm.train(was_training)
    return agrees


@torch.no_grad()
def agrees_with_itself(llm):
    """Two ways to the same logits, of two rows of which one has two pairs."""
    if llm.config.get_text_config()._attn_implementation == "eager":  # adds a mask of bools to its scores
        return False
    words = llm.get_input_embeddings()
    first = Conversation([([1, 2, 3], [4, 5]), ([6, 7], [8, 9, 10])], context=[11, 12, 13])
    second = Conversation([([14, 15], [16])])
    packed = pack([first, second], 0).to(words.weight.device)
    e_input = words(packed.ids)
    apart = unpacked_logits(llm, packed, e_input).float()
    try:
        together = packed_logits(llm, packed, e_input).float()
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError):  # it takes no such mask
        return False
    difference = (together - apart).abs().mean()
    tolerance = 1e-3 if e_input.dtype == torch.float32 else 0.03
    return bool(difference < tolerance * apart.std())


def attention_window(llm) -> float:
    """How far back every layer of the LLM looks, in tokens. A packed row must not be longer: the mask of a packed row
    takes the place of the layer's own."""
    config = llm.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) == {"full_attention"}:
        return math.inf
    sizes = [math.inf]
    for name, value in config.to_dict().items():
        limits = re.search("window$|window_size$|chunk_size$|local_attention$", name)
        if limits and type(value) is int and value > 0:
            sizes.append(value)
    return min(sizes)


def loss(llm, packed: Packed, e_vision: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """Eq. 6: -sum_t log P(y*_t | E_vision, y*_<t) over a Packed batch -> (the sum, not the mean; number of targets)."""
    return -target_logprobs(llm, packed, e_vision).sum(), len(packed.targets)


def generate(
    llm,
    tokenizer,
    e_input: torch.Tensor,
    mask: torch.Tensor,
    max_new_tokens: int,
    beams: int = 1,
    answers: int = 1,
    top_p: float | None = None,
    temperature: float | None = None,
    streamer=None,
) -> list[list[int]]:
    """Decoding by Eq. 5: greedy, beam search (beams > 1) or nucleus sampling (top_p or temperature given).
    e_input (B, L, D_llm), LEFT-padded, mask (B, L), 0 at padding -> B x answers lists of new token ids, each cut at the
    first stop token: the tokenizer's, one of the LLM's own list, or the one that its chat template writes."""
    stop = stop_tokens(llm, tokenizer)
    padding = tokenizer.pad_token_id
    sampling = top_p is not None or temperature is not None
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        num_return_sequences=answers,
        do_sample=sampling,
        top_p=1.0 if top_p is None else top_p,
        temperature=1.0 if temperature is None else temperature,
        top_k=0 if sampling else 50,  # 50 is the library's "not set"
        repetition_penalty=1.0,  # many LLMs ship another default, which cannot see a prompt made of embeddings
        eos_token_id=sorted(stop),
        pad_token_id=min(stop) if padding is None else padding,
    )

    def continued(e_input, mask):
        """What a batch goes on with."""
        new_ids = llm.generate(
            inputs_embeds=e_input,
            attention_mask=mask,
            generation_config=settings,
            streamer=streamer if beams == 1 else None,  # a beam's words are not final until it ends
        )
        return [until(stop, row) for row in new_ids.tolist()]

    if mask.all() or not getattr(llm, "_is_stateful", False):
        return continued(e_input, mask)
    answered = []
    for row, real in zip(e_input, mask, strict=True):  # a state runs through padding, too
        answered += continued(row[real > 0][None], real[real > 0][None])
    return answered


def stop_tokens(llm, tokenizer):
    """Whatever may end an answer: the tokenizer's token, the LLM's own list, the end of turn of the chat template."""
    _, target = encode_pair(tokenizer, "a", "b")
    own = llm.generation_config.eos_token_id
    if not isinstance(own, list):
        own = [own]
    return {tokenizer.eos_token_id, target[-1], *own} - {None}


def until(stop, tokens):
    """The tokens before the first one that is in `stop`."""
    return list(itertools.takewhile(lambda token: token not in stop, tokens))


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


def collate_features(features: list[Features]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """list of B Features -> z_vision (B, N_v, D_v), times (B, N_v), key_mask bool (B, N_v), padded on the right."""
    z_vision = nn.utils.rnn.pad_sequence([video.z_vision for video in features], batch_first=True)
    times = nn.utils.rnn.pad_sequence([video.times for video in features], batch_first=True)
    lengths = torch.tensor([len(video.times) for video in features], device=times.device)
    positions = torch.arange(times.shape[1], device=times.device)
    return z_vision, times, positions < lengths[:, None]


def perceive(
    video: str | Path,
    encoder: VideoTransformer,
    sam: Sam,
    config: Config,
    order: slice | np.ndarray = slice(None),
) -> Features:
    """§3.1: a video file -> Features. SAM makes it slow: trainers and evaluations keep what it returns."""
    frames, times, keyframes = read_video(
        video,
        config.num_clips,
        config.frames_per_clip,
        config.image_size,
        config.keyframe_size,
        order,
    )
    return look(frames, times, keyframes, encoder, sam, config)


@torch.no_grad()
def look(
    frames: torch.Tensor,
    times: torch.Tensor,
    keyframes: list[np.ndarray],
    encoder: VideoTransformer,
    sam: Sam,
    config: Config,
) -> Features:
    """§3.1: what read_video returns -> Features."""
    device = encoder.conv1.weight.device
    middle = config.frames_per_clip // 2
    z_global, patches = encoder(frames.to(device) / 255)  # Eq. 1: (N_t, D_v), (N_t, F // tubelet, P, D_v)

    masks = [segment(keyframe, sam, config) for keyframe in keyframes]
    patches_of_keyframes = patches[:, middle // config.tubelet]  # (N_t, P, D_v)
    z_obj = [mask_pool(*of_clip) for of_clip in zip(patches_of_keyframes, masks, strict=True)]  # Eq. 2

    objects_per_clip = torch.tensor([len(of_clip) for of_clip in masks])
    object_times = times[:, middle].repeat_interleave(objects_per_clip)
    token_times = torch.cat([times.mean(1), object_times]).to(device)
    is_object = torch.arange(len(token_times), device=device) >= len(z_global)
    return Features(torch.cat([z_global, *z_obj]), token_times, is_object, masks, keyframes, times)


def load_vision(config: Config, directory: str | Path, device="cpu") -> tuple[VideoTransformer, Sam]:
    """-> (encoder, sam), frozen, with the weights that config names: all that perceive needs."""
    encoder = VideoTransformer(config)
    sam = build_sam(config)
    load_weights(encoder, resolve(config.encoder_weights, directory))
    load_weights(sam, resolve(config.sam_weights, directory))
    return frozen(encoder).to(device), frozen(sam).to(device)


def frozen(module):
    """Nothing of it is trained, and dropout, if it has any, is off."""
    return module.requires_grad_(False).eval()


class VidReason(nn.Module):
    """Encoder, SAM, fusion core, LLM. VidReason.load reads a model directory, VidReason.create starts a new model."""

    def __init__(self, config: Config, encoder: VideoTransformer, sam: Sam, llm, tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.directory = Path()
        self.encoder = encoder
        self.sam = sam
        self.llm = llm
        words = llm.get_input_embeddings().weight
        spread = 0.02 if words.is_meta else words.float().std().item()
        self.fusion = FusionCore(config, words.shape[1], spread)

    @property
    def device(self):
        return self.fusion.queries.device

    def perceive(self, video: str | Path) -> Features:
        """§3.1: a video file -> Features."""
        return perceive(video, self.encoder, self.sam, self.config)

    def fuse(self, features: list[Features], return_weights: bool = False):
        """§3.2: list of B Features -> E_vision (B, N_q, D_llm)."""
        tensors = [tensor.to(self.device) for tensor in collate_features(features)]
        return self.fusion(*tensors, return_weights)

    def embed(self, prompt: str) -> torch.Tensor:
        """§3.3.1: E_text (1, L, D_llm) of a prompt in the LLM's chat template."""
        ids = encode_prompt(self.tokenizer, prompt)
        return self.llm.get_input_embeddings()(torch.tensor([ids], device=self.device))

    @torch.no_grad()
    def answer(self, video: str | Path | Features, prompt: str = REASON_PROMPT, **generation) -> str:
        """Algorithm 1. video: a file or its Features; generation: the options of generate -> the answer as text."""
        features = video if isinstance(video, Features) else self.perceive(video)  # Z_vision = [Z_global ; Z_obj]
        e_vision = self.fuse([features])  # E_vision = f_fusion(Z_vision)
        e_text = self.embed(prompt)  # E_text = TokenizeAndEmbed(P_task)
        e_input = torch.cat([e_vision.to(e_text.dtype), e_text], dim=1)  # E_input = [E_vision ; E_text]
        mask = torch.ones_like(e_input[..., 0], dtype=torch.long)
        return self.respond(e_input, mask, generation)[0]  # Y

    @torch.no_grad()
    def answer_batch(self, videos: list, prompts: list[str], **generation) -> list[str]:
        """Many answers at once. videos: files, Features, or None for a question asked blind -> list of texts."""
        features = []
        for video in videos:
            already_seen = video is None or isinstance(video, Features)
            features.append(video if already_seen else self.perceive(video))
        seen = [video for video in features if video is not None]
        e_vision = iter(self.fuse(seen) if seen else [])

        rows = []
        for video, prompt in zip(features, prompts, strict=True):
            row = self.embed(prompt)[0]
            if video is not None:
                row = torch.cat([next(e_vision).to(row.dtype), row])
            rows.append(row)

        masks = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        return self.respond(pad(rows), pad(masks), generation)

    def respond(self, e_input, mask, generation):
        """Eq. 5 of a batch, left-padded -> list of texts."""
        options = {"max_new_tokens": self.config.max_new_tokens, **generation}
        answers = generate(self.llm, self.tokenizer, e_input, mask, **options)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    @torch.no_grad()
    def option_logprobs(self, features: Features | None, prompt: str, options: list[str]) -> torch.Tensor:
        """Sum of log P of each option as answer, its end included -> (len(options),). features None: asked blind.
        Prompt and E_vision are read once for all options, which do not see each other."""
        pairs = [encode_pair(self.tokenizer, prompt, option) for option in options]
        prompt_ids = pairs[0][0]
        answers = [([], target) for _, target in pairs]
        conversation = Conversation(answers, context=prompt_ids)
        if features is None:
            e_vision, num_queries = None, 0
        else:
            e_vision, num_queries = self.fuse([features]), self.config.num_queries
        packed = pack([conversation], num_queries).to(self.device)
        logprobs = target_logprobs(self.llm, packed, e_vision)
        return logprobs.new_zeros(len(options)).index_add(0, packed.owner, logprobs)

    def forward(self, packed: Packed, z_vision=None, times=None, key_mask=None) -> tuple[torch.Tensor, int]:
        """Eq. 6 of a Packed batch with the output of collate_features, or of text alone -> (sum of NLL, tokens)."""
        if z_vision is None:
            return loss(self.llm, packed)
        return loss(self.llm, packed, self.fusion(z_vision, times, key_mask))

    def add_lora(self) -> None:
        """Wrap the LLM, and nothing else, with LoRA adapters on all its linear layers (§3.4.2, §4.2.2)."""
        adapters = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.llm = get_peft_model(self.llm, adapters)

    def freeze(self, stage: int) -> "VidReason":
        """§3.4. Stage 1 trains the fusion core alone; stage 2 the fusion core and the LoRA adapters, which add_lora
        must have made. Encoder, SAM and the LLM's own weights are frozen in both."""
        self.eval()
        self.fusion.train()
        self.llm.train(stage == 2)
        for name, parameter in self.named_parameters():
            of_fusion = name.startswith("fusion.")
            of_adapters = stage == 2 and ".lora_" in name
            parameter.requires_grad_(of_fusion or of_adapters)
        return self

    @classmethod
    def create(cls, config: Config, directory: str | Path = ".", device="cpu", dtype=torch.float32) -> "VidReason":
        """Frozen parts from where config says (relative to directory), the LLM in dtype, and a new fusion core."""
        encoder, sam = load_vision(config, directory)
        llm, tokenizer = load_llm(resolve(config.llm, directory), dtype)
        model = cls(config, encoder, sam, llm, tokenizer)
        model.directory = Path(directory)
        return frozen(model).to(device)

    @classmethod
    def load(cls, directory: str | Path, device="cpu", dtype=torch.float32) -> "VidReason":
        """Read a model directory: config.json, fusion.safetensors, lora/ if any, and what the config names."""
        directory = Path(directory)
        model = cls.create(read_config(directory), directory, dtype=dtype)
        load_weights(model.fusion, directory / "fusion.safetensors")
        adapters = directory / "lora"
        if adapters.is_dir():
            model.add_lora()
            load_weights(model.llm, adapters / "adapter_model.safetensors")
        return frozen(model).to(device)

    def save(
        self,
        directory: str | Path,
        parts: tuple[str, ...] = ("encoder", "sam", "llm", "fusion", "lora"),
        dtype: torch.dtype = torch.float32,
        state: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write a model directory, each file aside first. A part left out stays where it is; config.json says where.
        state: whole tensors by parameter name, in place of the model's own, of which a process may hold a shard."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.config_in(directory, parts)
        if state is None:
            state = self.state_dict()

        for part in ("encoder", "sam", "fusion"):
            if part in parts:
                tensors = on_cpu(state_of_part(state, part), dtype)
                write_aside(directory / f"{part}.safetensors", partial(save_file, tensors))
        if "llm" in parts:
            self.save_llm(directory / "llm", dtype)
        if "lora" in parts:
            if isinstance(self.llm, PeftModel):
                self.save_lora(directory / "lora", state, dtype, config.llm)
            else:
                shutil.rmtree(directory / "lora", ignore_errors=True)  # of an older model
        text = json.dumps(asdict(config), indent=2) + "\n"
        write_aside(directory / "config.json", lambda aside: aside.write_text(text))

    def config_in(self, directory, parts):
        """The Config of the model as saved there: parts lie in the directory, what is left out is named from it."""
        config = replace(self.config)
        for part, setting, name in (
            ("encoder", "encoder_weights", "encoder.safetensors"),
            ("sam", "sam_weights", "sam.safetensors"),
            ("llm", "llm", "llm"),
        ):
            if part not in parts:
                name = resolve(getattr(config, setting), self.directory)
                if isinstance(name, Path):
                    name = os.path.relpath(name, directory)
            setattr(config, setting, name)
        return config

    def save_llm(self, directory, dtype):
        """The LLM without its adapters, as transformers itself would write it, and its tokenizer."""
        llm = self.llm
        if isinstance(llm, PeftModel):
            llm = llm.get_base_model()
        once = {name for name, _ in [*llm.named_parameters(), *llm.named_buffers()]}  # of tied weights the first
        words = {}
        for key, tensor in on_cpu(llm.state_dict(), dtype).items():
            if key in once and ".lora_" not in key:
                words[key.replace(".base_layer", "")] = tensor  # peft's name for what an adapter stands beside
        write_aside(directory, lambda aside: llm.save_pretrained(aside, state_dict=words))
        self.tokenizer.save_pretrained(directory)

    def save_lora(self, directory, state, dtype, llm_name):
        """The adapters, as peft itself would write them. state: see save."""
        of_llm = state_of_part(state, "llm")
        adapters = get_peft_model_state_dict(self.llm, of_llm, save_embedding_layers=False)
        adapters = on_cpu(adapters, dtype)
        settings = self.llm.peft_config["default"]
        settings.base_model_name_or_path = llm_name

        def write(aside):
            """Settings and weights."""
            settings.save_pretrained(aside)
            save_file(adapters, aside / "adapter_model.safetensors")

        write_aside(directory, write)


def state_of_part(state, part):
    """The tensors of one part of the model, by their names within it."""
    prefix = f"{part}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def on_cpu(state, dtype):
    """The tensors as they are written to disk."""
    return {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in state.items()}


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let write(path) write a file or folder under another name, then put it in the place of the old one."""
    aside = path.with_name(path.name + ".partial")
    write(aside)
    shutil.rmtree(path, ignore_errors=True)  # os.replace cannot replace a directory
    os.replace(aside, path)


# --------------------------------------------------------------------------------------- reading weights, strictly
def read_config(directory: str | Path) -> Config:
    """The Config of a model directory."""
    try:
        return Config(**json.loads(Path(directory, "config.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise VidReasonError(f"no config.json to read: {error} ({directory}): give a model directory") from error


def resolve(name: str, directory: str | Path) -> str | Path:
    """A path relative to the model directory, if it is one; else the name as it stands, perhaps a hub id."""
    if name and Path(directory, name).exists():
        return Path(directory, name)
    return name


def download(name):
    """The file of a hub repository, as owner/repository/file -> where its copy lies."""
    try:
        owner, repository, file = str(name).split("/", 2)
        return hf_hub_download(f"{owner}/{repository}", file)
    except (OSError, ValueError) as error:
        what = f"no such weights ({name or 'none named'})"
        raise VidReasonError(f"{what}: give a file, or owner/repository/file of the hub") from error


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill a module from .safetensors or an upstream .pth (ViCLIP whole or its vision tower, SAM), or a peft model from
    its adapter. Strict: VidReasonError names every key that is missing, unexpected or of another shape."""
    if not path or not Path(path).is_file():
        path = download(path)
    state = read_state_dict(path)
    is_adapter = isinstance(module, PeftModel)
    if is_adapter:
        own = get_peft_model_state_dict(module, save_embedding_layers=False)
    else:
        own = module.state_dict()
    problems = differences(state, own)
    if problems:
        raise VidReasonError(f"weights do not fit the model: {', '.join(problems)} ({path}): check config.json")
    if is_adapter:
        set_peft_model_state_dict(module, state)
    else:
        module.load_state_dict(state)


def read_state_dict(path):
    """{name: tensor} of a file, without what upstream files hold beside the weights of Eq. 1 or SAM."""
    torch.serialization.add_safe_globals([(OrderedDict, "utils.easydict.EasyDict")])  # the settings in ViCLIP's .pth
    try:
        if str(path).endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors have one each
        raise VidReasonError(f"weights cannot be read: {error} ({path}): download them again") from error
    if not isinstance(state, dict):
        state = {}
    state = state.get("model", state)
    state = state_of_part(state, "vision_encoder") or state
    state.pop("proj", None)  # ViCLIP's way from [CLS] to its contrastive space, of which Eq. 1 makes no use
    return state


def differences(theirs, ours):
    """What keeps one state dict from being loaded into a module that has the other: a list of short texts."""
    missing = [f"missing {key}" for key in ours if key not in theirs]
    unexpected = [f"unexpected {key}" for key in theirs if key not in ours]
    reshaped = []
    for key in ours:
        if key in theirs and theirs[key].shape != ours[key].shape:
            reshaped.append(f"{key} is {tuple(theirs[key].shape)}, not {tuple(ours[key].shape)}")
    return missing + unexpected + reshaped


def load_llm(name: str | Path, dtype: torch.dtype = torch.float32) -> tuple:
    """-> (causal LM, tokenizer) from a directory or the hub. Raises VidReasonError for what cannot be loaded, whose
    weights do not fit, or what is no LLM to be given E_vision."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        llm, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        advice = "give a directory or an open model (Qwen/Qwen2.5-0.5B-Instruct)"
        if re.search("gated|401|403|restricted", str(error)):
            advice += ", or accept its licence and log in"
        raise VidReasonError(f"LLM cannot be loaded: {str(error)[:120]} ({name}): {advice}") from error
    problems = []
    for kind, keys in report.items():
        problems += [f"{kind} {key}" for key in keys]
    if problems:
        raise VidReasonError(f"weights do not fit the LLM: {', '.join(problems)} ({name}): download them again")
    check_llm(llm, name)
    return llm, tokenizer


@torch.no_grad()
def check_llm(llm, name) -> None:
    """Raises VidReasonError unless the LLM reads embeddings, goes on from them, and never looks to the right."""
    words = llm.get_input_embeddings()
    e_input = words(torch.tensor([[1, 2, 3, 4]], device=words.weight.device))
    try:
        logits = llm(inputs_embeds=e_input, use_cache=False).logits
        shorter = llm(inputs_embeds=e_input[:, :3], use_cache=False).logits
        llm.generate(inputs_embeds=e_input, generation_config=GenerationConfig(max_new_tokens=1, pad_token_id=0))
    except Exception as error:  # whatever a family raises
        reason = f"LLM cannot read embeddings, which E_vision is: {str(error)[:120]}"
        raise VidReasonError(f"{reason} ({name}): use another LLM") from error
    difference = (logits[:, :3] - shorter).float().abs().mean()
    if difference > 0.03 * shorter.float().std():
        raise VidReasonError(f"LLM is not causal: its words look at later ones ({name}): use another LLM")
