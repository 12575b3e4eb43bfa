"""Inputs of ops that serve many weights in one call: experts, and adapters.

Which rows go where depends on their number only, so that a case's cost can be counted without its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.inputs import Case, Source, rows_of

RANKS = (8, 8, 16, 16, 16, 32, 32, 64)  # of the adapters
ALPHA = 16  # an adapter's factor is this over its rank
NONE = -1
SEQUENCES = (4, NONE, 7, 0, 2, 5, 1, 6, 3, 4, NONE, 7, 0, 2, 5, 1)  # the adapter of each


@functools.cache
def rows_of_experts(m: int, experts: int) -> tuple[int, ...]:
    """How many of m rows each expert has: unevenly many, as a router chooses."""
    generator = torch.Generator().manual_seed(experts)
    odds = torch.randn(experts, generator=generator).exp()
    chosen = torch.multinomial(odds, m, replacement=True, generator=generator)
    return tuple(chosen.bincount(minlength=experts).tolist())


def rows_by_expert(case: Case, source: Source) -> SimpleNamespace:
    """x and dy sorted by expert; counts, on the host; ends, where each expert's rows end, and the owner of each."""
    experts, *shape = case.shape
    counts = torch.tensor(rows_of_experts(case.m, experts))
    owner = torch.arange(experts).repeat_interleave(counts).to(source.device)
    rows = rows_of(Case(case.op, tuple(shape), case.dtype, case.m, case.backward), source)
    ends = counts.cumsum(0).int().to(source.device)
    return SimpleNamespace(**vars(rows), counts=counts.tolist(), ends=ends, owner=owner)


def sequences(m: int) -> tuple[int, ...]:
    """The adapter of each of the sequences that m rows are: as many as SEQUENCES, or of a single row."""
    count = len(SEQUENCES)
    return SEQUENCES if m % count == 0 else tuple(SEQUENCES[i % count] for i in range(m))


def rows_of_adapters(m: int) -> tuple[int, ...]:
    """How many of m rows each adapter has."""
    found = sequences(m)
    return tuple(found.count(adapter) * (m // len(found)) for adapter in range(len(RANKS)))


def rows_by_adapter(case: Case, source: Source) -> SimpleNamespace:
    """x and dy; the adapter of each sequence, on the host; the owner of each row."""
    found = sequences(case.m)
    owner = torch.tensor(found, dtype=torch.int32).repeat_interleave(case.m // len(found)).to(source.device)
    return SimpleNamespace(**vars(rows_of(case, source)), sequences=found, owner=owner)


def with_adapters(weights: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    """Adds the factors of all adapters, A [sum of ranks, in] and B [out, sum of ranks], and of each rank its adapter
    and factor."""

    def make(case: Case, source: Source, **options: object) -> SimpleNamespace:
        inputs = weights(case, source, **options)
        ranks = torch.tensor(RANKS)
        inputs.A = source.normal(sum(RANKS), case.shape[1], dtype=case.dtype, scale=0.02)
        inputs.B = source.normal(case.shape[0], sum(RANKS), dtype=case.dtype, scale=0.02)
        inputs.adapter = torch.arange(len(RANKS)).repeat_interleave(ranks).int().to(source.device)
        inputs.scale = (ALPHA / ranks).repeat_interleave(ranks).to(source.device)
        return inputs

    return make


def gate(w: SimpleNamespace, rows: SimpleNamespace) -> Tensor:
    """[m, sum of ranks]: the factor of a rank in a row, 0 where it is not of the row's adapter."""
    return torch.where(rows.owner[:, None] == w.adapter, w.scale, 0.0)
