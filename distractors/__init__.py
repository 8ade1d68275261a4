"""Distractors: rows on disk that are wrong for every query, ranked beside each query's gallery.

pool.py reads them, counting.py, questions.py and alike.py are the maths of a pass over them,
precision.py that of its products, passes.py runs one and keeps what it found, among.py evaluates
with it, running.py is what a command does with it, and flags.py what it is told.
"""
