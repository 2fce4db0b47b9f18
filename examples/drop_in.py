import clusterguard as cg
import timm
from torch.utils.data import DataLoader

train, calibration, test = (
    DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
    for split in ("train", "calibration", "test")
)
guard = cg.ClusterGuard(timm.create_model("test_resnet", in_chans=1, num_classes=10))
attack = cg.PGD(norm="linf", eps=0.1, step_size=0.05, steps=3, keep="last")
averaged = cg.TrainingOptions(average_decay=0.95)  # average the weights over steps
trainer = cg.AdversarialClusterTrainer(guard, attack, options=averaged)
trainer.fit(train, calibration, epochs=4)  # sets thresholds for 1 % false positives
labels, distances, is_adversarial = guard.detect(next(iter(test))[0])
print(cg.evaluate(guard, cg.PGD(norm="linf", eps=0.1, step_size=0.02, steps=20), test))
