"""Safetensors files of tensors that are there already, by the package's own writer."""

from flux_nf4.formats.tensorfile import TensorSource, write_sources


def write_tensor_file(path, tensors, *, metadata=None):
    """Byte for byte what the safetensors library would write."""
    sources = {name: TensorSource.of(tensor) for name, tensor in tensors.items()}
    write_sources(path, sources, metadata=metadata)
