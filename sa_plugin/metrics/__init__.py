"""Numbers from features: images -> features -> moments -> numbers.

The features come from the caller, and a result is named for them: a distance in one feature space
says nothing about another.
"""

from sa_plugin.metrics.frechet import frechet_distance
from sa_plugin.metrics.inception_score import inception_score
from sa_plugin.metrics.moments import Moments

__all__ = ["Moments", "frechet_distance", "inception_score"]
