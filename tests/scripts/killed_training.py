"""Train in child processes that kill themselves at given steps, go on, and print whether it made a difference."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import clusterguard as cg
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

EPOCHS, EVERY = 3, 2


class Augmented(Dataset):
    """Bands of light, with noise from torch's global random state."""

    def __len__(self):
        return 45

    def __getitem__(self, index):
        image = 0.3 * torch.rand(1, 6, 6)
        image[:, 2 * (index % 3) : 2 * (index % 3) + 2] += 0.6
        return image.clamp(0, 1), index % 3


def train(checkpoint: Path | None, kill_at: int | None = None, *, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    body = [nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)]
    guard = cg.ClusterGuard(nn.Sequential(*body), 3, example=torch.rand(2, 1, 6, 6))
    optimizer = torch.optim.Adam(guard.parameters(), lr=5e-3)
    trainer = cg.AdversarialClusterTrainer(
        guard,
        cg.PGD(eps=0.1, step_size=0.05, steps=2, start="random", keep="last"),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=5 * EPOCHS),
        refresh_every=3,
        refresh_batches=2,
        ramp_epochs=1.5,
        calibrator=cg.Calibrator(0.2, scarce="pool"),
        options=cg.TrainingOptions(schedule_every="step", average_decay=0.9, clip_norm=5.0),
    )
    if kill_at is not None:
        after_step = trainer.after_step

        def die(batches):
            after_step(batches)
            if trainer.engine.steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.after_step = die
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Augmented(), batch_size=9, shuffle=True)
    calibration = DataLoader(Augmented(), batch_size=15, shuffle=True)
    trainer.fit(
        loader,
        calibration,
        epochs=EPOCHS,
        checkpoint=checkpoint,
        checkpoint_every=EVERY,
        generator=generator,
        progress=False,
    )
    records = torch.tensor([[record.loss, record.accuracy, record.mean_threshold] for record in trainer.history])
    return {**guard.state_dict(), "records": records}


def main() -> None:
    torch.set_num_threads(1)
    straight = train(None)
    for kill_at in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "run.pt"
            for moment in (kill_at, kill_at + 4):  # killed, and killed again after going on
                child = os.fork()
                if not child:
                    train(checkpoint, moment)
                    os._exit(0)
                status = os.waitpid(child, 0)[1]
                assert os.WTERMSIG(status) == signal.SIGKILL, status
            resumed = train(checkpoint, seed=7)
        same = [name for name in straight if torch.equal(straight[name], resumed[name])]
        print(f"killed at {kill_at}:", "same" if len(same) == len(straight) else set(straight) - set(same))


if __name__ == "__main__":
    main()
