"""The encoder against ViCLIP's own code (numbers it computed, recorded below) and against the layout of its files."""

import json
import math
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llm, tiny_tokenizer, write_video
from safetensors.torch import save_file

from vidreason import Config, VideoTransformer, VidReasonError, build_sam, load_weights

ROOT = Path(__file__).resolve().parent.parent

CONFIG = Config(
    image_size=24, patch_size=8, frames_per_clip=3, encoder_width=16, encoder_layers=2, encoder_heads=2,
)  # fmt: skip
BLOCK = {
    "attn.in_proj_bias": (48,), "attn.in_proj_weight": (48, 16), "attn.out_proj.bias": (16,),
    "attn.out_proj.weight": (16, 16), "ln_1.bias": (16,), "ln_1.weight": (16,), "ln_2.bias": (16,),
    "ln_2.weight": (16,), "mlp.c_fc.bias": (64,), "mlp.c_fc.weight": (64, 16), "mlp.c_proj.bias": (16,),
    "mlp.c_proj.weight": (16, 64),
}  # fmt: skip
TOWER = {
    "class_embedding": (16,), "conv1.weight": (16, 3, 1, 8, 8), "ln_post.bias": (16,), "ln_post.weight": (16,),
    "ln_pre.bias": (16,), "ln_pre.weight": (16,), "positional_embedding": (10, 16), "proj": (16, 8),
    "temporal_positional_embedding": (1, 3, 16),
    **{f"transformer.resblocks.{layer}.{name}": shape for layer in range(2) for name, shape in BLOCK.items()},
}  # fmt: skip
OTHERS = {
    "temp": (), "text_encoder.ln_final.bias": (8,), "text_encoder.ln_final.weight": (8,),
    "text_encoder.positional_embedding": (4, 8), "text_encoder.text_projection": (8, 8),
    "text_encoder.token_embedding.weight": (12, 8), "text_encoder.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
}  # fmt: skip


def wave(shape, phase):
    """Scattered numbers in [-1, 1] by a closed formula: random generators may change from one release to the next."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * index**2 + phase).float().view(shape)


def tower():
    """The weights of a small ViCLIP vision tower under upstream's names. What comes before ln_pre is small, so that
    its epsilon shows in the result."""
    state = {}
    for phase, (name, shape) in enumerate(sorted(TOWER.items())):
        value = wave(shape, phase)
        is_gain = "ln_" in name and name.endswith("weight")
        state[name] = 1 + value / 2 if is_gain else value * (0.3 if "resblocks" in name else 0.02)
    return state


def viclip():
    """The state dict of the whole model: the vision tower, the text tower, the temperature of the loss."""
    others = {name: wave(shape, 0) for name, shape in OTHERS.items()}
    return {**others, **{"vision_encoder." + name: tensor for name, tensor in tower().items()}}


def test_encoder_computes_what_viclip_computes(tmp_path):
    """The numbers are those of VisionTransformer in OpenGVLab/InternVideo, Data/InternVid/viclip/viclip_vision.py
    (commit ccede52c37b6e7f5fd955110d50bf4674b836c50), in float64: VisionTransformer(24, 8, 16, 2, 2, output_dim=8,
    num_frames=3) in eval mode with the weights of tower(), on the clips below after upstream's own normalisation
    (viclip/__init__.py), read off after ln_post, which comes before the projection and acts on every token. Upstream
    lists the patches position by position, each with its frames in order; here a frame's patches stand together."""
    torch.save({"model": viclip()}, tmp_path / "viclip.pth")
    encoder = VideoTransformer(CONFIG).eval()
    load_weights(encoder, tmp_path / "viclip.pth")
    with torch.no_grad():
        cls, patches = encoder((1 + wave((2, 3, 3, 24, 24), 0.5)) / 2)
    recorded = [
        (cls[1, :8], [-0.360578, -0.329622, 1.009068, -0.626607, -1.465286, 0.146693, 0.553755, -1.145877]),
        (patches[0, 0, 1, :8], [0.732969, -0.030300, 0.537278, -1.008996, -0.709280, 0.617592, -0.114729, -2.053751]),
        (patches[1, 2, 5, :8], [-1.044768, 0.053337, 0.350336, -0.404679, -1.425561, -0.158590, 0.151699, -1.107885]),
        (torch.stack([cls.abs().mean(), patches.abs().mean()]), [0.823205, 0.790343]),
    ]
    for found, expected in recorded:
        assert (found - torch.tensor(expected)).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["whole", "flat", "tower", "safetensors", "half"])
def test_viclip_files_are_read(layout, tmp_path):
    """The .pth files hold everything under "model"; the hub's model.safetensors has the same names, not nested."""
    path = tmp_path / ("model.safetensors" if layout == "safetensors" else "viclip.pth")
    state = {name: tensor.half() if layout == "half" else tensor for name, tensor in viclip().items()}
    contents = {"flat": state, "tower": tower()}.get(layout, {"model": state, "epoch": 9, "global_step": 1000})
    save_file(state, path) if layout == "safetensors" else torch.save(contents, path)
    encoder = VideoTransformer(CONFIG)
    load_weights(encoder, path)
    loaded, expected = encoder.state_dict(), tower()
    assert loaded.keys() == expected.keys() - {"proj"}
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float() if layout == "half" else expected[name]), name


def test_viclip_files_that_do_not_fit_are_refused_by_name(tmp_path):
    state = viclip()
    del state["vision_encoder.transformer.resblocks.1.mlp.c_fc.bias"]
    state["vision_encoder.ln_mid.weight"] = torch.ones(16)
    state["vision_encoder.temporal_positional_embedding"] = torch.zeros(1, 8, 16)
    torch.save({"model": state}, tmp_path / "viclip.pth")
    with pytest.raises(VidReasonError) as error:
        load_weights(VideoTransformer(CONFIG), tmp_path / "viclip.pth")
    message = str(error.value)
    assert "missing transformer.resblocks.1.mlp.c_fc.bias, unexpected ln_mid.weight, " in message
    assert "temporal_positional_embedding is (1, 8, 16), not (1, 3, 16) (" in message
    assert "text_encoder" not in message and "proj" not in message and str(tmp_path / "viclip.pth") in message


def test_viclip_training_checkpoints_are_read(tmp_path, monkeypatch):
    """The larger .pth files are whole training states; their settings are of a class that only upstream has."""
    settings = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
    with monkeypatch.context() as patch:
        for name in ("utils", "utils.easydict"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["utils.easydict"].EasyDict = settings
        config = settings(num_frames=8)
        config.num_frames = 8  # upstream's class keeps its entries as attributes too
        torch.save({"model": viclip(), "config": config, "epoch": 9}, tmp_path / "viclip.pth")
    encoder = VideoTransformer(CONFIG)
    load_weights(encoder, tmp_path / "viclip.pth")
    assert all(torch.equal(tensor, tower()[name]) for name, tensor in encoder.state_dict().items())


def test_official_files_train_and_answer_through_the_command_line(tmp_path):
    """ViCLIP's .pth, SAM's .pth and a bf16 Llama directory, as published but small and random: train, then ask."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    write_video(folder / "clip.mp4")
    (folder / "captions.csv").write_text("videoid,page_dir,name\nclip,.,the ball hits the egg\n")
    torch.save({"model": viclip(), "epoch": 9}, folder / "ViCLIP-B.pth")
    config = replace(
        CONFIG, sam="toy", points_per_side=2, keyframe_size=96, sam_iou_threshold=-9.0, sam_stability_threshold=0.0,
        num_queries=4, fusion_width=16, fusion_layers=1, fusion_heads=2, max_new_tokens=4, llm="none",
    )  # fmt: skip
    torch.save(build_sam(config).state_dict(), folder / "sam_vit_t.pth")
    tiny_llm().bfloat16().save_pretrained(folder / "Llama")
    tiny_tokenizer().save_pretrained(folder / "Llama")
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "config.json").write_text(json.dumps(asdict(config)))
    flags = f"--preset paper --model {tmp_path / 'sizes'} --encoder_weights {folder / 'ViCLIP-B.pth'} --sam_weights "
    flags += f"{folder / 'sam_vit_t.pth'} --llm {folder / 'Llama'} --data {folder / 'captions.csv'} --videos {folder} "
    flags += f"--features {tmp_path / 'features'} --output_dir {tmp_path / 'run'} --batch 1 --max_steps 2 --device cpu"
    for command in (
        f"train.py --stage 1 {flags}",
        f"infer.py {folder / 'clip.mp4'} --model {tmp_path / 'run' / 'model'}",
    ):
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    found = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (tmp_path / "run" / "model" / found["encoder_weights"]).samefile(folder / "ViCLIP-B.pth")
