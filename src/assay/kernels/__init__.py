"""CPU kernels (numba) behind plain torch functions; nothing else in the library touches numba."""
