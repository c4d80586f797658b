"""Statistics of a fair comparison: pure functions of arrays, each naming its source.

Every function takes `higher_is_better` or works on scores already turned so that higher is better;
nothing here knows trials, stores or pages.
"""

from loralab.study.statistics.budget import expected_best as expected_best
from loralab.study.statistics.compare import Difference as Difference
from loralab.study.statistics.compare import holm as holm
from loralab.study.statistics.compare import paired_difference as paired_difference
from loralab.study.statistics.compare import seeds_needed as seeds_needed
from loralab.study.statistics.compare import verdict as verdict
from loralab.study.statistics.intervals import Interval as Interval
from loralab.study.statistics.intervals import bootstrap_interval as bootstrap_interval
from loralab.study.statistics.intervals import pooled_t_intervals as pooled_t_intervals
from loralab.study.statistics.intervals import spearman as spearman
from loralab.study.statistics.intervals import t_interval as t_interval
from loralab.study.statistics.peak import Peak as Peak
from loralab.study.statistics.peak import fit_peak as fit_peak
from loralab.study.statistics.pool import pooled_seed_variance as pooled_seed_variance
