"""What all our programs share: options, one line for a mistake, files written whole, tables, commands to type next."""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from vidreason import VidReasonError, write_aside

ROOT = Path(__file__).resolve().parent.parent
TOY_MODEL = ROOT / "toy" / "weights"


# --------------------------------------------------------------------------- the command line, and mistakes


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, as all others."""

    def error(self, message):
        raise VidReasonError(f"{message} (command line): see {self.prog} --help")


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def guarded(main: Callable[[], None]) -> None:
    """Run a program; a mistake of the user is one line on stderr and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' advice to programmers, not to users
    try:
        main()
        return
    except OSError as error:
        message = f"{error.strerror} ({error.filename}): check the path"
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory: {str(error)[:80]} (GPU): lower --batch or --micro_batch, or give --checkpointing"
    except VidReasonError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted (you): the same command goes on from the last checkpoint, if the program keeps any"

    if int(os.environ.get("RANK", 0)):
        time.sleep(3)  # most mistakes are everybody's; torchrun stops the others when rank 0 has said it
    one_line = " ".join(message.split())
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------- files


def write_json(path: Path, value) -> None:
    text = json.dumps(value)
    write_aside(path, lambda aside: aside.write_text(text))


def sha256(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------- tables


def print_columns(heads: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]):
    """Print a table: its first column flush left, the others flush right, each as wide as `widths` says.

    A cell that is too wide is printed whole: a width of 0 is for a remark behind the last column. A row may be shorter
    than the heads, for a line of its own.
    """
    for cells in (heads, *rows):
        line = cells[0].ljust(widths[0])
        for cell, width in zip(cells[1:], widths[1:], strict=False):  # a row may be shorter
            line += cell.rjust(width)
        print(line.rstrip())


# --------------------------------------------------------------------------- commands, as one types them here


def shown(path: Path | str) -> str:
    """A path as one types it in this directory."""
    resolved = Path(path).resolve()
    if resolved.is_relative_to(Path.cwd()):
        path = resolved.relative_to(Path.cwd())
    return shlex.quote(str(path))


def is_on_path(program: str) -> bool:
    """Whether the shell finds the program of this Python's environment, and no other of that name."""
    found = Path(shutil.which(program) or "")
    return found.parent == Path(sys.executable).parent


def python() -> str:
    """This Python, as one types it in this shell."""
    for name in ("python", "python3"):
        if is_on_path(name):
            return name
    return shlex.quote(sys.executable)


def launcher() -> str:
    """How this program was started: by python, or by torchrun with so many processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return python()
    torchrun = "torchrun" if is_on_path("torchrun") else f"{python()} -m torch.distributed.run"
    on_this_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    everywhere = int(os.environ["WORLD_SIZE"])
    if on_this_machine < everywhere:
        return f"{torchrun} (its options as before)"
    if on_this_machine == 1:
        return torchrun
    return f"{torchrun} --nproc_per_node {on_this_machine}"
