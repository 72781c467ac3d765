"""The picture that is on screen at a second, from every container: every picture of these films carries its number.

The 46 films of fixtures/video do what real files do; expected.json says what is shown when, from how each was put
together, not from any decoder. Beside them stand random films: 20 here, 200 with `python -m pytest -m slow
tests/test_video.py`, where VIDREASON_SEED chooses others.
"""

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import vidreason
from vidreason import VidReasonError, read_video

FILMS = Path(__file__).resolve().parent / "fixtures" / "video"
CASES = json.loads((FILMS / "expected.json").read_text(encoding="utf-8"))
SEED = int(os.environ.get("VIDREASON_SEED", 0))
SIDE = 96  # of the frames that read_video is asked for


# ------------------------------------------------------------------------------------- pictures that carry a number


def draw_card(number):
    """4 x 4 cells (4, 4, 3): corners red, white, black, black; in the others 10 bits and 2 of their number of ones."""
    cells = np.zeros((4, 4, 3), np.uint8)
    bits = [int(bit) for bit in f"{number:010b}{number.bit_count() % 4:02b}"]
    inner = [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]
    cells.reshape(16, 3)[inner] = 255 * np.array(bits, np.uint8)[:, None]
    cells[0, 0], cells[0, 3] = (255, 0, 0), 255
    return cells


def draw_picture(number, width, height, aspect):
    """Grey, with a card in the middle that is square where pixels are `aspect` times as wide as high."""
    picture = np.full((height, width, 3), 128, np.uint8)
    side = int(0.6 * min(width * aspect, height)) // 8 * 8
    across = round(side / aspect)
    rows = np.arange(side) * 4 // side
    columns = np.arange(across) * 4 // across
    top, left = (height - side) // 2, (width - across) // 2
    picture[top : top + side, left : left + across] = draw_card(number)[rows][:, columns]
    return picture


def read_card(picture):
    """Picture (H, W, 3) uint8 -> its number (None: cannot be read), turn (0: upright), width / height of the card."""
    coloured = np.abs(picture.astype(int) - 128).max(2) > 64
    edges = []
    for axis in (1, 0):
        line = coloured.sum(axis)
        edges.append(np.flatnonzero(line > max(8, line.max() / 2)))
    rows, columns = edges
    if not len(rows) or not len(columns):
        return None, None, None
    card = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
    cells = np.zeros((4, 4, 3))
    for row, column in np.ndindex(4, 4):
        y, x = (4 * row + 1) * len(card) // 16, (4 * column + 1) * card.shape[1] // 16
        below, beside = (4 * row + 3) * len(card) // 16, (4 * column + 3) * card.shape[1] // 16
        cells[row, column] = card[y:below, x:beside].mean((0, 1))
    ratio = card.shape[1] / card.shape[0]
    for turn in range(8):  # quarter turns that make it upright; from 4 on those of its mirror image
        grid = np.rot90(cells[:, ::-1] if turn > 3 else cells, turn % 4)
        is_red = grid[0, 0, 0] - grid[0, 0, 2] > 80
        if is_red and grid[0, 3].min() > 170 and grid[3, [0, 3]].max() < 85:
            levels = grid.mean(2).ravel()[[1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]]
            number, ones = divmod(int((levels > 128) @ (1 << np.arange(12)[::-1])), 4)
            clear = np.abs(levels - 128).min() > 60 and number.bit_count() % 4 == ones
            return number if clear else None, turn, ratio
    return None, None, ratio


def read_numbers(path, clips, frames):
    """read_video -> the numbers that its frames show, their times; every picture upright and in shape."""
    shown, times, keyframes = read_video(path, clips, frames, SIDE)
    numbers = []
    for picture in [*shown.flatten(0, 1).permute(0, 2, 3, 1).numpy(), *keyframes]:
        number, turn, ratio = read_card(picture)
        assert number is not None, "a picture without a number that can be read"
        assert turn == 0, f"turned: {turn}"
        assert 1 / 1.1 < ratio < 1.1, f"stretched: {ratio}"
        numbers.append(number)
    total = clips * frames
    assert numbers[total:] == numbers[frames // 2 : total : frames], "keyframes are not the middle frames"
    return numbers[:total], times.flatten().tolist()


# ------------------------------------------------------------------------------------- the films of fixtures/video


def fits(case, answer, numbers, times):
    """Whether these frames are on screen then, by one way of counting time."""
    starts = {number: start + answer["zero"] for number, start in case["timeline"]}
    for number, time, allowed in zip(numbers, times, answer["allowed"], strict=True):
        if number not in allowed or abs(time - starts[number]) > case["time_tolerance"]:
            return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_on_screen(name):
    case = CASES[name]
    for ask in case["ask"]:
        try:
            numbers, times = read_numbers(f"{FILMS / name}{ask['span']}", ask["clips"], ask["frames"])
        except VidReasonError as error:
            assert case["error"] != "never", error
            continue
        assert case["error"] != "only", "pictures of what cannot be shown"
        assert any(fits(case, answer, numbers, times) for answer in ask["answers"]), (numbers, times)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_reader_that_is_one_frame_off_would_be_caught(shift):
    """The judge itself: one frame early or late is wrong in every film with more than one picture."""
    judged = 0
    for case in CASES.values():
        numbers = [number for number, _ in case["timeline"]]
        if case["error"] == "only" or len(numbers) < 2:
            continue
        starts = dict(case["timeline"])
        answer = case["ask"][0]["answers"][0]
        nearest = [allowed[-1 if shift > 0 else 0] for allowed in answer["allowed"]]
        wrong = [numbers[(numbers.index(number) + shift) % len(numbers)] for number in nearest]
        assert not fits(case, answer, wrong, [starts[number] + answer["zero"] for number in wrong])
        judged += 1
    assert judged == 44


# ------------------------------------------------------------------------------------- random films

EVEN = "even"  # the format has one frame rate
FREE = "free"  # each picture has a time of its own
FORMATS = {  # name -> (how it tells time, codecs, may it start late)
    "mp4": (FREE, ["libx264", "libx265", "mpeg4", "libvpx-vp9"], True),
    "mov": (FREE, ["libx264", "mpeg4", "mjpeg", "prores"], True),
    "matroska": (FREE, ["libx264", "libx265", "libvpx", "libvpx-vp9", "mpeg2video", "ffv1"], True),
    "webm": (FREE, ["libvpx", "libvpx-vp9"], True),
    "mpegts": (FREE, ["libx264", "mpeg2video", "libx265"], True),
    "vob": (EVEN, ["mpeg2video", "mpeg1video"], False),
    "avi": (EVEN, ["mpeg4", "libx264", "mjpeg", "ffv1"], False),
    "asf": (EVEN, ["wmv2", "wmv1"], False),
    "flv": (FREE, ["flv", "libx264"], True),
    "nut": (FREE, ["libx264", "mpeg4", "ffv1"], True),
    "gif": (FREE, ["gif"], False),
}
B_FRAMES = ("libx264", "libx265", "mpeg4", "mpeg2video")
KEEP_ASPECT = ("libx264", "libx265", "mpeg4")  # MPEG-2 knows a few aspects of the whole picture only
PIXELS = {"mjpeg": "yuvj420p", "prores": "yuv422p10le", "gif": "rgb8"}


def make_film(rng, folder):
    """A film of 20 to 90 numbered pictures -> (path, its settings for messages, starts in seconds, usual step)."""
    name = str(rng.choice(list(FORMATS)))
    timing, codecs, may_start_late = FORMATS[name]
    codec = str(rng.choice(codecs))
    count, rate = int(rng.integers(20, 91)), int(rng.choice([10, 12, 25, 30]))
    if timing == EVEN or codec in ("mpeg2video", "mpeg1video"):
        rate = 25
    uneven = timing == FREE and codec not in ("mpeg2video", "mpeg4", "prores") and rng.random() < 0.5
    steps = rng.choice([1, 1, 2, 5], count) if uneven else np.ones(count, int)
    ticks = np.concatenate([[0], np.cumsum(steps)])[:-1]
    late = int(rate * rng.choice([0, 3])) if may_start_late else 0
    aspect = Fraction(str(rng.choice(["1", "2", "1/2", "4/3"]))) if codec in KEEP_ASPECT else Fraction(1)
    width, height = (int(side) for side in rng.choice([128, 176, 240, 320], 2))
    options = {"g": str(rng.choice([1, 8, 24, 250]))}
    if codec in B_FRAMES:
        options["bf"] = str(rng.integers(0, 4))
    if codec in ("libx264", "libx265"):
        options["preset"] = "ultrafast" if rng.random() < 0.3 else "veryfast"
        closed = "" if rng.random() < 0.5 else "open-gop=1"
        options[f"{codec[3:]}-params"] = f"{closed}:bframes={options['bf']}".strip(":")
    if codec in ("libvpx", "libvpx-vp9"):
        options |= {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}
    told = f"{name} {codec} {width}x{height} rate {rate} {count} pictures late {late} aspect {aspect} {options}"

    path = folder / f"film.{name}"
    with av.open(str(path), "w", format=name) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, PIXELS.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.thread_count = 1
        if codec not in ("ffv1", "gif", "prores"):
            stream.bit_rate = 8_000_000
        if aspect != 1:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(draw_picture(number, width, height, float(aspect)), format="rgb24")
            frame.pts, frame.time_base = int(tick) + late, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path, told, ticks / rate, 1 / rate


def check_film(seed, folder):
    """A random film shows at each asked time the picture that is on screen then."""
    rng = np.random.default_rng((20261128, SEED, seed))
    path, told, starts, step = make_film(rng, folder)
    clips, frames = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    total = clips * frames
    numbers, times = read_numbers(path, clips, frames)
    for place, (number, time) in enumerate(zip(numbers, times, strict=True)):
        assert abs(time - starts[number]) < 0.5 * step, (told, place, number, time)
        # how long the last picture stays is a matter of one frame, and containers round their times
        early = starts[-1] * (place + 0.5) / total - 0.3 * step
        late = (starts[-1] + 2 * step) * (place + 0.5) / total + 0.3 * step
        goes = starts[number + 1] if number + 1 < len(starts) else np.inf
        assert starts[number] <= late and goes > early, (told, place, numbers, starts.tolist())


@pytest.mark.parametrize("seed", range(20))
def test_random_films(seed, tmp_path):
    check_film(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 220))
def test_many_random_films(seed, tmp_path):
    check_film(seed, tmp_path)


# ------------------------------------------------------------------------------------- the way, not only the pictures


def make_plain_film(path, count=120, rate=4, width=320, height=240, **options):
    """Numbered pictures as H.264 in mp4, with B-frames and a keyframe every 24 pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "24", "bf": "2", **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 8_000_000
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(draw_picture(number, width, height, 1.0), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_sparse_reading_jumps_and_never_falls_back(tmp_path, monkeypatch):
    """Fails if a jump misses its keyframe, more than the pictures near the wanted ones are decoded, or another picture
    is announced than is on screen: each time the slow way would give the right pictures all the same."""
    path = make_plain_film(tmp_path / "film.mp4")
    passes, decoded = [], []
    watch, decode = vidreason.watch, vidreason.decode

    def counted_watch(*args):
        passes.append(args)
        return watch(*args)

    def counted_decode(*args):
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(vidreason, "watch", counted_watch)
    monkeypatch.setattr(vidreason, "decode", counted_decode)
    numbers, times = read_numbers(path, 2, 1)  # at 7.5 and 22.5 s: pictures 30 and 90, the moment they come on screen
    assert numbers == [30, 90] and times == [7.5, 22.5]
    assert len(passes) == 1 and len(decoded) < 60


def test_large_pictures_are_shrunk_in_shape(tmp_path):
    """Fails if a picture larger than asked for is stretched, or its short side gets another length."""
    path = make_plain_film(tmp_path / "film.mp4", count=8, width=640, height=320)
    numbers, _ = read_numbers(path, 2, 2)
    assert numbers == [1, 3, 5, 7]
    _, _, keyframes = read_video(path, 2, 2, SIDE, keyframe_size=100)
    assert [keyframe.shape for keyframe in keyframes] == [(100, 100, 3)] * 2
    timeline = vidreason.read_timeline(path)
    _, pictures = vidreason.pictures_at(path, timeline, np.array([0.3]), 160)
    assert pictures[0].shape == (3, 160, 320)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_length_of_a_film_of_few_pictures(tmp_path, count):
    """Fails if the last picture's length is lost, or taken from another film's rate."""
    timeline = vidreason.read_timeline(make_plain_film(tmp_path / "film.mp4", count=count))
    assert timeline.end == pytest.approx(count / 4) and len(timeline.starts) == count
