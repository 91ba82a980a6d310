"""Every operator in plain PyTorch: the specification, and the path that runs on a CPU.

Each part holds an expression that autograd differentiates (what a CPU runs, and what
torch.compile fuses), and the explicit forward and backward that the Triton kernels mirror.
"""
