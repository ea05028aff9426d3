//! Devices: names, and the one `dlopen` that makes CUDA visible to libtorch.
