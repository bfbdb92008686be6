"""Triton kernels, shipped in the wheel as imbsam_fast.kernels. There are none yet.

Raises ImportError under any other name: an unrelated package called `kernels` exists.
"""

if __name__ != "imbsam_fast.kernels":
    raise ImportError(f"imported as {__name__!r}; import it as 'imbsam_fast.kernels'")
