"""The command: train, eval, generate end to end, and errors in one line with exit code 2."""

import json
import subprocess
import sys
import time

import pytest

from qlora.cli import main

ONE_THREAD = "import sys, torch; torch.set_num_threads(1); from qlora.cli import main; sys.exit(main())"


@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_train_eval_generate(base, text, tmp_path, capsys, bits):
    out = tmp_path / "out"
    model = ["--model", str(base), "--bits", bits, "--device", "cpu"]
    size = ["--seq-len", "32", "--batch-size", "4"]
    held_out = ["--data", str(text)]
    train = ["train", *model, *size, "--data", str(text), "--eval-data", str(text), "--output", str(out)]
    assert main([*train, "--max-steps", "20", "--lr", "1e-2", "--rank", "4"]) == 0
    assert "trained 8,704 parameters in 20 steps" in capsys.readouterr().out

    assert main(["eval", *model, *size, *held_out]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["eval", *model, *size, *held_out, "--adapter", str(out)]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["perplexity"] == json.loads((out / "training_log.json").read_text())["perplexity"]
    assert after["perplexity"] < 0.9 * before["perplexity"]

    prompt = ["--prompt", "The if", "--max-new-tokens", "5"]
    assert main(["generate", *model, *prompt, "--adapter", str(out)]) == 0
    assert capsys.readouterr().out.startswith("The if")


def run(capsys, *arguments):
    """The one line of stderr of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qlora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--model", "m"], "required: --data, --output"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--bits", "four"], "invalid int value: 'four'"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--bits", "3"], "--bits 3: choose 4, 8, 16"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--rank", "0"], "--rank 0: must be at least 1"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["train", "--model", "m", "--data", "missing", "--output", "o"], "data file missing does not exist"),
        (["eval", "--model", "./m", "--data", __file__], "model directory ./m does not exist"),
        (["generate", "--model", "./m", "--prompt", "x"], "model directory ./m does not exist"),
        (["generate", "--model", "./m", "--prompt", "x", "--top-p", "2"], "--top-p 2.0: must be between 0.001 and 1"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in run(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_too_little_data(base, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("x = 1")
    arguments = ["train", "--model", base, "--data", tmp_path / "short.txt", "--output", tmp_path / "out"]
    assert "less than one block of 512" in run(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_no_adapter(base, tmp_path, capsys):
    arguments = ["generate", "--model", base, "--prompt", "x", "--adapter", tmp_path, "--bits", "16"]
    assert "has no adapter_config.json" in run(capsys, *arguments)


def test_full_disk(base, text, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora.train.write_json", full)
    arguments = ["train", "--model", base, "--data", text, "--output", tmp_path / "out", "--seq-len", "32"]
    assert main([str(argument) for argument in arguments]) == 2
    assert capsys.readouterr().err.endswith("qlora: error: [Errno 28] No space left on device\n")


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora.cli.quiet", interrupt)
    assert main(["generate", "--model", "m", "--prompt", "x"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_killed_and_resumed(base, text, tmp_path, capsys):
    """As it happens to a user: the process is killed, and the command repeated with --resume."""
    size = ["--seq-len", "32", "--batch-size", "4", "--save-steps", "4", "--dropout", "0.1", "--rank", "4"]
    command = ["train", "--model", str(base), "--data", str(text), "--max-steps", "60", "--device", "cpu", *size]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_THREAD, *command, "--output", str(out)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not (out / "checkpoints/checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert {path.name for path in out.iterdir()} == {"checkpoints"}
    assert main([*command, "--output", str(out), "--resume"]) == 0
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    logs = [json.loads((path / "training_log.json").read_text()) for path in (out, tmp_path / "whole")]
    assert logs[0]["losses"] == logs[1]["losses"]


def test_help_is_quick():
    code = "import sys; from qlora.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    module = subprocess.run([sys.executable, "-m", "qlora", "train", "--help"], capture_output=True, text=True)
    assert "--double-quant" in module.stdout
