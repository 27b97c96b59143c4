"""Geometric sets: transformed images, relaxed soundly.

Conventions of every function in this package:

- Images are (B, C, H, W), floating point. Pixel (row i, column j) has the centred coordinates
  ``x = j - (W-1)/2`` (right) and ``y = (H-1)/2 - i`` (up).
- An output pixel is the bilinear interpolation of the input at the point that the inverse transformation
  maps the pixel's (x, y) to. All pixels outside the image are 0.
- Names, as in DeepG and CGT, with the unit of the parameter: ``R`` rotation about the centre, degrees,
  counter-clockwise; ``T`` translation, two parameters, pixels right and up; ``Sc`` scaling by
  1 + s/100; ``Sh`` horizontal shear x' = x + y * m/100; ``C`` contrast, pixel * (1 + c/100);
  ``B`` brightness, added to the pixel.
- A composition is a sequence of names, the first applied first. The image is interpolated once, at the
  composed inverse point; then contrast and brightness act in their listed order, on padding too,
  without clipping (they commute with interpolation, and padding comes before them).
- Parameters are (B, D), one column per parameter in listed order; ``T`` has two columns.

Coordinates are computed in float64 whatever the image's type. The bounds hold for the real-valued
transformation; :func:`~cure_plugin.sets.geometric.transforms.transform` in float32 adds its own rounding
(about 1e-6 of the largest pixel).
"""

from cure_plugin.sets.geometric.perturbation import PerturbationGeometric

__all__ = ["PerturbationGeometric"]
