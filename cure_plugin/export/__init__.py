"""Certified nets and instances for other tools: ONNX, VNNLIB, and Marabou as an outside verifier."""

from cure_plugin.export.encoders import default_encoding, encodes, encoding_names
from cure_plugin.export.encodings import Encoding, encode
from cure_plugin.export.files import export_instances
from cure_plugin.export.onnx_net import export_onnx, onnx_model
from cure_plugin.export.onnx_reader import OnnxNet, read_network, read_onnx_net
from cure_plugin.export.verifiers import CureVerifier, MarabouVerifier
from cure_plugin.vnncomp.property import Property
from cure_plugin.vnncomp.query import Query, read_query
from cure_plugin.vnncomp.vnnlib import write_vnnlib

__all__ = [
    "CureVerifier",
    "Encoding",
    "MarabouVerifier",
    "OnnxNet",
    "Property",
    "Query",
    "default_encoding",
    "encode",
    "encodes",
    "encoding_names",
    "export_instances",
    "export_onnx",
    "onnx_model",
    "read_network",
    "read_onnx_net",
    "read_query",
    "write_vnnlib",
]
