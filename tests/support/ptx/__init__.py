"""Kernels without a GPU: compiled ahead for a chip, and executed from their PTX.

`ahead` compiles a Triton kernel for a compute capability, `program` reads the PTX, `machine` executes it. What an
instruction does is that of NVIDIA's "Parallel Thread Execution ISA", chapter 9; one that is not known is an error.
"""
