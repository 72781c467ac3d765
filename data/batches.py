"""Batches: which samples make up step k."""

import hashlib
from functools import lru_cache, partial

import numpy as np

from vidreason import Conversation, VidReasonError, collate_features, encode_pair, pack


class Batches:
    """Which samples make up step k: a pure function of (seed, k), so that a resumed run needs no loader state.

    With several ranks each takes every world-th row of the global batch, which is the same whatever their number. An
    epoch shows a video as often as its weight says; of 2.5 times the half is drawn anew for each epoch.
    """

    def __init__(self, settings, samples, cache, tokenizer, num_queries, rank=0, world=1):
        self.settings, self.cache, self.num_queries = settings, cache, num_queries
        self.rank, self.world = rank, world
        self.encode = lru_cache(maxsize=1 << 18)(partial(encode_pair, tokenizer))
        self.words = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        by_video, self.text = {}, [s for s in samples if s.video is None]
        for s in samples:
            if s.video is not None and s.video in cache:
                by_video.setdefault((s.video, s.weight), []).append(s)
        self.videos = sorted(by_video.items())
        if not self.videos:
            raise VidReasonError(f"no sample has a readable video ({settings.videos}): check --data and --videos")
        weights = np.array([weight for (_, weight), _ in self.videos])
        self.epoch_length = max(1, round(weights.sum()))
        self.ends = np.cumsum(weights) * (self.epoch_length / weights.sum())
        self.ends[-1] = self.epoch_length  # rounding must not make one epoch longer than another
        self.order = lru_cache(maxsize=2)(self.order_of)

    def order_of(self, epoch):
        """Indices of the epoch's videos, in its order."""
        start = np.random.default_rng((self.settings.seed, epoch, 4)).random()
        times = np.diff(np.floor(np.concatenate([[0], self.ends]) + start)).astype(int)
        shown = np.repeat(np.arange(len(self.videos)), times)
        return np.random.default_rng((self.settings.seed, epoch, 1)).permutation(shown)

    def digest(self):
        """A hash of all that decides what step k is, apart from the settings."""
        found = hashlib.sha256()
        for name, samples in [*self.videos, ("", self.text)]:
            found.update(repr((name, [(s.question, s.answer, s.context) for s in samples])).encode())
        return found.hexdigest()

    def step(self, k):
        """→ this rank's micro-batches [(Packed, vision | None)]"""
        s, seen, told = self.settings, [], []
        for place in range(k * s.batch + self.rank, (k + 1) * s.batch, self.world):
            epoch, index = divmod(place, self.epoch_length)
            (name, _), samples = self.videos[self.order(epoch)[index]]
            some = np.random.default_rng((s.seed, place, 2)).permutation(len(samples))[: s.pairs_per_video]
            seen.append((Conversation([self.encode(samples[i].question, samples[i].answer) for i in some]), name))
        if self.text and s.text_share:
            picks = np.random.default_rng((s.seed, k, 3)).integers(len(self.text), size=round(s.batch * s.text_share))
            for text in (self.text[i] for i in picks[self.rank :: self.world]):
                told.append((Conversation([self.encode(text.question, text.answer)], self.words(text.context)), None))
        micro = []
        for rows in (seen, told):
            rows.sort(key=lambda row: len(row[0].context) + sum(len(p) + len(t) for p, t in row[0].pairs))
            for i in range(0, len(rows), s.micro_batch):  # rows of one length waste no padding
                said, names = zip(*rows[i : i + s.micro_batch], strict=True)
                vision = collate_features([self.cache[name] for name in names]) if rows is seen else None
                micro.append((pack(said, self.num_queries if rows is seen else 0), vision))
        return micro
