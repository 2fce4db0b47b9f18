"""Files are read alike for training and by the service of examples/serve."""

import io
from functools import partial
from pathlib import Path

import clusterguard as cg
import pytest
import torch
from clusterguard.cli._pictures import ImageFiles, Pictures
from clusterguard.deployment import fit_image
from fastapi import HTTPException
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve"


@pytest.fixture
def judging(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    import judging

    return judging


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_training_and_service_read_files_alike(judging, tmp_path):
    """Palettes, alpha channels and animations: both give the same pixels, or both refuse."""
    grey = Image.fromarray((cg.samples.load_digits("test").tensors[0][0, 0] * 255).round().byte().numpy())
    clear = grey.convert("RGBA")
    clear.putpixel((3, 3), (9, 9, 9, 0))
    moving = {"save_all": True, "append_images": [grey.rotate(90)]}
    contents = {
        "palette": png(grey.convert("P")),
        "colours": png(grey.convert("RGB").quantize(16)),
        "opaque": png(grey.convert("RGBA")),
        "grey and opaque": png(grey.convert("LA")),
        "one bit": png(grey.convert("1")),
        "transparent": png(clear),
        "animated": png(grey, **moving),
        "damaged": png(grey)[:-20],
    }
    for name, content in contents.items():
        path = tmp_path / "one" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            ((trained, _),) = Pictures(
                ImageFiles([(str(path), 0)]), ("one",), partial(fit_image, size=(28, 28), channels=1)
            )
        except cg.errors.InputError:
            trained = None
        try:
            served = fit_image(judging.decode("image/png", content), (28, 28), 1)
        except HTTPException:
            served = None
        assert (trained is None) is (served is None) is (name in ("transparent", "animated", "damaged"))
        assert trained is None or torch.equal(trained, served)
