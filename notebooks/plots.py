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
    """An image, (H, W, 3) or (3, H, W), without ticks."""
    image = np.asarray(image)
    ax.imshow(image.transpose(1, 2, 0) if image.shape[0] == 3 else image, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)


def strip(images, titles, columns=8, size=1.2):
    """Small images in rows, each with a title above it."""
    rows = -(-len(images) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.25) * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        show(ax, image, title)
        ax.set_axis_on()
    plt.show()


def heat(ax, matrix, xlabel, ylabel, title="", numbers=False, **options):
    """A matrix as brightness, bright = large; numbers=True also writes each value."""
    matrix = np.asarray(matrix)
    picture = ax.imshow(matrix, aspect="auto", **{"cmap": "gray", **options})
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if numbers:
        for (y, x), value in np.ndenumerate(matrix):
            dark = picture.norm(value) < 0.5
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    return picture


def bars(ax, names, values, xlabel, errors=None):
    """Horizontal bars, each with its value at the end. errors: (low, high) of each, as absolute values."""
    y = np.arange(len(names))[::-1]
    spread = None if errors is None else np.abs(np.asarray(errors, float).T - np.asarray(values))
    ax.barh(y, values, color="0.75", edgecolor="black", xerr=spread, capsize=3)
    for at, value in zip(y, values, strict=True):
        ax.text(0, at, f" {value:.2f}", va="center", ha="left")
    ax.set(yticks=y, yticklabels=names, xlabel=xlabel)
