"""Real text that every Python carries: its standard library's sources, and its language documentation.

Two domains for a demonstration or a test, with nothing to download. They differ by Python version.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

from qlora.errors import InputError

# Tests and bundled programs are no library code; encodings are tables; pydoc_data is the other corpus.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data"}
_LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}


def sources() -> list[str]:
    """The modules of the standard library, sorted by name: about 450 of them, 9 MB of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file
        for file in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(file.relative_to(root).parts) and not file.name.startswith("_sysconfigdata")
    )
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if sum(map(len, texts)) < 1_000_000:
        raise InputError(f"{root} lacks the standard library's sources; use a Python that ships them")
    return texts


def documentation(held_out: float = 0.12, seed: int = 0) -> tuple[list[str], list[str]]:
    """The topics of the language documentation, as (train, held out): about 460 kB of prose and examples.

    Whole topics are held out, drawn by `seed`, until they are the fraction `held_out` of the text. Topics
    of more than 5% of the text are never drawn, so that the fraction is met closely.
    """
    from pydoc_data.topics import topics

    texts = sorted(set(topics.values()))  # some topics are one text under two names
    total = sum(map(len, texts))
    random.Random(seed).shuffle(texts)
    train: list[str] = []
    test: list[str] = []
    for text in texts:
        full = sum(map(len, test)) + len(text) > held_out * total
        (train if full or len(text) > 0.05 * total else test).append(text)
    return train, test
