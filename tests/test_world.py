"""The toy world keeps its own rules, its truths are true, and its checker can say no."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from toy import draw, language, world


@pytest.fixture(scope="module")
def clips():
    return [world.make_clip(0, i, "train") for i in range(150)]


@pytest.fixture(scope="module")
def held_out():
    return [world.make_clip(0, i, "test", held_out=True, cut=True) for i in range(12)]


def test_every_event_is_caused_by_an_earlier_one(clips):
    for clip in clips:
        for i, event in enumerate(clip.events):
            if event.type != "start" and event.cause is not None:
                assert event.cause < i
                assert clip.events[event.cause].time <= event.time
            if event.type in world.EFFECTS:
                assert clip.events[event.cause].type in ("hit", "wall"), "an effect without a cause"


def test_every_hit_has_the_outcome_the_rules_name(clips):
    checked = 0
    for clip in clips:
        outcomes = {(event.type, event.subject, event.cause) for event in clip.events}
        for i, hit in enumerate(clip.events):
            if hit.type == "hit":
                who, effect = world.outcome(*world.hit_kinds(clip, hit))
                affected = hit.subject if who == "mover" else hit.object
                assert (effect, affected, i) in outcomes
                checked += 1
    assert checked > 100


def test_things_stay_on_the_table_and_never_overlap_deeply(clips):
    for clip in clips:
        assert clip.trajectory.min() > 0 and clip.trajectory.max() < 1
        for i, j in itertools.combinations(range(len(clip.things)), 2):
            kinds = clip.things[i].kind, clip.things[j].kind
            if "hole" in kinds:
                continue
            whole = (clip.state[:, i] == world.WHOLE) & (clip.state[:, j] == world.WHOLE)
            gap = np.linalg.norm(clip.trajectory[:, i] - clip.trajectory[:, j], axis=-1)
            reach = world.RADIUS[kinds[0]] + world.RADIUS[kinds[1]]
            assert (gap[whole] > 0.6 * reach).all()


def test_what_rests_untouched_never_moves(clips):
    for clip in clips:
        touched = {event.subject for event in clip.events} | {event.object for event in clip.events}
        for i in set(range(len(clip.things))) - touched:
            assert np.ptp(clip.trajectory[:, i], axis=0).max() == 0
            assert language.motion_of(clip, i) == language.STILL


def test_nothing_comes_back_from_broken_or_gone(clips):
    for clip in clips:
        for states in clip.state.T:
            changes = np.flatnonzero(np.diff(states))
            assert len(changes) <= 1 and states[-1] >= states[0]


def test_speed_only_falls_between_events():
    ball = world.Thing("ball", "red", (0.2, 0.5), (0.3, 0.0), 0.0)
    clip = world.simulate([ball], frames=8)
    steps = np.diff(clip.trajectory[:, 0, 0])
    assert (steps > 0).all() and (np.diff(steps) < 0).all()
    cube = world.simulate([world.Thing("cube", "red", (0.2, 0.5), (0.3, 0.0), 0.0)], frames=8)
    assert np.allclose(np.diff(cube.trajectory[1:, 0, 0]), 0.3 / world.FPS, atol=1e-5)


def test_a_clip_is_a_pure_function_of_its_seed_and_streams_are_disjoint():
    one, same, other = (world.make_clip(3, 5, split) for split in ("train", "train", "test"))
    assert language.caption(one) == language.caption(same)
    frames = draw.render(one)[0]
    assert np.array_equal(frames, draw.render(same)[0])
    assert not np.array_equal(frames, draw.render(other)[0])


def test_no_training_video_shows_a_held_out_pair(clips, held_out):
    for clip in clips:
        assert world.may_share_table([thing.kind for thing in clip.things])
        assert "pop" not in [event.type for event in clip.events], "a balloon can only pop where a pin is"
    for clip in held_out:
        assert not world.may_share_table([thing.kind for thing in clip.things])


def test_cut_clips_end_before_the_hit_and_the_prediction_comes_true(clips, held_out):
    cut = [clip for clip in clips if clip.next_hit] + held_out
    assert len(cut) > 30
    for clip in cut:
        assert world.SECONDS <= clip.next_hit.time and clip.next_hit not in clip.visible
        hit, outcome = [event for event in clip.events if event.time >= clip.next_hit.time][:2]
        _, effect = world.outcome(*world.hit_kinds(clip, hit))
        assert outcome.type == effect
        assert language.prediction(clip).endswith(language.FUTURE[effect])


def test_noise_blurs_the_launch_and_nothing_else():
    ball = world.Thing("ball", "red", (0.2, 0.5), (0.4, 0.0), 0.1)
    box = world.Thing("box", "green", (0.5, 0.85))
    exact = world.simulate([ball, box]).trajectory
    for seed in range(3):
        noisy = world.simulate([ball, box], noise=0.02, rng=np.random.default_rng(seed)).trajectory
        assert 0 < np.abs(noisy[:6, 0] - exact[:6, 0]).max() < 0.1
        assert np.array_equal(noisy[:, 1], exact[:, 1])


def test_removing_an_onlooker_changes_nothing_and_the_hitter_everything():
    things = [
        world.Thing("ball", "red", (0.2, 0.5), (0.4, 0.0), 0.1),
        world.Thing("egg", "blue", (0.6, 0.5)),
        world.Thing("box", "green", (0.5, 0.85)),
    ]

    def story(without=None):
        return [(event.type, event.subject) for event in world.simulate(things, without=without).events]

    assert ("break", 1) in story()
    assert story(without=2) == story()
    assert ("break", 1) not in story(without=0)


def test_render_shows_each_thing_where_it_is(clips):
    for clip in clips[:20]:
        frames, owner = draw.render(clip)
        assert frames.shape == (16, 96, 96, 3) and frames.dtype == np.uint8
        for i, thing in enumerate(clip.things):
            ys, xs = np.where(owner[0] == i + 1)
            centre = np.array([xs.mean(), ys.mean()]) / world.SIZE
            assert len(xs) > 60 and np.abs(centre - clip.trajectory[0, i]).max() < 0.06, thing
        gone = np.flatnonzero(clip.state[-1] == world.GONE)
        assert not np.isin(owner[-1], gone + 1).any(), "what fell in is not drawn"


def test_answers_pass_their_own_checker_and_wrong_ones_fail(clips):
    swaps = (("red", "blue"), ("left", "right"), ("yes", "no"), ("ball", "box"), ("two", "three"))
    for truth in answers_of(clips):
        assert language.check(truth, truth)
        assert not language.check("", truth) and not language.check("i do not know", truth)
        for word, other in swaps:
            wrong = re.sub(rf"\b{word}\b", other, truth)
            assert wrong == truth or not language.check(wrong, truth)


def answers_of(clips):
    for clip in clips:
        for question in language.questions(clip):
            yield question["answer"]


@pytest.mark.parametrize(
    "given, truth, same",
    [
        ("The red ball hit it.", "the red ball hit it", True),
        ("the red egg breaks because the blue ball hits it", "the red egg broke because the blue ball hit it", True),
        ("because the red ball hit it", "because it hit the red ball", False),
        ("the blue ball hit it", "because the red ball hit it", False),
        ("the red ball will hit the blue egg", "the red ball will hit the blue egg and the blue egg will break", False),
        (
            "the red ball will hit the blue egg and the red ball will break",
            "the red ball will hit the blue egg and the blue egg will break",
            False,
        ),
        (
            "the blue egg will hit the red ball and the blue egg will break",
            "the red ball will hit the blue egg and the blue egg will break",
            False,
        ),
        ("yes no", "yes", False),
        ("there is no red ball", "the red ball did not move", False),
        ("the red ball did not move", "the red ball moved right", False),
        ("the red ball moves right", "the red ball moved right", True),
    ],
)
def test_checker(given, truth, same):
    assert language.check(given, truth) is same


def test_outcome_and_pair_checkers():
    truth = "the red pin will hit the blue balloon and the blue balloon will pop"
    assert language.check_outcome("the green pin will hit the red balloon and the red balloon will pop", truth)
    assert not language.check_outcome("the red pin will hit the blue balloon and the blue balloon will drift", truth)
    assert language.names_pair("the red pin will hit the blue balloon and the red pin will stop", truth)
    assert not language.names_pair("the blue balloon will hit the red pin and the blue balloon will pop", truth)
    like = "the red ball will hit the blue ball and the blue ball will roll"
    assert not language.check_outcome("the red ball will hit the blue ball and the red ball will roll", like)
    assert not language.check_outcome("", truth) and not language.names_pair("", truth)


def test_questions_need_the_video(clips):
    """No type's commonest answer covers more than two thirds of it."""
    answers = defaultdict(Counter)
    for clip in clips:
        for question in language.questions(clip):
            answers[question["type"]][question["answer"]] += 1
    for type_, given in answers.items():
        assert max(given.values()) / given.total() < 0.67, type_


def test_each_type_has_phrasings_and_a_maker(clips):
    """Fails if a maker makes a type that no `@asks` announces, or announces one that it never makes."""
    made = set()
    for clip in clips:
        made.update(question["type"] for question in language.questions(clip))
    assert made | {"held-out"} == set(language.QUESTIONS)


def test_the_papers_prompts_are_those_of_the_model():
    """Fails if a word differs: toy/language.py keeps copies, for importing the model takes seconds."""
    from vidreason import PREDICT_PROMPT, REASON_PROMPT

    assert language.REASON == REASON_PROMPT and language.PREDICT == PREDICT_PROMPT


def test_a_clip_is_written_to_the_same_bytes(tmp_path):
    frames, files = draw.render(world.make_clip(3, 1, "val"))[0], set()
    for i in range(12):
        draw.write_mp4(tmp_path / "clip.mp4", frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
        np.random.default_rng(i).bytes(50_000 * i)  # other memory, other leavings in it
    assert len(files) == 1


def test_command_writes_clips_that_decode_to_the_truth(tmp_path):
    from vidreason import read_video

    subprocess.run(
        [sys.executable, "-m", "toy.world", "--clips", "3", "--seed", "7", "--out", str(tmp_path)],
        check=True,
        capture_output=True,
    )
    records = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert {"id", "video", "question", "answer", "type", "events"} <= records[0].keys()
    for index, name in enumerate(sorted({r["video"] for r in records})):
        frames, times, _ = read_video(tmp_path / name, 4, 4, 96)
        truth = draw.render(world.make_clip(7, index, "train"))[0].transpose(0, 3, 1, 2)
        assert np.abs(frames.flatten(0, 1).numpy().astype(int) - truth).mean() < 6
        assert np.allclose(times.flatten(), np.arange(16) / 4, atol=1e-3)
