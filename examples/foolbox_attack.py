"""An attack of Foolbox on a guard, unmodified, beside our own: `pip install foolbox` first."""

import clusterguard as cg
from torch import nn
from torch.utils.data import DataLoader

try:
    import foolbox
except ImportError:
    raise SystemExit("this example needs Foolbox: pip install foolbox") from None

guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), num_classes=10)
train, calibration, test = (
    DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
    for split in ("train", "calibration", "test")
)
trainer = cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1), warmup_epochs=1, calibrator=cg.Calibrator(0.05))
trainer.fit(train, calibration, epochs=4, progress=False)
images, labels = next(iter(test))
attacks = {
    # It sees a classifier that may refuse, and tries every wrong class.
    "Foolbox DDN": cg.attacks.from_foolbox(foolbox.attacks.DDNAttack(steps=20), norm="l2", eps=1.0, rejecting=True),
    "our suite": cg.WorstCaseSuite("l2", eps=1.0, budget="quick"),
}
print(cg.evaluate(guard, attacks, [(images[:40], labels[:40])], sanity_images=0))
