"""The image modality: an f16, 64-channel VAE over diffusers' `AutoencoderKL`."""
