"""The Triton kernels and how they are launched. Imported on first use: it needs Triton."""
