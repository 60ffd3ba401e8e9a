"""The one picture type that sources yield, backbones take and environments show."""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""One picture: uint8 [H, W, 3], RGB, upright."""
