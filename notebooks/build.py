"""Build the notebooks from their sources: 01_name.py becomes 01_name.ipynb, executed, with its outputs.

    python notebooks/build.py                # all of them
    python notebooks/build.py 02_objects     # one; the .py's name works too
    python notebooks/build.py --text         # only text or line numbers changed: seconds, nothing is executed

Edit the .py (cells start with "# %%", text with "# %% [markdown]"), build, commit both files. Building adds what every
notebook has in common: the line of links under the title, the setup cell after it, collapsed solutions (cells tagged
"solution") and line numbers: [`mask_pool`](code:vidreason.mask_pool) becomes a link to the lines that define mask_pool,
and a name that does not exist is an error. A cell that fails leaves the old .ipynb as it was.
"""

import argparse
import ast
import os
import re
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

REPOSITORY = "https://github.com/vidreason/vidreason"  # where the project lives: hosted notebooks are cloned from here
HOSTED = REPOSITORY.replace("github.com", "colab.research.google.com/github") + "/blob/main/notebooks"
HERE = Path(__file__).resolve().parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = f"""\
# The same in every notebook: make the project importable, here or on a hosted machine, which starts empty.
import os
import sys
import warnings

if "google.colab" in sys.modules and not os.path.exists("../vidreason.py"):
    !git clone -q --depth 1 {REPOSITORY} project
    !pip install -q -r project/requirements.txt
    os.chdir("project/notebooks")
sys.path.insert(0, os.path.abspath(".."))
os.environ |= {{"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}}
warnings.filterwarnings("ignore")  # advice of libraries to programmers"""


class BuildError(Exception):
    """A mistake in a notebook's source."""


def sources():
    """The notebooks' sources, in reading order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def definition(name):
    """A link to where a dotted name is defined: "vidreason.mask_pool" -> "../vidreason.py#L1-L9"."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = HERE.parent.joinpath(*parts[:n]).with_suffix(".py")
        if path.is_file():
            break
    else:
        raise BuildError(f"no module of the project defines {name}")
    node, link = ast.parse(path.read_text()), os.path.relpath(path, HERE)
    for part in parts[n:]:
        node = next((child for child in getattr(node, "body", []) if part in _names(child)), None)
        if node is None:
            raise BuildError(f"{path.name} does not define {name}")
    return f"{link}#L{node.lineno}-L{node.end_lineno}" if parts[n:] else link


def _names(node):
    """What one statement defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", getattr(getattr(node, "target", None), "id", None))}


def navigation(path):
    """The line under the title: hosted notebook, the neighbours, the overview."""
    order = [p.stem for p in sources()]
    at = order.index(path.stem)
    links = [f"[![Open in Colab]({BADGE})]({HOSTED}/{path.stem}.ipynb)"]
    links += [f"[← {order[at - 1]}]({order[at - 1]}.ipynb)"] if at else []
    links += ["[all notebooks](README.md)"]
    links += [f"[{order[at + 1]} →]({order[at + 1]}.ipynb)"] if at + 1 < len(order) else []
    return " · ".join(links)


def read(path):
    """The notebook of a source, complete but not yet executed. Nothing in it depends on when or where it is made."""
    notebook = jupytext.read(path, fmt="py:percent")
    cells = notebook.cells
    title, _, rest = cells[0].source.partition("\n")
    if cells[0].cell_type != "markdown" or not title.startswith("# "):
        raise BuildError(f"{path.name} must begin with a markdown cell that begins with a title")
    cells[0].source = f"{title}\n\n{navigation(path)}\n{rest}"
    cells.insert(1, nbformat.v4.new_code_cell(SETUP))
    for i, cell in enumerate(cells):
        tags = cell.metadata.get("tags", [])
        hidden = {"jupyter": {"source_hidden": True}, "cellView": "form"} if "solution" in tags else {}
        cell.metadata = nbformat.from_dict({**({"tags": tags} if tags else {}), **hidden})
        cell.id = f"{path.stem[:2]}-{i:02d}"
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\(code:([\w.]+)\)", lambda found: f"({definition(found[1])})", cell.source)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook, seconds=1800):
    """Run every cell in a fresh kernel; nbclient raises an error at the first cell that fails. `seconds` is for all."""
    end, metadata = time.monotonic() + seconds, notebook.metadata.copy()
    nbclient.NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}, record_timing=False,
        timeout_func=lambda cell: max(1, int(end - time.monotonic())), coalesce_streams=True,
        extra_arguments=["--HistoryManager.enabled=False", "--log-level=ERROR"],
    ).execute()  # fmt: skip
    notebook.metadata = metadata  # the kernel adds its Python's version
    return notebook


def keep_outputs(notebook, built):
    """Give a notebook the outputs that are stored in its built file, whose code must be the same."""
    stored = [cell for cell in nbformat.read(built, as_version=4).cells if cell.cell_type == "code"]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.source for cell in cells] != [cell.source for cell in stored]:
        raise BuildError(f"the code of {built.name} has changed: build it without --text")
    for cell, old in zip(cells, stored, strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 02_objects; none: all")
    parser.add_argument("--text", action="store_true", help="execute nothing, keep the stored outputs")
    args = parser.parse_args()
    names = {Path(name).stem for name in args.names}
    unknown = names - {path.stem for path in sources()}
    if unknown:
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}")
    for path in sources():
        if not names or path.stem in names:
            began, built, aside = time.monotonic(), path.with_suffix(".ipynb"), path.with_suffix(".partial")
            nbformat.write(keep_outputs(read(path), built) if args.text else execute(read(path)), aside)
            os.replace(aside, built)
            print(f"{built.name}: {time.monotonic() - began:.0f} s, {built.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (BuildError, nbclient.exceptions.CellExecutionError) as error:
        raise SystemExit(f"error: {error}") from None
