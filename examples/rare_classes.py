"""Train on classes of unequal sizes, keep the best of several epochs, and leave a part of the network as it is."""

import clusterguard as cg
import torch
from clusterguard.training import Validation, balanced_sampler
from torch import nn
from torch.utils.data import DataLoader, Subset

digits = cg.samples.load_digits("train")
labels = digits.tensors[1]
is_kept = (labels > 1) | (torch.arange(len(labels)) % 4 == 0)  # of zeros and ones, about a quarter is left
chosen = is_kept.nonzero().flatten().tolist()
validation_set, train_set = Subset(digits, chosen[:200]), Subset(digits, chosen[200:])
counts = labels[chosen[200:]].bincount().tolist()

network = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 64))
network[0].requires_grad_(False)  # its weights stay
network.train()
network[1].eval()  # its statistics stay
guard = cg.ClusterGuard(network, num_classes=10)
print("kept in eval mode:", guard.frozen)

train = DataLoader(train_set, batch_size=100, sampler=balanced_sampler(train_set))  # all classes equally often
calibration = DataLoader(cg.samples.load_digits("calibration"), batch_size=250)
trainer = cg.AdversarialClusterTrainer(
    guard, cg.FGSM(eps=0.1), warmup_epochs=1, calibrator=cg.Calibrator(0.05, scarce="pool")
)
validation = Validation(DataLoader(validation_set, batch_size=100), patience=3)
history = trainer.fit(train, calibration, epochs=6, validation=validation, progress=False)
print("images of each class:", counts)
for record in history:
    print(f"epoch {record.epoch}: {record.validation}")

best = max(history[1:], key=lambda record: record.validation["robust_accuracy"])  # the warm-up does not count
print("kept the guard of epoch", best.epoch)

test = DataLoader(cg.samples.load_digits("test"), batch_size=250)  # all classes as often as they come
report = cg.evaluate(guard, cg.FGSM(eps=0.1), test, sanity_images=0)
print("false positives by class:", *report.false_positives_by_class, sep="\n")
