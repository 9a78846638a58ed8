"""NF4: the codec, its plain PyTorch reference, its kernels, and the linear layer that uses them."""
