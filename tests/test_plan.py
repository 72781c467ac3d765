"""--plan: every number against arithmetic written out here; the counted FLOPs against formulas."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from plan import LLM_SHAPES, llm_on_meta, plan, si, trace
from train import print_plan
from vidreason import PRESETS, Conversation, VidReasonError, build_sam, loss, pack

ROOT = Path(__file__).resolve().parent.parent
TOY_DIRECTORY = ROOT / "toy" / "weights"
LLAMA, QWEN = LLM_SHAPES
GPU = 0.33 * 989.5e12  # FLOP/s


def near(value, tolerance=0.02):
    return pytest.approx(value, rel=tolerance)


@pytest.fixture(scope="module")
def paper():
    return plan(PRESETS["paper"], world_size=32)


@pytest.fixture(scope="module")
def small():
    return plan(PRESETS["small"], world_size=1)


@pytest.fixture(scope="module")
def toy():
    runs = dict(pairs=(8e3, 8e3), videos=(8e3, 8e3), batch=(32, 32), micro_batch=(32, 16), text_tokens=(40, 200))
    return plan(PRESETS["toy"], TOY_DIRECTORY, world_size=1, **runs)


@pytest.fixture(params=["toy", "small", "paper"])
def preset(request):
    """(Config, its plan, its LLM's config)"""
    config = PRESETS[request.param]
    return config, request.getfixturevalue(request.param), llm_on_meta(config.llm, TOY_DIRECTORY).config


# ------------------------------------------------------------------------------------------------- parameters


def test_parameters_of_the_paper_preset(paper):
    p, d = paper["parameters"], 4096
    block = 2 * d * d + 2 * d * 1024 + 3 * d * 14336 + 2 * d  # q and o, k and v, the MLP, two norms
    assert p["llm"] == 8_030_261_248 == 2 * 128256 * d + 32 * block + d
    assert p["lora"] == 167_772_160 == 32 * 64 * (2 * (d + d) + 2 * (d + 1024) + 3 * (d + 14336))
    assert p["encoder"] == near(85.8e6, 0.001)
    assert p["sam"] == near(641e6, 0.001)  # 637 M of them are the image encoder's
    d = 768
    layer = 16 * d * d + 13 * d + 6 * d  # self 4 d², cross 4 d², feed-forward 8 d²; biases; three norms
    core = 8 * layer + 32 * d + 2 * d + (d * d + d) + 2 * d + (d * 4096 + 4096)
    assert p["fusion"] == core == 79_382_272
    assert paper["stage1"]["trained"] == core
    assert paper["stage2"]["trained"] == core + 167_772_160  # 247 M


def test_parameters_of_the_small_preset(small):
    d = 896
    block = 2 * d * d + d + 2 * (d * 128 + 128) + 3 * d * 4864 + 2 * d  # q has a bias, o has none
    assert small["parameters"]["llm"] == 494_032_768 == 151936 * d + 24 * block + d
    assert small["parameters"]["lora"] == 24 * 64 * (2 * (d + d) + 2 * (d + 128) + 3 * (d + 4864))


# ------------------------------------------------------------------------------------- FLOPs: formulas and anchors


def encoder_formula(c):
    """Per clip: projections 24 d² and attention 4 n d per token and layer, and the patch embedding."""
    n, d = 1 + c.frames_per_clip // c.tubelet * (c.image_size // c.patch_size) ** 2, c.encoder_width
    return c.encoder_layers * (24 * d * d * n + 4 * n * n * d) + 2 * (n - 1) * 3 * c.tubelet * c.patch_size**2 * d


def sam_formulas(c):
    """(image encoder, mask decoder for the whole grid of points)"""
    d, layers, whole, out = {
        "vit_h": (1280, 32, 4, 256), "vit_l": (1024, 24, 4, 256), "vit_b": (768, 12, 4, 256), "toy": (96, 3, 3, 48),
    }[c.sam]  # fmt: skip
    side, patch, mlp = (12, 8, 3) if c.sam == "toy" else (64, 16, 4)
    n, padded = side * side, (70 if side == 64 else side) ** 2  # windows of 14 × 14: 64 is padded to 70

    def mixing(tokens, keys, grid):
        """Projections, attention, and the relative positions along a grid."""
        return 8 * d * d * tokens + 4 * tokens * keys * d + 4 * tokens * grid * d

    windowed = mixing(padded, 196, 14) + 4 * mlp * d * d * n
    every = mixing(n, n, side) + 4 * mlp * d * d * n
    neck = 2 * n * (3 * patch * patch * d + d * out + 9 * out * out)
    half, hidden = out // 2, 192 if c.sam == "toy" else 2048
    cross = 4 * 2 * n * out * half + 2 * 4 * 7 * n * half  # k, v of the picture; its q, out; 7 tokens both ways
    tokens = 7 * (2 * 8 * out * half + 8 * out * out + 4 * out * hidden)
    last, upscaling = cross / 2, 2 * n * 4 * out * out // 4 + 2 * 4 * n * 4 * out // 4 * out // 8
    decoder = 2 * (cross + tokens) + last + upscaling + 4 * 2 * 16 * n * out // 8
    return (layers - whole) * windowed + whole * every + neck, c.points_per_side**2 * decoder


def fusion_formula(c, llm):
    q, d, n = c.num_queries, c.fusion_width, c.num_clips * (1 + c.masks_per_keyframe)
    layer = 8 * d * d * q + 4 * d * d * q + 4 * d * d * n + 16 * d * d * q + 4 * q * q * d + 4 * q * n * d
    return c.fusion_layers * layer + 2 * n * c.encoder_width * d + 2 * q * d * llm.hidden_size


def llm_formula(llm, tokens, adapters=0):
    """4 P_frozen + 6 P_trained per token, attention three times; the embeddings multiply nothing, lm_head does."""
    d, heads = llm.hidden_size, llm.num_attention_heads
    wide = getattr(llm, "head_dim", None) or d // heads
    matrices = 2 * d * heads * wide + 2 * d * llm.num_key_value_heads * wide + 3 * d * llm.intermediate_size
    frozen = llm.num_hidden_layers * matrices + d * llm.vocab_size
    attention = llm.num_hidden_layers * 4 * tokens * heads * wide
    return tokens * (4 * frozen + 6 * adapters + 3 * attention)


def test_counted_flops_agree_with_the_formulas(preset):
    c, numbers, llm = preset
    flops = numbers["flops"]
    image, decoder = sam_formulas(c)
    assert flops["encoder_per_clip"] == near(encoder_formula(c))
    assert flops["encoder"] == c.num_clips * flops["encoder_per_clip"]
    assert flops["SAM_image_encoder_per_keyframe"] == near(image)
    assert flops["SAM_mask_decoder_per_keyframe"] == near(decoder)
    assert flops["SAM"] == near(c.num_clips * (image + decoder))
    for stage, adapters in (("stage1", 0), ("stage2", numbers["parameters"]["lora"])):
        s = numbers[stage]
        assert s["fusion_forward"] == near(fusion_formula(c, llm))
        assert s["fusion"] == near(3 * fusion_formula(c, llm))
        assert s["llm"] == near(llm_formula(llm, c.num_queries + s["text_tokens"], adapters))


def test_flops_of_the_paper_preset(paper):
    flops, one, two = paper["flops"], paper["stage1"], paper["stage2"]
    d, n = 768, 8 * 196 + 1
    assert flops["encoder"] == near(4 * (12 * (24 * d * d * n + 4 * n * n * d) + 2 * 1568 * 768 * d), 0.002)
    assert flops["encoder"] == near(1.44e12, 0.005)
    assert flops["SAM_image_encoder_per_keyframe"] == near(5.96e12, 0.005)
    assert flops["SAM_mask_decoder_per_keyframe"] == near(4 * 0.232e12, 0.005)  # 16 × 16 points = 4 × 64
    assert flops["SAM"] == near(4 * (5.96e12 + 4 * 0.232e12), 0.005)
    layer = 8 * d * d * 32 + 4 * d * d * 32 + 4 * d * d * 68 + 16 * d * d * 32 + 10e6  # 0.70 G
    ends = 2 * 68 * d * d + 2 * 32 * d * 4096  # proj_in and linear_proj
    assert one["fusion_forward"] == near(8 * layer + ends)
    assert one["fusion"] == two["fusion"] == near(3 * (8 * layer + ends))
    multiplied = 8_030_261_248 - 128256 * 4096
    assert one["llm"] == near(64 * 4 * multiplied, 0.006) == near(1.93e12, 0.006)
    assert one["llm_executed"] == near(1.86e12, 0.005)
    assert one["llm"] - one["llm_executed"] == near(32 * 4 * 128256 * 4096, 1e-6)
    attention = 3 * 32 * 4 * 332 * 332 * 4096
    assert two["llm"] == near(332 * (4 * multiplied + 6 * 167_772_160) + attention, 0.005) == near(10.47e12, 0.005)


def test_the_mask_decoder_does_what_the_automatic_generator_asks_of_it(toy):
    """The plan gives the decoder embeddings; here points go through the prompt encoder as in predict_torch."""
    sam = build_sam(PRESETS["toy"])
    sam.requires_grad_(False)
    points, labels = torch.rand(64, 1, 2) * 96, torch.ones(64, 1, dtype=torch.int)
    with FlopCounterMode(display=False) as counter:
        sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        where = sam.prompt_encoder.get_dense_pe()
        sam.mask_decoder(torch.randn(1, 48, 12, 12), where, sparse, dense, multimask_output=True)
    assert toy["flops"]["SAM_mask_decoder_per_keyframe"] == near(counter.get_total_flops(), 0.001)


# --------------------------------------------------------------------------------------------- bytes


def test_feature_cache(paper):
    assert paper["bytes"]["Z_vision_fp16"] == (4 + 4 * 16) * 768 * 2 == 104_448  # 104 kB
    assert paper["bytes"]["Z_vision_times_and_flags"] == 68 * (4 + 1)
    assert paper["stage1"]["cache"] == 110e6 * (104_448 + 340)
    assert paper["stage1"]["cache"] == near(11.5e12, 0.005)
    assert paper["stage2"]["cache"] == near(11.6e9, 0.005)
    assert paper["bytes"]["decoded_frames"] == 32 * 224 * 224 * 3  # 4.8 MB
    assert paper["bytes"]["SAM_mask_logits_of_64_points"] == 64 * 3 * 512 * 512 * 4  # 0.2 GB


def test_memory_of_the_paper_preset(paper):
    one, two = paper["stage1"], paper["stage2"]
    m, n = one["memory"], two["memory"]
    assert m["LLM_replicated"] == 2 * 8_030_261_248  # 16.06 GB
    outside = 2 * 128256 * 4096 + 4096
    block = (8_030_261_248 - outside) / 32
    assert m["LLM_sharded"] == near(2 * (8_030_261_248 / 8 + outside + 2 * block), 1e-9)
    assert m["trained_states"] == 79_382_272 * 16 / 32
    assert n["trained_states"] == (79_382_272 + 167_772_160) * 16 / 32
    assert n["trained_copies"] == (79_382_272 + 167_772_160) * 6
    assert one["micro_batch"] == 64 and two["micro_batch"] == 8 and one["accumulation"] == two["accumulation"] == 1
    assert m["logits"] == 64 * 32 * 128256 * 10  # 2.6 GB: bf16, fp32, gradient
    norms, attention, mlp = 2 * 4096 * 4, 4 * 4096 * 2, 3 * 14336 * 2  # inputs in fp32; q k v out; gate, silu, up
    assert one["llm_saved"] == near(64 * 32 * (norms + attention + mlp))  # 4.85 MB per token
    lora = 2 * (2 * 4096 + 14336) + 7 * 2 * 64  # inputs of q k v, of gate up and of down; what each A returns
    assert two["llm_saved"] == near(332 * 32 * (norms + attention + mlp + lora))  # 6.3 MB per token
    assert m["activations"] == 64 * (one["llm_saved"] + one["fusion_saved"])
    parts = ("trained_states", "trained_copies", "activations", "logits")
    for memory in (m, n):
        assert memory["total_LLM_replicated"] == near(memory["LLM_replicated"] + sum(memory[p] for p in parts), 1e-9)
        assert memory["total_LLM_sharded"] == near(memory["LLM_sharded"] + sum(memory[p] for p in parts), 1e-9)
    assert m["total_LLM_replicated"] < 80e9 and n["total_LLM_replicated"] < 80e9  # both fit one H100


def test_the_largest_micro_batch_just_fits(paper):
    for stage in ("stage1", "stage2"):
        s = paper[stage]
        moving = (s["memory"]["activations"] + s["memory"]["logits"]) / s["micro_batch"]
        fixed = s["memory"]["total_LLM_replicated"] - s["micro_batch"] * moving
        largest = s["largest_micro_batch"]["LLM_replicated"]
        assert fixed + largest * moving <= 0.9 * 80e9 < fixed + (largest + 1) * moving
    cramped = plan(replace(PRESETS["paper"], sam="toy"), world_size=8, gpu_memory=12e9)
    assert cramped["stage2"]["largest_micro_batch"]["LLM_replicated"] == 0


def forward_and_backward(llm, packed, e_vision):
    nll, _ = loss(llm, packed, e_vision)
    nll.backward()


def test_saved_bytes_and_flops_are_those_of_a_real_step(monkeypatch):
    """A fused kernel on the CPU keeps the same tensors as the plan's kernel on the meta device."""
    shape = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    measured = {}
    for device in ("meta", "cpu"):
        llm = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa").to(device).requires_grad_(False)
        packed = pack([Conversation([(list(range(9)), list(range(8)))])] * 3, 4).to(device)
        e_vision = torch.zeros(3, 4, 32, device=device, requires_grad=True)
        step = partial(forward_and_backward, llm, packed, e_vision)
        measured[device] = trace(step, llm.parameters())
        monkeypatch.setattr(sys.modules[trace.__module__], "FusedAttention", nullcontext)  # the CPU has its own
    assert measured["meta"][1] == near(measured["cpu"][1])
    with sdpa_kernel(SDPBackend.MATH):
        assert measured["meta"][0] == trace(step)[0]


# ------------------------------------------------------------------------------------------------ steps and time


def test_steps_and_hours(paper):
    one, two = paper["stage1"], paper["stage2"]
    assert one["steps"] == 214_844 == -(-440_000_000 // 2048)
    assert two["steps"] == 3_047 == -(-780_000 // 256)
    seconds = 440e6 * (1.93e12 + 17.6e9) / (GPU * 32)
    assert one["hours"] == near(seconds / 3600, 0.005)
    assert 440e6 * one["llm"] / (GPU * 32) / 86400 == near(0.94, 0.01)  # days, the LLM alone
    assert 4 * two["hours"] == near(780e3 * 10.47e12 / (GPU * 8) / 3600, 0.01)  # on 8 GPUs: 0.7 to 1.5 h
    assert one["encoder_gpu_days"] == near(110e6 * 1.44e12 / GPU / 86400, 0.005)
    assert one["SAM_gpu_days"] == near(110e6 * 4 * (5.96e12 + 0.928e12) / (0.06 * 989.5e12) / 86400, 0.005)
    assert one["SAM_gpu_days_at_mfu"] == near(110e6 * 4 * (5.96e12 + 0.928e12) / GPU / 86400, 0.005)
    assert two["SAM_gpu_days"] == near(one["SAM_gpu_days"] * 111e3 / 110e6, 1e-9)
    vision = 440e6 * (1.44e12 / GPU + 27.55e12 / (0.06 * 989.5e12)) / 32 / 3600
    assert one["hours_without_cache"] == near(one["hours"] + vision, 0.005)


def test_arguments(paper):
    other = plan(
        PRESETS["paper"], world_size=8, micro_batch=(32, 8), epochs=(2, 3), batch=(1024, 256), mfu=0.39, sam_mfu=0.39,
        peak=312e12,
    )  # fmt: skip
    one, two = other["stage1"], other["stage2"]
    assert (one["micro_batch"], one["accumulation"]) == (32, 4) and (two["micro_batch"], two["accumulation"]) == (8, 4)
    assert one["steps"] == -(-220_000_000 // 1024)
    scale = 4 / 2 * (0.33 * 989.5) / (0.39 * 312)
    assert one["hours"] == near(paper["stage1"]["hours"] * scale, 1e-6)
    assert one["SAM_gpu_days"] == near(one["SAM_gpu_days_at_mfu"], 1e-9)
    assert one["memory"]["activations"] == near(paper["stage1"]["memory"]["activations"] / 2, 0.001)
    assert one["memory"]["trained_states"] == 4 * paper["stage1"]["memory"]["trained_states"]
    assert two["memory"]["activations"] == near(paper["stage2"]["memory"]["activations"], 1e-6)


# ------------------------------------------------------------------------------------------------ text and errors


def test_prefixes():
    assert si(1.44e12, "B") == "1.44 TB" and si(104_448, "B") == "104 kB" and si(340, "B") == "340 B"
    assert si(999_999, "B") == "1.00 MB" and si(8_030_261_248) == "8.03 G" and si(0) == "0.00"


@pytest.mark.parametrize("name", ["toy", "small", "paper"])
def test_the_report(name, request, capsys):
    numbers = request.getfixturevalue(name)
    json.dumps(numbers)  # plain numbers
    print_plan(numbers)
    text = capsys.readouterr().out
    assert all(len(line) <= 120 for line in text.splitlines())
    assert f"trained in stage 1 {si(numbers['stage1']['trained'])}" in " ".join(text.split())
    assert "What dominates: extraction by SAM" in text
    assert "33%" in text and "989.5 TFLOP/s" in text and "K = " in text
    if name == "paper":
        flat = " ".join(text.split())
        for line in ("encoder 1.44 T", "llm 8.03 G", "lora 168 M", "LLM, stage 1, 32 + 32 tokens 1.93 T 312 MB",
                     "optimiser steps 214,844 3,047", "once: feature cache 11.5 TB 11.6 GB",
                     "LLM replicated 16.1 GB 16.1 GB", "training with that cache, hours 22.75 0.22"):  # fmt: skip
            assert line in flat, line


def test_llm_shapes_and_errors(tmp_path):
    assert llm_on_meta(QWEN, ".").config.tie_word_embeddings and llm_on_meta(LLAMA, ".").device.type == "meta"
    assert llm_on_meta("llm", TOY_DIRECTORY).config.hidden_size == 128
    for name in ("no/such-model", str(tmp_path)):
        with pytest.raises(VidReasonError, match="no shape of this LLM") as error:
            plan(replace(PRESETS["paper"], llm=name))
        assert "\n" not in str(error.value) and LLAMA in str(error.value)


def test_the_command_line():
    """As the README has it; a stage's own numbers and the given ones arrive in the plan."""
    command = "train.py --preset paper --plan --world_size 8 --max_videos 1000 --mfu 0.5 --micro_batch 4"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    flat = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert "8 GPU(s)" in flat and "optimiser steps 2 12" in flat and "reach 50%" in flat
    assert "micro-batch × accumulation 4 × 64 4 × 8" in flat
