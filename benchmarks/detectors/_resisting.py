"""A variational autoencoder with a Gaussian for each class in its latent space, after Ghosh, Losalka & Black.

An image is suspicious if its latent mean is far from the Gaussian of its class or if its reconstruction is poor. The
encoder is the network of the experiment with a linear layer, so that it has the capacity of the other detectors. The
paper's autoencoders have 10 (MNIST) and 12 (CIFAR10) layers. The Gaussians are those of `ClusterGuard`: one latent
dimension for each class, unit variance, and means at 10 on the axes. Classes are learned only through the divergence
from the Gaussian of the true class. Ghosh et al. put a threshold on each distance. The paper puts one on the sum, and
so do we.
"""

from typing import cast

import torch
from clusterguard import PGD, DetectorModule, Evidence
from clusterguard.detectors import GaussianClusters, WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor, nn

from benchmarks.detectors._features import at_least_float32
from benchmarks.detectors._recipe import LossTrainer, Recipe


class GaussianMixtureAutoencoder(DetectorModule):
    """An autoencoder with Gaussian clusters in its latent space.

    Args:
        network: network with the attributes `num_features` and `image_shape`, (C, H, W). H and W are multiples of 4.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(num_classes=10)
        channels, height, width = cast(tuple[int, int, int], network.image_shape)
        self.clusters = GaussianClusters(self.num_classes)
        latent = self.clusters.representation_dim
        self.encoder = nn.Sequential(network, nn.Linear(cast(int, network.num_features), 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, 64 * (height // 4) * (width // 4)),
            nn.ReLU(),
            nn.Unflatten(1, (64, height // 4, width // 4)),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the variance, each (B, m), of the latents of images (B, C, H, W) in [0, 1]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def represent(self, images: Tensor) -> Tensor:
        """The latent means (B, m) of images (B, C, H, W) in [0, 1]."""
        return self.encode(images)[0]

    def reconstruction_error(self, images: Tensor, latents: Tensor) -> Tensor:
        """The squared Euclidean distance (B,) of images (B, C, H, W) to the images that latents (B, m) decode to."""
        return at_least_float32(images - self.decoder(latents)).flatten(1).square().sum(dim=1)

    def evidence(self, images: Tensor) -> Evidence:
        """Class scores −d and suspicion d + ‖x − rec(x)‖₂ of images (B, C, H, W) in [0, 1].

        The distances d (B, K) are those of the latent means to the class means. Nothing is sampled.
        """
        latents = self.represent(images)
        distances = self.clusters.distances(latents)
        squared = self.reconstruction_error(images, latents)
        error = squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()  # keeps the gradient finite at 0
        return Evidence(-distances, distances + error[:, None])


def autoencoder_loss(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
) -> TrainingStep:
    """Minus the evidence lower bound on benign images, with unit variance of pixels and without its constant."""
    model = detector.detector
    assert isinstance(model, GaussianMixtureAutoencoder)  # tells the type checker
    mean, log_variance = model.encode(images)
    noise = torch.empty_like(mean).normal_(generator=generator)
    reconstruction = model.reconstruction_error(images, mean + (log_variance / 2).exp() * noise)
    distances = model.clusters.squared_distances(mean)
    to_class = distances.gather(1, labels[:, None]).squeeze(1)
    divergence = to_class + (log_variance.exp() - log_variance - 1).sum(dim=1)
    correct = (distances.argmin(dim=1) == labels).sum()
    return TrainingStep((reconstruction + divergence).mean() / 2, correct)


RESISTING = Recipe(
    title="Resisting",
    reference="Ghosh et al., Resisting adversarial attacks using Gaussian mixture variational autoencoders (2019)",
    training_name="resisting",
    build=GaussianMixtureAutoencoder,
    trainer=lambda detector, schedule: LossTrainer(detector, autoencoder_loss, schedule),
    objective="adaptive",
    attacked=False,
)
