# %% [markdown]
# # 1 · From pixels to clip tokens
#
# **Question.** A video of four seconds is half a million numbers. As a first summary the model keeps four vectors, one
# for each second. How do they come out of the pixels, and does such a vector know that something *moved*?
#
# **Run time.** About 30 seconds on two CPU cores. Nothing is downloaded.
#
# This is the left end of the model: video → frames → patches → transformer → one vector per clip (Eq. 1 of the paper).
# You need PyTorch and attention. A few words of the trade first:
#
# - **token**: one vector in a sequence that a transformer reads. Words become tokens, and so do pieces of an image.
# - **embedding**: the vector that stands for something, here for a piece of an image.
# - **encoder**: a network that turns raw input into such vectors. It is trained beforehand and then **frozen**: its
#   weights do not change any more. Our *video transformer* is one. Real ones learn from videos and their captions; the
#   toy's was trained with the simulator's labels: what each thing is, how it moves, whom it hits and whom it will hit.
# - **clip**: here a stretch of the video. The paper cuts a video into $N_t$ clips that do not overlap.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import plots
from toy import draw, world
from vidreason import PRESETS, VideoTransformer, load_vision, read_config, read_video

plots.use_style()
torch.set_grad_enabled(False)  # nothing is trained here

config = read_config("../toy/weights")
encoder, sam = load_vision(config, "../toy/weights")
video = "../toy/clips/red-egg-breaks-0.mp4"

# %% [markdown]
# ## 1. Decoding: which frames does the model see?
#
# The toy world films a table from above: 4 frames per second, 4 seconds.
# [`read_video`](code:vidreason.read_video) cuts a video into $N_t$ equal spans and takes $F$ frames out of each: the
# span is cut into $F$ equal parts, and the frame shown at the centre of each part is taken. Long video or short,
# the answer always has the same shape.

# %%
N_t = config.num_clips  # clips per video
N_f = config.frames_per_clip  # F in the paper; torch.nn.functional is called F already
frames, times, keyframes = read_video(video, N_t, N_f, config.image_size)

print("frames   ", tuple(frames.shape), frames.dtype, "= (N_t, F, 3, H, W)")
print("times    ", tuple(times.shape), "seconds since the first frame")
print("keyframes", len(keyframes), "of", keyframes[0].shape, "one per clip, for notebook 2")

# %% [markdown]
# **Predict.** The file has 16 frames, 0.25 s apart, and $N_t \cdot F = 4 \cdot 4$ places want a frame. Which
# frame lands where? And which four frames are taken if we ask for $N_t = 2$ clips of $F = 2$ frames? Each clip then
# lasts 2 s, each part 1 s, and the centres are at 0.5, 1.5, 2.5 and 3.5 s.

# %%
predicted = torch.arange(16) / 4  # each frame once
assert torch.allclose(times.flatten(), predicted, atol=1e-3)

predicted = torch.tensor([[0.5, 1.5], [2.5, 3.5]])
coarse = read_video(video, 2, 2, config.image_size)[1]
print("N_t = 2, F = 2:", coarse.tolist())
assert torch.allclose(coarse, predicted, atol=1e-3)

# %%
all_frames, starts = frames.flatten(0, 1), times.flatten().tolist()
plots.time_line(all_frames, starts, [1, 2, 3, 4], coarse.flatten(), "▼ taken when N_t = F = 2")

# %% [markdown]
# The ball starts at 1.1 s, hits the egg at 1.9 s, and the egg breaks. Clip 1 shows the ball on its way, so we look at
# that one from now on; its last frame is from 1.75 s, just before the hit.
#
# ## 2. Patches: a frame becomes a grid of tokens
#
# A transformer reads a sequence, so the frame is cut into squares, **patches**, of 12 × 12 pixels.
# Each becomes one token by a linear map (the *patch embedding*).
#
# **Predict** the number $P$ of patches in a frame of 96 × 96 pixels.

# %%
predicted = (96 // 12) ** 2
P = (config.image_size // config.patch_size) ** 2
print("P =", P)
assert P == predicted

clip = frames[1].float() / 255  # (F, 3, H, W), colours from 0 to 1
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.3))
for ax, frame, t in zip(axes, clip, times[1].tolist()):
    plots.show(ax, frame, f"{t:.2f} s")
    plots.grid(ax, 8, color="black", alpha=0.3)
plt.show()

# %% [markdown]
# Two things are special to the toy, and off in the paper's preset ([`Config`](code:vidreason.Config)):
#
# - `tubelet = 2`: one token spans the same square of **two** consecutive frames. This halves the sequence.
# - `frame_difference = 4`: the pair $(a, b)$ is shown to the encoder as its mean $(a+b)/2$ and $4\,(b-a)$. What rests
#   is zero in the difference, so motion is visible before any attention. That was meant as a help for a small encoder
#   that is trained for an hour; how it would do without has not been measured.

# %%
x = (clip - encoder.mean) / encoder.std
a, b = x[0::2], x[1::2]  # (F / 2, 3, H, W) each
pairs = torch.stack([(a + b) / 2, (b - a) * config.frame_difference], dim=1)  # (F / 2, 2, 3, H, W)
print("pairs", tuple(pairs.shape), "= (F / tubelet, [mean, difference], 3, H, W)")

change = (b - a).abs().mean(1)  # (F / 2, H, W)
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.4))
plots.show(axes[0], clip[2], "a: 1.50 s")
plots.show(axes[1], clip[3], "b: 1.75 s")
plots.show(axes[2], (clip[2] + clip[3]) / 2, "mean")
plots.show(axes[3], change[1] / change[1].max(), "size of the difference")
for ax in axes:
    plots.grid(ax, 8, color="gray", alpha=0.5)
plt.show()

# %% [markdown]
# The patch embedding is written as a convolution whose stride equals its kernel. That **is** a linear map of each
# patch on its own: no pixel is used twice. We compute one token by hand,
#
# $$x_{s,i} = W \,\mathrm{vec}(\text{tube } s, i) \in \mathbb{R}^{D_v},$$
#
# and compare. $s$ counts the steps in time (2 pairs of frames), $i$ the patches, row by row.

# %%
tokens = encoder.conv1(pairs.flatten(0, 1).transpose(0, 1)[None])[0]  # (D_v, F / 2, 8, 8)
print("tokens", tuple(tokens.shape), "= (D_v, F / tubelet, rows, columns)")

s, row, column = 1, 5, 2
tube = pairs[s, :, :, 12 * row : 12 * row + 12, 12 * column : 12 * column + 12]  # (2, 3, 12, 12)
W = encoder.conv1.weight.flatten(1)  # (D_v, 3 * 2 * 12 * 12)
by_hand = W @ tube.transpose(0, 1).flatten()
print("W     ", tuple(W.shape))
assert torch.allclose(by_hand, tokens[:, s, row, column], atol=1e-4)

# %% [markdown]
# ## 3. Positions: where was this patch?
#
# Attention treats its input as a set. Each token is therefore given two learned vectors: one for its place in the
# frame (the same at all times), one for its step in time (the same at all places). Nobody told the encoder that
# patch 10 lies right of patch 9; it had to learn that.
#
# **Predict.** Take the position vector of one patch and its cosine similarity (1: same direction, 0: unrelated) with
# those of all others. Will neighbours be more alike than far patches?

# %%
places = encoder.positional_embedding[1:]  # (P, D_v); entry 0 belongs to [CLS], see below
alike = F.cosine_similarity(places[:, None], places[None], dim=-1)  # (P, P)

at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).flatten(0, 1)
distance = torch.cdist(at, at)  # in patches
near, far = alike[distance == 1].mean(), alike[distance > 4].mean()
print(f"cosine of direct neighbours {near:.1f}, of patches more than 4 apart {far:.1f}")
assert near > far + 0.3

# %%
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.2))
for ax, i in zip(axes, (9, 27, 47, 56)):
    labels = "column (patches)", "row (patches)", f"like patch {i}"
    picture = plots.heat(ax, alike[i].view(8, 8), *labels, aspect="equal")
    picture.set_clim(-1, 1)
    plots.box(ax, i, 8, 8, edgecolor="black")
fig.colorbar(picture, ax=axes, label="cosine")
plt.show()

# %% [markdown]
# ## 4. Attention in space *and* time
#
# All tokens of a clip, those of its first pair of frames and those of its second, form **one** sequence. In front
# goes one extra token, `[CLS]` (for "classification", an old use of it). It stands for no patch; in the end it is the
# summary of the clip. In each block, every token looks at every other:
#
# $$A = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right), \qquad
#   \text{output} = A\,V\,W_O$$
#
# $A_{ij}$ is the share of its attention that token $i$ gives to token $j$, each row sums to 1. This is *joint*
# space-time attention: a patch may look at any other patch of any frame in its clip.
#
# [`EncoderBlock`](code:vidreason.EncoderBlock) does not keep $A$, because fast attention never writes it down.
# We recompute it from the block's own projections. A *hook* hands us what the attention layer read and returned.


# %%
def watch(parts, clips):
    """What each part reads and returns while the encoder reads clips: [(read, returned), ...]."""
    seen = []
    hooks = [part.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out))) for part in parts]
    encoder(clips)
    for hook in hooks:
        hook.remove()
    return seen


blocks = encoder.transformer["resblocks"]
seen = [(read[0], returned[0]) for read, (returned, _) in watch([block.attn for block in blocks], clip[None])]
print("sequence", tuple(seen[0][0].shape), "= (1 + 2 P, D_v)")


# %%
def attention_of(layer):
    """A of one block, (heads, 1 + 2 P, 1 + 2 P), and the block's output computed from it."""
    attn, (x, _) = blocks[layer].attn, seen[layer]
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1) for y in (q, k, v))  # (heads, 1 + 2 P, d_k)
    A = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return A, attn.out_proj((A @ v).transpose(0, 1).flatten(1))


for layer in range(len(blocks)):
    A, ours = attention_of(layer)
    assert torch.allclose(ours, seen[layer][1], atol=1e-4), "A is not what the block used"
print("A", tuple(A.shape), "= (heads, 1 + 2 P, 1 + 2 P), the same output in all", len(blocks), "blocks")

# %% [markdown]
# Now one patch of the **second** pair of frames (1.50 and 1.75 s): the one with the most motion. It holds a part of
# the ball.
# Where does it look? The area of each black square is the share of attention, averaged over the heads.
#
# **Predict.** If attention ignored what is in the frames, it would be spread evenly, and the first pair would get
# 64 of 129 parts. And the patches that hold a ball or an egg would get no more than their share of the area.

# %%
moving = change.unfold(1, 12, 12).unfold(2, 12, 12).mean((-1, -2)).flatten(1)  # (F / 2, P)
ball = int(moving[1].argmax())
print("the patch with the most motion: row", ball // 8, "column", ball % 8)

fig, axes = plt.subplots(2, 4, figsize=(8.4, 4.7))
for layer in range(4):
    look = attention_of(layer)[0].mean(0)[1 + P + ball, 1:]  # (2 P,) without [CLS]
    for s in range(2):
        title = f"block {layer + 1}, " + ("1.00–1.25 s" if s == 0 else "1.50–1.75 s")
        plots.squares(axes[s, layer], clip[2 * s + 1], look[P * s : P * s + P], title, largest=0.3)
    plots.box(axes[1, layer], ball, 8, 96, edgecolor="red", linestyle="--")
plt.show()

# %%
colour = clip[1::2].unfold(2, 12, 12).unfold(3, 12, 12).flatten(4)  # (2, 3, 8, 8, 144): one frame of each pair
holds_thing = (colour.amax(-1) - colour.amin(-1)).amax(1).flatten() > 0.2  # (2 P,): the table itself is flat
area = holds_thing.float().mean()

looks = torch.stack([attention_of(layer)[0].mean(0)[1 + P + ball, 1:] for layer in range(4)])  # (blocks, 2 P)
to_past = looks[:, :P].sum(1)
to_things = looks[:, holds_thing].sum(1)
for layer in range(4):
    print(f"block {layer + 1}: to the first pair {to_past[layer]:.2f}, to patches with a thing {to_things[layer]:.2f}")
print(f"patches with a thing are {area:.2f} of all")
assert (0.1 < to_past).all() and (to_past < 0.9).all(), "no exchange between the two pairs of frames"
assert to_past.mean() < 64 / 129
assert to_things.mean() > 2 * area

# %% [markdown]
# The dashed patch spends on average less than an even share on the other pair of frames (a little more in block 4),
# but things get far more than their share of the area: it looks at where the ball came from, and at what it is going
# to hit. Where to look was never taught; what to know was: speed and direction of each thing, and whom it will hit,
# were labels.
#
# ### Break it: who feels a black patch?
#
# Paint one patch of one frame black and see which tokens change. **Predict** three numbers of changed tokens in that
# clip: after the patch embedding (is a token made of other patches?), after one block of joint attention, and in the
# other three clips. In the picture, the area of a square is how much a token changed, relative to its length.

# %%
clips = frames.float() / 255  # (N_t, F, 3, H, W)
painted = clips.clone()
painted[1, 0, :, 36:48, 36:48] = 0

stages = [encoder.ln_pre, *blocks]  # the sequence as it enters the first block and as it leaves each block
before, after = ([out for _, out in watch(stages, c)] for c in (clips, painted))  # each (N_t, 1 + 2 P, D_v)
effect = [(x - y).norm(dim=-1) / x.norm(dim=-1) for x, y in zip(before, after)]  # each (N_t, 1 + 2 P)

# %%
predicted = [1, 1 + 2 * P, 0]
others = effect[-1][[0, 2, 3]]
measured = [int((tokens > 1e-6).sum()) for tokens in (effect[0][1], effect[1][1], others)]
print("changed tokens: after embedding, after one block, in other clips:", measured)
assert measured == predicted

fig, axes = plt.subplots(2, 3, figsize=(6.4, 4.5))
for column, (stage, name) in enumerate([(0, "patch embedding"), (1, "block 1"), (4, "block 4")]):
    for s in range(2):
        part = effect[stage][1, 1 + P * s : 1 + P * s + P]
        plots.squares(axes[s, column], painted[1, 2 * s], part, f"after {name}", largest=effect[stage][1].max())
axes[0, 0].set_ylabel("first pair")
axes[1, 0].set_ylabel("second pair")
plt.show()

# %% [markdown]
# One block is enough for every token of the clip to hear of it, in both pairs of frames. The other clips never do:
# each clip is encoded on its own.
#
# ## 5. Eq. 1
#
# $$Z_{global} = \{\mathrm{VideoTransformer}(V_{clip_i})\}_{i=1}^{N_t} \in \mathbb{R}^{N_t \times D_v}$$
#
# [`VideoTransformer.forward`](code:vidreason.VideoTransformer.forward) is what you have just seen: frames → patches →
# positions → blocks. What it returns of `[CLS]` is $Z_{global}$; the patches are kept for notebook 2.

# %%
Z_global, patches = encoder(clips)
print("Z_global", tuple(Z_global.shape), "= (N_t, D_v)")
print("patches ", tuple(patches.shape), "= (N_t, F / tubelet, P, D_v)")
assert Z_global.shape == (N_t, config.encoder_width)

alone = torch.cat([encoder(one[None])[0] for one in clips])
assert torch.allclose(alone, Z_global, atol=1e-4), "a clip's token depends on the other clips"

# %% [markdown]
# **Why clips?** Attention compares all pairs of tokens. **Predict:** how many times more pairs would there be if
# the whole video were one sequence (one `[CLS]` for each clip in both cases)?

# %%
predicted = N_t  # (N_t n)² against N_t n²
n = 1 + N_f // config.tubelet * P
print("tokens per clip", n, "· pairs per clip", n**2, "· pairs in one long sequence", (N_t * n) ** 2)
assert (N_t * n) ** 2 / (N_t * n**2) == predicted

# %% [markdown]
# The price: what happens *between* two clips has to be put together later. Nothing in $Z_{global}$ even says which
# clip came first. Notebook 3 has a puzzle about that.
#
# ## 6. Does a clip token know that something moved?
#
# 128 numbers mean nothing to the eye. A **linear probe** asks them a question: freeze the tokens and fit a linear
# classifier on top. If it does well on clips that it was not fitted on, the answer is in the token and easy to read.
#
# We make 72 videos of the validation stream, and label each of their 288 clips: did anything move in it? A yes would
# be no wonder: how many things move is one of the labels that [CLS] was trained with. What we ask is whether it is
# there to be read by others, on clips that it was not trained on, and whether it comes from comparing frames.

# %%
worlds = [world.make_clip(seed=0, index=i, split="val") for i in range(72)]
films = torch.stack([torch.from_numpy(draw.render(w)[0]) for w in worlds]).permute(0, 1, 4, 2, 3) / 255
films = films.unflatten(1, (N_t, N_f)).flatten(0, 1)  # (288, F, 3, H, W)
paths = torch.stack([torch.from_numpy(abs(w.trajectory[3::4] - w.trajectory[::4])).amax((1, 2)) for w in worlds])
moved = (paths.flatten() > 0.02).float()  # 2 % of the table's width
print("films", tuple(films.shape), "· clips in which something moves:", int(moved.sum()))


# %%
def probe(tokens, fit=192):
    """Ridge regression on the first `fit` clips -> accuracy on the others."""
    x = (tokens - tokens[:fit].mean(0)) / tokens[:fit].std(0).clamp(min=1e-6)
    x = F.pad(x, (0, 1), value=1.0)
    w = torch.linalg.solve(x[:fit].T @ x[:fit] + 10 * torch.eye(x.shape[1]), x[:fit].T @ (2 * moved[:fit] - 1))
    return ((x[fit:] @ w > 0) == (moved[fit:] > 0)).float().mean().item()


def encode(films):
    return torch.cat([encoder(some)[0] for some in films.split(48)])


# %% [markdown]
# **Predict** which of these will beat the trivial answer, which is to say always what is more common:
#
# - the pixels of the clip's third frame, shrunk to 8 × 8,
# - the clip token of a "frozen" clip: its third frame repeated,
# - the clip token.

# %%
held_out = moved[192:].mean().item()
accuracy = {
    "always the same answer": max(held_out, 1 - held_out),
    "pixels of one frame": probe(F.interpolate(films[:, 2], (8, 8), mode="area").flatten(1)),
    "clip token, frozen clip": probe(encode(films[:, 2:3].expand(-1, N_f, -1, -1, -1))),
    "clip token": probe(encode(films)),
}
fig, ax = plt.subplots(figsize=(6, 1.8))
plots.bars(ax, list(accuracy), list(accuracy.values()), "accuracy on clips that the probe was not fitted on")
plt.show()
assert accuracy["clip token"] > 0.85
assert accuracy["clip token"] > accuracy["clip token, frozen clip"] + 0.15
assert accuracy["clip token"] > accuracy["pixels of one frame"] + 0.15
assert max(accuracy["pixels of one frame"], accuracy["clip token, frozen clip"]) < accuracy["clip token"] - 0.15

# %% [markdown]
# Motion is in the token, and it came in by comparing frames: read from a single frame, the same probe does far worse.
#
# A clip token is one vector for all things together. To tell *which* of them did what, the paper adds object tokens:
# [notebook 2](02_objects.ipynb).
#
# ## Exercises
#
# **1.** Write down the times that `read_video` takes for $N_t = 2$, $F = 3$ from this 4-second clip at 4 frames per
# second, then check. Remember that a frame is shown from its time until the next one's.

# %% tags=["solution"]
centres = (torch.arange(6) + 0.5) * 4 / 6  # 0.33, 1.00, 1.67, 2.33, 3.00, 3.67 s
shown = (centres * 4 + 1e-4).floor() / 4  # the last frame that began by then: 0.25, 1, 1.5, 2.25, 3, 3.5 s
measured = read_video(video, 2, 3, config.image_size)[1]
print(measured.tolist())
assert torch.allclose(measured.flatten(), shown, atol=1e-3)

# %% [markdown]
# **2.** How many tokens does one clip have in the paper's preset, and how many parameters has its encoder? Work both
# out from the sizes in [`Config`](code:vidreason.Config) before you let the computer count. (On the `meta` device a
# model has shapes but no numbers: nothing is allocated.)

# %% tags=["solution"]
paper = PRESETS["paper"]
D, side, T = paper.encoder_width, paper.image_size // paper.patch_size, paper.frames_per_clip // paper.tubelet
print("tokens per clip:", 1 + T * side**2)
assert 1 + T * side**2 == 1569

attention_layer = 4 * (D * D + D)  # W_Q, W_K, W_V, W_O and their biases
mlp = D * 4 * D + 4 * D + 4 * D * D + D
norms = 2 * 2 * D
embeddings = paper.tubelet * 3 * paper.patch_size**2 * D + D + (1 + side**2) * D + T * D  # conv1, [CLS], places, times
predicted = paper.encoder_layers * (attention_layer + mlp + norms) + embeddings + 2 * 2 * D  # ln_pre and ln_post
with torch.device("meta"):
    counted = sum(p.numel() for p in VideoTransformer(paper).parameters())
print("parameters:", counted)
assert counted == predicted

# %% [markdown]
# **3.** Play the frames *inside* each clip backwards. Does $Z_{global}$ notice? Which two ingredients of the encoder
# make it notice? Compare with the effect of mirroring the picture.

# %% tags=["solution"]
# The time-step embedding, and the difference of a pair, whose sign flips. Without both, reversal would be invisible.
backwards = encoder(clips.flip(1))[0]
mirrored = encoder(clips.flip(-1))[0]
for name, z in (("backwards", backwards), ("mirrored", mirrored)):
    print(f"{name:9}", [f"{d:.2f}" for d in (1 - F.cosine_similarity(z, Z_global)).tolist()], "cosine distance by clip")
moving_clip, resting_clip = 1 - F.cosine_similarity(backwards, Z_global)[[1, 3]]
assert moving_clip > 0.1 and moving_clip > 3 * resting_clip

# %% [markdown]
# Next: [2 · Objects](02_objects.ipynb), from the same patches to one vector per thing.
