"""Files that are never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name to write a file to, beside `path`; renamed to `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def published(directory: Path, last: str) -> Iterator[Path]:
    """A temporary directory to fill; its files are moved into `directory` if the block succeeds.

    `last` is the file without which readers ignore the others. An older one is removed before the first
    move and the new one is moved at the end, so that a crash in between leaves nothing that looks whole.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    try:
        yield staging
        (directory / last).unlink(missing_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: (file.name == last, file.name)):
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` at once."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
