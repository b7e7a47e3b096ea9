"""Planning a run without the machine: its FLOPs, its memory and its time, from a configuration.

gpus      peaks of arithmetic and memory, from data sheets
flops     the prior's FLOPs, by a formula
imagined  the model on fake tensors, which have shapes and no values: FLOPs and bytes by running
examples  how long the examples of a task are taken to be
memory    bytes per device, by part
plan      all of it for one stage;  report  as text and as JSON
"""
