"""Differentiable Adaptive Merging (DAM, arXiv 2410.08371) for mergekit.

Importing this package makes mergekit know the merge method `dam`: at once where mergekit
is loaded already, else as soon as it is. Nothing heavy is imported here, because
`import torch` passes through this file (see `plugin`).
"""

from mergekit_dam import plugin

__version__ = "0.1.0"

plugin.autoload()
