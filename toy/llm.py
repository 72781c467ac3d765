"""Stage 0, the LLM: a Llama that reads stories and world knowledge, from scratch.

In the order in which it is made: words -> tokenizer -> stories -> documents and batches -> training -> accuracy.
"""

import multiprocessing
import re
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toy import language, world
from toy.loop import autocast, millions, train
from vidreason import CAPTION_PROMPT, Conversation, pack

# --------------------------------------------------------------------------- words

SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<assistant> ' + m['content'] + '<eos>' }}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
OTHER_WORDS = (  # of captions and answers, in no table of toy/language.py
    "yes no there is no a an the did not move moved because it hit the wall reached "
    ". , : ; ! because of them move moves are objects now toward"
)


def every_word() -> list[str]:
    """The world's vocabulary, from its own tables: about 130 words."""
    texts = [OTHER_WORDS, CAPTION_PROMPT]
    texts += [*world.KINDS, *language.COLOUR_ORDER, *language.NUMBERS, *language.DIRECTIONS]
    for verbs in (language.PAST, language.PRESENT, language.FUTURE):
        texts += verbs.values()
    for phrasings in language.QUESTIONS.values():
        texts += [re.sub(r"\{[xyz]\}", " ", phrasing) for phrasing in phrasings]
    rng = np.random.default_rng(0)
    for mover, target in language.HITS:
        for _ in range(20):  # times enough to see each form of it
            texts.append(language.knowledge(mover, target, rng).replace("|", " "))

    words = set()
    for text in texts:
        words.update(re.findall(r"\w+|[^\w\s]+", text.lower()))
    return sorted(words)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower case; an unknown word becomes <unk>. The chat template makes prompts, as for any other LLM."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + every_word())}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # " ." -> "."
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


# --------------------------------------------------------------------------- stories


def story_of(job: tuple[int, int, bool]) -> tuple[str, list[tuple[str, str, str]]]:
    """Story `index` of a stream (seed, index, knowledge) as text -> story, [(type, question, answer)]

    With knowledge a sixth of them hold a pair that no video shows, mostly about to meet.
    """
    seed, index, knowledge = job
    if knowledge and index % 6 == 0:
        clip = world.make_clip(seed, index, "text", held_out=True, cut=bool(index % 12))
    else:
        clip = world.make_clip(seed, index, "text")
    rng = np.random.default_rng((*clip.seed, 5))
    story = language.caption(clip, list(rng.permutation(len(clip.things))))
    asked = language.questions(clip, rng)
    return story, [(question["type"], question["question"], question["answer"]) for question in asked]


def make_stories(seed: int, count: int, processes: int, knowledge: bool = True) -> list:
    jobs = [(seed, index, knowledge) for index in range(count)]
    with multiprocessing.Pool(processes) as pool:
        stories = pool.imap(story_of, jobs, 64)
        return list(tqdm(stories, total=count, desc="stories"))


# --------------------------------------------------------------------------- documents and batches

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its target


class TextBatches:
    """Documents for the toy LLM. A document is a conversation of token ids: a story, then independent questions about
    it, each of which sees the story and itself only, exactly as questions see E_vision later (`vidreason.pack`)."""

    def __init__(self, stories: list, tokenizer, rng: np.random.Generator, knowledge: bool = True):
        self.rng, self.tokenizer, self.reads_knowledge = rng, tokenizer, knowledge
        self.pool = []  # batches that are ready
        special = ["<bos>", "<eos>", "<user>", "<assistant>"]
        self.bos, self.eos, self.user, self.assistant = tokenizer.convert_tokens_to_ids(special)
        self.colours = np.array(tokenizer.convert_tokens_to_ids(list(world.COLOURS)))
        self.caption_prompt = self.words(CAPTION_PROMPT)

        self.stories = []  # (ids of the story, types of its questions, their pairs)
        for story, questions in tqdm(stories, desc="tokens"):
            types = [type_ for type_, _, _ in questions]
            pairs = [self.pair(self.words(question), self.words(answer)) for _, question, answer in questions]
            self.stories.append((self.words(story), types, pairs))
        count = Counter()
        for _, types, _ in self.stories:
            count.update(types)
        self.rarity = {type_: 1 / n for type_, n in count.items()}

    def words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pair(self, question: list[int], answer: list[int]) -> Pair:
        return [self.bos, self.user, *question, self.assistant], [*answer, self.eos]

    def completion(self, beginning: str, end: str) -> Pair:
        return [self.bos, *self.words(beginning)], self.words(end)

    def batch(self, size: int, short: float, plain: bool = False) -> tuple[torch.Tensor, ...]:
        """-> ids, positions (B, L), mask (B, 1, L, L) additive, weights (B, L): of each token as a target

        short: the share of documents that are look-ups; plain: these are plain ones.
        """
        if not self.pool:
            self.fill_pool(size, short, plain)
        documents = self.pool.pop()
        packed = pack(documents, num_queries=0)
        mask = torch.where(packed.attention_mask, 0.0, -1e9)
        weights = torch.zeros(packed.ids.shape)
        for row, document in enumerate(documents):
            weights[row, 1 : len(document.context)] = 0.1
        weights[packed.rows, packed.columns + 1] = 1.0
        return packed.ids, packed.position_ids, mask, weights

    def fill_pool(self, size: int, short: float, plain: bool):
        """Eight batches at once, sorted by length, so that little is padding."""
        documents = [self.document(self.rng.random() < short, plain) for _ in range(8 * size)]
        documents.sort(key=self.length_of)
        for i in self.rng.permutation(8):
            self.pool.append(documents[i * size : (i + 1) * size])

    @staticmethod
    def length_of(document: Conversation) -> int:
        lengths = [len(prompt) + len(target) for prompt, target in document.pairs]
        return len(document.context) + sum(lengths)

    def document(self, short: bool, plain: bool) -> Conversation:
        if short:
            return self.lookups(plain)
        if self.rng.random() < 0.1 * self.reads_knowledge:
            return self.knowledge()
        return self.story()

    def story(self) -> Conversation:
        """A story with up to six questions about it, in other colours: colours mean nothing, any may be any."""
        story, types, pairs = self.stories[self.rng.integers(len(self.stories))]
        rarity = np.array([self.rarity[type_] for type_ in types])  # the rarer types are the harder ones
        few = min(6, len(pairs))  # attention costs length squared
        chosen = self.rng.choice(len(pairs), few, replace=False, p=rarity / rarity.sum())
        pairs = [pairs[i] for i in chosen]
        if self.rng.random() < 0.25:
            pairs.append(self.pair(self.caption_prompt, story))

        other = np.arange(len(self.tokenizer))  # token -> the token in its place
        other[self.colours] = self.rng.permutation(self.colours)
        recoloured = [(other[prompt].tolist(), other[target].tolist()) for prompt, target in pairs]
        return Conversation(recoloured, other[story].tolist())

    def knowledge(self) -> Conversation:
        """Sentences, and questions with answers, about what happens when two kinds meet; no story."""
        pairs = []
        for _ in range(self.rng.integers(4, 9)):
            hits = world.HELD_OUT_HITS if self.rng.random() < 0.25 else language.HITS
            mover, target = hits[self.rng.integers(len(hits))]
            question, _, answer = language.knowledge(mover, target, self.rng).rpartition("|")
            if question:
                pairs.append(self.pair(self.words(question), self.words(answer)))
            else:
                pairs.append(([self.bos], [*self.words(answer), self.eos]))
        return Conversation(pairs)

    def lookups(self, plain: bool) -> Conversation:
        """A list of things and their motions, then "the ball is" -> "red", "the red ball moved" -> "left" and so on.

        To find a word by the word beside it takes two layers that learn together, and late; a small LLM that cannot do
        it names a kind and a colour that are there but do not belong together. With a loss on nothing but look-ups it
        learns them in minutes, if they are `plain`: with two of a kind and with hits, as stories have them, the loss
        stands at .57 after 1000 steps, with plain ones at .36 after 800. So those come later.
        """
        n = self.rng.integers(2, 5)
        kinds = self.rng.choice(language.SOLID_KINDS, n, replace=not plain)
        colours = self.rng.permutation(list(world.COLOURS))[:n]
        names = [f"{colour} {kind}" for colour, kind in zip(colours, kinds)]
        verbs = [language.PRESENT[verb] for verb in ("start", "roll", "slide", "drift", "bounce")]
        sentences, ways = [], []
        for name in names:
            verb, way = self.rng.choice(verbs), self.rng.choice(language.DIRECTIONS)
            sentences.append(f"the {name} {verb} {way} .")
            ways.append(way)
        if not plain:
            for i in range(n):
                if self.rng.random() < 0.5:
                    sentences.append(f"the {names[i]} hits the {names[i - 1]} .")

        pairs = []
        for colour, kind in zip(colours, kinds):
            if (kinds == kind).sum() == 1:
                pairs.append(self.completion(f"the {kind} is", colour))
        for colour, kind in zip(colours, kinds):
            pairs.append(self.completion(language.a(colour), kind))
        for name, way in zip(names, ways):
            pairs.append(self.completion(f"the {name} moved", way))

        listing = language.listing([language.a(name) for name in names])
        motions = " ".join(sentences[i] for i in self.rng.permutation(len(sentences)))
        text = f"there are {language.NUMBERS[n]} objects : {listing} . {motions}"
        return Conversation(pairs, self.words(text))


# --------------------------------------------------------------------------- training


def pretrain_llm(args):
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    stories = make_stories(args.seed, args.stories, args.processes, args.knowledge)
    validation = make_stories(args.seed + 1000, 200, args.processes, args.knowledge)
    batches = TextBatches(stories, tokenizer, np.random.default_rng(args.seed), args.knowledge)
    llm = make_llm(args, tokenizer)
    print(f"LLM: {millions(llm):.2f} M parameters, {len(tokenizer)} words")

    def loss_of_step(step):
        plain = step < args.lookup_steps and not args.init
        short = lookup_share(step, args.lookup_steps, args.steps)
        return word_loss(llm, *batches.batch(args.batch, short, plain)), {}

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        print()
        llm.save_pretrained(args.runs / "llm")
        tokenizer.save_pretrained(args.runs / "llm")
        few = 40 if step < args.steps else len(validation)
        return {"text accuracy": text_accuracy(llm, validation[:few], batches)}

    train(args.runs / "llm.jsonl", list(llm.parameters()), args.lr, args.steps, loss_of_step, watch)
    accuracy = text_accuracy(llm, validation, batches)
    llm.half().save_pretrained(args.weights / "llm")
    tokenizer.save_pretrained(args.weights / "llm")
    print("text-only accuracy per type (gate .95):", accuracy)


def make_llm(args, tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        attn_implementation="eager",  # for these masks faster than SDPA on a CPU
    )
    llm = LlamaForCausalLM(config)
    if args.init:
        llm = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    return llm


def lookup_share(step: int, lookup_steps: int, steps: int) -> float:
    """Share of look-up documents: all at first, a tenth in the end."""
    if step < lookup_steps:
        return 1.0
    return max(0.1, 0.5 - (step - lookup_steps) / steps)


def word_loss(llm, ids, positions, mask, weights) -> torch.Tensor:
    """The mean over the tokens of a batch (see `TextBatches.batch`), by their weights."""
    logits = llm(input_ids=ids, position_ids=positions, attention_mask=mask).logits
    targets, weights = ids[:, 1:], weights[:, 1:]
    logits = logits[:, :-1].float().transpose(1, 2)  # (B, vocabulary, L - 1)
    nll = F.cross_entropy(logits, targets, reduction="none")
    # a pair's first token follows the previous pair in memory only; its weight is 0, as for every prompt token
    return (nll * weights).sum() / weights.sum()


# --------------------------------------------------------------------------- accuracy


def text_accuracy(llm, stories: list, batches: TextBatches) -> dict[str, float]:
    """Exact-match accuracy per question type, given the true story as text: the ceiling of every fused model."""
    items = []  # (type, prompt ids, answer ids)
    for story, questions in stories:
        for type_, question, answer in questions:
            prompt, _ = batches.pair(batches.words(question), [])
            items.append((type_, batches.words(story) + prompt, batches.words(answer)))
    items.sort(key=lambda item: len(item[1]))

    right = defaultdict(list)
    llm.eval()
    for start in range(0, len(items), 128):
        group = items[start : start + 128]
        longest_answer = max(len(answer) for _, _, answer in group)
        prompts = [prompt for _, prompt, _ in group]
        replies = complete(llm, prompts, longest_answer + 1, batches.eos)
        for (type_, _, answer), reply in zip(group, replies):
            right[type_].append(reply == answer)
    llm.train()
    return {type_: round(float(np.mean(right[type_])), 3) for type_ in sorted(right)}


def complete(llm, prompts: list[list[int]], max_new_tokens: int, eos: int) -> list[list[int] | None]:
    """Greedy replies to prompts of token ids, without <eos>; None for a reply that did not end."""
    longest = max(len(prompt) for prompt in prompts)
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.no_grad(), autocast():
        output = llm.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            eos_token_id=eos,
        )
    replies = output[:, longest:].tolist()
    return [reply[: reply.index(eos)] if eos in reply else None for reply in replies]
