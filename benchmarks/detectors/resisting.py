"""A variational autoencoder with a Gaussian per class in its latent space, after Ghosh, Losalka & Black.

An image is suspicious if its latent mean is far from its class's Gaussian or if it is not reconstructed. The encoder
is the experiment's own network, for the same capacity as the other detectors', behind it a linear layer; the paper's
autoencoders have 10 (MNIST) and 12 (CIFAR10) layers. The Gaussians are those of `ClusterGuard`: one latent dimension a
class, unit variance, means at 10 on the axes. The divergence from the Gaussian of its own class is all that teaches an
image its class. Ghosh et al. put a threshold on each distance; the paper, and we, one on the sum.
"""

from typing import cast

import torch
from clusterguard import PGD, DetectorModule, Evidence
from clusterguard.detectors import GaussianClusters, WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor, nn

from benchmarks.detectors.features import widen
from benchmarks.detectors.recipe import LossTrainer, Recipe


class GaussianMixtureAutoencoder(DetectorModule):
    """Encoder, clusters and decoder.

    Args:
        network: with num_features and image_shape (C, H, W), H and W multiples of 4.
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
        """Mean and logarithm of the variance, each (B, m), of the latent given images (B, C, H, W) in [0, 1]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def represent(self, images: Tensor) -> Tensor:
        """The latent's mean: images (B, C, H, W) in [0, 1] -> (B, m)."""
        return self.encode(images)[0]

    def reconstruction_error(self, images: Tensor, latents: Tensor) -> Tensor:
        """Squared Euclidean distance of images (B, C, H, W) to what latents (B, m) decode to: (B,)."""
        return widen(images - self.decoder(latents)).flatten(1).square().sum(dim=1)

    def evidence(self, images: Tensor) -> Evidence:
        """Class scores −d and suspicion d + ‖x − rec(x)‖₂ of images (B, C, H, W) in [0, 1], d (B, K) latent distances.

        Nothing is sampled: the latent is its mean.
        """
        latents = self.represent(images)
        distances = self.clusters.distances(latents)
        squared = self.reconstruction_error(images, latents)
        error = squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()  # a slope at 0 too
        return Evidence(-distances, distances + error[:, None])


def loss(
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
    training="resisting",
    build=GaussianMixtureAutoencoder,
    trainer=lambda detector, schedule: LossTrainer(detector, loss, schedule),
    objective="adaptive",
    attacked=False,
)
