# %% [markdown]
# # 4 · Words: how an LLM reads vectors, and what it is graded on
#
# **Question.** How can an LLM (large language model), trained on words alone, read a video and answer? On which of its
# predictions is it graded meanwhile, and how do probabilities become a sentence?
#
# **Run time.** About half a minute on two CPU cores, offline.
#
# You need the previous notebook's result: whatever the video shows, the fusion core turns it into $N_q = 32$ vectors.
# Here they meet the LLM: Eq. 4 (the projection), Eq. 5 (probabilities of an answer), Eq. 6 (the loss).

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import plots
from vidreason import (
    PREDICT_PROMPT,
    REASON_PROMPT,
    Conversation,
    VidReason,
    encode_pair,
    encode_prompt,
    generate,
    loss,
    pack,
    target_logprobs,
)

plots.use_style()
torch.set_grad_enabled(False)
model = VidReason.load("../toy/weights")
tokenizer, llm = model.tokenizer, model.llm
names = ["red-egg-breaks-0", "yellow-pin-nears-red-balloon-0", "red-pin-stops-10", "blue-balloon-drifts-7"]
seen = {name: model.perceive(Path("../toy/clips", f"{name}.mp4")) for name in names}
clip = seen["red-egg-breaks-0"]

# %% [markdown]
# ## 1. Tokens and embeddings
#
# A **tokenizer** cuts text into **tokens** (here: words) and gives each a number, its id. The ids index a table, the
# **embedding**: one vector of width $D_{llm}$ per word. An LLM never sees ids; its first layer takes those vectors. So
# nothing prevents us from handing it vectors that belong to no word.

# %%
words = llm.get_input_embeddings().weight
vocabulary = tokenizer.convert_ids_to_tokens(range(len(words)))
print("the table of word vectors:", tuple(words.shape), "(words, D_llm)")
print(vocabulary[:6], "…", vocabulary[60:72])

# %% [markdown]
# ## 2. Eq. 4: from queries to "words"
#
# $$E_{vision} = \mathrm{LinearProj}(Q_{out}) = Q_{out} W^\top + b$$
#
# $Q_{out}$ (the fusion core's output, $N_q \times D_q$) becomes $E_{vision}$ ($N_q \times D_{llm}$): 32 vectors of a
# word's width. It is the last line of [`FusionCore.forward`](code:vidreason.FusionCore.forward). We catch its input on
# the way and redo it by hand.

# %%
caught = {}
hook = model.fusion.norm_out.register_forward_hook(lambda module, inputs, output: caught.update(Q_out=output))
e_vision = model.fuse([clip])
hook.remove()
W, b = model.fusion.linear_proj.weight, model.fusion.linear_proj.bias
print("Q_out", tuple(caught["Q_out"].shape), " W", tuple(W.shape), " E_vision", tuple(e_vision.shape))
assert torch.allclose(caught["Q_out"] @ W.T + b, e_vision, atol=1e-5)

# %% [markdown]
# Do the 32 vectors imitate words? **Predict**: how similar (cosine: 1 = same direction, 0 = unrelated) is a visual
# token to its *most* similar word?

# %%
predicted = 1.0  # your guess: "it must look like a word, or a frozen LLM could not read it"


def cosines(x, y):
    return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).T


nearest = cosines(e_vision[0], words).max(dim=1)
measured = nearest.values.mean().item()
print(f"predicted {predicted:.2f}, measured {measured:.2f}")
print("nearest words of the first ten:", [vocabulary[i] for i in nearest.indices[:10]])
assert measured < 0.8, "visual tokens would be words"

# %% [markdown]
# No: they are not words, and their lengths differ, too. The LLM reads them all the same: training moved them to
# wherever its frozen layers react in the right way. The picture shows all directions (vectors scaled to length 1) in
# the two dimensions in which they spread most, found by an SVD; what two of 128 dimensions show is a hint at most.

# %%
lengths = [vectors.norm(dim=-1).mean().item() for vectors in (words, e_vision[0])]
print(f"mean length: words {lengths[0]:.1f}, visual tokens {lengths[1]:.1f}")
both = nn.functional.normalize(torch.cat([words, e_vision[0]]), dim=-1)
plane = (both - both.mean(0)) @ torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:2].T
figure, ax = plt.subplots(figsize=(7, 3.6))
ax.plot(*plane[: len(words)].T, "o", color="0.6", ms=3, ls="", label="words")
ax.plot(*plane[len(words) :].T, "^", color="black", ls="", label="visual tokens of one clip")
for word in ("red", "blue", "ball", "egg", "why", "broke", "because", "two"):
    i = vocabulary.index(word)
    ax.annotate(word, plane[i], xytext=(3, 3), textcoords="offset points", fontsize=8)
ax.set(xlabel="first principal direction (no unit)", ylabel="second")
ax.legend()
plt.show()

# %% [markdown]
# ## 3. $E_{input} = [E_{vision}; E_{text}]$
#
# A chat model was trained on conversations written in one fixed form, its **chat template**: special tokens say who
# speaks and where a turn ends. Every LLM has its own, which its tokenizer brings along, and
# [`encode_prompt`](code:vidreason.encode_prompt) uses it; a home-made one ("Question: … Answer:") would be read without
# a word of warning, but the model was never trained on it.

# %%
turn = [{"role": "user", "content": "why ?"}]
print(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
prompt_ids = encode_prompt(tokenizer, "why ?")
print(prompt_ids, tokenizer.convert_ids_to_tokens(prompt_ids))

# %% [markdown]
# The visual tokens stand before all of it. **Predict** the shape of what the LLM reads, $(1, L, D_{llm})$.

# %%
predicted = (1, model.config.num_queries + len(prompt_ids), words.shape[1])
e_text = model.embed("why ?")
e_input = torch.cat([e_vision, e_text], dim=1)
print("E_vision", tuple(e_vision.shape), " E_text", tuple(e_text.shape), " E_input", tuple(e_input.shape))
assert tuple(e_input.shape) == predicted

# %% [markdown]
# ## 4. Which positions carry loss?
#
# For training we also know the answer. [`encode_pair`](code:vidreason.encode_pair) returns prompt and target; the
# target ends with the token that ends a turn, or the model would never learn to stop.

# %%
question, answer = "why ?", "the red egg broke because the yellow ball hit it"
prompt, target = encode_pair(tokenizer, question, answer)
print("prompt", tokenizer.convert_ids_to_tokens(prompt))
print("target", tokenizer.convert_ids_to_tokens(target))
assert prompt == prompt_ids and target[-1] == tokenizer.eos_token_id

# %% [markdown]
# An LLM is **causal**: position $i$ sees positions $\le i$ and predicts token $i + 1$. So the *last position of the
# prompt* predicts the first word of the answer, and the answer's last token predicts nothing that we grade.
# [`pack`](code:vidreason.pack) lists these places: `columns` (which position predicts) and `targets` (what).

# %%
packed = pack([Conversation([(prompt, target)])], model.config.num_queries)
predicted = len(target)  # how many positions carry loss? not N_q + prompt + target
print({name: tuple(tensor.shape) for name, tensor in packed._asdict().items()})
assert len(packed.columns) == len(packed.targets) == predicted
assert packed.columns[0] == model.config.num_queries + len(prompt) - 1, "the prompt's end predicts the first word"


# %%
def named(ids):
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


n_q = model.config.num_queries
kinds = ["vision"] * n_q + ["prompt"] * len(prompt) + ["answer"] * len(target)
predicts = dict(zip(packed.columns.tolist(), named(packed.targets), strict=True))
figure, ax = plt.subplots(figsize=(10, 2.6))
plots.row(ax, kinds, [""] * n_q + named(prompt + target), predicts, "arrows: what each position must predict")
plots.row_legend(ax, ["vision", "prompt", "answer"])
ax.set_xlabel("position in E_input (tokens)")
plt.show()

# %% [markdown]
# The question is not graded (the user writes it), nor are the visual tokens (there is no word to compare them with):
# they learn only through what they do to the answer.
#
# ## 5. Eq. 5 and Eq. 6, by hand
#
# $$\log P(y_t \mid E_{input}, y_{<t}) \quad (5) \qquad\qquad
# \mathcal{L} = -\sum_t \log P(y^*_t \mid E_{vision}, y^*_{<t}) \quad (6)$$
#
# The unit of a natural logarithm is the **nat**: 0.69 nats are a coin toss. Literally: one forward pass, a softmax over
# the vocabulary at each position, and the probability of the right token picked with a loop.

# %%
everything = torch.cat([e_vision, llm.get_input_embeddings()(torch.tensor([prompt + target]))], dim=1)
logits = llm(inputs_embeds=everything).logits[0]
print("logits", tuple(logits.shape), "(positions, words)")
by_hand = torch.tensor(0.0)
for t, token in enumerate(target):
    by_hand -= logits[n_q + len(prompt) + t - 1].log_softmax(-1)[token]
ours, tokens = loss(llm, packed, e_vision)
print(f"by hand {by_hand:.4f}, loss() {ours:.4f}, over {tokens} tokens: {ours / tokens:.4f} nats each")
assert torch.isclose(by_hand, ours, atol=1e-4) and tokens == len(target)

# %% [markdown]
# [`loss`](code:vidreason.loss) returns the *sum* and the number of tokens, not the mean: the trainer divides by the
# tokens of the whole global batch, or short answers on one GPU would weigh more than long ones on another.
#
# ### What the video tells
#
# The same answer graded twice: with $E_{vision}$ of its own video, and with that of *another* one. **Predict** which
# words become expensive.

# %%
e_other = model.fuse([seen["red-pin-stops-10"]])
nll = -torch.stack([target_logprobs(llm, packed, e) for e in (e_vision, e_other)])
predicted_expensive = {"red", "egg", "yellow", "ball"}  # your guess: the words that only the pixels can tell
difference = dict(zip(named(target), (nll[1] - nll[0]).tolist(), strict=True))  # a word that comes twice: its last
top = sorted(difference, key=difference.get, reverse=True)[:5]
print("dearer by the wrong video:", top)
assert len(predicted_expensive & set(top)) >= 2
assert nll[1].sum() > nll[0].sum() + 3, "the right video should make the true answer far more probable"

# %%
figure, ax = plt.subplots(figsize=(9, 2.8))
plots.pairs_of_bars(ax, named(target), nll, ["its own video", "another video"], "−log P (nats)")
plt.show()
grammar = [i for i, word in enumerate(named(target)) if word in ("because", "hit")]
assert nll[:, grammar].max() < 0.7, "a coin toss"

# %% [markdown]
# What must be seen is expensive with the wrong video, unless that video happens to show it, too: both have something
# red. (After *because* comes *the* or *it*, and that decides who hit whom.) Grammar (*because*, *hit*) is nearly free
# with either. So a low loss per token proves little sight: many tokens of an answer need none. [Notebook
# 6](06_does_it_reason.ipynb) therefore measures whole *answers*, with and without the video.
#
# ### Several questions, one row
#
# A video has many questions, and $E_{vision}$ is the same for all of them. `pack` puts them into one row in which the
# pairs do not see each other. The attention mask says who may look at whom:

# %%
asked = [("why ?", answer), ("how many objects moved ?", "one"), ("what colour is the egg ?", "the egg is red")]
pairs = [encode_pair(tokenizer, q, a) for q, a in asked]
together = pack([Conversation(pairs)], n_q)
figure, (ax, line) = plt.subplots(1, 2, figsize=(9, 3.4))
plots.heat(ax, together.attention_mask[0, 0], "position looked at", "position that looks", "white: may look")
line.plot(together.position_ids[0], "k-", marker="")
line.set(xlabel="position in the row", ylabel="position id (what the LLM believes)", title="ids restart after E_vision")
plt.show()

# %%
alone = [target_logprobs(llm, pack([Conversation([pair])], n_q), e_vision).sum() for pair in pairs]
one_row = target_logprobs(llm, together, e_vision)
one_row = torch.zeros(len(pairs)).index_add(0, together.owner, one_row)
for (q, a), x, y in zip(asked, one_row, alone, strict=True):
    print(f"log P({a!r} | {q!r}): packed {x:.4f}, alone {y:.4f}")
assert torch.allclose(one_row, torch.stack(alone), atol=1e-4)

# %% [markdown]
# ## 6. From probabilities to an answer
#
# Eq. 5 gives probabilities of the *next* token. Decoding strategies differ in how they walk from there:
#
# * **greedy**: always the most probable token.
# * **nucleus sampling** (top-$p$): draw at random from the smallest set of tokens whose probabilities reach $p$.
# * **beam search**: keep the $k$ most probable *beginnings* at each step, and return the best whole sequences.
#
# Greedy is a loop of three lines; [`generate`](code:vidreason.generate) does the same, in batches and with a cache.


# %%
def greedy(e_input, new=()):
    token = int(llm(inputs_embeds=e_input).logits[0, -1].argmax())
    if token == tokenizer.eos_token_id:
        return [*new]
    return greedy(torch.cat([e_input, words[token][None, None]], dim=1), [*new, token])


ours = generate(llm, tokenizer, e_input, torch.ones(e_input.shape[:2], dtype=torch.long), max_new_tokens=32)[0]
print(tokenizer.decode(ours))
assert greedy(e_input) == ours

# %% [markdown]
# Where is there anything to choose? This model is sure of most answers, so we ask twelve questions and take the answer
# that it gives the *lowest* probability. Below, the probability of each of its tokens, and the whole distribution at
# the place where the model hesitates most.

# %% tags=["volatile"]
tried = [(name, q) for name in names for q in ("why ?", "what will happen next ?", PREDICT_PROMPT)]
replies = model.answer_batch([seen[name] for name, _ in tried], [q for _, q in tried])
sure = [model.option_logprobs(seen[name], q, [a]).exp().item() for (name, q), a in zip(tried, replies, strict=True)]
least = sure.index(min(sure))
doubt, ask, said = seen[tried[least][0]], tried[least][1], replies[least]
print(f"surest {max(sure):.3f}, least sure {min(sure):.3f}: {tried[least][0]}, {ask[:50]} → {said}")

# %% tags=["volatile"]
pair = encode_pair(tokenizer, ask, said)
p = target_logprobs(llm, pack([Conversation([pair])], n_q), model.fuse([doubt])).exp()
at = int(p.argmin())
so_far = pair[0] + pair[1][:at]
before = torch.cat([model.fuse([doubt]), words[so_far][None]], dim=1)
chances = llm(inputs_embeds=before).logits[0, -1].softmax(-1).sort(descending=True)
print("hesitates after:", *named(pair[1][:at]))
assert torch.isclose(chances.values.sum(), torch.tensor(1.0), atol=1e-4)

# %%
figure, (ax, bars) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[3, 2])
plots.pairs_of_bars(ax, named(pair[1]), [p], ["greedy answer"], "P(token | all before)")
ax.get_legend().remove()
nucleus = [int((chances.values.cumsum(0) < top_p).sum()) + 1 for top_p in (0.5, 0.9)]
plots.bars(bars, named(chances.indices[:6]), chances.values[:6].tolist(), "P(next token)")
for size, top_p, style in zip(nucleus, (0.5, 0.9), (":", "--"), strict=True):
    bars.axhline(5.5 - min(size, 5.9), color="black", ls=style, marker="", label=f"nucleus of p = {top_p}: all above")
bars.legend(loc="lower right")
plt.show()

# %% [markdown]
# The three side by side for the same question, with the probability of each whole answer
# ([`option_logprobs`](code:vidreason.VidReason.option_logprobs) sums Eq. 5 over its tokens).

# %% tags=["volatile"]
torch.manual_seed(0)
found = {"greedy": [said]}
drawn = model.answer_batch([doubt] * 12, [ask] * 12, top_p=0.9)
found["nucleus .9"] = sorted(dict.fromkeys(drawn), key=drawn.count, reverse=True)  # of 12 draws
found["4 beams"] = model.answer_batch([doubt], [ask], beams=4, answers=4)
for strategy, texts in found.items():
    for text, chance in zip(texts, model.option_logprobs(doubt, ask, texts).exp().tolist(), strict=True):
        print(f"{strategy:11s}{chance:7.3f}  {text}")

# %% [markdown]
# **Predict**: can beam search find an answer that is *more* probable than the greedy one? (Greedy takes the most
# probable token every time …)


# %%
first, *beams = model.option_logprobs(doubt, ask, found["greedy"] + found["4 beams"]).exp()
best = max(beams)
print(f"greedy {first:.3f}, best beam {best:.3f}")
assert best >= first - 1e-4, "of four beams one should be at least as good as greedy"

# %% [markdown]
# It can, though it need not: greedy cannot take a first word back, even if what follows is uncertain (exercise 2 has
# the smallest example). Rules of thumb: greedy for facts and tests (repeatable), beams when you need *several*
# candidates, which is how `infer.py --task predict` finds its three futures, and sampling for variety, which a nucleus
# of one or two words hardly allows. A sequence's probability is that of these *words*: two phrasings of one event share
# the event's, and nothing has yet shown that it is how often the event comes true.
#
# ## 7. What happens with right padding
#
# Questions of different lengths share a batch, so the short ones are padded. Where? The first new word is read off the
# *last column*. With padding on the left, that is the end of every prompt. On the right, the last column of a short row
# is the output at a padding vector, not at `<assistant>`: the mask hides padding from the other positions, but it does
# not move the place that is read. (Positions are counted from the mask, so that left padding shifts no row.) Training
# may pad on the right, because there nothing is generated and no graded position looks to its right.

# %%
batch = [
    ("red-egg-breaks-0", "why ?"),
    ("red-egg-breaks-0", REASON_PROMPT),
    ("blue-balloon-drifts-7", "how many objects moved ?"),
    ("red-pin-stops-10", "which way did the red pin move ?"),
]
rows = [torch.cat([model.fuse([seen[name]]), model.embed(q)], dim=1)[0] for name, q in batch]
lengths = [len(row) for row in rows]
figure, axes = plt.subplots(2, 4, figsize=(10, 1.8), sharex=True, sharey=True)
for i, length in enumerate(lengths):
    text, pad = ["vision"] * n_q + ["prompt"] * (length - n_q), ["padding"] * (max(lengths) - length)
    for ax, kinds in zip(axes[:, i], (pad + text, text + pad), strict=True):
        plots.row(ax, kinds, [""] * max(lengths), title=f"row {i}, {length} tokens" * (ax is axes[0, i]))
axes[0, 0].set_ylabel("left")
axes[1, 0].set_ylabel("right")
figure.supxlabel("position (tokens); generation continues after the last", fontsize=8)
plt.show()

# %% [markdown]
# The same model, the same rows, the same attention mask (0 at padding). **Predict** which rows survive padding on the
# right.

# %%
predicted_survivors = {lengths.index(max(lengths))}  # the longest row has no padding


def answers(side):
    pad = nn.utils.rnn.pad_sequence
    padded = pad(rows, batch_first=True, padding_side=side)
    mask = pad([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True, padding_side=side)
    return tokenizer.batch_decode(generate(llm, tokenizer, padded, mask, max_new_tokens=32))


one_by_one = [model.answer(seen[name], q) for name, q in batch]
left, right = answers("left"), answers("right")
for i in range(len(batch)):
    print(f"row {i}: {batch[i][1][:40]}\n   alone  {one_by_one[i]}\n   left   {left[i]}\n   right  {right[i]}")

# %%
survivors = {i for i in range(len(batch)) if right[i] == one_by_one[i]}
print("survived padding on the right:", survivors)
assert left == one_by_one, "left padding must not change an answer"
assert predicted_survivors <= survivors and len(survivors) < len(batch)

# %% [markdown]
# No error, no warning: right padding only makes the answers bad, and only in batches. This is why
# [`answer_batch`](code:vidreason.VidReason.answer_batch) pads on the left, and why a test compares batched answers with
# single ones.
#
# ## Exercises
#
# **1. Temperature.** Dividing the logits by $T$ before the softmax sharpens ($T < 1$) or flattens ($T > 1$) the
# distribution. Take the hesitating position above (`before`). Show that the entropy $-\sum p \log p$ grows with $T$ and
# that the most probable token never changes.

# %% tags=["solution"]
logits = llm(inputs_embeds=before).logits[0, -1]
spread = {T: torch.distributions.Categorical(logits=logits / T) for T in (0.1, 0.5, 1.0, 2.0)}
for T, chances_at in spread.items():
    print(f"T = {T}: entropy {chances_at.entropy():.2f} nats, most probable: {named([chances_at.probs.argmax()])[0]}")
entropies = [chances_at.entropy() for chances_at in spread.values()]
assert entropies == sorted(entropies)
assert len({int(chances_at.probs.argmax()) for chances_at in spread.values()}) == 1

# %% [markdown]
# **2. Where greedy loses.** Write down a language of two-word sentences, as P(first) and P(second | first), in which
# greedy does not find the most probable sentence, and check it. How many beams are enough?

# %% tags=["solution"]
first = {"the": 0.6, "a": 0.4}
second = {"the": {"ball": 0.4, "egg": 0.3, "pin": 0.3}, "a": {"ball": 0.9, "egg": 0.1}}
sentences = {(x, y): first[x] * second[x][y] for x in first for y in second[x]}
greedy_first = max(first, key=first.get)
greedy_sentence = (greedy_first, max(second[greedy_first], key=second[greedy_first].get))
best_sentence = max(sentences, key=sentences.get)
print(greedy_sentence, f"{sentences[greedy_sentence]:.2f}", best_sentence, f"{sentences[best_sentence]:.2f}")
assert sentences[best_sentence] > sentences[greedy_sentence]  # two beams keep both beginnings, and find it

# %% [markdown]
# **3. What packing saves.** Count the positions that the LLM must compute for the three pairs in one row, and in three
# rows padded to the longest. What would be the ratio for 7 such pairs?

# %% tags=["solution"]
text = [len(p) + len(t) for p, t in pairs]
packed_positions, separate = n_q + sum(text), len(pairs) * (n_q + max(text))
print(f"one row {packed_positions}, three rows {separate}: {separate / packed_positions:.1f} times as many")
assert packed_positions == together.position_ids.numel()
assert separate == pack([Conversation([pair]) for pair in pairs], n_q).position_ids.numel()
seven = 7 * (n_q + max(text)) / (n_q + 7 * sum(text) / 3)
assert seven > separate / packed_positions  # the shared prefix pays more, the more pairs share it

# %% [markdown]
# Next: [5 · Train both stages](05_train_both_stages.ipynb) trains what was only used here.
