"""An ONNX file in 8-bit integers: weights by channel, activations by the ranges that utterances show, features left as they are.

Two ways, both made and measured. Of those faster than float the one whose embeddings stay nearer to float's is the better:

    static    ranges of activations are learned on utterances beforehand; every convolution and product in integers
    dynamic   ranges are taken from each utterance while it is embedded: nearer, but convolutions in onnxruntime 1.32 are slow so

    files = quantized(float_file, waves)  # {"static": bytes, "dynamic": bytes}
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from spknet.use.onnx_file import SCOPES, OnnxNetwork

SPEED_SECONDS, SPEED_ROUNDS = 4.0, 7


def quantized(file: bytes, waves: list[np.ndarray]) -> dict[str, bytes]:
    """Both ways of quantising an ONNX file's bytes. waves: (samples,) float32 each, for the ranges."""
    import onnx
    from onnxruntime import quantization

    model = _fused(onnx.load_from_string(file))
    features = [
        n.name for n in model.graph.node if any(p.key == SCOPES and "'features'" in p.value for p in n.metadata_props)
    ]
    kinds = {"per_channel": True, "nodes_to_exclude": features, "op_types_to_quantize": ["Conv", "MatMul", "Gemm"]}
    made = {}
    logging.disable(logging.WARNING)  # of its advice to prepare the file, which has been followed
    with tempfile.TemporaryDirectory() as folder:
        fused, out = Path(folder, "fused.onnx"), Path(folder, "out.onnx")
        onnx.save(model, fused)
        quantization.quantize_static(
            fused,
            out,
            _Reader(waves),
            activation_type=quantization.QuantType.QUInt8,
            calibration_providers=["CPUExecutionProvider"],
            **kinds,
        )
        made["static"] = out.read_bytes()
        quantization.quantize_dynamic(fused, out, weight_type=quantization.QuantType.QInt8, **kinds)
        made["dynamic"] = out.read_bytes()
    logging.disable(logging.NOTSET)
    return made


def _fused(model):
    """BatchNorm taken into the convolution before it, so that their product is quantised once."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    return rewriter.rewrite(model, [fuse_batchnorm_into_conv_rule])


class _Reader:
    """Utterances one after the other, as onnxruntime's calibration wants them."""

    def __init__(self, waves: list[np.ndarray]):
        self.left = iter(waves)

    def get_next(self) -> dict[str, np.ndarray] | None:
        wave = next(self.left, None)
        return None if wave is None else {"waves": wave[None]}


def cosines(a: OnnxNetwork, b: OnnxNetwork, waves: list[np.ndarray]) -> np.ndarray:
    """Of the embeddings that two files make of each wave."""
    pairs = [[of(torch.from_numpy(wave[None])) for of in (a, b)] for wave in waves]
    return np.array([float(torch.cosine_similarity(x, y)) for x, y in pairs])


def better(took: dict[str, float], near: dict[str, float]) -> str:
    """The way to keep. took: CPU seconds of each, "float" too. near: mean cosine to float."""
    faster = [way for way in near if took[way] < took["float"]]
    return max(faster or near, key=near.get)


def seconds(networks: dict[str, OnnxNetwork]) -> dict[str, float]:
    """CPU seconds that each network takes for 4 s of audio: the least of some rounds, in each of which all take their turn."""
    best = dict.fromkeys(networks, np.inf)
    for _ in range(SPEED_ROUNDS):
        for name, network in networks.items():
            waves = torch.zeros(1, round(SPEED_SECONDS * network.sample_rate))
            start = time.process_time()
            network(waves)
            best[name] = min(best[name], time.process_time() - start)
    return best
