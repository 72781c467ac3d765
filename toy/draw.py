"""The toy world as pixels: frames, who owns each pixel, mp4 and gif."""

import os
from pathlib import Path

import numpy as np

from toy.world import COLOURS, FPS, NUM_FRAMES, RADIUS, SIZE, Clip


def coverage(signed_distance, softness):
    """Anti-aliased alpha of the inside (negative signed distance) of a shape."""
    return np.clip(0.5 - signed_distance / softness, 0, 1)


def layers(kind, state, u, v, colour, soft):
    """Painter's layers [(alpha, rgb)] of a thing; u, v are pixel coordinates in units of its radius."""
    c, r, white = np.array(colour), np.hypot(u, v), np.ones(3)
    dark, light = c * 0.55, c * 0.5 + 0.5
    if kind == "hole":
        return [(coverage(r - 1, soft), np.full(3, 0.04))]
    a = np.arctan2(v, u)
    if state == 1:  # broken: shell, yolk, splinters of its colour
        return [
            (coverage(r - 0.9 - 0.25 * np.cos(7 * a), soft), np.array([0.97, 0.95, 0.85])),
            (coverage(r - 0.45, soft), np.array([1.0, 0.7, 0.05])),
            (coverage(np.abs(r - 0.8) - 0.16, soft) * (np.cos(3 * a) > 0), c),
        ]
    if state == 2:  # popped: torn rubber
        return [(coverage(np.abs(r - 0.75) - 0.22, soft) * np.clip(np.cos(6 * a) * 3, 0, 1), c)]
    if kind == "ball":
        return [
            (coverage(r - 1, soft), dark),
            (coverage(r - 0.86, soft), c),
            (coverage(np.hypot(u + 0.35, v + 0.35) - 0.25, soft), white * 0.6 + c * 0.4),
        ]
    if kind == "box":
        square, cross = np.maximum(abs(u), abs(v)), np.minimum(abs(u - v), abs(u + v)) / 1.4
        return [
            (coverage(square - 0.92, soft), dark * 0.7),
            (coverage(square - 0.7, soft), c),
            (coverage(cross - 0.1, soft) * (square < 0.7), dark * 0.7),
        ]
    if kind == "egg":
        oval = np.hypot(u / 0.75, v / 1.05) - 1
        return [
            (coverage(oval, soft), dark),
            (coverage(oval + 0.16, soft), c),
            (coverage(np.hypot(u / 0.6, (v + 0.3) / 0.35) - 0.75, soft), light * 0.5 + 0.5),
        ]
    if kind == "balloon":
        return [
            (coverage(np.abs(u - 0.12 * np.sin(8 * v)) - 0.08, soft) * (v > 0.5) * (v < 1.3), white * 0.15),
            (coverage(np.hypot(u / 0.85, (v + 0.2) / 0.9) - 1, soft), c),
            (coverage(np.hypot(u + 0.3, v + 0.55) - 0.22, soft), white),
            (coverage(np.abs(u) + np.abs(v - 0.72) - 0.2, soft), dark),
        ]
    if kind == "pin":
        blade = np.abs(u) - 0.36 * (1 - (v + 1) / 2.2)
        return [
            (coverage(np.maximum(blade, np.abs(v) - 1.1), soft), dark * 0.6 + 0.1),
            (coverage(np.hypot(u, v + 0.7) - 0.52, soft), c),
        ]
    if kind == "cube":
        diamond = abs(u) + abs(v)
        return [
            (coverage(diamond - 1.25, soft), c),
            (coverage(diamond - 0.8, soft), light * 0.6 + 0.4 * np.array([0.8, 0.95, 1.0])),
            (coverage(np.abs(u - v) / 1.4 - 0.1, soft) * (diamond < 0.75), white),
        ]
    pillow = (np.abs(u)) ** 4 + (np.abs(v) / 0.7) ** 4
    seams = coverage(np.abs(np.abs(u) - 0.45) - 0.08, soft) * (pillow < 0.6)
    return [(coverage(pillow - 1, soft * 3), dark), (coverage(pillow - 0.6, soft * 3), c), (seams, light)]


def render(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """→ frames uint8 (16, 96, 96, 3) RGB, owner uint8 (16, 96, 96): 0 the table, i + 1 where thing i is seen."""
    rng = np.random.default_rng((*clip.seed, 99))
    window = 30  # px, larger than any thing
    image = np.empty((NUM_FRAMES, SIZE, SIZE, 3), np.float32)
    image[:] = 0.78 + rng.uniform(-0.05, 0.05) + rng.uniform(-0.015, 0.015, 3)
    owner = np.zeros((NUM_FRAMES, SIZE, SIZE), np.uint8)
    for i in sorted(range(len(clip.things)), key=lambda i: clip.things[i].kind != "hole"):
        thing, radius, drawn = clip.things[i], RADIUS[clip.things[i].kind] * SIZE, None
        for frame in range(NUM_FRAMES):
            state, centre = clip.state[frame, i], clip.trajectory[frame, i] * SIZE
            if state == 3:
                continue
            x, y = np.clip(np.floor(centre - window / 2).astype(int), 0, SIZE - window)
            if drawn is None or drawn[0] != (state, *centre):  # resting things are drawn once
                grid = np.arange(window) + 0.5
                u, v = np.meshgrid((x + grid - centre[0]) / radius, (y + grid - centre[1]) / radius)
                drawn = (
                    (state, *centre),
                    layers(thing.kind, state, u, v, COLOURS.get(thing.colour, (0, 0, 0)), 1.2 / radius),
                )
            patch, outside = image[frame, y : y + window, x : x + window], 1.0
            for alpha, colour in drawn[1]:
                patch += alpha[..., None] * (colour - patch)
                outside = outside * (1 - alpha)
            owner[frame, y : y + window, x : x + window][outside < 0.5] = i + 1
    image += rng.normal(0, 0.012, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), owner


def write_mp4(path, frames, fps=FPS):
    """Write RGB uint8 (n, H, W, 3) as H.264, nearly lossless, written aside and renamed. The same frames give the same
    bytes: x264's assembly reads beyond so small a picture and would make each file a little different."""
    import av

    options = {"crf": "12", "preset": "veryfast", "x264-params": "asm=0"}
    aside = Path(path).with_suffix(f".{os.getpid()}.part.mp4")  # two evaluations may share a folder of clips
    with av.open(str(aside), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = *frames.shape[1:3], "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    aside.rename(path)


def write_gif(path, frames, fps=FPS, scale=2):
    """The same as an animated picture, enlarged, for a README."""
    from PIL import Image

    pictures = [
        Image.fromarray(f).resize((f.shape[1] * scale, f.shape[0] * scale), Image.NEAREST).quantize(24) for f in frames
    ]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0, optimize=True)
