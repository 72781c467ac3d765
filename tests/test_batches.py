"""What a step is made of: rows, micro-batches, texts. The order of samples is tested in test_train.py."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from data.batches import Batches
from data.records import Sample
from vidreason import Features, VidReasonError, collate_features

SETTINGS = {"seed": 0, "batch": 4, "micro_batch": 2, "pairs_per_video": 2, "text_share": 0.5, "videos": "nowhere"}
QUERIES = 5


def batches_of(samples, names, rank=0, world=1, **changes):
    """names: the videos whose features are there, of as many tokens as their number says."""
    settings = SimpleNamespace(**{**SETTINGS, **changes})
    cache = {}
    for number, name in enumerate(names, 1):
        z_vision = torch.full((number, 3), float(number))
        cache[name] = Features(z_vision, torch.arange(float(number)), torch.zeros(number, dtype=torch.bool))
    return Batches(settings, samples, cache, tiny_tokenizer(), QUERIES, rank, world)


def about(name, *answers):
    return [Sample(f"{name}-{i}", name, "why ?", answer) for i, answer in enumerate(answers)]


VIDEOS = ["1.mp4", "2.mp4", "3.mp4", "4.mp4"]
LONG = "the red ball hits the blue box because the green egg rolls"
SAMPLES = [
    *about("1.mp4", LONG, LONG),
    *about("2.mp4", "red"),
    *about("3.mp4", LONG),
    *about("4.mp4", "blue", "red"),
]
TEXTS = [Sample(f"t{i}", None, "what ?", "egg", context="the ball hits the egg .") for i in range(3)]


def words(ids):
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_a_step_has_every_video_of_its_places_once_shortest_rows_first():
    """Fails if a row or a micro-batch is lost, rows are not sorted by their length, or carry another video."""
    step = batches_of(SAMPLES, VIDEOS, text_share=0.0).step(0)
    assert [len(packed.ids) for packed, _ in step] == [2, 2]
    numbers = []
    lengths = []
    for packed, (z_vision, _, key_mask) in step:
        assert packed.attention_mask.shape[-1] == QUERIES + packed.ids.shape[1]
        for row, ids in enumerate(packed.ids):
            lengths.append(int((ids > 0).sum()))
            number = int(z_vision[row, 0, 0])
            numbers.append(number)
            assert int(key_mask[row].sum()) == number
            answered = {sample.answer for sample in SAMPLES if sample.video == f"{number}.mp4"}
            assert all(answer in words(ids) for answer in answered)
    assert lengths == sorted(lengths) and len(set(lengths)) == 4
    assert numbers == [2, 4, 3, 1]


def test_texts_follow_the_videos_without_vision():
    """Fails if texts are lost, of another number, given queries, or lack their context."""
    step = batches_of(SAMPLES + TEXTS, VIDEOS, text_share=0.75).step(0)
    about_texts = [packed for packed, vision in step if vision is None]
    assert [len(packed.ids) for packed in about_texts] == [2, 1]  # round(4 * .75), two in a micro-batch
    for packed in about_texts:
        assert packed.attention_mask.shape[-1] == packed.ids.shape[1]
        assert all(words(ids).startswith("the ball hits the egg") for ids in packed.ids)


def test_the_context_of_a_text_gets_no_special_tokens():
    """Fails if a tokenizer's own beginning or end of a text is put around the context, too."""
    plain = batches_of(SAMPLES + TEXTS, VIDEOS).row_of_text(0)
    adds_them = tiny_tokenizer()
    adds_them.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    assert adds_them("ball").input_ids[0] == 2
    batches = batches_of(SAMPLES + TEXTS, VIDEOS)
    batches.tokenizer = adds_them
    assert batches.row_of_text(0).conversation.context == plain.conversation.context


@pytest.mark.parametrize("samples, share", [(SAMPLES, 0.5), (SAMPLES + TEXTS, 0.0)])
def test_without_texts_or_a_share_of_them_a_step_has_none(samples, share):
    """Fails if no texts, or none wanted, ends in an error or in texts."""
    batches = batches_of(samples, VIDEOS, text_share=share)
    assert batches.texts(0).dtype == int and not len(batches.texts(0))
    assert all(vision is not None for _, vision in batches.step(0))


def test_ranks_share_the_texts_of_a_step():
    """Fails if two ranks take a text twice, or one is taken by none."""
    of_ranks = [batches_of(SAMPLES + TEXTS, VIDEOS, rank, 2, batch=10) for rank in (0, 1)]
    alone = batches_of(SAMPLES + TEXTS, VIDEOS, batch=10).texts(3).tolist()
    shared = [of_rank.texts(3).tolist() for of_rank in of_ranks]
    assert shared == [alone[0::2], alone[1::2]] and len(alone) == 5


def test_a_video_without_features_is_left_out():
    """Fails if a sample of it comes up, or a run begins in which no video is left."""
    batches = batches_of(SAMPLES, VIDEOS[:3])
    assert [name for (name, _), _ in batches.videos] == VIDEOS[:3] and batches.epoch_length == 3
    with pytest.raises(VidReasonError, match="no sample has a readable video"):
        batches_of(SAMPLES, [])


def test_an_epoch_has_at_least_one_place_and_as_many_as_its_weights():
    """Fails if small weights make an epoch of nothing, or rounding gives one epoch another length."""
    rarely = [Sample(f"{name}", name, "why ?", "red", weight=0.1) for name in VIDEOS]
    batches = batches_of(rarely, VIDEOS)
    assert batches.epoch_length == 1
    orders = [batches.order(epoch) for epoch in range(400)]
    assert {len(order) for order in orders} == {1}
    counts = np.bincount(np.concatenate(orders))
    assert len(counts) == 4 and all(70 <= count <= 130 for count in counts)


def test_which_videos_come_oftener_is_as_in_older_versions():
    """Fails if the stream that rounds the times a video is shown gets another number."""
    often = [Sample(f"{name}", name, "why ?", "red", weight=1.3) for name in VIDEOS]
    batches = batches_of(often, VIDEOS)
    counts = [np.bincount(batches.order(epoch)).tolist() for epoch in range(4)]
    assert counts == [[2, 1, 1, 1], [1, 1, 1, 2], [2, 1, 1, 1], [1, 1, 2, 1]]


def test_one_process_has_every_row():
    """Fails if without a rank and a world only some of the rows are made."""
    settings = SimpleNamespace(**SETTINGS)
    assert list(Batches(settings, SAMPLES, dict.fromkeys(VIDEOS), None, QUERIES).places(1)) == [4, 5, 6, 7]


def test_at_most_so_many_pairs_of_a_video():
    """Fails if a video brings all its questions, or fewer than it may."""
    many = about("1.mp4", *["red"] * 5)
    batches = batches_of(many, VIDEOS, pairs_per_video=3)
    _, asked = batches.samples_at(0)
    assert len(asked) == 3


def test_the_digest_names_all_that_is_said():
    """Fails if a word changes, of a video or of a text, and a resumed run would not notice."""
    said = batches_of(SAMPLES + TEXTS, VIDEOS).digest()
    assert said == batches_of(SAMPLES + TEXTS, VIDEOS).digest()
    for i, changed in ((0, "context"), (-1, "context"), (1, "answer"), (-1, "question")):
        samples = SAMPLES + TEXTS
        samples[i] = replace(samples[i], **{changed: "other"})
        assert batches_of(samples, VIDEOS).digest() != said


def test_vision_is_what_collate_features_returns():
    """Fails if the vision of a micro-batch is that of other rows."""
    batches = batches_of(SAMPLES, VIDEOS, text_share=0.0, micro_batch=4)
    ((_, vision),) = batches.step(0)
    expected = collate_features([batches.cache[f"{number}.mp4"] for number in (2, 4, 3, 1)])
    assert all(torch.equal(one, other) for one, other in zip(vision, expected, strict=True))
