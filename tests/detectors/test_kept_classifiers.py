"""Wrapping a classifier changes no label: the guard starts with its last layer, or says that it cannot."""

import copy
import warnings

import pytest
import timm
import torch
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard
from clusterguard.detectors import GaussianClusters
from clusterguard.errors import ConfigurationError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models
from torchvision.models import get_model

K = 7


def timm_model(name, side=32, **options):
    return pytest.param(lambda: timm.create_model(name, num_classes=K, **options), side, id=f"timm-{name}")


def torchvision_model(name, side=32, **options):
    return pytest.param(lambda: get_model(name, weights=None, num_classes=K, **options), side, id=f"torchvision-{name}")


def small_vit():
    return models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=K)


def with_head(*layers):
    model = models.resnet18(num_classes=K)
    model.fc = nn.Sequential(*layers)
    return model


def plain(*end):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *end)


FAMILIES = [
    timm_model("resnet18"),
    timm_model("vit_tiny_patch16_224", img_size=32),
    timm_model("deit_tiny_distilled_patch16_224", img_size=32),  # the mean of two classifiers
    timm_model("volo_d1_224", 64, img_size=64),  # an auxiliary classifier counts too
    timm_model("crossvit_tiny_240", 240),  # a list of classifiers
    timm_model("levit_128s", 224),  # a normalisation inside each of two classifiers
    timm_model("swin_tiny_patch4_window7_224", 56, img_size=56),
    timm_model("convnext_atto"),
    timm_model("mobilenetv3_small_050"),
    timm_model("tf_efficientnet_lite0"),
    timm_model("dpn48b"),  # a convolution as the classifier
    timm_model("regnetx_002"),
    timm_model("mixer_s32_224", 224),
    timm_model("edgenext_xx_small", 64),
    timm_model("fastvit_t8", 64),
    timm_model("repvit_m0_9.dist_450e_in1k", distillation=False),
    torchvision_model("resnet18"),
    torchvision_model("vgg11", init_weights=False),
    torchvision_model("densenet121"),
    torchvision_model("inception_v3", 75, init_weights=False),
    torchvision_model("googlenet", init_weights=False),
    torchvision_model("swin_t"),
    torchvision_model("convnext_tiny"),
    torchvision_model("mobilenet_v3_small"),
    torchvision_model("shufflenet_v2_x0_5"),
    torchvision_model("efficientnet_b0"),
    pytest.param(small_vit, 32, id="torchvision-vit"),
    pytest.param(lambda: with_head(nn.Dropout(), nn.Linear(512, K), nn.LogSoftmax(1)), 32, id="torchvision-own-head"),
    pytest.param(lambda: with_head(nn.Linear(512, 9), nn.ReLU(), nn.Linear(9, K)), 32, id="torchvision-own-mlp"),
    pytest.param(lambda: nn.Sequential(models.resnet18(num_classes=K)), 32, id="wrapped"),
    pytest.param(lambda: plain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)), 32, id="plain"),
    pytest.param(lambda: plain(nn.Conv2d(8, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32, id="plain-convolution"),
]


def warnings_of(make):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make()
    return [str(warning.message) for warning in told]


def factor_of(guard):
    """By how much the logits of a new guard are larger than those of its backbone."""
    return float(guard.head.center_scale) ** 2 / 10 * guard.head.representation_dim / guard.num_classes


def assert_kept(guard, model, images):
    """Equal logits but for a factor, and equal labels. Logits that rounding cannot tell apart may change places."""
    with torch.no_grad():
        logits = model.eval()(guard.normalize(images))
        logits = logits[0] if isinstance(logits, tuple) else logits
        shifts = guard(images) / factor_of(guard) - logits  # constant in a row, as the mean of the logits is
        assert torch.allclose(shifts, shifts[:, :1], atol=1e-5 * float(logits.abs().max()))
        assert torch.equal(guard(images).argmax(dim=1), logits.argmax(dim=1))
        nearest = guard.distances(images).argmin(dim=1, keepdim=True)
    lost = logits.max(dim=1).values - logits.gather(1, nearest).squeeze(1)
    assert lost.max() <= 1e-5 * (10 + float(logits.abs().max()))


@pytest.mark.parametrize(("build", "side"), FAMILIES)
def test_a_new_guard_gives_every_image_the_label_that_its_backbone_gives(build, side):
    torch.manual_seed(0)
    model = build()
    wide = ClusterGuard(model, K, representation_dim=2 * K, center_scale=3.0, classifier="keep")
    images = torch.rand(4, 3, side, side)
    assert_kept(wide, copy.deepcopy(model), images)


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(2, 6),
    copies=st.integers(1, 4),
    scale=st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    size=st.sampled_from([1e-2, 1.0, 100.0]),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_logits_are_kept_for_every_width_and_scale(classes, copies, scale, size, has_bias, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes, bias=has_bias)).to(dtype)
    with torch.no_grad():
        model[1].weight.mul_(size)
    guard = ClusterGuard(model, classes, representation_dim=copies * classes, center_scale=scale)
    images = torch.rand(20, 3, 2, 2, dtype=dtype)
    with torch.no_grad():
        logits = model(images)
        centred = logits - logits.mean(dim=1, keepdim=True)
        assert torch.allclose(guard(images).to(dtype) / factor_of(guard), centred, rtol=1e-4, atol=1e-4 * size)
        nearest = guard.distances(images).argmin(dim=1, keepdim=True)
    lost = logits.max(dim=1).values - logits.gather(1, nearest).squeeze(1)
    assert lost.max() <= 1e-5 * (10 + size * (1 + size))  # squared distances round as much


class TwoLayers(nn.Module):
    """A user's head that one linear layer cannot stand for."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(512, K), nn.Linear(512, K)

    def forward(self, features):
        return self.left(features) + self.right(features)


class ThroughNorm(nn.Module):
    """A user's head whose own forward changes the labels of the one layer in it."""

    def __init__(self):
        super().__init__()
        self.layer, self.prior = nn.Linear(512, K), nn.Parameter(torch.linspace(-3, 3, K))

    def forward(self, features):
        return (-self.layer(nn.functional.normalize(features - 1))).exp() + self.prior


def with_users_head(make, head):
    model = make("resnet18", num_classes=K)
    model.fc = head()
    return model.eval()


def vision_transformer(head):
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 32}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=512, patch_size=32, num_labels=K, **sizes)
    )
    model.classifier = head()
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"center_scale": 100.0}, {"representation_dim": 2 * K}], ids=str)
@pytest.mark.parametrize("head", [TwoLayers, ThroughNorm])
@pytest.mark.parametrize(
    "make",
    [
        lambda head: with_users_head(timm.create_model, head),
        lambda head: with_users_head(get_model, head),
        vision_transformer,
    ],
    ids=["timm", "torchvision", "transformers"],
)
def test_a_users_head_stays_as_it_is_or_its_loss_is_said(make, head, options):
    torch.manual_seed(0)
    model = make(head)
    images, made = torch.rand(8, 3, 32, 32), []
    told = warnings_of(lambda: made.append(ClusterGuard(model, mean=0.0, std=1.0, **options)))
    with torch.no_grad():
        logits, kept = model(images), made[0](images)  # the guard can be used in either case
    labels = getattr(logits, "logits", logits).argmax(dim=1)
    assert ["knows nothing yet" in message for message in told] == [True] * bool(options)
    assert options or torch.equal(kept.argmax(dim=1), labels)


def with_hook(_=None):
    model = models.resnet18(num_classes=K)
    model.fc = torch.nn.utils.spectral_norm(model.fc)
    return model


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_an_offset_of_all_logits_moves_no_label(offset):
    torch.manual_seed(0)
    model = models.resnet18(num_classes=100)
    with torch.no_grad():
        model.fc.weight.mul_(10)
        model.fc.bias.add_(offset)
    guard, images = ClusterGuard(model.eval()), torch.rand(20, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(guard.distances(images).argmin(dim=1), model(guard.normalize(images)).argmax(dim=1))


class CosineLinear(nn.Linear):
    """A layer of a user that computes something else than its weight says."""

    def forward(self, features):
        return nn.functional.linear(nn.functional.normalize(features), nn.functional.normalize(self.weight))


def with_cosine(make):
    model = make("resnet18", num_classes=K)
    model.fc = CosineLinear(512, K)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_cosine(timm.create_model),
        lambda: with_cosine(get_model),
        lambda: models.squeezenet1_1(num_classes=K),  # a ReLU and a mean follow the classifier
        with_hook,
    ],
    ids=["timm-cosine", "torchvision-cosine", "squeezenet", "hook"],
)
def test_a_classifier_that_is_lost_is_said(build):
    model = build()
    (message,) = warnings_of(lambda: ClusterGuard(model))
    assert "knows nothing yet, so train the guard before use" in message
    assert warnings_of(lambda: ClusterGuard(model, classifier="new")) == []
    with pytest.raises(ConfigurationError, match='leave out classifier="keep"'):
        ClusterGuard(model, classifier="keep")


def test_another_number_of_classes_is_said():
    (message,) = warnings_of(lambda: ClusterGuard(models.resnet18(num_classes=K), 5))
    assert "knows nothing yet" in message


@pytest.mark.parametrize("width", [4, 2 * K])
def test_features_are_no_classifier(width):
    features = nn.Sequential(nn.Flatten(), nn.Linear(12, width))
    assert warnings_of(lambda: ClusterGuard(features, K)) == []
    with pytest.raises(ConfigurationError, match="expected a classifier of 7 classes"):
        ClusterGuard(features, K, classifier="keep")


def test_no_classifier_of_another_number_of_classes_is_kept_in_blocks():
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    with pytest.warns(UserWarning, match="num_classes=5"):
        guard = ClusterGuard(model, 10)  # 10 outputs are two blocks of 5
    before, after = model.fc.weight, guard.encoder.fc.weight
    assert not torch.equal(after[::2], after[1::2])
    assert not any(torch.allclose(row / row.norm(), weight / weight.norm()) for row in after for weight in before)


def test_a_head_of_another_class_starts_anew():
    class Other(GaussianClusters):
        pass

    model = models.resnet18(num_classes=K)
    torch.manual_seed(0)
    with_other = ClusterGuard(model, head=Other(K))
    torch.manual_seed(0)
    anew = ClusterGuard(model, classifier="new")
    assert torch.equal(with_other.encoder.fc.weight, anew.encoder.fc.weight)
    with pytest.raises(ConfigurationError, match="expected GaussianClusters as the head"):
        ClusterGuard(model, head=Other(K), classifier="keep")
    assert_kept(ClusterGuard(model, head=GaussianClusters(K, 2 * K)), model, torch.rand(4, 3, 32, 32))


def test_other_words_are_refused():
    with pytest.raises(ConfigurationError, match=r"expected classifier to be .*, got 'old'"):
        ClusterGuard(models.resnet18(num_classes=K), classifier="old")


def test_a_kept_classifier_is_trained_saved_and_loaded_like_a_new_one(tmp_path):
    torch.manual_seed(0)
    guard = ClusterGuard(plain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)), K)
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % K
    guard.save_pretrained(tmp_path / "before")
    again = ClusterGuard.from_pretrained(tmp_path / "before")
    assert torch.equal(again(images), guard(images))
    before = guard.encoder[-1].weight.clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8)
    trainer = AdversarialClusterTrainer(guard, PGD(eps=0.1, step_size=0.05, steps=1))
    trainer.fit(loader, loader, epochs=1, calibrate=False)
    assert not torch.equal(guard.encoder[-1].weight, before)
