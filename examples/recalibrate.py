"""Traffic drifts, the monitor notices, new thresholds follow: the life of a guard in service."""

import clusterguard as cg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), num_classes=10)
train, calibration = (
    DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
    for split in ("train", "calibration")
)
trainer = cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1), warmup_epochs=1, calibrator=cg.Calibrator(0.05))
trainer.fit(train, calibration, epochs=4, progress=False)

monitor = cg.FalsePositiveMonitor(cg.deployment.plausible_rate(guard.calibration), run_length=100_000)
images, labels = cg.samples.load_digits("test").tensors
print("as calibrated:", monitor.update(guard.detect(images), labels=labels))

darker = images * 0.7  # a camera has aged
print("after a drift:", monitor.update(guard.detect(darker), labels=labels))

recent_images, recent_labels = cg.samples.load_digits("calibration").tensors  # benign, of the same camera
recent = DataLoader(TensorDataset(recent_images * 0.7, recent_labels), batch_size=250)
new = cg.Calibrator(false_positive_rate=0.05).fit(guard, recent)
monitor = cg.FalsePositiveMonitor(cg.deployment.plausible_rate(new), run_length=100_000)
print("recalibrated:", monitor.update(guard.detect(darker), labels=labels))
