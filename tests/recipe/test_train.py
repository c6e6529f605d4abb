"""`python -m gemini init` and `train`, from the file to a model that transformers opens."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from rich.console import Console
from service_process import running_service
from tiny_model import write_model

from gemini import ConfigError
from gemini.__main__ import main
from gemini.integrations.transformers import GeminiTrainer
from gemini.placement.cost_model import HardwareProfile
from gemini.profile import read_recording
from gemini.recipe.run import train
from gemini.recipe.settings import Settings

pytestmark = pytest.mark.timeout(240)  # for the processes, on a busy machine
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return directory


@pytest.fixture
def write_file(tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write data and a training file with some settings, by section; return the file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    examples = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))

    def write(**sections: dict[str, Any]) -> Path:
        settings: dict[str, Any] = {
            "model": {"path": str(model_directory), "dtype": "fp32"},
            "data": {"files": [str(tmp_path / "data.jsonl")], "sequence_length": 16},
            "memory": {"device": "cpu", "host_budget": "64MiB"},
            "training": {"steps": 4, "learning_rate": 1e-2},
            "output": {"path": str(tmp_path / "run")},
        }
        for name, section in sections.items():
            settings[name] = {**settings[name], **section}
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path / "run" / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


SIGNALLED = """
import os, signal, sys
from gemini.__main__ import main
from gemini.integrations.transformers import GeminiTrainer
training_step = GeminiTrainer.training_step
def signalled_in_the_sixth(self, *arguments, **options):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return training_step(self, *arguments, **options)
GeminiTrainer.training_step = signalled_in_the_sixth
sys.exit(main(["train", sys.argv[1]]))
"""
"""`python -m gemini train`, to which SIGTERM comes in the middle of a step."""


def start(file: Path, *options: str) -> subprocess.Popen[str]:
    return start_python("-m", "gemini", "train", str(file), *options)


def start_python(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_new_file_trains_as_it_stands(tmp_path: Path, model_directory: Path, write_file: Callable[..., Path]) -> None:
    write_file()
    file = tmp_path / "new.yaml"
    options = [
        "--model",
        str(model_directory),
        "--data",
        str(tmp_path / "data.jsonl"),
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(["init", str(file), *options]) == 0
    file.write_text(file.read_text().replace("# sequence_length: 1024", "sequence_length: 16"))
    assert main(["train", str(file)]) == 0
    assert float(rows_of(tmp_path)[-1]["loss"]) > 0
    assert main(["report", str(tmp_path / "run" / "recording"), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("mine")
    assert main(["init", str(tmp_path / "a.yaml")]) == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert (tmp_path / "a.yaml").read_text() == "mine"


def test_a_run_has_the_losses_of_plain_torch(
    tmp_path: Path, model_directory: Path, write_file: Callable[..., Path]
) -> None:
    """The same steps by hand: the first rows, a constant learning rate, no clipping."""
    training = {"steps": 3, "schedule": "constant", "max_grad_norm": 0, "batch_size": 40, "epochs": 3}
    nvme = {"path": str(tmp_path / "swap"), "budget": "64MiB"}
    file = write_file(training=training, memory={"nvme": nvme, "host_budget": "12MiB"}, data={"packing": False})
    assert main(["train", str(file)]) == 0

    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    ids = [tokenizer(f"{i}+{i}={2 * i}")["input_ids"] + [tokenizer.eos_token_id] for i in range(40)]
    longest = max(map(len, ids))
    batch = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    labels = batch.masked_fill(mask == 0, -100)
    for i in range(40):
        labels[i, : len(tokenizer(f"{i}+{i}=")["input_ids"])] = -100
    expected = []
    for _ in range(3):
        loss = model(input_ids=batch, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    rows = [row for row in rows_of(tmp_path) if row["loss"]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    assert float(rows[-1]["padded_tokens_per_s"]) > float(rows[-1]["tokens_per_s"]) > 0
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for name, weight in model.state_dict().items():
        assert torch.allclose(found.state_dict()[name], weight, atol=1e-4), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("a") == tokenizer("a")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks under the old name
def test_adapters_are_saved_as_peft_does(
    tmp_path: Path, model_directory: Path, write_file: Callable[..., Path]
) -> None:
    file = write_file(model={"lora": {"rank": 2, "alpha": 4}}, data={"eval_files": [str(tmp_path / "data.jsonl")]})
    assert main(["train", str(file)]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(model_directory)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    adapters = [value for name, value in adapted.named_parameters() if "lora_B" in name]
    assert adapters
    assert all(value.abs().sum() > 0 for value in adapters)


@pytest.mark.slow
@pytest.mark.processes
def test_a_signal_ends_the_run_and_resume_goes_on_with_the_same_numbers(
    tmp_path: Path, write_file: Callable[..., Path]
) -> None:
    file = write_file(training={"steps": 12, "learning_rate": 1e-3}, data={"sequence_length": 8})
    run = start_python("-c", SIGNALLED, str(file))
    output, errors = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, output + errors
    assert "SIGTERM: saved" in output
    stopped = len(rows_of(tmp_path))
    assert stopped == 6

    again = start(file)
    assert again.communicate()[1].endswith("resume it with --resume, or name another directory\n")
    assert again.returncode == 2
    resumed = start(file, "--resume")
    output, errors = resumed.communicate()
    assert resumed.returncode == 0, output + errors
    found = [row["loss"] for row in rows_of(tmp_path) if row["loss"]]
    assert len(found) == 12

    straight = yaml.safe_load(file.read_text())
    straight["output"]["path"] = str(tmp_path / "straight" / "run")
    train(Settings.model_validate(straight), resume=False, console=Console(quiet=True))
    assert [row["loss"] for row in rows_of(tmp_path / "straight") if row["loss"]] == found


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"path": "none/such"}}, "model.path: there is no directory none/such"),
        ({"model": {"lora": {"target_modules": "nothing"}}}, "model.lora.target_modules: "),
        ({"model": {"lora": {"target_modules": "("}}}, "model.lora.target_modules: missing )"),
        (
            {"model": {"lora": {"target_modules": ["q_proj", "nope"]}}},
            "no module nope; its linear layers are down_proj",
        ),
        (
            {"data": {"sequence_length": 129}},
            "data.sequence_length: expected at most 128 tokens, the positions of the model, got 129",
        ),
        ({"output": {"report_to": ["wandb"]}}, "output.report_to: wandb is not installed"),
        ({"memory": {"nvme": {"path": "/dev/null/x", "budget": "1MiB"}}}, "memory.nvme.path, /dev/null/x: Not a dir"),
        ({"output": {"path": "/dev/null/x"}}, "output.path, /dev/null/x: Not a directory"),
        ({"data": {"files": ["none.jsonl"]}}, "data.files: there is no file none.jsonl"),
        ({"data": {"form": "messages"}}, "data.files: form messages needs the columns messages"),
        ({"memory": {"host_budget": "100KiB"}}, "host tier is short by 684032 bytes"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    sections: dict[str, Any], message: str, write_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    assert main(["train", str(write_file(**sections))]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("gemini: error: ")
    assert message in last


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks under the old name
@pytest.mark.filterwarnings("ignore:.*(lm_head|tie_word_embeddings|embedding layer)")  # peft's advice
def test_the_output_layer_may_have_an_adapter(tmp_path: Path, write_file: Callable[..., Path]) -> None:
    """Its loss cannot be computed in slices, which is no reason to fail in the first step."""
    file = write_file(model={"lora": {"rank": 2, "target_modules": ["lm_head"]}}, training={"steps": 1})
    assert main(["train", str(file)]) == 0
    assert float(rows_of(tmp_path)[0]["loss"]) > 0


def test_what_was_expected_is_recorded_beside_what_was_measured(
    tmp_path: Path, write_file: Callable[..., Path]
) -> None:
    settings = Settings.model_validate(yaml.safe_load(write_file().read_text()))
    rates = HardwareProfile(matrix_rates={"float32": 1e10}, host_memory_rate=1e9)
    finished = train(settings, resume=False, console=Console(quiet=True), profile=rates)
    assert finished.recording is not None
    run = read_recording(finished.recording).run
    assert run.predicted is not None
    assert run.predicted.step_s > 0
    assert run.predicted_activation_nbytes is not None
    assert all(float(row["mfu"]) > 0 for row in rows_of(tmp_path) if row["loss"])


def test_a_run_that_has_ended_is_not_recorded_again(tmp_path: Path, write_file: Callable[..., Path]) -> None:
    settings = Settings.model_validate(yaml.safe_load(write_file(output={"save_steps": 1}).read_text()))
    first = train(settings, resume=False, console=Console(quiet=True))
    again = train(settings, resume=True, console=Console(quiet=True))
    assert first.recording is not None
    assert again.recording is None
    assert again.report.num_steps == first.report.num_steps == 4
    assert len(read_recording(first.recording).steps) == len(rows_of(tmp_path))


def test_a_signal_after_the_last_step_stops_nothing(
    tmp_path: Path, write_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while the last evaluation runs, which no step ends: the model is saved, and nothing is left to resume."""
    file = write_file(data={"eval_files": [str(tmp_path / "data.jsonl")]}, training={"steps": 1})
    evaluate = GeminiTrainer.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(GeminiTrainer, "evaluate", interrupted)
    assert main(["train", str(file)]) == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "model: .*: The hidden size \\(32\\) is not a multiple"),
        ({"num_hidden_layers": 4}, "model.path: .* lacks 9 weights, for example model.layers.3"),
        ({"vocab_size": 100}, "model.tokenizer: it has 260 tokens, the model has 100 embeddings"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path, model_directory: Path, write_file: Callable[..., Path]
) -> None:
    shutil.copytree(model_directory, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | fields))
    settings = Settings.model_validate(yaml.safe_load(write_file(model={"path": str(tmp_path / "m")}).read_text()))
    with pytest.raises(ConfigError, match=message):
        train(settings, resume=False, console=Console(quiet=True))


def test_a_run_is_not_resumed_from_nothing(write_file: Callable[..., Path], tmp_path: Path) -> None:
    settings = Settings.model_validate(yaml.safe_load(write_file().read_text()))
    with pytest.raises(ConfigError, match="--resume: there is no complete checkpoint in"):
        train(settings, resume=True, console=Console(quiet=True))


def test_a_service_named_in_the_environment_grants_the_memory(
    write_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(memory={"host_budget": "64MiB", "job": "tuning"}, training={"steps": 1})
    with running_service(host="32MiB") as service:
        monkeypatch.setenv("GEMINI_SERVICE", service.address)
        assert main(["train", str(file)]) == 2
    assert "can never be granted: the whole node has 32.00 MiB" in capsys.readouterr().err
    with running_service(host="96MiB") as service:
        monkeypatch.setenv("GEMINI_SERVICE", service.address)
        assert main(["train", str(file)]) == 0
        assert service.holds_nothing()
