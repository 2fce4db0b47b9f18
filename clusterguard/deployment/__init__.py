"""What a guard needs in service: an exported graph, images as people see them, and an alarm for drift."""

from clusterguard.deployment._export import OnnxDetector, export_onnx, export_program, load_onnx
from clusterguard.deployment._images import ImageFile, fit_image, read_image
from clusterguard.deployment._monitoring import FalsePositiveMonitor, MonitorReport, expected_delay, plausible_rate
from clusterguard.deployment._programs import load_program, save_program

__all__ = [
    "FalsePositiveMonitor",
    "ImageFile",
    "MonitorReport",
    "OnnxDetector",
    "expected_delay",
    "export_onnx",
    "export_program",
    "fit_image",
    "load_onnx",
    "load_program",
    "plausible_rate",
    "read_image",
    "save_program",
]
