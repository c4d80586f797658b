"""The sharpness of the loss in an adapter's own tensors, per block, at initialisation.

`loralab.curvature(model, "pissa", data=batches)` is `measure.curvature`.
"""

from loralab._callable import make_callable
from loralab.curvature.measure import BlockCurvature as BlockCurvature
from loralab.curvature.measure import Curvature as Curvature
from loralab.curvature.measure import curvature as curvature
from loralab.curvature.measure import study_curvature as study_curvature

make_callable(__name__, "curvature")
