from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from clusterguard import ClusterGuard
from clusterguard.detectors import find_normalization, find_num_classes, make_encoder
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from torch import Tensor, nn

K, M = 7, 14
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Family(NamedTuple):
    """How to build a small member, the side of its images, and the parameters that belong to its classifiers."""

    name: str
    build: Callable[[], nn.Module]
    side: int
    classifier: tuple[str, ...]
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


def timm_family(name: str, side: int, *classifier: str, normalization: Any = IMAGENET, **options: Any) -> Family:
    def build() -> nn.Module:
        return timm.create_model(name, num_classes=K, **options)

    return Family(f"timm-{name}", build, side, classifier, normalization)


def torchvision_family(name: str, side: int, *classifier: str, **options: Any) -> Family:
    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, num_classes=K, **options)

    return Family(f"torchvision-{name}", build, side, classifier)


def small_maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        input_size=(56, 56),
        stem_channels=8,
        partition_size=7,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=K,
    )


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=K
    )


FAMILIES = [
    timm_family("resnet18", 32, "fc."),
    timm_family("vit_tiny_patch16_224", 32, "head.", img_size=32, normalization=HALF),
    timm_family("deit_tiny_distilled_patch16_224", 32, "head.", "head_dist.", img_size=32),
    timm_family("swin_tiny_patch4_window7_224", 56, "head.fc.", img_size=56),
    timm_family("convnext_atto", 32, "head.fc."),
    timm_family("mobilenetv3_small_050", 32, "classifier."),
    timm_family("efficientnet_b0", 32, "classifier."),
    torchvision_family("resnet18", 32, "fc."),
    torchvision_family("vgg11", 32, "classifier.6.", init_weights=False),
    torchvision_family("densenet121", 32, "classifier."),
    torchvision_family("squeezenet1_1", 32, "classifier.1."),
    torchvision_family("inception_v3", 75, "fc.", "AuxLogits.", init_weights=False),
    torchvision_family("googlenet", 32, "fc.", "aux1.", "aux2.", init_weights=False),
    torchvision_family("swin_t", 32, "head."),
    torchvision_family("convnext_tiny", 32, "classifier.2."),
    torchvision_family("mobilenet_v3_small", 32, "classifier.3."),
    Family("torchvision-vit", small_vit, 32, ("heads.head.",)),
    Family("torchvision-maxvit", small_maxvit, 56, ("classifier.5.",)),
]


class Made(NamedTuple):
    family: Family
    backbone: nn.Module
    before: dict[str, Tensor]
    encoder: nn.Module
    images: Tensor


@pytest.fixture(scope="module", params=FAMILIES, ids=[family.name for family in FAMILIES])
def made(request: pytest.FixtureRequest) -> Made:
    family: Family = request.param
    torch.manual_seed(0)
    backbone = family.build()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    return Made(family, backbone, before, make_encoder(backbone, M), torch.rand(2, 3, family.side, family.side))


def test_images_become_representations_that_have_a_gradient(made: Made) -> None:
    images = made.images.clone().requires_grad_()
    representations = made.encoder.eval()(images)
    assert representations.shape == (2, M)
    (gradient,) = torch.autograd.grad(representations[:, 0].sum(), images)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).abs().amax(dim=1).min() > 0


def test_a_guard_around_it_gives_logits_and_a_gradient(made: Made) -> None:
    guard = ClusterGuard(made.backbone, classifier="new").eval()
    images = made.images.clone().requires_grad_()
    logits = guard(images)
    assert logits.shape == (2, K)
    (gradient,) = torch.autograd.grad(guard.distances(images).amin(), images)
    assert gradient.isfinite().all()


def test_train_mode_returns_a_plain_tensor_too(made: Made) -> None:
    representations = made.encoder.train()(made.images)
    assert isinstance(representations, Tensor)
    assert representations.shape == (2, M)


def test_weights_are_kept_but_the_classifiers(made: Made) -> None:
    original, copied = dict(made.backbone.named_parameters()), dict(made.encoder.named_parameters())
    changed = {n for n, p in original.items() if n not in copied or not torch.equal(p, copied[n])}
    assert changed
    assert all(name.startswith(made.family.classifier) for name in changed)
    assert copied.keys() <= original.keys()
    assert not {p.data_ptr() for p in original.values()} & {p.data_ptr() for p in copied.values()}


def test_the_users_model_stays_as_it_was(made: Made) -> None:
    after = made.backbone.state_dict()
    assert after.keys() == made.before.keys()
    assert all(torch.equal(tensor, made.before[name]) for name, tensor in after.items())
    assert made.backbone.training


def test_number_of_classes_and_normalization_are_found(made: Made) -> None:
    assert find_num_classes(made.backbone) == K
    assert find_normalization(made.backbone) == made.family.normalization


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "naflexvit_base_patch16_gap", "tresnet_m"])
def test_one_channel_gets_the_average_of_three(name: str) -> None:
    with torch.device("meta"):
        assert find_normalization(timm.create_model(name))[0] == timm.get_pretrained_cfg(name).mean
        mean, std = find_normalization(timm.create_model(name, in_chans=1))
    assert mean == (pytest.approx(sum(timm.get_pretrained_cfg(name).mean) / 3),)
    assert std == (pytest.approx(sum(timm.get_pretrained_cfg(name).std) / 3),)


def test_a_stem_replaced_by_hand_counts_for_normalization() -> None:
    for model in (timm.create_model("resnet18"), torchvision.models.resnet18()):
        model.conv1 = nn.Conv2d(1, 64, 3)
        assert [len(values) for values in find_normalization(model)] == [1, 1]


def test_normalization_of_every_torchvision_recipe() -> None:
    recipes = {
        "efficientnet_v2_l": HALF,  # the only one that is not ImageNet's
        "efficientnet_v2_m": IMAGENET,
        "efficientnet_b7": IMAGENET,
        "mobilenet_v2": IMAGENET,
    }
    for name, expected in recipes.items():
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        assert (tuple(transforms.mean), tuple(transforms.std)) == expected
        with torch.device("meta"):
            assert find_normalization(torchvision.models.get_model(name)) == expected


def test_other_modules_get_no_normalization_and_tell_no_classes() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    assert find_normalization(module) == ((0.0,), (1.0,))
    assert find_num_classes(module) is None


def test_the_classifier_has_the_last_word_on_the_number_of_classes() -> None:
    model = timm.create_model("test_resnet")
    assert find_num_classes(model) == 1000
    model.fc = nn.Linear(model.num_features, 5)
    assert find_num_classes(model) == 5


def test_models_without_a_classifier_get_a_layer() -> None:
    headless = torchvision.models.resnet18()
    headless.fc = nn.Identity()
    for model in (headless, timm.create_model("test_resnet", num_classes=0)):
        assert find_num_classes(model) is None
        assert make_encoder(model, M)(torch.rand(2, 3, 64, 64)).shape == (2, M)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_feature_maps_of_timm_are_pooled(name: str) -> None:
    model = timm.create_model(name, num_classes=0, global_pool="")
    assert make_encoder(model, M)(torch.rand(2, 3, 160, 160)).shape == (2, M)


@pytest.mark.parametrize("name", ["qwen3_vit_88m_enc", "mobilenetv5_300m_enc"])
def test_timm_encoders_that_have_no_classifier_are_pooled(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip("this timm does not have it yet")
    with torch.device("meta"):
        model = timm.create_model(name)
        assert make_encoder(model, M)(torch.rand(2, *model.pretrained_cfg["input_size"])).shape == (2, M)


def test_training_extras_of_timm_are_switched_off() -> None:
    with torch.device("meta"):
        distilled = timm.create_model("deit_tiny_distilled_patch16_224")
        distilled.set_distilled_training(True)
        auxiliary = timm.create_model("inception_v3", aux_logits=True)
        for model in (distilled, auxiliary):
            output = make_encoder(model, M).train()(torch.rand(2, *model.pretrained_cfg["input_size"]))
            assert output.shape == (2, M)
    assert distilled.distilled_training
    assert auxiliary.aux_logits


def test_a_users_subclass_is_recognised() -> None:
    class MyResNet(torchvision.models.ResNet):
        pass

    class MyTimm(timm.models.resnet.ResNet):
        pass

    ours = MyResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=K)
    assert find_num_classes(ours) == K
    assert find_normalization(ours) == IMAGENET
    assert type(make_encoder(ours, M)) is MyResNet
    theirs = MyTimm(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=K)
    assert find_num_classes(theirs) == K
    assert type(make_encoder(theirs, M)) is MyTimm


def test_nothing_squashes_a_representation() -> None:
    squeezenet = torchvision.models.squeezenet1_1()
    head = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, K), nn.LogSoftmax(dim=1))
    resnet = torchvision.models.resnet18()
    resnet.fc = head
    assert find_num_classes(resnet) == K
    for model in (squeezenet, resnet):
        representations = make_encoder(model, 200).eval()(torch.rand(2, 3, 64, 64))
        assert representations.min() < 0 < representations.max()
    assert isinstance(make_encoder(resnet, M).fc[1], nn.ReLU)  # inside the head it stays


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("test_resnet"),
        lambda: timm.create_model("levit_128s"),
        lambda: torchvision.models.squeezenet1_1(),
        lambda: torchvision.models.shufflenet_v2_x0_5(),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
    ids=["timm", "timm-levit", "squeezenet", "torchvision", "other"],
)
def test_the_new_layer_has_device_dtype_and_mode_of_the_old_one_and_learns(build: Callable[[], nn.Module]) -> None:
    backbone = build().double().eval().requires_grad_(False)
    encoder = make_encoder(backbone, M)
    floating = [tensor for tensor in encoder.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float64}
    assert not any(module.training for module in encoder.modules())
    assert [tensor.shape[0] for tensor in encoder.parameters() if tensor.requires_grad][-2:] == [M, M]
    on_meta = make_encoder(build().to("meta"), M)
    assert {tensor.device.type for tensor in on_meta.state_dict().values()} == {"meta"}


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected a positive out_features, got 0"):
        make_encoder(nn.Flatten(), 0)


def test_models_for_another_task_are_refused() -> None:
    with torch.device("meta"):
        segmentation = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None)
        features = timm.create_model("test_resnet", features_only=True)
    assert find_num_classes(segmentation) is None
    with pytest.raises(UnsupportedBackboneError, match="got OrderedDict; wrap the backbone"):
        make_encoder(segmentation, M)
    with pytest.raises(UnsupportedBackboneError, match="got list; wrap the backbone"):
        make_encoder(features, M)
