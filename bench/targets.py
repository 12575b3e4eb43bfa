"""What this package sets out to reach, and what a record says about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.inputs import dimensions
from bench.peers import OURS
from bench.records import Record

COPY = "copy bandwidth"  # not a contestant: the bytes of a case, each moved once, at the speed of copying


@dataclass(frozen=True)
class Target:
    """At least `least` times as fast as `peer`, in every case that fits; the worst one counts.

    op, device, backward, shape, rows (least and most M): which cases; None for all.
    """

    what: str
    op: str
    peer: str
    least: float
    device: str = "cpu"
    backward: bool = False
    shape: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    dtype: str = field(default="bfloat16")

    def fits(self, entry: dict) -> bool:
        return (
            (entry["op"], entry["device"], entry["backward"], entry["dtype"])
            == (self.op, self.device, self.backward, self.dtype)
            and (self.shape is None or tuple(entry["shape"]) == self.shape)
            and (self.rows is None or self.rows[0] <= entry["m"] <= self.rows[1])
        )


SQUARE, WIDE = (4096, 4096), (8192, 28672)
MANY = 1 << 30
BNB, TORCH = "bitsandbytes", "torch"

TARGETS = (
    Target("quantize_4bit", "quantize_4bit", BNB, 50, shape=SQUARE),
    Target("dequantize_4bit", "dequantize_4bit", BNB, 8, shape=SQUARE),
    Target("linear_4bit, M = 1", "linear_4bit", BNB, 1.3, shape=SQUARE, rows=(1, 1)),
    Target("linear_4bit, M = 1", "linear_4bit", TORCH, 4, shape=SQUARE, rows=(1, 1)),
    Target("linear_4bit, M >= 64", "linear_4bit", TORCH, 1 / 1.05, rows=(64, MANY)),
    Target("linear_4bit + dx, M >= 128", "linear_4bit", TORCH, 1 / 1.1, backward=True, rows=(128, MANY)),
    Target("linear_int8, M >= 64", "linear_int8", TORCH, 1.5, rows=(64, MANY)),
    Target("linear_int8, M >= 64", "linear_int8", BNB, 1.5, rows=(64, MANY)),
    Target("linear_int8, M = 1", "linear_int8", BNB, 1.3, rows=(1, 1)),
    Target("linear_int8 + dx", "linear_int8", BNB, 4, backward=True),
    Target("dequantize_4bit", "dequantize_4bit", COPY, 0.88, device="cuda"),
    Target("quantize_int8", "quantize_int8", COPY, 0.88, device="cuda"),
    Target("linear_4bit, M = 1", "linear_4bit", COPY, 0.8, device="cuda", shape=WIDE, rows=(1, 1)),
    Target("linear_4bit, M = 1", "linear_4bit", BNB, 1.4, device="cuda", shape=WIDE, rows=(1, 1)),
    Target("linear_4bit, M = 1", "linear_4bit", TORCH, 3, device="cuda", shape=WIDE, rows=(1, 1)),
    Target("linear_4bit, M = 16", "linear_4bit", "quantlib, decode + torch", 2, device="cuda", rows=(16, 16)),
    Target("linear_4bit, M = 256", "linear_4bit", "quantlib, decode + torch", 1.4, device="cuda", rows=(256, 256)),
    Target("linear_4bit, M = 16 ... 512", "linear_4bit", BNB, 1, device="cuda", rows=(16, 512)),
    Target("linear_4bit, M >= 2048", "linear_4bit", TORCH, 1 / 1.05, device="cuda", rows=(2048, MANY)),
    Target(
        "linear_4bit + dx, M >= 2048", "linear_4bit", TORCH, 1 / 1.05, device="cuda", backward=True, rows=(2048, MANY)
    ),
    Target("linear_int8", "linear_int8", TORCH, 1, device="cuda"),
    Target("linear_int8, M >= 2048", "linear_int8", TORCH, 1.4, device="cuda", rows=(2048, MANY)),
    Target(
        "lora_linear_4bit + backward, M = 8192",
        "lora_linear_4bit",
        "quantlib, base layer alone",
        1 / 1.06,
        device="cuda",
        backward=True,
        rows=(8192, 8192),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """A target and the worst ratio measured; None where nothing was, with the reason."""

    target: Target
    measured: float | None
    where: str

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.target.least


def place(entry: dict) -> str:
    """Where a result was measured, in short."""
    rows = "" if entry["m"] is None else f", M = {entry['m']}"
    return f"{dimensions(entry['shape'])}{rows}"


def speed_up(entry: dict) -> float | None:
    """A contestant's time over ours, in CUDA graphs where both have one; None if it was not timed."""
    return entry.get("graph_ratio") or entry.get("ratio")


def _measurements(target: Target, record: Record) -> Iterator[tuple[float, str]]:
    for entry in record["results"]:
        if not target.fits(entry) or entry["status"] != "ok":
            continue
        if target.peer == COPY and entry["peer"] == OURS:
            copying = (entry["read"] + entry["written"]) / record["limits"][entry["device"]]["copy"]
            yield copying / (entry["graph"] or entry["median"]), place(entry)
        elif target.peer == entry["peer"] and speed_up(entry):
            yield speed_up(entry), place(entry)


def _missing(target: Target, record: Record) -> str:
    reasons = [e["reason"] for e in record["results"] if target.fits(e) and e["peer"] == target.peer and e["reason"]]
    return reasons[0] if reasons else "not measured"


def outcomes(record: Record) -> list[Outcome]:
    """The targets for the devices of a record, in order."""
    found = []
    for target in TARGETS:
        if target.device in record["limits"]:
            worst = min(_measurements(target, record), default=None)
            found.append(Outcome(target, *worst) if worst else Outcome(target, None, _missing(target, record)))
    return found
