"""The toy world: a table, the things on it, and what becomes of them. It stands in for the internet.

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

import math
import runpy
from dataclasses import dataclass, field

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
WHOLE, BROKEN, POPPED, GONE = range(4)  # states of a thing
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


if __name__ == "__main__":
    runpy.run_module("toy.videos", run_name="__main__")  # what the command writes needs pixels and words, too
