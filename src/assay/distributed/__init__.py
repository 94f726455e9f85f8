"""Compressed communication for distributed training: compressors, hooks, simulation."""

from assay.distributed.combinations import Compose, ErrorFeedback
from assay.distributed.compressors import (
    Compressor,
    Identity,
    NaturalCompressor,
    StochasticIntegerRounding,
    natural_round,
)
from assay.distributed.dithering import NaturalDithering, RandomDithering
from assay.distributed.hooks import (
    CompressedReduceScatter,
    CompressionState,
    two_way_compression_hook,
)
from assay.distributed.link import LinkModel
from assay.distributed.payload import Payload
from assay.distributed.simulate import SimulatedWorkers, Traffic, two_way_sum, worker_gradients
from assay.distributed.sparsifiers import RandomK, TopK

__all__ = [
    "Compressor",
    "Payload",
    "Identity",
    "NaturalCompressor",
    "NaturalDithering",
    "RandomDithering",
    "TopK",
    "RandomK",
    "StochasticIntegerRounding",
    "Compose",
    "ErrorFeedback",
    "natural_round",
    "CompressionState",
    "two_way_compression_hook",
    "CompressedReduceScatter",
    "LinkModel",
    "SimulatedWorkers",
    "Traffic",
    "two_way_sum",
    "worker_gradients",
]
