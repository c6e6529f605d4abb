"""`python -m gemini plan`: what it prints, its exit codes, and what planning a large model itself takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gemini.__main__ import main
from gemini.cli.models import SHAPES
from gemini.planning.hardware import HardwareProfile, save_profile
from gemini.planning.machine import MachineDescription

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
MACHINE = MachineDescription(
    processor="x",
    num_cpus=8,
    instruction_sets=("scalar",),
    num_memory_nodes=1,
    memory_nbytes=64 * GIB,
    device="y",
    device_memory_nbytes=24 * GIB,
    disk_nbytes=None,
    disk_free_nbytes=None,
)
RATES = HardwareProfile(
    matrix_rates={"float32": 1e13, "bfloat16": 1e14},
    host_memory_rate=1e11,
    device_memory_rate=1e12,
    h2d_rate=2e10,
    d2h_rate=2e10,
    nvme_read_rate=6e9,
    nvme_write_rate=4e9,
    nvme_mixed_rate=6e9,
)
SHORT = ["--tokens", "128", "--seq", "64"]


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(RATES, path, MACHINE)
    return str(path)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A function of the user's that returns a small model."""
    (tmp_path / "users_models.py").write_text(
        textwrap.dedent("""
        import transformers

        def small():
            config = transformers.LlamaConfig(
                num_hidden_layers=8, hidden_size=512, intermediate_size=1024, num_attention_heads=4, vocab_size=4096
            )
            return transformers.LlamaForCausalLM(config)

        def no_model():
            return 3

        def raising():
            raise KeyError("a shape\\nof another")

        def without_loss():
            import torch
            class Model(torch.nn.Embedding):
                def forward(self, input_ids, labels):
                    return super().forward(input_ids)
            return Model(4, 4)

        def failing():
            import torch
            class Model(torch.nn.Embedding):
                def forward(self, input_ids, labels):
                    return {}["missing"]
            return Model(4, 4)

        def without_products():
            import torch, types
            class Model(torch.nn.Embedding):
                def forward(self, input_ids, labels):
                    return types.SimpleNamespace(loss=super().forward(input_ids).sum())
            return Model(4, 4)
        """)
    )
    monkeypatch.chdir(tmp_path)
    yield "users_models:small"
    sys.modules.pop("users_models", None)


def run(capsys, *argv):
    code = main(["plan", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_for_another_machine_takes_its_memory_and_rates_from_the_profile(capsys, profile, model):
    code, out, _ = run(capsys, model, *SHORT, "--profile", profile, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] is True
    assert found["memory_nbytes"] == {"device": 24 * GIB, "host": 64 * GIB, "nvme": None}
    assert found["num_params"] == 8 * (4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512) + 2 * 4096 * 512 + 512
    assert found["peak_nbytes"]["device"] == sum(found["peak_nbytes_by_purpose"]["device"].values())
    assert found["tokens_per_s"] == pytest.approx(128 / found["step_s"])


def test_what_does_not_fit_ends_with_one_and_says_what_would_help(capsys, profile, model):
    code, out, err = run(
        capsys, model, *SHORT, "--profile", profile, "--device-memory", "none", "--host-memory", "720MiB"
    )
    assert code == 1
    assert err.startswith("gemini: does not fit: host tier is short by")
    assert err.count("\n") == 1
    assert "Each of these changes would make it fit:" in out
    assert "  - use " in out


@pytest.mark.slow
def test_the_savings_that_are_named_are_enough(capsys, profile):
    machine = ["gpt2", "--profile", profile, "--device-memory", "none", "--disk", "6GiB", "--tokens", "512"]

    def remedies(*options):
        _, out, _ = run(capsys, *machine, "--json", *options)
        found = json.loads(out)
        return [] if found["fits"] else [text for text in found["remedies"] if "memory" not in text]

    recompute = "recompute activations in backward (--checkpoint-activations)"
    slices = "compute the loss in slices (--sliced-loss)"
    assert remedies("--host-memory", "1300MiB") == [recompute, slices]
    assert remedies("--host-memory", "1000MiB") == [f"{recompute} and {slices}"]
    assert remedies("--host-memory", "1000MiB", "--checkpoint-activations") == [slices]
    for option in ("--checkpoint-activations", "--sliced-loss"):
        assert run(capsys, *machine, "--host-memory", "1300MiB", option)[0] == 0
    assert run(capsys, *machine, "--host-memory", "1000MiB", "--checkpoint-activations", "--sliced-loss")[0] == 0


def test_the_remedy_of_disk_is_enough(capsys, profile, model):
    machine = ["--profile", profile, "--device-memory", "none", "--host-memory", "720MiB"]
    _, out, _ = run(capsys, model, *SHORT, *machine, "--json")
    (disk,) = (text for text in json.loads(out)["remedies"] if "--disk" in text)
    amount = f"{float(disk.split()[1]) + 0.01}{disk.split()[2]}"
    assert run(capsys, model, *SHORT, *machine, "--disk", amount)[0] == 0


def test_tables_name_peak_time_bottleneck_wear_and_configuration(capsys, profile, model):
    options = ["--device-memory", "none", "--host-memory", "720MiB", "--disk", "4GiB", "--endurance", "600TBW"]
    code, out, _ = run(capsys, model, *SHORT, "--profile", profile, *options)
    assert code == 0
    for text in ("activations", "Predicted step", "bottleneck", "compute-bound from", "rated life", "host_budget="):
        assert text in out


def test_what_if_has_a_row_for_every_combination(capsys, profile, model):
    varied = ["--what-if", "host-memory=720MiB,32GiB", "--what-if", "disk=none,4GiB"]
    code, out, _ = run(capsys, model, *SHORT, "--profile", profile, "--device-memory", "none", *varied, "--json")
    found = [
        (row["memory_nbytes"]["host"] // GIB, row["memory_nbytes"]["nvme"], row["fits"]) for row in json.loads(out)
    ]
    assert found == [(0, None, False), (0, 4 * GIB, True), (32, None, True), (32, 4 * GIB, True)]
    assert code == 1


def test_what_if_prints_a_table(capsys, profile, model):
    code, out, _ = run(capsys, model, *SHORT, "--profile", profile, "--what-if", "device-memory=1GiB,none")
    assert code == 0
    assert out.count("yes") == 2


def test_without_a_profile_there_is_no_time(capsys, monkeypatch, tmp_path, model):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    code, out, _ = run(capsys, model, *SHORT, "--device-memory", "none", "--host-memory", "8GiB")
    assert code == 0
    assert "no profile of this machine" in out


def test_rates_that_were_not_measured_leave_the_time_out(capsys, tmp_path, model):
    """One measures the machine one has, and plans for the one to be rented."""
    path = tmp_path / "cpu.json"
    save_profile(HardwareProfile(matrix_rates={"float32": 1e13}, host_memory_rate=1e11), path, MACHINE)
    machine = ["--profile", str(path), "--device-memory", "24GiB", "--host-memory", "64GiB", "--disk", "1TiB"]
    code, out, _ = run(capsys, model, *SHORT, *machine)
    assert code == 0
    assert "Step time: the hardware profile has no rate for" in out
    code, out, _ = run(capsys, model, *SHORT, *machine, "--json")
    assert json.loads(out)["why_no_time"].startswith("the hardware profile has no rate for")


def test_a_model_without_matrix_products_has_no_bound_by_compute(capsys, profile, model):
    code, out, _ = run(capsys, "users_models:without_products", *SHORT, "--profile", profile, "--dtype", "fp32")
    assert code == 0
    assert "compute-bound" not in out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_positions": 32}, "--seq: expected at most 32 tokens, the positions of the model, got 64"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "it is quantized"),
    ],
)
def test_configurations_that_cannot_be_trained_are_refused(capsys, tmp_path, fields, message):
    import transformers

    transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=512, **fields).save_pretrained(tmp_path / "m")
    code, _, err = run(capsys, str(tmp_path / "m"), *SHORT)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("kind", ["T5Config", "ViTConfig"])
def test_models_of_other_kinds_are_refused_in_a_line_of_readable_length(capsys, tmp_path, kind):
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path / "m")
    code, _, err = run(capsys, str(tmp_path / "m"), *SHORT)
    assert code == 2
    assert f"{kind}'>" in err
    assert len(err) < 500


def test_a_directory_with_a_configuration_is_a_model(capsys, tmp_path, profile):
    import transformers

    transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=512).save_pretrained(tmp_path / "saved")
    code, out, _ = run(capsys, str(tmp_path / "saved"), *SHORT, "--profile", profile, "--json")
    assert code == 0
    assert json.loads(out)["num_params"] == 2 * 12 * 64 * 64 + 2 * 13 * 64 + 512 * 64 + 1024 * 64 + 2 * 64


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing-of-that-name"], "expected one of gpt2"),
        (["users_models:large"], "has no attribute 'large'"),
        (["no_such_module:small"], "No module named 'no_such_module'"),
        (["users_models:no_model"], "expected a torch.nn.Module, got int"),
        (["users_models:raising"], "users_models.py:14: KeyError: 'a shape"),
        (["users_models:without_loss"], "Model: expected an output with a loss of one element"),
        (["users_models:failing"], "KeyError: 'missing'"),
        (["users_models:small", "--endurance", "600TBW"], "--endurance: expected --disk too"),
        (["users_models:small", "--what-if", "disk=1GiB", "--what-if", "disk=2GiB"], "disk is given twice"),
        (["users_models:small", "--tokens", "100", "--seq", "64"], "--tokens: expected a multiple of --seq"),
        (["users_models:small", "--host-memory", "much"], "--host-memory: cannot read 'much' as bytes"),
        (["users_models:small", "--what-if", "weather=1"], "--what-if: expected one of model"),
        (["users_models:small", "--profile", "missing.json"], "No such file"),
    ],
)
def test_mistakes_end_with_two_and_one_line(capsys, model, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-70b"])
def test_large_models_are_planned_in_half_a_minute_and_two_gigabytes(name, profile):
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        start = time.process_time()
        from gemini.__main__ import main
        code = main(["plan", "{name}", "--profile", {profile!r}, "--disk", "2TB", "--checkpoint-activations",
                     "--sliced-loss", "--json"])
        status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would begin with pytest's own peak
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        sys.stderr.write(f"RESULT {{code}} {{time.process_time() - start}} {{peak}}")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    code, seconds, peak = done.stderr.partition("RESULT ")[2].split()
    assert code == "0"
    assert float(seconds) < 30
    assert int(peak) < 2e9
    assert json.loads(done.stdout)["fits"]


@pytest.mark.parametrize(
    ("name", "num_params"), [("gpt2", 124_439_808), ("gpt2-large", 774_030_080), ("llama-7b", 6_738_415_616)]
)
def test_known_shapes_have_their_known_size(name, num_params):
    from gemini.cli.models import load_model

    assert name in SHAPES
    assert sum(param.numel() for param in load_model(name).parameters()) == num_params
