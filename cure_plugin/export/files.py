"""A folder of ONNX and VNNLIB files with its instances.csv, from a net, images and sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor, nn

from cure_plugin.certification.dataset import read_specs
from cure_plugin.datasets import ImageData
from cure_plugin.errors import OutputError, SpecError
from cure_plugin.export.abcrown import write_abcrown
from cure_plugin.export.encoders import default_encoding
from cure_plugin.export.encodings import Encoding, encode
from cure_plugin.export.onnx_net import onnx_model
from cure_plugin.sets import PerturbationSet, SetSpec
from cure_plugin.vnncomp.graphs import output_size, write_model
from cure_plugin.vnncomp.instances import Instance, write_instances
from cure_plugin.vnncomp.vnnlib import write_vnnlib


@dataclass(frozen=True)
class Form:
    """How sets are written as properties.

    Attributes:
        encoding: see :func:`encode`; default: each set's own.
        version: of VNNLIB. compress: write ``.vnnlib.gz``.
    """

    encoding: str | None = None
    version: str = "1.0"
    compress: bool = False

    def encoded(self, model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationSet) -> Encoding:
        """A set around one image (*input).

        Raises:
            SpecError: a set that the encoding or the version cannot say.
        """
        found = encode(model, x, label, own, self.encoding or default_encoding(own, self.version))
        if self.version not in found.versions:
            raise SpecError(f"encoding {found.name!r} of {own} needs VNNLIB {' or '.join(found.versions)}")
        return found


_DEFAULT = Form()


def export_instances(
    net: nn.Module,
    data: ImageData,
    sets: Sequence[SetSpec | str],
    folder: str | Path,
    form: Form = _DEFAULT,
    timeout: float = 300,
) -> list[Instance]:
    """Write ``onnx/``, ``vnnlib/`` and ``instances.csv``; ``onnx/model.onnx`` is the net itself.

    For l1 and l2 balls also ``abcrown/SET.yaml``, see :func:`write_abcrown`.

    Networks that several instances share are written once.

    Args:
        sets: specs, or their text.
        form: how the properties are written.
        timeout: seconds per instance.

    Raises:
        SpecError: a set that the encoding or the version cannot say, a timeout that is not > 0, a label that is no
            class of the net.
        OutputError: a file cannot be written.
    """
    if not 0 < timeout < float("inf"):
        raise SpecError(f"timeout must be finite and > 0, got {timeout!r}")
    specs, folder = read_specs(sets), Path(folder)
    plain = onnx_model(net, data.shape)
    x, y = data.batch(slice(0, len(data)))
    if len(y) and int(y.max()) >= output_size(plain):
        raise SpecError(f"label {int(y.max())} of image {int(y.argmax())}: the net has {output_size(plain)} classes")
    owns = [spec.build() for spec in specs]
    firsts = [form.encoded(plain, x[0], int(y[0]), own) for own in owns]  # before anything is written
    try:
        (folder / "instances.csv").unlink(missing_ok=True)  # an earlier list would speak of the new net
    except OSError as error:
        raise OutputError(f"cannot write {folder / 'instances.csv'}: {error}; choose another folder") from error
    written = {_digest(plain): "model.onnx"}
    write_model(plain, folder / "onnx" / "model.onnx")
    instances = []
    for spec, own, first, name in zip(specs, owns, firsts, _file_names(specs), strict=True):
        for index in range(len(data)):
            found = encode(plain, x[index], int(y[index]), own, first.name) if index else first
            base = f"{name}_{found.name}_{index}"
            network = written.get(_digest(found.model))
            if network is None:
                network = written[_digest(found.model)] = f"model_{base}.onnx"
                write_model(found.model, folder / "onnx" / network)
            path = f"vnnlib/{base}.vnnlib{'.gz' if form.compress else ''}"
            write_vnnlib(folder / path, found.wanted, form.version, f"image {index}, {spec}, encoding {found.name}")
            instances.append(Instance(f"onnx/{network}", path, timeout))
        if own.shared_budget:
            write_abcrown(folder / "abcrown" / f"{name}.yaml", folder / "onnx" / "model.onnx", data, own, timeout)
    if instances:
        write_instances(folder / "instances.csv", instances)
    return instances


def _file_names(sets: Sequence[SetSpec]) -> list[str]:
    """Each set's text as part of a file name; numbered where two would be the same."""
    names: list[str] = []
    for spec in sets:
        plain = re.sub(r"[^0-9A-Za-z.]+", "-", str(spec)).strip("-")
        same = sum(name == plain or name.startswith(f"{plain}.no") for name in names)
        names.append(f"{plain}.no{same + 1}" if same else plain)
    return names


def _digest(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
