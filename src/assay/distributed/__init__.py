"""Distributed training: compressed gradients, decentralised methods, hooks and simulation."""

from assay.distributed.blockwise import Blockwise
from assay.distributed.combinations import Compose, ErrorFeedback
from assay.distributed.compressors import (
    Compressor,
    Identity,
    NaturalCompressor,
    StochasticIntegerRounding,
    natural_round,
)
from assay.distributed.decentralized import DecentralizedOptimizer, SimulatedAgents
from assay.distributed.decentralized_updates import (
    D2,
    DGD,
    DGET,
    EXTRA,
    ChebyshevFiltered,
    GradientTracking,
    LocalSGD,
    Method,
    ProxPDA,
)
from assay.distributed.deep_gradient_compression import (
    DensityWarmup,
    DGCState,
    DGCWorker,
    MomentumCorrection,
    dgc_hook,
)
from assay.distributed.dithering import NaturalDithering, RandomDithering
from assay.distributed.gossip import Gossip, SimulatedGossip, chebyshev_rounds
from assay.distributed.hooks import (
    CompressedReduceScatter,
    CompressionState,
    two_way_compression_hook,
)
from assay.distributed.link import LinkModel
from assay.distributed.payload import Payload
from assay.distributed.selection import Cast, SampledTopK, Threshold
from assay.distributed.simulate import SimulatedWorkers, Traffic, two_way_sum, worker_gradients
from assay.distributed.sparsifiers import RandomK, TopK
from assay.distributed.topology import MixingMatrix, Topology, TopologySchedule

__all__ = [
    "Compressor",
    "Payload",
    "Identity",
    "NaturalCompressor",
    "NaturalDithering",
    "RandomDithering",
    "TopK",
    "RandomK",
    "SampledTopK",
    "Threshold",
    "Cast",
    "StochasticIntegerRounding",
    "Compose",
    "Blockwise",
    "ErrorFeedback",
    "natural_round",
    "CompressionState",
    "two_way_compression_hook",
    "CompressedReduceScatter",
    "MomentumCorrection",
    "DensityWarmup",
    "DGCWorker",
    "DGCState",
    "dgc_hook",
    "LinkModel",
    "SimulatedWorkers",
    "Traffic",
    "two_way_sum",
    "worker_gradients",
    "Topology",
    "MixingMatrix",
    "TopologySchedule",
    "Gossip",
    "SimulatedGossip",
    "chebyshev_rounds",
    "DecentralizedOptimizer",
    "SimulatedAgents",
    "Method",
    "DGD",
    "LocalSGD",
    "GradientTracking",
    "DGET",
    "EXTRA",
    "D2",
    "ProxPDA",
    "ChebyshevFiltered",
]
