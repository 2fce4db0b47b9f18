"""Put a guard in front of an image classifier: it detects adversarial examples, also when the attacker knows it.

Shapes in all docstrings: B images in a batch, C channels, H × W pixels in [0, 1]; m dimensions of the
representation; K classes. Rates are fractions, distances Euclidean, ε in pixel units of [0, 1].
"""

from importlib.metadata import version

from clusterguard.torchvision_operators import declare_missing_operators

declare_missing_operators()  # before anything can import torchvision

from clusterguard.attacks import (  # noqa: E402
    APGD,
    BIM,
    FGSM,
    MIM,
    NES,
    PGD,
    Attack,
    Boundary,
    CarliniWagner,
    FastMinimumNorm,
    MixedAttack,
    MultiTarget,
    OrthogonalPGD,
    PaperProtocol,
    RandomTarget,
    RepelThenMinimise,
    RepresentationMatching,
    SparseRS,
    Square,
    Towards,
    Transfer,
    WorstCaseSuite,
)
from clusterguard.calibration import Calibration, Calibrator  # noqa: E402
from clusterguard.certification import certified_radius, certified_success_rate, certify  # noqa: E402
from clusterguard.certified_training import CertifiedTrainer  # noqa: E402
from clusterguard.checkpoints import EpochRecord  # noqa: E402
from clusterguard.clusters import GaussianClusters  # noqa: E402
from clusterguard.confidence import ConfidenceDetector  # noqa: E402
from clusterguard.consistency import ConsistentDetector  # noqa: E402
from clusterguard.decision import Detection, Detector, Evidence, decide, success_margin  # noqa: E402
from clusterguard.detector import DetectorModule, WithThresholds  # noqa: E402
from clusterguard.evaluation import evaluate  # noqa: E402
from clusterguard.export import OnnxDetector, export_onnx, export_program, load_onnx  # noqa: E402
from clusterguard.guard import ClusterGuard  # noqa: E402
from clusterguard.monitoring import FalsePositiveMonitor, MonitorReport, plausible_rate  # noqa: E402
from clusterguard.results import Evaluation  # noqa: E402
from clusterguard.training import AdversarialClusterTrainer  # noqa: E402
from clusterguard.training_engine import TrainingStep  # noqa: E402
from clusterguard.training_loop import DetectorTrainer  # noqa: E402
from clusterguard.training_options import TrainingOptions  # noqa: E402

from clusterguard import attacks, errors, interop, recipes, samples  # noqa: E402, isort: skip  # recipes need the rest

__version__ = version("clusterguard")

__all__ = [
    "APGD",
    "BIM",
    "FGSM",
    "MIM",
    "NES",
    "PGD",
    "AdversarialClusterTrainer",
    "Attack",
    "Boundary",
    "Calibration",
    "Calibrator",
    "CarliniWagner",
    "CertifiedTrainer",
    "ClusterGuard",
    "ConfidenceDetector",
    "ConsistentDetector",
    "Detection",
    "Detector",
    "DetectorModule",
    "DetectorTrainer",
    "EpochRecord",
    "Evaluation",
    "Evidence",
    "FalsePositiveMonitor",
    "FastMinimumNorm",
    "GaussianClusters",
    "MixedAttack",
    "MonitorReport",
    "MultiTarget",
    "OnnxDetector",
    "OrthogonalPGD",
    "PaperProtocol",
    "RandomTarget",
    "RepelThenMinimise",
    "RepresentationMatching",
    "SparseRS",
    "Square",
    "Towards",
    "TrainingOptions",
    "TrainingStep",
    "Transfer",
    "WithThresholds",
    "WorstCaseSuite",
    "attacks",
    "certified_radius",
    "certified_success_rate",
    "certify",
    "decide",
    "errors",
    "evaluate",
    "export_onnx",
    "export_program",
    "interop",
    "load_onnx",
    "plausible_rate",
    "recipes",
    "samples",
    "success_margin",
]
