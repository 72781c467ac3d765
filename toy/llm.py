"""Stage 0, the LLM: a Llama that reads stories and world knowledge, from scratch."""

import multiprocessing
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from toy import language, world
from toy.loop import autocast, train
from vidreason import CAPTION_PROMPT

SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<assistant> ' + m['content'] + '<eos>' }}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def every_word() -> list[str]:
    """The world's vocabulary, from its own tables: about 130 words."""
    words, rng = set(), np.random.default_rng(0)
    texts = [t for phrasings in language.QUESTIONS.values() for t in phrasings] + [
        CAPTION_PROMPT,
        *world.KINDS,
        *language.COLOUR_ORDER,
    ]
    for verbs in (language.PAST, language.PRESENT, language.FUTURE):
        texts += verbs.values()
    texts += [*language.NUMBERS, *language.DIRECTIONS]
    texts += [language.knowledge(m, t, rng).replace("|", " ") for m, t in language.HITS for _ in range(20)]
    texts += [
        "yes no there is no a an the did not move moved because it hit the wall reached "
        ". , : ; ! because of them move moves are objects now toward"
    ]
    for text in texts:
        for slot in "{x}", "{y}", "{z}":
            text = text.replace(slot, " ")
        words |= set(tokens_of(text))
    return sorted(words)


def tokens_of(text):
    import re

    return re.findall(r"\w+|[^\w\s]+", text.lower())


def make_tokenizer():
    """Whole words, lower case; an unknown word becomes <unk>. The chat template makes prompts, as for any other LLM."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(SPECIAL + every_word())}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # " ." → "."
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def story_of(job):
    """One story as text: {"story", "listing", "questions"}; a sixth of them hold a pair that no video shows."""
    seed, index, knowledge = job
    held_out = knowledge and index % 6 == 0
    clip = world.make_clip(seed, index, "text", held_out, cut=bool(index % 12) if held_out else None)
    rng = np.random.default_rng((*clip.seed, 5))
    story = language.caption(clip, list(rng.permutation(len(clip.things))))
    questions = [(q["type"], q["question"], q["answer"]) for q in language.questions(clip, rng)]
    return story, questions


def make_stories(seed, count, processes, knowledge=True):
    jobs = [(seed, i, knowledge) for i in range(count)]
    with multiprocessing.Pool(processes) as pool:
        return list(tqdm(pool.imap(story_of, jobs, 64), total=count, desc="stories"))


class TextBatches:
    """Documents for the toy LLM. One document = a story, then independent questions about it, each of which sees the
    story and itself only, exactly as questions see E_vision later (`vidreason.pack`)."""

    def __init__(self, stories, tokenizer, rng, knowledge=True):
        self.rng, self.tokenizer, self.pool, self.reads_knowledge = rng, tokenizer, [], knowledge
        self.bos, self.eos, self.user, self.assistant = tokenizer.convert_tokens_to_ids(
            ["<bos>", "<eos>", "<user>", "<assistant>"]
        )
        self.colours = np.array(tokenizer.convert_tokens_to_ids(list(world.COLOURS)))
        self.caption_prompt = self.words(CAPTION_PROMPT)
        self.stories = [
            (self.words(story), [(t, self.words(q), self.words(a)) for t, q, a in questions])
            for story, questions in tqdm(stories, desc="tokens")
        ]
        count = Counter(type_ for _, questions in self.stories for type_, _, _ in questions)
        self.rarity = {type_: 1 / n for type_, n in count.items()}

    def words(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pair(self, question, answer):
        return [self.bos, self.user, *question, self.assistant], [*answer, self.eos]

    def document(self, short, plain):
        """→ context ids, [(prompt ids, target ids)]; `short`: a list of things and look-ups in it, nothing else."""
        if short:
            return self.lookups(plain)
        if self.rng.random() < 0.1 * self.reads_knowledge:
            return self.knowledge()
        story, questions = self.stories[self.rng.integers(len(self.stories))]
        weights = np.array([self.rarity[type_] for type_, _, _ in questions])  # the rarer types are the harder ones
        few = min(6, len(questions))  # attention costs length squared
        questions = [questions[i] for i in self.rng.choice(len(questions), few, False, weights / weights.sum())]
        pairs = [self.pair(q, a) for _, q, a in questions]
        if self.rng.random() < 0.25:
            pairs.append(self.pair(self.caption_prompt, story))
        permuted = np.arange(len(self.tokenizer))
        permuted[self.colours] = self.rng.permutation(self.colours)  # colours mean nothing: any may be any
        swap = lambda ids: permuted[ids].tolist()
        return swap(story), [(swap(p), swap(t)) for p, t in pairs]

    def lookups(self, plain=False):
        """A list of things and their motions, then "the ball is" → "red", "the red ball moved" → "left" and so on.

        To find a word by the word beside it takes two layers that learn together, and late; a small LLM that cannot do
        it names a kind and a colour that are there but do not belong together. With a loss on nothing but look-ups it
        learns them in minutes, if they are `plain`: with two of a kind and with hits, as stories have them, the loss
        stands at .57 after 1000 steps, with plain ones at .36 after 800. So those come later.
        """
        n = self.rng.integers(2, 5)
        kinds = self.rng.choice(world.KINDS[:-1], n, replace=not plain)
        things = list(zip(self.rng.permutation(list(world.COLOURS))[:n], kinds, strict=True))
        listing = language.listing([language.a(f"{c} {k}") for c, k in things])
        alone = [(c, k) for c, k in things if (kinds == k).sum() == 1]
        pairs = [([self.bos, *self.words(f"the {k} is")], self.words(c)) for c, k in alone]
        pairs += [([self.bos, *self.words(language.a(c))], self.words(k)) for c, k in things]
        verbs = [language.PRESENT[v] for v in ("start", "roll", "slide", "drift", "bounce")]
        ways = language.DIRECTIONS
        motions = [(f"{c} {k}", str(self.rng.choice(verbs)), str(self.rng.choice(ways))) for c, k in things]
        pairs += [([self.bos, *self.words(f"the {name} moved")], self.words(way)) for name, _, way in motions]
        told = [f"the {name} {verb} {way} ." for name, verb, way in motions]
        hitting = [i for i in range(0 if plain else n) if self.rng.random() < 0.5]
        told += [f"the {motions[i][0]} hits the {motions[i - 1][0]} ." for i in hitting]
        told = " ".join(told[i] for i in self.rng.permutation(len(told)))
        return self.words(f"there are {language.NUMBERS[n]} objects : {listing} . {told}"), pairs

    def knowledge(self):
        pairs = []
        for _ in range(self.rng.integers(4, 9)):
            hits = world.HELD_OUT_HITS if self.rng.random() < 0.25 else language.HITS
            question, _, answer = language.knowledge(*hits[self.rng.integers(len(hits))], self.rng).rpartition("|")
            pairs.append(
                self.pair(self.words(question), self.words(answer))
                if question
                else ([self.bos], [*self.words(answer), self.eos])
            )
        return [], pairs

    def batch(self, size, short, plain=False):
        """→ ids, positions (B, T), mask (B, 1, T, T) additive, weights (B, T): of each token as a target.

        `short`: the share of documents that are look-ups.
        """

        def length_of(document):
            return len(document[0]) + sum(len(p) + len(t) for p, t in document[1])

        if not self.pool:  # eight batches at once, sorted, so that little is padding
            documents = [self.document(self.rng.random() < short, plain) for _ in range(8 * size)]
            documents.sort(key=length_of)
            self.pool = [documents[i * size : (i + 1) * size] for i in self.rng.permutation(8)]
        documents = self.pool.pop()
        length = length_of(documents[-1])
        ids, positions = np.zeros((size, length), np.int64), np.zeros((size, length), np.int64)
        part, weights = np.full((size, length), -1), np.zeros((size, length), np.float32)
        for row, (context, pairs) in enumerate(documents):
            at = len(context)
            ids[row, :at], positions[row, :at], part[row, :at], weights[row, 1:at] = context, np.arange(at), 0, 0.1
            for number, (prompt, target) in enumerate(pairs, 1):
                end = at + len(prompt) + len(target)
                ids[row, at:end], positions[row, at:end], part[row, at:end] = (
                    prompt + target,
                    len(context) + np.arange(end - at),
                    number,
                )
                weights[row, at + len(prompt) : end] = 1.0
                at = end
        same = (part[:, :, None] == part[:, None, :]) | ((part == 0)[:, None, :] & (part >= 0)[:, :, None])
        mask = (same & np.tri(length, dtype=bool)) | np.eye(length, dtype=bool)
        mask = np.where(mask, np.float32(0), np.float32(-1e9))[:, None]
        return tuple(map(torch.from_numpy, (ids, positions, mask, weights)))


def text_accuracy(llm, tokenizer, stories, batches, limit=None):
    """Exact-match accuracy per question type, given the true story as text: the ceiling of every fused model."""
    right, items = defaultdict(list), []
    for story, questions in stories:
        items += [
            (type_, batches.words(story) + batches.pair(batches.words(q), [])[0], batches.words(answer))
            for type_, q, answer in questions
        ]
    items = sorted(items[:limit], key=lambda x: len(x[1]))
    llm.eval()
    for start in range(0, len(items), 128):
        group = items[start : start + 128]
        longest = max(len(prompt) for _, prompt, _ in group)
        ids = torch.tensor([[0] * (longest - len(p)) + p for _, p, _ in group])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p, _ in group])
        with torch.no_grad(), autocast():
            out = llm.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(len(x[2]) for x in group) + 1,
                pad_token_id=0,
                eos_token_id=batches.eos,
            )[:, longest:].tolist()
        for (type_, _, answer), got in zip(group, out):
            right[type_].append(got[: got.index(batches.eos)] == answer if batches.eos in got else False)
    llm.train()
    return {k: round(float(np.mean(v)), 3) for k, v in sorted(right.items())}


def pretrain_llm(args):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    train_stories, val_stories = (
        make_stories(args.seed + s, n, args.processes, args.knowledge) for s, n in ((0, args.stories), (1000, 200))
    )
    batches = TextBatches(train_stories, tokenizer, np.random.default_rng(args.seed), args.knowledge)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=args.width * 8 // 3 // 16 * 16,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=batches.bos,
            eos_token_id=batches.eos,
            dtype="float32",
            attn_implementation="eager",
        )
    )  # for this mask faster than SDPA on a CPU
    if args.init:
        llm = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    print(f"LLM: {sum(p.numel() for p in llm.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} words")

    def short(step):
        """Share of look-up documents: all at first, a tenth in the end."""
        return 1.0 if step < args.lookup_steps else max(0.1, 0.5 - (step - args.lookup_steps) / args.steps)

    def loss_of_step(step):
        plain = step < args.lookup_steps and not args.init
        ids, positions, mask, weights = batches.batch(args.batch, short(step), plain)
        logits = llm(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        # a pair's first token follows the previous pair in memory only; its weight is 0, as for every prompt token
        return (nll * weights[:, 1:]).sum() / weights[:, 1:].sum(), {}

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        print()
        llm.save_pretrained(args.runs / "llm")
        tokenizer.save_pretrained(args.runs / "llm")
        few = 40 if step < args.steps else len(val_stories)
        return {"text accuracy": text_accuracy(llm, tokenizer, val_stories[:few], batches)}

    train(args.runs / "llm.jsonl", list(llm.parameters()), args.lr, args.steps, loss_of_step, watch)
    accuracy = text_accuracy(llm, tokenizer, val_stories, batches)
    llm.half().save_pretrained(args.weights / "llm")
    tokenizer.save_pretrained(args.weights / "llm")
    print("text-only accuracy per type (gate .95):", accuracy)
