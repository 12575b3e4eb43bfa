"""Everybody who is measured. Importing this registers them; what is not installed says so when it is built."""

from bench import peers_bitsandbytes, peers_many, peers_others, peers_quantlib, peers_torch
from bench.contest import CONTESTANTS, OURS, Contestant, Entry, Unavailable, judged, package_version, verdict

# Tables and plots follow this order. Unsloth is built last: importing it changes other libraries.
_ORDER = ("quantlib", "torch", "bitsandbytes", "PEFT", "torchao", "Unsloth")
for _found in CONTESTANTS.values():
    _found.sort(key=lambda peer: max(i for i, name in enumerate(_ORDER) if peer.name.startswith(name)))
    _found.sort(key=lambda peer: peer.name != OURS)

__all__ = [
    "CONTESTANTS",
    "OURS",
    "Contestant",
    "Entry",
    "Unavailable",
    "judged",
    "package_version",
    "peers_bitsandbytes",
    "peers_many",
    "peers_others",
    "peers_quantlib",
    "peers_torch",
    "verdict",
]
