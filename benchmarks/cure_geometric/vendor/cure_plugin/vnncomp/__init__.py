"""What verifiers and VNN-COMP exchange: properties, instance lists, benchmark generators, runs.

:mod:`fixed_point`, :mod:`property`, :mod:`vnnlib`, :mod:`graphs`, :mod:`instances` and :mod:`generate` need numpy, onnx
and pyyaml alone: benchmark roots carry copies of them.
"""
