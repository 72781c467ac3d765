"""The README's links into the code, and the sizes in its figure. After moving code: python tests/test_readme.py"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, FIGURE = ROOT / "README.md", ROOT / "notebooks" / "architecture.svg"
LINK = re.compile(r"\[`([\w.]+)`\]\((\w+\.py)(?:#L(\d+)-L(\d+))?\)")  # [`name`](file.py#L1-L2)


def lines_of(name, path):
    """First and last line of a function or class; a method is Class.method."""
    node = ast.parse((ROOT / path).read_text())
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            raise LookupError(f"{path} has no {name}")
    return node.lineno, node.end_lineno


def relink(text):
    """The same text; each link to a function or class has the lines where it stands today."""
    return LINK.sub(lambda link: "[`{}`]({}#L{}-L{})".format(*link.group(1, 2), *lines_of(*link.group(1, 2))), text)


def test_links_have_the_lines_of_what_they_name():
    text = README.read_text()
    wrong = [line for line, right in zip(text.splitlines(), relink(text).splitlines()) if line != right]
    assert not wrong, "run python tests/test_readme.py"


def test_relink_mends_lines_and_refuses_unknown_names():
    source = (ROOT / "vidreason.py").read_text().splitlines()
    links = relink("[`mask_pool`](vidreason.py), [`FusionCore.forward`](vidreason.py#L1-L2) and [x](y.py#L1-L2)")
    (a, b), (c, d) = ((int(first) - 1, int(last)) for first, last in re.findall(r"vidreason.py#L(\d+)-L(\d+)", links))
    assert source[a].startswith("def mask_pool(") and not source[b] and source[b - 1].startswith("    return ")
    assert source[c].startswith("    def forward(") and "# Eq. 4" in "".join(source[c:d]) and links.endswith("#L1-L2)")
    with pytest.raises(LookupError):
        relink("[`FusionCore.mask_pool`](vidreason.py)")


def test_every_equation_leads_to_code_that_mentions_it():
    rows = re.findall(r"^\| \d+ \| (Eq\. \d|Algorithm 1)[^|]*\|([^|]*)\|", README.read_text(), re.MULTILINE)
    assert {what for what, _ in rows} == {"Algorithm 1", *(f"Eq. {i}" for i in range(1, 7))}
    for what, links in rows:
        _, path, first, last = LINK.search(links).groups()
        assert what in "\n".join((ROOT / path).read_text().splitlines()[int(first) - 1 : int(last)]), what


def test_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text())
    assert len(pictures) >= 3 and all((ROOT / picture).is_file() for picture in pictures), pictures


def test_sizes_in_the_figure():
    """Each is written as toy | paper: of the presets, the toy's LLM and Llama-3-8B."""
    from vidreason import PRESETS

    def both(size):
        return " | ".join(size(PRESETS[name]) for name in ("toy", "paper"))

    toy_llm = json.loads((ROOT / "toy" / "weights" / "llm" / "config.json").read_text())
    sizes = {
        "F": both(lambda c: f"{c.num_clips} × {c.frames_per_clip}"),
        "P": both(lambda c: f"{(c.image_size // c.patch_size) ** 2} × {c.encoder_width}"),
        "K": "K: " + both(lambda c: f"{c.masks_per_keyframe}"),
        "Z_vision": "at most " + both(lambda c: f"{c.num_clips * (1 + c.masks_per_keyframe)} × {c.encoder_width}"),
        "layers": both(lambda c: f"× {c.fusion_layers}"),
        "queries": both(lambda c: f"{c.num_queries} × {c.fusion_width}"),
        "E_vision": both(lambda c: f"{c.num_queries} × {toy_llm['hidden_size'] if c.llm == 'llm' else 4096}"),
    }
    figure = FIGURE.read_text()
    assert not {name: size for name, size in sizes.items() if f"{size}</text>" not in figure}


if __name__ == "__main__":
    README.write_text(relink(README.read_text()))
