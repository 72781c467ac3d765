# %% [markdown]
# # 6 · Does it reason?
#
# **Question.** The shipped model answers most questions about fresh clips. Would a model that never looked do as well?
# And when it predicts what no video has shown it, where does that come from?
#
# **Run time.** About one minute on two CPU cores, offline.
#
# A single accuracy proves little: many benchmarks can be answered without the video, by guessing from the question. So
# every number here stands beside **controls**: the same weights and questions with the picture taken away, blackened,
# swapped or scrambled. What survives a control did not need what it took.
#
# **What is not tested here**: eyes that had to learn by themselves. The toy's encoder was trained with the simulator's
# labels (kinds, colours, motions, who hits whom, also who is about to), its SAM with the renderer's masks. What follows
# is about fusion, language and reasoning on top of vision trained with labels.

# %%
import os

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in a stored notebook
import io
import json
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import plots
from data.program import TOY_MODEL
from data.records import to_sample
from evaluation.replies import CONTROLS, ask, seen
from evaluation.score import interval
from toy import draw, language, world
from toy.exam import toy_questions
from toy.videos import sample_id, write_clip
from vidreason import VidReason, perceive

plots.use_style()
model = VidReason.load(TOY_MODEL)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)

# %% [markdown]
# ## 1. Fresh clips (whole videos of four seconds)
#
# The toy world has three disjoint random streams: `train`, `val` (for choices) and `test` (for reports). Nothing was
# trained on the test stream, and nothing chosen by the clips below. The clips are written as mp4 and read back, as a
# user's would be; [`check`](code:toy.language.check) compares answers by the world's own grammar
# (tense and articles are
# free; every noun, colour and verb must be right).

# %%
SEED, CLIPS = 6, 40
clips = folder / "clips"
asked = [to_sample(row, row["id"]) for row in toy_questions(SEED, CLIPS, clips)]
quiz = [s for s in asked if s.category != "held-out"]
held_out = [s for s in asked if s.category == "held-out"]
videos = sorted({s.video for s in quiz})
print(len(videos), "clips,", len(quiz), "questions;", len(held_out), "clips for later")
print(Counter(s.category for s in quiz).most_common())

# %% [markdown]
# ## 2. Controls
#
# | name | what the model gets | what it takes away |
# |---|---|---|
# | blind | the question alone, without $E_{vision}$ | everything |
# | black | a video of sixteen black frames | everything; no object is left, as in no training clip |
# | another clip | what was seen in the next clip | the right content; that *some* clip is there remains |
# | shuffled | the same frames in random order | motion and order; the things remain |
# | one_frame | the middle frame, sixteen times | motion and order, and whatever that frame does not show |
#
# `evaluate.py` prints such controls beside every score; [`seen`](code:evaluation.replies.seen) makes them.
# *Another clip* is
# ours.

# %% tags=["volatile"]
# controls: one function from a video's name to its features for each condition
options = SimpleNamespace(videos=clips, features=None, processes=cores, controls=CONTROLS)
with redirect_stderr(io.StringIO()):  # its progress bars have no switch
    see, unreadable = seen(options, model, videos, folder)
following = dict(zip(videos, videos[1:] + videos[:1], strict=True))
see["another clip"] = lambda video: see["full"](following[video])
see = {name: see[name] for name in ("full", "blind", "black", "another clip", "shuffled", "one_frame")}
for name, look in see.items():
    found = look(videos[0])
    print(f"{name:14s}", "nothing" if found is None else f"Z_vision {tuple(found.z_vision.shape)}, (N_v, D_v)")
assert not unreadable

# %% [markdown]
# **Predict** before the answers come: which question types can be answered from one frame? And how much of the full
# accuracy is left without any video?

# %%
predicted_survivors = {"count", "kind", "colour", "absent"}  # what is there, not what happens
predicted_blind = 0.2  # about what the commonest answers would get


# %%
def answers_of(samples, look, name):
    """Free answers, also where a question has options."""
    free = [replace(s, options=None, gold=None) for s in samples]
    return [reply["said"] for reply in ask(model, free, look, "free", folder / f"{name}.jsonl")]


def correct(said, samples):
    return np.array([language.check(text, s.answer) for text, s in zip(said, samples, strict=True)])


said = {name: answers_of(quiz, look, name) for name, look in see.items()}
right = {name: correct(found, quiz) for name, found in said.items()}
given = {s.category: Counter(other.answer for other in quiz if other.category == s.category) for s in quiz}
right["commonest answer"] = np.array([given[s.category].most_common(1)[0][0] == s.answer for s in quiz])
accuracy = {name: float(found.mean()) for name, found in right.items()}
print({name: f"{value:.2f}" for name, value in accuracy.items()})
assert accuracy["full"] > 0.85
assert abs(accuracy["blind"] - predicted_blind) < 0.15

# %% [markdown]
# The last row of the picture always says the commonest answer of each question type, word for word. Read it beside
# *blind*, and take the higher of the two: this model was never trained without a video and hardly knows what to say
# then, except where the question itself tells (*absent*).
#
# **Intervals.** Would other clips give the same number? A **bootstrap** draws clips with replacement, again and again,
# and shows how much the accuracy varies: the middle 95 % are the interval
# ([`interval`](code:evaluation.score.interval)). It
# draws whole *clips*: ten questions about one misread clip are not ten independent errors.

# %%
of_video = [s.video for s in quiz]
figure, ax = plt.subplots(figsize=(7, 2.8))
spread = [interval(found, of_video) for found in right.values()]
plots.bars(ax, list(right), list(accuracy.values()), "share of answers that are right, with 95 % interval", spread)
ax.set_xlim(0, 1)
plt.show()
assert interval(right["full"], of_video)[0] > interval(right["another clip"], of_video)[1]

# %% [markdown]
# By type. Read it column by column: what falls needed what the control took away.

# %%
types = [t for t in language.QUESTIONS if t in given]
where = {t: np.array([s.category == t for s in quiz]) for t in types}
table = [[right[name][where[t]].mean() for name in right] for t in types]
figure, ax = plt.subplots(figsize=(8, 4.6))
plots.heat(ax, table, "", "", "share right (bright = all)", numbers=True, vmin=0, vmax=1)
ax.set_xticks(range(len(right)), [name.replace(" ", "\n") for name in right])
ax.set_yticks(range(len(types)), [f"{t} ({where[t].sum()})" for t in types])
plt.show()


# %%
def share(name, types):
    return right[name][np.any([where[t] for t in types], axis=0)].mean()


motion = ["direction", "first", "why", "bare why", "explain", "predict", "order"]
for name in ("full", "shuffled", "one_frame"):
    print(f"{name:16s} what is there: {share(name, predicted_survivors):.2f}   what happens: {share(name, motion):.2f}")
assert share("one_frame", predicted_survivors) > 0.7
assert share("one_frame", motion) < share("shuffled", motion) < share("full", motion) - 0.1
hang_on_order = ["first", "explain", "direction"]
assert 0.25 < share("shuffled", hang_on_order) / share("full", hang_on_order) < 0.75

# %% [markdown]
# So the model does look, and it uses motion and order, not only what is on the table. Three readings of the picture:
#
# - *Shuffled* frames cost less than *one_frame*: in any order they show who was near whom, and that something moved.
#   What hangs on the order (*first*, *explain*, *direction*) falls by about half.
# - *absent* (which way did X move, of something that is not there) survives *blind* and *another clip*: most clips lack
#   any given thing. High accuracy there proves nothing alone; beside *direction*, which needs the same words, it does.
# - Where *blind*, *black* or *another clip* score as high as the full model, the type has not shown sight at all. Where
#   *shuffled* or *one_frame* do, it has not shown a use of order or of motion: colours and kinds need none, and
#   *counterfactual* comes close with its few questions, two answers, one of them common.
#
# ## 3. The ablation table: which part does the work?
#
# Controls break the *input*; an **ablation** removes a *part of the model* and trains the rest anew. The table is too
# slow for a notebook: `python -m toy.ablations` trained and tested every variant with three seeds and wrote
# `toy/ablations.json`.

# %%
rows = json.loads(Path("../toy/ablations.json").read_text())["variants"]
figure, ax = plt.subplots(figsize=(8, 0.35 * len(rows) + 0.7))
spread = [row["interval"] for row in rows.values()]
plots.bars(ax, list(rows), [row["accuracy"] for row in rows.values()], "share right, mean of seeds", spread)
plt.show()

# %% [markdown]
# Each variant was trained briefly, so compare it with *full* in this table and not with the shipped weights. The
# question is whether a part's removal costs anything *here*. Two things can deceive: which videos were asked about, and
# which seed the training had. The interval of the difference resamples the videos and knows nothing of seeds, so we
# also ask that no seed of the variant lies among those of *full*. Else it says "not shown", which is not "useless".

# %%
for name, row in rows.items():
    if "difference" in row:
        low, high = row["difference_interval"]
        costs = high < 0 and max(row["seeds"]) < min(rows["full"]["seeds"])
        gains = low > 0 and min(row["seeds"]) > max(rows["full"]["seeds"])
        verdict = "costs accuracy" if costs else "gains accuracy" if gains else "no effect shown"
        seeds = " ".join(f"{one:.3f}" for one in row["seeds"])
        print(f"{name:22s}{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})  seeds {seeds}  {verdict}")

# %%
columns = [kind for kind in language.QUESTIONS if kind in rows["full"]["by_type"]]
cells = [[row["by_type"][kind]["accuracy"] for kind in columns] for row in rows.values()]
figure, ax = plt.subplots(figsize=(9, 0.35 * len(rows) + 1.2))
plots.heat(ax, cells, "", "", "share right (bright = all)", numbers=True, vmin=0, vmax=1)
ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
ax.set_yticks(range(len(rows)), list(rows))
plt.show()
print("of the held-out pairs that an answer named, the outcome was right:")
for name, row in rows.items():
    print(f"{name:22s}{row['held_out']['outcome_right']:4d} of {row['held_out']['named']}")
assert rows["full"]["held_out"] == {"named": 30, "outcome_right": 30}
assert rows["w/o world knowledge"]["held_out"] == {"named": 31, "outcome_right": 9}
assert rows["w/o stage 2"]["difference_interval"][1] < 0 and "interval" not in rows["full"]["by_type"]["why"]

# %% [markdown]
# **What to conclude?** Read along a row: which *types* does a part carry?
#
# The averages have intervals and seeds; single types have neither, and few questions. What follows about types was
# **observed** in these runs, not shown. Vision is the same, label-trained one in every row.
#
# - Without the *fusion core*, without *object features*, or without *stage 2* the average falls, by the rule above.
#   Hardly more than numbers of things survives the first two.
# - *W/o synthetic data*: *explain* and *predict*, which these data teach, are lower; the average shows nothing.
# - The *smaller LLM* is lower on average after as many steps; it mixes up colours and yet knows more directions than
#   the full one. One average hides two opposite effects, and one step of size, with one LLM each and less computation,
#   does not tell what size is worth.
# - *Time embedding*: no effect shown. As printed the fusion core cannot tell the order of its keys, but here a token
#   shows states and motion, and what is broken comes after what is whole. *Order* itself is near chance in every row:
#   these runs are too short for it.
# - *World knowledge*: nothing in the average, much in one column. The two LLMs (one of each kind) were trained alike
#   but for what they read, and where an answer names a pair that no video shows, its outcome is right in 30 of 30 with
#   it, in 9 of 31 without.
#
# ## 4. World knowledge that is not in the pixels
#
# Pins never meet balloons, and eggs never meet pillows, in any video that anything was trained on. Do not believe it,
# check the generator:

# %%
tables = [{thing.kind for thing in world.make_clip(0, i, "train").things} for i in range(300)]
together = {pair: sum(set(pair) <= table for table in tables) for pair in (("pin", "balloon"), ("egg", "pillow"))}
print("among 300 training clips:", together, "| for comparison, pin and egg:", sum({"pin", "egg"} <= t for t in tables))
assert set(together.values()) == {0}

# %% [markdown]
# What did the *videos* teach about these kinds? Whatever hits a balloon makes it drift; a balloon stops at whatever it
# hits; an egg breaks on everything. From a model that generalises from videos alone one would expect these **habits**.

# %%
habit = {("pin", "balloon"): "drift", ("balloon", "pin"): "stop", ("egg", "pillow"): "break"}
others = [kind for kind in world.MOVERS if kind not in ("pin", "balloon", "egg")]
print("others hit a balloon:  ", {kind: world.outcome(kind, "balloon")[1] for kind in others})
print("a balloon hits others: ", {kind: world.outcome("balloon", kind)[1] for kind in others + ["box", "pillow"]})
print("an egg hits others:    ", {kind: world.outcome("egg", kind)[1] for kind in others + ["box"]})
for (mover, target), effect in habit.items():
    meetings = [(k, target) for k in others] if target == "balloon" else [(mover, k) for k in [*others, "box"]]
    assert {world.outcome(*meeting)[1] for meeting in meetings} == {effect}

# %% [markdown]
# And what did the *LLM* read? Sentences like these, about all pairs, and stories in which such pairs meet, with the
# question *what will happen next?* and its answer: in stage 0, before it met a video, and again in stage 2, where a
# quarter of the rows are text, a third of these about such pairs:

# %%
rng = np.random.default_rng(0)
for mover, target in world.HELD_OUT_HITS:
    print(language.knowledge(mover, target, rng))
prompts = ["what happens when a pin hits a balloon ?", "what happens when an egg hits a pillow ?"]
told = model.answer_batch([None, None], prompts)
print(*(f"{prompt} → {answer}" for prompt, answer in zip(prompts, told, strict=True)), sep="\n")
assert language.check(told[0], "the balloon pops") and language.check(told[1], "the egg stops")

# %% [markdown]
# Now clips in which they are about to meet. **Predict**: will the fused model follow what it read (pop, pop, stop) or
# what the videos taught (drift, stop, break)? For each clip the two sentences differ in their last word only; their
# likelihoods (Eq. 5) say how strongly the model leans to one.

# %%
for i in range(len(held_out), 18):  # a few more of them
    clip = world.make_clip(SEED, i, "test", held_out=True, cut=True)
    made = write_clip(clip, sample_id("test", SEED, i, True), clips)
    held_out += [to_sample(row, row["id"]) for row in made if row["type"] == "held-out"]
met = {s.video: model.perceive(clips / s.video) for s in held_out}
leaning, pairs = [], [world.HELD_OUT_HITS[i % 3] for i in range(len(held_out))]
for s, pair in zip(held_out, pairs, strict=True):
    endings = [s.answer, s.answer[: s.answer.rindex(" ") + 1] + habit[pair]]
    logprobs = model.option_logprobs(met[s.video], s.question, endings)
    leaning.append(logprobs.softmax(0)[0].item())
print("for example:", *endings, sep="\n  ")

# %%
figure, ax = plt.subplots(figsize=(7, 2.2))
for y, pair in enumerate(world.HELD_OUT_HITS):
    mine = [share for share, p in zip(leaning, pairs, strict=True) if p == pair]
    ax.plot(mine, [y] * len(mine), marker=plots.MARKERS[y], ls="", color="black", alpha=0.5)
names = [f"{m} → {t}: read {world.outcome(m, t)[1]}, habit {habit[m, t]}" for m, t in world.HELD_OUT_HITS]
ax.set(
    yticks=range(3), yticklabels=names, xlim=(-0.03, 1.03), ylim=(-0.5, 2.5), xlabel="share of what was read (0: habit)"
)
ax.axvline(0.5, color="black", ls=":", marker="")
plt.show()
print(f"lean to what was read: {np.mean(np.array(leaning) > 0.5):.2f} of {len(leaning)} clips")
assert np.mean(np.array(leaning) > 0.5) > 0.65

# %% tags=["volatile"]
told = answers_of(held_out, met.get, "held-out")
named = [language.names_pair(text, s.answer) for text, s in zip(told, held_out, strict=True)]
outcomes = [language.check_outcome(text, s.answer) for text, s in zip(told, held_out, strict=True)]
print(f"free answers: the right pair named in {sum(named)} of {len(named)}")
print(f"outcome right there: {np.mean([o for o, n in zip(outcomes, named, strict=True) if n]):.2f}")
assert np.mean(outcomes) > 0.6

# %% [markdown]
# No video ever showed it, and yet it is predicted: the pixels say *which pair* (by an encoder that was taught to see
# who is about to hit whom), the text says *what follows*. This is the paper's claim in miniature, and no more: the
# same question about such pairs had been answered in text. (The counter-check is an LLM that never read about them:
# the ablation "w/o world knowledge".) A point left of the middle would be a clip in which the habit, which stage 2
# trains, overrules what was read; the share of text in stage 2's batches is meant to prevent just that. Still open:
# whether *why* reaches such a pair after it has met on screen.
#
# ## 5. One honest failure
#
# Chosen by a rule, not by taste: the first wrong *why?* about a clip in which at least two things were affected.


# %%
def clip_of(sample):
    return world.make_clip(SEED, int(sample.video.split("-")[2][:5]), "test")


def whys(clip, events):
    """A true "why" sentence for each effect among the events, oldest first."""
    effects = [e for e in events if e.type in world.EFFECTS]
    return [f"{language.clause(clip, e, language.PAST, False)} because {language.because(clip, e)}" for e in effects]


def story(sample):
    clip = clip_of(sample)
    return whys(clip, clip.visible)


wrong = [i for i, s in enumerate(quiz) if s.category == "bare why" and not right["full"][i]]
at = next(i for i in wrong if len(story(quiz[i])) > 1)
failed, clip = quiz[at], clip_of(quiz[at])
frames = draw.render(clip)[0]
plots.strip(frames[1::2], [f"{i / world.FPS:.2f} s" for i in range(1, 16, 2)])

# %% tags=["volatile"]
for event in clip.visible:
    print(f"{event.time:5.2f} s  {language.clause(clip, event)}")
print("\ntrue:", failed.answer, "\nsaid:", said["full"][at], "\n")
options = list(dict.fromkeys([failed.answer, said["full"][at], *story(failed)]))
chances = model.option_logprobs(see["full"](failed.video), failed.question, options).exp().tolist()
for option, p in zip(options, chances, strict=True):
    print(f"P = {p:.3f}  {option}")

# %% [markdown]
# *Why?* asks for the cause of the **last** effect that can be seen. Is a wrong answer nonsense? The simulator can run
# on after the last frame, so we can sort all wrong answers of this kind by what they are true of:


# %% tags=["volatile"]
def true_of(sample, answer):
    clip = clip_of(sample)
    after = [event for event in clip.events if event.time >= world.LAST_SEEN]
    if any(language.check(answer, text) for text in story(sample)):
        return "an earlier event of the clip"
    later = any(language.check(answer, text) for text in whys(clip, after))
    return "what happens after the last frame" if later else "nothing in this clip"


print("wrong answers are true of:", dict(Counter(true_of(quiz[i], said["full"][i]) for i in wrong)))
effects = np.array([len(story(s)) if s.category == "bare why" else 0 for s in quiz])
for name, some in (("one effect", effects == 1), ("two or more", effects > 1)):
    print(f"clips with {name}: {right['full'][some].mean():.2f} of {some.sum()} right")
assert true_of(failed, failed.answer) != "nothing in this clip", "the sorting itself must know a true answer"

# %% [markdown]
# Errors come in kinds: a true sentence about the wrong moment (what was *last*?), or a sentence that is true of
# nothing. They may have different remedies; which, this does not say. These questions are too few to count kinds (set
# `CLIPS = 200` above and wait), but enough to see that one number hides them.
#
# ## Exercises
#
# **1. Time backwards.** Play the clips in reverse. **Predict** what becomes of *which way did X move?*: right, random,
# or exactly wrong? Check it for things that moved.

# %% tags=["solution"]
opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
way = [s for s in quiz if s.category == "direction" and s.answer.split()[-1] in opposite][:24]
parts = (model.encoder, model.sam, model.config, np.arange(15, -1, -1))  # the order in which frames are shown
backwards = {video: perceive(clips / video, *parts) for video in {s.video for s in way}}
turned = answers_of(way, backwards.get, "backwards")
flipped = [replace(s, answer=" ".join([*s.answer.split()[:-1], opposite[s.answer.split()[-1]]])) for s in way]
as_before, as_opposite = correct(turned, way).mean(), correct(turned, flipped).mean()
print(f"as played forwards: {as_before:.2f}, the opposite: {as_opposite:.2f}, of {len(way)}")
assert as_opposite > as_before + 0.3

# %% [markdown]
# **2. Resample what?** Compute the interval of the full model as if all questions were independent (each its own
# group). Is it narrower or wider, and how many clips would you need for an interval of ± .01?

# %% tags=["solution", "volatile"]
by_clip, by_question = interval(right["full"], of_video), interval(right["full"], range(len(quiz)))
half = (by_clip[1] - by_clip[0]) / 2
needed = round(CLIPS * (half / 0.01) ** 2, -1)
print(f"by clip {by_clip}, by question {by_question}; ± .01 needs about {needed:.0f} clips: widths fall with 1/√n")
assert by_clip[0] < accuracy["full"] < by_clip[1] and needed > CLIPS

# %% [markdown]
# **3. Choosing instead of saying.** Benchmarks often let a model pick the likeliest of given options
# ([`likeliest`](code:evaluation.replies.likeliest)). Compare it with free answers for *order* and *direction*.
# Why does choosing
# mostly look better?

# %% tags=["solution"]
some = [i for i, s in enumerate(quiz) if s.category in ("order", "direction")][:40]
chosen = ask(model, [quiz[i] for i in some], see["full"], "likelihood", folder / "options.jsonl")
choosing = np.mean([reply["said"] == quiz[i].gold for reply, i in zip(chosen, some, strict=True)])
saying = np.mean([right["full"][i] for i in some])
print(f"choosing {choosing:.2f}, saying {saying:.2f}: a mistake outside the options cannot be chosen")
assert choosing >= saying - 0.05

# %% [markdown]
# This was the last one. Back to [all notebooks](README.md), or on to [evaluate.py](code:evaluate) for full-size tables.
