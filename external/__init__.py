"""Results of other systems, judged as our own are: embeddings, score matrices, ranked lists.

They become a method that only looks its scores up.
"""

from external.plan import ExternalPlan
from external.results import ExternalFiles

__all__ = ["ExternalFiles", "ExternalPlan"]
