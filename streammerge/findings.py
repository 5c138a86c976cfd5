"""What a verification of a finished merge finds: problems, notes and measurements (checking.py, probes.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import VerificationError, listed
from .memory import format_size

_COPY_AGAIN = "copy it again from where it came from, or merge again"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what was found, what was wanted (where it can be told), what to do."""

    file: str
    found: str
    wanted: str = ""
    advice: str = _COPY_AGAIN
    tensor: str = ""

    def __str__(self) -> str:
        tensor = f" tensor {self.tensor!r}:" if self.tensor else ""
        wanted = f"; wanted {self.wanted}" if self.wanted else ""
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.file}:{tensor} {self.found}{wanted}{advice}"


@dataclass
class Findings:
    """What a verification found. `notes` are worth a line and no error; `probes` is what was measured besides."""

    out: Path
    quick: bool = False
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    nbytes: int = 0  # that were read
    tensors: int = 0
    probes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        problems = [asdict(p) for p in self.problems]
        return {**vars(self), "out": str(self.out), "problems": problems, "ok": not problems}

    def error(self) -> VerificationError | None:
        """All problems as one error, None where there are none."""
        headline = f"{self.out} is not what was merged:"
        return VerificationError(listed(headline, map(str, self.problems))) if self.problems else None

    def lines(self) -> list[str]:
        """Notes, measurements, and where nothing is wrong that."""
        told = [f"note: {note}" for note in self.notes]
        if "generated" in self.probes:
            told += ["generated:", self.probes["generated"]["text"]]
        if "l_think" in self.probes:
            values = "  ".join(f"{name} {value:.2e}" for name, value in self.probes["l_think"]["now"].items())
            told.append(f"L_think (nats, {self.probes['l_think']['heldout']} held-out samples)  {values}")
        if not self.problems:
            read = f"{format_size(self.nbytes)} in {self.files} files, {self.tensors} tensors"
            told.append(f"{self.out}: as merged ({read}{'; no weights were read' if self.quick else ''})")
        return told
