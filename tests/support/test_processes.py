import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard, TrainingOptions
from clusterguard._support import gather, share
from clusterguard.errors import ConfigurationError
from torch import nn

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Process:
    """One of several, as far as dealing out goes."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_goes_to_one_process_and_order_is_restored(count):
    parts = [dict(share("abcde", Process(index, count))) for index in range(count)]
    assert sum(len(part) for part in parts) == 5
    merged = {position: item for part in reversed(parts) for position, item in part.items()}
    assert gather(merged, None) == list("abcde")


@pytest.mark.usefixtures("fresh_accelerate", "light_suites")
def test_two_processes_train_calibrate_and_evaluate_as_one_does(tmp_path):
    torch.manual_seed(0)
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU()), 3)
    torch.save(guard.state_dict(), tmp_path / "start.pt")
    script = SCRIPTS / "two_processes.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runpy.run_path(str(script))["main"](tmp_path)
    for checkpoint in tmp_path.glob("run.pt*"):
        checkpoint.unlink()
    subprocess.run([*launcher, str(script), str(tmp_path)], check=True)

    alone = torch.load(tmp_path / "1-0.pt")
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"2-{rank}.pt")
        for trained in ("weights", "moved", "accumulated", "proved"):
            for name, value in alone[trained].items():
                torch.testing.assert_close(shared[trained][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shared["thresholds"], alone["thresholds"], rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(shared["history"]), torch.tensor(alone["history"]))
        assert shared["calibration"] == pytest.approx(alone["calibration"], rel=1e-5)
        assert all(map(torch.equal, shared["broken"], alone["broken"]))
        assert shared["cost"] == alone["cost"]
        assert shared["report"] == alone["report"]


def test_batches_that_cannot_be_dealt_out_are_refused(blobs):
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), 3)
    trainer = AdversarialClusterTrainer(guard, PGD(eps=0.1, step_size=0.1), options=TrainingOptions())
    trainer.engine.accelerator = Process(0, 2)
    with pytest.raises(ConfigurationError, match="DataLoader"):
        trainer.fit(list(blobs), blobs, epochs=1, progress=False)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_an_accelerator_that_shards_the_guard_is_refused_before_the_first_step(blobs, kind):
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), 3)
    guard.thresholds = torch.ones(3)
    options = TrainingOptions(accelerator=SimpleNamespace(distributed_type=kind))
    trainer = AdversarialClusterTrainer(guard, PGD(eps=0.1, step_size=0.1), options=options)
    with pytest.raises(ConfigurationError, match=f"as with DDP, got {kind.value}"):
        trainer.fit(blobs, blobs, epochs=1, progress=False)
    assert guard.is_calibrated


def test_training_killed_at_any_step_ends_with_the_same_weights():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPTS / "killed_training.py"), "1", "4", "5", "6", "9"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:-1] == [f"killed at {step}: same" for step in (1, 4, 5, 6, 9)]
