# %% [markdown]
# # 3 · The fusion core
#
# **Question.** A language model wants a short sequence of fixed length. A video gives 10 or 30 tokens, in no order.
# How do 32 learned queries read any number of tokens, and can they tell which clip came first?
#
# **Run time.** About 30 seconds on two CPU cores. Nothing is downloaded.
#
# [Notebook 2](02_objects.ipynb) ended with $Z_{vision} = [Z_{global}; Z_{obj}]$. Here it is distilled to $N_q = 32$
# vectors (§3.2, Eq. 3 and 4 of the paper), and we catch the paper's equations out in a puzzle.
#
# - **query**: a vector that asks. It is compared with the *key* of every token, and collects their *values*.
# - **cross-attention**: queries from one sequence, keys and values from another. **Self-attention**: all from the same.
# - **Q-Former** (from the BLIP-2 paper): a small transformer whose queries are parameters, the same for every input. It
#   stands between a frozen encoder and a frozen LLM. The paper's fusion core is of this kind.

# %%
import itertools
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import plots
from toy import language
from vidreason import Features, FusionCore, VidReason, attention, collate_features, time_embedding

plots.use_style()
torch.set_grad_enabled(False)  # nothing is trained here

model = VidReason.load("../toy/weights")
config, fusion = model.config, model.fusion

# %% [markdown]
# ## 1. Eq. 3 by hand
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right) V$$
#
# Three tokens, two numbers each ($N = 3$, $d_k = 2$), and one query. The keys are chosen so that the sum can be done
# in the head: $q \cdot k / \sqrt 2$ is 0, $\ln 2$ and $\ln 5$, whose exponentials are 1, 2 and 5.
#
# **Predict** the weights and the result before you read on.

# %%
K = torch.stack([torch.tensor([1.0, 2.0, 5.0]).log(), torch.tensor([1.0, 0.0, -1.0])], dim=1)  # (3, 2)
V = torch.tensor([[8.0, 0.0], [0.0, 8.0], [4.0, 4.0]])
q = torch.tensor([2.0**0.5, 0.0])

scores = [sum(q[d] * K[j, d] for d in range(2)) / 2**0.5 for j in range(3)]
powers = [score.exp() for score in scores]  # 1, 2, 5
weights = [power / sum(powers) for power in powers]
result = sum(weight * value for weight, value in zip(weights, V))

print("weights", [f"{w:.3f}" for w in weights], "· result", result.tolist())
assert torch.allclose(torch.stack(weights), torch.tensor([1 / 8, 2 / 8, 5 / 8]))
assert torch.allclose(result, torch.tensor([1 / 8 * 8 + 5 / 8 * 4, 2 / 8 * 8 + 5 / 8 * 4]))

# %% [markdown]
# [`attention`](code:vidreason.attention) does this for batches and heads. **Predict** its answers for two more queries:
# one of zeros (what are the weights then?), and the first one when token 2 is hidden by `key_mask`.

# %%
Q = torch.stack([q, torch.zeros(2)])
ours, W = attention(Q[None, None], K[None, None], V[None, None], return_weights=True)
print("Q, K, V", tuple(Q.shape), tuple(K.shape), tuple(V.shape), "→", tuple(ours.shape), "= (B, heads, N_q, d_k)")
assert torch.allclose(ours[0, 0, 0], result)
assert torch.allclose(ours[0, 0, 1], V.mean(0))  # zeros compare equally with all: the mean

visible = torch.tensor([[True, True, False]])
hidden, W_hidden = attention(Q[None, None], K[None, None], V[None, None], visible, return_weights=True)
assert torch.allclose(hidden[0, 0, 0], torch.tensor([8 / 3, 16 / 3]))  # weights 1/3 and 2/3

nobody = attention(Q[None, None], K[None, None], V[None, None], torch.zeros(1, 3, dtype=torch.bool))
assert not nobody.any()  # a video without any token gives zeros, not the mean of the padding

# %%
fig, axes = plt.subplots(1, 2, figsize=(6.4, 1.7))
plots.heat(axes[0], W[0, 0], "token", "query", "weights", numbers=".3f", vmin=0, vmax=1)
plots.heat(axes[1], W_hidden[0, 0], "token", "query", "weights, token 2 hidden", numbers=".3f", vmin=0, vmax=1)
for ax in axes:
    ax.set(xticks=range(3), yticks=range(2))
plt.show()

# %% [markdown]
# ## 2. Queries that look at a video
#
# In the paper, $Q = Q_{query} W_Q$, $K = Z_{vision} W_K$, $V = Z_{vision} W_V$. The queries $Q_{query}$ are
# *parameters*: the same 32 vectors start on every video. What they become depends on what they see.
#
# A [`FusionLayer`](code:vidreason.FusionLayer) has three steps, each added to what was there before: self-attention
# among the queries (who takes what?), cross-attention to $Z_{vision}$ (Eq. 3), and a feed-forward net.

# %%
video = "../toy/clips/red-pin-stops-10.mp4"
features = model.perceive(video)
z_vision, times, key_mask = collate_features([features])
e_vision, looks = fusion(z_vision, times, key_mask, return_weights=True)

print("Z_vision", tuple(z_vision.shape), "= (B, N_v, D_v)")
print("queries ", tuple(fusion.queries.shape), "= (N_q, D_q)")
print("looks   ", tuple(looks.shape), "= (B, layers, heads, N_q, N_v)")
print("E_vision", tuple(e_vision.shape), "= (B, N_q, D_llm)")
assert torch.allclose(looks.sum(-1), torch.ones(()), atol=1e-4)  # each query gives away exactly 1

# %% [markdown]
# To be sure that we know what happens, the cross-attention of the first layer once more, head by head, from what its
# parts read and returned:


# %%
def watch(parts):
    """What each part reads and returns while the fusion core reads our video: [(read, returned), ...]."""
    seen = []
    hooks = [part.register_forward_hook(lambda module, read, out: seen.append((read[0][0], out[0]))) for part in parts]
    fusion(z_vision, times, key_mask)
    for hook in hooks:
        hook.remove()
    return seen


layer = fusion.layers[0]
(_, Q), (Z, _), (_, out) = watch([layer.norm_cross, layer.W_K, layer.cross_out])
print("queries", tuple(Q.shape), "= (N_q, D_q) · Z", tuple(Z.shape), "= (N_v, D_q)")

# %%
d_k = config.fusion_width // config.fusion_heads
by_hand = []
for head in range(config.fusion_heads):
    mine = slice(d_k * head, d_k * head + d_k)  # each head has its share of the columns
    A = (layer.W_Q(Q)[:, mine] @ layer.W_K(Z)[:, mine].T / d_k**0.5).softmax(-1)  # (N_q, N_v)
    assert torch.allclose(A, looks[0, 0, head], atol=1e-4)
    by_hand.append(A @ layer.W_V(Z)[:, mine])
print("one head:", tuple(A.shape), "@", (len(Z), d_k), "=", tuple(by_hand[0].shape))
assert torch.allclose(layer.cross_out(torch.cat(by_hand, dim=-1)), out, atol=1e-4)

# %% [markdown]
# Where does each query look? Rows are queries, columns tokens: first the 4 clip tokens, then the object tokens of the
# four keyframes. **Predict:** if a query spread its attention evenly, its largest weight would be $1 / N_v$. How much
# larger will the largest weights be?

# %%
N_t, N_v = config.num_clips, len(features.times)
edges = N_t + torch.tensor([len(m) for m in features.masks]).cumsum(0) - 0.5
fig, axes = plt.subplots(1, 4, figsize=(10, 3.4), sharey=True)
for i, ax in enumerate(axes):
    plots.heat(ax, looks[0, i].mean(0), "token", "", f"layer {i + 1}, mean of heads", vmin=0, vmax=0.5)
    for edge in [N_t - 0.5, *edges[:-1]]:
        ax.axvline(edge, color="white", lw=0.8, ls=":", marker="")
axes[0].set_ylabel("query")
plt.show()

largest = looks[0].amax(-1).mean()
print(f"even attention would be {1 / N_v:.2f}; the largest weight of a query is {largest:.2f} on average")
assert largest > 4 / N_v

# %% [markdown]
# The columns differ, so the queries choose; the rows differ, so they choose differently. The mean over queries, heads
# and layers is how much attention each token gets (which is not yet how much it matters to an answer):

# %%
share = looks[0].mean((0, 1, 2))  # (N_v,), sums to 1
of_objects = share[features.is_object].split([len(m) for m in features.masks])
fig, axes = plt.subplots(1, 4, figsize=(9, 2.7))
for i, ax in enumerate(axes):
    percent = [f"{100 * s:.0f} %" for s in of_objects[i]]
    title = f"{features.times[N_t:].unique()[i]:.1f} s · its clip token: {100 * share[i]:.0f} %"
    plots.outlines(ax, features.keyframes[i], features.masks[i], title, percent)
plt.show()
print(f"clip tokens {share[:N_t].sum():.2f}, object tokens {share[N_t:].sum():.2f}")
assert share[:N_t].sum() > 0.05 and share[N_t:].sum() > 0.05

# %% [markdown]
# Two percentages at one place belong to two masks of the same thing.
#
# Self-attention among the queries does not keep its weights either. As in notebook 1, a hook on the layer's own
# projection gives them back, and we check that they produce what the layer used.

# %%
qkv = [returned for _, returned in watch([layer.self_qkv for layer in fusion.layers])]  # each (N_q, 3 D_q)
used = [read for read, _ in watch([layer.self_out for layer in fusion.layers])]  # each (N_q, D_q)

fig, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True)
for i, ax in enumerate(axes):
    Q, K, V = qkv[i].unflatten(-1, (3, config.fusion_heads, d_k)).permute(1, 2, 0, 3)[:, None]  # (1, heads, N_q, d_k)
    read, A = attention(Q, K, V, return_weights=True)
    assert torch.allclose(read[0].transpose(0, 1).flatten(1), used[i], atol=1e-4)
    plots.heat(ax, A[0].mean(0), "query that is read", "", f"layer {i + 1}", vmin=0, vmax=0.2)
axes[0].set_ylabel("query that reads")
plt.show()

# %% [markdown]
# ## 3. The bottleneck
#
# After the last layer, Eq. 4 projects the queries into the space of the LLM's word embeddings:
#
# $$E_{vision} = \mathrm{LinearProj}(Q'_{query}) \in \mathbb{R}^{N_q \times D_{llm}}$$
#
# **Predict** the shape of $E_{vision}$ for a batch of videos with 2 and with 6 things. Does the padding of the one
# leak into its result?

# %%
names = ["red-egg-breaks-0", "blue-egg-breaks-3", "red-egg-breaks-1", "red-egg-breaks-11", "red-pin-stops-10"]
names += ["yellow-pin-nears-red-balloon-0"]
videos = {name: model.perceive(f"../toy/clips/{name}.mp4") for name in names}
predicted = (len(names), 32, model.llm.get_input_embeddings().weight.shape[1])

batch = model.fuse(list(videos.values()))
print("N_v", [len(f.times) for f in videos.values()], "→ E_vision", tuple(batch.shape))
assert batch.shape == predicted
alone = torch.cat([model.fuse([f]) for f in videos.values()])
assert torch.allclose(batch, alone, atol=1e-4), "padding leaks"

# %% [markdown]
# The LLM reads 32 tokens, whatever the camera saw. **Predict** how many it would read without the bottleneck, if
# every patch vector of the paper's preset ($N_t = 4$ clips, $F = 8$ frames of $14 \times 14$ patches) were handed to
# it.

# %%
predicted = 4 * 8 * 14**2
print(predicted, "patches,", config.num_queries, "queries: ratio", predicted // config.num_queries)
assert predicted == 6272

# %% [markdown]
# ### Break it: blank some queries
#
# Do a few queries carry everything, or does each hold a part? We replace $k$ of the 32 vectors by their mean over the
# *other* videos, which says nothing about this one (a mean over all of them would still hold a sixth of it), and ask
# questions with known answers. (A hook edits what the fusion core returns; the rest of the model is none the wiser.)
# **Predict** the curve.

# %%
records = [json.loads(line) for line in open("../toy/clips/samples.jsonl")]
kinds = {"count", "colour", "kind", "direction", "first"}
asked = [r for r in records if r["video"][:-4] in videos and r["type"] in kinds]
which = [names.index(r["video"][:-4]) for r in asked]
of_others = (batch.sum(0) - batch) / (len(batch) - 1)  # (videos, N_q, D_llm): each without its own


def score():
    """Share of the questions that are answered correctly."""
    answers = model.answer_batch([videos[r["video"][:-4]] for r in asked], [r["question"] for r in asked])
    return sum(language.check(answer, r["answer"]) for answer, r in zip(answers, asked)) / len(asked)


def score_without(queries):
    """The same with some of the queries replaced by their mean over the other videos."""

    def blank(module, inputs, e_vision):
        return e_vision.index_copy(1, queries, of_others[which][:, queries])

    hook = fusion.register_forward_hook(blank)
    try:
        return score()
    finally:
        hook.remove()


print(len(asked), "questions about", len(videos), "videos")

# %%
shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0))
blanked = [0, 4, 8, 16, 24, 32]
scores = [score_without(shuffled[:k]) for k in blanked]

fig, ax = plt.subplots(figsize=(5, 2.5))
ax.plot(blanked, scores)
ax.set(xlabel="queries blanked, of 32, in random order", ylabel="correct answers", ylim=(0, 1.05), xticks=blanked)
plt.show()
print("correct answers:", [f"{one:.2f}" for one in scores])
assert scores[0] > 0.8 and scores[0] > scores[-1] + 0.3
assert scores == sorted(scores, reverse=True)

# %% [markdown]
# The score falls by and by: what there is to say about these videos is spread over the queries. (This is one random
# order; another gives another curve.) With all of them blanked, what remains are guesses.
#
# ### Break it: hide the objects
#
# The same with the object tokens. Masking them out of Eq. 3 leaves the clip tokens, and these have seen the objects,
# too. So there are two questions: what is lost without object tokens, and what is left when nothing of this film
# remains, clip tokens included? **Predict** both.


# %%
def only(features, keep):
    """A film with some of its tokens alone."""
    return Features(features.z_vision[keep], features.times[keep], features.is_object[keep])


every_token = videos
shown = {"all tokens": score()}
videos = {name: only(f, ~f.is_object) for name, f in every_token.items()}
shown["clip tokens alone"] = score()
videos = {name: only(f, f.is_object) for name, f in every_token.items()}
shown["object tokens alone"] = score()
videos = dict(zip(every_token, [*every_token.values()][1:] + [*every_token.values()][:1]))
shown["another film"] = score()
videos = every_token
print({name: f"{share:.2f}" for name, share in shown.items()})
assert shown["all tokens"] == scores[0]
assert shown["clip tokens alone"] < shown["all tokens"] - 0.2

# %% [markdown]
# These weights were trained with both kinds, so this says what *they* use, not what a model trained without objects
# could do (that is a row of the ablation table in notebook 6). What clip tokens alone still get right, above *another
# film*, has leaked: they saw the things that we hid.
#
# ## 4. The order puzzle
#
# Look at Eq. 3 again. Number the tokens differently, by a permutation $\pi$:
#
# $$\sum_j \frac{e^{q \cdot k_{\pi(j)}}}{\sum_i e^{q \cdot k_{\pi(i)}}}\, v_{\pi(j)}
#   \;=\; \sum_j \frac{e^{q \cdot k_j}}{\sum_i e^{q \cdot k_i}}\, v_j$$
#
# The terms of a sum may be added in any order. So $E_{vision}$ depends on the *set* $Z_{vision}$ alone. Each clip was
# encoded on its own (notebook 1), so no token knows when it happened. **The model as printed cannot know which clip
# came first.** And yet it is asked "why": causes come before effects. (It may still guess: an egg that is broken in one
# clip and whole in another was whole first. But of two balls that roll, which rolled first?)
#
# The same film with its clips in another order:


# %%
def play(features, order):
    """The clips shown in another order: the tokens rearranged, and given the times of their new places."""
    clip = features.times.long()  # each clip lasts one second
    times = features.times + torch.tensor(order).argsort()[clip] - clip
    row = (times + 100 * features.is_object).argsort(stable=True)  # clip tokens first, then by time
    return Features(features.z_vision[row], times[row], features.is_object[row])


backwards = play(features, (3, 2, 1, 0))
assert torch.equal(play(backwards, (3, 2, 1, 0)).times, features.times)
shots = [features.keyframes[i] for order in ((0, 1, 2, 3), (3, 2, 1, 0)) for i in order]
titles = [f"{row}, {i + 0.5} s" for row in ("as filmed", "clips reversed") for i in range(4)]
plots.strip(shots, titles, columns=4, size=1.7)

# %% [markdown]
# `time_embedding=False` is the paper as printed: the same weights, nothing but the equations. **Predict** the largest
# change of $E_{vision}$ over all $4! = 24$ orders of the clips.

# %%
printed = FusionCore(replace(config, time_embedding=False), e_vision.shape[-1]).eval()
printed.load_state_dict(fusion.state_dict())


def change(core, other):
    """How much E_vision differs between the film and another version of it, relative to its length."""
    a, b = (core(*collate_features([f])) for f in (features, other))
    return float((a - b).norm() / a.norm())


predicted = 0.0
orders = list(itertools.permutations(range(4)))[1:]  # all but (0, 1, 2, 3)
as_printed = max(change(printed, play(features, order)) for order in orders)
print(f"{len(orders)} other orders; the paper as printed changes by at most {as_printed:.0e}")
assert abs(as_printed - predicted) < 1e-4  # nothing but rounding

# %% [markdown]
# It cannot tell, whatever its weights are: no training can mend this, because the same input gives the same output.
#
# ## 5. The mend: tell each token its time
#
# We add to each token, before keys and values are made, sines and cosines of its time in seconds
# ([`time_embedding`](code:vidreason.time_embedding)), at periods from 1 second to 10 minutes. (The same trick tells
# words their place in the first transformer.) Times in seconds, not numbers of clips: so the same clock serves a
# video of 4 seconds and one of 4 minutes.

# %%
seconds = torch.linspace(0, 4, 161)
clock = time_embedding(seconds[None], config.fusion_width)[0]  # (161, D_q)
print("clock", tuple(clock.shape), "= (moments, D_q)")

fig, axes = plt.subplots(1, 2, figsize=(9, 2.5))
plots.heat(axes[0], clock.T, "time in seconds", "dimension", "64 sines, 64 cosines", extent=(0, 4, 127, 0))
for t in (0.5, 2.5):
    alike = torch.cosine_similarity(clock, clock[seconds == t], dim=-1)
    axes[1].plot(seconds, alike, label=f"with {t} s", marker="" if t == 0.5 else "s", markevery=10)
axes[1].set(xlabel="time in seconds", ylabel="cosine", title="likeness of two moments")
axes[1].legend()
plt.show()

# %% [markdown]
# **Predict** three changes of $E_{vision}$ with the time embedding: the tokens rearranged *together with* their times
# (a different list, the same set), the clips in another order (times change), and for comparison another film.

# %%
mixed = torch.randperm(N_v, generator=torch.Generator().manual_seed(0))
same_set = Features(features.z_vision[mixed], features.times[mixed], features.is_object[mixed])
moved = [change(fusion, play(features, order)) for order in orders]
other_film = change(fusion, videos["red-egg-breaks-11"])
print(f"same set {change(fusion, same_set):.0e} · clips reordered {min(moved):.2f} to {max(moved):.2f}")
print(f"another film {other_film:.2f}")
assert change(fusion, same_set) < 1e-4
assert min(moved) > 100 * as_printed and min(moved) > 0.01

# %% [markdown]
# Does it change the *answers*, in the right way? In three of our films two things start to move, one in an early
# clip, the other in a later one. Show the clips in reverse order, and the true answer to "what moved first?" flips.

# %% tags=["volatile"]
puzzles = {  # film: (what moved first as filmed, what moves first when the clips are reversed)
    "red-pin-stops-10": ("the green egg", "the red pin"),
    "red-egg-breaks-11": ("the yellow cube", "the purple ball"),
    "yellow-pin-nears-red-balloon-0": ("the blue egg", "the yellow pin"),
}
right = {"as filmed": 0, "reversed": 0}
for name, truths in puzzles.items():
    shown = {"as filmed": videos[name], "reversed": play(videos[name], (3, 2, 1, 0))}
    answers = model.answer_batch(list(shown.values()), ["what moved first ?"] * 2)
    print(f"{name:32} as filmed: {answers[0]:18} reversed: {answers[1]}")
    for key, answer, truth in zip(right, answers, truths):
        right[key] += language.check(answer, truth)
print("right of 3:", right)
assert right["as filmed"] >= 2 and right["reversed"] >= 2

# %% [markdown]
# The pixels of all clips are the same in both versions; only the times differ. With the equations as printed,
# both must get the same answer, so one of each pair must be wrong:

# %%
model.fusion = printed
for name in puzzles:
    pair = model.answer_batch([videos[name], play(videos[name], (3, 2, 1, 0))], ["what moved first ?"] * 2)
    assert pair[0] == pair[1]
model.fusion = fusion
print("the paper as printed: three pairs of equal answers")

# %% [markdown]
# (These weights were trained *with* times, so how well the printed model could do has to be measured on a model that
# was trained without. That is one row of the ablation table in [notebook 6](06_does_it_reason.ipynb).)
#
# ## Exercises
#
# **1.** Count the parameters of the toy's fusion core by hand from its sizes: $N_q = 32$, $D_v = D_q = 128$, 4
# layers, and $D_{llm}$.

# %% tags=["solution"]
D, D_llm = config.fusion_width, e_vision.shape[-1]
linear, norm = D * D + D, 2 * D
one_layer = 4 * linear + 4 * linear + (D * 4 * D + 4 * D + 4 * D * D + D) + 3 * norm  # self, cross, feed-forward
predicted = 32 * D + (norm + linear) + config.fusion_layers * one_layer + norm + (D * D_llm + D_llm)
counted = sum(p.numel() for p in fusion.parameters())
print("parameters:", counted)
assert counted == predicted

# %% [markdown]
# **2.** Give all tokens the same time, say 2 s. Can the model with the time embedding tell the order of the clips now?
# Predict, then check.

# %% tags=["solution"]
z, t, mask = collate_features([features])
z_backwards = collate_features([backwards])[0]
stopped = torch.full_like(t, 2.0)
gap = (fusion(z, stopped, mask) - fusion(z_backwards, stopped, mask)).norm() / fusion(z, stopped, mask).norm()
print(f"{gap:.0e}")
assert gap < 1e-4  # a clock that stands still orders nothing

# %% [markdown]
# **3.** Cut one half of each layer by a hook that returns zeros: first `cross_out`, then `self_out`. What must be
# true of $E_{vision}$ in the first case, for *any* two videos? And how much of the score above survives the second?


# %% tags=["solution"]
def cut(part):
    parts = [getattr(layer, part) for layer in fusion.layers]
    return [part.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out)) for part in parts]


results = {}
for part in ("cross_out", "self_out"):
    hooks = cut(part)
    results[part] = model.fuse(list(videos.values())), score()
    for hook in hooks:
        hook.remove()
    print(part, "cut: correct answers", f"{results[part][1]:.2f}, otherwise {scores[0]:.2f}")
assert torch.allclose(results["cross_out"][0], results["cross_out"][0][:1])  # blind: the same for every video
assert results["cross_out"][1] < results["self_out"][1]

# %% [markdown]
# Next: [4 · Words](04_words.ipynb), where an LLM reads the 32 vectors and answers.
