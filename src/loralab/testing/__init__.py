"""The exam that every method passes, for this catalogue and for plug-ins.

Each `check_*` function takes a method's name, or a Recipe of pieces that methods bring, and raises
AssertionError with what is wrong. In a plug-in's own tests:

    >>> import pytest
    >>> from loralab.testing import CHECKS
    >>> @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
    ... def test_my_method(check):
    ...     check("my_method")
"""

from loralab.testing.conformance import CHECKS as CHECKS
from loralab.testing.conformance import check_dense_equals_forward as check_dense_equals_forward
from loralab.testing.conformance import check_disable_is_exact as check_disable_is_exact
from loralab.testing.conformance import check_every_tensor_learns as check_every_tensor_learns
from loralab.testing.conformance import check_gradients as check_gradients
from loralab.testing.conformance import check_is_lean as check_is_lean
from loralab.testing.conformance import check_leaves_no_trace as check_leaves_no_trace
from loralab.testing.conformance import check_merge_is_exact as check_merge_is_exact
from loralab.testing.conformance import check_parameter_count as check_parameter_count
from loralab.testing.conformance import check_save_and_load as check_save_and_load
from loralab.testing.conformance import check_starts_at_base as check_starts_at_base
from loralab.testing.elsewhere import check_other_device as check_other_device
from loralab.testing.golden import fingerprint as fingerprint
from loralab.testing.keeping import KEEPING as KEEPING
from loralab.testing.packing import (
    check_any_slot_saves_and_loads as check_any_slot_saves_and_loads,
)
from loralab.testing.packing import check_divergence_stays_alone as check_divergence_stays_alone
from loralab.testing.packing import check_packed_equals_alone as check_packed_equals_alone
from loralab.testing.packing import (
    check_packed_equals_alone_on_other_layers as check_packed_equals_alone_on_other_layers,
)
from loralab.testing.robustness import ROBUSTNESS as ROBUSTNESS
from loralab.testing.robustness import check_torch_compile as check_torch_compile
from loralab.testing.toy import ToyModel as ToyModel
from loralab.testing.toy import ToyTask as ToyTask

CHECKS += [
    check_packed_equals_alone,
    check_packed_equals_alone_on_other_layers,
    check_divergence_stays_alone,
    check_any_slot_saves_and_loads,
    check_other_device,
    *ROBUSTNESS,
    *KEEPING,
]
