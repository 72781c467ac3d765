"""The toy world keeps its own rules, its truths are true, and its checker can say no."""

import json
import subprocess
import sys

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
            if event.type != "start":
                assert event.cause is None or event.cause < i
                assert event.cause is None or clip.events[event.cause].time <= event.time
        effects = [e for e in clip.events if e.type in world.EFFECTS]
        assert all(clip.events[e.cause].type in ("hit", "wall") for e in effects), "an effect without a cause"


def test_every_hit_has_the_outcome_the_rules_name(clips):
    checked = 0
    for clip in clips:
        for i, hit in enumerate(clip.events):
            if hit.type == "hit":
                who, effect = world.outcome(*world.hit_kinds(clip, hit))
                affected = hit.subject if who == "mover" else hit.object
                assert any(e.type == effect and e.subject == affected and e.cause == i for e in clip.events)
                checked += 1
    assert checked > 100


def test_things_stay_on_the_table_and_never_overlap_deeply(clips):
    for clip in clips:
        assert clip.trajectory.min() > 0 and clip.trajectory.max() < 1
        for i, a in enumerate(clip.things):
            for j, b in enumerate(clip.things[:i]):
                whole = (clip.state[:, i] == 0) & (clip.state[:, j] == 0)
                gap = np.linalg.norm(clip.trajectory[:, i] - clip.trajectory[:, j], axis=-1)
                if "hole" not in (a.kind, b.kind):
                    assert (gap[whole] > 0.6 * (world.RADIUS[a.kind] + world.RADIUS[b.kind])).all()


def test_what_rests_untouched_never_moves(clips):
    for clip in clips:
        touched = {e.subject for e in clip.events} | {e.object for e in clip.events}
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
    a, b, other = (world.make_clip(3, 5, s) for s in ("train", "train", "test"))
    assert language.caption(a) == language.caption(b) and np.array_equal(draw.render(a)[0], draw.render(b)[0])
    assert not np.array_equal(draw.render(a)[0], draw.render(other)[0])


def test_no_training_video_shows_a_held_out_pair(clips, held_out):
    assert all(world.may_share_table([t.kind for t in c.things]) for c in clips)
    assert not any(world.may_share_table([t.kind for t in c.things]) for c in held_out)
    assert all("pop" not in [e.type for e in c.events] for c in clips), "a balloon can only pop where a pin is"


def test_cut_clips_end_before_the_hit_and_the_prediction_comes_true(clips, held_out):
    cut = [c for c in clips if c.next_hit] + held_out
    assert len(cut) > 30
    for clip in cut:
        assert world.SECONDS <= clip.next_hit.time and clip.next_hit not in clip.visible
        later = [e for e in clip.events if e.time >= clip.next_hit.time]
        who, effect = world.outcome(*world.hit_kinds(clip, later[0]))
        assert later[1].type == effect
        assert language.prediction(clip).split()[-1 if effect != "fall" else -2] == language.FUTURE[effect].split()[1]


def test_noise_blurs_the_launch_and_nothing_else():
    things = [world.Thing("ball", "red", (0.2, 0.5), (0.4, 0.0), 0.1), world.Thing("box", "green", (0.5, 0.85))]
    exact = world.simulate(things).trajectory
    noisy = [world.simulate(things, noise=0.02, rng=np.random.default_rng(i)).trajectory for i in range(3)]
    assert all(0 < np.abs(t[:6, 0] - exact[:6, 0]).max() < 0.1 for t in noisy)
    assert all(np.array_equal(t[:, 1], exact[:, 1]) for t in noisy)


def test_removing_an_onlooker_changes_nothing_and_the_hitter_everything():
    things = [
        world.Thing("ball", "red", (0.2, 0.5), (0.4, 0.0), 0.1),
        world.Thing("egg", "blue", (0.6, 0.5)),
        world.Thing("box", "green", (0.5, 0.85)),
    ]
    story = [(e.type, e.subject) for e in world.simulate(things).events]
    assert ("break", 1) in story
    assert [(e.type, e.subject) for e in world.simulate(things, without=2).events] == story
    assert ("break", 1) not in [(e.type, e.subject) for e in world.simulate(things, without=0).events]


def test_render_shows_each_thing_where_it_is(clips):
    for clip in clips[:20]:
        frames, owner = draw.render(clip)
        assert frames.shape == (16, 96, 96, 3) and frames.dtype == np.uint8
        for i, thing in enumerate(clip.things):
            ys, xs = np.where(owner[0] == i + 1)
            centre = np.array([xs.mean(), ys.mean()]) / world.SIZE
            assert len(xs) > 60 and np.abs(centre - clip.trajectory[0, i]).max() < 0.06, thing
        assert (owner[-1][..., None] != np.flatnonzero(clip.state[-1] == 3) + 1).all(), "what fell in is not drawn"


def test_answers_pass_their_own_checker_and_wrong_ones_fail(clips):
    asked = [q for c in clips for q in language.questions(c)]
    for q in asked:
        assert language.check(q["answer"], q["answer"])
        assert not language.check("", q["answer"]) and not language.check("i do not know", q["answer"])
        for swap in (("red", "blue"), ("left", "right"), ("yes", "no"), ("ball", "box"), ("two", "three")):
            wrong = " ".join(swap[1] if w == swap[0] else w for w in q["answer"].split())
            assert wrong == q["answer"] or not language.check(wrong, q["answer"])


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
    answers = {}
    for clip in clips:
        for q in language.questions(clip):
            answers.setdefault(q["type"], []).append(q["answer"])
    for type_, given in answers.items():
        assert max(map(given.count, set(given))) / len(given) < 0.67, type_


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
