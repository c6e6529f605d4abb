"""Plans against engines: the same placement, and peaks within five per cent of what is measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement
from gemini.assembly.blueprint import draw_layout
from gemini.errors import ModelError, OutOfTierMemoryError
from gemini.nn import use_sliced_loss
from gemini.placement.cost_model import Channel, HardwareProfile, StepFlops, transformer_flops
from gemini.planning.rehearsal import Rehearsal, rehearse
from gemini.planning.training_plan import MachineMemory, plan_step, plan_training, remedies
from gemini.tiers import MemoryTier

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
MIB, GIB = 1 << 20, 1 << 30
ROWS, SEQ = 4, 128
PROFILE = HardwareProfile(
    matrix_rates={"float32": 1e12},
    host_memory_rate=1e10,
    device_memory_rate=1e12,
    h2d_rate=1e10,
    d2h_rate=1e10,
    nvme_read_rate=2e9,
    nvme_write_rate=1e9,
    nvme_mixed_rate=2e9,
)


def gpt2(device="meta"):
    config = transformers.GPT2Config(
        n_layer=4, n_embd=256, n_head=4, n_positions=SEQ, vocab_size=4096, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model.train()


def llama(device="meta"):
    config = transformers.LlamaConfig(
        num_hidden_layers=4, hidden_size=256, intermediate_size=688, num_attention_heads=4, vocab_size=4096,
        max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).train()


def plain(model):
    pass


def with_checkpoints(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def with_sliced_loss(model):
    use_sliced_loss(model)


def with_both(model):
    with_checkpoints(model)
    with_sliced_loss(model)


def loss_of(model):
    token_ids = torch.arange(ROWS * SEQ).reshape(ROWS, SEQ)
    return model(input_ids=token_ids, labels=token_ids).loss


def measure(model, config):
    """Return the peaks of three steps, activations included; those of activations alone; and the plan in force."""
    with GeminiDDP(model, config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-3)
        for _ in range(3):
            with engine.trace_memory():
                loss_of(engine).backward()
            optimizer.step()
        report = engine.memory_report()
        peaks = {tier: entry.peak_nbytes for tier, entry in zip(MemoryTier, report.tiers, strict=True)}
        compute = HOST if config.device == "cpu" else DEVICE
        peaks[compute] += report.non_model_peak_nbytes
        return peaks, report.non_model_peak_nbytes, engine.runtime.plan


def config_for(device, dtype=torch.float32, **fields):
    return GeminiConfig(device=device, dtype=dtype, tile_numel=1 << 16, min_unit_nbytes=4096, **fields)


MACHINES = {
    "host": ("cpu", MachineMemory(device=None, host=2 * GIB, nvme=None), {}),
    "disk": (
        "cpu",
        MachineMemory(device=None, host=2 * GIB, nvme=GIB),
        {"placement": StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1)},
    ),
    # Its kernels are plain torch's, whose temporaries would count as activations where it keeps gradients.
    "device": (
        "simulated",
        MachineMemory(device=160 * MIB, host=2 * GIB, nvme=None),
        {"placement": StaticPlacement(param_device=1)},
    ),
    "all three": (
        "simulated",
        MachineMemory(device=120 * MIB, host=2 * GIB, nvme=GIB),
        {"placement": StaticPlacement(param_device=0.5, param_nvme=0.2, state_nvme=0.5)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("make", "prepare", "fields"),
    [
        (gpt2, plain, {}),
        (gpt2, with_checkpoints, {}),
        (gpt2, with_sliced_loss, {"gradient_accumulation": False}),
        (llama, with_sliced_loss, {}),
        (llama, with_both, {"gradient_accumulation": False}),
        (llama, plain, {"num_batch_slices": 2}),
    ],
    ids=["gpt2", "gpt2 checkpointed", "gpt2 sliced loss", "llama sliced loss", "llama with both", "llama in slices"],
)
def test_peaks_are_within_five_per_cent_of_the_engines(make, prepare, fields, machine, tmp_path):
    device, memory, placement = MACHINES[machine]
    config = config_for(
        device, nvme=NVMeConfig(path=tmp_path, budget=GIB) if memory.nvme else None, **fields, **placement
    )
    model = make()
    prepare(model)
    plan = plan_step(model, loss_of, config, num_tokens=ROWS * SEQ, memory=memory)
    trained = make("cpu")
    prepare(trained)
    peaks, activations_nbytes, in_force = measure(trained, plan.config)
    planned = {tier: plan.peak_nbytes(tier) for tier in MemoryTier}
    assert planned == pytest.approx(peaks, rel=0.05)
    assert plan.rehearsal.peak_nbytes == pytest.approx(activations_nbytes, rel=0.05)
    assert in_force.chunks == plan.blueprint.plan.chunks


def test_automatic_placement_on_a_device_is_the_engines():
    memory = MachineMemory(device=120 * MIB, host=2 * GIB, nvme=None)
    plan = plan_step(gpt2(), loss_of, config_for("simulated"), num_tokens=ROWS * SEQ, memory=memory)
    peaks, _, in_force = measure(gpt2("cpu"), plan.config)
    assert in_force.chunks == plan.blueprint.plan.chunks
    assert plan.peak_nbytes(DEVICE) == pytest.approx(peaks[DEVICE], rel=0.05)
    assert plan.peak_nbytes(HOST) == peaks[HOST]


def test_rehearsal_leaves_the_model_as_it_was():
    model = gpt2()
    before = dict(model.named_parameters()), dict(model.named_buffers()), model.forward
    config = config_for("cpu", num_batch_slices=2)
    rehearse(model, loss_of, config, draw_layout(model, config), has_device=False)
    after = dict(model.named_parameters()), dict(model.named_buffers()), model.forward
    assert all(after[0][name] is param for name, param in before[0].items())
    assert all(after[1][name] is buffer for name, buffer in before[1].items())
    assert after[2] == before[2]
    assert model.transformer.h[0].forward.__func__ is type(model.transformer.h[0]).forward


def test_counted_operations_are_those_of_the_formula():
    model = gpt2()
    config = config_for("cpu")
    work = rehearse(model, loss_of, config, draw_layout(model, config), has_device=False).work
    matrices = sum(p.numel() for block in model.transformer.h for p in block.parameters() if p.dim() == 2)
    formula = transformer_flops(
        num_params=matrices + model.lm_head.weight.numel(),
        num_tokens=ROWS * SEQ,
        num_layers=4,
        hidden_size=256,
        sequence_length=SEQ,
    )
    attention = 4 * ROWS * SEQ * 4 * 256 * SEQ
    assert work.forward == formula.forward
    assert work.backward == formula.backward + attention / 2  # fused attention computes its scores again


def test_checkpointing_trades_operations_for_bytes():
    config = config_for("cpu")
    found = []
    for prepare in (plain, with_checkpoints):
        model = gpt2()
        prepare(model)
        found.append(rehearse(model, loss_of, config, draw_layout(model, config), has_device=False))
    assert found[1].peak_nbytes < found[0].peak_nbytes
    assert found[1].work.backward > found[0].work.backward


def test_counted_traffic_is_that_of_the_operations_alone():
    model, config = torch.nn.Linear(64, 64), config_for("cpu")
    layout = draw_layout(model, config)
    work = rehearse(model, lambda m: m(torch.ones(8, 64)).sum(), config, layout, has_device=False).work
    # The batch is written and the output summed; asking a tensor for its device moves nothing.
    assert work.forward_nbytes == 8 * 64 * 4 + 8 * 64 * 4 + 4
    # The first gradient, like the sum; and the bias's, a sum of rows that are one element in memory.
    assert work.backward_nbytes == 4 + 4 + 4 + 64 * 4


def test_a_forward_that_needs_values_cannot_be_rehearsed():
    class Branch(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * int(x.sum().item())

    model, config = Branch(8, 8), config_for("cpu")
    with pytest.raises(
        ModelError, match="cannot estimate the activation memory of Branch: its forward depends on tensor values"
    ):
        rehearse(model, lambda m: m(torch.ones(2, 8)).sum(), config, draw_layout(model, config), has_device=False)


REHEARSAL = Rehearsal(peak_nbytes=10 * MIB, checkpoint_nbytes=0, work=StepFlops(forward=1e9, backward=2e9))


def small_plan(memory, rehearsal=REHEARSAL, **fields):
    return plan_training(gpt2(), config_for(None, **fields), rehearsal, num_tokens=512, memory=memory, profile=PROFILE)


ON_DISK = {"placement": StaticPlacement(param_nvme=1, state_nvme=1), "overlap": "off"}
WITH_DISK = MachineMemory(device=None, host=GIB, nvme=GIB)


def test_compute_bound_tokens_are_where_compute_takes_as_long_as_the_disk():
    plan = small_plan(WITH_DISK, **ON_DISK)
    more = plan.compute_bound_tokens / 512
    scaled = dataclasses.replace(REHEARSAL, work=StepFlops(forward=1e9 * more, backward=2e9 * more))
    seconds = small_plan(WITH_DISK, scaled, **ON_DISK).prediction.seconds
    assert plan.prediction.bottleneck is Channel.NVME
    assert seconds[Channel.COMPUTE] == pytest.approx(seconds[Channel.NVME], rel=0.01)


def test_days_of_life_are_endurance_over_what_is_written_a_day():
    nvme = NVMeConfig(path=".", budget=GIB, endurance="1TB")
    plan = small_plan(WITH_DISK, nvme=nvme, **ON_DISK)
    written = plan.work.total.nvme_written_nbytes
    assert written > 0
    assert plan.days_of_life == pytest.approx(1e12 / written * plan.prediction.step_s / 86_400, rel=1e-3)


def test_every_remedy_is_needed_and_names_an_amount():
    short = MachineMemory(device=None, host=560 * MIB, nvme=None)
    config = config_for(None)
    with pytest.raises(OutOfTierMemoryError, match="^host tier is short by"):
        plan_training(gpt2(), config, REHEARSAL, num_tokens=1, memory=short)
    found = remedies(gpt2(), config, REHEARSAL, memory=short)
    assert [text.rpartition("(")[2] for text in found] == ["--disk)", "--host-memory)"]


def test_activations_alone_may_be_too_much():
    large = dataclasses.replace(REHEARSAL, peak_nbytes=GIB)
    with pytest.raises(OutOfTierMemoryError, match="^device tier is short .* before any chunk is placed.*slices"):
        small_plan(MachineMemory(device=GIB, host=GIB, nvme=None), large)
