# %% [markdown]
# # 5 · Train both stages, live
#
# **Question.** What does each training stage teach, what stays frozen, and how can we be sure of both?
#
# **Run time.** About four minutes on two CPU cores, offline.
#
# The paper trains in two stages (§3.4). **Stage 1**: everything is frozen but the fusion core, which learns from
# captions to say in 32 vectors what is in a video. **Stage 2**: questions and answers; the fusion core goes on, and
# the LLM gets **LoRA** adapters, small trainable additions to its frozen matrices. Here both run from scratch on a few
# hundred toy videos, with the functions that [train.py](code:train) itself uses. Only the frozen parts are ready-made:
# encoder, SAM and LLM of `toy/weights` play the role of downloaded foundation models. They have an easier part: they
# were trained on this very world, encoder and SAM with its labels and masks.

# %%
import os

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in a stored notebook; delete this line to see them
import hashlib
import io
import json
import tempfile
from collections import Counter, defaultdict
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import plots
import train
from data.batches import Batches
from data.benchmarks import read_samples
from data.features import FeatureCache, encode_videos
from data.program import TOY_MODEL
from evaluation.replies import ask
from evaluation.score import interval
from toy import draw, language, videos, world
from vidreason import Conversation, VidReason, encode_pair, pack, read_config, target_logprobs

plots.use_style()
config, device = read_config(TOY_MODEL), torch.device("cpu")
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
scratch = tempfile.TemporaryDirectory()

# %% [markdown]
# ## 1. Data: 400 videos of our own
#
# [`make_videos`](code:toy.videos.make_videos) simulates, renders and writes mp4 files, captions and questions.
# `train` and `val` are disjoint random streams: no validation clip can be a training clip. Texts without video go along
# in stage 2, so that the LLM does not forget what it has read.

# %%
folder = Path(scratch.name)
videos.make_videos(folder / "train", "train", seed=5, count=400, processes=cores)
videos.make_videos(folder / "val", "val", seed=5, count=16, processes=cores)
videos.write_text(folder / "train" / "text.jsonl", seed=5, count=300)
captions, questions, texts = (read_samples(folder / "train" / f"{n}.jsonl") for n in ("captions", "samples", "text"))
print(len(captions), "captions; the first:", captions[0].answer)
print(len(questions), "questions; one:", questions[5].question, "→", questions[5].answer)
print(len(texts), "texts")

# %% [markdown]
# ## 2. Frozen work is done once
#
# Encoder and SAM never change, so neither does a video's $Z_{vision}$. It is computed once and kept
# ([`encode_videos`](code:data.features.encode_videos), [`FeatureCache`](code:data.features.FeatureCache));
# both stages and every epoch
# read it. This is the slow part, nearly all of it SAM.

# %% tags=["volatile"]
for split in ("train", "val"):
    names = [path.name for path in (folder / split).glob("*.mp4")]
    with redirect_stderr(io.StringIO()):  # this bar has no switch
        encode_videos(TOY_MODEL, config, folder / split, names, folder / f"features-{split}", processes=cores)
cache, fresh = FeatureCache(folder / "features-train"), FeatureCache(folder / "features-val")
z = cache[captions[0].video].z_vision
size = sum(path.stat().st_size for path in (folder / "features-train").glob("*.safetensors"))
print(len(cache.videos), "videos; Z_vision of the first:", tuple(z.shape), "(N_v, D_v)")
print(f"{size / 400 / 1000:.1f} kB each in the cache")
assert len(cache.videos) == 400 and not cache.bad

# %% [markdown]
# ## 3. What is frozen
#
# [`build`](code:train.build) makes the model and calls [`VidReason.freeze`](code:vidreason.VidReason.freeze).
# **Predict** which parts have trainable parameters in stage 1.


# %%
def settings_of(stage, names, **options):
    out = folder / f"stage{stage}"
    out.mkdir(exist_ok=True)
    places = {"videos": str(folder / "train"), "data": [str(folder / "train" / name) for name in names]}
    return train.complete(train.Settings(stage=stage, **places, output_dir=str(out), save_every=10**6, **options))


one = settings_of(1, ["captions.jsonl"], batch=32, micro_batch=32, max_steps=140, warmup=20)
model = train.build(one, device, torch.float32)
predicted = {"encoder": False, "sam": False, "fusion": True, "llm": False}
for part, trains in predicted.items():
    parameters = list(getattr(model, part).parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"{part:8s}{sum(p.numel() for p in parameters) / 1e6:6.2f} M parameters, {trained / 1e6:5.2f} M trained")
    assert (trained > 0) == trains

# %% [markdown]
# `requires_grad` is a promise. The proof is a fingerprint: a hash of every bit of a part's weights, now and after
# training.


# %% tags=["volatile"]
def fingerprints(model):
    """part → hash of its weights. LoRA adapters live inside the LLM and count as a part of their own."""
    parts = defaultdict(hashlib.sha256)
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0].replace(".base_layer", "")):
        part = "lora" if ".lora_" in name else name.split(".")[0]
        parts[part].update(p.detach().numpy().tobytes())
    return {part: found.hexdigest()[:10] for part, found in parts.items()}


def changed(before, after):
    return {part for part in before if before[part] != after[part]}


print(fingerprints(model))

# %% [markdown]
# ## 4. One step, piece by piece
#
# [`Batches`](code:data.batches.Batches) says which samples make up step $k$.
# [`train_step`](code:train.train_step) computes
# Eq. 6, its gradient, and lets the optimisers move what is trainable.

# %% tags=["volatile"]
batches = Batches(one, captions, cache, model.tokenizer, config.num_queries)
[(packed, (z_vision, times, key_mask))] = batches.step(0)
print("ids", tuple(packed.ids.shape), "(B, L − N_q); targets", tuple(packed.targets.shape))
print("z_vision", tuple(z_vision.shape), "(B, N_v, D_v), of which real:", tuple(key_mask.sum(1)[:6].tolist()), "…")
assert len(packed.ids) == len(z_vision) == one.batch

# %%
nll, tokens = model(packed, z_vision, times, key_mask)
(nll / tokens).backward()
with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
print(f"loss {nll / tokens:.2f} nats per token; parts with a gradient: {with_gradient}")
assert with_gradient == {"fusion"}

# %% [markdown]
# The gradient flows *through* the frozen LLM (its weights decide what the 32 vectors should have been) and leaves
# nothing there: no frozen weight gets one. Before training, we ask the untrained model about fresh videos, for later.
# (The toy's videos are four seconds long and are called clips, too, from here on: whole films, not the spans of
# notebook 1.)

# %%
quiz = [replace(s, options=None, gold=None) for s in read_samples(folder / "val" / "samples.jsonl")]
whys = [s for s in quiz if s.category == "bare why"][:4]
shown = whys[0]  # and three more questions about its clip
followed = whys + [s for s in quiz if s.video == shown.video and s.category in ("count", "why", "kind")][:3]
frames = draw.render(world.make_clip(5, int(shown.video.split("-")[2][:5]), "val"))[0]
plots.strip(frames[::2], [f"{i / world.FPS:.1f} s" for i in range(0, 16, 2)])
print(shown.question, "→", shown.answer)

# %% tags=["volatile"]
answers, right, surprise = {}, {}, {}
about_why = [s for s in quiz if s.category in ("why", "bare why")]


@torch.no_grad()
def examine(name, model):
    """Ask about the fresh clips: answers, which are right (tense and articles are free), −log P of true whys."""
    replies = ask(model.eval(), quiz, fresh.__getitem__, "free", folder / f"{name}.jsonl")
    answers[name] = {s.id: reply["said"] for s, reply in zip(quiz, replies, strict=True)}
    right[name] = [language.check(answers[name][s.id], s.answer) for s in quiz]
    true = [Conversation([encode_pair(model.tokenizer, s.question, s.answer)]) for s in about_why]
    e_vision = model.fuse([fresh[s.video] for s in about_why])
    surprise[name] = -target_logprobs(model.llm, pack(true, config.num_queries), e_vision).mean().item()


examine("untrained", model)
print(len(quiz), "questions about", len(fresh.videos), "fresh clips; right:", sum(right["untrained"]))
print("why? →", answers["untrained"][shown.id])

# %% [markdown]
# ## 5. Stage 1: captions
#
# Everything that `python train.py --stage 1` does from here is in these lines ([`train`](code:train.train) is its
# loop).


# %%
def run(model, settings):
    model.freeze(settings.stage)  # asking has set the mode for answering
    before = fingerprints(model)
    samples = [sample for path in settings.data for sample in read_samples(path)]
    batches = Batches(settings, samples, cache, model.tokenizer, config.num_queries)
    optimizers = train.build_optimizers(model, settings)
    out = Path(settings.output_dir)
    train.train(model, batches, optimizers, settings, device, out, 0, train.agreed(settings, batches))
    train.save_model(model, out)
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()], before


losses, before = {}, {}
losses[1], before[1] = run(model, one)
examine("stage 1", model)

# %% [markdown]
# **Predict** which fingerprints changed.

# %%
predicted = {"fusion"}
print("changed in stage 1:", sorted(changed(before[1], fingerprints(model))))
assert changed(before[1], fingerprints(model)) == predicted

# %% tags=["volatile"]
truths = {s.video: s.answer for s in read_samples(folder / "val" / "captions.jsonl")}
print("caption: ", model.answer(fresh[shown.video], captions[0].question, max_new_tokens=70))
print("the truth:", truths[shown.video])
print("why?     ", answers["stage 1"][shown.id])
said = model.option_logprobs(fresh[shown.video], shown.question, [shown.answer])

# %% [markdown]
# It has learned to *describe*, roughly: it names some of the things and events. Asked *why?*, it may have the form of
# an answer, which the LLM knew, but hardly the right cause: nobody has shown it a question about a video yet.
#
# ## 6. Stage 2: questions, and LoRA
#
# LoRA adds to each frozen matrix $W$ of the LLM a product of two small ones, $W + \frac{\alpha}{r} B A$ with $A$
# ($r \times$ in) and $B$ (out $\times r$); only $A$ and $B$ are trained. **Predict** their number from the shapes.

# %%
rank = config.lora_rank
linear = [m for name, m in model.llm.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
predicted = sum(rank * (m.in_features + m.out_features) for m in linear)

everything = ["samples.jsonl", "captions.jsonl", "text.jsonl"]
start = {"init_from": str(folder / "stage1" / "model")}
two = settings_of(2, everything, **start, batch=16, micro_batch=16, max_steps=90, warmup=10)
model = train.build(two, device, torch.float32)
lora = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
print(f"predicted {predicted}, measured {lora}: {lora / sum(m.weight.numel() for m in linear):.0%} of the matrices")
assert lora == predicted

# %% [markdown]
# $B$ starts at zero. **Predict**: by how much do the new adapters change the log-probability of the true *why* before
# their first step?

# %%
predicted = 0.0  # BA = 0: they add nothing yet
now = model.eval().option_logprobs(fresh[shown.video], shown.question, [shown.answer])
print(f"changed by {abs(now - said).item():.4f}")
assert torch.allclose(now - said, torch.tensor(predicted), atol=1e-4)

# %%
losses[2], before[2] = run(model, two)
examine("stage 2", model)
print("changed in stage 2:", sorted(changed(before[2], fingerprints(model))))
assert changed(before[2], fingerprints(model)) == {"fusion", "lora"}
assert before[1]["llm"] == before[2]["llm"] == fingerprints(model)["llm"], "the LLM's own weights, bit for bit"

# %% [markdown]
# ## 7. Loss curves

# %%
# %matplotlib inline
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for ax, stage, title in zip(axes, (1, 2), ("stage 1: captions", "stage 2: questions, captions, texts"), strict=True):
    steps = list(range(1, len(losses[stage]) + 1))
    plots.curve(ax, steps, losses[stage], "loss (nats per target token)" if stage == 1 else "", title)
plt.show()
for stage, start in ((1, 5), (2, 3)):
    first, last = sum(losses[stage][:start]) / start, sum(losses[stage][-10:]) / 10
    print(f"stage {stage}: {first:.2f} → {last:.2f} nats per target token")
    assert last < 0.6 * first

# %% [markdown]
# Stage 2 begins above where stage 1 ended: its data are others. Does the loss fall because of the *videos*, or would
# any caption-like text do? The same validation captions with their own and with another clip's features (**predict**:
# is the gap smaller or larger than 0.1 nats per token?):

# %%
pairs = [Conversation([encode_pair(model.tokenizer, captions[0].question, truth)]) for truth in truths.values()]
features = [fresh[video] for video in truths]


@torch.no_grad()
def caption_loss(model, features):
    return -target_logprobs(model.llm, pack(pairs, config.num_queries), model.fuse(features)).mean().item()


predicted_gap = 0.1
gap = {"own clip": caption_loss(model, features), "another clip": caption_loss(model, features[1:] + features[:1])}
print({name: f"{value:.2f} nats" for name, value in gap.items()})
assert gap["another clip"] - gap["own clip"] > predicted_gap

# %% [markdown]
# ## 8. The same questions, before and after
#
# Last: the weights of the repository, trained by the same code on 8 000 videos for 1 500 steps in each stage.

# %% tags=["volatile"]
examine("shipped", VidReason.load(TOY_MODEL))
for s in followed:
    print(f"\n{s.question}   (true: {s.answer})")
    for name, said in answers.items():
        print(f"  {name:10s}{'✓' if language.check(said[s.id], s.answer) else '✗'} {said[s.id][:100]}")

# %% [markdown]
# Right or wrong is a coarse measure for a model this young: one wrong kind or colour spoils a sentence. Finer: how
# improbable does each model find the *true* answers to all *why* questions about the fresh clips? Both stages help, and
# greedy answers show little of the first.

# %%
figure, ax = plt.subplots(figsize=(7, 2.2))
plots.bars(ax, list(surprise), list(surprise.values()), "−log P of true answers (nats per token); short is good")
plt.show()
assert surprise["stage 1"] < surprise["untrained"]
assert surprise["stage 2"] < 0.8 * surprise["stage 1"]
assert surprise["shipped"] < surprise["stage 2"]

# %% [markdown]
# And the share of all answers that are right, word for word:

# %%
names = list(right)
videos = [s.video for s in quiz]
accuracy = [sum(right[name]) / len(quiz) for name in names]
figure, ax = plt.subplots(figsize=(7, 2.4))
plots.bars(ax, names, accuracy, "share of answers that are right", [interval(right[name], videos) for name in names])
plt.show()
assert accuracy[0] < accuracy[2] < accuracy[3]
assert accuracy[2] > accuracy[1] + 0.08, "stage 2 should teach answering"

# %%
counts = Counter(s.category for s in quiz).most_common()
rows = []
for kind, n in counts:
    of_kind = [i for i, s in enumerate(quiz) if s.category == kind]
    rows.append([sum(right[name][i] for i in of_kind) / n for name in names])
figure, ax = plt.subplots(figsize=(6, 4.2))
plots.heat(ax, rows, "", "", "share right, by type (bright = all)", numbers=True, vmin=0, vmax=1)
ax.set_xticks(range(len(names)), names)
ax.set_yticks(range(len(counts)), [f"{kind} ({n})" for kind, n in counts])
plt.show()

# %% [markdown]
# What to make of it:
#
# * **Stage 1 alone answers little**, though it sees: it knows no questions. That is the paper's row "w/o stage 2".
# * **Stage 2 makes answers** in a minute, if often with the wrong content.
# * **A high number can be a habit.** Even an untrained core is right now and then: the LLM guesses "two", or "there is
#   no …". If *absent* (which way did X move, of something that is not there) is high while *direction* is near zero, it
#   denies everything. One type alone misleads.
# * **Minutes do not make a good model.** With 400 videos and a few epochs the core confuses colours and kinds. The
#   shipped weights had over ten times as many videos and steps.
# * 16 clips are few: look at the intervals before you believe a difference.
#
# ## Exercises
#
# **1. The schedule.** The learning rate warms up linearly and then follows a cosine to zero
# ([`schedule`](code:train.schedule)). At which step of our stage 1 has it fallen to half of its peak? Work it out, then
# check.

# %% tags=["solution"]
halfway = one.warmup + (one.max_steps - one.warmup) / 2  # cos = 0 in the middle of what follows the warm-up
print(f"step {halfway:.0f}: {train.schedule(halfway, one):.2f} of the peak")
assert abs(train.schedule(halfway, one) - 0.5) < 1e-6 and train.schedule(0, one) == 1 / one.warmup

# %% [markdown]
# **2. LoRA by hand.** Take one adapted layer of the trained model, compute
# $xW^\top + \frac{\alpha}{r}\, x A^\top B^\top$ yourself and compare it with what the layer returns. How large is what
# was added, relative to $W$?

# %% tags=["solution"]
layer = model.llm.get_decoder().layers[0].self_attn.q_proj
A, B, W = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
x, scale = torch.randn(3, W.shape[1]), config.lora_alpha / config.lora_rank
model.eval()
added = scale * B @ A
print("A", tuple(A.shape), "B", tuple(B.shape), f"‖BA α/r‖ / ‖W‖ = {added.norm() / W.norm():.2f}")
assert torch.allclose(layer(x), x @ W.T + scale * (x @ A.T) @ B.T, atol=1e-4)
assert 0 < added.norm() < W.norm()

# %% [markdown]
# **3. What would it cost to train everything?** AdamW keeps, in fp32, a weight, its gradient and two moments per
# trained parameter: 16 bytes; a frozen weight costs its 2 bytes in bf16 either way. How many bytes would stage 2 keep
# for what is *trained* of the *paper's* LLM (8.03 billion parameters) with all of them trained, and how many with LoRA
# of rank 64 on its linear layers (167.8 million)? Check our own model's share by counting.

# %% tags=["solution"]
everything, adapters = 16 * 8.03e9, 16 * 167.8e6
print(f"all: {everything / 1e9:.0f} GB, more than one 80 GB GPU; LoRA: {adapters / 1e9:.1f} GB")
ours = {name: p.numel() for name, p in model.llm.named_parameters()}
share = sum(n for name, n in ours.items() if ".lora_" in name) / sum(ours.values())
theirs = adapters / (everything + adapters)
print(f"LoRA is {share:.0%} of our LLM, {theirs:.0%} of the paper's: the larger the LLM, the more it saves")
assert everything > 80e9 > adapters and share > theirs

# %% [markdown]
# Next: [6 · Does it reason?](06_does_it_reason.ipynb) asks whether the shipped weights reason at all, or only seem to.
