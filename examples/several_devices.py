"""Train, calibrate and evaluate on several devices, or in one process, with the same script."""

import clusterguard as cg
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

accelerator = Accelerator()
torch.manual_seed(0)
guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), num_classes=10)
guard.to(accelerator.device)
each = 100 // accelerator.num_processes  # images of a batch in each process, so that 100 count in a step
train, calibration, test = (
    DataLoader(cg.samples.load_digits(split), batch_size=each, shuffle=split == "train")
    for split in ("train", "calibration", "test")
)
trainer = cg.AdversarialClusterTrainer(
    guard,
    cg.FGSM(eps=0.1),
    warmup_epochs=1,
    calibrator=cg.Calibrator(0.05),
    options=cg.TrainingOptions(accelerator=accelerator),
)
trainer.fit(train, calibration, epochs=4, progress=False)
report = cg.evaluate(guard, cg.FGSM(eps=0.1), test, sanity_images=0, accelerator=accelerator)
if accelerator.is_main_process:  # every process has the whole result
    guard.save_pretrained("guard")
    print(accelerator.num_processes, "processes;", report)
accelerator.end_training()
