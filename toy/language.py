"""The toy world in words: captions, questions with their answers, knowledge, and the checker of answers.

A new type of question: at the end of the section "questions" write a function of (clip, rng) that returns a list of
Question, and put `@asks` with the type's phrasings above it. It may return none where the clip does not answer it
clearly. A word that stands in no table of this file goes into OTHER_WORDS of toy/llm.py, and the toy's weights must
then be made anew (toy/README.md). The functions draw from one stream of random numbers in the order in which they
stand here, so one in their midst would change all questions after.
"""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from toy.world import (
    AMBIGUOUS_HITS,
    COLOURS,
    EFFECTS,
    GONE,
    HELD_OUT,
    HOLE_COLOUR,
    KINDS,
    MOTION,
    MOVERS,
    SECONDS,
    Clip,
    Event,
    hit_kinds,
    outcome,
    simulate,
)

# --------------------------------------------------------------------------- words

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
FUTURE = {verb: f"will {verb}" for verb in (*EFFECTS, "hit", "reach")}
FUTURE["fall"] = "will fall in"
DIRECTIONS = ["left", "right", "up", "down"]
STILL = "still"  # what motion_of says of a thing that never moved
COLOUR_ORDER = [*COLOURS, HOLE_COLOUR]
SOLID_KINDS = [kind for kind in KINDS if kind != "hole"]
BEGINNINGS = ("start", *MOTION.values())  # types of event with which a thing begins to move


def a(noun: str) -> str:
    """The noun with its article: "a ball", "an egg"."""
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article} {noun}"


def the(clip: Clip, index: int) -> str:
    """Thing `index` with its article: "the red ball"."""
    return f"the {clip.things[index].name}"


def listing(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return " , ".join(names[:-1]) + " and " + names[-1]


def meeting_verb(target_kind: str) -> str:
    """A thing hits another, but it reaches a hole."""
    return "reach" if target_kind == "hole" else "hit"


def clause(clip: Clip, event: Event, tense: dict[str, str] = PRESENT, direction: bool = True) -> str:
    """One event as words: "the red ball hits the green egg"."""
    subject = the(clip, event.subject)
    if event.type == "hit":
        verb = meeting_verb(clip.things[event.object].kind)
        return f"{subject} {tense[verb]} {the(clip, event.object)}"
    if event.type == "wall":
        return f"{subject} {tense['hit']} the wall"
    if direction and event.direction:
        return f"{subject} {tense[event.type]} {event.direction}"
    return f"{subject} {tense[event.type]}"


def told(clip: Clip, event: Event) -> str:
    """One event as an answer tells it: "the red ball rolled"."""
    return clause(clip, event, PAST, direction=False)


def caption(clip: Clip, order: list[int] | None = None) -> str:
    """What stage 1 learns to say: who is there, how many move, and every visible event in order.

    order: a permutation of the things for the listing; by default by colour, so that a clip has one caption.
    """
    if order is None:
        order = sorted(range(len(clip.things)), key=lambda i: COLOUR_ORDER.index(clip.things[i].colour))
    names = [a(clip.things[i].name) for i in order]
    moved = len(movers(clip))
    move = "moves" if moved == 1 else "move"

    sentences = [f"there are {NUMBERS[len(names)]} objects : {listing(names)}"]
    sentences.append(f"{NUMBERS[moved]} of them {move}")
    sentences += [clause(clip, event) for event in clip.visible]
    if clip.next_hit:
        mover = the(clip, clip.next_hit.subject)
        target = the(clip, clip.next_hit.object)
        sentences.append(f"now {mover} is moving toward {target}")
    return " . ".join(sentences) + " ."


# --------------------------------------------------------------------------- what follows from the event log


def movers(clip: Clip) -> list[int]:
    """Things that were seen to move, in the order in which they began."""
    return list(dict.fromkeys(event.subject for event in clip.visible if event.type in BEGINNINGS))


def motion_of(clip: Clip, index: int) -> str | None:
    """The one direction in which a thing was seen to move, STILL, or None where a person would hesitate."""
    motions = [event for event in clip.visible if event.subject == index and event.direction]
    if not motions:
        return STILL
    if len(motions) > 1 or clip.state[-1, index] == GONE:
        return None
    path = np.abs(clip.trajectory[-1, index] - clip.trajectory[0, index])
    clear = path.max() > 0.1 and path.max() > 1.6 * path.min()
    return motions[0].direction if clear else None


def because(clip: Clip, effect: Event) -> str:
    """The cause of an effect, said of the thing affected: "the red ball hit it", "it hit the wall"."""
    cause = clip.events[effect.cause]
    if cause.type == "wall":
        return "it hit the wall"
    if effect.subject == cause.object:
        return f"{the(clip, cause.subject)} hit it"
    verb = meeting_verb(clip.things[cause.object].kind)
    return f"it {PAST[verb]} {the(clip, cause.object)}"


def chain_to(clip: Clip, event: Event) -> list[Event]:
    """The causes of an event back to the motion that began it all, oldest first, the event last."""
    chain = [event]
    while chain[-1].cause is not None:
        cause = clip.events[chain[-1].cause]
        chain.append(cause)
    return chain[::-1]


def prediction(clip: Clip) -> str:
    """What comes after a clip that was cut before a hit: the hit, and what becomes of the thing affected."""
    hit = clip.next_hit
    mover_kind, target_kind = hit_kinds(clip, hit)
    who, effect = outcome(mover_kind, target_kind)
    affected = hit.subject if who == "mover" else hit.object
    meeting = f"{the(clip, hit.subject)} {FUTURE[meeting_verb(target_kind)]} {the(clip, hit.object)}"
    return f"{meeting} and {the(clip, affected)} {FUTURE[effect]}"


def visible_effects(clip: Clip) -> list[Event]:
    return [event for event in clip.visible if event.type in EFFECTS]


# --------------------------------------------------------------------------- questions

# the paper's own two prompts (§3.3.1), as phrasings among others; copies of vidreason's REASON_PROMPT and
# PREDICT_PROMPT, for the import of vidreason takes seconds, and that of this file none; a test holds them together
REASON = (
    "The provided visual information depicts a sequence of events. Analyze the causal relationships between these "
    "events and provide a step-by-step explanation for the final outcome."
)
PREDICT = (
    "Based on the events observed in the video, predict the three most likely subsequent events. For each "
    "prediction, provide a brief justification and a confidence score from 0 to 1."
)


class Question(NamedTuple):
    """A question before it is phrased: `slots` fill the {x}, {y} and {z} of a phrasing of its type."""

    type: str
    answer: str
    slots: dict[str, str] = {}
    options: list[str] | None = None


QUESTIONS: dict[str, list[str]] = {}  # type -> phrasings
MAKERS: list[Callable[[Clip, np.random.Generator], list[Question]]] = []  # in the order in which they draw


def asks(phrasings: dict[str, list[str]]):
    """Says of the function below it which types of question it makes, and how each of these may be phrased."""

    def register(make):
        QUESTIONS.update(phrasings)
        MAKERS.append(make)
        return make

    return register


def questions(clip: Clip, rng: np.random.Generator | None = None) -> list[dict]:
    """Everything that one may ask about a clip, in the words of one randomly chosen phrasing each.

    -> [{"type", "question", "answer", "options"}]
    """
    if rng is None:
        rng = np.random.default_rng((*clip.seed, 7))
    asked = []
    for make in MAKERS:
        asked += make(clip, rng)
    records = []
    for question in asked:
        phrasing = str(rng.choice(QUESTIONS[question.type]))
        text = phrasing.format(**question.slots)
        record = {"type": question.type, "question": text, "answer": question.answer, "options": question.options}
        records.append(record)
    return records


@asks({"count": ["how many objects are there ?", "how many things are on the table ?"]})
def ask_count(clip, rng):
    return [Question("count", NUMBERS[len(clip.things)], options=NUMBERS[1:])]


@asks({"moved": ["how many objects moved ?", "how many things moved ?"]})
def ask_moved(clip, rng):
    return [Question("moved", NUMBERS[len(movers(clip))], options=NUMBERS[:5])]


WHICH_WAY = ["which way did the {x} move ?", "in which direction did the {x} move ?"]


@asks({"direction": WHICH_WAY})
def ask_direction(clip, rng):
    """Two things that moved one way and, every other time, one that stood still."""
    moving, still = [], []
    for index in rng.permutation(len(clip.things)):
        if clip.things[index].kind == "hole":
            continue
        motion = motion_of(clip, index)
        if motion == STILL:
            still.append(index)
        elif motion in DIRECTIONS:
            moving.append(index)
    asked = moving[:2]
    if rng.random() < 0.5:
        asked += still[:1]

    made = []
    for index in asked:
        name = clip.things[index].name
        answers = {way: f"the {name} moved {way}" for way in DIRECTIONS}
        answers[STILL] = f"the {name} did not move"
        answer = answers[motion_of(clip, index)]
        made.append(Question("direction", answer, {"x": name}, list(answers.values())))
    return made


@asks({"absent": WHICH_WAY})
def ask_absent(clip, rng):
    """The same of a thing that is not there, in half of the cases with a colour that is."""
    colours = list(COLOURS)
    if rng.random() < 0.5:
        colours = [thing.colour for thing in clip.things if thing.kind != "hole"]
    name = f"{rng.choice(colours)} {rng.choice(SOLID_KINDS)}"
    if any(thing.name == name for thing in clip.things):
        return []
    return [Question("absent", f"there is no {name}", {"x": name})]


@asks({"first": ["what moved first ?", "which object moved first ?"]})
def ask_first(clip, rng):
    if len(movers(clip)) < 2:
        return []
    beginnings = [event for event in clip.visible if event.type in BEGINNINGS]
    if beginnings[1].time - beginnings[0].time <= 0.3:
        return []
    return [Question("first", the(clip, beginnings[0].subject))]


@asks(
    {
        "colour": ["what colour is the {x} ?", "which colour does the {x} have ?"],
        "kind": ["what kind of thing is the {x} one ?", "what is the {x} object ?"],
    }
)
def ask_colour_and_kind(clip, rng):
    """Of up to two things: the kind that a colour has, and the colour of a kind that is there once."""
    kinds = [thing.kind for thing in clip.things]
    made = []
    for index in rng.permutation(len(clip.things))[:2]:
        thing = clip.things[index]
        if thing.kind == "hole":
            continue
        if kinds.count(thing.kind) == 1:
            options = [f"the {thing.kind} is {colour}" for colour in COLOURS]
            made.append(Question("colour", f"the {thing.kind} is {thing.colour}", {"x": thing.kind}, options))
        options = [a(f"{thing.colour} {kind}") for kind in SOLID_KINDS]
        made.append(Question("kind", a(thing.name), {"x": thing.colour}, options))
    return made


@asks({"why": ["why did the {x} {y} ?", "what made the {x} {y} ?"]})
def ask_why(clip, rng):
    """Of every effect that has one clear cause and cannot be guessed without the video."""
    effects = visible_effects(clip)
    happened = [(effect.subject, effect.type) for effect in effects]
    made = []
    for effect in effects:
        once = happened.count((effect.subject, effect.type)) == 1
        if not once or effect.type == "fall" or also_moves_by_itself(clip, effect):  # what falls, falls into a hole
            continue
        by_wall = clip.events[effect.cause].type == "wall"
        if by_wall and rng.random() >= 0.3:  # walls are so common that they would be a good guess
            continue
        slots = {"x": clip.things[effect.subject].name, "y": effect.type}
        made.append(Question("why", "because " + because(clip, effect), slots))
    return made


def also_moves_by_itself(clip: Clip, effect: Event) -> bool:
    """True of a motion whose thing was also seen to start by itself: "why did it roll?" has two answers then."""
    if effect.type not in MOTION.values():
        return False
    return any(event.type == "start" and event.subject == effect.subject for event in clip.visible)


@asks({"bare why": ["why ?"], "explain": ["explain step by step what happened .", REASON]})
def ask_last_effect(clip, rng):
    """Why the last thing happened, and the whole chain that led to it, if it is clear which was the last."""
    effects = visible_effects(clip)
    if clip.next_hit or not effects:
        return []
    if len(effects) > 1 and effects[-1].time - effects[-2].time <= 0.3:
        return []
    last = effects[-1]
    chain = [told(clip, event) for event in chain_to(clip, last)]
    return [
        Question("bare why", f"{told(clip, last)} because {because(clip, last)}"),
        Question("explain", " . ".join(chain)),
    ]


WHAT_NEXT = ["what will happen next ?", "what happens next ?", PREDICT]


@asks({"predict": WHAT_NEXT, "held-out": WHAT_NEXT})
def ask_next_event(clip, rng):
    """What comes after the cut; the type is "held-out" if no training video shows the pair of kinds that meets."""
    if not clip.next_hit:
        return []
    pair = set(hit_kinds(clip, clip.next_hit))
    type_ = "held-out" if pair in HELD_OUT else "predict"
    return [Question(type_, prediction(clip))]


@asks({"order": ["what happened first , the {x} or the {y} ?", "which came first , the {x} or the {y} ?"]})
def ask_order(clip, rng):
    """Two events of the same type on four (or two) different things: no rule of the world tells which came first."""
    pairs = []
    for earlier in clip.visible:
        for later in clip.visible:
            apart = later.time - earlier.time > 0.4
            if apart and earlier.type == later.type and not share_a_thing(earlier, later):
                pairs.append((earlier, later))
    if not pairs:
        return []
    pair = [told(clip, event) for event in pairs[rng.integers(len(pairs))]]
    story = [told(clip, event) for event in clip.visible]
    if any(story.count(text) > 1 for text in pair):
        return []
    options = [pair[i] for i in rng.permutation(2)]
    slots = {slot: text.removeprefix("the ") for slot, text in zip("xy", options, strict=True)}
    return [Question("order", pair[0], slots, options)]


def share_a_thing(one: Event, other: Event) -> bool:
    things = {one.subject, one.object} & {other.subject, other.object}
    return bool(things - {None})


@asks({"counterfactual": ["would the {x} {y} without the {z} ?", "if there were no {z} , would the {x} {y} ?"]})
def ask_counterfactual(clip, rng):
    """Would it have happened without …? By running the world again; "no" is rare (7 of 43 in toy/results.json)."""
    effects = [e for e in clip.visible if e.type in ("break", "pop", "fall", "bounce")]  # others have other causes too
    if not effects or clip.next_hit:
        return []
    effect = effects[rng.integers(len(effects))]
    dispensable = {"yes": [], "no": []}  # answer -> things that one may ask about
    for index, thing in enumerate(clip.things):
        if index != effect.subject and thing.kind != "hole":
            answer = "yes" if happens_without(clip, effect, index) else "no"
            dispensable[answer].append(index)

    answer = "yes" if rng.random() < 0.5 else "no"
    if not dispensable[answer]:
        return []
    left_out = dispensable[answer][rng.integers(len(dispensable[answer]))]
    verb = "fall in" if effect.type == "fall" else effect.type
    slots = {"x": clip.things[effect.subject].name, "y": verb, "z": clip.things[left_out].name}
    return [Question("counterfactual", answer, slots, ["yes", "no"])]


def happens_without(clip: Clip, effect: Event, index: int) -> bool:
    """Does the same become of the same thing, by half a second after the clip's end, without thing `index`?"""
    for event in simulate(clip.things, without=index).events:
        same = (event.subject, event.type) == (effect.subject, effect.type)
        if same and event.time < SECONDS + 0.5:
            return True
    return False


# --------------------------------------------------------------------------- knowledge

HITS = [hit for hit in itertools.product(MOVERS, KINDS) if hit not in AMBIGUOUS_HITS]  # (mover, target)


def knowledge(mover: str, target: str, rng: np.random.Generator) -> str:
    """One sentence (or question and answer, separated by "|") about what happens when two kinds meet."""
    who, effect = outcome(mover, target)
    affected = mover if who == "mover" else target
    verb = meeting_verb(target)
    form = rng.integers(4)
    if form == 0:
        return f"when {a(mover)} {PRESENT[verb]} {a(target)} , the {affected} {PRESENT[effect]} ."
    if form == 1:
        opening = f"if {a(mover)} is moving toward {a(target)} , "
        meeting = f"the {mover} {FUTURE[verb]} the {target}"
        return opening + meeting + f" and the {affected} {FUTURE[effect]} ."
    if form == 2 and mover != target:
        if who == "mover":
            reason = f"it {PRESENT[verb]} {a(target)}"
        else:
            reason = f"{a(mover)} {PRESENT[verb]} it"
        return f"{a(affected)} {PRESENT[effect]} because {reason} ."
    return f"what happens when {a(mover)} {PRESENT[verb]} {a(target)} ?|the {affected} {PRESENT[effect]}"


# --------------------------------------------------------------------------- the checker of answers


def base_forms() -> dict[str, str]:
    """Every form of a verb -> the verb: "broke", "breaks" and "break" -> "break"."""
    forms = {}
    for tense in (PAST, PRESENT):
        for verb, form in tense.items():
            forms[form.split()[0]] = verb
    for verb in PAST:
        forms[verb] = verb
    forms["move"] = "start"
    return forms


BASE_FORMS = base_forms()
IGNORED = {"the", "a", "an", "will", "in", "then"}


def normalise(text: str) -> list[tuple[str, ...]]:
    """A sentence as its clauses, each a tuple of base-form words: tense, articles and punctuation carry no meaning."""
    text = text.lower().replace("started moving", "moved")
    text = text.replace(", because", " because")
    words = re.findall(r"\w+|[.,]", text)
    clauses, current = [], []
    for word in [*words, "."]:
        if word in (".", ",", "and"):
            if current:
                clauses.append(tuple(current))
            current = []
        elif word not in IGNORED:
            current.append(BASE_FORMS.get(word, word))
    return clauses


def check(answer: str, truth: str) -> bool:
    """True where the answer means the same as the truth in the world's grammar (tense, articles, case are free)."""
    return bool(answer.strip()) and normalise(answer) == normalise(truth)


def check_outcome(answer: str, truth: str) -> bool:
    """For predictions: who is affected (its kind) and what becomes of it are right; colours and the pair may differ."""
    answer_clauses, true_clauses = normalise(answer), normalise(truth)
    if not answer_clauses:
        return False
    kinds = {word for word in true_clauses[0] if word in KINDS}
    free = COLOUR_ORDER if len(kinds) == 2 else []  # of two like things the colour tells which one
    answer_outcome = [word for word in answer_clauses[-1] if word not in free]
    true_outcome = [word for word in true_clauses[-1] if word not in free]
    return answer_outcome == true_outcome


def names_pair(answer: str, truth: str) -> bool:
    """For predictions: the answer names the right two things and who meets whom."""
    answer_clauses, true_clauses = normalise(answer), normalise(truth)
    return bool(answer_clauses) and answer_clauses[0] == true_clauses[0]
