"""Image classifiers of transformers as backbones."""

import json
import warnings

import pytest
import torch
from clusterguard import PGD, AdversarialClusterTrainer, Calibrator, ClusterGuard, align, export_onnx, load_onnx
from clusterguard.detectors import find_normalization, find_num_classes
from clusterguard.detectors._families import FAMILIES
from clusterguard.detectors._internal import read_config
from clusterguard.errors import ConfigurationError, PersistenceError, UnsupportedBackboneError
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is an extra")

K, VALUES = 5, {"mean": [0.5] * 3, "std": [0.5] * 3}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}


def configured(kind, architecture=None, **options):
    """A model of transformers of a few thousand parameters, with random weights."""
    config = transformers.AutoConfig.for_model(kind, num_labels=K, **options)
    build = getattr(transformers, architecture) if architecture else None
    model = build(config) if build else transformers.AutoModelForImageClassification.from_config(config)
    return model.eval()


MODELS = {
    "vit": lambda: configured("vit", image_size=32, **VIT),
    "dinov2": lambda: configured("dinov2", image_size=32, **{**VIT, "mlp_ratio": 2}),
    "beit": lambda: configured("beit", image_size=32, **VIT),
    "deit": lambda: configured("deit", "DeiTForImageClassification", image_size=32, **VIT),
    "deit-distilled": lambda: configured("deit", "DeiTForImageClassificationWithTeacher", image_size=32, **VIT),
    "resnet": lambda: configured("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "regnet": lambda: configured("regnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
    "convnext": lambda: configured("convnext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "convnextv2": lambda: configured("convnextv2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "swin": lambda: configured(
        "swin", image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]
    ),
    "mobilenet_v1": lambda: configured("mobilenet_v1", image_size=32, depth_multiplier=0.25),
    "mobilenet_v2": lambda: configured("mobilenet_v2", image_size=32, depth_multiplier=0.25),
    "levit": lambda: configured("levit", "LevitForImageClassificationWithTeacher"),
}


def image_for(name):
    side = 224 if name == "levit" else 32
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_labels_stay_and_a_saved_guard_is_built_again(name, tmp_path):
    torch.manual_seed(0)
    model, images = MODELS[name](), image_for(name)
    assert find_num_classes(model) == K
    guard = ClusterGuard(model, **VALUES, classifier="keep")
    with torch.no_grad():
        logits = model(pixel_values=guard.normalize(images)).logits
        shifts = guard.represent(images) - logits
        assert torch.allclose(shifts, shifts[:, :1], atol=1e-4)
        assert torch.equal(guard(images).argmax(dim=1), logits.argmax(dim=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path)
    assert torch.equal(again.distances(images), guard.distances(images))


def test_a_guard_of_it_is_trained_aligned_calibrated_and_exported(tmp_path):
    torch.manual_seed(0)
    guard = ClusterGuard(MODELS["resnet"](), **VALUES)
    labels = torch.arange(80) % K
    images = (labels[:, None, None, None] / K + 0.2 * torch.rand(80, 3, 32, 32)).clamp(0, 1)
    loader = [(images[i::4], labels[i::4]) for i in range(4)]
    trainer = AdversarialClusterTrainer(guard, PGD(eps=0.01, step_size=0.01, steps=1))
    trainer.fit(loader, loader, epochs=1, calibrate=False)
    align(guard, loader)
    Calibrator(0.3, scarce="pool").fit(guard, [(images, labels)])
    graph = load_onnx(export_onnx(guard, tmp_path / "guard.onnx", images[:2]))
    verdicts, exported = guard.detect(images), graph.detect(images)
    assert torch.equal(exported.labels, verdicts.labels)
    assert torch.equal(exported.is_adversarial, verdicts.is_adversarial)


def test_its_class_names_come_along(tmp_path):
    names = dict(enumerate(["cat", "dog", "cow", "pig", "hen"]))
    model = configured("vit", image_size=32, **VIT)
    model.config.id2label = names
    guard = ClusterGuard(model, **VALUES)
    assert list(guard.class_names) == list(names.values())
    guard.save_pretrained(tmp_path)
    assert list(ClusterGuard.from_pretrained(tmp_path).class_names) == list(names.values())
    assert ClusterGuard(MODELS["vit"](), **VALUES).class_names is None  # LABEL_0 and so on say nothing
    with pytest.warns(UserWarning, match="num_classes=5"):
        assert ClusterGuard(model, 3, **VALUES).class_names is None


def test_names_under_text_keys_keep_their_order():
    model = configured("vit", image_size=32, **VIT)
    model.classifier = nn.Linear(16, 12)
    model.config.__dict__["id2label"] = {str(index): f"n{index}" for index in range(12)}
    assert list(ClusterGuard(model, **VALUES).class_names) == [f"n{index}" for index in range(12)]


@pytest.mark.parametrize("options", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_a_processor_that_does_something_else_is_not_followed(options, tmp_path):
    MODELS["vit"]().save_pretrained(tmp_path)
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **options}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no image processor"):
        assert find_normalization(model) == ((0.0,), (1.0,))


def test_both_heads_of_a_distilled_levit_are_kept():
    model, images = MODELS["levit"](), image_for("levit")
    guard = ClusterGuard(model, **VALUES, representation_dim=2 * K, center_scale=40.0)
    with torch.no_grad():
        labels = model(pixel_values=guard.normalize(images)).logits.argmax(dim=1)
        assert torch.equal(guard(images).argmax(dim=1), labels)


def test_mean_and_std_come_from_the_image_processor_beside_the_model(tmp_path):
    MODELS["vit"]().save_pretrained(tmp_path)
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert find_normalization(model) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_normalisation_that_is_not_known_is_said(tmp_path, monkeypatch):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [9, 9, 9], "image_std": [9, 9, 9]}')
    monkeypatch.chdir(tmp_path)  # another program's file
    with pytest.warns(UserWarning, match=r"pass mean=processor.image_mean and std=processor.image_std"):
        guard = ClusterGuard(MODELS["vit"]())
    assert guard.normalize.mean.flatten().tolist() == [0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClusterGuard(MODELS["vit"](), **VALUES)


def test_models_without_a_linear_classifier_are_refused():
    config = transformers.AutoConfig.for_model("vit", image_size=32, **VIT)
    with pytest.raises(UnsupportedBackboneError, match="expected a model with a linear classifier, got a ViTModel"):
        ClusterGuard(transformers.ViTModel(config), 3, **VALUES)
    model = MODELS["vit"]()
    model.classifier = nn.Identity()
    with pytest.raises(UnsupportedBackboneError, match="expected a model with a linear classifier, got a ViTFor"):
        ClusterGuard(model, K, **VALUES)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit:ViTModel", {}),
        ("vit:os", {}),
        ("../vit:ViTForImageClassification", {}),
        ("vit:ViTForImageClassification", {"_name_or_path": "somebody/else"}),
        ("vit:ViTForImageClassification", {"auto_map": {"AutoModel": "code.Model"}}),
        ("vit:ViTForImageClassification", {"attn_implementation": "somebody/kernels"}),
        ("vit:ViTForImageClassification", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("levit:LevitForImageClassification", {"image_size": 4096}),
        ("dinat:DinatForImageClassification", {"backbone": "resnet50", "use_timm_backbone": True}),
    ],
)
def test_a_strangers_recipe_sets_no_more_than_others(name, arguments):
    with pytest.raises((ConfigurationError, PersistenceError)):
        FAMILIES["transformers"].build(name, arguments)


def test_a_configuration_that_a_recipe_may_not_hold_needs_the_module(tmp_path):
    model, images = MODELS["vit"](), image_for("vit")
    model.config.something_of_mine = {"deep": 1}
    guard = ClusterGuard(model, **VALUES)
    with pytest.warns(UserWarning, match="from_pretrained will need backbone="):
        guard.save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json")["backbone"]["source"] == "module"
    with pytest.raises(PersistenceError, match="pass backbone=module"):
        ClusterGuard.from_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path, backbone=MODELS["vit"]())
    assert torch.equal(again.distances(images), guard.distances(images))
