"""Pictures for the notebooks. Every one can be read without colour: by labels, markers, line styles and brightness."""

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

COLOURS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f"]  # distinct to colour-blind eyes too
MARKERS = ["o", "s", "^", "D", "v", "P"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3))]


def use_style():
    """Set the look of all pictures; lines differ by colour, dashes and marker at once."""
    plt.rcParams.update({
        "figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
        "axes.spines.right": False, "image.cmap": "viridis", "legend.frameon": False, "lines.markersize": 5,
        "figure.constrained_layout.use": True,
        "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=STYLES) + cycler(marker=MARKERS),
    })  # fmt: skip


def show(ax, image, title=""):
    """An image without ticks: (H, W, 3), (3, H, W) or brightness (H, W), uint8 or in [0, 1]."""
    ax.imshow(_picture(image), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set(visible=True, linewidth=0.5)


def _picture(image):
    """-> uint8, colours last, in coarse steps: a camera's noise would make up most of a notebook's bytes."""
    image = np.asarray(image)
    image = image.transpose(1, 2, 0) if image.shape[0] == 3 else image
    image = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
    return image // 8 * 8 + 4


def strip(images, titles, columns=8, size=1.2):
    """Small images in rows, each with a title above it."""
    rows = -(-len(images) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.25) * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, title in zip(axes.flat, images, titles, strict=False):  # the last row may be incomplete
        show(ax, image, title)
        ax.set_axis_on()
    plt.show()


def heat(ax, matrix, xlabel, ylabel, title="", numbers=False, **options):
    """A matrix as brightness, bright = large; numbers=True, or a format such as ".3f", also writes each value."""
    matrix = np.asarray(matrix)
    picture = ax.imshow(matrix, **{"aspect": "auto", "cmap": "gray", **options})
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if numbers:
        for (y, x), value in np.ndenumerate(matrix):
            dark = picture.norm(value) < 0.5
            text = format(value, ".2f" if numbers is True else numbers)
            ax.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    return picture


def bars(ax, names, values, xlabel, errors=None, form=".2f"):
    """Horizontal bars, each with its value written on it. errors: (low, high) of each, as absolute values."""
    y = np.arange(len(names))[::-1]
    spread = None if errors is None else np.abs(np.asarray(errors, float).T - np.asarray(values))
    ax.barh(y, values, color="0.75", edgecolor="black", xerr=spread, capsize=3)
    for at, value in zip(y, values, strict=True):
        ax.text(0, at, f" {value:{form}}", va="center", ha="left")
    ax.set(yticks=y, yticklabels=names, xlabel=xlabel)


def time_line(frames, starts, clip_ends, marked=(), title=""):
    """Frames (n, 3, H, W) where they stand in time, clips as brackets below, triangles at the marked seconds."""
    step = starts[1] - starts[0]
    _, ax = plt.subplots(figsize=(10, 1.7))
    for frame, start in zip(frames, starts, strict=True):
        extent = (start + 0.04 * step, start + 0.96 * step, 0, 0.92)
        ax.imshow(_picture(frame), extent=extent, aspect="auto", interpolation="nearest")
    for i, (begin, end) in enumerate(zip([0, *clip_ends[:-1]], clip_ends, strict=True)):
        ax.plot([begin + 0.02, begin + 0.02, end - 0.02, end - 0.02], [-0.1, -0.2, -0.2, -0.1], "k-", marker="")
        ax.text((begin + end) / 2, -0.3, f"clip {i}", ha="center", va="top")
    ax.plot(marked, [1.06] * len(marked), "kv", linestyle="none")
    ax.set_title(title, loc="left")
    ax.set(xlim=(-0.02, clip_ends[-1] + 0.02), ylim=(-0.65, 1.2), yticks=[], xlabel="time in seconds")
    ax.spines["left"].set_visible(False)
    plt.show()


def grid(ax, cells, **options):
    """Lines between the cells x cells patches of the square image in ax."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    style = {"color": "white", "lw": 0.8, "ls": "-", "marker": "", **options}
    for i in range(1, cells):
        ax.axvline(left + (right - left) * i / cells, **style)
        ax.axhline(top + (bottom - top) * i / cells, **style)


def box(ax, cell, cells, side, text="", **options):
    """A frame around one patch, counted row by row, of an image of side pixels."""
    size, (row, column) = side / cells, divmod(int(cell), cells)
    style = {"fill": False, "lw": 2.5, "edgecolor": "black", **options}
    ax.add_patch(plt.Rectangle((column * size - 0.5, row * size - 0.5), size, size, **style))
    ax.text((column + 0.5) * size, (row + 0.5) * size, text, ha="center", va="center", fontweight="bold")


def squares(ax, image, values, title="", largest=None):
    """The image, faded, and in each patch a black square whose area is the patch's value."""
    image, values = _picture(image) / 255, np.asarray(values)
    show(ax, 1 - 0.5 * (1 - image), title)
    cells, side = int(len(values) ** 0.5), len(image)
    size = side / cells
    edges = size * np.sqrt(values / (largest or values.max()))
    for i, edge in enumerate(edges):
        x, y = (i % cells + 0.5) * size - 0.5, (i // cells + 0.5) * size - 0.5
        ax.add_patch(plt.Rectangle((x - edge / 2, y - edge / 2), edge, edge, color="black", lw=0))


def outlines(ax, image, masks, title="", labels=None):
    """The image with a line around each mask (K, S, S) and its label, by default its number; labels=[]: none."""
    show(ax, image, title)
    masks = np.asarray(masks)
    for i, mask in enumerate(masks):
        ax.contour(mask, levels=[0.5], colors="black", linewidths=1.5, linestyles=["-", "--", ":"][i % 3])
    centres = [np.argwhere(mask).mean(0)[::-1] for mask in masks]
    labels = [str(i) for i in range(len(masks))] if labels is None else labels
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
    for place, text in _merged(centres[: len(labels)], labels, 6):
        ax.text(*place, text, ha="center", va="center", fontsize=7, bbox=white)


def _merged(points, texts, near):
    """-> [(point, text)], where points nearer than `near` to an earlier one add their text to that one's."""
    labels = []
    for point, text in zip(points, texts, strict=True):
        twin = next((label for label in labels if np.hypot(*(label[0] - point)) < near), None)
        if twin:
            twin[1] += f", {text}"
        else:
            labels.append([point, text])
    return labels


def tracks(ax, points, owners, seconds, names, colours):
    """Points (n, 2) of named things, joined in the order of time: own marker, own dashes, times beside them."""
    points, owners, seconds = np.asarray(points), np.asarray(owners), np.asarray(seconds)
    near = 0.04 * np.hypot(*np.ptp(points, axis=0))
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        mine = points[owners == i]
        ax.plot(*mine.T, color="0.4", marker="", linestyle=STYLES[i], lw=1)
        ax.plot(*mine.T, color=colour, marker=MARKERS[i], linestyle="none", markeredgecolor="black", label=name, ms=8)
        for point, text in _merged(mine, [f"{t:.1f}" for t in seconds[owners == i]], near):
            ax.annotate(f"{text} s", point, xytext=(6, 5), textcoords="offset points", fontsize=7)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


FILLS = {"vision": ("0.75", "////"), "prompt": ("white", ""), "answer": ("0.9", "...."), "padding": ("0.25", "")}


def row(ax, kinds, words, predicts=(), title=""):
    """The positions of one row of LLM input: what stands there, and above the boxes what it must predict, if anything.
    kinds: a key of FILLS for each position; words: its text; predicts: {position: word}."""
    for x, (kind, word) in enumerate(zip(kinds, words, strict=True)):
        fill, hatch = FILLS[kind]
        ax.bar(x, 1, 1, bottom=-1, color=fill, hatch=hatch, edgecolor="black", linewidth=0.5)
        label = {"facecolor": "white", "edgecolor": "none", "pad": 0.4} if kind == "answer" and word else None
        ax.text(x, -0.5, word, rotation=90, ha="center", va="center", fontsize=7, bbox=label)
    for x, word in dict(predicts).items():
        ax.annotate("", (x, 0.42), (x, 0), arrowprops={"arrowstyle": "->", "lw": 0.8})
        ax.text(x, 0.47, word, rotation=90, ha="center", va="bottom", fontsize=7)
    ax.set(xlim=(-0.5, len(kinds) - 0.5), ylim=(-1, 1.4 if predicts else 0), yticks=[], title=title)
    ax.spines["left"].set_visible(False)


def row_legend(ax, kinds):
    """What the boxes of `row` mean."""
    boxes = [plt.Rectangle((0, 0), 1, 1, facecolor=FILLS[k][0], hatch=FILLS[k][1], edgecolor="black") for k in kinds]
    ax.legend(boxes, kinds, loc="upper left", ncols=len(kinds), fontsize=7)


def pairs_of_bars(ax, words, values, names, ylabel):
    """For each word two or more bars side by side, told apart by brightness and hatch. values: (names, words)."""
    width, looks = 0.8 / len(names), [("0.2", ""), ("white", "////"), ("0.7", "....")]
    rows = zip(names, values, looks, strict=False)  # there are three looks, for two names or three
    for i, (name, heights, (fill, hatch)) in enumerate(rows):
        x = np.arange(len(words)) + (i - (len(names) - 1) / 2) * width
        ax.bar(x, heights, width, color=fill, hatch=hatch, edgecolor="black", linewidth=0.6, label=name)
    ax.set_xticks(range(len(words)), words, rotation=45, ha="right")
    ax.set_ylabel(ylabel)
    ax.legend()


def curve(ax, steps, values, ylabel, title="", window=10):
    """Each value in grey and the mean of the last `window` in black, on a logarithmic scale."""
    ax.plot(steps, values, "-", color="0.7", marker="", label="each step")
    smooth = np.convolve(values, np.ones(window) / window, "valid")
    ax.plot(steps[window - 1 :], smooth, "-", color="black", marker="", label=f"mean of {window} steps")
    ax.set(xlabel="optimiser step", ylabel=ylabel, title=title, yscale="log")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2) if min(values) / 1.3 < t < max(values) * 1.3]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.legend()
