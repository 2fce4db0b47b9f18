"""Fine-tune a timm model behind a guard on a folder of images, one subfolder a class: pass yours as the argument."""

import sys
import tempfile
from pathlib import Path

import clusterguard as cg
import timm
import torch
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms

EPOCHS = 2


def write_sample(folder: Path) -> Path:
    """Real digits as PNG files, so that this example runs without a download."""
    images, labels = cg.samples.load_digits("calibration").tensors
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        transforms.functional.to_pil_image(image).save(path)
    return folder


temporary = tempfile.TemporaryDirectory()
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else write_sample(Path(temporary.name))
# Images stay in [0, 1]: the guard normalises them as its backbone was trained.
images = datasets.ImageFolder(str(folder), transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]))
train, calibration, test = random_split(images, [0.5, 0.4, 0.1], generator=torch.Generator().manual_seed(0))
loaders = {
    "train": DataLoader(train, batch_size=50, shuffle=True),
    "calibration": DataLoader(calibration, batch_size=100),
    "test": DataLoader(test, batch_size=100),
}

# pretrained=True is what you want, where its weights can be downloaded.
guard = cg.ClusterGuard(timm.create_model("test_resnet", pretrained=False, num_classes=len(images.classes)))
attack = cg.PGD(norm="linf", eps=8 / 255, step_size=4 / 255, steps=3, keep="last")
trainer = cg.AdversarialClusterTrainer(guard, attack, warmup_epochs=1, calibrator=cg.Calibrator(0.1, scarce="pool"))
trainer.fit(loaders["train"], loaders["calibration"], epochs=EPOCHS, progress=False)
evaluation_attack = cg.PGD(norm="linf", eps=8 / 255, step_size=2 / 255, steps=10)
print(cg.evaluate(guard, evaluation_attack, loaders["test"], sanity_images=20))
temporary.cleanup()
