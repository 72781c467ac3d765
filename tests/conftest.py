"""Tiny stand-ins for the foundation models, made on the spot: nothing is downloaded."""

import csv
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no directory fails at once

from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vidreason import PRESETS, VideoTransformer, VidReason, build_sam

WORDS = "a b the ball egg box red blue green hits hit breaks broke rolls why did what will happen next ? . , because it"
WORDS = WORDS.split()
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' ' }}"
    "{% else %}{{ '<assistant> ' + m['content'] + ' <eos>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_tokenizer():
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def tiny_llm(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def config():
    """The toy preset, smaller; thresholds so low that a random SAM finds masks."""
    return replace(
        PRESETS["toy"], encoder_width=16, encoder_layers=2, encoder_heads=2, points_per_side=2, masks_per_keyframe=3,
        sam_iou_threshold=-9.0, sam_stability_threshold=0.0, num_queries=5, fusion_width=24, fusion_layers=2,
        fusion_heads=3, max_new_tokens=8, lora_rank=2, lora_alpha=4,
    )  # fmt: skip


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return VidReason(config, VideoTransformer(config), build_sam(config), tiny_llm(), tiny_tokenizer()).eval()


@pytest.fixture
def lora_model(model):
    """The same with LoRA adapters that are not zero."""
    model.add_lora()
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_video(path, n=16, size=(96, 96), times=None, options=None, sound_only=False):
    """n frames whose brightness says which they are (12 i + noise), at 4 per second or at the given times."""
    with av.open(str(path), "w", options=options or {}) as container:
        if sound_only:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            frame.rate = 16000
            frames = [frame]
        else:
            stream = container.add_stream("libx264", rate=4)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            frames = []
            for i in range(n):
                noise = np.random.default_rng(i).integers(0, 16, (size[1], size[0], 3))
                frame = av.VideoFrame.from_ndarray((noise + min(12 * i, 230)).astype(np.uint8), format="rgb24")
                frame.pts, frame.time_base = round(1000 * (i / 4 if times is None else times[i])), Fraction(1, 1000)
                frames.append(frame)
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """name -> path of good and bad files."""
    folder = tmp_path_factory.mktemp("videos")
    made = {
        "good": write_video(folder / "good.mp4"),
        "wide": write_video(folder / "wide.mp4", size=(160, 112)),
        "one": write_video(folder / "one.mp4", n=1),
        "long": write_video(folder / "long.mp4", n=64, size=(256, 256), options={"movflags": "faststart"}),
        "uneven": write_video(folder / "uneven.mp4", times=np.cumsum([0, *np.tile([0.1, 0.7, 0.2], 5)])),
        "sound": write_video(folder / "sound.mp4", sound_only=True),
    }
    data = {name: path.read_bytes() for name, path in made.items()}
    broken = {
        "truncated": data["good"][: len(data["good"]) // 2],
        "broken_off": data["long"][: len(data["long"]) * 2 // 3],
        "empty": b"",
        "text": b"this is not a video\n" * 50,
    }
    for name, content in broken.items():
        made[name] = folder / f"{name}.mp4"
        made[name].write_bytes(content)
    made["plain"] = folder / "plain.txt"
    made["plain"].write_bytes(broken["text"])
    return {**made, "folder": folder, "missing": folder / "missing.mp4"}


@pytest.fixture
def write_clips():
    """write_clips(folder, n) -> the names of n small videos in it."""

    def write(folder, n):
        folder.mkdir(exist_ok=True)
        for i in range(n):
            write_video(folder / f"{i}.mp4")
        return [f"{i}.mp4" for i in range(n)]

    return write


def write_rows(path, rows):
    """Write annotations or replies -> the path. rows: of a .csv dicts, of a .jsonl values, else one value of JSON."""
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            json.dump(rows, file)
    return path
