"""An encoding of your own: the stripes of stripes.py as a box per place, which any verifier of VNNLIB 1.0 reads.

Registered for that type of set alone: ``export_instances``, ``encode`` and ``cure export`` take it where nothing else
is asked for. Name this module in the entry-point group ``cure_plugin.encodings`` and it is found without an import.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from stripes import PerturbationStripe
from torch import Tensor

from cure_plugin import PerturbationPatch
from cure_plugin.export import Encoding, encodes
from cure_plugin.vnncomp.questions import in_boxes


@encodes("rows", PerturbationStripe, words="stripes", preferred=lambda own, version: True)
def rows(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationStripe) -> Encoding:
    """A box per topmost row; together they are the set, so the encoding is exact."""
    height, width = x.shape[2:]
    places = [(top, top, 0, 0) for top in range(height - own.thickness + 1)]
    hulls = [PerturbationPatch(own.thickness, width, place).box(x.double()) for place in places]
    question = in_boxes(model, [(_flat(lower), _flat(upper)) for lower, upper in hulls], label)
    return Encoding(
        "rows",
        question.model,
        question.wanted,
        exact=True,
        to_input=lambda variable: _flat(own.decode(x.double(), variable.double())),
        to_image=lambda point: torch.from_numpy(point).view(x.shape),
    )


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().double().flatten().numpy()
