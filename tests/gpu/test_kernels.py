"""Every op on the GPU by every backend that has it, against the reference on the CPU."""

import pytest
import torch

from quantlib import backends, ops, reference

from . import harness
from .harness import DEVICE, DRY_RUN, DTYPES, EXACT, KERNELS, assert_same, cases, run, to_device

pytestmark = pytest.mark.gpu


def usable(backend, dtype=None):
    """Skips what cannot run here, and fails where a kernel is missing that should be here."""
    if DRY_RUN and backend == "cuda":
        pytest.skip("CUDA kernels have no interpreter")
    if DRY_RUN and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where bfloat16 rounds")
    missing = next((b.missing for b in backends.BACKENDS if b.name == backend), "")
    assert not missing, f"{backend}: {missing}"


def matrix(*names):
    """(backend, op, dtype) for the ops named; kernels in a 16-bit dtype are what the sanitizers look at."""
    return [
        pytest.param(
            backend,
            op,
            dtype,
            id=f"{backend}-{op}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.sanitizer] if backend in ("triton", "cuda") and dtype == torch.float16 else [],
        )
        for backend, op in KERNELS
        if op in names
        for dtype in DTYPES
    ]


@pytest.mark.parametrize("backend, op, dtype", matrix(*EXACT))
def test_bit_exact(backend, op, dtype):
    usable(backend, dtype)
    for arguments in cases(op, dtype):
        expected = getattr(reference, op)(*arguments)
        expected = (expected,) if isinstance(expected, torch.Tensor) else expected
        actual = run(backend, op, to_device(arguments))
        for a, e in zip(actual, expected, strict=True):
            assert a.device.type == DEVICE.type
            assert_same(a, e)


@pytest.mark.parametrize("backend, op, dtype", matrix("linear_4bit", "linear_4bit_dx", "linear_int8", "linear_int8_dx"))
def test_error_budget(backend, op, dtype):
    usable(backend, dtype)
    for arguments in cases(op, dtype):
        on_device = to_device(arguments)
        (actual,) = run(backend, op, on_device)
        harness.assert_within_budget(op, actual, arguments, on_device)


@pytest.mark.parametrize("backend, op, dtype", matrix(*ops.COMPOSED))
def test_error_budget_of_base_and_branch(backend, op, dtype):
    usable(backend, dtype)
    for arguments in cases(op, dtype):
        on_device = to_device(arguments)
        harness.assert_composed_within_budget(op, run(backend, op, on_device), arguments, on_device)


@pytest.mark.parametrize("backend, op", KERNELS)
def test_same_bits_on_every_run(backend, op):
    usable(backend)
    arguments = to_device(list(cases(op, torch.float16))[-1])
    first = run(backend, op, arguments)
    for _ in range(1 if DRY_RUN else 5):
        for a, b in zip(run(backend, op, arguments), first, strict=True):
            assert_same(a, b)


def launched(backend, op):
    """Inputs that between them take every way through a GPU's kernels; one where there is nothing to be launched."""
    inputs = [list(to_device(arguments)) for arguments in cases(op, torch.float16)]
    return inputs if backend in ("triton", "cuda") and not DRY_RUN else inputs[-1:]


@pytest.mark.parametrize("backend, op", KERNELS)
def test_the_host_does_not_wait(backend, op):
    usable(backend)
    for arguments in launched(backend, op):
        run(backend, op, arguments)  # compiles and fills caches, which may wait
        with harness.no_synchronization():
            run(backend, op, arguments)


@pytest.mark.parametrize("backend, op", KERNELS)
def test_in_a_cuda_graph(backend, op):
    usable(backend)
    for arguments in launched(backend, op):
        replay, result = harness.captured(lambda arguments=arguments: run(backend, op, arguments))
        for _ in range(2):
            # Other contents in the same memory: a replay must read them, not remember what it was captured with.
            arguments[0].copy_(arguments[0].flip(0))
            replay()
            for a, b in zip(result(), run(backend, op, arguments), strict=True):
                assert_same(a, b)


@pytest.mark.parametrize("backend, op", KERNELS)
def test_on_the_current_stream(backend, op):
    usable(backend)
    arguments = list(to_device(list(cases(op, torch.float16))[-1]))
    new = arguments[0].flip(0).contiguous()
    expected = run(backend, op, (new, *arguments[1:]))
    with harness.side_stream():
        arguments[0].copy_(new)
        actual = run(backend, op, tuple(arguments))
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "backend", [b for b, op in KERNELS if op == "dequantize_4bit" and b not in ("auto", "reference")]
)
def test_dequantize_4bit_beyond_two_to_the_31_elements(backend, double_quant):
    usable(backend)
    span = 64 * 256  # a whole block of scales
    middle = 2 * span if DRY_RUN else 2**31
    n = middle + span + 10
    if not DRY_RUN and harness.free_memory() < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    blocks = -(-n // 64)
    packed = torch.randint(256, ((n + 1) // 2, 1), dtype=torch.uint8, device=DEVICE)
    nested = (None, None, None)
    if double_quant:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=DEVICE)
        nested = (
            torch.rand(-(-blocks // 256), device=DEVICE),
            torch.linspace(-1, 1, 256, device=DEVICE),
            torch.tensor(0.1, device=DEVICE),
        )
    else:
        absmax = torch.rand(blocks, device=DEVICE)
    (out,) = run(backend, "dequantize_4bit", (packed, absmax, *nested, "nf4", 64, (n,), torch.float16))
    for start in (0, middle - span, middle):
        stop = min(start + 2 * span, n)
        scales = absmax[start // 64 : -(-stop // 64)]
        part = (nested[0][start // span : -(-stop // span)], *nested[1:]) if double_quant else nested
        weight = (packed[start // 2 : -(-stop // 2)], scales, *part, "nf4", 64)
        expected = reference.dequantize_4bit(*to_device(weight, "cpu"), (stop - start,), torch.float16)
        assert_same(out[start:stop], expected)


@pytest.mark.parametrize("backend", [b.name for b in harness.ON_DEVICE])
def test_every_backend_is_here_and_has_kernels(backend):
    usable(backend)
    assert backend in {name for name, _ in KERNELS}


def test_auto_and_the_table_of_backends_agree_about_this_machine():
    for op in sorted({op for _, op in KERNELS}):
        assert backends.explain(op, DEVICE).chosen is not None, op


def test_auto_takes_the_kernels_of_the_device():
    expected = "triton" if DEVICE.type == "cuda" else backends._find("cpu").name
    assert {backends.explain(op, DEVICE).chosen for op in ops.SCHEMAS} == {expected}
