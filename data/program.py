"""What all our programs share: options, one line for a mistake, files written whole."""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from vidreason import VidReasonError

ROOT = Path(__file__).resolve().parent.parent
TOY_MODEL = ROOT / "toy" / "weights"


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, as all others."""

    def error(self, message):
        raise VidReasonError(f"{message} (command line): see {self.prog} --help")


def positive(text) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def guarded(main):
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
    sys.exit(print(f"error: {' '.join(message.split())}", file=sys.stderr) or 2)


def write_json(path, value):
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value))
    aside.rename(path)


def sha256(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()
