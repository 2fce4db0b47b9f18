"""What people put around a model: it comes off where it computes the same, and is named where it does not."""

import copy
import random
import types
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from clusterguard import FGSM, AdversarialClusterTrainer, ClusterGuard
from clusterguard.detectors import ConfidenceDetector, find_normalization, find_num_classes, make_encoder
from clusterguard.errors import ConfigurationError, UnsupportedBackboneError
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

K = 7
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
Wrap = Callable[[nn.Module], nn.Module]


class Holder(nn.Module):
    """Holds a model and does with images what it is told to."""

    def __init__(self, model: nn.Module, act: Callable[["Holder", Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.act = model, act

    def forward(self, images: Tensor) -> Tensor:
        return self.act(self, images)


class Adapted(nn.Module):
    """Hands everything on, as adapters of large models do, past the module that it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Holder(model, lambda self, images: self.model(images))

    def forward(self, *images: Tensor, **options: object) -> Tensor:
        return self.base_model.model(*images, **options)


class Training(nn.Module):
    """A holder with what a training needs beside the model, and a count of its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net, self.teacher = model, timm.create_model("test_resnet", num_classes=K)
        self.loss = nn.CrossEntropyLoss(weight=torch.rand(K))
        self.register_buffer("calls", torch.zeros(()))
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002  # as modules do
        return self.net(x.to(next(self.parameters()).device))


class Normalise(nn.Module):
    """As users of RobustBench write it."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mu", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mu) / self.sigma


def holding(act: Callable[[Holder, Tensor], Tensor]) -> Wrap:
    return lambda model: Holder(model, act)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


TRANSPARENT: dict[str, Wrap] = {
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": AveragedModel,
    "timm's average": ModelEmaV2,
    "timm's other average": ModelEmaV3,
    "sequential": nn.Sequential,
    "identity": lambda model: nn.Sequential(nn.Identity(), model),
    "holder": holding(lambda self, images: self.model(images)),
    "holder by name": holding(lambda self, images: self.model(x=images)),
    "holder by forward": holding(lambda self, images: self.model.forward(images)),
    "adapter": Adapted,
    "training": Training,
    "list": lambda model: Holder(nn.ModuleList([model]), lambda self, images: self.model[0](images)),
    "nested": lambda model: nn.DataParallel(nn.Sequential(Training(compiled(nn.DataParallel(model))))),
}


def build(library: str) -> nn.Module:
    if library == "timm":
        return timm.create_model("test_resnet", num_classes=K)
    return models.shufflenet_v2_x0_5(num_classes=K)


def read_random_states() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


def make_guard(backbone: nn.Module, **options: object) -> ClusterGuard:
    torch.manual_seed(1)
    return ClusterGuard(backbone, **options)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("wrap", TRANSPARENT.values(), ids=TRANSPARENT)
def test_a_wrapper_that_computes_the_same_changes_nothing(wrap: Wrap, library: str) -> None:
    model = build(library).eval()
    guard, plain = make_guard(wrap(model).eval()), make_guard(model)
    assert find_num_classes(wrap(model)) == guard.num_classes == K
    assert find_normalization(wrap(model)) == find_normalization(model)
    expected = plain.state_dict()
    assert guard.state_dict().keys() == expected.keys()
    assert all(torch.equal(part.nan_to_num(), expected[name].nan_to_num()) for name, part in guard.state_dict().items())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(guard.distances(images), plain.distances(images))
    assert torch.equal(ConfidenceDetector(wrap(model)).normalize.mean, plain.normalize.mean)


CHANNELS_LAST = {
    "contiguous": lambda images: images.contiguous(memory_format=torch.channels_last),
    "to": lambda images: images.to(memory_format=torch.channels_last),
}


def in_halves(self: Holder, images: Tensor) -> Tensor:
    return self.model.forward_head(self.model.forward_features(images))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("way", [*CHANNELS_LAST.values(), None], ids=[*CHANNELS_LAST, "in halves"])
def test_another_memory_format_and_a_call_in_halves_change_nothing(
    way: Callable[[Tensor], Tensor] | None, name
) -> None:
    act = in_halves if way is None else lambda self, images: self.model(way(images))
    model = timm.create_model(name, num_classes=K)
    assert find_num_classes(Holder(model, act)) == K
    assert find_normalization(Holder(model, act)) == find_normalization(model)


@pytest.mark.parametrize("training", [True, False])
def test_looking_into_a_holder_leaves_no_trace(training: bool) -> None:
    holder = Training(build("timm").train(training))
    holder.teacher.train(not training)
    modes = [module.training for module in holder.modules()]
    before = {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    states = read_random_states()
    assert find_num_classes(holder) == K
    assert read_random_states() == states
    assert [module.training for module in holder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in holder.state_dict().items())
    assert holder.shapes == []
    assert not ClusterGuard(holder).training


def change_in_place(self: Holder, images: Tensor) -> Tensor:
    images.data.sub_(0.5)
    return self.model(images)


def halve_in_place(self: Holder, images: Tensor) -> Tensor:
    return self.model(images).div_(2)


def calculate_in_bfloat16(self: Holder, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.model(images)


def with_hook(model: nn.Module) -> nn.Module:
    wrapper = nn.DataParallel(model)
    wrapper.register_forward_pre_hook(lambda module, images: (images[0] - 0.5,))
    return wrapper


def half_in_bfloat16(self: Holder, images: Tensor) -> Tensor:
    features = self.model.forward_features(images)
    with torch.autocast("cpu", torch.bfloat16):
        return self.model.forward_head(features)


def change_a_copy(self: Holder, images: Tensor) -> Tensor:
    copied = images.contiguous(memory_format=torch.channels_last)
    copied -= 0.5
    return self.model(copied)


def with_inner_hook(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, images, output: output / 2)
    return Holder(model, in_halves)


class Frozen(Holder):
    """Keeps its model in eval mode while the rest is trained."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.model.eval()
        return self


OTHERS: dict[str, Wrap] = {
    "subtracts": holding(lambda self, images: self.model(images - 0.5)),
    "subtracts in place": holding(change_in_place),
    "clamps": holding(lambda self, images: self.model(images.clamp(0, 1))),
    "colours": holding(lambda self, images: self.model(images.expand(-1, 3, -1, -1))),
    "resizes": holding(lambda self, images: self.model(nn.functional.interpolate(images, (64, 64)))),
    "augments": holding(lambda self, images: self.model(images + self.training * torch.randn_like(images))),
    "flips": holding(lambda self, images: self.model(images) + self.model(images.flip(3))),
    "squashes": holding(lambda self, images: self.model(images).softmax(1)),
    "divides in place": holding(halve_in_place),
    "autocast": holding(calculate_in_bfloat16),
    "freezes": lambda model: Frozen(model, lambda self, images: self.model(images)),
    "hooked": with_hook,
    "subtracts in another format": holding(change_a_copy),
    "rounds in another format": holding(
        lambda self, images: self.model(images.to(torch.bfloat16, memory_format=torch.channels_last).float())
    ),
    "flips in halves": holding(lambda self, images: in_halves(self, images.flip(3))),
    "squashes halfway": holding(lambda self, images: self.model.forward_head(self.model.forward_features(images) / 2)),
    "stops halfway": holding(lambda self, images: self.model.forward_head(self.model.forward_features(images), True)),
    "autocast halfway": holding(half_in_bfloat16),
    "past a hook in halves": with_inner_hook,
    "sequential that clamps": lambda model: nn.Sequential(nn.Hardtanh(0, 1), model),
    "sequential that learns": lambda model: nn.Sequential(nn.BatchNorm2d(3), model),
    "sequential that drops": lambda model: nn.Sequential(nn.Dropout(), model),
    "sequential that squashes": lambda model: nn.Sequential(model, nn.Softmax(dim=1)),
}


@pytest.mark.parametrize("wrap", OTHERS.values(), ids=OTHERS)
def test_what_a_wrapper_costs_that_computes_something_else_is_said(wrap: Wrap) -> None:
    wrapper = wrap(build("timm"))
    assert find_num_classes(wrapper) is None
    with pytest.raises(ConfigurationError, match="pass num_classes"):
        ClusterGuard(wrapper)
    with pytest.warns(UserWarning, match="not found inside") as told:
        guard = ClusterGuard(wrapper, 3)
    name, (normalisation, classifier) = type(wrapper).__name__, [str(warning.message) for warning in told]
    assert normalisation.startswith(
        f"normalisation not found inside {name}: it may do more than pass its images to the R"
    )
    assert "Pass mean=[0.5, 0.5, 0.5] and std=" in normalisation
    assert classifier.startswith(f"classifier not found inside {name}: ")
    assert f"its classifier of {K} classes stays inside" in classifier
    assert type(guard.encoder[0]) is type(wrapper)
    assert guard.normalize.mean.flatten().tolist() == [0.0]


def test_only_what_is_lost_is_named() -> None:
    headless = nn.Sequential(timm.create_model("test_resnet", num_classes=0), nn.ReLU())
    with pytest.warns(UserWarning, match="^normalisation not found") as told:
        ClusterGuard(headless, 3)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClusterGuard(headless, 3, mean=[0.5], std=[0.5])
        ClusterGuard(nn.DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(12, 4))), 3)
    with pytest.warns(UserWarning, match="^classifier not found") as told:
        ClusterGuard(nn.Sequential(build("timm"), nn.ReLU()), 3, mean=[0.0], std=[1.0])
    assert len(told) == 1


@pytest.mark.parametrize("make", [Normalise, transforms.Normalize], ids=["buffers", "torchvision"])
@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel, TRANSPARENT["holder"]])
def test_a_normalisation_in_front_becomes_the_guards(make: Callable[..., nn.Module], wrap: Wrap) -> None:
    model = build("torchvision").eval()
    wrapper = wrap(nn.Sequential(make(*CIFAR), nn.DataParallel(model)).eval())
    assert find_normalization(wrapper) == CIFAR
    guard, plain = make_guard(wrapper), make_guard(model, mean=CIFAR[0], std=CIFAR[1])
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(guard.distances(images), plain.distances(images))
    for mean, std in (CIFAR, ([0.0], [1.0]), (CIFAR[0], None)):  # what is given again, and nothing more
        assert torch.equal(make_guard(wrapper, mean=mean, std=std).distances(images), plain.distances(images))
    with pytest.raises(ConfigurationError, match=r"normalises its images itself .* leave them out"):
        ClusterGuard(wrapper, mean=[0.5], std=[0.5])
    detector = ConfidenceDetector(wrapper)  # which keeps the wrapper, and so must not normalise twice
    assert torch.equal(detector(images), wrapper(images))


def test_a_guard_of_a_wrapped_model_is_rebuilt_without_it(tmp_path) -> None:
    guard = make_guard(nn.DataParallel(Training(build("timm")))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ClusterGuard.from_pretrained(tmp_path).distances(images), guard.distances(images))


@pytest.mark.parametrize("classes", [None, K, K + 1])
def test_a_number_of_classes_that_contradicts_the_backbone_is_said(classes: int | None, tmp_path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        guard = ClusterGuard(nn.Sequential(build("timm")), classes)
        ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 3)  # tells none
        guard.save_pretrained(tmp_path)
        ClusterGuard.from_pretrained(tmp_path)
    messages = [str(warning.message) for warning in told]
    assert guard(torch.rand(2, 3, 64, 64)).shape == (2, classes or K)
    assert len(messages) == (classes == K + 1)
    assert all(f"num_classes={K}" in text and "knows nothing yet" in text for text in messages)


class Adapter(nn.Module):
    """A layer and a low-rank update of it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features)

    def forward(self, features: Tensor) -> Tensor:
        return self.base(features) + self.up(self.down(features))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_classifier_with_an_adapter_is_replaced(library: str) -> None:
    model = build(library)
    model.fc = Adapter(model.fc)
    assert find_num_classes(model) == K
    assert make_encoder(model, 14)(torch.rand(2, 3, 64, 64)).shape == (2, 14)


def test_a_forward_that_holds_on_to_the_original_is_refused() -> None:
    model = build("timm")
    usual = model.forward
    model.forward = lambda images: usual(images - 0.5)
    with pytest.raises(UnsupportedBackboneError, match=r"holds on to a module, .*write a subclass"):
        make_encoder(model, 4)
    model.forward = types.MethodType(lambda self, images: type(self).forward(self, images - 0.5), model)
    images = torch.rand(2, 3, 64, 64)
    encoder = make_encoder(model, 4).eval()
    with torch.no_grad():
        before = encoder(images)
        model.bn1.weight.zero_()
        assert torch.equal(encoder(images), before)


def test_weights_that_cannot_be_trained_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants to give its quantisation away
        quantised = torch.ao.quantization.quantize_dynamic(build("torchvision"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedBackboneError, match=r"got quantised ones \(Linear at 'fc'\)"):
        make_encoder(quantised, 4)
    sharded = types.new_class("Sharded", (nn.Linear,))
    sharded.__module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"
    with pytest.raises(UnsupportedBackboneError, match=r"spread over processes \(Sharded at '1'\)"):
        make_encoder(nn.Sequential(nn.Flatten(), sharded(4, 2)), 4)
    lazy = build("torchvision")
    lazy.fc = nn.LazyLinear(K)
    assert find_num_classes(lazy) == K
    with pytest.raises(UnsupportedBackboneError, match=r"lazy ones .*fc\.weight.*; pass example=images"):
        make_encoder(lazy, 4)
    assert make_encoder(lazy, 4, example=torch.rand(2, 3, 64, 64)).fc.weight.shape[0] == 4


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    module.stream = (number for number in range(3))
    with pytest.raises(UnsupportedBackboneError, match=r"copy\.deepcopy can copy, got TypeError.*generator"):
        make_encoder(module, 4)


def export(model: nn.Module, images: Tensor) -> nn.Module:
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


GRAPHS: dict[str, tuple[str, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "script": ("a TorchScript module", lambda model, _: torch.jit.script(model)),
    "trace": ("a TorchScript module", torch.jit.trace),
    "fx": ("a graph of torch.fx or torch.export", lambda model, _: torch.fx.symbolic_trace(model)),
    "export": ("a graph of torch.fx or torch.export", export),
}


def record(model: nn.Module, way: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants to give scripting away
        return GRAPHS[way][1](model.eval(), torch.rand(2, 3, 64, 64))


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # by torch, while it copies what it exported
@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("way", GRAPHS)
def test_a_recorded_graph_tells_neither_normalisation_nor_classifier(way: str, library: str) -> None:
    images, graph = torch.rand(2, 3, 64, 64), record(build(library), way)
    with pytest.warns(UserWarning, match="not found inside") as given:
        guard = ClusterGuard(graph, 3, example=images)
    assert guard(images).shape == (2, 3)
    for lost in ("normalisation", "classifier"):
        (text,) = [str(warning.message) for warning in given if str(warning.message).startswith(lost)]
        assert f"{lost} not found inside {GRAPHS[way][0]}" in text
        assert text.endswith("or the model that the graph was made from")
    with pytest.warns(UserWarning, match="normalisation not found inside"):
        ConfidenceDetector(graph, K)


@pytest.mark.filterwarnings("ignore:.*not found inside", "ignore:.*treespec:FutureWarning")
@pytest.mark.parametrize("wrap", [lambda graph: graph, nn.Sequential], ids=["plain", "wrapped"])
@pytest.mark.parametrize("way", GRAPHS)
def test_a_guard_around_a_graph_and_its_copy_train_weights_of_their_own(way: str, wrap: Wrap) -> None:
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    model = build("timm")
    model.conv1.requires_grad_(False)
    graph = record(model, way)
    guard = ClusterGuard(wrap(graph), 2, example=images)
    for part in (guard, copy.deepcopy(guard)):
        weights = dict(part.named_parameters())
        assert sum(not weight.requires_grad for weight in weights.values()) == len([*model.conv1.parameters()])
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        trainer = AdversarialClusterTrainer(part, FGSM(eps=0.01))
        trainer.fit([(images, labels)], [(images, labels)], epochs=1, calibrate=False, progress=False)
        moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
        assert len(moved) > 10
        assert all(weights[name].requires_grad for name in moved)
    assert all(parameter.grad is None for parameter in (*graph.parameters(), *model.parameters()))


def test_frozen_torchscript_is_refused_because_it_has_no_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.jit.freeze(torch.jit.script(build("timm").eval()))
    for wrap in (lambda graph: graph, nn.Sequential):
        with pytest.raises(UnsupportedBackboneError, match=r"frozen TorchScript .*pass the module as it was before"):
            ClusterGuard(wrap(frozen), 2, mean=[0.5], std=[0.5])


@pytest.mark.parametrize("wrap", ["parallel", "compiled", "averaged", "sequential", "holder"])
def test_a_graph_in_wrappers_is_named_too(wrap: str) -> None:
    graph = TRANSPARENT[wrap](record(build("torchvision"), "fx"))
    with (
        pytest.warns(UserWarning, match="normalisation not found inside a graph"),
        pytest.warns(UserWarning, match="classifier not found inside a graph"),
    ):
        ClusterGuard(graph, 3)


def test_a_graph_whose_normalisation_is_given_lacks_the_classifier_alone() -> None:
    graph = record(build("torchvision"), "fx")
    with pytest.warns(UserWarning, match="not found inside") as given:
        ClusterGuard(graph, 3, mean=[0.5], std=[0.5])
    assert [str(warning.message).split()[0] for warning in given] == ["classifier"]


def test_an_extractor_of_features_has_left_the_classifier_out_on_purpose() -> None:
    extractor = create_feature_extractor(build("torchvision"), {"mean": "features"})
    holder = Holder(extractor, lambda self, images: self.model(images)["features"])
    ClusterGuard(holder, 3, mean=[0.5], std=[0.5])


def test_the_copy_of_a_model_in_half_precision_and_on_no_device_is_found() -> None:
    for build_on in ("cpu", "meta"):
        model = build("timm").bfloat16().to(build_on)
        encoder = make_encoder(Training(nn.Sequential(copy.deepcopy(model))), 4)
        assert type(encoder) is type(model)
        assert (encoder.fc.weight.dtype, encoder.fc.weight.device.type) == (torch.bfloat16, build_on)


def test_what_is_no_module_is_refused_by_name():
    class Holder:
        ema = nn.Flatten()

    with pytest.raises(UnsupportedBackboneError, match=r"expected a torch.nn.Module .* got Holder"):
        ClusterGuard(Holder(), 2)


def test_without_classes_the_error_names_the_model_inside():
    class Resizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model("test_resnet", num_classes=10)

        def forward(self, images):
            return self.model(nn.functional.interpolate(images, size=32))

    with pytest.raises(ConfigurationError, match="or the ResNet inside it"):
        ClusterGuard(Resizing())
