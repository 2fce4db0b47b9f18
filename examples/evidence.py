"""Measure a guard and write what a reviewer files about it: a page, the same as JSON, and a bill of materials."""

from pathlib import Path

import clusterguard as cg
import torch
from clusterguard.assurance import assemble_dossier, check_failing_closed
from clusterguard.detection import judge
from torch import nn
from torch.utils.data import DataLoader, Subset

guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), num_classes=10)
train, calibration, test = (
    DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
    for split in ("train", "calibration", "test")
)
trainer = cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1), warmup_epochs=1, calibrator=cg.Calibrator(0.05))
trainer.fit(train, calibration, epochs=4, progress=False)
folder = Path("evidence-guard")
guard.save_pretrained(folder, training={"attack": repr(trainer.attack), "epochs": 4})

attacked = DataLoader(Subset(test.dataset, range(20)), batch_size=20)
suite = cg.WorstCaseSuite("linf", eps=0.1, budget="quick")
report = cg.evaluate(guard, {"suite linf 0.1": suite}, attacked, generator=torch.Generator().manual_seed(0))
dossier = assemble_dossier(
    guard,
    folder,
    report,
    judge(guard, test),
    checks=check_failing_closed(guard, next(iter(test))[0], folder),
    settings={"budget": "quick", "seed": 0},
    purpose="A demonstration on digits. Nobody relies on it.",
)
for file in dossier.write("evidence"):
    print(file)
for line in dossier.content["ai_act"]:
    print(line["reference"], line["about"], "|", line["figure"])
