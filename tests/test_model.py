"""vidreason.py: every equation against a literal, slow version of itself; shapes, masks, padding, gradients, files."""

import ast
import math
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llm, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import vidreason
from vidreason import (
    PRESETS,
    Config,
    Conversation,
    Features,
    FusionCore,
    VideoTransformer,
    VidReason,
    VidReasonError,
    attention,
    build_sam,
    collate_features,
    encode_pair,
    encode_prompt,
    generate,
    loss,
    mask_pool,
    pack,
    read_video,
    segment,
    target_logprobs,
    time_embedding,
)


def random_features(config, objects, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = config.num_clips + objects
    times = torch.cat([torch.arange(config.num_clips) + 0.4, 4 * torch.rand(objects, generator=g)])
    return Features(torch.randn(n, config.encoder_width, generator=g), times, torch.arange(n) >= config.num_clips)


# ----------------------------------------------------------------------------------------------- read_video


def brightness(frames):
    return ((frames.float().mean((-1, -2, -3)) - 7.5) / 12).round().int().flatten().tolist()


def test_sixteen_frames_are_taken_once_each(videos):
    frames, times, keyframes = read_video(videos["good"], 4, 4, 96)
    assert frames.shape == (4, 4, 3, 96, 96) and frames.dtype == torch.uint8
    assert brightness(frames) == list(range(16))
    assert torch.allclose(times, torch.arange(16).view(4, 4) / 4)
    assert len(keyframes) == 4 and keyframes[0].shape == (96, 96, 3) and keyframes[0].dtype == np.uint8
    assert all(np.array_equal(key, frames[clip, 2].permute(1, 2, 0)) for clip, key in enumerate(keyframes))


def test_frames_are_spread_and_short_videos_repeat(videos):
    assert brightness(read_video(videos["good"], 2, 2, 96)[0]) == [2, 6, 10, 14]
    frames, times, _ = read_video(videos["one"], 4, 4, 96)
    assert brightness(frames) == [0] * 16 and not times.any()


def test_uneven_frames_are_chosen_by_time(videos):
    starts = np.cumsum([0, *np.tile([0.1, 0.7, 0.2], 5)])
    end = starts[-1] + 1 / 4  # the file says how long the last one stays
    frames, times, _ = read_video(videos["uneven"], 4, 2, 96)
    for i, (shown, time) in enumerate(zip(brightness(frames), times.flatten().tolist(), strict=True)):
        now = end * (i + 0.5) / 8
        assert shown == max(j for j, start in enumerate(starts) if start <= now + 1e-9)
        assert time == pytest.approx(starts[shown], abs=2e-3)


def test_a_span_is_seen_as_if_it_were_the_file(videos):
    frames, times, _ = read_video(f"{videos['good']}#t=1,3", 2, 2, 96)
    assert brightness(frames) == [5, 7, 9, 11] and torch.allclose(times, torch.tensor([[0.25, 0.75], [1.25, 1.75]]))
    assert brightness(read_video(f"{videos['good']}#t=2", 2, 2, 96)[0]) == [9, 11, 13, 15]
    assert brightness(read_video(f"{videos['good']}#t=,1", 2, 1, 96)[0]) == [1, 3]
    within = read_video(f"{videos['good']}#t=1.1,1.2", 2, 1, 96)  # less than a frame
    assert brightness(within[0]) == [4, 4] and not within[1].any()
    assert brightness(read_video(f"{videos['good']}#t=3,99", 2, 1, 96)[0]) == [13, 15]
    with pytest.raises(VidReasonError, match="no such video"):
        read_video(f"{videos['good']}#t=1.2.3", 2, 2, 96)
    for span in ("4,9", "3,2"):
        with pytest.raises(VidReasonError, match="nothing is shown from .*: give a span within the video"):
            read_video(f"{videos['good']}#t={span}", 2, 2, 96)


def test_keyframe_shows_what_the_encoder_sees(videos):
    frames, _, keyframes = read_video(videos["wide"], 2, 3, 56, keyframe_size=80)
    assert frames.shape[-2:] == (56, 56) and keyframes[0].shape == (80, 80, 3)
    assert read_video(videos["wide"], 2, 3, 56)[2][0].shape == (112, 112, 3)  # never enlarged
    assert abs(frames[1, 1].float().mean() - keyframes[1].mean()) < 1


def test_decord_sees_the_same(videos):
    """A second opinion on plain mp4 files, where decord's pictures are right."""
    decord = pytest.importorskip("decord")
    for name in ("good", "wide", "uneven", "long"):
        timeline = vidreason.read_timeline(videos[name])
        starts, pictures = vidreason.pictures_at(videos[name], timeline, timeline.starts + 1e-3, 512)
        reader = decord.VideoReader(str(videos[name]), num_threads=1)
        spans = np.asarray(reader.get_frame_timestamp(range(len(reader))))
        assert np.abs(spans[:, 0] - spans[0, 0] - starts).max() < 1e-3
        theirs = reader.get_batch(range(len(reader))).asnumpy()
        ours = torch.stack(pictures).permute(0, 2, 3, 1).numpy()
        assert np.abs(theirs.astype(int) - ours).max() <= 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no such video"), ("folder", "is a directory"), ("empty", "is empty"), ("text", "not a video"),
        ("plain", "no picture"), ("sound", "no picture"), ("truncated", "cut off"), ("broken_off", "truncated"),
    ],
)  # fmt: skip
def test_bad_files_are_named(videos, name, words):
    with pytest.raises(VidReasonError) as error:
        read_video(videos[name], 4, 4, 96)
    message = str(error.value)
    assert words in message and str(videos[name]) in message and "\n" not in message


def test_a_download_that_broke_off_between_two_frames(tmp_path):
    """Every frame that is there decodes, but the header promises four times as many."""
    with av.open(str(tmp_path / "whole.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        grey = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 128, np.uint8), format="rgb24")
        for _ in range(16):
            container.mux(stream.encode(grey))
        container.mux(stream.encode(None))
    data = (tmp_path / "whole.avi").read_bytes()
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream
    assert data[at : at + 4] == (16).to_bytes(4, "little")
    (tmp_path / "promising.avi").write_bytes(data[:at] + (64).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(VidReasonError, match="16 of 64 frames"):
        read_video(tmp_path / "promising.avi", 4, 4, 96)


# ------------------------------------------------------------------------------------- Eq. 1: the encoder


@pytest.mark.parametrize(("tubelet", "difference"), [(1, 0.0), (2, 0.0), (2, 4.0)])
def test_encoder_equals_its_arithmetic_written_out(tubelet, difference):
    config = Config(
        image_size=24, patch_size=8, frames_per_clip=4, encoder_width=16, encoder_layers=2, encoder_heads=2,
        tubelet=tubelet, frame_difference=difference,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = VideoTransformer(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    w = encoder.state_dict()
    clip = torch.rand(4, 3, 24, 24)
    x = (clip - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    if difference:
        x = torch.stack([f for a, b in ((x[0], x[1]), (x[2], x[3])) for f in ((a + b) / 2, (b - a) * difference)])
    tokens = [w["class_embedding"] + w["positional_embedding"][0]]
    for t in range(4 // tubelet):
        for row in range(3):
            for column in range(3):
                tube = x[t * tubelet : (t + 1) * tubelet, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                token = (w["conv1.weight"] * tube.transpose(0, 1)).flatten(1).sum(1)
                place = w["positional_embedding"][1 + row * 3 + column]
                tokens.append(token + place + w["temporal_positional_embedding"][0, t])

    def norm(x, name):
        return F.layer_norm(x, (16,), w[name + ".weight"], w[name + ".bias"])

    x = norm(torch.stack(tokens), "ln_pre")
    for layer in range(2):
        p = f"transformer.resblocks.{layer}."
        q, k, v = (norm(x, p + "ln_1") @ w[p + "attn.in_proj_weight"].T + w[p + "attn.in_proj_bias"]).split(16, dim=-1)
        heads = [
            ((q[:, s] @ k[:, s].T) / math.sqrt(8)).softmax(-1) @ v[:, s] for s in (slice(0, 8), slice(8, 16))
        ]  # fmt: skip
        x = x + torch.cat(heads, -1) @ w[p + "attn.out_proj.weight"].T + w[p + "attn.out_proj.bias"]
        y = norm(x, p + "ln_2") @ w[p + "mlp.c_fc.weight"].T + w[p + "mlp.c_fc.bias"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ w[p + "mlp.c_proj.weight"].T + w[p + "mlp.c_proj.bias"]
    x = norm(x, "ln_post")
    with torch.no_grad():
        cls, patches = encoder(clip[None])
    assert cls.shape == (1, 16) and patches.shape == (1, 4 // tubelet, 9, 16)
    assert torch.allclose(cls[0], x[0], atol=1e-5) and torch.allclose(patches[0].flatten(0, 1), x[1:], atol=1e-5)


def test_paper_encoder_has_the_size_of_viclip_b16():
    with torch.device("meta"):
        encoder = VideoTransformer(PRESETS["paper"])
    names = {name.split(".")[0] for name in encoder.state_dict()}
    assert names == {
        "conv1", "class_embedding", "positional_embedding", "temporal_positional_embedding", "ln_pre", "transformer",
        "ln_post",
    }  # fmt: skip
    assert encoder.conv1.weight.shape == (768, 3, 1, 16, 16) and encoder.temporal_positional_embedding.shape == (
        1,
        8,
        768,
    )
    assert encoder.transformer["resblocks"][11].attn.in_proj_weight.shape == (2304, 768)


# --------------------------------------------------------------------------------- SAM, Eq. 2: object tokens


def test_segment_keeps_the_best_and_none_is_legal(model, config):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    masks = segment(noise, model.sam, config)
    assert masks.dtype == torch.bool and masks.shape[1:] == (96, 96) and 1 <= len(masks) <= config.masks_per_keyframe
    strict = Config(**{**asdict(config), "sam_iou_threshold": 99.0})
    assert segment(noise, model.sam, strict).shape == (0, 96, 96)


def test_segment_order(monkeypatch, config):
    def found(stability, iou, area):
        mask = np.zeros((8, 8), bool)
        mask.flat[:area] = True
        return {"segmentation": mask, "stability_score": stability, "predicted_iou": iou, "area": area}

    class Generator:
        def generate(self, picture):
            return [found(0.5, 0.5, 9), found(1.0, 0.5, 3), found(0.5, 1.0, 7), found(0.9, 0.9, 1), found(1, 1, 0)]

    monkeypatch.setattr(vidreason, "mask_generator", lambda *a, **k: Generator())
    masks = segment(np.zeros((8, 8, 3), np.uint8), None, config)
    assert masks.sum((1, 2)).tolist() == [1, 7, 3]  # the best; the larger of two equals; K = 3; the empty one dropped


@pytest.mark.parametrize("size", [(96, 96), (50, 50), (37, 61)])
def test_mask_pool_is_equation_2(size):
    torch.manual_seed(0)
    patches, masks = torch.randn(64, 5), torch.rand(4, *size) > torch.tensor([0.5, 0.9, 0.99, 0.0])[:, None, None]
    literal = []
    for mask in masks:
        total = torch.zeros(5)
        for y, x in mask.nonzero().tolist():  # sum over pixels p in M of PatchEmbed(p)
            total += patches[int((y + 0.5) * 8 / size[0]) * 8 + int((x + 0.5) * 8 / size[1])]
        literal.append(total / mask.sum())
    assert torch.allclose(mask_pool(patches, masks), torch.stack(literal), atol=1e-5)


def test_mask_pool_of_nothing():
    patches = torch.randn(16, 5)
    assert torch.equal(mask_pool(patches, torch.zeros(2, 8, 8, dtype=torch.bool)), torch.zeros(2, 5))
    assert mask_pool(patches, torch.zeros(0, 8, 8, dtype=torch.bool)).shape == (0, 5)
    everything = mask_pool(patches, torch.ones(1, 8, 8, dtype=torch.bool))
    assert torch.allclose(everything[0], patches.mean(0), atol=1e-6)


# --------------------------------------------------------------------------- Eq. 3 and Eq. 4: the fusion core


def test_attention_is_equation_3():
    torch.manual_seed(0)
    Q, K, V = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    literal, weights = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 5)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                scores = [
                    math.exp(sum(Q[b, h, i, d] * K[b, h, j, d] for d in range(8)) / math.sqrt(8)) if mask[b, j] else 0.0
                    for j in range(5)
                ]
                for j in range(5):
                    weights[b, h, i, j] = scores[j] / sum(scores)
                    literal[b, h, i] += weights[b, h, i, j] * V[b, h, j]
    assert torch.allclose(attention(Q, K, V, mask), literal, atol=1e-5)
    seen, w = attention(Q, K, V, mask, return_weights=True)
    assert torch.allclose(seen, literal, atol=1e-5) and torch.allclose(w, weights, atol=1e-5)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert not attention(Q, K, V, nothing).any() and not attention(Q, K, V, nothing, return_weights=True)[0].any()


def test_fusion_shapes_weights_and_scale(config):
    torch.manual_seed(0)
    fusion = FusionCore(config, 32, output_scale=0.3)
    z, times, mask = collate_features([random_features(config, 0), random_features(config, 6, seed=1)])
    assert z.shape == (2, 10, 16) and mask.sum(1).tolist() == [4, 10]
    e_vision, weights = fusion(z, times, mask, return_weights=True)
    assert e_vision.shape == (2, config.num_queries, 32) and e_vision.dtype == torch.float32
    assert weights.shape == (2, config.fusion_layers, config.fusion_heads, config.num_queries, 10)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) and not weights[0, ..., 4:].any()
    assert torch.allclose(e_vision, fusion(z, times, mask), atol=1e-5)
    big = FusionCore(PRESETS["toy"], 256, output_scale=0.3)
    assert 0.2 < big(torch.randn(2, 9, 128), torch.rand(2, 9), torch.ones(2, 9, dtype=torch.bool)).std() < 0.4


def test_padding_does_not_leak_and_batch_is_single(config):
    fusion = FusionCore(config, 32)
    few, many = random_features(config, 1), random_features(config, 5, seed=1)
    z, times, mask = collate_features([few, many])
    poisoned = z.masked_fill(~mask[..., None], 1e4)
    batch = fusion(poisoned, times.masked_fill(~mask, 99.0), mask)
    for features, row in zip((few, many), batch, strict=True):
        assert torch.allclose(fusion(*collate_features([features]))[0], row, atol=1e-6)


def test_time_embedding_tells_order(config):
    features = random_features(config, 0)
    z, times, mask = collate_features([features])
    with_time = FusionCore(config, 32)
    printed = FusionCore(Config(**{**asdict(config), "time_embedding": False}), 32)
    printed.load_state_dict(with_time.state_dict())
    swapped = z[:, [3, 2, 1, 0]]
    assert torch.allclose(
        printed(z, times, mask), printed(swapped, times, mask), atol=1e-6
    )  # the paper's, blind to order
    assert not torch.allclose(with_time(z, times, mask), with_time(swapped, times, mask), atol=1e-4)
    embedding = time_embedding(torch.tensor([[0.0, 1.5]]), 8)
    assert embedding.shape == (1, 2, 8) and torch.allclose(embedding[0, 0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert embedding[0, 1, 0] == pytest.approx(math.sin(2 * math.pi * 1.5), abs=1e-5)


# ------------------------------------------------------------------------------------------- prompts, Eq. 6


def test_chat_template_makes_prompt_and_target():
    tokenizer = tiny_tokenizer()
    prompt, target = encode_pair(tokenizer, "why ?", "the ball hit it .")
    assert tokenizer.convert_ids_to_tokens(prompt + target) == [
        "<bos>", "<user>", "why", "?", "<assistant>", "the", "ball", "hit", "it", ".", "<eos>",
    ]  # fmt: skip
    assert prompt == encode_prompt(tokenizer, "why ?") and target[-1] == tokenizer.eos_token_id
    assert (prompt + target).count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(" <eos>", "")  # a template without end of turn
    assert encode_pair(tokenizer, "why ?", "the ball")[1][-1] == tokenizer.eos_token_id
    tokenizer.chat_template = None
    with pytest.raises(VidReasonError, match="no chat template"):
        encode_prompt(tokenizer, "why ?")


def random_conversations(context=0):
    g = np.random.default_rng(0)

    def tokens(n):
        return g.integers(6, 30, n).tolist()

    first = [(tokens(3), tokens(5)), (tokens(7), tokens(2)), ([], tokens(4)), (tokens(1), tokens(9))]
    return [
        Conversation(first, tokens(context)),
        Conversation([(tokens(2), tokens(1))], tokens(context + 2 * bool(context))),
    ]


def one_by_one(llm, conversations, e_vision):
    """Eq. 5 literally: the whole sequence of one pair through the LLM, log-probabilities picked with a loop."""
    picked = []
    for row, conversation in enumerate(conversations):
        for prompt, target in conversation.pairs:
            ids = torch.tensor([conversation.context + prompt + target])
            e_input = llm.get_input_embeddings()(ids)
            if e_vision is not None:
                e_input = torch.cat([e_vision[row : row + 1], e_input], dim=1)
            logprobs = llm(inputs_embeds=e_input).logits[0].log_softmax(-1)
            length = e_input.shape[1]
            picked += [logprobs[length - len(target) + t - 1, token] for t, token in enumerate(target)]
    return torch.stack(picked)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(("queries", "context"), [(5, 0), (0, 4), (5, 3)])
def test_packed_loss_is_one_by_one(request, peft, queries, context):
    llm = request.getfixturevalue("lora_model" if peft else "model").llm
    conversations = random_conversations(context)
    torch.manual_seed(1)
    e_vision = torch.randn(2, queries, 32) if queries else None
    packed = pack(conversations, queries)
    with torch.no_grad():
        ours, literal = target_logprobs(llm, packed, e_vision), one_by_one(llm, conversations, e_vision)
        nll, count = loss(llm, packed, e_vision)
    assert (ours - literal).abs().max() < 1e-5
    assert nll.item() == pytest.approx(-literal.sum().item(), abs=1e-4) and count == len(literal)  # Eq. 6
    assert packed.owner.tolist() == sum(([i] * n for i, n in enumerate([5, 2, 4, 9, 1])), [])


def test_packed_gradient_is_one_by_one(model):
    conversations = random_conversations()
    gradients = []
    for function in (
        lambda e: loss(model.llm, pack(conversations, 5), e)[0],
        lambda e: -one_by_one(model.llm, conversations, e).sum(),
    ):
        torch.manual_seed(1)
        e_vision = torch.randn(2, 5, 32, requires_grad=True)
        gradients.append(torch.autograd.grad(function(e_vision), e_vision)[0])
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


def test_pack_refuses_a_target_without_anything_before_it():
    with pytest.raises(AssertionError):
        pack([Conversation([([], [7, 8])])], 0)


# --------------------------------------------------------------------------------------------- gradients


def step(model, objects=2):
    features = [random_features(model.config, objects), random_features(model.config, 0, seed=1)]
    packed = pack(random_conversations(), model.config.num_queries)
    nll, _ = model(packed, *collate_features(features))
    nll.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_stage_1_trains_the_fusion_core_and_nothing_else(model):
    model.freeze(1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"fusion." + name for name, _ in model.fusion.named_parameters()}
    moved = step(model)
    assert "fusion.queries" in moved and moved <= trainable
    silent = {
        name for name in trainable - moved if not name.endswith("W_K.bias")
    }  # softmax ignores a shift of all keys
    assert {name.split(".")[-2:][0] for name in silent} <= {"self_qkv"}  # the same for its K bias, mixed with Q and V
    assert not model.llm.training and not model.encoder.training and model.fusion.training


def test_stage_2_trains_fusion_and_lora(model):
    before = {name for name, _ in model.llm.named_parameters()}
    model.add_lora()
    model.freeze(2)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    lora = {name for name in trainable if ".lora_" in name}
    assert trainable - lora == {"fusion." + name for name, _ in model.fusion.named_parameters()}
    assert len(lora) == 2 * 7 * 2 and not any(
        "lm_head" in name or "embed" in name for name in lora
    )  # 2 layers, 7 linears
    assert len(before) + len(lora) == len(list(model.llm.parameters()))
    moved = step(model)
    assert {name for name in moved if "lora_B" in name} == {name for name in lora if "lora_B" in name}
    assert "fusion.queries" in moved and not any(name.startswith("llm.") and ".lora_" not in name for name in moved)


def test_text_alone_trains_the_llm(model):
    nll, count = model(pack(random_conversations(context=2), 0))
    nll.backward()
    assert (
        count == 21
        and model.llm.get_output_embeddings().weight.grad.abs().sum() > 0
        and model.fusion.queries.grad is None
    )


# --------------------------------------------------------------------------- Eq. 5: generation, the whole model


def test_perceive(model, videos, config):
    features = model.perceive(videos["good"])
    counts = [len(masks) for masks in features.masks]
    assert features.z_vision.shape == (4 + sum(counts), 16) and features.z_vision.dtype == torch.float32
    assert features.is_object.tolist() == [False] * 4 + [True] * sum(counts)
    expected = [0.375, 1.375, 2.375, 3.375] + [
        t for t, n in zip([0.5, 1.5, 2.5, 3.5], counts, strict=True) for _ in range(n)
    ]
    assert features.times.tolist() == pytest.approx(expected) and not features.z_vision.requires_grad
    frames, times, _ = read_video(videos["good"], 4, 4, 96)
    assert torch.equal(features.frame_times, times)
    with torch.no_grad():
        cls, patches = model.encoder(frames / 255)
    assert torch.allclose(features.z_vision[:4], cls)
    first_of_last_clip = mask_pool(patches[3, 1], features.masks[3])[0]  # frame 2 of 4 lies in the second tubelet
    assert torch.allclose(features.z_vision[4 + sum(counts[:3])], first_of_last_clip)


@pytest.mark.parametrize("order", [slice(None), np.arange(16)[::-1]])
def test_a_keyframe_is_the_middle_frame_of_its_clip(videos, order):
    """Fails if masks come from another picture than the patches that they pool, be it of the same tubelet."""
    frames, _, keyframes = read_video(videos["good"], 4, 4, 96, keyframe_size=96, order=order)
    for clip, keyframe in zip(frames, keyframes, strict=True):
        same = [torch.equal(frame, torch.from_numpy(keyframe).permute(2, 0, 1)) for frame in clip]
        assert same == [False, False, True, False]


def test_zero_objects(model, config):
    features = random_features(config, 0)
    assert model.answer(features, "why ?") == model.answer_batch([features], ["why ?"])[0]
    assert torch.isfinite(model.option_logprobs(features, "why ?", ["the ball"])).all()


def greedy(llm, e_input, steps, stop):
    """Eq. 5 literally: the most probable token, appended, again."""
    new = []
    for _ in range(steps):
        token = int(llm(inputs_embeds=e_input).logits[0, -1].argmax())
        if token == stop:
            break
        new.append(token)
        e_input = torch.cat([e_input, llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return new


@pytest.mark.parametrize("peft", [False, True])
def test_batched_generation_is_one_by_one(request, peft, config):
    model = request.getfixturevalue("lora_model" if peft else "model")
    videos = [
        random_features(config, 2),
        None,
        random_features(config, 0, seed=1),
        None,
        random_features(config, 4, seed=2),
    ]
    prompts = ["why ?", "why did the red ball hit the blue box ?", "what will happen next ?", "the", "a b the ball egg"]
    together = model.answer_batch(videos, prompts)
    assert len(set(together)) > 2  # else the test says little
    for video, prompt, answer in zip(videos, prompts, together, strict=True):
        assert model.answer_batch([video], [prompt]) == [answer]
        with torch.no_grad():
            e_text = model.embed(prompt)
            e_input = e_text if video is None else torch.cat([model.fuse([video]), e_text], dim=1)
            literal = model.tokenizer.decode(
                greedy(model.llm, e_input, config.max_new_tokens, 3), skip_special_tokens=True
            )
        assert literal.strip() == answer
        if video is not None:
            assert model.answer(video, prompt) == answer


def test_decoding_strategies(model, config):
    features = random_features(config, 2)
    torch.manual_seed(0)
    sampled = {model.answer(features, "why ?", top_p=0.95, temperature=2.0) for _ in range(5)}
    assert len(sampled) > 1
    torch.manual_seed(3)
    one = model.answer(features, "why ?", top_p=0.9)
    torch.manual_seed(3)
    assert model.answer(features, "why ?", top_p=0.9) == one
    beams = model.answer_batch([features], ["why ?"], beams=4, answers=4)
    assert len(beams) == 4
    with torch.no_grad():
        e_input = torch.cat([model.fuse([features]), model.embed("why ?")], dim=1)
        mask = torch.ones(e_input.shape[:2], dtype=torch.long)
        assert len(generate(model.llm, model.tokenizer, e_input, mask, max_new_tokens=3)[0]) <= 3


def test_sampling_draws_from_all_words():
    """Fails if the library's default of the 50 likeliest words is left on: here 120 are nearly equally likely."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=120, **shape)).eval()
    e_input = torch.randn(1, 3, 16)
    mask = torch.ones(1, 3, dtype=torch.long)
    options = {"max_new_tokens": 1, "answers": 600, "temperature": 1000.0}
    drawn = {tuple(ids) for ids in generate(llm, tiny_tokenizer(), e_input, mask, **options)}
    assert len(drawn) > 100


def test_generation_stops_at_the_template_s_end_of_turn(model, config):
    """Even if neither the LLM's settings nor the tokenizer name it."""
    model.llm.generation_config.eos_token_id = model.tokenizer.eos_token = None
    bias = torch.zeros(model.llm.config.vocab_size)
    head = model.llm.lm_head
    bias[3] = 1e4  # <eos>, always
    head.register_forward_hook(lambda module, inputs, output: output + bias)
    with torch.no_grad():
        e_input = model.embed("why ?")
    mask = torch.ones(e_input.shape[:2], dtype=torch.long)
    assert generate(model.llm, model.tokenizer, e_input, mask, max_new_tokens=4) == [[]]


def test_option_logprobs(lora_model, config):
    features, options = (
        random_features(config, 3),
        ["the ball hit it .", "egg", "the red box breaks because it hit the egg"],
    )
    for f in (features, None):
        ours = lora_model.option_logprobs(f, "why ?", options)
        pairs = [encode_pair(lora_model.tokenizer, "why ?", option) for option in options]
        with torch.no_grad():
            e_vision = None if f is None else lora_model.fuse([f])
            literal = [one_by_one(lora_model.llm, [Conversation([pair])], e_vision).sum() for pair in pairs]
        assert torch.allclose(ours, torch.stack(literal), atol=1e-4)


def test_answer_depends_on_the_video(model, config):
    options = ["the ball hit it .", "egg"]
    a, b = (model.option_logprobs(random_features(config, 3, seed), "why ?", options) for seed in (0, 1))
    assert not torch.allclose(a, b, atol=1e-3)


def test_streaming_equals_the_answer(model, config, capsys):
    from transformers import TextStreamer

    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.answer(random_features(config, 2), "why ?", streamer=streamer)
    assert capsys.readouterr().out.split() == answer.split() and answer


# ------------------------------------------------------------------------------------------ save and load


def test_save_and_load_give_the_same_answers(lora_model, config, tmp_path):
    features = random_features(config, 2)
    lora_model.save(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"config.json", "encoder.safetensors", "sam.safetensors", "fusion.safetensors", "llm", "lora"}
    loaded = VidReason.load(tmp_path / "whole")
    options = ["the ball hit it .", "egg"]
    expected = lora_model.option_logprobs(features, "why ?", options)
    assert torch.equal(loaded.option_logprobs(features, "why ?", options), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    for name, value in lora_model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    # what train.py writes: the trained parts here, the frozen ones where they were
    loaded.save(tmp_path / "runs" / "part", parts=("fusion", "lora"))
    assert {path.name for path in (tmp_path / "runs" / "part").iterdir()} == {
        "config.json",
        "fusion.safetensors",
        "lora",
    }
    again = VidReason.load(tmp_path / "runs" / "part")
    assert torch.equal(again.option_logprobs(features, "why ?", options), expected)
    assert "/" not in (tmp_path / "whole" / "lora" / "adapter_config.json").read_text()  # no path of this machine
    # half the bytes
    again.save(tmp_path / "half", dtype=torch.float16)
    assert load_file(tmp_path / "half" / "fusion.safetensors")["queries"].dtype == torch.float16
    half = VidReason.load(tmp_path / "half")
    assert half.fusion.queries.dtype == torch.float32 and next(half.llm.parameters()).dtype == torch.float32
    assert torch.allclose(half.option_logprobs(features, "why ?", options), expected, atol=0.2)


def test_saving_without_lora_removes_an_older_adapter(config, model, tmp_path):
    model.save(tmp_path)
    (tmp_path / "lora").mkdir()
    model.save(tmp_path)
    assert not (tmp_path / "lora").exists()


def copies_in(path):
    """{name: tensor}, copied: tensors of load_file may lie in the file, which must not be rewritten then."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("part", ["fusion", "encoder", "sam"])
def test_load_names_every_key_that_does_not_fit(model, tmp_path, part):
    model.save(tmp_path)
    state = copies_in(tmp_path / f"{part}.safetensors")
    gone, *_, cut = [key for key, value in state.items() if value.ndim == 2 and len(value) > 1]
    del state[gone]
    state[cut] = state[cut][1:].contiguous()
    state["not.there"] = torch.zeros(1)
    save_file(state, tmp_path / f"{part}.safetensors")
    with pytest.raises(VidReasonError) as error:
        VidReason.load(tmp_path)
    message = str(error.value)
    assert f"missing {gone}" in message and "unexpected not.there" in message and f"{cut} is (" in message
    assert f"{part}.safetensors" in message


def test_load_is_strict_about_the_adapter_and_the_llm(lora_model, tmp_path):
    lora_model.save(tmp_path)
    for path in (tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "llm" / "model.safetensors"):
        whole = path.read_bytes()
        state = copies_in(path)
        gone = next(iter(state))
        del state[gone]
        save_file(state, path, {"format": "pt"})
        with pytest.raises(VidReasonError, match="missing"):
            VidReason.load(tmp_path)
        path.write_bytes(whole)
    VidReason.load(tmp_path)


def test_load_errors_are_one_line(model, tmp_path):
    cases = {}
    cases["no config.json"] = tmp_path / "nothing"
    model.save(tmp_path / "a")
    (tmp_path / "a" / "encoder.safetensors").unlink()
    cases["no such weights"] = tmp_path / "a"
    model.save(tmp_path / "b")
    (tmp_path / "b" / "sam.safetensors").write_bytes(b"<html>")
    cases["cannot be read"] = tmp_path / "b"
    model.save(tmp_path / "c", parts=("encoder", "sam", "fusion"))
    cases["LLM cannot be loaded"] = tmp_path / "c"
    model.save(tmp_path / "d")
    text = (tmp_path / "d" / "config.json").read_text()
    (tmp_path / "d" / "config.json").write_text(text.replace('"sam"', '"samm"'))
    cases["samm"] = tmp_path / "d"
    for words, directory in cases.items():
        with pytest.raises(VidReasonError) as error:
            VidReason.load(directory)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_model_on_the_meta_device_costs_nothing():
    toy = PRESETS["toy"]
    with torch.device("meta"):
        model = VidReason(toy, VideoTransformer(toy), build_sam(toy), tiny_llm(), tiny_tokenizer())
    millions = {
        part: sum(p.numel() for p in getattr(model, part).parameters()) / 1e6 for part in ("encoder", "sam", "fusion")
    }
    assert millions == pytest.approx({"encoder": 0.91, "sam": 0.45, "fusion": 1.09}, rel=0.02)


@pytest.mark.parametrize(("spread", "alike"), [(0.02, 0.996), (0.5, 0.44)])
def test_queries_that_begin_wide_apart_stay_apart(spread, alike):
    """The reason for the 0.5 in FusionCore; fails if its initialisation, or what a layer adds, changes."""
    config = PRESETS["toy"]
    torch.manual_seed(0)
    core = FusionCore(config, llm_width=64)
    if spread != 0.5:
        core.queries.data *= spread / 0.5
    left = []
    core.norm_out.register_forward_pre_hook(lambda _, inputs: left.append(inputs[0]))
    with torch.no_grad():
        core(torch.randn(4, 20, config.encoder_width), 4 * torch.rand(4, 20), torch.ones(4, 20, dtype=torch.bool))
    queries = torch.nn.functional.normalize(left[0], dim=-1)
    others = ~torch.eye(config.num_queries, dtype=torch.bool)
    assert (queries @ queries.mT)[:, others].mean().item() == pytest.approx(alike, abs=0.03)


# ------------------------------------------------------------------------------------------ the file itself


def test_the_file_stays_readable():
    source = Path(vidreason.__file__).read_text()
    assert max(map(len, source.splitlines())) <= 120
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60
    public = [node for node in functions if not node.name.startswith("_") and ast.get_docstring(node) is None]
    assert {node.name for node in public} <= {"forward", "to", "device"}


# --------------------------------------------------------------------------- numbers that nothing else would notice


def test_the_defaults_are_the_paper_s():
    """Fails if a size of the paper's model, or a threshold of SAM's own, is changed unseen."""
    paper = asdict(PRESETS["paper"])
    assert PRESETS["paper"] == vidreason.Config()
    assert paper == {
        "num_clips": 4, "frames_per_clip": 8, "image_size": 224, "patch_size": 16, "encoder_width": 768,
        "encoder_layers": 12, "encoder_heads": 12, "tubelet": 1, "frame_difference": 0.0, "sam": "vit_h",
        "points_per_side": 16, "masks_per_keyframe": 16, "keyframe_size": 512, "sam_iou_threshold": 0.88,
        "sam_stability_threshold": 0.95, "num_queries": 32, "fusion_width": 768, "fusion_layers": 8, "fusion_heads": 12,
        "time_embedding": True, "encoder_weights": "", "sam_weights": "",
        "llm": "meta-llama/Meta-Llama-3-8B-Instruct", "max_new_tokens": 256, "lora_rank": 64, "lora_alpha": 128,
    }  # fmt: skip
    changed = {name: value for name, value in asdict(PRESETS["small"]).items() if value != paper[name]}
    assert changed == {"sam": "vit_b", "llm": "Qwen/Qwen2.5-0.5B-Instruct"}


def test_without_layers_the_core_is_the_mean_of_real_tokens(config):
    """Fails if padding counts in the ablation "w/o fusion core", or the sum is taken in place of the mean."""
    z = torch.tensor([[[1.0], [3.0], [50.0]], [[2.0], [4.0], [6.0]]])
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert vidreason.masked_mean(z, real).tolist() == [[[2.0]], [[4.0]]]


def test_the_llm_is_loaded_in_the_type_that_is_asked_for(model, tmp_path):
    """Fails if bf16 is forgotten for the LLM, or given to the parts that stay in fp32."""
    model.save(tmp_path)
    loaded = VidReason.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.llm.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.fusion.parameters()} == {torch.float32}


def test_a_narrow_nucleus_is_greedy(model, config):
    """Fails if top_p, or a temperature near nought, is not handed on."""
    features = random_features(config, 3)
    greedy_answer = model.answer(features, "why ?")
    for seed in range(3):
        torch.manual_seed(seed)
        assert model.answer(features, "why ?", top_p=1e-6) == greedy_answer
        assert model.answer(features, "why ?", temperature=1e-4) == greedy_answer
