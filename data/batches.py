"""Batches: which samples make up step k.

    (seed, k) -> samples -> a row of tokens for each video or text -> micro-batches, padded each for itself
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from data.records import Sample
from vidreason import Conversation, Packed, VidReasonError, collate_features, encode_pair, pack

# What chance decides. Each decision has a random stream of its own: (seed, its number, how often it was taken before).
ORDER, QUESTIONS, TEXTS, ROUNDING = 1, 2, 3, 4

ENCODED_PAIRS = 1 << 18  # questions with answers whose tokens are kept


class Row(NamedTuple):
    """What is said about one video, or about one text."""

    conversation: Conversation
    video: str | None

    def length(self) -> int:
        """Tokens, those of vision not counted."""
        length = len(self.conversation.context)
        for prompt, target in self.conversation.pairs:
            length += len(prompt) + len(target)
        return length


class Batches:
    """Which samples make up step k: a pure function of (seed, k), so that a resumed run needs no loader state.

    With several ranks each takes every world-th row of the global batch, which is the same whatever their number. An
    epoch shows a video as often as its weight says; of 2.5 times the half is drawn anew for each epoch.

    settings: train.Settings, or whatever else has seed, batch, micro_batch, pairs_per_video, text_share and videos.
    cache: Features by the name of a video; samples of videos that are not in it are left out.
    """

    def __init__(
        self,
        settings,
        samples: Iterable[Sample],
        cache,
        tokenizer,
        num_queries: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.settings = settings
        self.cache = cache
        self.tokenizer = tokenizer
        self.num_queries = num_queries
        self.rank = rank
        self.world = world
        self.encode = lru_cache(maxsize=ENCODED_PAIRS)(partial(encode_pair, tokenizer))
        self.order = lru_cache(maxsize=2)(self.order_of)  # an epoch and the next one, at whose border steps lie in both

        by_video = {}
        self.text = []
        for sample in samples:
            if sample.video is None:
                self.text.append(sample)
            elif sample.video in cache:
                by_video.setdefault((sample.video, sample.weight), []).append(sample)
        self.videos = sorted(by_video.items())  # [((name, weight), its samples)]
        if not self.videos:
            raise VidReasonError(f"no sample has a readable video ({settings.videos}): check --data and --videos")

        weights = np.array([weight for (_, weight), _ in self.videos])
        self.epoch_length = max(1, round(weights.sum()))
        self.ends = np.cumsum(weights) * (self.epoch_length / weights.sum())
        self.ends[-1] = self.epoch_length  # rounding must not make one epoch longer than another

    def step(self, k: int) -> list[tuple[Packed, tuple | None]]:
        """-> this rank's micro-batches of step k: (Packed, what collate_features returns), or of text (Packed, None)"""
        about_videos = [self.row_of_video(place) for place in self.places(k)]
        about_texts = [self.row_of_text(index) for index in self.texts(k)]
        micro_batches = []
        for rows in self.parts_of(about_videos):
            conversations = [row.conversation for row in rows]
            features = [self.cache[row.video] for row in rows]
            packed = pack(conversations, self.num_queries)
            micro_batches.append((packed, collate_features(features)))
        for rows in self.parts_of(about_texts):
            conversations = [row.conversation for row in rows]
            micro_batches.append((pack(conversations, num_queries=0), None))
        return micro_batches

    # ------------------------------------------------------------- which samples: functions of the seed and a number

    def draw(self, decision: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, number, decision))

    def order_of(self, epoch: int) -> np.ndarray:
        """Indices of the epoch's videos, in its order."""
        start = self.draw(ROUNDING, epoch).random()
        borders = np.concatenate([[0], self.ends])
        times = np.diff(np.floor(borders + start)).astype(int)  # how often this epoch shows each video
        shown = np.repeat(np.arange(len(self.videos)), times)
        return self.draw(ORDER, epoch).permutation(shown)

    def places(self, k: int) -> range:
        """This rank's rows of step k, counted through the whole run: place p lies in epoch p // epoch_length."""
        batch = self.settings.batch
        return range(k * batch + self.rank, (k + 1) * batch, self.world)

    def samples_at(self, place: int) -> tuple[str, list[Sample]]:
        """-> (name of a video, those of its samples that are asked at this place)"""
        epoch, position = divmod(place, self.epoch_length)
        index = self.order(epoch)[position]
        (name, _), samples = self.videos[index]
        mixed = self.draw(QUESTIONS, place).permutation(len(samples))
        asked = mixed[: self.settings.pairs_per_video]
        return name, [samples[i] for i in asked]

    def texts(self, k: int) -> np.ndarray:
        """Indices of this rank's text-only samples of step k."""
        if not self.text or not self.settings.text_share:
            return np.array([], dtype=int)
        count = round(self.settings.batch * self.settings.text_share)
        picks = self.draw(TEXTS, k).integers(len(self.text), size=count)
        return picks[self.rank :: self.world]

    def digest(self) -> str:
        """A hash of all that decides what step k is, apart from the settings."""
        digest = hashlib.sha256()
        for key, samples in [*self.videos, ("", self.text)]:
            texts = [(sample.question, sample.answer, sample.context) for sample in samples]
            digest.update(repr((key, texts)).encode())
        return digest.hexdigest()

    # --------------------------------------------------------------------------------- samples -> rows -> micro-batches

    def row_of_video(self, place: int) -> Row:
        name, samples = self.samples_at(place)
        pairs = [self.encode(sample.question, sample.answer) for sample in samples]
        return Row(Conversation(pairs), name)

    def row_of_text(self, index: int) -> Row:
        sample = self.text[index]
        pair = self.encode(sample.question, sample.answer)
        context = self.tokenizer(sample.context, add_special_tokens=False).input_ids
        return Row(Conversation([pair], context), None)

    def parts_of(self, rows: list[Row]) -> list[list[Row]]:
        """At most micro_batch rows each; by length, because rows of one length waste no padding."""
        rows = sorted(rows, key=Row.length)
        size = self.settings.micro_batch
        return [rows[start : start + size] for start in range(0, len(rows), size)]
