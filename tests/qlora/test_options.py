"""Settings that are not allowed are named, with what is."""

import math

import pytest

from qlora.errors import InputError
from qlora.model import Quantization
from qlora.options import TrainOptions


def options(**changes):
    return TrainOptions(model="m", data=["d"], output="o", **changes)


def test_defaults_are_allowed():
    options().check()


def test_identity_holds_what_decides_the_losses():
    same = options().identity()
    for changes in ({"resume": True}, {"save_steps": 7}, {"progress": False}):
        assert options(**changes).identity() == same
    for changes in ({"seed": 1}, {"quantization": Quantization(8)}, {"grad_accum": 2}, {"epochs": 1.0}):
        assert options(**changes).identity() != same


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("alpha", 0.0),
        ("alpha", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("scheduler", "step"),
        ("warmup_ratio", 1.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", -1.0),
        ("epochs", 0.0),
        ("max_steps", -1),
        ("batch_size", 0),
        ("grad_accum", 0),
        ("seq_len", 1),
        ("eval_fraction", 1.0),
        ("eval_steps", -1),
        ("save_steps", 0),
        ("seed", -1),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} {value}: "):
        options(**{name: value}).check()


@pytest.mark.parametrize(
    "quantization",
    [Quantization(3), Quantization(4, quant_type="nf3"), Quantization(4, block_size=48), Quantization(8, threshold=-1)],
)
def test_bad_quantization_is_named(quantization):
    with pytest.raises(InputError, match=r"^--(bits|quant-type|block-size|threshold) "):
        options(quantization=quantization).check()


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(InputError, match="exclude each other"):
        options(resume=True, overwrite=True).check()
