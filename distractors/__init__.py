"""Distractors: rows on disk that are wrong for every query, ranked beside each query's gallery.

pool.py reads them, counting.py and questions.py are the maths of a pass over them, passes.py runs
one and keeps what it found, ranks.py shares it among processes, among.py evaluates with it.
"""
