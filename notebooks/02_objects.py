# %% [markdown]
# # 2 · Objects
#
# **Question.** One vector per second says that something moved. To say *what* hit *what*, a model should see things.
# How do pixels become things, and a thing one vector, when nobody marks anything in the video that is asked about?
#
# **Run time.** About 30 seconds on two CPU cores. Nothing is downloaded.
#
# [Notebook 1](01_from_pixels_to_clip_tokens.ipynb) ended with patches, (N_t, F / tubelet, P, D_v), and one token per
# clip. Here they are pooled over *objects*: keyframe → masks → one token per mask (§3.1.2 and Eq. 2 of the paper).
#
# - **mask**: which pixels belong to a thing, one boolean per pixel.
# - **keyframe**: the one frame of each clip in which we look for things; ours is the middle one.
# - **SAM**, the Segment Anything Model: shown a picture and a *prompt* such as one point, it returns masks of what the
#   point may lie on. It knows no names. Ours is the toy's: the same classes, 0.45 M parameters, trained on the masks
#   that the renderer of this very world gave. On real pictures nobody has it so easy.
# - **IoU** of two masks: pixels in both / pixels in either. 1 means equal, 0 disjoint.

# %%
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor

import plots
from toy import draw, videos, world
from vidreason import (
    collate_features,
    load_vision,
    mask_generator,
    mask_pool,
    perceive,
    read_config,
    read_video,
    segment,
)

plots.use_style()
torch.set_grad_enabled(False)  # nothing is trained here

config = read_config("../toy/weights")
encoder, sam = load_vision(config, "../toy/weights")

# %% [markdown]
# We film a new scene, of which we know everything: `owner` says for each pixel which thing is seen there. The model
# gets the mp4 alone. The truth is for us, to check.


# %%
folder = tempfile.TemporaryDirectory()  # deleted with the kernel


def film(scene):
    """-> path of a scene's mp4, and which thing owns each pixel of its keyframes: (N_t, S, S), 0 = the table."""
    path = Path(folder.name) / f"{videos.title(scene)}-{scene.seed[2]}.mp4"
    pixels, owner = draw.render(scene)
    draw.write_mp4(path, pixels)
    return path, torch.from_numpy(owner)[config.frames_per_clip // 2 :: config.frames_per_clip]


scene = world.make_clip(seed=1, index=128, split="val")
video, owner = film(scene)
names = [thing.name for thing in scene.things]
frames, times, keyframes = read_video(video, config.num_clips, config.frames_per_clip, config.image_size)
print("things:", ", ".join(names))
print("keyframes", len(keyframes), "of", keyframes[0].shape, "· truth", tuple(owner.shape))

middle = times[:, config.frames_per_clip // 2].tolist()
plots.strip(keyframes, [f"keyframe of clip {i}: {t:.1f} s" for i, t in enumerate(middle)], columns=4, size=2)

# %% [markdown]
# The balloon drifts left until the red egg stops it. The purple egg rolls right, hits the cube and breaks at 1.8 s.
#
# ## 1. One point, three guesses
#
# A point is an ambiguous prompt: it may mean a thing, a part of it, or a group. SAM therefore returns **three** masks
# for each point, each with the IoU that SAM *itself* predicts it has with a real thing.

# %%
keyframe = keyframes[0]
egg = (owner[0] == 2).numpy()  # thing 1
y, x = egg.nonzero()[0].mean(), egg.nonzero()[1].mean()
predictor = SamPredictor(sam)
predictor.set_image(keyframe)
guesses, predicted_iou, _ = predictor.predict(np.array([[x, y]]), np.ones(1))
print("masks", guesses.shape, "for one point")

true_iou = [(mask & egg).sum() / (mask | egg).sum() for mask in guesses]
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.5))
plots.show(axes[0], keyframe, "the prompt: one point")
axes[0].plot(x, y, "k+", markersize=14, markeredgewidth=2)
for ax, mask, guess, truth in zip(axes[1:], guesses, predicted_iou, true_iou):
    plots.outlines(ax, keyframe, mask[None], f"IoU: SAM says {guess:.2f}, true {truth:.2f}", labels=[])
plt.show()
assert max(true_iou) > 0.7

# %% [markdown]
# Here all three agree: an egg has no parts that this SAM was taught to tell apart. On real pictures they often differ.
#
# ## 2. Ask everywhere: a grid of points
#
# Nobody clicks on a video. So we prompt with a regular grid of points and keep the good answers
# ([`segment`](code:vidreason.segment), which drives SAM's own automatic mask generator):
#
# 1. drop masks of which SAM predicts a low IoU,
# 2. drop unstable ones: the mask should hardly change when SAM's cut-off between inside and outside is moved,
# 3. **non-maximum suppression**: of masks whose boxes nearly coincide keep the best, since many points hit the same
#    thing,
# 4. keep the best $K$.
#
# **Predict** the number of masks before step 1, with `points_per_side = 8`.

# %%
predicted = 8 * 8 * 3  # points times guesses
loose = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
good = {"pred_iou_thresh": config.sam_iou_threshold}
stable = {**good, "stability_score_thresh": config.sam_stability_threshold}
counts = {
    "all answers": len(mask_generator(sam, config.points_per_side, **loose).generate(keyframe)),
    "predicted IoU is high": len(mask_generator(sam, config.points_per_side, **{**loose, **good}).generate(keyframe)),
    "… and stable": len(mask_generator(sam, config.points_per_side, **{**loose, **stable}).generate(keyframe)),
    "… and not a repetition": len(mask_generator(sam, config.points_per_side, **stable).generate(keyframe)),
    "… and among the best K": len(segment(keyframe, sam, config)),
}
assert counts["all answers"] == predicted
assert list(counts.values()) == sorted(counts.values(), reverse=True)

# %%
masks = segment(keyframe, sam, config)
print("masks", tuple(masks.shape), masks.dtype, "= (K', S, S), K' at most", config.masks_per_keyframe)

fig, axes = plt.subplots(1, 3, figsize=(9, 2.6), width_ratios=[1, 1, 1.3])
points = mask_generator(sam, config.points_per_side).point_grids[0] * keyframe.shape[0]
plots.show(axes[0], keyframe, "64 prompts")
axes[0].plot(*points.T, "k+", linestyle="none")
plots.outlines(axes[1], keyframe, masks, "what is kept")
plots.bars(axes[2], list(counts), list(counts.values()), "masks", form="d")
plt.show()

# %% [markdown]
# Where two numbers stand at one place, a thing was masked twice: the suppression compares boxes, and theirs differ.
#
# ### Does it find the things?
#
# **Predict.** We film five more scenes, 4 keyframes each. What share of the visible things has a mask with IoU > 0.5?
# And what share of the masks fits no thing?


# %%
def match(masks, owner, things):
    """For each mask the thing that it fits best, or -1 where no IoU is above 0.5."""
    truth = torch.stack([owner == i + 1 for i in range(things)])  # (things, S, S)
    both = (masks[:, None] & truth).sum((2, 3))
    iou = both / (masks[:, None] | truth).sum((2, 3)).clamp(min=1)  # (K', things)
    best, which = iou.max(1)
    return torch.where(best > 0.5, which, -1)


scenes = [world.make_clip(seed=2, index=i, split="val") for i in range(5)]
films = [film(s) for s in scenes]
features = [perceive(path, encoder, sam, config) for path, _ in films]
found = [
    [match(masks, truth, len(s.things)) for masks, truth in zip(f.masks, owner)]
    for s, (_, owner), f in zip(scenes, films, features)
]

# %%
visible = [[set(truth.unique().tolist()) - {0} for truth in owner] for _, owner in films]
hits = sum(len(set(who.tolist()) & {i - 1 for i in v}) for f, vs in zip(found, visible) for who, v in zip(f, vs))
things = sum(len(v) for vs in visible for v in vs)
stray = sum(int((who < 0).sum()) for f in found for who in f)
total = sum(len(who) for f in found for who in f)
print(f"found {hits / things:.2f} of the things · {stray / total:.2f} of the masks fit nothing")
assert hits / things > 0.85 and stray / total < 0.25

# %% [markdown]
# Nothing is *guaranteed*: a thing may get two masks, or none, and nothing says that mask 3 of this keyframe is
# the same thing as mask 3 of the next. The rest of the model must cope with any number of masks, in any order.
#
# ## 3. Eq. 2: one vector per mask
#
# $$z_{obj_j} = \frac{1}{|M_j|} \sum_{p \in M_j} \mathrm{PatchEmbed}(p) \in \mathbb{R}^{D_v}$$
#
# $p$ runs over the pixels of mask $M_j$, and $\mathrm{PatchEmbed}(p)$ is the encoder's vector of the patch that holds
# $p$: not the patch embedding that notebook 1 began with, but what has become of that patch after the last block. In
# words: the mean of the patch vectors, each patch counting as much as the mask covers it. Literally:


# %%
def literal(patches, masks):
    """Eq. 2 as it is printed: a sum over pixels."""
    grid = int(len(patches) ** 0.5)
    pooled = []
    for mask in masks:
        total = torch.zeros_like(patches[0])
        for y, x in mask.nonzero().tolist():
            row, column = y * grid // mask.shape[0], x * grid // mask.shape[1]
            total += patches[row * grid + column]
        pooled.append(total / mask.sum())
    return torch.stack(pooled)


_, patches = encoder(frames / 255)  # (N_t, F / tubelet, P, D_v)
step = config.frames_per_clip // 2 // config.tubelet  # the pair of frames that holds the keyframe
slow = literal(patches[0, step], masks)
print("patches", tuple(patches[0, step].shape), "· masks", tuple(masks.shape), "→ tokens", tuple(slow.shape))

# %% [markdown]
# All pixels of one patch add the same vector. So count them: $c_{ji}$ = pixels of mask $j$ in patch $i$. Then Eq. 2 is
#
# $$z_{obj_j} = \sum_i \frac{c_{ji}}{|M_j|} \, \mathrm{patch}_i, \qquad Z_{obj} = \underbrace{(C / |M|)}_{K \times P} \;
#   \underbrace{\mathrm{patches}}_{P \times D_v}$$
#
# one matrix product for all masks, which is [`mask_pool`](code:vidreason.mask_pool). The weights of a mask sum to 1:

# %%
weights = mask_pool(torch.eye(64), masks)  # pooling the unit vectors gives the weights themselves
print("weights", tuple(weights.shape), "= (K', P)")
assert torch.allclose(weights.sum(1), torch.ones(len(masks)))

fig, axes = plt.subplots(1, 4, figsize=(9, 2.6))
for i, ax in enumerate(axes):
    plots.outlines(ax, 0.7 + 0.3 * keyframe / 255, masks[i : i + 1], f"mask {i}: share of each patch, %", labels=[])
    plots.grid(ax, 8, color="gray", alpha=0.4)
    for patch in weights[i].nonzero().flatten().tolist():
        place = patch % 8 * 12 + 5.5, patch // 8 * 12 + 5.5
        ax.text(*place, f"{100 * weights[i, patch]:.0f}", ha="center", va="center", fontsize=8, fontweight="bold")
plt.show()

# %% [markdown]
# **Predict.** Floating-point numbers carry about 7 decimal digits in `float32`: relative rounding error $\varepsilon
# = 1.2 \cdot 10^{-7}$. The two forms add the same numbers in a different order. Will they agree exactly? To how many
# $\varepsilon$? And in `float64` ($\varepsilon = 2.2 \cdot 10^{-16}$)?

# %%
exact = literal(patches[0, step].double(), masks)
for dtype in (torch.float32, torch.float64):
    p = patches[0, step].to(dtype)
    unit = torch.finfo(dtype).eps * p.abs().max()
    gap = (literal(p, masks) - mask_pool(p, masks)).abs().max() / unit
    print(f"{str(dtype):14} largest difference {gap:.1f} units in the last place of the largest patch value")
    assert gap < 64

fast_error = (mask_pool(patches[0, step], masks) - exact).abs().max()
slow_error = (slow - exact).abs().max()
print("the matmul form is no less exact than the sum over pixels:", bool(fast_error <= slow_error))
assert fast_error <= slow_error

# %% [markdown]
# Equal to the last digits that floats allow. In `float64` even a sum of hundreds of `float32` numbers is all but exact,
# so that little is left but the last rounding. Where the two differ in `float32`, the short sum is the better one: it
# rounds 64 times, the other once for each pixel. Is it also faster?


# %% tags=["timing"]
def seconds(function, repeats):
    function()  # the first call pays for warming up
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


ratio = seconds(lambda: literal(patches[0, step], masks), 3) / seconds(lambda: mask_pool(patches[0, step], masks), 30)
print(f"the matmul form is {ratio:.0f}× faster here, for {int(masks.sum())} pixels")

# %% [markdown]
# The paper's keyframes have up to 512 × 512 pixels and 16 masks: a thousand times more pixels, the same matrix product
# after counting.
#
# ## 4. The same thing at another time
#
# Nothing in SAM follows a thing through time. Do the *tokens* know it again? We take the tokens of all four keyframes,
# ask the truth which thing each one is, and look at them from the two directions in which they differ most (**PCA**:
# a flat shadow of a cloud in 128 dimensions, chosen to lose as little as possible).

# %%
seen = perceive(video, encoder, sam, config)
tokens = seen.z_vision[seen.is_object]  # (N_o, D_v)
when = seen.times[seen.is_object]
who = torch.cat([match(masks, truth, len(names)) for masks, truth in zip(seen.masks, owner)])
print("object tokens", tuple(tokens.shape), "= (N_o, D_v)")
assert len(tokens) == sum(len(m) for m in seen.masks) == len(who)

# %%
again = torch.tensor([((who == who[i]) & (when == when[i]))[:i].any() for i in range(len(who))])  # masked twice
tokens, when, who = (x[(who >= 0) & ~again] for x in (tokens, when, who))
centred = tokens - tokens.mean(0)
_, _, directions = torch.linalg.svd(centred)
flat = centred @ directions[:2].T
print("in two dimensions", tuple(flat.shape), "= (things × keyframes, 2)")

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
plots.tracks(ax, flat, who, when, names, [world.COLOURS[t.colour] for t in scene.things])
ax.set(xlabel="first principal direction (arbitrary units)", ylabel="second principal direction")
plt.show()

# %% [markdown]
# The four things lie apart, and mostly each stays with itself. From 2.5 s on nothing happens, and the tokens rest.
# Before that all of them move: those of things that move or break, but also those of their neighbours. A token is not
# its thing's alone: a patch vector has attended to the rest of its clip (notebook 1), and a patch at the edge of a mask
# shows the neighbour, too. Both leak, so to drop a thing's mask is not to hide the thing:

# %%
painted = frames / 255
painted[0][:, :, masks[0]] = painted[0, :, :, 0, 0].mean()  # what mask 0 covers, in all frames of its clip, made table
before, after = (mask_pool(p[0, step], masks) for p in (patches, encoder(painted)[1]))
changes = (after - before).norm(dim=1) / before.norm(dim=1)
print("thing 0 is painted over; the tokens change by", [f"{change:.2f}" for change in changes.tolist()])
assert changes[0] > 0.1 and changes[1:].min() > 0.01, "tokens would be their things' alone"

# %%
late = max((tokens[(who == i) & (when == 3.5)] - tokens[(who == i) & (when == 2.5)]).norm() for i in range(4))
breaking = (tokens[(who == 1) & (when == 2.5)] - tokens[(who == 1) & (when == 1.5)]).norm()
print(f"the breaking egg's token moves {breaking / late:.1f} times as far as any token after 2.5 s")
assert breaking > 2 * late

# %% [markdown]
# **Predict.** Take an object token and the most similar token (cosine) at *another* time, over the five scenes. How
# often is it the same thing? A guess among the tokens of that scene would be right about once in three times.

# %%
right, chance = [], []
for f, matched in zip(features, found):
    z, t, who_is = f.z_vision[f.is_object], f.times[f.is_object], torch.cat(matched)
    similar = F.cosine_similarity(z[:, None], z[None], dim=-1)
    for i in range(len(z)):
        others = (who_is >= 0) & (t != t[i])
        same = others & (who_is == who_is[i])
        if who_is[i] >= 0 and same.any():
            nearest = torch.where(others, similar[i], -2.0).argmax()
            right.append(bool(same[nearest]))
            chance.append(float(same.sum() / others.sum()))
right, chance = sum(right) / len(right), sum(chance) / len(chance)
print(f"the same thing: {right:.2f}, by chance {chance:.2f}")
assert right > 0.8 and chance < 0.5

# %% [markdown]
# ## 5. $Z_{vision}$: clips and objects, side by side
#
# $$Z_{vision} = [Z_{global};\; Z_{obj}] \in \mathbb{R}^{(N_t + N_o) \times D_v}$$
#
# That is all that the rest of the model gets to see of a video: $N_t$ clip tokens, then the object tokens, keyframe
# after keyframe, and the time of each. [`perceive`](code:vidreason.perceive) does all of notebooks 1 and 2 in a dozen
# lines.

# %%
Z_global, patches = encoder(frames / 255)
Z_obj = torch.cat([mask_pool(p[step], segment(k, sam, config)) for p, k in zip(patches, keyframes)])
Z_vision = torch.cat([Z_global, Z_obj])
print("Z_global", tuple(Z_global.shape), "· Z_obj", tuple(Z_obj.shape), "· Z_vision", tuple(Z_vision.shape))
assert torch.allclose(Z_vision, seen.z_vision, atol=1e-4)

# %% [markdown]
# Videos have different numbers of things. A batch pads the shorter ones with zeros and remembers, in `key_mask`, what
# is real ([`collate_features`](code:vidreason.collate_features)). **Predict** the shape of a batch of the five
# scenes. And a video in which SAM finds nothing at all, such as a black one: is that an error?

# %%
predicted = (5, max(len(f.times) for f in features), config.encoder_width)
z, t, key_mask = collate_features(features)
print("z_vision", tuple(z.shape), "· times", tuple(t.shape), "· key_mask", tuple(key_mask.shape), key_mask.dtype)
assert z.shape == predicted

nothing = segment(0 * keyframe, sam, config)
print("masks of a black picture", tuple(nothing.shape), "→ tokens", tuple(mask_pool(patches[0, step], nothing).shape))
assert len(nothing) == 0  # no masks, no tokens, no error

# %%
kind = key_mask.long()
for row, f in zip(kind, features):
    row[: len(f.times)] += f.is_object
fig, ax = plt.subplots(figsize=(7, 1.9))
plots.heat(ax, kind, "token", "scene", "black: padding · grey: clip tokens · white: object tokens")
ax.set(yticks=range(5))
plt.show()

# %% [markdown]
# ## Exercises
#
# **1.** What does Eq. 2 give for a mask of all pixels? For a mask of one pixel? Say it without a sum, then check.

# %% tags=["solution"]
everything, one = torch.ones(1, 96, 96, dtype=torch.bool), torch.zeros(1, 96, 96, dtype=torch.bool)
one[0, 40, 50] = True
p = patches[0, step]
assert torch.allclose(mask_pool(p, everything)[0], p.mean(0), atol=1e-5)  # the mean of all patches
assert torch.allclose(mask_pool(p, one)[0], p[40 // 12 * 8 + 50 // 12])  # the patch that holds it

# %% [markdown]
# **2.** Two masks that do not overlap are joined into one. Compute the joint mask's token from the two tokens and the
# two areas alone.

# %% tags=["solution"]
left, right_half = torch.zeros(2, 1, 96, 96, dtype=torch.bool)
left[..., :30], right_half[..., 70:] = True, True
areas = torch.tensor([left.sum(), right_half.sum()]).float()
joined = areas @ torch.cat([mask_pool(p, left), mask_pool(p, right_half)]) / areas.sum()
assert torch.allclose(mask_pool(p, left | right_half)[0], joined, atol=1e-5)

# %% [markdown]
# **3.** Break it: move the masks of keyframe 0 to another place (`torch.roll`), as if SAM and the encoder saw
# differently cropped frames. How similar are the tokens to the right ones? (In `read_video`, both see the same square
# for that reason.)

# %% tags=["solution"]
right_tokens = mask_pool(p, masks)
for shift in (0, 6, 12, 36):
    moved = mask_pool(p, masks.roll((shift, shift), dims=(1, 2)))
    print(f"{shift:2} pixels: cosine {F.cosine_similarity(moved, right_tokens).mean():.2f}")
assert F.cosine_similarity(moved, right_tokens).mean() < 0.6  # at 36 pixels it pools the table, not the thing

# %% [markdown]
# Next: [3 · The fusion core](03_the_fusion_core.ipynb), where 32 queries read these tokens, however many there are.
