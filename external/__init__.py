"""Results of other systems, judged as our own are: embeddings, score matrices, ranked lists.

They become a method that only looks its scores up. Our own rankings go out as files of other
evaluators.
"""
