"""The notebooks: each runs as its source stands, and the committed .ipynb is what building that source gives."""

import re
from collections import defaultdict

import nbformat
import pytest

import build

NOTEBOOKS = [path.stem for path in build.sources()]
DECIMAL = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?|[-+]?\d+e[-+]?\d+|[-+]?\d+\.(?=[,\]])", re.IGNORECASE)


def stored(name):
    return nbformat.read(build.HERE / f"{name}.ipynb", as_version=4)


def mask(text):
    """Decimals differ in their last digits from machine to machine; whole numbers, such as shapes, must not."""
    return re.sub(" +", " ", DECIMAL.sub("#", text))


def shown(cell):
    """What a cell put out: its masked text by stream, and how many pictures."""
    texts, pictures = defaultdict(str), 0
    for output in cell.outputs:
        if output.output_type == "stream":
            texts[output.name] += mask(output.text)
        elif "image/png" in output.data:
            pictures += 1
        else:
            texts["result"] += mask(output.data["text/plain"])
    return dict(texts), pictures


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_and_stored_outputs_match(name):
    again, before = build.execute(build.read(build.HERE / f"{name}.py")), stored(name)
    sources = [[(c.id, c.source, c.metadata) for c in notebook.cells] for notebook in (again, before)]
    assert sources[0] == sources[1], "edited since it was built: run notebooks/build.py"
    for new, old in zip(again.cells, before.cells, strict=True):
        if new.cell_type == "code" and not {"timing", "volatile"} & set(new.metadata.get("tags", [])):
            assert shown(new) == shown(old), f"cell {new.id} puts out something else: run notebooks/build.py"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_what_every_notebook_needs(name):
    notebook, path = stored(name), build.HERE / f"{name}.ipynb"
    first, code = notebook.cells[0].source, [c for c in notebook.cells if c.cell_type == "code"]
    assert re.search(r"^\*\*Question\.\*\*(.|\n(?!\n))+\?", first, re.MULTILINE)
    assert re.search(r"^\*\*Run time\.\*\* .+(second|minute)", first, re.MULTILINE)
    assert f"({build.HOSTED}/{name}.ipynb)" in first
    at = NOTEBOOKS.index(name)
    for neighbour in NOTEBOOKS[max(0, at - 1) : at] + NOTEBOOKS[at + 1 : at + 2]:
        assert f"({neighbour}.ipynb)" in first
    solutions = [c for c in code if "solution" in c.metadata.get("tags", [])]
    assert len(solutions) >= 2
    assert all("assert " in c.source and c.metadata["jupyter"]["source_hidden"] for c in solutions)
    assert "from vidreason import" in "\n".join(c.source for c in code)
    assert len([c for c in code if "assert " in c.source]) > len(solutions), "nothing is checked outside the exercises"
    assert max(c.source.count("\n") + 1 for c in code) <= 30
    assert all(c.execution_count == i for i, c in enumerate(code, 1)), "executed out of order"
    assert not any(output.get("name") == "stderr" for c in code for output in c.outputs)
    assert not re.search(r"[\"' (](/(home|root|tmp|work|opt|usr|Users)/|[A-Z]:\\)", path.read_text())
    assert path.stat().st_size <= 600 * 1024


def test_links_lead_somewhere():
    texts = [cell.source for name in NOTEBOOKS for cell in stored(name).cells if cell.cell_type == "markdown"]
    for text in [*texts, (build.HERE / "README.md").read_text()]:
        for target in re.findall(r"\]\((?!https?:|code:)([^)#\s]+)", text):
            assert (build.HERE / target).exists(), target


def test_every_notebook_is_built_and_listed():
    assert {p.stem for p in build.HERE.glob("*.ipynb")} == set(NOTEBOOKS)
    listed = re.findall(r"\((\d\d_\w+)\.ipynb\)", (build.HERE / "README.md").read_text())
    assert sorted(set(listed)) == NOTEBOOKS


def test_definition_points_at_the_right_lines():
    for name in ("vidreason.mask_pool", "vidreason.FusionCore.forward", "toy.world.FRICTION", "vidreason.Config.sam"):
        link, _, lines = build.definition(name).partition("#")
        first, last = map(int, re.fullmatch(r"L(\d+)-L(\d+)", lines).groups())
        text = (build.HERE / link).read_text().splitlines()[first - 1 : last]
        assert re.match(rf"\s*((def|class) )?{name.split('.')[-1]}\b", text[0])
    assert text[0].strip().startswith("sam: str =")
    assert build.definition("vidreason") == "../vidreason.py" and build.definition("toy.world") == "../toy/world.py"


@pytest.mark.parametrize("name", ["vidreason.mask_pol", "vidreason.FusionCore.backward", "nowhere.mask_pool"])
def test_definition_of_a_missing_name_is_an_error(name):
    with pytest.raises(build.BuildError, match=name):
        build.definition(name)


def test_mask_hides_decimals_and_keeps_whole_numbers():
    assert mask("(4, 128) 0.5  -1.25e-07 3e+02 tensor([1., 2.])") == "(4, 128) # # # tensor([#, #])"
    assert mask("shape (4, 8, 3) of 12.") != mask("shape (4, 8, 4) of 12.")


def test_setup_comes_second_and_solutions_are_collapsed(tmp_path, monkeypatch):
    text = '# %% [markdown]\n# # T\n# [p](code:vidreason.pack)\n\n# %%\nx = 1\n\n# %% tags=["solution"]\nassert x\n'
    (tmp_path / "01_t.py").write_text(text)
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "definition", lambda name: f"<{name}>")
    notebook = build.read(tmp_path / "01_t.py")
    assert [c.source for c in notebook.cells[1:]] == [build.SETUP, "x = 1", "assert x"]
    assert "(<vidreason.pack>)" in notebook.cells[0].source and "01_t.ipynb" in notebook.cells[0].source
    assert [c.metadata.get("cellView") for c in notebook.cells] == [None, None, None, "form"]
    (tmp_path / "01_t.py").write_text(text.replace("# # T", "# no title"))
    with pytest.raises(build.BuildError, match="title"):
        build.read(tmp_path / "01_t.py")


def test_text_is_renewed_without_running(tmp_path):
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    output = nbformat.v4.new_output("stream", text="3")
    nbformat.write(
        nbformat.v4.new_notebook(cells=[markdown("old"), code("f()", outputs=[output])]), tmp_path / "n.ipynb"
    )
    new = build.keep_outputs(nbformat.v4.new_notebook(cells=[markdown("new"), code("f()")]), tmp_path / "n.ipynb")
    assert new.cells[0].source == "new" and new.cells[1].outputs == [output]
    with pytest.raises(build.BuildError, match="n.ipynb"):
        build.keep_outputs(nbformat.v4.new_notebook(cells=[code("g()")]), tmp_path / "n.ipynb")


def test_outputs_are_compared_by_text_and_pictures():
    def cell(*outputs):
        return nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output(*o[:1], **o[1]) for o in outputs])

    printed, picture = ("stream", {"text": "(4, 8) 0.51\n"}), ("display_data", {"data": {"image/png": "x"}})
    assert shown(cell(printed, picture)) == shown(cell(("stream", {"text": "(4, 8) 0.49\n"}), picture))
    assert shown(cell(printed, picture)) != shown(cell(printed))
    assert shown(cell(printed)) != shown(cell(("stream", {"text": "(5, 8) 0.51\n"})))


def test_a_failing_cell_stops_the_run():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(Exception, match="AssertionError"):
        build.execute(notebook)
