"""Extraction: images and texts to feature files, in parts that survive a kill, by many processes.

A job has stages (the images of a split, its texts, ...); a stage is cut into units: fixed ranges of
its distinct images or texts, or a shard. What is encoded is kept in part files, at most one unit's
work (in shards: one batch a worker) behind. Batches are cut from the units, never across them, so
that a row's arithmetic does not depend on who computes it, or when; the finished files are put
together from the parts, and the manifest is written last.

    PARTS/run.json                     what may not change between two runs
    PARTS/STAGE/UNIT.npz               a finished unit; before it, for shards, UNIT+BATCH.npz

    flags.py                           the flags of create_features.py
    dataset.py, labelled.py, assets.py     what a command makes: its stages, its finished files
    composed.py, embeddings.py         the same by systems of composed/; of embeddings there are
    inputs.py, asked.py, words.py      what methods read beside; words that contextualise texts
    job.py                             a job's run: parts, ranks, an end
    stage.py, encoding.py              the three kinds of stage; batches through the model
    reading.py, parts.py               images off the disk; parts on the disk
    manifest.py, reference.py          what vouches for features; the reference's pickles
"""
