"""The toy world as pixels: frames, who owns each pixel, mp4 and gif."""

import os
from pathlib import Path

import av
import numpy as np
from PIL import Image

from toy.world import BROKEN, COLOURS, FPS, GONE, NUM_FRAMES, POPPED, RADIUS, SIZE, Clip

WINDOW = 30  # px, larger than any thing


def render(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """-> frames uint8 (16, 96, 96, 3) RGB, owner uint8 (16, 96, 96): 0 the table, i + 1 where thing i is seen"""
    rng = np.random.default_rng((*clip.seed, 99))
    image = np.empty((NUM_FRAMES, SIZE, SIZE, 3), np.float32)
    image[:] = 0.78 + rng.uniform(-0.05, 0.05) + rng.uniform(-0.015, 0.015, 3)
    owner = np.zeros((NUM_FRAMES, SIZE, SIZE), np.uint8)

    holes_first = sorted(range(len(clip.things)), key=lambda i: clip.things[i].kind != "hole")
    for i in holes_first:
        drawn_as, layers = None, []
        for frame in range(NUM_FRAMES):
            state = clip.state[frame, i]
            centre = clip.trajectory[frame, i] * SIZE
            if state == GONE:
                continue
            x, y = np.clip(np.floor(centre - WINDOW / 2).astype(int), 0, SIZE - WINDOW)
            if drawn_as != (state, *centre):  # resting things are drawn once
                drawn_as = (state, *centre)
                layers = layers_of(clip.things[i], state, centre - (x, y))
            window = (frame, slice(y, y + WINDOW), slice(x, x + WINDOW))
            outside = paint(image[window], layers)
            owner[window][outside < 0.5] = i + 1

    image += rng.normal(0, 0.012, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), owner


def paint(patch, layers):
    """Paint layers onto a patch of the image, in place -> how much of each pixel they leave free"""
    outside = 1.0
    for alpha, colour in layers:
        patch += alpha[..., None] * (colour - patch)
        outside = outside * (1 - alpha)
    return outside


# --------------------------------------------------------------------------- shapes
# Each is a list of painter's layers [(alpha, rgb)] over a window; u, v are its pixels' coordinates, in which the thing
# has radius 1, and soft is the width of an edge. What is inside a shape has a negative signed distance to its outline.


def layers_of(thing, state, centre):
    """The layers of a thing whose centre lies at x, y pixels in the window."""
    radius = RADIUS[thing.kind] * SIZE
    grid = np.arange(WINDOW) + 0.5
    u, v = np.meshgrid((grid - centre[0]) / radius, (grid - centre[1]) / radius)
    colour = np.array(COLOURS.get(thing.colour, (0, 0, 0)))
    shape = SHAPES[thing.kind]
    if thing.kind != "hole":
        shape = {BROKEN: broken, POPPED: popped}.get(state, shape)
    return shape(u, v, colour, 1.2 / radius)


def inside(signed_distance, softness):
    """Anti-aliased alpha of the inside of a shape."""
    return np.clip(0.5 - signed_distance / softness, 0, 1)


def disc(u, v, radius, soft):
    return inside(np.hypot(u, v) - radius, soft)


def darker(colour):
    return colour * 0.55


def lighter(colour):
    return colour * 0.5 + 0.5


WHITE = np.ones(3)


def ball(u, v, colour, soft):
    shine = WHITE * 0.6 + colour * 0.4
    return [
        (disc(u, v, 1, soft), darker(colour)),
        (disc(u, v, 0.86, soft), colour),
        (disc(u + 0.35, v + 0.35, 0.25, soft), shine),
    ]


def box(u, v, colour, soft):
    square = np.maximum(abs(u), abs(v))
    cross = np.minimum(abs(u - v), abs(u + v)) / 1.4
    planks = inside(cross - 0.1, soft) * (square < 0.7)
    return [
        (inside(square - 0.92, soft), darker(colour) * 0.7),
        (inside(square - 0.7, soft), colour),
        (planks, darker(colour) * 0.7),
    ]


def egg(u, v, colour, soft):
    oval = np.hypot(u / 0.75, v / 1.05) - 1
    shine = np.hypot(u / 0.6, (v + 0.3) / 0.35) - 0.75
    return [
        (inside(oval, soft), darker(colour)),
        (inside(oval + 0.16, soft), colour),
        (inside(shine, soft), lighter(colour) * 0.5 + 0.5),
    ]


def balloon(u, v, colour, soft):
    string = np.abs(u - 0.12 * np.sin(8 * v)) - 0.08
    string = inside(string, soft) * (v > 0.5) * (v < 1.3)
    rubber = np.hypot(u / 0.85, (v + 0.2) / 0.9) - 1
    knot = np.abs(u) + np.abs(v - 0.72) - 0.2
    return [
        (string, WHITE * 0.15),
        (inside(rubber, soft), colour),
        (disc(u + 0.3, v + 0.55, 0.22, soft), WHITE),
        (inside(knot, soft), darker(colour)),
    ]


def pin(u, v, colour, soft):
    blade = np.abs(u) - 0.36 * (1 - (v + 1) / 2.2)
    blade = np.maximum(blade, np.abs(v) - 1.1)
    return [
        (inside(blade, soft), darker(colour) * 0.6 + 0.1),
        (disc(u, v + 0.7, 0.52, soft), colour),
    ]


def cube(u, v, colour, soft):
    diamond = abs(u) + abs(v)
    glint = inside(np.abs(u - v) / 1.4 - 0.1, soft) * (diamond < 0.75)
    ice = lighter(colour) * 0.6 + 0.4 * np.array([0.8, 0.95, 1.0])
    return [
        (inside(diamond - 1.25, soft), colour),
        (inside(diamond - 0.8, soft), ice),
        (glint, WHITE),
    ]


def pillow(u, v, colour, soft):
    cushion = np.abs(u) ** 4 + (np.abs(v) / 0.7) ** 4
    seams = np.abs(np.abs(u) - 0.45) - 0.08
    return [
        (inside(cushion - 1, soft * 3), darker(colour)),
        (inside(cushion - 0.6, soft * 3), colour),
        (inside(seams, soft) * (cushion < 0.6), lighter(colour)),
    ]


def hole(u, v, colour, soft):
    return [(disc(u, v, 1, soft), np.full(3, 0.04))]


def broken(u, v, colour, soft):
    """Shell, yolk, splinters of its colour."""
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    shell = distance - 0.9 - 0.25 * np.cos(7 * angle)
    splinters = inside(np.abs(distance - 0.8) - 0.16, soft) * (np.cos(3 * angle) > 0)
    return [
        (inside(shell, soft), np.array([0.97, 0.95, 0.85])),
        (disc(u, v, 0.45, soft), np.array([1.0, 0.7, 0.05])),
        (splinters, colour),
    ]


def popped(u, v, colour, soft):
    """Torn rubber."""
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    ring = inside(np.abs(distance - 0.75) - 0.22, soft)
    pieces = np.clip(np.cos(6 * angle) * 3, 0, 1)
    return [(ring * pieces, colour)]


SHAPES = {
    "ball": ball,
    "box": box,
    "egg": egg,
    "balloon": balloon,
    "pin": pin,
    "cube": cube,
    "pillow": pillow,
    "hole": hole,
}


# --------------------------------------------------------------------------- files


def write_mp4(path: Path, frames: np.ndarray, fps: int = FPS):
    """Write RGB uint8 (n, H, W, 3) as H.264, nearly lossless, written aside and renamed. The same frames give the same
    bytes: x264's assembly reads beyond so small a picture and would make each file a little different."""
    options = {"crf": "12", "preset": "veryfast", "x264-params": "asm=0"}
    aside = Path(path).with_suffix(f".{os.getpid()}.part.mp4")  # two evaluations may share a folder of clips
    with av.open(str(aside), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    aside.rename(path)


def write_gif(path: Path, frames: np.ndarray, fps: int = FPS, scale: int = 2):
    """The same as an animated picture, enlarged, for a README."""
    pictures = []
    for frame in frames:
        height, width = frame.shape[:2]
        large = Image.fromarray(frame).resize((width * scale, height * scale), Image.NEAREST)
        pictures.append(large.quantize(24))
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=1000 // fps, loop=0, optimize=True)
