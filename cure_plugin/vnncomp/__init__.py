"""What verifiers and VNN-COMP exchange: properties, instance lists, benchmark generators, runs.

:mod:`generate` and what it imports need numpy, onnx and pyyaml alone: :mod:`pack` copies them into benchmark roots.
"""
