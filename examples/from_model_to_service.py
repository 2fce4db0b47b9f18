"""The whole way from a classifier that you fine-tuned on a folder of PNGs to a guard that answers over HTTP."""

import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import clusterguard as cg
import torch
import uvicorn
from clusterguard.deployment import fit_image, read_image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, random_split
from torchvision import datasets, models, transforms

sys.path.insert(0, str(Path(sys.argv[0]).parent / "serve"))
from app import create_app

MEAN, STD, SIDE, PHOTOS = [0.2] * 3, [0.3] * 3, 16, 800
torch.manual_seed(0)
temporary = tempfile.TemporaryDirectory()
home = Path(temporary.name)


def write_photos(folder: Path) -> None:
    """Your folder: one subfolder a class."""
    digits = cg.samples.load_digits("calibration")
    for index, (image, label) in enumerate(digits[number] for number in range(PHOTOS)):
        path = folder / f"digit {int(label)}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        transforms.functional.to_pil_image(image).save(path)


def fine_tune(loader: DataLoader) -> nn.Module:
    """Your model: a ResNet of torchvision, trained the usual way, on images that its transform normalises."""
    model = models.resnet18(num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def accuracy(classify: Callable[[Tensor], Tensor], loader: DataLoader) -> float:
    """The share of images that get their label from a function from images to labels."""
    with torch.no_grad():
        return float(torch.cat([classify(images) == labels for images, labels in loader]).double().mean())


def ask(application: object, files: list[Path]) -> list[dict]:
    """The verdicts of the service on image files, over HTTP."""
    body = b""
    for file in files:
        body += b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\nContent-Type: image/png\r\n\r\n'
        body += file.read_bytes() + b"\r\n"
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/detect", body + b"--x--\r\n", headers)
    answer = json.load(urllib.request.urlopen(request, timeout=30))
    server.should_exit = True
    thread.join()
    return answer["verdicts"]


# Your classifier, before there is a guard.
write_photos(home / "photos")
resized = [transforms.Resize((SIDE, SIDE)), transforms.ToTensor()]
yours = datasets.ImageFolder(str(home / "photos"), transforms.Compose([*resized, transforms.Normalize(MEAN, STD)]))
parts = random_split(range(len(yours)), [0.5, 0.3, 0.2], generator=torch.Generator().manual_seed(0))
model = fine_tune(DataLoader(Subset(yours, [*parts[0]]), 25, shuffle=True))
your_test = DataLoader(Subset(yours, [*parts[2]]), 100)
steps = {"your model": accuracy(lambda images: model(images).argmax(1), your_test)}

# The guard takes pixels in [0, 1] and normalises them itself. Files are read as the service will read them.
photos = datasets.ImageFolder(
    str(home / "photos"), lambda image: fit_image(image, (SIDE, SIDE), 3), loader=lambda path: read_image(path).image
)
train, calibration, test = (DataLoader(Subset(photos, [*part]), 50, shuffle=part is parts[0]) for part in parts)
guard = cg.ClusterGuard(model, mean=MEAN, std=STD)
steps["wrapped"] = accuracy(lambda images: guard(images).argmax(1), test)

cg.align(guard, train)
cg.Calibrator(0.1, scarce="pool").fit(guard, calibration)
images, labels = next(iter(test))
print(
    "detected:", guard.name_labels(guard.detect(images[:5])), "of", [guard.class_names[label] for label in labels[:5]]
)
steps["aligned"] = accuracy(lambda images: guard.detect(images).labels, test)

trainer = cg.AdversarialClusterTrainer(
    guard,
    cg.FGSM(eps=0.01),
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-5),
    calibrator=cg.Calibrator(0.1, scarce="pool"),
)
trainer.fit(train, calibration, epochs=1)
steps["trained"] = accuracy(lambda images: guard.detect(images).labels, test)

# Elsewhere there is the folder, and nothing else of the above.
guard.save_pretrained(home / "guard")
(home / "guard").rename(home / "elsewhere")
loaded = cg.ClusterGuard.from_pretrained(home / "elsewhere")
steps["loaded"] = accuracy(lambda images: loaded.detect(images).labels, test)

cg.export_onnx(loaded, home / "guard.onnx")
graph = cg.load_onnx(home / "guard.onnx")
steps["exported"] = accuracy(lambda images: graph.detect(images).labels, test)

files = [Path(photos.samples[index][0]) for index in parts[2]][:40]
verdicts = ask(create_app(str(home / "guard.onnx")), files)
expected = graph.name_labels(graph.detect(torch.stack([test.dataset[index][0] for index in range(len(files))])))
same = sum(verdict["class_name"] == name for verdict, name in zip(verdicts, expected, strict=True))
print(f"served: {same} of {len(files)} verdicts the same as those of the graph")

for name, value in steps.items():
    print(f"accuracy of {name}: {value:.3f}, {len(test.dataset)} images")
worst = max(before - after for before, after in zip(list(steps.values()), list(steps.values())[1:], strict=False))
print(f"largest loss of accuracy in a step: {max(0.0, worst):.3f}")
assert worst <= 0.02
temporary.cleanup()
