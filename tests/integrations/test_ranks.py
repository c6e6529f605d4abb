"""Trainer on two ranks, with zero.shard in place of DistributedDataParallel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S
from trainer_runs import is_close

pytestmark = pytest.mark.processes


pytest.importorskip("transformers", minversion="5.23", reason="GeminiTrainer was made for transformers 5.23")

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_ranks_train_save_and_resume_as_with_ddp(tmp_path: Path) -> None:
    paths = [str(HERE.parent.parent), str(HERE.parent / "training"), str(HERE)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(HERE / "trainer_on_ranks.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for key in ("loss", "grad_norm", "learning_rate"):
        expected, found, resumed = summary[key]
        assert is_close(found[1:], expected[1:]), key  # the first learning rate is 0
        assert resumed == found, key
    assert summary["is_same"]
    assert is_close(*([loss] for loss in summary["eval_loss"]))
    assert "wrap the model with zero.shard(model, config)" in summary["refusal"]
