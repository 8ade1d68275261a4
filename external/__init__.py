"""Results of other systems, judged as our own are: embeddings, score matrices, ranked lists.

They become a method that only looks its scores up. Our own rankings go out as files of other
evaluators.
"""

from external.export import export_rows, write_export
from external.plan import ExternalPlan
from external.results import ExternalFiles

__all__ = ["ExternalFiles", "ExternalPlan", "export_rows", "write_export"]
