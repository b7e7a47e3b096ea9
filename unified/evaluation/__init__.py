"""Measuring a trained model. Nothing here knows a modality, a task or a data set by name.

metrics.py         PSNR, edit distance, the bootstrap
reconstruction.py  what an autoencoder gives back
flow_loss.py       the prior's loss on one task's target, example by example
pairing.py         does a condition matter: true pairs against permuted ones
nearest.py         retrieval and nearest centroids among vectors
pca.py             what a linear autoencoder would reach
"""
