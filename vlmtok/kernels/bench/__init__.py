"""The kernels against torch and against what the machine allows."""
