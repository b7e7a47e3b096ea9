"""From shards to the observations of a training step.

shards.py    tar files -> raw examples (bytes)
source.py    the raw examples of one split of one named source
examples.py  a raw example as a mapping: modality name -> item
streams.py   an example as the observations that a task, or an autoencoder, trains on
mixture.py   which examples a step trains on; exact resume
prefetch.py  the same, `data.prefetch` steps ahead in a thread
fixed.py     the examples that validation looks at

Making shards, and looking at them without training:

inputs.py    a folder or a table, as examples that can be packed
packing.py   such examples -> tar files
members.py   members by their endings, read without any model
needs.py     whether an example has what a configuration asks of it
checking.py  what is in shards, and what is wrong with them
report.py    the same, as text and as JSON
"""
