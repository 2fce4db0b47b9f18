"""Train a guard for certificates, count what is proved, and ask how far the proof of each image reaches."""

import clusterguard as cg
from torch import nn
from torch.utils.data import DataLoader

train, calibration, test = (
    DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
    for split in ("train", "calibration", "test")
)
network = nn.Sequential(
    nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64),
    nn.ReLU(),
)  # fmt: skip
guard = cg.ClusterGuard(network, num_classes=10)
cg.training.initialise(guard)  # small first bounds, because the weights start from scratch
trainer = cg.recipes.certified(guard, train, epochs=8, eps=0.1, calibrator=cg.Calibrator(0.05))
trainer.fit(train, calibration, epochs=8, progress=False)

bound = cg.certified_success_rate(guard, test, eps=0.05)
print("no attack within 0.05 breaks more than:", bound)

images, labels = cg.samples.load_digits("test").tensors
certificate = cg.certify(guard, images[:5], labels[:5], eps=0.05)
print("proved secure:", certificate.is_secure.tolist())
print("proved up to:", cg.certification.certified_radius(guard, images[:5], labels[:5]))

attacked = cg.evaluate(guard, cg.APGD(norm="linf", eps=0.05, steps=20), test, sanity_images=0).worst_case
print("APGD within 0.05 breaks:", attacked)
assert attacked.count <= bound.count, "a proof holds against every attack"
