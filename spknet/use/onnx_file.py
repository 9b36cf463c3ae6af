"""A network as ONNX: waveform in, embedding out, features inside, any length and any batch; checked against torch by onnxruntime.

    waves (batch, samples) float32 in [-1, 1] at the file's `sample_rate`  ->  embeddings (batch, D) float32, not normalised

The graph is torch.export's, with two branches of ours for it (spknet.models.features): short utterances are repeated without
asking how long they are, and the DFT is two matrix products, since complex numbers are in few runtimes. Metadata of the file:
`spknet` (version), `sample_rate` (Hz), `network` (JSON: the options of model and features), `card` where the network has one.

    file = to_onnx(graph(network), {"sample_rate": "16000"})
    OnnxNetwork(file)(torch.zeros(1, 16000))  # (1, D)
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from spknet import rng
from spknet.errors import UserError

OPSET = 18
SECONDS = (0.5, 2.0, 7.3, 30.0)  # lengths that are checked
LEAST_COSINE, LARGEST_DIFFERENCE = 0.99999, 1e-4  # the latter over the norm
# An example that no stride divides: torch.export takes "32000 is a multiple of 10" for a condition, and then cannot solve it.
EXAMPLE = (2, 32017)
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's name for a node's module: ['', 'features', ...]
TABLE = 2**23  # bytes of a constant that is computed beforehand
INSTALL = "pip install 'spknet[onnx]'"


class ExportError(UserError):
    """A network cannot be exported, or the exported one answers something else; the message says which and by how much."""


def graph(network: nn.Module) -> torch.export.ExportedProgram:
    """torch.export's graph of a network in eval mode, in float32 on the CPU, for any batch and length. Raises ExportError."""
    any_size = torch.export.Dim.DYNAMIC
    network = network.float().cpu().eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                network, (torch.zeros(EXAMPLE),), dynamic_shapes=({0: any_size, 1: any_size},), strict=False
            )
    except Exception as error:  # whatever torch.export meets in a layer that it does not know
        raise ExportError(f"torch.export cannot take this network: {str(error).splitlines()[0]}") from error


def to_onnx(program: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    """The graph as the bytes of an ONNX file, `about` as its metadata. Raises UserError without the packages of onnx."""
    try:
        from onnxscript import optimizer
    except ImportError:
        raise UserError(f"ONNX needs the packages onnx, onnxscript and onnxruntime: {INSTALL}") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # each export says that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            input_names=["waves"],
            output_names=["embeddings"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            # Its rewriting rules take x + 1e-8 for x + 0 (onnxscript 0.7.2), and so the floors of logarithms and variances away.
            optimize=False,
        )
    # Up to the tables of the DFT, which else would be computed for each utterance.
    optimizer.fold_constants(made.model, input_size_limit=TABLE, output_size_limit=TABLE)
    optimizer.remove_unused_nodes(made.model)
    for (
        node
    ) in made.model.graph:  # the module that a node is of stays, the lines of code with this machine's paths do not
        scopes = node.metadata_props.get(SCOPES, "")
        node.metadata_props.clear()
        node.metadata_props[SCOPES] = scopes
    made.model.metadata_props.update(about)
    return made.model_proto.SerializeToString()


class OnnxNetwork(nn.Module):
    """An ONNX file, or its bytes, run by onnxruntime on the CPU in the place of a network: (batch, samples) -> (batch, D).

    threads: 0 for one a core. sample_rate: Hz. Raises UserError for another program's file.
    """

    def __init__(self, file: str | bytes, threads: int = 0):
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"ONNX needs the package onnxruntime: {INSTALL}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        about = self.session.get_modelmeta().custom_metadata_map
        if "sample_rate" not in about:
            raise UserError("no ONNX file of `spknet export`: it does not say its sample rate")
        self.sample_rate = int(about["sample_rate"])

    def forward(self, waves: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"waves": waves.float().numpy()})[0])


def check(network: nn.Module, other: nn.Module, sample_rate: int) -> list[tuple[float, float, float]]:
    """(seconds, least cosine, largest difference over the norm) of two networks' embeddings, at the lengths of SECONDS.

    Batches of one and two of noise whose level rises and falls and whose end is digital silence. Raises ExportError.
    """
    rows = []
    for i, seconds in enumerate(SECONDS):
        samples = round(seconds * sample_rate)
        noise = rng.stream(0, i, "export check").standard_normal((1 + i % 2, samples))
        waves = noise * 0.1 * np.sin(2 * np.pi * np.arange(samples) / samples * 3) ** 2
        waves[:, -samples // 10 :] = 0
        with torch.no_grad():
            a, b = (of(torch.from_numpy(waves).float()).double() for of in (network, other))
        cosine = float(torch.cosine_similarity(a, b).min())
        difference = float(((a - b).abs().amax(dim=1) / a.norm(dim=1)).max())
        rows.append((seconds, cosine, difference))
        if not (cosine > LEAST_COSINE and difference < LARGEST_DIFFERENCE):
            raise ExportError(
                f"at {seconds:g} s the exported network differs: cosine {cosine:.7f}, largest difference {difference:.1e} of the "
                f"norm; expected above {LEAST_COSINE} and below {LARGEST_DIFFERENCE:g}; no file is written"
            )
    return rows
