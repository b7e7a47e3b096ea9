"""From shards to the observations of a training step.

shards.py    tar files -> raw examples (bytes)
source.py    the raw examples of one split of one named source
examples.py  a raw example as a mapping: modality name -> item
streams.py   an example as the observations that a task, or an autoencoder, trains on
mixture.py   which examples a step trains on; exact resume
prefetch.py  the same, `data.prefetch` steps ahead in a thread
fixed.py     the examples that validation looks at
"""
