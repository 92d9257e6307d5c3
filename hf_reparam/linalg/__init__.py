"""Tensor mathematics: tensors in, tensors out, float64 inside. Knows no module and no model."""

from hf_reparam.linalg.allocate import Options, Way, allocate
from hf_reparam.linalg.calibration import Calibration, HeldOut
from hf_reparam.linalg.curves import Curve, curve
from hf_reparam.linalg.factorize import Decomposition, Factors, decompose, spectrum, working_device
from hf_reparam.linalg.fingerprint import fingerprint
from hf_reparam.linalg.heads import HeadMaps, HeadMoments, map_both, map_rows, output_moment
from hf_reparam.linalg.metric import Metric
from hf_reparam.linalg.moments import SHRINKAGES, LayerMoments, Shrinkage
from hf_reparam.linalg.paired import PairedMoments
from hf_reparam.linalg.pivot import Pivots, pivot
from hf_reparam.linalg.tables import Table, TableMoments, decompose_table

__all__ = [
    "SHRINKAGES",
    "Calibration",
    "Curve",
    "Decomposition",
    "Factors",
    "HeadMaps",
    "HeadMoments",
    "HeldOut",
    "LayerMoments",
    "Metric",
    "Options",
    "PairedMoments",
    "Pivots",
    "Shrinkage",
    "Table",
    "TableMoments",
    "Way",
    "allocate",
    "curve",
    "decompose",
    "decompose_table",
    "fingerprint",
    "map_both",
    "map_rows",
    "output_moment",
    "pivot",
    "spectrum",
    "working_device",
]
