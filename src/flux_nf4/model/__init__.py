"""The networks of FLUX.1: transformer, text encoders and autoencoder. No I/O."""
