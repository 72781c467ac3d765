"""The toy world: simulator → renderer → language → answer checker. It stands in for the internet.

    python -m toy.world --clips 20 --seed 7 --out /tmp/world      # mp4 clips + samples.jsonl

A square table seen from above, 2–4 things on it, four seconds. Each thing has a colour (unique in its scene) and a
kind with an everyday behaviour: balls roll, eggs break (but not on a pillow), a pin pops a balloon, ice cubes slide
without slowing, boxes stand, pillows stop things, a hole swallows. Everything a clip can be asked about follows from
an event log with causal links, so each answer is known and can be checked.

Two pairs of kinds — pin/balloon and egg/pillow — never share the table in any video that anything is trained on
(`HELD_OUT`). What happens when they meet can only be known from *reading*: it is the paper's "world knowledge".

Units: positions and radii in table widths, times in seconds, velocities in table widths per second; x grows to the
right, y grows downwards (as in an image).
"""

import argparse
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# --------------------------------------------------------------------------- the things and the rules they obey

FPS, NUM_FRAMES, SIZE = 4, 16, 96  # a clip: 16 frames of 96 × 96 px at 4 frames per second
SECONDS = NUM_FRAMES / FPS
LAST_SEEN = 3.55  # events later than this leave too little trace in the last frame
COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "blue": (0.13, 0.3, 0.92),
    "green": (0.12, 0.62, 0.18),
    "yellow": (0.96, 0.84, 0.1),
    "purple": (0.62, 0.16, 0.72),
}
HOLE_COLOUR = "black"
KINDS = ["ball", "box", "egg", "balloon", "pin", "cube", "pillow", "hole"]
RADIUS = {
    "ball": 0.085,
    "box": 0.095,
    "egg": 0.085,
    "balloon": 0.1,
    "pin": 0.09,
    "cube": 0.085,
    "pillow": 0.11,
    "hole": 0.1,
}
FRICTION = {"ball": 0.06, "egg": 0.08, "balloon": 0.15, "pin": 0.15, "cube": 0.0}  # speed lost per second
MOVERS = list(FRICTION)
MOTION = {"ball": "roll", "egg": "roll", "balloon": "drift", "pin": "slide", "cube": "slide"}
EFFECTS = ("break", "pop", "fall", "roll", "slide", "drift", "stop", "bounce")
HELD_OUT = ({"pin", "balloon"}, {"egg", "pillow"})
HELD_OUT_HITS = [("pin", "balloon"), ("balloon", "pin"), ("egg", "pillow")]  # (mover, target)
AMBIGUOUS_HITS = {("egg", "egg"), ("pin", "pin"), ("balloon", "balloon")}  # like meets like: not modelled
SPLITS = {"train": 0, "val": 1, "test": 2, "text": 3}  # disjoint random streams


def outcome(mover: str, target: str) -> tuple[str, str]:
    """What follows when a moving kind hits another: (who is affected: "mover" | "target", effect)."""
    if target == "hole":
        return "mover", "fall"
    if {mover, target} == {"pin", "balloon"}:
        return ("mover" if mover == "balloon" else "target"), "pop"
    if mover == "balloon":
        return "mover", "stop"
    if target == "balloon":
        return "target", "drift"
    if mover == "egg":
        return "mover", "stop" if target == "pillow" else "break"
    if target == "egg":
        return "target", "break"
    if target == "box":
        return "mover", "bounce" if mover in ("ball", "cube") else "stop"
    if target == "pillow":
        return "mover", "stop"
    return "target", MOTION[target]


@dataclass
class Thing:
    kind: str
    colour: str
    position: tuple[float, float]
    velocity: tuple[float, float] | None = None  # None: it rests until something hits it
    start: float = 0.0  # when it begins to move, s

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass
class Event:
    """`cause` is the index of an earlier event in the log, or None for a motion that starts by itself."""

    time: float
    type: str  # start | hit | wall | one of EFFECTS
    subject: int
    object: int | None = None
    cause: int | None = None
    direction: str | None = None  # left | right | up | down, for motions


@dataclass
class Clip:
    """One simulated video. `trajectory` (frames, n, 2), `state` (frames, n): 0 whole, 1 broken, 2 popped, 3 gone."""

    things: list[Thing]
    events: list[Event]
    trajectory: np.ndarray
    state: np.ndarray
    next_hit: Event | None = None  # set when the clip is cut just before a collision
    seed: tuple = field(default=())

    @property
    def visible(self) -> list[Event]:
        return [e for e in self.events if e.time < LAST_SEEN]


def direction_of(velocity) -> str:
    x, y = velocity
    return ("right" if x > 0 else "left") if abs(x) >= abs(y) else ("down" if y > 0 else "up")


# --------------------------------------------------------------------------- simulator


class Simulation:
    """Discs on a table. 32 steps a frame-second keep a thing from tunnelling (≤ .02 table widths a step)."""

    SUBSTEPS = 8

    def __init__(self, things, without=None, noise=0.0, rng=None):
        self.things, self.events = things, []
        self.position = [list(t.position) for t in things]
        self.velocity = [[0.0, 0.0] for _ in things]
        self.state = [0] * len(things)
        self.cause: list[int | None] = [None] * len(things)  # the event that set each thing in motion
        self.started, self.touching = set(), set()
        self.launch = [t.velocity for t in things]
        if noise:
            self.launch = [v and tuple(np.array(v) * (1 + noise * rng.standard_normal(2))) for v in self.launch]
        if without is not None:
            self.state[without] = 3

    def log(self, time, type, subject, object=None, cause=None, direction=None) -> int:
        self.events.append(Event(round(time, 4), type, subject, object, cause, direction))
        return len(self.events) - 1

    def speed(self, i) -> float:
        return math.hypot(*self.velocity[i])

    def move(self, i, time, dt):
        thing = self.things[i]
        if thing.velocity and i not in self.started and time >= thing.start:
            self.started.add(i)
            self.velocity[i] = list(self.launch[i])
            self.cause[i] = self.log(time, "start", i, direction=direction_of(self.launch[i]))
        speed = self.speed(i)
        if speed == 0:
            return
        slower = speed - FRICTION[thing.kind] * dt
        if slower < 0.02:
            self.velocity[i] = [0.0, 0.0]
            return
        radius, wall = RADIUS[thing.kind], None
        for axis in (0, 1):
            self.velocity[i][axis] *= slower / speed
            self.position[i][axis] += self.velocity[i][axis] * dt
            if not radius < self.position[i][axis] < 1 - radius:
                self.position[i][axis] = min(max(self.position[i][axis], radius), 1 - radius)
                wall = axis
        if wall is not None:
            self.hit_wall(i, wall, time)

    def hit_wall(self, i, axis, time):
        kind, hit = self.things[i].kind, self.log(time, "wall", i, cause=self.cause[i])
        bounced = [-0.5 * v if a == axis else 0.5 * v for a, v in enumerate(self.velocity[i])]
        self.velocity[i] = [0.0, 0.0]
        if kind == "egg":
            self.state[i] = 1
            self.log(time, "break", i, cause=hit)
        elif kind in ("ball", "cube"):
            self.velocity[i] = bounced
            self.cause[i] = self.log(time, "bounce", i, cause=hit, direction=direction_of(bounced))
        else:
            self.log(time, "stop", i, cause=hit)

    def collide(self, i, j, time):
        """Resolve a contact of two whole things, if it is a new one and they approach each other."""
        (vx, vy), (wx, wy) = self.velocity[i], self.velocity[j]
        if self.state[i] or self.state[j] or vx == vy == wx == wy == 0:
            return
        kinds = self.things[i].kind, self.things[j].kind
        reach = RADIUS["hole"] if "hole" in kinds else RADIUS[kinds[0]] + RADIUS[kinds[1]]
        x, y = self.position[j][0] - self.position[i][0], self.position[j][1] - self.position[i][1]
        distance = math.hypot(x, y)
        if distance >= reach:
            if distance >= reach * 1.02:
                self.touching.discard((i, j))
            return
        if (i, j) in self.touching or (wx - vx) * x + (wy - vy) * y > 0:
            return
        self.touching.add((i, j))
        first = self.speed(i) >= self.speed(j) if "hole" not in kinds else kinds[1] == "hole"
        self.resolve(*((i, j) if first else (j, i)), time)

    def resolve(self, mover, target, time):
        who, effect = outcome(self.things[mover].kind, self.things[target].kind)
        hit = self.log(time, "hit", mover, target, cause=self.cause[mover])
        gap = [t - m for t, m in zip(self.position[target], self.position[mover])]
        normal, speed = [g / max(math.hypot(*gap), 1e-6) for g in gap], self.speed(mover)
        affected = mover if who == "mover" else target
        after = [0.0, 0.0]
        if effect in MOTION.values():
            self.velocity[target], self.velocity[mover] = [n * speed * 0.95 for n in normal], [0.0, 0.0]
            after = self.velocity[target]
        elif effect == "bounce":
            after = self.velocity[mover] = [-n * speed * 0.5 for n in normal]
        elif who == "target":  # the mover pushes on through what it broke, slowly
            self.velocity[mover] = [0.3 * v for v in self.velocity[mover]]
        else:
            self.velocity[mover] = [0.0, 0.0]
        if effect in ("break", "pop", "fall"):
            self.state[affected] = {"break": 1, "pop": 2, "fall": 3}[effect]
            self.velocity[affected] = [0.0, 0.0]
        moving = effect in (*MOTION.values(), "bounce")
        event = self.log(time, effect, affected, cause=hit, direction=direction_of(after) if moving else None)
        if moving:
            self.cause[affected] = event

    def run(self, frames):
        n, dt = len(self.things), 1 / FPS / self.SUBSTEPS
        trajectory, state = np.zeros((frames, n, 2), np.float32), np.zeros((frames, n), np.int8)
        for frame in range(frames):
            trajectory[frame], state[frame] = self.position, self.state
            for step in range(self.SUBSTEPS):
                time = frame / FPS + step * dt
                for i in range(n):
                    if self.state[i] == 0:
                        self.move(i, time, dt)
                for i in range(n):
                    for j in range(i + 1, n):
                        self.collide(i, j, time)
        return trajectory, state


def simulate(things, frames=24, without=None, noise=0.0, rng=None) -> Clip:
    """Run the world. `without`: index of a thing to leave out (a counterfactual); `noise`: relative launch noise."""
    simulation = Simulation(things, without, noise, rng)
    trajectory, state = simulation.run(frames)
    return Clip(things, simulation.events, trajectory, state)


# --------------------------------------------------------------------------- scenes


def may_share_table(kinds) -> bool:
    """False for a table that only the held-out test may show."""
    return not any(pair <= set(kinds) for pair in HELD_OUT)


class Scene:
    """Places things so that something is likely to happen: chains of things standing in each other's way."""

    def __init__(self, rng, held_out):
        self.rng, self.held_out, self.things = rng, held_out, []
        self.colours = [str(c) for c in rng.permutation(list(COLOURS))]

    def place(self, kind, position, velocity=None, start=0.0) -> bool:
        clear = all(math.dist(position, t.position) > RADIUS[kind] + RADIUS[t.kind] + 0.04 for t in self.things)
        inside = all(0.12 < p < 0.88 for p in position)
        kinds = [t.kind for t in self.things] + [kind]
        if not clear or not inside or kinds.count("hole") > 1 or len(kinds) > 4:
            return False
        if not self.held_out and not may_share_table(kinds):
            return False
        colour = HOLE_COLOUR if kind == "hole" else self.colours.pop()
        self.things.append(Thing(kind, colour, tuple(map(float, position)), velocity, start))
        return True

    def chain(self, length, start, kinds=None) -> bool:
        """`length` things in a row, the first launched along an axis (± 20°) toward the second, and so on."""
        rng = self.rng
        angle = rng.integers(4) * math.pi / 2 + rng.uniform(-0.35, 0.35)
        position, speed, previous = rng.uniform(0.12, 0.88, 2), rng.uniform(0.28, 0.45), None
        for link in range(length):
            if kinds:
                kind = kinds[link]
            elif link == length - 1 and link:
                kind = str(rng.choice(KINDS))
            else:
                pushed = [k for k in MOVERS if previous is None or outcome(previous, k) == ("target", MOTION[k])]
                if not pushed:
                    return False
                kind = str(rng.choice(pushed))
            if link:
                reach = RADIUS[previous] + RADIUS[kind]
                offset = rng.uniform(-0.15, 0.15) * reach
                along, across = (
                    np.array([math.cos(angle), math.sin(angle)]),
                    np.array([-math.sin(angle), math.cos(angle)]),
                )
                position = position + along * (reach + rng.uniform(0.12, 0.3)) + across * offset
                angle += math.asin(offset / reach)
            launch = (speed * math.cos(angle), speed * math.sin(angle)) if link == 0 else None
            if (previous, kind) in AMBIGUOUS_HITS or not self.place(kind, position, launch, start if launch else 0.0):
                return False
            previous = kind
        return True

    def fill(self, pair=None) -> bool:
        rng, first = self.rng, float(self.rng.uniform(0.1, 1.5))
        second = first + float(rng.uniform(0.5, 1.3)) * (1 if first < 0.9 else -1)
        plan = rng.choice(["pair", "row", "two pairs", "alone", "pair and one"], p=[0.2, 0.22, 0.3, 0.06, 0.22])
        if pair is not None:
            ok = self.chain(2, first, pair)
        else:
            ok = self.chain({"row": 3, "alone": 1}.get(plan, 2), min(first, 0.9) if plan == "row" else first)
        if plan == "two pairs":
            ok = ok and (self.chain(2, second) if pair is None else self.chain(1, second))
        elif plan == "pair and one":
            ok = ok and self.chain(1, second)
        for _ in range(rng.integers(0, 4)):
            self.place(str(rng.choice(KINDS)), rng.uniform(0.12, 0.88, 2))
        return ok and len(self.things) >= 2


def make_things(rng, held_out=False, pair=None) -> list[Thing]:
    while True:
        scene = Scene(rng, held_out)
        if scene.fill(pair):
            return [scene.things[i] for i in rng.permutation(len(scene.things))]


def hit_kinds(clip, event) -> tuple[str, str]:
    return clip.things[event.subject].kind, clip.things[event.object].kind


def cut_before(clip, hit, rng) -> Clip | None:
    """Delay the whole scene so that the clip ends just before `hit`; None if the story would be unclear then."""
    delay = SECONDS + rng.uniform(0.05, 0.35) - hit.time
    if delay < 0:
        return None
    things = [Thing(t.kind, t.colour, t.position, t.velocity, t.start + delay) for t in clip.things]
    late = simulate(things)
    coming = [e for e in late.events if e.type == "hit" and e.time >= LAST_SEEN]
    if not coming or not SECONDS <= coming[0].time < 4.5:
        return None
    nxt, clash = coming[0], [e for e in late.events if LAST_SEEN <= e.time < coming[0].time]
    crowded = len(coming) > 1 and coming[1].time < nxt.time + 0.35
    seen_moving = nxt.cause is not None and late.events[nxt.cause].time < 3.2
    if (nxt.subject, nxt.object) != (hit.subject, hit.object) or clash or crowded or not seen_moving:
        return None
    late.next_hit = nxt
    return late


def make_clip(seed: int, index: int, split: str = "train", held_out: bool = False, cut: bool | None = None) -> Clip:
    """Clip `index` of the stream (`split`, `seed`): a pure function of its arguments.

    held_out: the scene shows a pair of kinds that no training video shows, and is cut just before they meet.
    cut: force a clip that ends before a collision (True), or one that plays on (False); None: 40 % are cut.
    """
    key = (SPLITS[split], seed, index, int(held_out))
    rng = np.random.default_rng(key)
    cut = bool(rng.random() < 0.4) if cut is None else cut
    pair = HELD_OUT_HITS[index % len(HELD_OUT_HITS)] if held_out else None
    while True:
        clip = simulate(make_things(rng, held_out, pair))
        hits = [e for e in clip.events if e.type == "hit"]
        if any(hit_kinds(clip, e) in AMBIGUOUS_HITS for e in hits):
            continue
        if cut:
            wanted = [e for e in hits if pair is None or hit_kinds(clip, e) == pair]
            clip = cut_before(clip, wanted[rng.integers(len(wanted))], rng) if wanted else None
            if clip is None:
                continue
        elif not clip.visible or any(LAST_SEEN - 0.3 < e.time < 4.2 for e in clip.events):
            continue  # nothing to see, or something half seen at the end
        elif len(clip.visible) > 8 or (not hits and rng.random() < 0.6):
            continue  # too long a story for one breath, or only walls to talk about
        clip.trajectory, clip.state, clip.seed = clip.trajectory[:NUM_FRAMES], clip.state[:NUM_FRAMES], key
        return clip


# --------------------------------------------------------------------------- renderer


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


# --------------------------------------------------------------------------- language

NUMBERS = ["zero", "one", "two", "three", "four"]
PAST = {
    "break": "broke",
    "pop": "popped",
    "fall": "fell in",
    "roll": "rolled",
    "slide": "slid",
    "drift": "drifted",
    "stop": "stopped",
    "bounce": "bounced",
    "start": "moved",
    "hit": "hit",
    "reach": "reached",
}
PRESENT = {
    "break": "breaks",
    "pop": "pops",
    "fall": "falls in",
    "roll": "rolls",
    "slide": "slides",
    "drift": "drifts",
    "stop": "stops",
    "bounce": "bounces",
    "start": "moves",
    "hit": "hits",
    "reach": "reaches",
}
FUTURE = {v: "will " + (v if v != "fall" else "fall in") for v in (*EFFECTS, "hit", "reach")}
DIRECTIONS = ["left", "right", "up", "down"]
STILL = "still"  # what motion_of says of a thing that never moved
COLOUR_ORDER = [*COLOURS, HOLE_COLOUR]

# the paper's own two prompts (§3.3.1), as phrasings among others
REASON = (
    "The provided visual information depicts a sequence of events. Analyze the causal relationships between these "
    "events and provide a step-by-step explanation for the final outcome."
)
PREDICT = (
    "Based on the events observed in the video, predict the three most likely subsequent events. For each "
    "prediction, provide a brief justification and a confidence score from 0 to 1."
)
QUESTIONS = {  # type → phrasings; {x}, {y} are filled with names or clauses
    "count": ["how many objects are there ?", "how many things are on the table ?"],
    "moved": ["how many objects moved ?", "how many things moved ?"],
    "direction": ["which way did the {x} move ?", "in which direction did the {x} move ?"],
    "absent": ["which way did the {x} move ?", "in which direction did the {x} move ?"],
    "first": ["what moved first ?", "which object moved first ?"],
    "colour": ["what colour is the {x} ?", "which colour does the {x} have ?"],
    "kind": ["what kind of thing is the {x} one ?", "what is the {x} object ?"],
    "why": ["why did the {x} {y} ?", "what made the {x} {y} ?"],
    "bare why": ["why ?"],
    "explain": ["explain step by step what happened .", REASON],
    "predict": ["what will happen next ?", "what happens next ?", PREDICT],
    "held-out": ["what will happen next ?", "what happens next ?", PREDICT],
    "order": ["what happened first , the {x} or the {y} ?", "which came first , the {x} or the {y} ?"],
    "counterfactual": ["would the {x} {y} without the {z} ?", "if there were no {z} , would the {x} {y} ?"],
}


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(names):
    return " , ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def clause(clip, event, tense=PRESENT, direction=True) -> str:
    """One event as words: "the red ball hits the green egg"."""
    subject = f"the {clip.things[event.subject].name}"
    if event.type == "hit":
        target = clip.things[event.object]
        return f"{subject} {tense['reach' if target.kind == 'hole' else 'hit']} the {target.name}"
    if event.type == "wall":
        return f"{subject} {tense['hit']} the wall"
    return f"{subject} {tense[event.type]}" + (f" {event.direction}" if direction and event.direction else "")


def movers(clip) -> list[int]:
    """Things that were seen to move, in the order in which they began."""
    return list(dict.fromkeys(e.subject for e in clip.visible if e.type in ("start", *MOTION.values())))


def caption(clip, order=None) -> str:
    """What stage 1 learns to say: who is there, how many move, and every visible event in order.

    order: a permutation of the things for the listing; by default by colour, so that a clip has one caption.
    """
    order = (
        sorted(range(len(clip.things)), key=lambda i: COLOUR_ORDER.index(clip.things[i].colour))
        if order is None
        else order
    )
    names = [a(clip.things[i].name) for i in order]
    moved = len(movers(clip))
    parts = [
        f"there are {NUMBERS[len(names)]} objects : {listing(names)}",
        f"{NUMBERS[moved]} of them {'moves' if moved == 1 else 'move'}",
    ]
    parts += [clause(clip, e) for e in clip.visible]
    if clip.next_hit:
        parts.append(
            f"now the {clip.things[clip.next_hit.subject].name} is moving toward "
            f"the {clip.things[clip.next_hit.object].name}"
        )
    return " . ".join(parts) + " ."


def because(clip, effect) -> str:
    cause = clip.events[effect.cause]
    if cause.type == "wall":
        return "it hit the wall"
    if effect.subject == cause.object:
        return f"the {clip.things[cause.subject].name} hit it"
    target = clip.things[cause.object]
    return f"it {'reached' if target.kind == 'hole' else 'hit'} the {target.name}"


def prediction(clip) -> str:
    mover, target = clip.things[clip.next_hit.subject], clip.things[clip.next_hit.object]
    who, effect = outcome(mover.kind, target.kind)
    affected = mover if who == "mover" else target
    meet = FUTURE["reach" if target.kind == "hole" else "hit"]
    return f"the {mover.name} {meet} the {target.name} and the {affected.name} {FUTURE[effect]}"


def chain_to(clip, event) -> list[Event]:
    """The causes of an event back to the motion that began it all, oldest first, the event last."""
    chain = [event]
    while chain[0].cause is not None:
        chain.insert(0, clip.events[chain[0].cause])
    return chain


def motion_of(clip, i) -> str | None:
    """The one direction in which thing i was seen to move, STILL, or None where a person would hesitate."""
    mine = [e for e in clip.visible if e.subject == i and e.direction]
    if not mine:
        return STILL
    moved = np.abs(clip.trajectory[-1, i] - clip.trajectory[0, i])
    clear = len(mine) == 1 and moved.max() > 0.1 and moved.max() > 1.6 * moved.min()
    return mine[0].direction if clear and clip.state[-1, i] != 3 else None


def question_sets(clip, rng) -> list[tuple]:
    """Everything one may ask about a clip: [(type, {slots}, answer, options | None)], before phrasing."""
    things, seen, out = clip.things, clip.visible, []
    kinds = [t.kind for t in things]
    out.append(("count", {}, NUMBERS[len(things)], NUMBERS[1:]))
    out.append(("moved", {}, NUMBERS[len(movers(clip))], NUMBERS[:5]))
    ways = [(i, motion_of(clip, i)) for i in rng.permutation(len(things)) if kinds[i] != "hole"]
    still, going = [w for w in ways if w[1] == STILL], [w for w in ways if w[1] in DIRECTIONS]
    for i, way in going[:2] + still[: int(rng.random() < 0.5)]:
        name = things[i].name
        options = [*(f"the {name} moved {d}" for d in DIRECTIONS), f"the {name} did not move"]
        out.append(("direction", {"x": name}, options[[*DIRECTIONS, STILL].index(way)], options))
    present = {t.name for t in things}
    colours = [t.colour for t in things if t.kind != "hole"] if rng.random() < 0.5 else list(COLOURS)
    name = f"{str(rng.choice(colours))} {rng.choice([k for k in KINDS if k != 'hole'])}"
    if name not in present:
        out.append(("absent", {"x": name}, f"there is no {name}", None))
    starts = [e for e in seen if e.type in ("start", *MOTION.values())]
    if len(movers(clip)) > 1 and starts[1].time - starts[0].time > 0.3:
        out.append(("first", {}, f"the {things[starts[0].subject].name}", None))
    for i in rng.permutation(len(things))[:2]:
        if kinds[i] != "hole":
            if kinds.count(kinds[i]) == 1:
                out.append(
                    (
                        "colour",
                        {"x": kinds[i]},
                        f"the {kinds[i]} is {things[i].colour}",
                        [f"the {kinds[i]} is {c}" for c in COLOURS],
                    )
                )
            out.append(
                (
                    "kind",
                    {"x": things[i].colour},
                    a(things[i].name),
                    [a(f"{things[i].colour} {k}") for k in KINDS if k != "hole"],
                )
            )
    effects = [e for e in seen if e.type in EFFECTS]
    for e in effects:
        once = sum((f.subject, f.type) == (e.subject, e.type) for f in effects) == 1
        wall = clip.events[e.cause].type == "wall"
        # "why did it fall in?" needs no video (the hole); walls are so common that they would be a good guess
        by_itself = e.type in MOTION.values() and any(f.type == "start" and f.subject == e.subject for f in seen)
        if once and e.type != "fall" and not by_itself and (not wall or rng.random() < 0.3):
            out.append(("why", {"x": things[e.subject].name, "y": e.type}, "because " + because(clip, e), None))
    last_is_clear = len(effects) == 1 or (effects and effects[-1].time - effects[-2].time > 0.3)
    if last_is_clear and not clip.next_hit:
        last = effects[-1]
        out.append(("bare why", {}, f"{clause(clip, last, PAST, False)} because {because(clip, last)}", None))
        steps = [clause(clip, e, PAST, False) for e in chain_to(clip, last)]
        out.append(("explain", {}, " . ".join(steps), None))
    if clip.next_hit:
        pair = {things[clip.next_hit.subject].kind, things[clip.next_hit.object].kind}
        out.append(("held-out" if pair in HELD_OUT else "predict", {}, prediction(clip), None))
    out += order_question(clip, rng) + counterfactual_question(clip, effects, rng)
    return out


def order_question(clip, rng) -> list[tuple]:
    """Two events of the same type on four (or two) different things: no rule of the world tells which came first."""
    pairs = [
        (e, f)
        for e in clip.visible
        for f in clip.visible
        if f.time - e.time > 0.4 and e.type == f.type and not {e.subject, e.object} & {f.subject, f.object} - {None}
    ]
    if not pairs:
        return []
    first, second = pairs[rng.integers(len(pairs))]
    said = [clause(clip, e, PAST, False) for e in (first, second)]
    if any([clause(clip, e, PAST, False) for e in clip.visible].count(text) > 1 for text in said):
        return []
    asked = [said[i] for i in rng.permutation(2)]
    return [("order", {"x": asked[0][4:], "y": asked[1][4:]}, said[0], asked)]


def counterfactual_question(clip, effects, rng) -> list[tuple]:
    """Would it have happened without …? By running the world again; "no" is rare (7 of 43 in toy/results.json)."""
    effects = [
        e for e in effects if e.type in ("break", "pop", "fall", "bounce")
    ]  # to stop or roll has other causes too
    if not effects or clip.next_hit:
        return []
    e = effects[rng.integers(len(effects))]
    groups = {"yes": [], "no": []}
    for i, thing in enumerate(clip.things):
        if i != e.subject and thing.kind != "hole":
            again = simulate(clip.things, without=i)
            same = any((f.subject, f.type) == (e.subject, e.type) and f.time < SECONDS + 0.5 for f in again.events)
            groups["yes" if same else "no"].append(i)
    answer = "yes" if rng.random() < 0.5 else "no"
    if not groups[answer]:
        return []
    z = clip.things[groups[answer][rng.integers(len(groups[answer]))]]
    verb = "fall in" if e.type == "fall" else e.type
    return [("counterfactual", {"x": clip.things[e.subject].name, "y": verb, "z": z.name}, answer, ["yes", "no"])]


def questions(clip, rng=None) -> list[dict]:
    """→ [{"type", "question", "answer", "options"}] in the words of one randomly chosen phrasing each."""
    rng = rng or np.random.default_rng((*clip.seed, 7))
    out = []
    for type_, slots, answer, options in question_sets(clip, rng):
        text = str(rng.choice(QUESTIONS[type_])).format(**slots)
        out.append({"type": type_, "question": text, "answer": answer, "options": options})
    return out


# --------------------------------------------------------------------------- world knowledge: what only reading tells

HITS = [(m, t) for m in MOVERS for t in KINDS if (m, t) not in AMBIGUOUS_HITS]


def knowledge(mover, target, rng) -> str:
    """One sentence (or question and answer, separated by "|") about what happens when two kinds meet."""
    who, effect = outcome(mover, target)
    affected, other = (mover, target) if who == "mover" else (target, mover)
    meet = "reach" if target == "hole" else "hit"
    form = rng.integers(4)
    if form == 0:
        return f"when {a(mover)} {PRESENT[meet]} {a(target)} , the {affected} {PRESENT[effect]} ."
    if form == 1:
        opening = f"if {a(mover)} is moving toward {a(target)} , "
        meeting = f"the {mover} {FUTURE[meet]} the {target}"
        return opening + meeting + f" and the {affected} {FUTURE[effect]} ."
    if form == 2 and mover != target:
        reason = f"it {PRESENT[meet]} {a(target)}" if who == "mover" else f"{a(mover)} {PRESENT[meet]} it"
        return f"{a(affected)} {PRESENT[effect]} because {reason} ."
    return f"what happens when {a(mover)} {PRESENT[meet]} {a(target)} ?|the {affected} {PRESENT[effect]}"


# --------------------------------------------------------------------------- the checker

BASE = {form: verb for table in (PAST, PRESENT) for verb, form in ((v, f.split()[0]) for v, f in table.items())}
BASE.update({verb: verb for verb in PAST} | {"move": "start"})
IGNORED = {"the", "a", "an", "will", "in", "then"}


def normalise(text: str) -> list[tuple[str, ...]]:
    """A sentence as its clauses, each a tuple of base-form words: tense, articles and punctuation carry no meaning."""
    words = re.findall(r"\w+|[.,]", text.lower().replace("started moving", "moved").replace(", because", " because"))
    clauses, current = [], []
    for word in [*words, "."]:
        if word in (".", ",", "and"):
            clauses += [tuple(current)] if current else []
            current = []
        elif word == "because":
            current.append(word)
        elif word not in IGNORED:
            current.append(BASE.get(word, word))
    return clauses


def check(answer: str, truth: str) -> bool:
    """True where the answer means the same as the truth in the world's grammar (tense, articles, case are free)."""
    return bool(answer.strip()) and normalise(answer) == normalise(truth)


def check_outcome(answer: str, truth: str) -> bool:
    """For predictions: who is affected (its kind) and what becomes of it are right; colours and the pair may differ."""

    clauses, kinds = normalise(truth), [w for w in normalise(truth)[0] if w in KINDS]
    free = COLOUR_ORDER if len(set(kinds)) == 2 else ()  # of two like things the colour tells which one

    def last(found):
        return [w for w in found[-1] if w not in free] if found else []

    return last(normalise(answer)) == last(clauses)


def names_pair(answer: str, truth: str) -> bool:
    """For predictions: the answer names the right two things and who meets whom."""
    given, true = normalise(answer), normalise(truth)
    return bool(given) and given[0] == true[0]


# --------------------------------------------------------------------------- datasets


def sample_id(split, seed, index, held_out=False) -> str:
    return f"{split}-{seed}-{index:05d}" + ("-held-out" if held_out else "")


def title(clip: Clip) -> str:
    """A file name that a person can tell apart: what is about to meet, or what became of the last thing affected."""
    if clip.next_hit:
        words = f"{clip.things[clip.next_hit.subject].name} nears {clip.things[clip.next_hit.object].name}"
    else:
        last = [e for e in clip.visible if e.type in EFFECTS or e.type == "start"][-1]
        words = f"{clip.things[last.subject].name} {PRESENT[last.type]}"
    return words.replace(" ", "-")


def write_clip(clip: Clip, name: str, folder: Path, keep: bool = False) -> list[dict]:
    """Write one mp4 and return its records, one per question. keep: an mp4 of that name is this one."""
    path = folder / f"{name}.mp4"
    if not (keep and path.exists()):
        write_mp4(path, render(clip)[0])
    log = [{k: v for k, v in vars(e).items() if v is not None} for e in clip.visible]
    things = [t.name for t in clip.things]
    return [
        {"id": f"{name}-{i}", "video": f"{name}.mp4", **q, "things": things, "events": log}
        for i, q in enumerate(questions(clip))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, help="how many clips to make (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="which stream of clips; the same seed makes the same clips")
    parser.add_argument(
        "--split", choices=["train", "val", "test"], default="train", help="disjoint streams (default train)"
    )
    parser.add_argument(
        "--held_out",
        type=int,
        default=0,
        metavar="N",
        help="N more clips, of the kind pairs that no training video shows",
    )
    parser.add_argument(
        "--titles", action="store_true", help="name files after what happens in them instead of by number"
    )
    parser.add_argument("--gif", action="store_true", help="write each clip as an animated picture too")
    parser.add_argument("--out", type=Path, required=True, help="folder for the mp4 files and samples.jsonl")
    args = parser.parse_args()
    from tqdm import tqdm

    args.out.mkdir(parents=True, exist_ok=True)
    aside = args.out / "samples.jsonl.part"
    with open(aside, "w") as file:
        for i, held_out in tqdm(
            [(i, False) for i in range(args.clips)] + [(i, True) for i in range(args.held_out)], desc="clips"
        ):
            clip = make_clip(args.seed, i, args.split, held_out, cut=True if held_out else None)
            name = f"{title(clip)}-{i}" if args.titles else sample_id(args.split, args.seed, i, held_out)
            if args.gif:
                write_gif(args.out / f"{name}.gif", render(clip)[0])
            file.writelines(json.dumps(record) + "\n" for record in write_clip(clip, name, args.out))
    aside.rename(args.out / "samples.jsonl")
    print(f"{args.clips + args.held_out} clips and their questions: {args.out}")


if __name__ == "__main__":
    main()
