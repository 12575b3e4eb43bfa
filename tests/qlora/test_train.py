"""A training: what it writes, when it refuses, and that resuming changes nothing."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from qlora.errors import InputError
from qlora.model import Quantization
from qlora.options import TrainOptions
from qlora.train import train


def options(base, text, output, bits=4, **changes):
    settings = {
        "model": str(base),
        "data": [str(text)],
        "output": str(output),
        "quantization": Quantization(bits),
        "rank": 4,
        "dropout": 0.1,
        "lr": 5e-3,
        "max_steps": 8,
        "batch_size": 4,
        "seq_len": 32,
        "save_steps": 3,
        "device": "cpu",
        "progress": False,
    }
    return TrainOptions(**settings | changes)


class StopAt(TrainerCallback):
    """Interrupts as the user would, before step `step` is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses(log):
    return [(entry["step"], entry["loss"], entry["learning_rate"], entry["grad_norm"]) for entry in log["losses"]]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_resumed_training_has_the_same_losses_bit_for_bit(base, text, tmp_path, bits):
    settings = {"bits": bits, "eval_steps": 2, "grad_accum": 2}
    whole = train(options(base, text, tmp_path / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(options(base, text, tmp_path / "parts", **settings), callbacks=(StopAt(5),))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoints"]
    resumed = train(options(base, text, tmp_path / "parts", resume=True, **settings))

    assert losses(resumed) == losses(whole)
    assert resumed["eval_losses"] == whole["eval_losses"]
    assert resumed["perplexity"] == whole["perplexity"]
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() | theirs.keys())


def test_resuming_skips_a_checkpoint_that_was_being_written(base, text, tmp_path):
    whole = train(options(base, text, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(options(base, text, tmp_path / "parts"), callbacks=(StopAt(7),))
    state = tmp_path / "parts/checkpoints/checkpoint-6/trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert losses(train(options(base, text, tmp_path / "parts", resume=True))) == losses(whole)


def test_resuming_before_the_first_checkpoint_starts_again(base, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(options(base, text, tmp_path), callbacks=(StopAt(2),))
    assert len(train(options(base, text, tmp_path, resume=True))["losses"]) == 8


def test_resuming_refuses_other_settings_and_other_data(base, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(options(base, text, tmp_path / "out"), callbacks=(StopAt(4),))
    with pytest.raises(InputError, match=r"lr is 0.1, was 0.005"):
        train(options(base, text, tmp_path / "out", resume=True, lr=0.1))
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().upper())
    with pytest.raises(InputError, match="the training data differs"):
        train(options(base, other, tmp_path / "out", resume=True))
    with pytest.raises(InputError, match="no training to resume"):
        train(options(base, text, tmp_path / "new", resume=True))
    assert not (tmp_path / "new").exists()


def test_output_and_log(base, text, tmp_path):
    log = train(options(base, text, tmp_path / "out", eval_steps=4))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "loss.png",
        "training_log.json",
    }
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out/training_log.json").read_text()) == json.loads(json.dumps(log))
    assert [entry["step"] for entry in log["losses"]] == list(range(1, 9))
    assert [entry["step"] for entry in log["eval_losses"]] == [4, 8]
    assert math.isclose(log["eval_losses"][-1]["loss"], log["eval_loss"], rel_tol=1e-3)
    assert all(entry["grad_norm"] > 0 for entry in log["losses"])
    assert log["losses"][-1]["loss"] < log["losses"][0]["loss"]


def test_the_adapter_loads_in_stock_peft(base, text, tmp_path):
    train(options(base, text, tmp_path / "out"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    loaded = model.state_dict()
    assert len(stored) == 28
    for name, tensor in stored.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], tensor, rtol=0, atol=0)


def test_same_seed_same_losses_and_another_seed_others(base, text, tmp_path):
    first, again, other = (
        losses(train(options(base, text, tmp_path / str(i), seed=seed))) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


def test_gradient_checkpointing_changes_no_loss(base, text, tmp_path):
    plain = train(options(base, text, tmp_path / "plain"))
    checkpointed = train(options(base, text, tmp_path / "checkpointed", gradient_checkpointing=True))
    assert losses(plain) == losses(checkpointed)


def test_a_used_output_is_refused_and_overwrite_replaces_only_its_own(base, text, tmp_path):
    train(options(base, text, tmp_path, max_steps=2, seed=1))
    (tmp_path / "notes.md").write_text("mine")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists and is not empty"):
        train(options(base, text, tmp_path))
    train(options(base, text, tmp_path, overwrite=True))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_refused_training_leaves_an_earlier_one_alone(base, text, tmp_path):
    train(options(base, text, tmp_path, max_steps=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match="target-modules"):
        train(options(base, text, tmp_path, overwrite=True, target_modules=["nothing"]))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_loss_that_is_no_number_stops_the_training(base, text, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+; use a lower --lr"):
        train(options(base, text, tmp_path, lr=1e3, max_grad_norm=0.0, max_steps=60, scheduler="constant"))
    assert not (tmp_path / "adapter_config.json").exists()


def test_resuming_a_finished_training_changes_nothing(base, text, tmp_path):
    first = train(options(base, text, tmp_path))
    again = train(options(base, text, tmp_path, resume=True))
    assert losses(again) == losses(first)
    assert again["perplexity"] == first["perplexity"]


def test_blocks_longer_than_the_model_takes(base, text, tmp_path):
    with pytest.raises(InputError, match="128 positions"):
        train(options(base, text, tmp_path / "out", seq_len=200))
    assert not (tmp_path / "out").exists()
