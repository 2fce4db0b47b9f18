"""The data sets of the benchmarks: where they come from, how they are divided, and batches of their images."""

from benchmarks.data._data_sets import DATA_SETS, fetch_data_set, find_data_set, load_data_set
from benchmarks.data._definition import DataSet, DataSetDefinition, hold_out_calibration
from benchmarks.data._fetching import Contents, DownloadError, data_root
from benchmarks.data._images import FloatBatches, Images, mix_boxes

__all__ = [
    "DATA_SETS",
    "Contents",
    "DataSet",
    "DataSetDefinition",
    "DownloadError",
    "FloatBatches",
    "Images",
    "data_root",
    "fetch_data_set",
    "find_data_set",
    "hold_out_calibration",
    "load_data_set",
    "mix_boxes",
]
