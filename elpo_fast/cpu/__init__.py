"""The guest wing: kernels for CPUs, written by hand for Numba, imported only when a CPU computes.

vectors, kernel     vector instructions through LLVM; how a kernel is compiled and kept
threads             what threads share
elements            bfloat16 in a `uint16`, and the exponential of one number
path_attention      attention along the paths of trees, forward and backward (training), by PyTorch
decoder*            a step of the local engine's decoder
sampling            the next token
"""
