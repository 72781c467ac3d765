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
from dataclasses import dataclass, replace

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
BOUNCY = ("ball", "cube")  # what comes back from a box or a wall
MOTION = {"ball": "roll", "egg": "roll", "balloon": "drift", "pin": "slide", "cube": "slide"}  # when hit
EFFECTS = ("break", "pop", "fall", "roll", "slide", "drift", "stop", "bounce")
HELD_OUT = ({"pin", "balloon"}, {"egg", "pillow"})
HELD_OUT_HITS = [("pin", "balloon"), ("balloon", "pin"), ("egg", "pillow")]  # (mover, target)
AMBIGUOUS_HITS = {("egg", "egg"), ("pin", "pin"), ("balloon", "balloon")}  # like meets like: not modelled
WHOLE, BROKEN, POPPED, GONE = range(4)  # states of a thing
LASTING = {"break": BROKEN, "pop": POPPED, "fall": GONE}  # effect -> the state in which it leaves a thing
SPLITS = {"train": 0, "val": 1, "test": 2, "text": 3}  # disjoint random streams


def outcome(mover: str, target: str) -> tuple[str, str]:
    """What follows when a moving kind hits another: (who is affected: "mover" | "target", effect)."""
    if target == "hole":
        return "mover", "fall"
    if {mover, target} == {"pin", "balloon"}:
        balloon = "mover" if mover == "balloon" else "target"
        return balloon, "pop"
    if mover == "balloon":
        return "mover", "stop"
    if target == "balloon":
        return "target", "drift"
    if mover == "egg":
        effect = "stop" if target == "pillow" else "break"
        return "mover", effect
    if target == "egg":
        return "target", "break"
    if target == "box":
        effect = "bounce" if mover in BOUNCY else "stop"
        return "mover", effect
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
    """One simulated video of n things: `trajectory` (frames, n, 2), `state` (frames, n), one of WHOLE to GONE."""

    things: list[Thing]
    events: list[Event]
    trajectory: np.ndarray
    state: np.ndarray
    next_hit: Event | None = None  # set when the clip is cut just before a collision
    seed: tuple = ()

    @property
    def visible(self) -> list[Event]:
        return [event for event in self.events if event.time < LAST_SEEN]


def hit_kinds(clip: Clip, hit: Event) -> tuple[str, str]:
    """The kinds that meet: (mover, target)."""
    return clip.things[hit.subject].kind, clip.things[hit.object].kind


def direction_of(velocity) -> str:
    x, y = velocity
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


# --------------------------------------------------------------------------- simulator


class Simulation:
    """Discs on a table. 32 steps a second keep a thing from tunnelling (at most .02 table widths a step)."""

    SUBSTEPS = 8  # per frame

    def __init__(self, things, without=None, noise=0.0, rng=None):
        self.things, self.events = things, []
        self.position = [list(thing.position) for thing in things]
        self.velocity = [[0.0, 0.0] for _ in things]
        self.state = [WHOLE] * len(things)
        self.cause: list[int | None] = [None] * len(things)  # the event that set each thing in motion
        self.started = set()
        self.touching = set()  # pairs whose hit is in the log already
        self.launch = [thing.velocity for thing in things]
        if noise:
            self.launch = [self.disturb(velocity, noise, rng) for velocity in self.launch]
        if without is not None:
            self.state[without] = GONE

    @staticmethod
    def disturb(velocity, noise, rng):
        if velocity is None:
            return None
        return tuple(np.array(velocity) * (1 + noise * rng.standard_normal(2)))

    def log(self, time, type, subject, object=None, cause=None, direction=None) -> int:
        """Write down an event and return its index."""
        self.events.append(Event(round(time, 4), type, subject, object, cause, direction))
        return len(self.events) - 1

    def speed(self, i) -> float:
        return math.hypot(*self.velocity[i])

    def halt(self, i):
        self.velocity[i] = [0.0, 0.0]

    def run(self, frames) -> tuple[np.ndarray, np.ndarray]:
        """-> trajectory (frames, n, 2) float32, state (frames, n) int8, as they are when each frame begins"""
        n = len(self.things)
        trajectory = np.zeros((frames, n, 2), np.float32)
        state = np.zeros((frames, n), np.int8)
        dt = 1 / FPS / self.SUBSTEPS
        for frame in range(frames):
            trajectory[frame] = self.position
            state[frame] = self.state
            for step in range(self.SUBSTEPS):
                self.advance(frame / FPS + step * dt, dt)
        return trajectory, state

    def advance(self, time, dt):
        """One step: everything moves, then whatever touches collides."""
        n = len(self.things)
        for i in range(n):
            if self.state[i] == WHOLE:
                self.move(i, time, dt)
        for i in range(n):
            for j in range(i + 1, n):
                self.collide(i, j, time)

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
            self.halt(i)
            return

        radius = RADIUS[thing.kind]
        wall = None  # the axis in which it ran against one
        for axis in (0, 1):
            self.velocity[i][axis] *= slower / speed
            self.position[i][axis] += self.velocity[i][axis] * dt
            if not radius < self.position[i][axis] < 1 - radius:
                self.position[i][axis] = min(max(self.position[i][axis], radius), 1 - radius)
                wall = axis
        if wall is not None:
            self.hit_wall(i, wall, time)

    def hit_wall(self, i, axis, time):
        kind = self.things[i].kind
        hit = self.log(time, "wall", i, cause=self.cause[i])
        back = [0.5 * v for v in self.velocity[i]]
        back[axis] = -back[axis]
        self.halt(i)
        if kind == "egg":
            self.state[i] = BROKEN
            self.log(time, "break", i, cause=hit)
        elif kind in BOUNCY:
            self.velocity[i] = back
            self.cause[i] = self.log(time, "bounce", i, cause=hit, direction=direction_of(back))
        else:
            self.log(time, "stop", i, cause=hit)

    def collide(self, i, j, time):
        """Resolve a contact of two whole things, if it is a new one and they approach each other."""
        (vx, vy), (wx, wy) = self.velocity[i], self.velocity[j]
        resting = vx == vy == wx == wy == 0
        if self.state[i] != WHOLE or self.state[j] != WHOLE or resting:
            return

        kinds = self.things[i].kind, self.things[j].kind
        if "hole" in kinds:  # a thing falls when its centre is over the hole
            reach = RADIUS["hole"]
        else:
            reach = RADIUS[kinds[0]] + RADIUS[kinds[1]]
        x = self.position[j][0] - self.position[i][0]
        y = self.position[j][1] - self.position[i][1]
        distance = math.hypot(x, y)
        if distance >= reach:
            if distance >= reach * 1.02:
                self.touching.discard((i, j))
            return
        receding = (wx - vx) * x + (wy - vy) * y > 0
        if (i, j) in self.touching or receding:
            return

        self.touching.add((i, j))
        if "hole" in kinds:
            first_moves = kinds[1] == "hole"
        else:
            first_moves = self.speed(i) >= self.speed(j)
        if first_moves:
            self.resolve(i, j, time)
        else:
            self.resolve(j, i, time)

    def resolve(self, mover, target, time):
        who, effect = outcome(self.things[mover].kind, self.things[target].kind)
        affected = mover if who == "mover" else target
        hit = self.log(time, "hit", mover, target, cause=self.cause[mover])
        gap = [there - here for there, here in zip(self.position[target], self.position[mover])]
        normal = [g / max(math.hypot(*gap), 1e-6) for g in gap]
        speed = self.speed(mover)

        if effect in MOTION.values():
            self.velocity[target] = [n * speed * 0.95 for n in normal]
            self.halt(mover)
        elif effect == "bounce":
            self.velocity[mover] = [-n * speed * 0.5 for n in normal]
        elif who == "target":  # the mover pushes on through what it broke, slowly
            self.velocity[mover] = [0.3 * v for v in self.velocity[mover]]
        else:
            self.halt(mover)

        if effect in LASTING:
            self.state[affected] = LASTING[effect]
            self.halt(affected)
        if effect == "bounce" or effect in MOTION.values():
            direction = direction_of(self.velocity[affected])
            self.cause[affected] = self.log(time, effect, affected, cause=hit, direction=direction)
        else:
            self.log(time, effect, affected, cause=hit)


def simulate(
    things: list[Thing],
    frames: int = 24,
    without: int | None = None,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Clip:
    """Run the world. `without`: index of a thing to leave out (a counterfactual); `noise`: relative launch noise."""
    simulation = Simulation(things, without, noise, rng)
    trajectory, state = simulation.run(frames)
    return Clip(things, simulation.events, trajectory, state)


# --------------------------------------------------------------------------- scenes


def may_share_table(kinds) -> bool:
    """False for a table that only the held-out test may show."""
    return not any(pair <= set(kinds) for pair in HELD_OUT)


def pushed_by(kind: str) -> list[str]:
    """The kinds that move on when a thing of this kind hits them."""
    return [other for other in MOVERS if outcome(kind, other) == ("target", MOTION[other])]


class Scene:
    """Places things so that something is likely to happen: chains of things standing in each other's way."""

    def __init__(self, rng, held_out):
        self.rng, self.held_out, self.things = rng, held_out, []
        self.colours = [str(colour) for colour in rng.permutation(list(COLOURS))]

    def place(self, kind, position, velocity=None, start=0.0) -> bool:
        """Put one more thing on the table; False, and no thing, where it would not fit."""
        kinds = [thing.kind for thing in self.things] + [kind]
        if not all(0.12 < p < 0.88 for p in position):
            return False
        for thing in self.things:
            if math.dist(position, thing.position) <= RADIUS[kind] + RADIUS[thing.kind] + 0.04:
                return False
        if kinds.count("hole") > 1 or len(kinds) > 4:
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
        position = rng.uniform(0.12, 0.88, 2)
        speed = rng.uniform(0.28, 0.45)
        previous = None
        for link in range(length):
            kind = kinds[link] if kinds else self.choose_kind(previous, last=link == length - 1)
            if kind is None:
                return False
            if previous is None:
                velocity = (speed * math.cos(angle), speed * math.sin(angle))
                placed = self.place(kind, position, velocity, start)
            else:
                position, angle = self.next_in_row(position, angle, RADIUS[previous] + RADIUS[kind])
                placed = (previous, kind) not in AMBIGUOUS_HITS and self.place(kind, position)
            if not placed:
                return False
            previous = kind
        return True

    def choose_kind(self, previous, last) -> str | None:
        """The next kind of a chain: one that can be launched or pushed on, or any at the end; None: there is none."""
        if previous is None:
            kinds = MOVERS
        elif last:
            kinds = KINDS
        else:
            kinds = pushed_by(previous)
        return str(self.rng.choice(kinds)) if kinds else None

    def next_in_row(self, position, angle, reach):
        """-> a position that a thing on its way at this angle will hit, a little off centre; the angle after that"""
        offset = self.rng.uniform(-0.15, 0.15) * reach
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-math.sin(angle), math.cos(angle)])
        position = position + along * (reach + self.rng.uniform(0.12, 0.3)) + across * offset
        return position, angle + math.asin(offset / reach)

    def fill(self, pair=None) -> bool:
        """One or two chains and up to three onlookers; False where they would not fit. pair: kinds of the first two."""
        rng = self.rng
        first = float(rng.uniform(0.1, 1.5))
        pause = float(rng.uniform(0.5, 1.3))
        second = first + pause if first < 0.9 else first - pause
        plan = rng.choice(["pair", "row", "two pairs", "alone", "pair and one"], p=[0.2, 0.22, 0.3, 0.06, 0.22])

        if pair is not None:
            fits = self.chain(2, first, pair)
        elif plan == "row":
            fits = self.chain(3, min(first, 0.9))
        elif plan == "alone":
            fits = self.chain(1, first)
        else:
            fits = self.chain(2, first)
        if fits and plan == "two pairs":
            fits = self.chain(2 if pair is None else 1, second)
        elif fits and plan == "pair and one":
            fits = self.chain(1, second)
        for _ in range(rng.integers(0, 4)):
            self.place(str(rng.choice(KINDS)), rng.uniform(0.12, 0.88, 2))
        return fits and len(self.things) >= 2


def make_things(rng: np.random.Generator, held_out: bool = False, pair: tuple[str, str] | None = None) -> list[Thing]:
    while True:
        scene = Scene(rng, held_out)
        if scene.fill(pair):
            return [scene.things[i] for i in rng.permutation(len(scene.things))]


# --------------------------------------------------------------------------- clips


def make_clip(seed: int, index: int, split: str = "train", held_out: bool = False, cut: bool | None = None) -> Clip:
    """Clip `index` of the stream (`split`, `seed`): a pure function of its arguments.

    held_out: the scene shows a pair of kinds that no training video shows, and is cut just before they meet.
    cut: force a clip that ends before a collision (True), or one that plays on (False); None: 40 % are cut.
    """
    key = (SPLITS[split], seed, index, int(held_out))
    rng = np.random.default_rng(key)
    if cut is None:
        cut = rng.random() < 0.4
    pair = HELD_OUT_HITS[index % len(HELD_OUT_HITS)] if held_out else None
    while True:
        clip = simulate(make_things(rng, held_out, pair))
        hits = [event for event in clip.events if event.type == "hit"]
        if any(hit_kinds(clip, hit) in AMBIGUOUS_HITS for hit in hits):
            continue
        if cut:
            wanted = [hit for hit in hits if pair is None or hit_kinds(clip, hit) == pair]
            if not wanted:
                continue
            clip = cut_before(clip, wanted[rng.integers(len(wanted))], rng)
            if clip is None:
                continue
        elif not is_worth_telling(clip, rng):
            continue
        clip.trajectory = clip.trajectory[:NUM_FRAMES]
        clip.state = clip.state[:NUM_FRAMES]
        clip.seed = key
        return clip


def is_worth_telling(clip: Clip, rng: np.random.Generator) -> bool:
    if not clip.visible:
        return False
    if any(LAST_SEEN - 0.3 < event.time < 4.2 for event in clip.events):  # half seen at the end
        return False
    if len(clip.visible) > 8:  # too long a story for one breath
        return False
    if any(event.type == "hit" for event in clip.events):
        return True
    return rng.random() >= 0.6  # only walls to talk about


def cut_before(clip: Clip, hit: Event, rng: np.random.Generator) -> Clip | None:
    """Delay the whole scene so that the clip ends just before `hit`; None if the story would be unclear then."""
    delay = SECONDS + rng.uniform(0.05, 0.35) - hit.time
    if delay < 0:
        return None
    late = simulate([replace(thing, start=thing.start + delay) for thing in clip.things])

    coming = [event for event in late.events if event.type == "hit" and event.time >= LAST_SEEN]
    if not coming or not SECONDS <= coming[0].time < 4.5:
        return None
    next_hit = coming[0]
    if (next_hit.subject, next_hit.object) != (hit.subject, hit.object):
        return None
    if any(LAST_SEEN <= event.time < next_hit.time for event in late.events):  # half seen
        return None
    if len(coming) > 1 and coming[1].time < next_hit.time + 0.35:  # two at once
        return None
    if next_hit.cause is None or late.events[next_hit.cause].time >= 3.2:  # the mover is hardly seen to move
        return None
    late.next_hit = next_hit
    return late


if __name__ == "__main__":
    runpy.run_module("toy.videos", run_name="__main__")  # what the command writes needs pixels and words, too
