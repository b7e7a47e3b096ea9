"""Training: the stages of a configuration, one after the other.

run          a whole run: folders, processes, one stage after the other
  stages     a stage from its configuration: objective, data, validation
    objectives/  what is minimised: autoencoder, joint, alignment
  loop       the one training loop
    work         what a step needs before it, and what comes of it
    optim, ema   who learns how fast; averages of the weights
    parallel     one or many processes
    divergence   whether the loss grows without end
    validation   losses of held-out examples;  samples  things to look at
    metrics      what is reported, where
  checkpoint   all that the next step depends on;  saver  who writes it, and when
folder       the run's folder and what is in it
init, export     weights from elsewhere, and a checkpoint as a pipeline
"""
