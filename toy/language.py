"""The toy world in words: captions, questions with their answers, knowledge, and the checker of answers."""

import re

import numpy as np

from toy.world import (
    AMBIGUOUS_HITS,
    COLOURS,
    EFFECTS,
    HELD_OUT,
    HOLE_COLOUR,
    KINDS,
    MOTION,
    MOVERS,
    SECONDS,
    Event,
    outcome,
    simulate,
)

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
