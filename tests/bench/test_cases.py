"""Cases: honest inputs, a truth that plain PyTorch comes close to, and costs counted by hand."""

from itertools import groupby

import pytest
import torch

from bench import inputs, many, suites
from bench.cases import OPS, make_weights
from bench.contest import MANY, share
from bench.inputs import Case, Source


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["quick", "default", "full"])
def test_suites_name_each_case_once_and_keep_groups_together(name, device):
    chosen = suites.suite(name, device)
    assert len({str(case) for case in chosen}) == len(chosen)
    groups = [group for group, _ in groupby(chosen, key=lambda case: case.group)]
    assert name != "full" or len(groups) == len(set(groups))
    left_out = set(MANY) if device == "cpu" and name != "quick" else set()  # ours have GPU kernels only
    assert {case.op for case in chosen} == set(OPS) - left_out
    for case in chosen:
        assert (case.m is None) == (OPS[case.op].rows is None)
        assert OPS[case.op].backward or not case.backward


def test_unknown_suite():
    with pytest.raises(ValueError, match="suite is 'all'; allowed: quick, default, full"):
        suites.suite("all", "cpu")


def test_shapes_of_real_models():
    assert suites.layer_name((28672, 8192)) == "Llama-3 70B gate, up"
    assert suites.layer_name((128, 768, 2048)) == "Qwen3 30B-A3B experts' gate, up"
    assert suites.layer_name((7, 7)) == ""
    full = suites.suite("full", "cuda")
    assert {m for m in (case.m for case in full) if m} == {1, 4, 16, 64, 256, 1024, 4096, 16384}


@pytest.mark.parametrize("op", OPS)
def test_plain_pytorch_is_the_unit_of_error(op):
    case = Case(op, suites.tiny(op), torch.bfloat16, 5 if OPS[op].rows else None, OPS[op].backward)
    weights = make_weights(case, Source("cpu"))
    rows = OPS[op].rows(case, Source("cpu", 1)) if OPS[op].rows else None
    truth, plain = OPS[op].truth(weights, rows), OPS[op].plain(weights, rows)
    assert all(value.dtype == torch.float64 for value in truth.values())
    assert share(plain, truth, plain) == pytest.approx(1)
    for name, value in truth.items():
        assert 0 < (plain[name].double() - value).norm() < 0.2 * value.norm()
    if case.backward:
        assert set(truth) == ({"y", "dx", "dA", "dB"} if op.startswith("lora") else {"y", "dx"})


def test_the_gradients_in_the_truth_are_those_of_autograd():
    case = Case("lora_linear_4bit", (24, 64), torch.float32, 7, backward=True)
    w, rows = make_weights(case, Source("cpu")), inputs.rows_of(case, Source("cpu", 1))
    x, A, B = (t.double().requires_grad_() for t in (rows.x, w.A, w.B))
    y = x @ w.exact.t() + inputs.SCALING * (x @ A.t() @ B.t())
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), rows.dy.double())
    for name, expected in {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}.items():
        torch.testing.assert_close(OPS[case.op].truth(w, rows)[name], expected)


def test_outliers_are_planted():
    case = Case("linear_int8", (16, 64), torch.bfloat16, 3)
    rows = OPS["linear_int8"].rows(case, Source("cpu"))
    large = (rows.x.abs() >= inputs.THRESHOLD).any(0)
    assert large[0] and large.sum() <= inputs.OUTLIER_COLUMNS


def test_copies_share_no_memory():
    weights = make_weights(Case("linear_4bit", (8, 64), torch.bfloat16), Source("cpu"))
    copy = inputs.copied(weights)
    assert torch.equal(copy.q.packed, weights.q.packed) and copy.q.packed.data_ptr() != weights.q.packed.data_ptr()
    assert torch.equal(copy.w, weights.w) and copy.w.data_ptr() != weights.w.data_ptr()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_sampled_rows(count):
    rows = torch.arange(count)[:, None]
    found = inputs.sampled(rows)
    assert len(found) == min(count, inputs.SAMPLED_ROWS)
    assert found[0] == 0 and found[-1] == count - 1 and len(set(found.flatten().tolist())) == len(found)


def test_costs():
    n, k, m = 128, 256, 10
    weight = n * k // 2 + n * k // 64 + 4 * 2  # codes, one byte a block of 64, one float a 256 of those
    cost = OPS["linear_4bit"].cost(Case("linear_4bit", (n, k), torch.bfloat16, m))
    assert (cost.read, cost.written) == (weight + 2 * m * k, 2 * m * n)
    assert cost.operations == {"bfloat16": 2 * m * n * k}
    cost = OPS["linear_4bit"].cost(Case("linear_4bit", (n, k), torch.bfloat16, m, backward=True))
    assert (cost.read, cost.written) == (2 * weight + 2 * m * k + 2 * m * n, 2 * m * n + 2 * m * k)
    assert cost.operations == {"bfloat16": 4 * m * n * k}
    cost = OPS["linear_int8"].cost(Case("linear_int8", (n, k), torch.bfloat16, m, backward=True))
    assert cost.operations == {"int8": 2 * m * n * k, "bfloat16": 2 * m * n * k}
    cost = OPS["quantize_4bit"].cost(Case("quantize_4bit", (n, k), torch.float32))
    assert (cost.read, cost.written) == (4 * n * k, n * k // 2 + 4 * n * k // 64)
    cost = OPS["dequantize_int8"].cost(Case("dequantize_int8", (n, k), torch.float32))
    assert (cost.read, cost.written) == (n * k + 4 * n, 4 * n * k)
    lora = OPS["lora_linear_4bit"].cost(Case("lora_linear_4bit", (n, k), torch.bfloat16, m))
    assert lora.operations["bfloat16"] == 2 * m * n * k + 2 * m * inputs.RANK * (n + k)
    factors = 2 * inputs.RANK * (n + k)
    lora = OPS["lora_linear_4bit"].cost(Case("lora_linear_4bit", (n, k), torch.bfloat16, m, backward=True))
    assert lora.read == 2 * (weight + factors + 2 * m * k) + 2 * m * n
    assert lora.written == 2 * m * n + 2 * m * k + factors


def test_experts_without_rows_cost_nothing():
    n, k = 128, 256
    weight = n * k // 2 + n * k // 64 + 4 * 2
    for m in (1, 5, 1000):
        used = sum(count > 0 for count in many.rows_of_experts(m, 64))
        cost = OPS["linear_4bit_experts"].cost(Case("linear_4bit_experts", (64, n, k), torch.bfloat16, m))
        assert used <= m and cost.read == used * weight + 2 * m * k
        assert cost.operations == {"bfloat16": 2 * m * n * k}


def test_rows_cost_the_rank_of_their_own_adapter():
    n, k, op = 128, 256, "lora_linear_4bit_adapters"
    weight = n * k // 2 + n * k // 64 + 4 * 2
    cost = OPS[op].cost(Case(op, (n, k), torch.bfloat16, 3))  # the first three: ranks 16, none, 64
    assert cost.operations["bfloat16"] == 2 * 3 * n * k + 2 * (16 + 64) * (n + k)
    assert cost.read == weight + 2 * 3 * k + 2 * (16 + 64) * (n + k)


@pytest.mark.parametrize("m", [1, 5, 16, 64, 300])
def test_rows_by_expert(m):
    case = Case("linear_4bit_experts", (8, 16, 64), torch.float32, m, backward=True)
    rows = many.rows_by_expert(case, Source("cpu"))
    assert sum(rows.counts) == m == rows.ends[-1] and len(set(rows.counts)) > 1
    assert rows.x.shape == (m, 64) and rows.dy.shape == (m, 16)
    starts = rows.ends - torch.tensor(rows.counts)
    for e, (start, end) in enumerate(zip(starts, rows.ends, strict=True)):
        assert (rows.owner[start:end] == e).all()


@pytest.mark.parametrize("m", [1, 5, 16, 64, 300])
def test_rows_by_adapter(m):
    rows = many.rows_by_adapter(Case("lora_linear_4bit_adapters", (16, 64), torch.float32, m), Source("cpu"))
    assert rows.owner.shape == (m,) and rows.owner.dtype == torch.int32
    assert [int((rows.owner == a).sum()) for a in range(len(many.RANKS))] == list(many.rows_of_adapters(m))
    assert m == 1 or (rows.owner == many.NONE).any()


def test_the_truth_of_experts_and_adapters_is_that_of_each_row_alone():
    case = Case("linear_4bit_experts", (3, 16, 64), torch.float32, 9, backward=True)
    w, rows = make_weights(case, Source("cpu")), many.rows_by_expert(case, Source("cpu", 1))
    found = OPS[case.op].truth(w, rows)
    for i, e in enumerate(rows.owner):
        torch.testing.assert_close(found["y"][i], w.exact[e] @ rows.x[i].double())
        torch.testing.assert_close(found["dx"][i], rows.dy[i].double() @ w.exact[e])
    case = Case("lora_linear_4bit_adapters", (16, 64), torch.float32, 9, backward=True)
    w, rows = make_weights(case, Source("cpu")), many.rows_by_adapter(case, Source("cpu", 1))
    x, A, B = (t.double().requires_grad_() for t in (rows.x, w.A, w.B))
    y = []
    for row, owner in zip(x, rows.owner.tolist(), strict=True):
        mine = w.adapter == owner
        rank = int(mine.sum())
        y.append(w.exact @ row + (B[:, mine] @ (A[mine] @ row) * many.ALPHA / rank if rank else 0))
    y = torch.stack(y)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), rows.dy.double())
    for name, expected in {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}.items():
        torch.testing.assert_close(OPS[case.op].truth(w, rows)[name], expected)
