"""The READMEs against what they speak of: links, figures of the result files, sizes in the picture.

After moving code or measuring anew, `python tests/test_readme.py` renews links and tables; figures in sentences are
mended by hand.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]  # the front room, and the rooms' own
README, TOY = ROOT / "README.md", ROOT / "toy" / "README.md"
FIGURE = ROOT / "notebooks" / "architecture.svg"
RESULTS, ABLATIONS = ROOT / "toy" / "results.json", ROOT / "toy" / "ablations.json"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)(?:#L(\d+)-L(\d+))?\)")  # [`name`](file.py#L1-L2)


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


def test_links_between_pages_lead_somewhere():
    """Fails if a page names a file that is not there, or a heading that another page does not have."""
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]*(?:#[^)]*)?)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
                broken.append((page.relative_to(ROOT), target))
    assert not broken


def anchors_of(page):
    """What GitHub makes of headings: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_room_is_small():
    """Fails if README.md grows beyond about 12 kB, where a room's own README would do."""
    assert README.stat().st_size < 14_500


def test_no_table_of_figures_stands_twice():
    """Fails if a line of a table with a figure is on two pages."""
    lines = Counter(line for page in PAGES for line in set(page.read_text().splitlines()))
    assert not [line for line, times in lines.items() if times > 1 and line.startswith("| ") and re.search(r"\d", line)]


def test_every_equation_leads_to_code_that_mentions_it():
    rows = re.findall(r"^\| \d+ \| (Eq\. \d|Algorithm 1)[^|]*\|([^|]*)\|", README.read_text(), re.MULTILINE)
    assert {what for what, _ in rows} == {"Algorithm 1", *(f"Eq. {i}" for i in range(1, 7))}
    for what, links in rows:
        _, path, first, last = LINK.search(links).groups()
        assert what in "\n".join((ROOT / path).read_text().splitlines()[int(first) - 1 : int(last)]), what


# ------------------------------------------------------------------------- figures that stand in a result file


def streams():
    """The toy's tables by seed."""
    return json.loads(RESULTS.read_text())["streams"]


def variants():
    """The rows of the ablation table by name."""
    return json.loads(ABLATIONS.read_text())["variants"]


def three(value):
    """.9767 -> "0.977"; nothing measured: an empty cell."""
    return "" if value is None else f"{value:.3f}"


def bare(value, digits=3):
    """.9767 -> ".977", as sentences have it."""
    return f"{value:.{digits}f}".lstrip("0")


def span(interval):
    return "{:.3f} – {:.3f}".format(*interval)


def toy_cells(row):
    """A row of the toy's table, without its first and its last cell."""
    columns = ("option", "blind", "black", "shuffled", "one_frame", "majority")
    measured = [three(row.get(f"{column}_accuracy")) for column in columns]
    return [three(row["accuracy"]), span(row["interval"]), *measured, str(row["n"])]


def ablation_cells(row):
    """A row of the ablation table, without its first cell."""
    against = ""
    if "difference" in row:
        against = "{:+.3f} ({:+.3f} – {:+.3f})".format(row["difference"], *row["difference_interval"])
    kinds = ("why", "explain", "predict", "held-out", "direction", "order", "first")
    accuracies = [f"{row['by_type'][kind]['accuracy']:.2f}" for kind in kinds]
    pair = "{outcome_right} of {named}".format(**row["held_out"])
    seeds = " ".join(three(seed) for seed in row["seeds"])
    return [three(row["accuracy"]), span(row["interval"]), against, *accuracies, pair, seeds]


def retable(text):
    """The same text with the figures of the result files in both tables."""
    toy, ablations, lines = streams()["13"]["rows"], variants(), text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and cells[0] in toy:
            lines[number] = table_line([cells[0], *toy_cells(toy[cells[0]]), cells[-1]])
        elif line.startswith("| ") and cells[0] in ablations:
            lines[number] = table_line([cells[0], *ablation_cells(ablations[cells[0]])])
    return "".join(lines)


def table_line(cells):
    return "|" + "|".join(f" {cell} " if cell else "  " for cell in cells) + "|\n"


def rows_of(text, names):
    """The first cells of the table lines that begin with one of `names`."""
    found = re.findall(r"^\| ([^|]+?) +\|", text, re.MULTILINE)
    return [name for name in found if name in names]


def sentences(page=TOY):
    """A page without line breaks, so that a figure is found wherever its line ends."""
    return " ".join(page.read_text().split())


def test_tables_are_those_of_the_result_files():
    text, toy = TOY.read_text(), streams()["13"]["rows"]
    assert sorted(rows_of(text, toy)) == sorted(toy)
    assert rows_of(text, variants()) == list(variants())
    wrong = [line for line, right in zip(text.splitlines(), retable(text).splitlines()) if line != right]
    assert not wrong, "run python tests/test_readme.py"


def outcomes(stream, kind):
    """Of the predictions that name the right pair: how many have the right outcome, how many there are."""
    row = stream["rows"][kind]
    return round(row["pair_named"] * row["outcome_where_named"]), row["pair_named"]


def test_sentences_about_the_toy_have_the_figures_of_the_result_file():
    first, second = streams()["13"], streams()["14"]
    rows, more = first["rows"], second["rows"]
    kinds = ("why", "bare why", "explain", "predict")
    shuffled = [f"*{kind}* {bare(rows[kind]['shuffled_accuracy'])}" for kind in kinds]
    (right, named), (met, known) = outcomes(first, "predict"), outcomes(first, "held-out")
    without = rows["counterfactual"]
    majority = round(without["majority_accuracy"] * without["n"])
    (again, also), (fresh, seen) = outcomes(second, "predict"), outcomes(second, "held-out")
    outcome, literal = rows["predict"]["outcome_accuracy"], rows["predict"]["accuracy"]
    told = [
        f"a shuffled video keeps {bare(rows['all together']['shuffled_accuracy'])}",
        ", ".join(shuffled),
        f'"{without["majority_answer"]}" is right in {majority} of {without["n"]}',
        f"Of the predictions, {bare(outcome)} get the outcome right",
        f"(who is affected and how), {bare(literal)} word for word",
        f"where the right pair is named, {right} of {named}",
        f"the right pair is named in {known} of {rows['held-out']['n']}, and the outcome is right in {met} of these",
        f"(`--seed 14 --clips 300`, n {more['all together']['n']})",
        f"gives {bare(more['all together']['accuracy'])} together",
        f'"which way" {bare(more["direction"]["accuracy"])}, "without Z" {bare(more["counterfactual"]["accuracy"])}',
        f"the outcome right in {fresh} of {seen} held-out pairs that were named, and in {again} of {also} others",
    ]
    assert not [words for words in told if words not in sentences()]
    assert min(rows, key=lambda kind: rows[kind]["accuracy"]) == "explain" and 'Weakest: "explain"' in sentences()


def test_result_file_is_of_the_shipped_weights_and_of_the_commands_in_the_readme():
    shipped = json.loads((ROOT / "toy" / "weights" / "provenance.json").read_text())["sha256"]
    for seed, clips in (("13", 200), ("14", 300)):
        stream = streams()[seed]
        assert {name: shipped[name] for name in stream["weights_sha256"]} == stream["weights_sha256"]
        assert stream["command"] == f"python evaluate.py toy --seed {seed} --clips {clips}"
        assert f"--seed {seed} --clips {clips}`" in sentences()
        assert stream["missing"] == stream["unreadable"] == 0
    assert RESULTS.stat().st_size < 300_000


def test_sentences_about_the_ablations_have_the_figures_of_the_result_file():
    told = json.loads(ABLATIONS.read_text())["settings"]
    rows = variants()
    full, without = rows["full"]["by_type"], rows["w/o synthetic data"]["by_type"]
    small, clock = rows["smaller LLM"], rows["w/o time embedding"]
    pair = {name: "{outcome_right} of {named}".format(**rows[name]["held_out"]) for name in rows}
    order = [row["by_type"]["order"]["accuracy"] for row in rows.values()]
    phrases = [
        f"--clips {told['clips']} --seed {told['seed']}",
        f"{told['steps']['llm']} steps for an LLM, {told['steps']['1']} + {told['steps']['2']} for stages 1 and 2",
        f'"explain" falls from {two(full, "explain")} to {two(without, "explain")}',
        f'"predict" from {two(full, "predict")} to {two(without, "predict")}',
        f"moves ({rows['w/o synthetic data']['difference']:+.3f}, and seeds overlap)".replace("0.", "."),
        f"no average ({rows['w/o world knowledge']['difference']:+.3f}, and seeds overlap)".replace("0.", "."),
        f"right in {pair['full']} with an LLM that read about it, in {pair['w/o world knowledge']} with one",
        f"{bare(small['accuracy'])} against {bare(rows['full']['accuracy'])} for the same number of steps",
        f"more directions ({two(small['by_type'], 'direction')} against {two(full, 'direction')})",
        f"without it span {bare(min(clock['seeds']))} to {bare(max(clock['seeds']))}",
        f'"order" has {bare(min(order), 2)} to {bare(max(order), 2)} in all rows',
    ]
    assert not [words for words in phrases if words not in sentences()]


def two(by_type, kind):
    return bare(by_type[kind]["accuracy"], 2)


def test_what_the_readme_calls_shown_is_shown_by_its_own_rule():
    """The interval of the difference excludes zero, and no seed lies among those of "full"."""
    full = variants()["full"]["seeds"]
    shown = {
        name
        for name, row in variants().items()
        if "difference" in row and row["difference_interval"][1] < 0 and max(row["seeds"]) < min(full)
    }
    assert shown == {"w/o fusion core", "w/o object features", "w/o stage 2", "smaller LLM"}
    (line,) = re.findall(r"- \*\*Shown\*\*: .*?(?= - \*\*)", sentences())
    assert all(part in line for part in ("fusion core", "object features", "stage 2")) and "LLM" not in line
    for name in ("w/o synthetic data", "w/o world knowledge"):
        seeds = variants()[name]["seeds"]
        assert min(seeds) < max(full) and max(seeds) > min(full), "seeds overlap"


MEMORY_OF_RECORDS = """
import sys, tracemalloc
from pathlib import Path
from types import SimpleNamespace
from data.batches import Batches
from data.benchmarks import read_samples
from data.features import FeatureCache

folder = Path(sys.argv[1])
tracemalloc.start()
kept = [read_samples(str(folder / "webvid.csv")), FeatureCache(folder)]
kept.append(Batches(SimpleNamespace(seed=0, batch=8, videos=folder), *kept, tokenizer=None, num_queries=32))
print(tracemalloc.get_traced_memory()[0])
"""


def test_memory_of_a_record(tmp_path):
    """Bytes of a WebVid record with its place in batches and in the index of features, as Python counts them: in a
    process of its own, and 1.1 to 1.3 kB from Python 3.10 to 3.13."""
    n, words = 20_000, ("a man who walks with his dog along the sea at sunset", "slow motion of rain on green leaves")
    rows = [f"{10**7 + i},{i // 1000:06d}_{i // 1000 + 50:06d},{words[i % 2]} number {i}" for i in range(n)]
    (tmp_path / "webvid.csv").write_text("\n".join(["videoid,page_dir,name", *rows]))
    videos = [f"{i // 1000:06d}_{i // 1000 + 50:06d}/{10**7 + i}.mp4" for i in range(n)]
    index = {"videos": videos, "counts": [68] * n, "sizes": [10**6 + i for i in range(n)], "bad": {}}
    (tmp_path / "shard-0000-0-000000.json").write_text(json.dumps(index))
    command = [sys.executable, "-c", MEMORY_OF_RECORDS, tmp_path]
    measured = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) / n / 1000
    (figure,) = re.findall(r"about (\d\.\d) kB each with the index of features", sentences(README))
    assert abs(measured - float(figure)) < 0.2, measured


# ----------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_there():
    for page, least in ((README, 3), (TOY, 1)):
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
        assert len(pictures) >= least and all((page.parent / picture).is_file() for picture in pictures), pictures


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
    TOY.write_text(retable(TOY.read_text()))
