"""What an unfinished merge has made durable, so that the same command goes on where it was interrupted.

OUT/.streammerge/journal.json holds the fingerprint of all that the output's bytes depend on, and the state of the last
save: which tensors are in the partial shards, which layers were surveyed, what was found. It is replaced atomically,
and only after everything that it speaks of is on the disk; its first line is the hash of the rest. Saves come by time,
not by layer, so that a resume replays minutes; a save that takes long is followed by a longer pause.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import Refused, ResourceError, listed
from .fingerprint import differences
from .io.disk import sync_folder
from .io.writer import CheckpointWriter

FILE = "journal.json"
EVERY = 30.0  # seconds between two saves, at least
_SHARE = 20  # a save may take one part in so many of the time


class Journal:
    """The journal of one output directory. `state` is what an earlier run saved, None for a fresh start. `every`:
    seconds between two saves, at least; 0 saves whenever it can, whatever it costs. `tell` hears once of saves that
    the disk refuses; so do `warnings`."""

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], *, every: float = EVERY,
        tell: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.folder, self.fingerprint, self.every = folder, fingerprint, every
        self.state: dict[str, Any] | None = None
        self.saved = False  # something durable is there: an error leaves it in place
        self.resumed_at: str | None = None
        self.warnings: list[str] = []
        self._tell, self._next = tell, time.monotonic() + every

    def open(self, *, restart: bool) -> None:
        """Read what is there, once the directory is locked. Refused, which lists the differences, where it belongs to
        another merge, unless `restart` says to drop it."""
        found = None if restart else read(self.folder)
        if found is None:
            with contextlib.suppress(OSError):
                (self.folder / FILE).unlink()
            return
        before, state = found
        changed = differences(before, json.loads(json.dumps(self.fingerprint)))
        if changed:
            raise Refused(listed(
                f"{self.folder.parent}: holds an unfinished merge that differs from this one:", changed,
                "Run it as it was to go on, add --restart to drop it and begin anew, or choose another OUT."))
        self.state, self.saved = state, True
        self.resumed_at = state.get("label")

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self._next

    def save(self, state: dict[str, Any], began: float) -> bool:
        """Replace the journal; all that `state` speaks of is on the disk. `began`: time.monotonic() when saving began.

        Where the disk refuses, the journal stays as it was, and the answer is False.
        """
        partial = self.folder / (FILE + ".partial")
        body = json.dumps({"fingerprint": self.fingerprint, "state": state})
        try:
            with open(partial, "w", encoding="utf-8") as f:
                f.write(f"{_hash(body)}\n{body}")
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, self.folder / FILE)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self.skip(f"{partial}: the journal cannot be written: {error.strerror}", began)
            return False
        self.saved = True
        with contextlib.suppress(OSError):  # then a power cut may find the one before
            sync_folder(self.folder)
        self._pause(began)
        return True

    def skip(self, why: str, began: float) -> None:
        """A save that the disk has no room for is no reason to end a merge whose output has its own; told once."""
        if not self.warnings:
            last = "from the save before" if self.saved else "from the start"
            self.warnings.append(f"{why}. The merge goes on without this save; if it is interrupted, the same command "
                                 f"goes on {last}. Free some disk for shorter ways back")
            self._tell(self.warnings[0])
        self._pause(began)

    def _pause(self, began: float) -> None:
        now = time.monotonic()
        self._next = now + (max(self.every, _SHARE * (now - began)) if self.every else 0.0)


def save_kept(writer: CheckpointWriter, journal: Journal, state: dict[str, Any], began: float) -> bool:
    """Save, and have the writer leave what the journal speaks of after an error: nothing, where no save has succeeded
    yet. Returns what `Journal.save` does."""
    writer.keep()  # first: a signal may come right after the journal has its name
    try:
        return journal.save(state, began)
    finally:
        writer.keep(journal.saved)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(fingerprint, state) of the journal in a folder; None where there is none, or where its hash says that nothing
    of it can be believed. ResourceError where the disk does not give it."""
    file = folder / FILE
    try:
        digest, _, body = file.read_text("utf-8").partition("\n")
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise ResourceError(f"{file}: the journal of an unfinished merge cannot be read: {error.strerror}; mend the "
                            "disk, or add --restart to begin anew") from error
    if digest != _hash(body):
        return None
    found = json.loads(body)
    return found["fingerprint"], found["state"]


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def resumed(journal: Journal, folder: Path, *, restart: bool) -> set[str] | None:
    """The writer's question: tensors that lie in the partial shards, or None to begin anew."""
    assert folder == journal.folder
    journal.open(restart=restart)
    return set(journal.state["placed"]) if journal.state else None
