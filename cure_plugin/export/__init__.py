"""Certified nets and instances for other tools: ONNX, VNNLIB, and Marabou as an outside verifier."""

from cure_plugin.export.onnx_net import export_onnx, read_onnx_net
from cure_plugin.export.vnnlib import BoxInstance, read_vnnlib, write_vnnlib

__all__ = ["BoxInstance", "export_onnx", "read_onnx_net", "read_vnnlib", "write_vnnlib"]
